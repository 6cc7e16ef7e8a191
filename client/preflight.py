"""Preflight: what the proof takes for granted of this model and this machine, tried out before any epsilon is spent.

Made-up records only; nothing of a user is read and nothing leaves. Each check stands for an assumption of
docs/privacy.md. A run whose check fails does not start: `Refusal("preflight", reason)`.

===================  ==============================================================================================
check                what it tries
===================  ==============================================================================================
layers               every adapted layer is a plain `nn.Linear`, and nothing in the base drops out at random
gradients            each record's gradient equals the one that autograd gives for it alone, through merged weights
per example          a record's gradient and a user's update are the same whoever shares the batch or the padding
clip                 the clipped sum is the sum of the exact gradients, each scaled to the clip and no further
whole update         for unit user, a long update leaves the gate at the clip, and the noise witnesses as zeros
empty batch          no record at all gives zeros, and for unit example a step of noise alone
save and load        an adapter written as a PEFT folder and read again gives the same logits
noise                what is released over zeros has the promised variance, no mean, and is never the same twice
second opinion       Opacus, for unit example, computes the same per-record gradients; left out where it is missing
===================  ==============================================================================================

The noise is judged by two-sided tests, each at a false alarm rate of `FALSE_ALARM`; noise of half the promised
standard deviation passes with a probability far below that.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from client.int8_linear import Int8Linear
from client.lora import LoraLinear
from client.round_states import ShortMemory
from client.trainer import Example, ExamplePromise, Recipe, Trainer
from client.vault import EncodedUser, Vault
from common.adapters import Vector, read_peft, write_peft
from common.errors import ClaimRefused, GateRefused, Refusal
from common.methods import METHODS
from common.noised_counts import NoisedCounts
from common.privacy import Randomness
from common.promise import promise_of
from common.secure_sum import SecureSum
from common.split import Split, split_of
from common.traffic import LEAST_FLOAT16
from common.wire import Assignment, ReleaseSpec

__all__ = ["FALSE_ALARM", "Preflight", "PreflightReport"]

FALSE_ALARM = 1e-7
"""Probability that a sound mechanism fails one of the tests of its noise."""

NORMAL_LIMIT = 5.327
"""Two-sided quantile of the standard normal at `FALSE_ALARM`."""

LEAST_NOISE_NUMBERS = 4096
"""Numbers that the variance is judged by, over several releases where one has fewer."""

RELATIVE_ERROR = 2e-3
"""Largest difference between two ways to a float32 gradient, over its norm; a coupled batch is off by tenths."""

CentralNoise = Callable[[NDArray[np.float64], ReleaseSpec, Randomness], NDArray[np.float64]]


@dataclass(frozen=True)
class PreflightReport:
    """What was tried, in words; a report exists only where everything passed.

    Attributes:
        checks: (name, what was found).
        second_opinion: What Opacus said, or why it was not asked.
    """

    checks: tuple[tuple[str, str], ...]
    second_opinion: str

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {"checks": [list(check) for check in self.checks], "second_opinion": self.second_opinion}


@dataclass(frozen=True)
class _MadeUp:
    """A record of random tokens."""

    ids: NDArray[np.int32]
    first_label: int


class Preflight:
    """Tries a trainer out, once per release spec."""

    def __init__(self, trainer: Trainer, *, central_noise: CentralNoise | None = None) -> None:
        """Try `trainer`.

        Args:
            trainer: What will train the shared adapter.
            central_noise: What will noise the sum in central mode; absent on a device, which cannot see it.
        """
        self._trainer = trainer
        self._central_noise = central_noise
        self._passed: dict[str, PreflightReport] = {}

    def check(self, spec: ReleaseSpec) -> PreflightReport:
        """Return when everything holds for releases under `spec`; the second time at once.

        Raises:
            Refusal: With code `preflight`; something does not hold, and nothing may be spent on it.
        """
        alike = replace(spec, run="0" * 8, source="0" * 64).digest
        if alike not in self._passed:
            try:
                self._passed[alike] = self._tried(spec)
            except ClaimRefused as refusal:  # what draws noise looks at it too, see common.promise.check_noise
                raise _refused("noise", str(refusal)) from None
        return self._passed[alike]

    def _tried(self, spec: ReleaseSpec) -> PreflightReport:
        trainer, generator = self._trainer, np.random.default_rng(0x0F1C)
        records = _records(generator, self._vocabulary(), min(48, self._longest()))
        vector = _somewhere(trainer, generator)
        split = split_of(METHODS[spec.method], trainer.layout, spec.recipe)
        trainable = split.in_adapter
        checks = [("layers", _check_layers(trainer))]
        exact = np.stack([_exact_gradient(trainer, vector, record) for record in records])
        checks.append(("gradients", _check_gradients(trainer, vector, records, exact)))
        checks.append(("per example", _check_independence(trainer, vector, records)))
        checks.append(("clip", _check_clip(trainer, vector, records, exact, trainable)))
        if spec.unit == "user":
            checks.append(("whole update", self._check_update(spec, split, vector, records)))
        checks.append(("empty batch", _check_empty(trainer, vector, trainable, spec.unit)))
        checks.append(("save and load", _check_save_and_load(trainer, vector, records)))
        if spec.noise_multiplier > 0:
            checks.append(("noise", self._check_noise(spec)))
        opinion = "not asked: for unit user no record's own gradient is relied on"
        if spec.unit == "example":
            opinion = _second_opinion(trainer, vector, records, exact)
        return PreflightReport(tuple(checks), opinion)

    def _check_update(self, spec: ReleaseSpec, split: Split, adapter: Vector, records: Sequence[Example]) -> str:
        """Let a made-up user's update through the vault and its gate without noise, and measure what comes out.

        Where a method keeps something in the pass, the user has kept something already, so that nothing is zero.
        """
        recipe = {**spec.recipe, "local_steps": 1, "local_batch": 1, "learning_rate": 100.0, "optimizer": "sgd"}
        # As short a clip as the numbers that leave can be told apart at.
        clip = 1e-4 if spec.dtype == "float32" else LEAST_FLOAT16 * math.sqrt(max(1, spec.model_dim))
        bare = replace(spec, noise="central", clip=clip, recipe=recipe)
        states = ShortMemory()
        if split.method.private_in_pass:
            kept = np.random.default_rng(0x0F1D).normal(0.0, 0.05, (1, split.kept_size)).astype(np.float32)
            states.keep(bare.run, 0, ("preflight",), kept)
        vault = Vault(self._trainer, lambda _: EncodedUser(records, (), ()), seed=0, states=states)
        try:
            total = vault.train(Assignment(bare, 1, ("preflight",), split.vector_of(adapter))).total
        except GateRefused as refusal:
            raise _refused("whole update", str(refusal)) from None
        counts = NoisedCounts.of(spec)
        bound = bare.clip * (1.0 if counts is None else counts.update_share)
        whole, norm = (float(np.linalg.norm(total[:dim].astype(np.float64))) for dim in (spec.row_dim, spec.model_dim))
        if whole > bare.clip or not 0.9 * bound <= norm <= bound * (1 + 1e-6):
            raise _refused("whole update", f"a long update comes out {max(whole, norm) / bare.clip:.3g} clips long")
        if total[spec.row_dim :].any():
            raise _refused("whole update", "a noise witness is not zero before there is noise")
        return f"{whole / bare.clip:.6f} clips long at the gate, {spec.witnesses} witnesses zero"

    def _check_noise(self, spec: ReleaseSpec) -> str:
        """Judge what is released over zeros, by the code that will release it."""
        scale = promise_of(spec).noise_scale(spec.noise_multiplier * spec.extrapolation, spec.clip)
        if spec.noise == "distributed":
            return self._check_shares(spec)
        if spec.unit == "example":
            draw, where = self._example_noise(spec), "at every step on the device"
        elif spec.noise == "local":
            draw, where = self._local_noise(spec), "on the device, at the gate"
        elif self._central_noise is not None:
            noise = self._central_noise
            draw, where = lambda _: noise(np.zeros(spec.dim), spec, Randomness.system()), "on the sum, at the server"
        else:
            return "the server adds it, out of this device's sight"
        return f"{_judge(_enough(draw), scale)}, {where}"

    def _check_shares(self, spec: ReleaseSpec) -> str:
        """Judge a device's share, as it comes through vault and gate over zeros, and what the coordinator fills up."""
        sums = SecureSum.of(spec)
        devices = sums.largest_cohort
        noise = sums.noise(spec, devices)
        vault = Vault(self._trainer, lambda _: EncodedUser((), (), ()), seed=0)
        start = np.zeros(spec.model_dim, np.float32)

        def share(number: int) -> NDArray[np.float64]:
            total = vault.train(Assignment(spec, number, ("preflight",), start, devices)).total
            return np.asarray(noise.decode(total, sums.terms(spec, number).digest), np.float64)

        def filling(number: int) -> NDArray[np.float64]:
            top_up = noise.top_up(0, Randomness.system())
            return np.asarray(noise.decode(top_up, sums.terms(spec, number).digest), np.float64)

        own = _judge(_enough(share), noise.share_scale * noise.step)
        level = _judge(_enough(filling), noise.level * noise.step)
        return f"a share: {own}, at the gate; the level of a sum: {level}, at the coordinator"

    def _local_noise(self, spec: ReleaseSpec) -> Callable[[int], NDArray[np.float64]]:
        # Through the vault and its gate, whole: a user without records answers with zeros, and noise.
        vault = Vault(self._trainer, lambda _: EncodedUser((), (), ()), seed=0)
        start = np.zeros(spec.model_dim, np.float32)
        return lambda number: vault.train(Assignment(spec, number, ("preflight",), start)).total.astype(np.float64)

    def _example_noise(self, spec: ReleaseSpec) -> Callable[[int], NDArray[np.float64]]:
        trainer = self._trainer
        mask = split_of(METHODS[spec.method], trainer.layout, spec.recipe).in_adapter
        batch = int(spec.recipe["local_batch"])
        promise = ExamplePromise(spec.clip, spec.noise_multiplier * spec.extrapolation, spec.example_rate)
        step = Recipe(steps=1, batch=batch, learning_rate=1.0, optimizer="sgd")
        start = np.zeros(trainer.layout.size, np.float32)

        def draw(_: int) -> NDArray[np.float64]:
            moved = trainer.fit_example_dp(start, (), step, promise, Randomness.system(), trainable=mask)
            if moved[~mask].any():
                raise _refused("noise", "numbers that are not shared were moved")
            return -float(batch) * moved[mask].astype(np.float64)

        return draw

    def _vocabulary(self) -> int:
        return int(self._trainer.base.model.get_input_embeddings().weight.shape[0])

    def _longest(self) -> int:
        config = self._trainer.base.model.config.get_text_config()
        return max(4, int(getattr(config, "max_position_embeddings", None) or 48))


def _check_layers(trainer: Trainer) -> str:
    for module in trainer.base.modules:
        layer = trainer.base.model.get_submodule(module.name)
        if type(layer) is not LoraLinear or type(layer.linear) not in (nn.Linear, Int8Linear):
            raise _refused("layers", f"{module.name} is {type(layer).__name__}, not an adapted Linear layer")
    for name, layer in trainer.base.model.named_modules():
        if layer.training and type(layer) is not LoraLinear:
            raise _refused("layers", f"{name or 'the base'} is in training mode, where layers may drop out at random")
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
            raise _refused("layers", f"{name} normalizes over a batch, which couples its records")
    held = "" if trainer.base.precision == "float32" else f", base held at {trainer.base.precision}"
    return f"{len(trainer.base.modules)} plain Linear layers{held}"


def _check_gradients(trainer: Trainer, vector: Vector, records: Sequence[Example], exact: NDArray[np.float64]) -> str:
    own = trainer.example_gradients(vector, records)
    if own.shape != exact.shape or not np.isfinite(own).all():
        raise _refused("gradients", "a record's gradient is missing or not finite")
    error = _relative_error(own, exact)
    if error > RELATIVE_ERROR:
        raise _refused(
            "gradients", f"per-record gradients are off by {error:.2g} of their norm; loss is not per record"
        )
    return f"within {error:.1g} of autograd's, record by record"


def _check_independence(trainer: Trainer, vector: Vector, records: Sequence[Example]) -> str:
    together = trainer.example_gradients(vector, records)
    alone = np.concatenate([trainer.example_gradients(vector, [record]) for record in records])
    error = _relative_error(together, alone)
    if error > RELATIVE_ERROR:
        raise _refused("per example", f"a record's gradient moves by {error:.2g} of its norm with who shares its batch")
    recipe = Recipe(steps=1, batch=2, learning_rate=1.0)
    users = [list(records[:2]), list(records[2:4])]
    cohort = trainer.fit(vector, users, recipe, [np.random.default_rng(0) for _ in users])
    single = [trainer.fit(vector, [own], recipe, [np.random.default_rng(0)])[0] for own in users]
    error = _relative_error((cohort - vector).astype(np.float64), (np.stack(single) - vector).astype(np.float64))
    if error > RELATIVE_ERROR:
        raise _refused("per example", f"a user's update moves by {error:.2g} of its norm with who trains beside them")
    return f"within {error:.1g}, whoever shares the batch"


def _check_clip(
    trainer: Trainer,
    vector: Vector,
    records: Sequence[Example],
    exact: NDArray[np.float64],
    trainable: NDArray[np.bool_],
) -> str:
    kept = exact * trainable
    norms = np.linalg.norm(kept, axis=1)
    clip = float(np.median(norms))
    wanted = (np.minimum(1.0, clip / norms)[:, None] * kept).sum(axis=0)
    whole = trainer.clipped_gradient_sum(vector, records, clip, trainable=trainable)
    error = float(np.linalg.norm(whole - wanted)) / clip
    if error > len(records) * RELATIVE_ERROR:
        raise _refused("clip", f"the clipped sum is off by {error:.2g} clips")
    for index in range(len(records)):
        one = trainer.clipped_gradient_sum(vector, [records[index]], clip, trainable=trainable)
        if float(np.linalg.norm(one)) > clip * (1.0 + 1e-9):
            raise _refused("clip", "one record adds more than the clip to the sum")
    return f"{int((norms > clip).sum())} of {len(records)} records clipped, the sum within {error:.1g} clips"


def _check_empty(trainer: Trainer, vector: Vector, trainable: NDArray[np.bool_], unit: str) -> str:
    total = trainer.clipped_gradient_sum(vector, (), 1.0, trainable=trainable)
    if total.shape != vector.shape or total.any():
        raise _refused("empty batch", "the sum over no record is not zero")
    if unit == "user":
        return "zeros"
    promise = ExamplePromise(clip=1.0, noise_multiplier=1.0, rate=0.5)
    recipe = Recipe(steps=2, batch=1, learning_rate=1.0)
    moved = trainer.fit_example_dp(vector, (), recipe, promise, Randomness.system(), trainable=trainable)
    if not np.isfinite(moved).all() or (moved[trainable] == vector[trainable]).mean() > 0.5:
        raise _refused("empty batch", "a step without records is not a step of noise")
    return "zeros, and a step of noise alone"


def _check_save_and_load(trainer: Trainer, vector: Vector, records: Sequence[Example]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_peft(Path(folder), vector, trainer.layout, trainer.scaling, "preflight")
        loaded = read_peft(Path(folder), trainer.layout, trainer.scaling)
    before, after = (_logits(trainer, adapter, records[0]) for adapter in (vector, loaded))
    if not torch.equal(before, after):
        raise _refused("save and load", "an adapter that was saved and loaded gives other logits")
    stacked = trainer.score(records, adapters=vector[None], owner=np.zeros(len(records), dtype=np.intp)).nats
    merged = trainer.score(records, under=(loaded, trainer.layout, trainer.scaling)).nats
    error = float(np.abs(stacked - merged).max() / np.abs(merged).max())
    if error > RELATIVE_ERROR:
        raise _refused("save and load", f"the adapter that is trained and the one that is saved differ by {error:.2g}")
    return "the same logits"


def _judge(releases: Sequence[NDArray[np.float64]], scale: float) -> str:
    """Test numbers that should be independent normals of standard deviation `scale`; return what was found."""
    from scipy.special import chdtrc, chdtri

    flat = np.concatenate(releases) / scale
    count = len(flat)
    statistic = float(flat @ flat)
    low, high = float(chdtri(count, 1.0 - FALSE_ALARM / 2)), float(chdtri(count, FALSE_ALARM / 2))
    if not low <= statistic <= high:
        raise _refused(
            "noise",
            f"the noise has {math.sqrt(statistic / count):.3f} times the promised standard deviation "
            f"(chi-square {statistic:.0f} on {count:,} numbers)",
        )
    if abs(float(flat.sum())) > NORMAL_LIMIT * math.sqrt(count):
        raise _refused("noise", "the noise has a mean that is not zero")
    first, second = releases[0] / scale, releases[1] / scale
    # Products of independent normals: variance 1; their tails are heavier, hence the factor.
    if abs(float(first @ second)) > 2.0 * NORMAL_LIMIT * math.sqrt(len(first)):
        raise _refused("noise", "two releases share their noise")
    return f"{math.sqrt(statistic / count):.3f} of the promised deviation, p {chdtrc(count, statistic):.2f}"


def _enough(draw: Callable[[int], NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Draw as often as the tests need, twice at least."""
    releases = [draw(number) for number in range(1, 3)]
    while sum(map(len, releases)) < LEAST_NOISE_NUMBERS:
        releases.append(draw(len(releases) + 1))
    return releases


class _PlainLora(nn.Module):
    """One adapted layer as Opacus knows it: two Linear layers beside a frozen one."""

    def __init__(self, linear: nn.Linear | Int8Linear, a: Tensor, b: Tensor, scaling: float) -> None:
        super().__init__()
        self.linear, self.scaling = linear, scaling
        self.a = nn.Linear(a.shape[1], a.shape[0], bias=False, device=a.device, dtype=a.dtype)
        self.b = nn.Linear(b.shape[1], b.shape[0], bias=False, device=b.device, dtype=b.dtype)
        self.a.weight.data, self.b.weight.data = a.clone(), b.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scaling * self.b(self.a(x))


def _second_opinion(trainer: Trainer, vector: Vector, records: Sequence[Example], exact: NDArray[np.float64]) -> str:
    """Ask Opacus for the gradient of each record: an implementation of per-record gradients that is not ours."""
    try:
        import opacus
        from opacus.grad_sample import GradSampleHooks
    except ImportError:
        return "Opacus is not installed: the gradients were held against autograd alone"
    model, tensors = trainer.base.model, trainer.layout.split(vector)
    dtype = next(model.parameters()).dtype
    layers = [model.get_submodule(module.name) for module in trainer.base.modules]
    plain: list[_PlainLora] = []
    for index, layer in enumerate(layers):
        a, b = (
            torch.from_numpy(tensors[trainer.layout.tensors[2 * index + part].name].copy()).to(
                trainer.base.device, dtype
            )
            for part in (0, 1)
        )
        plain.append(_PlainLora(layer.linear, a, b, trainer.scaling))
    factors = nn.ModuleList(part for layer in plain for part in (layer.a, layer.b))
    hooks: Any = GradSampleHooks(factors, loss_reduction="sum")
    try:
        _put(model, trainer, plain)
        width = max(len(record.ids) for record in records)
        ids = torch.zeros(len(records), width, dtype=torch.long, device=trainer.base.device)
        for row, record in enumerate(records):
            ids[row, : len(record.ids)] = torch.from_numpy(record.ids.astype(np.int64))
        logits = model(input_ids=ids, use_cache=False).logits
        losses = [_record_loss(logits[row], ids[row], record) for row, record in enumerate(records)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the first layer's input is frozen, which it is
            torch.stack(losses).sum().backward()
        samples: list[Tensor] = [getattr(part.weight, "grad_sample").flatten(1) for part in factors]  # noqa: B009
    finally:
        _put(model, trainer, layers)
        hooks.cleanup()
    error = _relative_error(torch.cat(samples, dim=1).double().cpu().numpy(), exact)
    if error > RELATIVE_ERROR:
        raise _refused("second opinion", f"Opacus computes other per-record gradients, by {error:.2g} of their norm")
    return f"Opacus {opacus.__version__} computes the same per-record gradients, within {error:.1g}"


def _put(model: nn.Module, trainer: Trainer, layers: Sequence[nn.Module]) -> None:
    for module, layer in zip(trainer.base.modules, layers, strict=True):
        parent, _, leaf = module.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)


def _exact_gradient(trainer: Trainer, vector: Vector, record: Example) -> NDArray[np.float64]:
    """Gradient of one record's mean loss, shape `(size,)`, by another way than the trainer's.

    The adapter is merged into the weights, the base's own forward gives the logits, autograd gives the gradient G of
    each weight `W + s B A`, and the factors follow: `dA = s B^T G`, `dB = s G A^T`. Over an int8 base the weights are
    the dequantized ones, in plain float layers.
    """
    tensors = trainer.layout.split(vector)
    with trainer.over_base((vector, trainer.layout, trainer.scaling)):
        layers: list[LoraLinear] = [trainer.base.model.get_submodule(module.name) for module in trainer.base.modules]
        held = [layer.linear for layer in layers]
        for layer in layers:
            if isinstance(layer.linear, Int8Linear):
                layer.linear = layer.linear.dequantized()
        weights = [layer.linear.weight.requires_grad_(True) for layer in layers]
        try:
            gradients = torch.autograd.grad(_loss(trainer, record), weights)
        finally:
            for layer, linear, weight in zip(layers, held, weights, strict=True):
                weight.requires_grad_(False)
                layer.linear = linear
    pieces: list[NDArray[np.float64]] = []
    for index, gradient in enumerate(gradients):
        a, b = (tensors[trainer.layout.tensors[2 * index + part].name].astype(np.float64) for part in (0, 1))
        full = gradient.double().cpu().numpy()
        pieces += [trainer.scaling * (b.T @ full).ravel(), trainer.scaling * (full @ a.T).ravel()]
    return np.concatenate(pieces)


def _loss(trainer: Trainer, record: Example) -> Tensor:
    """Mean loss of one record alone, through the model's own forward."""
    ids = torch.from_numpy(record.ids.astype(np.int64)).to(trainer.base.device)
    return _record_loss(trainer.base.model(input_ids=ids[None], use_cache=False).logits[0], ids, record)


def _record_loss(logits: Tensor, ids: Tensor, record: Example) -> Tensor:
    first, length = max(record.first_label, 1), len(record.ids)
    return F.cross_entropy(logits[first - 1 : length - 1].float(), ids[first:length])


@torch.no_grad()
def _logits(trainer: Trainer, vector: Vector, record: Example) -> Tensor:
    ids = torch.from_numpy(record.ids.astype(np.int64)).to(trainer.base.device)
    with trainer.over_base((vector, trainer.layout, trainer.scaling)):
        return trainer.base.model(input_ids=ids[None], use_cache=False).logits


def _records(generator: np.random.Generator, vocabulary: int, longest: int) -> list[Example]:
    """Make records of very unequal length, with prompts of unequal length: what couples them shows."""
    records: list[Example] = []
    for length in (longest, 4, max(5, longest // 2), 6):
        ids = generator.integers(0, vocabulary, size=length).astype(np.int32)
        records.append(_MadeUp(ids, int(generator.integers(1, max(2, length // 2)))))
    return records


def _somewhere(trainer: Trainer, generator: np.random.Generator) -> Vector:
    """An adapter that does something: where B is zero, half of the gradients would be, and nothing would show."""
    vector = np.empty(trainer.layout.size, np.float32)
    for tensor in trainer.layout.tensors:
        bound = 1.0 / math.sqrt(tensor.shape[1])
        vector[trainer.layout.offsets[tensor.name]] = 0.3 * bound * generator.normal(size=tensor.size)
    return vector


def _relative_error(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """Largest row-wise difference over the row's norm."""
    norms = np.maximum(np.linalg.norm(wanted, axis=1), np.finfo(np.float64).tiny)
    return float((np.linalg.norm(found - wanted, axis=1) / norms).max())


def _refused(check: str, reason: str) -> Refusal:
    return Refusal("preflight", f"preflight, {check}: {reason}; no budget was spent")
