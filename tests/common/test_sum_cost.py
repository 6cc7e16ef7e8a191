"""Tests of what the planner says that secure sums cost."""

import pytest

from common.masks import packed_bytes
from common.secure_sum import SecureSum, with_secure_sums
from common.sum_cost import sum_cost


def spec_of(release_spec, population, rate, shapes=((8, 256), (256, 8))):
    plain = release_spec(noise="distributed", sampling_rate=rate, population=population, rounds=22, shapes=shapes)
    return with_secure_sums(plain, epsilon=8.0, coordinator_epsilon=None, participation_cap=None)


def test_bits_and_bytes_are_those_of_the_noise_and_the_messages(release_spec):
    spec = spec_of(release_spec, 40, 1.0)
    cost = sum_cost(spec, spec.noise_multiplier)
    noise = SecureSum.of(spec).noise(spec, 40)
    assert (cost.bits, cost.coordinates) == (noise.bits, noise.padded_dim)
    vector = packed_bytes(noise.padded_dim, noise.bits)
    assert vector < cost.bytes_up < vector + 7000
    assert cost.noise_to_central == pytest.approx(noise.level * noise.step / spec.noise_multiplier)


def test_the_bytes_are_those_that_a_round_really_takes(release_spec, secure_round):
    spec = spec_of(release_spec, 30, 1.0)
    cost, sums = sum_cost(spec, 1.0), SecureSum.of(spec)
    game = secure_round(30, terms=sums.terms(spec, 1))
    game.play()
    name = game.names[0]
    assert cost.bytes_up == sum(len(answer) for (_, sender), answer in game.sent.items() if sender == name)
    down = sum(len(requests[name]) for requests in game.requests.values())
    assert cost.bytes_down == pytest.approx(down, rel=0.02)


def test_a_million_values_of_a_hundred_devices_stay_within_what_is_allowed(release_spec):
    cost = sum_cost(spec_of(release_spec, 100, 1.0, shapes=((1000, 1000),) * 1 + ((1, 1),)), 1.0)
    assert cost.coordinates == 1 << 20
    assert cost.bytes_up < 2.5e6
    assert cost.device_seconds < 1.0
    assert cost.coordinator_seconds < 5.0


def test_the_lines_name_both_adversaries_bits_seconds_and_signal(release_spec):
    spec = spec_of(release_spec, 4000, 0.05)
    text = "\n".join(sum_cost(spec, 0.56).lines())
    for word in ("against the coordinator", "epsilon", "bits", "MB up", "s on a device", "times that of central noise"):
        assert word in text
    assert set(sum_cost(spec, 0.56).to_json()) >= {"bits", "bytes_up", "device_seconds", "coordinator_epsilon"}
