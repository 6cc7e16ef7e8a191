"""The vault: what a server can ask of it, what it answers, and that one person moves the answer by at most the clip."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.base_model import load_base
from client.gate import Gate
from client.trainer import Recipe, Trainer
from client.user_data import Encoder, Record, User
from client.vault import EncodedUser, Vault, encode_user
from common.errors import GateRefused, Refusal
from common.wire import Assignment

PEOPLE = tuple(str(number) for number in range(6))
CLIP = 0.05
"""Below the length of these updates, so that the clip is at work."""


@pytest.fixture(scope="module")
def trainer(tiny_base_folder):
    return Trainer(load_base(tiny_base_folder, ("q_proj", "v_proj")), rank=2, scaling=2.0)


@pytest.fixture(scope="module")
def people(random_examples):
    generator = np.random.default_rng(5)
    return {name: EncodedUser(random_examples(generator, 5), (), ()) for name in PEOPLE}


@pytest.fixture(scope="module")
def spec(trainer, release_spec):
    layout = trainer.layout
    return release_spec(
        names=tuple(tensor.name for tensor in layout.tensors),
        shapes=tuple(tensor.shape for tensor in layout.tensors),
        model=trainer.base.digest,
        clip=CLIP,
    )


@pytest.fixture(scope="module")
def start(trainer):
    return np.random.default_rng(1).normal(0, 0.05, trainer.layout.size).astype(np.float32)


@pytest.fixture
def vault(trainer, people):
    return Vault(trainer, people.__getitem__, seed=9)


def alone(vault, spec, start, name):
    """What one person's update is when nobody else is near."""
    return vault.train(Assignment(spec, 1, (name,), start)).total.astype(np.float64)


def test_a_chunk_releases_the_sum_of_what_its_users_release_alone(vault, spec, start):
    together = vault.train(Assignment(spec, 1, PEOPLE, start))
    assert together.users == len(PEOPLE)
    apart = sum(alone(vault, spec, start, name) for name in PEOPLE)
    np.testing.assert_allclose(together.total, apart, rtol=0, atol=1e-5 * CLIP)
    norms = [np.linalg.norm(alone(vault, spec, start, name)) for name in PEOPLE]
    assert max(norms) <= CLIP
    assert max(norms) > 0.99 * CLIP


def test_the_same_round_gives_the_same_bytes_and_another_round_another_order(vault, spec, start):
    first, again, other = (vault.train(Assignment(spec, number, PEOPLE[:2], start)) for number in (1, 1, 2))
    assert first.receipt == again.receipt
    assert first.total.tobytes() == again.total.tobytes()
    assert first.total.tobytes() != other.total.tobytes()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunk=st.lists(st.sampled_from(PEOPLE), min_size=1, max_size=5, unique=True),
    clip=st.sampled_from([1e-3, 0.05, 10.0]),
    optimizer=st.sampled_from(["sgd", "adam"]),
    data=st.data(),
)
def test_one_persons_data_move_what_is_released_by_at_most_the_clip(
    trainer, people, spec, start, chunk, clip, optimizer, data
):
    """Zero-out adjacency: the assignment is the same, one of its people has nothing."""
    asked = replace(spec, clip=clip, recipe={**spec.recipe, "optimizer": optimizer})
    gone = data.draw(st.sampled_from(chunk))
    without = {**people, gone: EncodedUser((), (), ())}
    totals = [
        Vault(trainer, held.__getitem__, seed=9).train(Assignment(asked, 1, tuple(chunk), start)).total
        for held in (people, without)
    ]
    # Others are trained in rows of another batch, whose float32 rounding may differ.
    assert np.linalg.norm(totals[0].astype(np.float64) - totals[1]) <= clip * (1 + 1e-4)


def test_a_person_without_records_still_answers_with_zeros(trainer, people, spec, start):
    nothing = Vault(trainer, lambda _: EncodedUser((), (), ()), seed=9)
    release = nothing.train(Assignment(spec, 1, PEOPLE[:3], start))
    assert release.users == 3
    assert not release.total.any()


def test_an_update_that_is_not_finite_adds_nothing_and_disturbs_nobody(trainer, people, spec, start, monkeypatch):
    honest = Vault(trainer, people.__getitem__, seed=9)
    expected = sum(alone(honest, spec, start, name) for name in (PEOPLE[0], PEOPLE[2]))
    fit = Trainer.fit

    def broken_fit(self, *arguments, **named):
        trained = fit(self, *arguments, **named).copy()
        trained[1, 3] = math.nan
        return trained

    monkeypatch.setattr(Trainer, "fit", broken_fit)
    release = honest.train(Assignment(spec, 1, PEOPLE[:3], start))
    assert release.users == 3
    np.testing.assert_allclose(release.total, expected, rtol=0, atol=1e-5 * CLIP)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "00" * 32}, "model-mismatch"),
        ({"method": "local"}, "layout-mismatch"),
        ({"method": "exfiltrate"}, "bad-request"),
        ({"dtype": "float64"}, "bad-request"),
        ({"dtype": "object"}, "bad-request"),
        ({"noise": "none"}, "bad-request"),
        ({"unit": "household"}, "bad-request"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused_with_a_reason_of_its_own(vault, spec, start, change, code):
    with pytest.raises(Refusal) as refused:
        vault.train(Assignment(replace(spec, **change), 1, PEOPLE[:1], start))
    assert refused.value.code == code


def test_other_tensors_than_the_method_shares_are_refused(vault, spec, start):
    private = tuple(f"private.{name}" for name in spec.names)
    for change in ({"names": private}, {"names": spec.names[::-1], "shapes": spec.shapes[::-1]}):
        with pytest.raises(Refusal) as refused:
            vault.train(Assignment(replace(spec, **change), 1, PEOPLE[:1], start))
        assert refused.value.code == "layout-mismatch"


@pytest.mark.parametrize(
    ("recipe", "code"),
    [
        ({"local_steps": 0}, "bad-request"),
        ({"local_steps": 2.5}, "bad-request"),
        ({"local_steps": "many"}, "bad-request"),
        ({"local_steps": 10**9}, "bad-request"),
        ({"local_steps": 10**6, "local_batch": 10**6}, "bad-request"),
        ({"local_batch": -1}, "bad-request"),
        ({"learning_rate": 0.0}, "bad-request"),
        ({"learning_rate": "fast"}, "bad-request"),
        ({"optimizer": "lion"}, "bad-request"),
        ({"scaling": 4.0}, "layout-mismatch"),
        ({"scaling": "2.0"}, "layout-mismatch"),
    ],
)
def test_a_recipe_out_of_bounds_is_refused_before_any_work(vault, spec, start, recipe, code):
    with pytest.raises(Refusal) as refused:
        vault.train(Assignment(replace(spec, recipe={**spec.recipe, **recipe}), 1, PEOPLE[:1], start))
    assert refused.value.code == code


@pytest.mark.parametrize("key", ["local_steps", "local_batch", "learning_rate", "optimizer", "scaling"])
def test_a_recipe_with_something_missing_is_refused(vault, spec, start, key):
    recipe = {name: value for name, value in spec.recipe.items() if name != key}
    with pytest.raises(Refusal):
        vault.train(Assignment(replace(spec, recipe=recipe), 1, PEOPLE[:1], start))


@pytest.mark.parametrize("records", [None, 0, -3, 2.5, "20"])
def test_silo_mode_without_a_public_number_of_records_is_refused(vault, spec, start, records):
    recipe = {name: value for name, value in spec.recipe.items() if name != "example_records"}
    if records is not None:
        recipe["example_records"] = records
    with pytest.raises(Refusal) as refused:
        vault.train(Assignment(replace(spec, unit="example", recipe=recipe), 1, PEOPLE[:1], start))
    assert refused.value.code == "bad-request"


def test_somebody_who_does_not_live_here_is_refused_and_not_opened(trainer, people, spec, start):
    opened = []

    def open_user(name):
        opened.append(name)
        return people[name]

    device = Vault(trainer, open_user, seed=9, residents=[PEOPLE[0]])
    for users in ((PEOPLE[1],), PEOPLE[:2]):
        with pytest.raises(Refusal) as refused:
            device.train(Assignment(spec, 1, users, start))
        assert refused.value.code == "not-here"
    assert opened == []
    assert device.subjects() == (PEOPLE[0],)
    assert device.train(Assignment(spec, 1, PEOPLE[:1], start)).users == 1


def test_nobody_counts_twice_in_one_assignment(vault, spec, start):
    with pytest.raises(Refusal) as refused:
        vault.train(Assignment(spec, 1, (PEOPLE[0], PEOPLE[0]), start))
    assert refused.value.code == "bad-request"


def test_a_device_releases_nothing_under_noise_that_was_scaled_down(trainer, people, spec, start):
    device = Vault(trainer, people.__getitem__, seed=9, residents=[PEOPLE[0]])
    with pytest.raises(Refusal) as refused:
        device.train(Assignment(replace(spec, extrapolation=0.5), 1, PEOPLE[:1], start))
    assert refused.value.code == "claim-refused"


def test_what_the_owner_does_not_grant_is_refused_before_any_record_is_opened(trainer, spec, start):
    asked = []

    def grants(wanted, number):
        asked.append((wanted, number))
        raise Refusal("policy-trust", "not granted")

    def open_user(_):
        raise AssertionError("a record was opened")

    with pytest.raises(Refusal) as refused:
        Vault(trainer, open_user, seed=9, grants=grants).train(Assignment(spec, 4, PEOPLE[:1], start))
    assert refused.value.code == "policy-trust"
    assert asked == [(spec, 4)]


def test_nothing_leaves_but_through_the_gate(trainer, people, spec, start):
    class Shut(Gate):
        def release(self, *_):
            raise GateRefused("shut")

    parties = {name: replace(own, by_record=True) for name, own in people.items()}
    for unit in ("user", "example"):
        with pytest.raises(GateRefused):
            Vault(trainer, parties.__getitem__, seed=9, gate=Shut()).train(
                Assignment(replace(spec, unit=unit), 1, PEOPLE[:2], start)
            )


def test_half_precision_leaves_as_half_precision_inside_the_clip(vault, spec, start):
    release = vault.train(Assignment(replace(spec, dtype="float16"), 1, PEOPLE[:1], start))
    assert release.total.dtype == np.float16
    assert np.linalg.norm(release.total.astype(np.float64)) <= CLIP


def test_private_adapters_are_trained_and_never_released(trainer, people, start):
    receipts = []
    vault = Vault(trainer, people.__getitem__, seed=9, gate=Gate(lambda *given: receipts.append(given)))
    recipe = Recipe(steps=2, batch=2, learning_rate=1e-2, optimizer="adam")
    private = vault.personalize(PEOPLE[:2], start, start, recipe, trainer)
    assert private.alone.shape == private.over_global.shape == (2, trainer.layout.size)
    assert (private.alone != private.over_global).any()
    assert receipts == []


def test_a_person_with_too_few_records_for_three_parts_trains_on_all_of_them(trainer):
    encoder = Encoder(trainer.base.tokenizer, 16)
    few = encode_user(User("x", (Record("", "w3 w4 w5"), Record("", "w6 w7 w8"))), encoder)
    assert (len(few.train), len(few.validation), len(few.test)) == (2, 0, 0)
    some = encode_user(User("x", tuple(Record("", f"w{n} w4 w5") for n in range(3, 13))), encoder)
    assert (len(some.train), len(some.validation), len(some.test)) == (6, 2, 2)
