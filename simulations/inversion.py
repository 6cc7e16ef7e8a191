"""Gradient inversion: which words stand in a person's text, read off one update.

The gradient of a LoRA factor A in the first layer is a sum of outer products whose right-hand sides are the layer's
inputs, and those are nothing but token embeddings. So every row of it lies in the span of the embeddings of the
tokens that were in the batch (Petrov et al. (2024), arXiv:2405.15586, DAGER). Where the rank is at least the number of
tokens, a token was there exactly if its embedding lies in that span. At the small ranks that are really sent the rows
are mixtures, and tokens can only be ranked by how much of their embedding the span holds.

What it shows: how many words an un-noised update gives away, which is what a coordinator in central mode sees. What it
does not show: that an attack which also uses the deeper layers would find no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from client.trainer import Example, Trainer
from client.vault import EncodedUser, Vault
from common.adapters import Layout, Vector, initial_vector
from common.errors import DataError
from common.masks import add_streams
from common.privacy import Randomness
from common.secure_sum import SecureSum
from common.wire import Assignment, ReleaseSpec
from server import rounds as server_rounds
from simulations.attack_result import AttackResult, mean_interval, ranking
from simulations.hosts import Host

__all__ = ["first_layer_inputs", "invert_updates", "present_tokens"]

CONTROL_RECORD_TOKENS = 24
MASKED_SLACK = 0.05
"""How far above chance the lower end of the interval may lie for a message that is uniform."""

PIECE = 256
"""Tokens of the vocabulary that are passed through the first layer at a time."""


def invert_updates(
    host: Host, spec: ReleaseSpec, vector: Vector, users: int, generator: np.random.Generator
) -> AttackResult:
    """Rank the vocabulary by one user's update, captured as it leaves the vault, and see how well the ranking does.

    Three readings: the update without noise, the same under the noise that the round adds, and a control that shows
    what the attack finds where it works best (one record, full rank, plain gradient).
    """
    inputs = first_layer_inputs(host)
    clear: list[float] = []
    noised: list[float] = []
    control: list[float] = []
    for name in generator.permutation(len(host.population)):
        own = host.population.encoded(str(name))
        if not own.train:
            continue
        # The device trains on this many records in a round; the attacker's truth is what it saw.
        own = EncodedUser(own.train[: int(spec.recipe["local_batch"])], (), ())
        truth = _tokens_of(own.train, inputs.shape[0])
        if truth.sum() < 2:
            continue
        vault = Vault(
            host.trainer,
            lambda user, own=own: own,  # noqa: ARG005
            seed=host.config.seed,
            rehearsal=host.config.rehearsal,
        )
        noise = server_rounds.round_randomness(host.config, len(clear) + 1)
        bare = replace(spec, noise="central" if spec.noise == "distributed" else spec.noise, noise_multiplier=0.0)
        without = vault.train(Assignment(bare, 1, (str(name),), vector)).total
        if spec.noise == "distributed":
            released = captured_message(vault, spec, str(name), vector)
        else:
            promised = vault.train(Assignment(spec, 1, (str(name),), vector)).total
            released = server_rounds.add_central_noise(promised.astype(np.float64), spec, noise)
        for update, aucs in ((without, clear), (released, noised)):
            rows = _first_factors(update[: spec.model_dim].astype(np.float64), host.split.sent)
            scores = present_tokens(rows, inputs)
            aucs.append(ranking(scores[truth], scores[~truth]).auc[0])
        control += _control(host, own.train, inputs, generator)
        if len(clear) == users:
            break
    if len(clear) < 2 or len(control) < 2:
        raise DataError("gradient inversion needs at least two users with a few words each")
    value, low, high = mean_interval(clear)
    hidden = mean_interval(noised)
    best = mean_interval(control)
    protected = spec.noise_multiplier > 0
    target = "one update without noise, as a coordinator in central mode sees it"
    why = f"under the noise of one round it is {hidden[0]:.3f} [{hidden[1]:.3f}, {hidden[2]:.3f}]" + (
        "" if protected else ", which is none"
    )
    verdict = "leaks, as expected" if low > 0.5 else "not shown"
    if spec.noise == "distributed":
        target = "one captured message of a secure sum, which is all that the coordinator has of one device"
        why = f"without mask and noise, which nobody sees, it would be {value:.3f} [{low:.3f}, {high:.3f}]"
        verdict = "contradicted" if hidden[1] > 0.5 + MASKED_SLACK else "holds"
        value, low, high = hidden
    return AttackResult(
        name="gradient inversion: words of a text",
        target=target,
        measure="AUC of ranking the vocabulary by whether it was in the text",
        value=value,
        low=low,
        high=high,
        chance=0.5,
        saturation=best[0],
        samples=len(clear),
        verdict=verdict,
        why=f"{why}; for one record at full rank without clipping {best[0]:.3f}",
        details={"auc_with_noise": hidden[0], "auc_with_noise_high": hidden[2], "auc_of_control": best[0]},
    )


def captured_message(vault: Vault, spec: ReleaseSpec, name: str, vector: Vector) -> NDArray[np.float64]:
    """What a coordinator makes of one device's masked vector, shape `(dim,)`: it takes it for a sum and decodes it.

    The vector is the vault's, its share of the noise included; the mask is one stream under a seed that nobody kept,
    as a device's self mask is to whoever lacks its shares.
    """
    sums = SecureSum.of(spec)
    devices = sums.largest_cohort
    noise = sums.noise(spec, devices)
    words = vault.train(Assignment(spec, 1, (name,), vector, devices)).total.copy()
    add_streams(words, [(Randomness.system().bytes(32), True)])
    return np.asarray(noise.decode(words, sums.terms(spec, 1).digest), np.float64)


def first_layer_inputs(host: Host) -> NDArray[np.float64]:
    """What the first adapted layer receives for each token of the vocabulary, shape `(vocabulary, inputs)`.

    With rotary positions this does not depend on where the token stands.
    """
    import torch

    collected: list[NDArray[np.float64]] = []
    layer = host.base.model.get_submodule(host.base.modules[0].name)
    handle = layer.register_forward_pre_hook(
        lambda module, arguments: collected.append(arguments[0][:, 0].detach().double().cpu().numpy())  # noqa: ARG005
    )
    try:
        size = int(host.base.model.config.vocab_size)
        for start in range(0, size, PIECE):
            tokens = torch.arange(start, min(start + PIECE, size), device=host.base.device)
            with torch.no_grad():
                host.base.hidden(tokens[:, None])
    finally:
        handle.remove()
    return np.concatenate(collected)


def present_tokens(rows: NDArray[np.float64], inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Score each token by the share of its input that lies in the span of `rows`; shape `(vocabulary,)`.

    Args:
        rows: Rows of captured gradients of A, shape `(rows, inputs)`.
        inputs: What the layer receives per token, shape `(vocabulary, inputs)`.
    """
    _, sizes, basis = np.linalg.svd(rows, full_matrices=False)
    basis = basis[sizes > 1e-6 * max(float(sizes[0]), 1e-300)]
    lengths = np.linalg.norm(inputs, axis=1)
    return np.linalg.norm(inputs @ basis.T, axis=1) / np.maximum(lengths, 1e-12)


def _first_factors(update: NDArray[np.float64], layout: Layout) -> NDArray[np.float64]:
    """Rows of the factors A of the first layer: all modules of the layer that see the same inputs."""
    names = [tensor.name for tensor in layout.tensors if ".lora_A." in tensor.name]
    block = names[0].rpartition(".self_attn.")[0]
    tensors = layout.split(update)
    same = [name for name in names if block and name.startswith(f"{block}.self_attn.") and "o_proj" not in name]
    return np.concatenate([tensors[name] for name in same or names[:1]])


def _control(
    host: Host, records: Sequence[Example], inputs: NDArray[np.float64], generator: np.random.Generator
) -> list[float]:
    """The attack where it works best: one short record, full rank, B not zero, the gradient as it is."""
    record = max(records, key=lambda one: len(set(one.ids[:CONTROL_RECORD_TOKENS].tolist())))
    trainer = Trainer(host.base, rank=min(64, host.base.modules[0].inputs // 2), scaling=1.0)
    start = initial_vector(trainer.layout, generator)
    start += (0.02 * generator.standard_normal(start.size)).astype(np.float32)
    short = _Record(record.ids[:CONTROL_RECORD_TOKENS], min(record.first_label, len(record.ids) - 1, 4))
    gradient = trainer.example_gradients(start, [short])[0]
    truth = _tokens_of([short], inputs.shape[0])
    if truth.sum() < 2:
        return []
    scores = present_tokens(_first_factors(gradient, trainer.layout), inputs)
    return [ranking(scores[truth], scores[~truth]).auc[0]]


class _Record:
    def __init__(self, ids: NDArray[np.int32], first_label: int) -> None:
        self.ids = ids
        self.first_label = first_label


def _tokens_of(records: Sequence[Example], vocabulary: int) -> NDArray[np.bool_]:
    """Which tokens occur, shape `(vocabulary,)`; a record's last is predicted only, no label depends on its input."""
    present = np.zeros(vocabulary, dtype=bool)
    for record in records:
        present[record.ids[:-1]] = True
    return present
