"""Every method against a naive reference: PEFT, plain PyTorch, a loop over users; three users, two rounds.

The references are written from the papers' algorithms, tensor by tensor, and know nothing of stacking, positions,
layouts or splits. What they share with the code under test is the base, the starting values, and the order in which
records are seen.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from client.base_model import load_base
from client.gate import Gate
from client.round_states import ShortMemory
from client.trainer import Recipe, Trainer, batch_order
from client.vault import EncodedUser, Vault
from common.adapters import initial_vector
from common.methods import METHODS
from common.split import SHARED_START, public_start, split_of
from common.wire import Assignment
from server.aggregation import ServerStep
from server.rounds import cut_to_rank

USERS = ("0", "1", "2")
RANK, SCALING, SEED, ROUNDS, STEPS, BATCH, RATE, CLIP, PROXIMAL = 2, 2.0, 11, 2, 3, 2, 0.05, 0.6, 0.7
RANKS = "1,2"


@pytest.fixture(scope="module")
def people(random_examples):
    generator = np.random.default_rng(3)
    return {name: random_examples(generator, 5) for name in USERS}


@pytest.fixture(scope="module")
def trainer(tiny_base_folder):
    """In double precision: Adam divides by the gradient's size, and would show float32 rounding where it is small."""
    base = load_base(tiny_base_folder, ("q_proj", "v_proj"), dtype=torch.float64)
    return Trainer(base, rank=RANK, scaling=SCALING)


def order(name, number):
    """The vault's order of one user's records in one round, by its definition."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{SEED}/{name}/{number}".encode()).digest()[:16]))


# --- the naive side ----------------------------------------------------------------------------------------------


class Naive:
    """One PEFT model with one or two adapters, and plain loops."""

    def __init__(self, folder, adapters=("shared",), rank=RANK):
        base = AutoModelForCausalLM.from_pretrained(folder)
        config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        self.model = get_peft_model(base.double(), config, adapter_name=adapters[0])
        for name in adapters[1:]:
            self.model.add_adapter(name, config)
        self.model.base_model.set_adapter(list(adapters))
        self.model.double().eval()

    def tensors(self, adapter="shared"):
        """Parameters by the names that PEFT gives them in files."""
        return {
            name.replace(f".{adapter}.", "."): value
            for name, value in self.model.named_parameters()
            if f".{adapter}." in name
        }

    def load(self, values, adapter="shared"):
        with torch.no_grad():
            for name, parameter in self.tensors(adapter).items():
                parameter.copy_(torch.as_tensor(values[name]))

    def read(self, adapter="shared"):
        return {name: value.detach().clone().numpy() for name, value in self.tensors(adapter).items()}

    def loss(self, record):
        ids = torch.from_numpy(record.ids.astype(np.int64))[None]
        logits = self.model(input_ids=ids).logits[0]
        first = max(record.first_label, 1)
        return F.cross_entropy(logits[first - 1 : -1], ids[0, first:])

    def train(self, records, orders, moves, optimizer, near=None):
        """`STEPS` steps over what `moves(name)` picks; `near` pulls the adapter to given values."""
        chosen = [
            value for adapter, names in moves.items() for name, value in self.tensors(adapter).items() if names(name)
        ]
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
        stepper = kind(chosen, lr=RATE)
        for picks in batch_order(len(records), STEPS, BATCH, orders):
            self.model.zero_grad()
            loss = sum(self.loss(records[index]) for index in picks) / BATCH
            if near is not None:
                for name, value in self.tensors().items():
                    loss = loss + PROXIMAL / 2 * ((value - torch.as_tensor(near[name])) ** 2).sum()
            loss.backward()
            stepper.step()


def is_a(name):
    return ".lora_A." in name


def is_b(name):
    return ".lora_B." in name


def everything(name):
    return True


def lower(name):
    return ".layers.0." in name


def upper(name):
    return ".layers.1." in name


def clipped(update):
    norm = np.sqrt(sum(float((value.astype(float) ** 2).sum()) for value in update.values()))
    return {name: value * min(1.0, CLIP / norm) for name, value in update.items()}


def mean_step(shared, updates):
    """FedAvg: add the mean of the clipped updates."""
    return {name: value + np.mean([one[name] for one in updates], axis=0) for name, value in shared.items()}


def only(values, sent):
    return {name: value for name, value in values.items() if sent(name)}


def naive_plain(folder, people, start, sent, optimizer):
    """fedavg, ffa, dual: train what is sent, and nothing else."""
    shared, model = dict(start), Naive(folder)
    for number in range(1, ROUNDS + 1):
        updates = []
        for name in USERS:
            model.load(shared)
            model.train(people[name], order(name, number), {"shared": sent}, optimizer)
            learned = only(model.read(), sent)
            updates.append(clipped({key: learned[key] - shared[key] for key in learned}))
        shared |= mean_step(only(shared, sent), updates)
    return only(shared, sent), {}


def naive_partial(folder, people, start, sent, own, optimizer, by_turns):
    """fedsa, layers: train what is sent and what stays together, or what stays first."""
    shared, model = only(start, sent), Naive(folder)
    kept = {name: only(start, own) for name in USERS}
    for number in range(1, ROUNDS + 1):
        updates = []
        for name in USERS:
            model.load(shared | kept[name])
            orders = order(name, number)
            for moves in [own, sent] if by_turns else [everything]:
                model.train(people[name], orders, {"shared": moves}, optimizer)
            learned = model.read()
            kept[name] = only(learned, own)
            updates.append(clipped({key: learned[key] - shared[key] for key in shared}))
        shared = mean_step(shared, updates)
    return shared, kept


def naive_joint(folder, people, start, second, optimizer):
    """dual-joint: two adapters over one base, one optimizer over both; the first is sent."""
    shared, model = dict(start), Naive(folder, ("shared", "own"))
    kept = {name: dict(second) for name in USERS}
    for number in range(1, ROUNDS + 1):
        updates = []
        for name in USERS:
            model.load(shared)
            model.load(kept[name], "own")
            model.train(people[name], order(name, number), {"shared": everything, "own": everything}, optimizer)
            learned, kept[name] = model.read(), model.read("own")
            updates.append(clipped({key: learned[key] - shared[key] for key in shared}))
        shared = mean_step(shared, updates)
    return shared, kept


def naive_ditto(folder, people, start, optimizer):
    """Ditto, algorithm 1: the shared step as ever, and a copy that is trained near what the server sent."""
    shared, model = dict(start), Naive(folder)
    kept = {name: dict(start) for name in USERS}
    for number in range(1, ROUNDS + 1):
        updates = []
        for name in USERS:
            model.load(kept[name])
            model.train(people[name], order(f"{name}/copy", number), {"shared": everything}, optimizer, near=shared)
            kept[name] = model.read()
            model.load(shared)
            model.train(people[name], order(name, number), {"shared": everything}, optimizer)
            learned = model.read()
            updates.append(clipped({key: learned[key] - shared[key] for key in shared}))
        shared = mean_step(shared, updates)
    return shared, kept


def naive_flex(folder, people, start, optimizer, rank_of):
    """FlexLoRA: factors of each device's own rank by SVD of the mean product; products are averaged and cut."""
    layers = sorted(name.replace("lora_A", "{}") for name in start if is_a(name))
    products = {
        one: np.zeros((start[one.format("lora_B")].shape[0], start[one.format("lora_A")].shape[1])) for one in layers
    }
    for number in range(1, ROUNDS + 1):
        updates = []
        for name in USERS:
            rank, values = rank_of(name), {}
            for one in layers:
                u, s, v = np.linalg.svd(products[one], full_matrices=False)
                there = min(rank, int((s > 1e-6 * max(s[0], 1e-30)).sum()))
                down, up = start[one.format("lora_A")][:rank].copy(), np.zeros((u.shape[0], rank), np.float32)
                down[:there], up[:, :there] = v[:there], u[:, :there] * s[:there] / SCALING
                values |= {one.format("lora_A"): down, one.format("lora_B"): up}
            model = Naive(folder, rank=rank)
            model.load(values)
            model.train(people[name], order(name, number), {"shared": everything}, optimizer)
            learned = model.read()
            updates.append(
                clipped(
                    {
                        one: SCALING * learned[one.format("lora_B")] @ learned[one.format("lora_A")] - products[one]
                        for one in layers
                    }
                )
            )
        for one, value in mean_step(products, updates).items():
            u, s, v = np.linalg.svd(value, full_matrices=False)
            products[one] = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
    return {one.replace("{}", "lora_product"): value for one, value in products.items()}, {}


def naive(name, folder, people, trainer, optimizer, rank_of):
    start = trainer.layout.split(public_start(trainer.layout, SEED))
    start = {key: value.copy() for key, value in start.items()}
    if name in ("fedavg", "dual"):
        return naive_plain(folder, people, start, everything, optimizer)
    if name == "ffa":
        return naive_plain(folder, people, start, is_b, optimizer)
    if name == "fedsa":
        return naive_partial(folder, people, start, is_a, is_b, optimizer, by_turns=False)
    if name in ("layers", "layers-by-turns"):
        return naive_partial(folder, people, start, lower, upper, optimizer, by_turns=name != "layers")
    if name == "dual-joint":
        second = trainer.layout.split(initial_vector(trainer.layout, np.random.default_rng([SEED, 0x9E50])))
        return naive_joint(folder, people, start, {key: value.copy() for key, value in second.items()}, optimizer)
    if name == "ditto":
        return naive_ditto(folder, people, start, optimizer)
    return naive_flex(folder, people, start, optimizer, rank_of)


# --- ours --------------------------------------------------------------------------------------------------------


def spec_of(release_spec, trainer, name, **changes):
    recipe = {
        "local_steps": STEPS,
        "local_batch": BATCH,
        "learning_rate": RATE,
        "optimizer": "sgd",
        "scaling": SCALING,
        "example_records": 20,
        "rank": RANK,
        "personal_rank": RANK,
        "shared_layers": 1,
        "proximal_weight": PROXIMAL,
        "start_seed": SEED,
        "ranks": RANKS,
        **changes.pop("recipe", {}),
    }
    split = split_of(METHODS[name], trainer.layout, recipe)
    names, shapes = ([getattr(tensor, field) for tensor in split.sent.tensors] for field in ("name", "shape"))
    spec = release_spec(
        method=name,
        names=tuple(names),
        shapes=tuple(shapes),
        model=trainer.base.digest,
        recipe=recipe,
        clip=CLIP,
        noise_multiplier=0.0,
        epsilon="inf",
        **changes,
    )
    return spec, split


def ours(release_spec, trainer, people, name, optimizer, gate=None):
    """Two rounds through vault and gate, and the server's sum, mean, step and cut."""
    spec, split = spec_of(release_spec, trainer, name, recipe={"optimizer": optimizer})
    states = ShortMemory()
    vault = Vault(
        trainer,
        {user: EncodedUser(own, (), ()) for user, own in people.items()}.__getitem__,
        seed=SEED,
        states=states,
        gate=gate,
    )
    vector, velocity = split.vector_of(public_start(trainer.layout, SEED)), np.zeros(split.sent.size, np.float32)
    for number in range(1, ROUNDS + 1):
        release = vault.train(Assignment(spec, number, USERS, vector))
        vector, velocity = ServerStep(1.0, 0.0).apply(vector, velocity, release.total.astype(float) / len(USERS))
        vector = cut_to_rank(vector, split.sent, RANK)
    return vector, split, states, spec, vault


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.shared])
def test_two_rounds_of_three_users_equal_a_loop_with_peft(
    name, optimizer, release_spec, trainer, people, tiny_base_folder
):
    vector, split, states, spec, _ = ours(release_spec, trainer, people, name, optimizer)
    shared, kept = naive(name, tiny_base_folder, people, trainer, optimizer, split.rank_of)
    found = split.sent.split(vector)
    assert found.keys() == shared.keys()
    moved = 0.0
    # Adam's step has one size however small the gradient: where it is nearly zero, rounding decides on the sign.
    close = 1e-3 if optimizer == "adam" else 1e-4
    for key, value in shared.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=close, err_msg=key)
        moved = max(moved, float(np.abs(value).max()))
    assert moved > 0.01
    own = dict(zip(USERS, states.before(spec.run, ROUNDS + 1, USERS), strict=True))
    assert (own["0"] is None) == (not kept)
    for user, values in kept.items():
        if name == "dual-joint":
            names = [tensor.name for tensor in trainer.layout.tensors]
        else:
            names = [tensor.name for tensor in trainer.layout.tensors if tensor.name in values]
        np.testing.assert_allclose(own[user], np.concatenate([values[key].ravel() for key in names]), atol=close)


def test_the_start_of_a_run_is_the_public_one(trainer):
    expected = initial_vector(trainer.layout, np.random.default_rng([SEED, SHARED_START]))
    assert (public_start(trainer.layout, SEED) == expected).all()


# --- what stays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.remembers])
def test_what_stays_never_reaches_the_gate(name, release_spec, trainer, people):
    """The gate sees arrays of the shared tensors' size alone, and no run of numbers of what stays is in them."""
    seen = []

    class Watching(Gate):
        def release(self, updates, spec, number, randomness=None):
            seen.append((spec.names, np.array(updates)))
            return super().release(updates, spec, number, randomness)

    _, split, states, spec, _ = ours(release_spec, trainer, people, name, "adam", Watching())
    private = (
        set()
        if name in ("ditto", "dual-joint")
        else {tensor.name for tensor in trainer.layout.tensors} - {tensor.name for tensor in split.sent.tensors}
    )
    for names, updates in seen:
        assert names == tuple(tensor.name for tensor in split.sent.tensors)
        assert not private & set(names)
        assert updates.shape == (len(USERS), split.sent.size)
    everything_sent = b"".join(updates.tobytes() for _, updates in seen)
    for own in states.before(spec.run, ROUNDS + 1, USERS):
        values = own[own != 0].astype(np.float32)
        for place in range(0, len(values) - 8, max(1, len(values) // 16)):
            assert values[place : place + 8].tobytes() not in everything_sent


@pytest.mark.parametrize("name", ["fedsa", "layers", "layers-by-turns", "dual-joint"])
def test_an_update_is_the_same_whatever_the_private_numbers_are_called_to_be_as_long_as_the_shared_ones_move_alike(
    name, release_spec, trainer, people
):
    """Moving what stays, and nothing else, moves no number that leaves: positions are disjoint at the door too."""
    spec, split = spec_of(release_spec, trainer, name)
    vector = split.vector_of(public_start(trainer.layout, SEED))
    starts = split.starts(vector, USERS, [None] * 3)
    noise = np.random.default_rng(0).normal(size=starts.shape).astype(np.float32) * split.own
    assert np.abs(noise).max() > 1
    assert (split.updates(starts + noise, vector) == split.updates(starts, vector)).all()
    assert spec.model_dim == split.sent.size


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.remembers])
def test_what_a_user_ends_up_with_goes_on_from_the_rounds_with_the_shared_part_frozen(
    name, release_spec, trainer, people, tiny_base_folder
):
    vector, split, _, spec, vault = ours(release_spec, trainer, people, name, "sgd")
    start = initial_vector(trainer.layout, np.random.default_rng(0))
    recipe = Recipe(STEPS, BATCH, RATE, "sgd")
    over = vault.personalize(USERS, vector, start, recipe, trainer, spec=spec).over_global
    records = people["1"]
    scorer = trainer.at_rank(split.over_rank)
    under = (split.adapter(vector), trainer.layout, SCALING)
    scores = scorer.score(records, adapters=over, owner=np.ones(len(records), dtype=np.intp), under=under)

    shared, kept = naive(name, tiny_base_folder, people, trainer, "sgd", split.rank_of)
    adapters = ("shared", "own") if name == "dual-joint" else ("shared",)
    model = Naive(tiny_base_folder, adapters)
    if name == "dual-joint":
        model.load(shared)
        model.load(kept["1"], "own")
        model.train(records, order("1", 0), {"own": everything}, "sgd")
    elif name == "ditto":
        model.load(kept["1"])
        model.train(records, order("1", 0), {"shared": everything}, "sgd", near=shared)
    else:
        model.load(shared | kept["1"])
        model.train(records, order("1", 0), {"shared": {"fedsa": is_b}.get(name, upper)}, "sgd")
    with torch.no_grad():
        expected = [model.loss(record).item() * (len(record.ids) - max(record.first_label, 1)) for record in records]
    np.testing.assert_allclose(scores.nats, expected, atol=1e-3)
    plain = trainer.score(records, under=under).nats
    assert np.abs(plain - scores.nats).max() > 0.01
