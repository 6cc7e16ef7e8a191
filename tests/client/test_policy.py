"""The owner's policy: only what the owner signed counts, and only what it grants is granted."""

from __future__ import annotations

import dataclasses
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.policy import Policy, ReleaseRequest, Usage
from common.errors import ConfigError, Refusal
from common.keys import SigningKey

OWNER = SigningKey(bytes(range(32)))

GRANTED = ReleaseRequest(
    run_id="run-1",
    round=3,
    unit="user",
    noise="local",
    clip=1.0,
    noise_multiplier=0.5,
    sampling_rate=0.1,
    rounds=30,
    cohort=20,
    population=200,
    epsilon=8.0,
    delta=1e-5,
)
AWAKE = Usage(local_time=datetime(2026, 1, 1, 12, 0), on_mains_power=True, minutes_today=0.0, megabytes_today=0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.toml"


def test_a_policy_survives_its_file(path: Path) -> None:
    policy = Policy(
        serial=7,
        units=("example",),
        trust_coordinator=True,
        epsilon=math.inf,
        hours=("22:00-06:30", "12:00-13:00"),
        smallest_noise_multiplier=0.0,
        mains_power_only=False,
    )
    policy.save(path, OWNER)
    assert Policy.load(path, OWNER.verify_key) == policy
    assert Policy.load(path, OWNER.verify_key).digest == policy.digest
    assert Policy().digest != policy.digest


@given(
    st.builds(
        Policy,
        serial=st.integers(1, 2**31),
        trust_coordinator=st.booleans(),
        clip=st.floats(1e-9, 1e9),
        smallest_noise_multiplier=st.floats(0, 1e6),
        epsilon=st.floats(1e-9, math.inf),
        delta=st.floats(1e-300, 0.5),
        smallest_cohort=st.integers(1, 10**9),
        minutes_per_day=st.floats(0, math.inf),
    )
)
@settings(max_examples=40, deadline=None)
def test_any_policy_is_read_as_it_was_written(policy: Policy) -> None:
    assert Policy.parse(policy.to_toml().encode()) == policy


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_changed_bit_of_policy_or_signature_refuses(path: Path, stride: int) -> None:
    Policy().save(path, OWNER)
    for file in (path, path.with_name("policy.toml.sig")):
        content = file.read_bytes()
        for bit in range(0, 8 * len(content), stride):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bytes(changed))
            with pytest.raises(Refusal) as caught:
                Policy.load(path, OWNER.verify_key)
            assert caught.value.code == "policy-not-signed"
        file.write_bytes(content)
    Policy.load(path, OWNER.verify_key)


@pytest.mark.parametrize("name", ["policy.toml", "policy.toml.sig"])
@pytest.mark.parametrize("content", [None, b"", b"\n", b"homespun-policy-1\nzz\n"])
def test_a_missing_or_empty_file_refuses(path: Path, name: str, content: bytes | None) -> None:
    Policy().save(path, OWNER)
    if content is None:
        path.with_name(name).unlink()
    else:
        path.with_name(name).write_bytes(content)
    with pytest.raises(Refusal, match=r"signature|missing"):
        Policy.load(path, OWNER.verify_key)


def test_a_strangers_or_an_older_signature_refuses(path: Path) -> None:
    Policy(serial=3).save(path, OWNER)
    with pytest.raises(Refusal, match="signature"):
        Policy.load(path, SigningKey.generate().verify_key)
    Policy.load(path, OWNER.verify_key, least_serial=3)
    with pytest.raises(Refusal, match="older than 4"):
        Policy.load(path, OWNER.verify_key, least_serial=4)


def test_a_signature_over_something_else_does_not_sign_a_policy(path: Path) -> None:
    policy = Policy()
    policy.save(path, OWNER)
    signature = OWNER.sign(policy.to_toml().encode())  # without the format in front
    path.with_name("policy.toml.sig").write_text(f"homespun-policy-1\n{signature.hex()}\n")
    with pytest.raises(Refusal, match="signature"):
        Policy.load(path, OWNER.verify_key)


def test_a_crash_between_the_two_files_grants_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import client.policy as module

    Policy(serial=1).save(path, OWNER)
    real, calls = module.write_private_file, []

    def write(target: Path, content: bytes, *, replace: bool = False) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(target, content, replace=replace)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_private_file", write)
        with pytest.raises(KeyboardInterrupt):
            Policy(serial=2).save(path, OWNER)
    with pytest.raises(Refusal):
        Policy.load(path, OWNER.verify_key)
    Policy(serial=2).save(path, OWNER)
    Policy.load(path, OWNER.verify_key)


@pytest.mark.parametrize(
    "text",
    [
        "clip = 0.0",
        "clip = nan",
        "clip = inf",
        "epsilon = nan",
        "epsilon = -1.0",
        "delta = 1.0",
        "smallest_noise_multiplier = -0.1",
        "minutes_per_day = nan",
        "smallest_cohort = 0",
        'hours = ["22-06"]',
        'hours = ["25:00-26:00"]',
        'hours = ["always"]',
        'units = ["device"]',
        "unknown = 1",
        "trust_coordinator = 3",
        "not toml",
    ],
)
def test_a_signed_file_that_is_no_policy_is_an_error(path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        Policy.parse(text.encode())


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Policy.parse(b"clip = -1.0\ndelta = 2.0\nsurprise = 1\n")
    assert len(caught.value.problems) == 3
    assert "surprise: unknown key" in caught.value.problems


def test_what_the_defaults_grant_is_granted() -> None:
    Policy().check(GRANTED)
    Policy().check_usage(AWAKE)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"unit": "device"}, "policy-unit"),
        ({"noise": "central"}, "policy-trust"),
        ({"noise": "none"}, "policy-noise"),
        ({"noise_multiplier": 0.49}, "policy-noise"),
        ({"noise_multiplier": 0.0}, "policy-noise"),
        ({"noise_multiplier": -1.0}, "policy-noise"),
        ({"noise_multiplier": math.nan}, "policy-noise"),
        ({"noise_multiplier": math.inf}, "policy-noise"),
        ({"clip": 1.01}, "policy-clip"),
        ({"clip": 0.0}, "policy-clip"),
        ({"clip": -1.0}, "policy-clip"),
        ({"clip": math.nan}, "policy-clip"),
        ({"clip": math.inf}, "policy-clip"),
        ({"epsilon": 8.1}, "policy-epsilon"),
        ({"epsilon": math.inf}, "policy-epsilon"),
        ({"epsilon": math.nan}, "policy-epsilon"),
        ({"delta": 1.1e-5}, "policy-delta"),
        ({"delta": 0.0}, "policy-delta"),
        ({"delta": math.nan}, "policy-delta"),
        ({"population": 20_000}, "policy-delta"),
        ({"population": 0}, "policy-cohort"),
        ({"cohort": 19}, "policy-cohort"),
        ({"cohort": 1}, "policy-cohort"),
        ({"cohort": 201}, "policy-cohort"),
        ({"sampling_rate": 0.0}, "policy-cohort"),
        ({"sampling_rate": 1.1}, "policy-cohort"),
        ({"sampling_rate": math.nan}, "policy-cohort"),
        ({"rounds": 1001}, "policy-rounds"),
        ({"rounds": 0}, "policy-rounds"),
        ({"round": -1}, "policy-rounds"),
    ],
)
def test_what_the_defaults_do_not_grant_is_refused_with_a_code(change: dict[str, Any], code: str) -> None:
    with pytest.raises(Refusal) as caught:
        Policy().check(dataclasses.replace(GRANTED, **change))
    assert caught.value.code == code


def test_what_the_owner_grants_beyond_the_defaults_is_granted() -> None:
    Policy(trust_coordinator=True).check(dataclasses.replace(GRANTED, noise="central"))
    Policy(epsilon=math.inf, smallest_noise_multiplier=0.0).check(
        dataclasses.replace(GRANTED, epsilon=math.inf, noise_multiplier=0.0)
    )
    # In silo mode the records of one party are the units; few parties are no danger to them.
    Policy(units=("example",)).check(dataclasses.replace(GRANTED, unit="example", cohort=3, population=5))
    with pytest.raises(Refusal):
        Policy(units=("example",)).check(GRANTED)


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@given(clip=NUMBERS, noise_multiplier=NUMBERS, epsilon=NUMBERS, delta=NUMBERS, cohort=st.integers(-5, 300))
@settings(max_examples=200, deadline=None)
def test_nothing_beyond_the_policy_passes(**asked: Any) -> None:
    policy = Policy()
    try:
        policy.check(dataclasses.replace(GRANTED, **asked))
    except Refusal:
        return
    assert 0 < asked["clip"] <= policy.clip
    assert policy.smallest_noise_multiplier <= asked["noise_multiplier"] < math.inf
    assert 0 < asked["epsilon"] <= policy.epsilon
    assert 0 < asked["delta"] <= policy.delta
    assert asked["cohort"] >= policy.smallest_cohort


@pytest.mark.parametrize(
    ("hours", "moment", "granted"),
    [
        (("00:00-24:00",), "00:00", True),
        (("00:00-24:00",), "23:59", True),
        (("22:00-06:30",), "23:00", True),
        (("22:00-06:30",), "06:29", True),
        (("22:00-06:30",), "06:30", False),
        (("22:00-06:30",), "12:00", False),
        (("12:00-13:00", "15:00-16:00"), "15:59", True),
        (("12:00-13:00", "15:00-16:00"), "14:00", False),
        ((), "14:00", False),
        (("12:00-12:00",), "12:00", False),
    ],
)
def test_training_keeps_to_the_hours(hours: tuple[str, ...], moment: str, granted: bool) -> None:
    usage = dataclasses.replace(AWAKE, local_time=datetime.fromisoformat(f"2026-01-01T{moment}"))
    if granted:
        Policy(hours=hours).check_usage(usage)
    else:
        with pytest.raises(Refusal, match="hours"):
            Policy(hours=hours).check_usage(usage)


@pytest.mark.parametrize(
    ("hours", "moment", "left"),
    [
        (("00:00-24:00",), "12:00", 100.0),  # of the day's grant
        (("22:00-06:30",), "05:30", 60.0),
        (("22:00-06:30",), "23:59", 100.0),
        (("08:00-09:00", "22:00-24:00"), "23:30", 30.0),
        (("08:00-09:00",), "09:00", 0.0),
        ((), "09:00", 0.0),
    ],
)
def test_the_minutes_that_are_left_end_with_the_grant_or_with_the_hours(
    hours: tuple[str, ...], moment: str, left: float
) -> None:
    usage = dataclasses.replace(AWAKE, local_time=datetime.fromisoformat(f"2026-03-01T{moment}"), minutes_today=20.0)
    assert Policy(hours=hours, minutes_per_day=120.0).minutes_left(usage) == pytest.approx(left)


@pytest.mark.parametrize(
    ("held", "wanted", "found"),
    [("any", None, "float32"), ("any", "int8", "int8"), ("int8", None, "int8"), ("int8", "int8", "int8")],
)
def test_the_base_is_held_as_the_owner_or_else_the_run_says(held: Any, wanted: str | None, found: str) -> None:
    assert Policy(base_precision=held).precision(wanted) == found


def test_a_run_over_another_precision_than_the_owners_is_refused() -> None:
    with pytest.raises(Refusal, match="base_precision is int8") as refused:
        Policy(base_precision="int8").precision("float32")
    assert refused.value.code == "model-mismatch"


@pytest.mark.parametrize(
    "change",
    [
        {"on_mains_power": False},
        {"minutes_today": 120.0},
        {"minutes_today": math.nan},
        {"megabytes_today": 200.0},
        {"megabytes_today": math.nan},
    ],
)
def test_the_server_learns_not_now_and_never_why(change: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        Policy().check_usage(dataclasses.replace(AWAKE, **change))
    assert caught.value.code == "not-now"
