"""What the owner of a device grants: a signed file, checked before any work and again at the door.

The server can ask; only the device can grant. The policy is a TOML file with a detached Ed25519 signature by the
owner beside it (`policy.toml`, `policy.toml.sig`). A file that the owner did not sign, also a changed one, grants
nothing at all. How much of the budget is spent is the ledger's to say, not this module's.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from common.errors import ConfigError, Refusal, VerificationError
from common.files import write_private_file
from common.keys import SigningKey, VerifyKey

__all__ = ["Policy", "ReleaseRequest", "Usage"]

SIGNATURE_SUFFIX = ".sig"
SIGNATURE_FORMAT = "homespun-policy-1"
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
SPAN = re.compile(f"{_TIME}-(?:{_TIME}|24:00)")


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """What a server asks a device to release in one round of a run.

    Attributes:
        unit: Whose presence is hidden: `user` or `example`.
        noise: Who adds the noise: `local`, `central` or `distributed`.
        clip: L2 bound on one unit's contribution.
        noise_multiplier: Noise standard deviation over sensitivity.
        sampling_rate: Probability that an enrolled unit takes part in a round.
        rounds: Releases that the run may ask for in all.
        cohort: Expected users per round.
        population: Enrolled users.
        epsilon: What the whole run is calibrated to; infinity promises nothing.
        delta: Failure probability of the whole run.
        metrics: What is to be measured on the user's validation records and leave, noised, beside the update.
    """

    run_id: str
    round: int
    unit: str
    noise: str
    clip: float
    noise_multiplier: float
    sampling_rate: float
    rounds: int
    cohort: int
    population: int
    epsilon: float
    delta: float
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How the device stands: local time, power, and what Homespun used today."""

    local_time: datetime
    on_mains_power: bool
    minutes_today: float
    megabytes_today: float


class Policy(BaseModel):
    """What the owner grants. Every value is public: it may be shown in a report or a ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    serial: int = Field(1, ge=1, description="counts up with every change, so that an old policy is recognized")

    # what may be released
    units: tuple[Literal["user", "example"], ...] = Field(
        ("user", "example"), description="units of privacy that are accepted"
    )
    trust_coordinator: bool = Field(
        False, description="accept noise that the server adds: it then sees each update without noise"
    )
    clip: float = Field(1.0, gt=0, allow_inf_nan=False, description="largest L2 bound of one contribution")
    smallest_noise_multiplier: float = Field(
        0.5, ge=0, allow_inf_nan=False, description="least noise standard deviation over sensitivity; 0 allows none"
    )
    epsilon: float = Field(8.0, gt=0, description="privacy budget over everything this subject ever releases")
    delta: float = Field(1e-5, gt=0, lt=1, description="largest failure probability")
    smallest_cohort: int = Field(20, ge=1, description="least expected users per round, for unit user")
    metrics: tuple[Literal["loss", "gain"], ...] = Field(
        (), description="measures of the user's validation records that may leave beside an update, under its noise"
    )
    largest_rounds: int = Field(1000, ge=1, description="most releases that one run may ask for")

    # what it may cost
    hours: tuple[str, ...] = Field(("00:00-24:00",), description="local times in which training may run")
    threads: int = Field(2, ge=1, description="threads that training may use")
    memory_megabytes: int = Field(4096, ge=64, description="memory that training may use")
    minutes_per_day: float = Field(120.0, ge=0, description="training time per day")
    megabytes_per_day: float = Field(200.0, ge=0, description="traffic per day, both ways")
    mains_power_only: bool = Field(True, description="train only when plugged in")
    base_precision: Literal["any", "float32", "bfloat16", "int8"] = Field(
        "any", description="how the base model is held; any: as a run names it, and float32 for this device alone"
    )

    @field_validator("epsilon", mode="before")
    @classmethod
    def _read_infinity(cls, value: Any) -> Any:
        return math.inf if isinstance(value, str) and value.lower() in {"inf", "infinity"} else value

    @field_validator("epsilon", "minutes_per_day", "megabytes_per_day")
    @classmethod
    def _is_number(cls, value: float) -> float:
        if math.isnan(value):
            raise ValueError("must be a number")
        return value

    @field_validator("hours")
    @classmethod
    def _are_spans(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for span in value:
            _minutes_of(span)
        return value

    @classmethod
    def load(cls, path: Path, verify_key: VerifyKey, *, least_serial: int = 1) -> Self:
        """Read the policy that the holder of `verify_key` signed.

        Args:
            path: The TOML file; its signature lies beside it.
            verify_key: The owner's.
            least_serial: The serial in force so far; an older policy, though signed, is refused.

        Raises:
            Refusal: There is no policy, it is not signed, it was changed, or it is an older one.
            ConfigError: The owner signed something that is no policy; every problem is listed.
        """
        content, signature = _read(path), _read(_signature_path(path))
        try:
            text = signature.decode("ascii")
            if text != signature_text(bytes.fromhex(text.split("\n")[1])):
                raise ValueError
            verify_key.verify(bytes.fromhex(text.split("\n")[1]), _message(content))
        except (ValueError, IndexError, VerificationError):
            _refuse("policy-not-signed", f"{path}: the owner's signature does not match; sign it again, or restore it")
        policy = cls.parse(content)
        if policy.serial < least_serial:
            _refuse(
                "policy-not-signed", f"{path}: serial {policy.serial} is older than {least_serial}, which was in force"
            )
        return policy

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Read a policy's TOML without asking who signed it; for an editor, never for a gate.

        Raises:
            ConfigError: Every problem that it has.
        """
        try:
            return cls.model_validate(tomllib.loads(content.decode()))
        except ValidationError as error:
            raise ConfigError([_problem(entry) for entry in error.errors()]) from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"policy: not valid TOML: {error}") from None
        except UnicodeDecodeError:
            raise ConfigError("policy: not UTF-8") from None

    def save(self, path: Path, owner_key: SigningKey) -> None:
        """Write the policy and its signature.

        A crash between the two files leaves a policy that nobody signed, which grants nothing until it is saved again.
        """
        content = self.to_toml().encode()
        signature = signature_text(owner_key.sign(_message(content))).encode()
        write_private_file(path, content, replace=True)
        write_private_file(_signature_path(path), signature, replace=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the policy's text, for ledger entries."""
        return sha256(self.to_toml().encode()).hexdigest()

    def to_toml(self) -> str:
        """Write the policy as TOML that reads back to an equal one."""
        lines: list[str] = []
        for name, value in self.model_dump().items():
            if isinstance(value, float):
                text = "inf" if math.isinf(value) else repr(value)
            else:
                text = json.dumps(list(value) if isinstance(value, tuple) else value)
            lines.append(f"{name} = {text}")
        return "\n".join(lines) + "\n"

    def check(self, request: ReleaseRequest) -> None:
        """Return if the owner grants `request`; asked before the work starts, and again before bytes leave.

        Comparisons are written so that a NaN is refused.

        Raises:
            Refusal: Something is not granted. The code says what, the reason says how much, to the owner only.
        """
        if request.unit not in self.units:
            _refuse("policy-unit", "the unit of privacy is not among those that the owner accepts")
        if request.noise not in {"local", "central", "distributed"}:
            _refuse("policy-noise", "the noise mode is unknown")
        if request.noise == "central" and not self.trust_coordinator:
            _refuse("policy-trust", "the server would see updates without noise; trust_coordinator is not granted")
        if not request.noise_multiplier >= self.smallest_noise_multiplier or math.isinf(request.noise_multiplier):
            _refuse(
                "policy-noise",
                f"noise multiplier {request.noise_multiplier} is below the owner's {self.smallest_noise_multiplier}",
            )
        if not 0 < request.clip <= self.clip:
            _refuse("policy-clip", f"clip {request.clip} is outside (0, {self.clip}]")
        if not 0 < request.epsilon <= self.epsilon:
            _refuse("policy-epsilon", f"epsilon {request.epsilon} is above the owner's {self.epsilon}")
        self._check_delta(request)
        if not 0 < request.sampling_rate <= 1:
            _refuse("policy-cohort", "the sampling rate is not in (0, 1]")
        # In silo mode (unit example) the parties are few and each is protected by its own noise.
        if request.unit == "user" and not self.smallest_cohort <= request.cohort <= request.population:
            _refuse("policy-cohort", f"a cohort of {request.cohort} is below the owner's {self.smallest_cohort}")
        if not 1 <= request.rounds <= self.largest_rounds:
            _refuse("policy-rounds", f"{request.rounds} rounds are outside 1 to {self.largest_rounds}")
        if not set(request.metrics) <= set(self.metrics):
            _refuse("policy-metrics", "the run measures on validation records; metrics are not granted")
        if request.round < 0:
            _refuse("policy-rounds", "the round is negative")

    def check_usage(self, usage: Usage) -> None:
        """Return if training may run now.

        Raises:
            Refusal: Not now. The code is the same for every reason: the server does not learn when the owner sleeps
                or charges the phone.
        """
        minute = usage.local_time.hour * 60 + usage.local_time.minute
        if not any(_contains(_minutes_of(span), minute) for span in self.hours):
            _refuse("not-now", "outside the hours that the owner grants")
        if self.mains_power_only and not usage.on_mains_power:
            _refuse("not-now", "on battery")
        if not usage.minutes_today < self.minutes_per_day:
            _refuse("not-now", "today's minutes are used up")
        if not usage.megabytes_today < self.megabytes_per_day:
            _refuse("not-now", "today's traffic is used up")

    def precision(self, wanted: str | None = None) -> str:
        """How the base is held: as `wanted` by a run, or where it is this device's own affair.

        Raises:
            Refusal: The owner holds it otherwise, and adapters of two precisions do not mix.
        """
        if self.base_precision == "any":
            return wanted or "float32"
        if wanted not in (None, self.base_precision):
            _refuse(
                "model-mismatch", f"the run is over the base at {wanted}, and base_precision is {self.base_precision}"
            )
        return self.base_precision

    def minutes_left(self, usage: Usage) -> float:
        """Minutes that training may go on from now: of the day's grant, and until the granted hours are over."""
        minute = usage.local_time.hour * 60 + usage.local_time.minute + usage.local_time.second / 60
        open_for = max((_minutes_in(_minutes_of(span), minute) for span in self.hours), default=0.0)
        return max(0.0, min(self.minutes_per_day - usage.minutes_today, open_for))

    def _check_delta(self, request: ReleaseRequest) -> None:
        # NIST SP 800-226, section 2: delta well below one over the number of people.
        if request.unit == "user" and not request.population >= 1:
            _refuse("policy-cohort", "the population is not stated")
        rule = 1 / (10 * request.population) if request.unit == "user" else self.delta
        if not 0 < request.delta <= min(self.delta, rule):
            _refuse("policy-delta", f"delta {request.delta} is above {min(self.delta, rule)}")


def signature_text(signature: bytes) -> str:
    """Return the content of a signature file."""
    return f"{SIGNATURE_FORMAT}\n{signature.hex()}\n"


def _message(content: bytes) -> bytes:
    return SIGNATURE_FORMAT.encode() + b"\n" + content


def _signature_path(path: Path) -> Path:
    return path.with_name(path.name + SIGNATURE_SUFFIX)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        _refuse("policy-not-signed", f"{path}: missing; without the owner's signed policy nothing is granted")


def _minutes_of(span: str) -> tuple[int, int]:
    """Read `22:00-06:30` as minutes since midnight; the end may be 24:00, or lie on the next day."""
    if SPAN.fullmatch(span) is None:
        raise ValueError("hours are written as 22:00-06:30")
    start_hour, start_minute, end_hour, end_minute = map(int, re.findall("[0-9]+", span))
    return start_hour * 60 + start_minute, end_hour * 60 + end_minute


def _contains(span: tuple[int, int], minute: int) -> bool:
    start, end = span
    return start <= minute < end if start <= end else minute >= start or minute < end


def _minutes_in(span: tuple[int, int], minute: float) -> float:
    """How long a span goes on from `minute`; without an end where it is the whole day."""
    start, end = span
    if not _contains(span, int(minute)):
        return 0.0
    if (end - start) % 1440 == 0:
        return math.inf
    return (end - minute) % 1440


def _problem(entry: Any) -> str:
    name = ".".join(str(part) for part in entry["loc"])
    return f"{name}: unknown key" if entry["type"] == "extra_forbidden" else f"{name}: {entry['msg']}"


def _refuse(code: str, reason: str) -> NoReturn:
    raise Refusal(code, reason)
