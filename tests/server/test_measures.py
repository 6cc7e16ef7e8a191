"""What is measured of a federation: right, readable, and blind to who was in a cohort."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from common.config import RunConfig
from server import fleet_runs
from server.certificates import Authority
from server.door_watch import Watch
from server.enrolment import Enrolment
from server.forwarder import Traffic
from server.measures import BATCH_ROUNDS, Measures, exposition, read_measures, without_rare
from server.rounds import Round, spent_epsilon
from server.server_home import ServerHome

NOW = datetime.now(UTC)
LINE = re.compile(r'homespun_[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+|homespun_[a-z_]+.* inf')


def finished(number, answered, **rejected):
    return Round(number, np.zeros(1, np.float32), number, 2.0 * number, rejected, answered)


def test_totals_are_written_once_in_a_batch_of_rounds(tmp_path, release_spec):
    spec = release_spec(rounds=12)
    measures = Measures(tmp_path, spec, rounds=12)
    for number in range(1, BATCH_ROUNDS):
        measures.note(finished(number, 3, silent=1))
        assert read_measures(tmp_path) is None
    measures.note(finished(BATCH_ROUNDS, 3, silent=1))
    first = read_measures(tmp_path)
    assert (first.answered, first.refused, first.round) == (15, {"silent": 5}, 5)
    assert first.round_seconds == pytest.approx(6.0)
    assert float(first.epsilon) == spent_epsilon(spec, 5)

    again = Measures(tmp_path, spec, rounds=12)  # the app was killed and started again
    for number in range(6, 13):
        again.note(finished(number, 1, unavailable=2))
    last = read_measures(tmp_path)  # the last round closes its batch, full or not
    assert (last.answered, last.refused, last.round) == (22, {"silent": 5, "unavailable": 14}, 12)
    assert last.round_seconds == pytest.approx(23.0)


def test_rare_reasons_stand_together():
    assert without_rare({"silent": 9, "policy-trust": 1, "not-now": 4}) == {"silent": 9, "other": 5}
    assert without_rare({"silent": 9}) == {"silent": 9}
    assert without_rare({}) == {}


def test_the_text_is_openmetrics():
    text = exposition(
        [
            ("devices", {"state": "approved"}, 3.0),
            ("refused", {"run": 'a"b\\c\nd', "reason": "silent"}, 4.0),
            ("devices", {"state": "revoked"}, 1.0),
            ("epsilon_budget", {"run": "r"}, float("inf")),
        ]
    )
    assert text.endswith("# EOF\n")
    assert 'homespun_devices{state="approved"} 3\nhomespun_devices{state="revoked"} 1\n' in text
    assert r'homespun_refused_total{run="a\"b\\c\nd",reason="silent"} 4' in text
    assert text.count("# TYPE homespun_devices ") == 1


def test_a_coordinator_is_measured_without_naming_a_device(tmp_path, monkeypatch, tiny_base_folder):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path))
    home = ServerHome.open(create=True)
    enrolment = Enrolment(home.devices)
    token = enrolment.invite(uses=5, now=NOW, expires=NOW + timedelta(days=1), approves=True)
    devices = [enrolment.enrol(token, b"key %d" % n, "0.1.0", f"{n:032x}", now=NOW) for n in range(3)]
    enrolment.set_state(devices[0].id, "revoked")
    config = RunConfig(model=str(tiny_base_folder), cohort=2, rounds=3, max_tokens=16)
    opened = fleet_runs.prepare(home.runs / "run-1", config, [device.subject for device in devices])
    opened.ledger.close()
    measures = Measures(opened.path, opened.spec, rounds=3)
    for number in (1, 2, 3):
        measures.note(finished(number, 1, silent=1))
    authority = Authority.open(home.tls, now=NOW)
    authority.issue("leaf", ["localhost"], now=NOW)
    text = Watch(home, Traffic(10, 20, 1), lambda: 2, authority, clock=lambda: NOW).text()

    for line in (
        'homespun_devices{state="approved"} 2',
        "homespun_devices_online 2",
        'homespun_bytes_total{direction="sent"} 20',
        'homespun_answered_total{run="run-1"} 3',
        'homespun_refused_total{run="run-1",reason="other"} 3',
        'homespun_rounds_wanted{run="run-1"} 3',
        'homespun_epsilon_budget{run="run-1"} 8',
    ):
        assert line in text.splitlines()
    assert all(LINE.fullmatch(line) for line in text.splitlines() if not line.startswith("#"))
    for device in devices:
        assert device.id not in text
        assert device.subject not in text
