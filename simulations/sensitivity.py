"""How far one unit can move what a method releases, tried on made-up people: the property that every epsilon rests on.

What is tried goes through the vault and its gate, whole, without noise. For unit user one person among several is
silenced; for unit example one record of a party is taken away, in a step in which every record takes part. What the
person kept from earlier rounds was overfitted on the very records that go. The result is in units of the stated
sensitivity: above 1 the epsilon would be false.

A trial that finds nothing proves nothing; the proof is docs/privacy.md. This finds what couples people or records: a
row from outside that looks at a whole cohort, a private part in the pass of records that are clipped one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.round_states import ShortMemory
from client.trainer import Example, Recipe, Trainer
from client.vault import EncodedUser, Vault
from common.adapters import Vector
from common.methods import METHODS
from common.split import Split, split_of
from common.wire import Assignment, ReleaseSpec

__all__ = ["TOLERANCE", "check_rows", "movement"]

TOLERANCE = 1e-3
"""What float32 sums in a stacked cohort may add; 1e-5 was measured."""

RUN = "5e" * 16
PUBLIC = {"start_seed": 5, "proximal_weight": 0.5}


@dataclass(frozen=True)
class MadeUp:
    """A record of random tokens."""

    ids: NDArray[np.int32]
    first_label: int


def movement(
    method: str,
    trainer: Trainer,
    generator: np.random.Generator,
    *,
    unit: str = "user",
    optimizer: str = "sgd",
    claimed: bool = True,
    **recipe: float | int | str,
) -> float:
    """Take one unit away, and return how far the release moved, in units of the stated sensitivity.

    Args:
        method: Row of the method table.
        trainer: Of the run's rank.
        generator: Draws people, records and the shared vector.
        unit: Whose presence is to be hidden.
        optimizer: For unit user, what people train by.
        claimed: Whether anything is promised; a vault refuses promises that it knows to be false.
        recipe: Public facts of the recipe beside those that a trial sets.

    Raises:
        Refusal: The vault refuses the promise itself.
    """
    clip = float(10.0 ** generator.uniform(-3, 1))
    own = [_records(generator, trainer, int(generator.integers(1, 5))) for _ in range(int(generator.integers(2, 5)))]
    if unit == "example":
        return _by_record(method, trainer, generator, own, clip, claimed, recipe)
    spec, split = _spec(method, trainer, unit, clip, claimed, {"optimizer": optimizer, "local_steps": 2} | recipe)
    people = {str(number): EncodedUser(records, (), ()) for number, records in enumerate(own)}
    vector = _somewhere(split, generator)
    names = tuple(people)
    kept = {name: _overfitted(split, trainer, people[name].train) for name in names}
    sums: list[NDArray[np.float64]] = []
    for held in (people, people | {"0": EncodedUser((), (), ())}):
        vault = Vault(trainer, held.__getitem__, seed=0, states=_remembering(kept))
        sums.append(vault.train(Assignment(spec, 1, names, vector)).total.astype(np.float64))
    return float(np.linalg.norm(sums[0] - sums[1])) / clip


def check_rows(method: str, trainer: Trainer, *, unit: str, seed: int = 0, trials: int = 24) -> float:
    """The largest movement over many trials, half of them with Adam, in units of the stated sensitivity.

    Raises:
        Refusal: The vault refuses the promise itself.
    """
    generator = np.random.default_rng(seed)
    return max(
        movement(method, trainer, generator, unit=unit, optimizer=("sgd", "adam")[trial % 2]) for trial in range(trials)
    )


def _by_record(
    method: str,
    trainer: Trainer,
    generator: np.random.Generator,
    own: Sequence[Sequence[Example]],
    clip: float,
    claimed: bool,
    recipe: dict[str, Any],
) -> float:
    records = [record for some in own for record in some]
    target = _records(generator, trainer, 1, shortest=24)
    # Everybody in the batch, plain descent by one over it: what is sent is the sum of clipped gradients, negated.
    step = {"local_steps": 1, "local_batch": len(records) + 1, "learning_rate": 1.0, "example_records": 1}
    spec, split = _spec(method, trainer, "example", clip, claimed, recipe | step)
    vector = _somewhere(split, generator)
    sums: list[NDArray[np.float64]] = []
    for held in ([*target, *records], records):
        # The private part that a silo would have by now, if nothing forbade it to be fitted without noise.
        kept = {"0": _overfitted(split, trainer, held)}
        if spec.recipe.get("private_noise"):
            kept = {"0": _overfitted(split, trainer, records)}  # of earlier steps, whose noise is paid for
        party = EncodedUser(held, (), (), by_record=True)
        vault = Vault(trainer, {"0": party}.__getitem__, seed=0, states=_remembering(kept))
        sums.append(vault.train(Assignment(spec, 1, ("0",), vector)).total.astype(np.float64))
    moved = float(np.linalg.norm(sums[0] - sums[1])) * (len(records) + 1)
    return moved / clip


def _spec(
    method: str, trainer: Trainer, unit: str, clip: float, claimed: bool, recipe: dict[str, Any]
) -> tuple[ReleaseSpec, Split]:
    usual: dict[str, Any] = {
        "local_steps": 1,
        "local_batch": 2,
        "learning_rate": 0.1,
        "optimizer": "sgd",
        "scaling": trainer.scaling,
        "example_records": 20,
    }
    public = usual | PUBLIC | recipe
    split = split_of(METHODS[method], trainer.layout, public)
    spec = ReleaseSpec(
        run=RUN,
        method=method,
        names=tuple(tensor.name for tensor in split.sent.tensors),
        shapes=tuple(tensor.shape for tensor in split.sent.tensors),
        dtype="float32",
        unit=unit,
        noise="central",
        clip=clip,
        noise_multiplier=0.0,
        sampling_rate=1.0,
        rounds=1,
        epsilon="8.0" if claimed else "inf",
        delta=1e-5,
        population=100,
        recipe=public,
        model=trainer.base.digest,
        source="00" * 32,
    )
    return spec, split


def _somewhere(split: Split, generator: np.random.Generator) -> Vector:
    """A shared vector that does something."""
    adapter = generator.normal(0, 0.2, split.layout.size).astype(np.float32)
    return split.vector_of(adapter)


def _overfitted(split: Split, trainer: Trainer, records: Sequence[Example]) -> NDArray[np.float32] | None:
    """What somebody with these records would keep after many steps; None where a method keeps nothing."""
    if not split.method.remembers or not records:
        return None
    recipe, orders = Recipe(8, 4, 0.1, "adam"), [np.random.default_rng(0)]
    if split.method.keeps == "copy":
        start = np.full(split.layout.size, 0.05, np.float32)
        return trainer.fit(start, [records], recipe, orders)[0]
    wide = trainer.at_rank(split.trained.tensors[0].shape[0])
    start = split.start + np.float32(0.05)
    return wide.fit(start, [records], recipe, orders, trainable=split.own)[0][split.kept]


def _remembering(kept: dict[str, NDArray[np.float32] | None]) -> ShortMemory:
    states = ShortMemory()
    for name, own in kept.items():
        if own is not None:
            states.keep(RUN, 0, [name], own[np.newaxis])
    return states


def _records(generator: np.random.Generator, trainer: Trainer, count: int, *, shortest: int = 4) -> list[Example]:
    vocabulary = int(trainer.base.model.get_input_embeddings().weight.shape[0])
    records: list[Example] = []
    for _ in range(count):
        length = int(generator.integers(shortest, 30))
        ids = generator.integers(0, vocabulary, size=length).astype(np.int32)
        records.append(MadeUp(ids, int(generator.integers(1, length - 1))))
    return records
