"""Tests of the benchmark of secure sums: it measures a round that is right, and says what it measured."""

import pytest

from simulations.bench.secagg import main, measure


def test_the_round_that_is_measured_sums_up_to_what_it_should():
    cost = measure(5, 3000, dropped=1)
    assert 0.9 < cost.error < 1.1  # as far from the exact sum as the noise that was stated
    assert cost.degree == 4
    assert 0 < cost.encode_seconds < 10
    assert 0 < cost.device_seconds < 10
    assert 0 < cost.coordinator_seconds < 10
    assert 4096 * cost.bits / 8 < cost.bytes_up < 4096 * cost.bits / 8 + 3000


def test_devices_that_are_not_measured_do_not_change_the_sum_or_the_sizes():
    some, everyone = measure(5, 100, measured=2), measure(5, 100)
    assert (some.bytes_up, some.bytes_down) == (everyone.bytes_up, everyone.bytes_down)


def test_the_command_writes_a_table(capsys):
    main(["--devices", "4", "--dim", "100"])
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.startswith("| devices | dropped | values | bits | holders |")
    assert rule.count("---:") == 10
    assert row.startswith("| 4 | 0 | 100 |")
    with pytest.raises(SystemExit):
        main(["--devices", "many"])
