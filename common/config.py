"""The configuration of a run: one flat, frozen set of public facts.

Every command-line flag of `homespun sim run` is a key here and the other way round; a TOML file may hold any
of them, flags win, unknown keys are errors, and all errors are reported at once. A resolved `config.toml` of a
run is valid input again.
Nothing private is a field: whatever stands here may be printed in a report.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common.errors import ConfigError

__all__ = ["METHOD_ALIASES", "RunConfig", "load_config", "read_config_file"]

BUILT_IN = "built-in"
LARGEST_COUNT = 2**31 - 1
"""Of users, rounds, steps: what fits the wire."""

METHOD_ALIASES = {
    "fedit": "fedavg",
    "feddpa": "dual",
    "feddpa-f": "dual",
    "feddpa-t": "dual-joint",
    "ffa-lora": "ffa",
    "fedsa-lora": "fedsa",
    "fedper": "layers",
    "fedrep": "layers-by-turns",
    "ditto-lora": "ditto",
    "mr-mtl": "ditto",
    "flex-lora": "flexlora",
    "oppu": "dual",
}
"""Names that papers use, and ours."""


class RunConfig(BaseModel):
    """What a run does and what it promises.

    Lengths are in tokens, times in seconds, sizes in bytes unless a name says otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    # what is trained on what
    model: str = Field(default=BUILT_IN, description="base model: built-in, a Hugging Face folder, or a hub name")
    data: str = Field(default=BUILT_IN, description="built-in, a file or folder of per-user records, or a hub name")
    user_column: str | None = Field(default=None, description="tables: the column that names the user")
    text_column: str | None = Field(default=None, description="tables: the column that holds the text")
    time_column: str | None = Field(default=None, description="tables: the column that holds the time")
    users: int | None = Field(default=None, ge=1, description="take this many users at random by seed; all when absent")
    max_tokens: int = Field(default=64, ge=8, description="a record is cut to this many tokens")

    # the federation
    method: str = Field(default="dual", description="which tensors are shared, which private, in what order they train")
    rounds: int = Field(default=20, ge=1, description="rounds of the shared part")
    cohort: int = Field(default=200, ge=1, description="expected users per round")
    local_steps: int = Field(default=2, ge=1, description="optimizer steps a user takes per round")
    local_batch: int = Field(default=8, ge=1, description="records per local step")
    optimizer: Literal["sgd", "momentum", "adam"] = Field(
        default="adam", description="local optimizer of the shared part"
    )
    learning_rate: float = Field(default=0.01, gt=0, description="local learning rate of the shared part")
    server_learning_rate: float = Field(default=1.0, gt=0, description="factor on the noised mean of the updates")
    server_momentum: float | None = Field(
        default=None, ge=0, lt=1, description="momentum of the server's step; absent: 0 for sgd, 0.9 for adam"
    )
    server_optimizer: Literal["sgd", "adam"] = Field(
        default="sgd",
        description="step on the noised mean: sgd (FedAvg, with momentum FedAvgM) or adam (FedAdam; set "
        "server_learning_rate to about 0.01)",
    )
    server_adaptivity: float = Field(
        default=1e-3, gt=0, description="adam at the server: added to the root of the mean square"
    )

    # the adapter
    rank: int = Field(default=2, ge=1, le=256, description="LoRA rank")
    alpha: float | None = Field(default=None, gt=0, description="LoRA alpha; 2 x rank when absent")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "v_proj"), min_length=1, description="linear layers that carry an adapter"
    )
    shared_layers: int | None = Field(
        default=None, ge=1, description="layers, layers-by-turns: how many of the lowest are shared; half when absent"
    )
    ranks: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="flexlora: ranks that devices have; half of rank and rank when absent"
    )
    init_adapter: str | None = Field(default=None, description="PEFT folder the shared adapter starts from")

    update_dtype: Literal["auto", "float16", "float32"] | None = Field(
        default=None,
        description="numbers of an update as they leave; auto: float16 where nothing is lost by it. Absent: auto for "
        "devices, float32 in a simulation, where nothing travels",
    )
    base_precision: Literal["float32", "bfloat16", "int8"] = Field(
        default="float32", description="how the frozen base is held: int8 takes a quarter of the memory of its layers"
    )

    # the promise
    epsilon: float = Field(default=8.0, gt=0, description="privacy budget of the whole run; inf makes no privacy claim")
    delta: float | None = Field(
        default=None, gt=0, lt=1, description="failure probability; min(1e-5, 1/(10 x users)) when absent"
    )
    unit: Literal["user", "example"] = Field(
        default="user", description="whose presence is hidden: a user, or one record"
    )
    noise: Literal["central", "local", "distributed"] = Field(
        default="central",
        description="who adds the noise: the server on the sum, each device all of it, or each device a share",
    )
    coordinator_epsilon: float | None = Field(
        default=None,
        gt=0,
        description="distributed noise: budget against the coordinator, who knows who takes part; when absent, what "
        "the noise of the published adapter is worth against it",
    )
    participation_cap: int | None = Field(
        default=None,
        ge=1,
        description="distributed noise: rounds in which one user takes part at most; one hardly met when absent",
    )
    secagg: Literal["skip", "full"] = Field(
        default="skip",
        description="distributed noise, simulated: skip the masks, which cancel in the sum, or play every message",
    )
    clip: float = Field(
        default=1.0, gt=0, description="L2 bound of one unit's contribution, over everything that leaves"
    )
    clip_quantile: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="let the clip norm follow this quantile of the updates' lengths, from `clip`; charged with the "
        "update; `clip = adaptive` is 0.5",
    )
    clip_learning_rate: float = Field(
        default=0.2, gt=0, le=10, description="adaptive clip: step of its logarithm per unit of missed quantile"
    )
    noised_metrics: tuple[Literal["loss", "gain"], ...] = Field(
        default=(),
        description="release these of the cohort's validation records every round, noised and charged with the update",
    )
    count_share: float = Field(
        default=0.02,
        gt=0,
        le=0.1,
        description="share of the squared clip that each number beside the update takes: less noise on it, and more "
        "on the update",
    )
    spare_rounds: int = Field(
        default=2, ge=0, description="rounds the noise is calibrated for beyond `rounds`, for crashes"
    )
    example_records: int = Field(
        default=100,
        ge=1,
        description="unit example: public number of records; local_batch / this is the rate",
    )
    private_noise: bool = Field(
        default=False, description="unit example: train what stays in the pass by DP-SGD too, in the same steps"
    )
    as_if_population: int | None = Field(
        default=None, ge=1, description="scale the noise on the mean to this many users; not claimed"
    )

    # the private part, which never leaves
    personal_steps: int = Field(default=12, ge=0, description="steps of the private adapter")
    personal_batch: int = Field(default=4, ge=1, description="records per private step")
    personal_learning_rate: float = Field(default=5e-3, gt=0, description="Adam learning rate of the private adapter")
    personal_rank: int | None = Field(
        default=None, ge=1, le=256, description="rank of the private adapter; rank when absent"
    )
    proximal_weight: float = Field(
        default=0.1, ge=0, description="ditto: half of this times the squared distance to the shared adapter is added"
    )

    # what stands beside the adapters, on the device too
    levels: tuple[Literal["profile", "retrieval", "soft-prompt", "steering", "preference"], ...] = Field(
        default=("profile", "retrieval", "preference"),
        description="input and objective levels that each user may choose beside the adapters; none for none",
    )
    shared_levels: tuple[Literal["profile", "retrieval", "soft-prompt", "steering"], ...] = Field(
        default=(), description="input levels in the forward pass of the shared steps too; unit user only, or no claim"
    )
    context_tokens: int = Field(
        default=96, ge=1, description="most tokens that a profile or retrieved records add to a question"
    )
    choice_confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="how sure a user's validation records must be before global is left"
    )

    # looking at it
    evaluation_users: int = Field(
        default=300, ge=1, description="users whose systems are scored and whose adapters are kept"
    )
    answered: int = Field(
        default=1,
        ge=0,
        description="test questions of each scored user that models answer in words, to see whether answers loop",
    )
    metric: str | None = Field(
        default=None, description="another score of each user: my.module:score, see `simulations/outside.py`"
    )
    pooled_steps: int | None = Field(
        default=None,
        ge=0,
        description="steps of a control that pools users' records without privacy; 60 on the built-in world and 0 "
        "elsewhere when absent",
    )
    round_timeout: float = Field(default=3600.0, gt=0, description="seconds a round waits for replies")
    evaluate_every: int = Field(default=5, ge=1, description="rounds between points of the learning curve")

    # who is there, in a simulation
    availability: float = Field(
        default=1.0, gt=0, le=1, description="simulations: chance that a chosen user's device is online in a round"
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="simulations: chance that an online device is lost before it answers",
    )
    stragglers: float = Field(
        default=0.0, ge=0, lt=1, description="simulations: share of users whose device never answers in time"
    )

    # how it is run
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="fixes the split, initial weights and training order, never the noise",
    )
    rehearsal: bool = Field(
        default=False, description="seeds noise and cohorts too, for reproduction; then nothing is claimed"
    )
    engine: Literal["grid", "ray"] = Field(default="grid", description="in-process grid, or Flower's own engine on Ray")
    ray_address: str | None = Field(
        default=None, description="engine ray: the cluster to join, host:port; a Ray of this run's own when absent"
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        description="worker processes; one per core when absent, 0 trains in this process",
    )
    chunk: int = Field(default=16, ge=1, description="users that are stacked into one forward pass")

    @field_validator("method")
    @classmethod
    def _own_name(cls, value: str) -> str:
        return value if ":" in value else METHOD_ALIASES.get(value.lower(), value.lower())

    @field_validator("epsilon", mode="before")
    @classmethod
    def _read_infinity(cls, value: Any) -> Any:
        return math.inf if isinstance(value, str) and value.lower() in {"inf", "infinity"} else value

    @field_validator("targets", "ranks", mode="before")
    @classmethod
    def _read_list(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _read_adaptive(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("clip") != "adaptive":
            return values
        rest = {key: value for key, value in values.items() if key != "clip"}
        return {"clip_quantile": 0.5, **{key: value for key, value in rest.items() if value is not None}}

    @field_validator("levels", "shared_levels", "noised_metrics", mode="before")
    @classmethod
    def _read_levels(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        named = [part.strip() for part in value.split(",")]
        return tuple(name for name in named if name not in ("", "none"))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems: list[str] = []
        if self.users is not None and self.cohort > self.users:
            problems.append(f"cohort: {self.cohort} users per round is more than the population of {self.users}")
        for name in ("learning_rate", "server_learning_rate", "clip", "personal_learning_rate", "proximal_weight"):
            if not math.isfinite(getattr(self, name)):
                problems.append(f"{name}: must be finite")
        for name, value in self:
            if type(value) is int and value > LARGEST_COUNT and name != "seed":
                problems.append(f"{name}: {value:,} is more than {LARGEST_COUNT:,}")
        if not 1e-9 <= self.clip <= 1e9:
            problems.append("clip: outside 1e-9 to 1e9, where 32-bit numbers no longer hold the update")
        if math.isnan(self.epsilon):
            problems.append("epsilon: must be a number or inf")
        problems += self._faults_of_sums()
        if self.unit != "user" and (self.clip_quantile is not None or self.noised_metrics):
            name = "noised_metrics" if self.noised_metrics else "clip_quantile"
            problems.append(f"{name}: counts beside the update are of users; nothing noises them for unit example")
        if len(set(self.noised_metrics)) != len(self.noised_metrics):
            problems.append("noised_metrics: a metric is named twice")
        if problems:
            raise ConfigError(problems)
        return self

    def _faults_of_sums(self) -> list[str]:
        problems: list[str] = []
        if self.noise != "distributed":
            for name in ("coordinator_epsilon", "participation_cap"):
                if getattr(self, name) is not None:
                    problems.append(f"{name}: is of distributed noise; noise is {self.noise}")
            if self.secagg == "full":
                problems.append(f"secagg: masks are for distributed noise; noise is {self.noise}")
            return problems
        if self.unit != "user":
            problems.append("noise: distributed noise hides a user; for unit example each party noises its own steps")
        if self.as_if_population is not None:
            problems.append("as_if_population: distributed noise is not scaled down for a study")
        if self.coordinator_epsilon is not None and not math.isfinite(self.coordinator_epsilon):
            problems.append("coordinator_epsilon: must be finite; leave it out to have it computed")
        if self.secagg == "full" and self.engine == "ray":
            problems.append("secagg: every device of a masked sum is played in one process; use the engine grid")
        return problems

    @property
    def scaling(self) -> float:
        """LoRA's alpha / rank."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank

    @property
    def momentum(self) -> float:
        """Momentum of the server's step, or its default for the server's optimizer."""
        if self.server_momentum is not None:
            return self.server_momentum
        return 0.9 if self.server_optimizer == "adam" else 0.0

    @property
    def private(self) -> bool:
        """Whether the run makes a privacy promise at all."""
        return math.isfinite(self.epsilon)

    def to_toml(self) -> str:
        """Write the configuration as TOML that `load_config` reads back to an equal one."""
        lines: list[str] = []
        for name, value in self.model_dump().items():
            if value is None:
                continue
            if isinstance(value, tuple):
                text = json.dumps(list(value))
            elif isinstance(value, float):
                text = "inf" if math.isinf(value) else repr(value)
            else:
                text = json.dumps(value)
            lines.append(f"{name} = {text}")
        return "\n".join(lines) + "\n"


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a TOML file of configuration keys; hyphens in keys count as underscores.

    Raises:
        ConfigError: The file is missing or is not TOML.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return {key.replace("-", "_"): value for key, value in values.items()}


def load_config(*sources: Mapping[str, Any]) -> RunConfig:
    """Merge `sources`, later ones win, and check them; keys with the value None are skipped.

    Raises:
        ConfigError: Any key is unknown or any value is wrong; every problem is listed.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        merged.update({key: value for key, value in source.items() if value is not None})
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError([_problem(entry) for entry in error.errors()]) from None


def _problem(entry: Any) -> str:
    name = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return f"{name}: unknown key"
    return f"{name}: {entry['msg'][0].lower()}{entry['msg'][1:]}, found {entry['input']!r}"
