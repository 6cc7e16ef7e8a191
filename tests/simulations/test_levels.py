"""Every system side by side: what the choice sees, what it takes, and what the controls are."""

from __future__ import annotations

import numpy as np
import pytest

from client.personalization import levels as building
from client.personalization import systems
from client.personalization.choice import choose
from client.personalization.mixing import MIXES
from client.personalization.soft_prompt import score_with_prefix
from client.personalization.steering import middle_layer, steered, style_vectors
from common.adapters import concatenate, initial_vector
from common.config import RunConfig
from simulations import hosts, levels

USERS = [str(number) for number in range(4)]


def config(**changes):
    values = {"users": 20, "cohort": 5, "personal_steps": 2, "workers": 0, "rehearsal": True, "chunk": 8} | changes
    return RunConfig(**values)


@pytest.fixture(scope="module")
def scored():
    chosen = config()
    host = hosts.open_host(chosen.to_toml())
    vector = initial_vector(host.trainer.layout, np.random.default_rng(0))
    vector += np.random.default_rng(1).normal(0, 0.02, vector.shape).astype(np.float32)
    found, adapters = hosts.score_systems(chosen.to_toml(), USERS, vector, vector)
    return chosen, vector, found.rows, adapters, found.queries


def test_every_system_has_one_row_per_user_and_part(scored):
    _, _, rows, adapters, _ = scored
    assert set(rows) == {
        *("base", "global", "private", "both", "profile", "retrieval", "global+retrieval", "both+retrieval"),
        *("preference", "another", "pooled", "chosen"),
    }
    for own in rows.values():
        assert sorted((row["user"], row["split"]) for row in own) == sorted(
            (user, part) for user in USERS for part in ("validation", "test")
        )
        assert all(np.isfinite(row["nats_per_token"]) for row in own)
    assert set(adapters) == {"alone", "over-global", "with-retrieval"}


def test_what_is_chosen_is_scored_as_the_system_it_is(scored):
    rows = scored[2]
    for row in rows["chosen"]:
        if row["choice"] in rows:
            (same,) = (own for own in rows[row["choice"]] if (own["user"], own["split"]) == (row["user"], row["split"]))
            assert row["nats_per_token"] == same["nats_per_token"]
    assert not {row["choice"] for row in rows["chosen"]} & {"another", "pooled"}


def test_the_choice_never_sees_a_test_record(scored, monkeypatch):
    """Other test records, with everything else the same, leave every choice as it was."""
    chosen, vector, rows, *_ = scored
    before = {row["user"]: row["choice"] for row in rows["chosen"]}
    real = systems.score

    def spoiled(system, part):
        found = real(system, part)
        if part.records[0] in tested:
            found.plain.nats[:] = np.random.default_rng(0).permutation(found.plain.nats) * (system.name == "base")
        return found

    host = hosts.open_host(chosen.to_toml())
    tested = [record for user in USERS for record in host.population.split(user).test]
    monkeypatch.setattr(levels, "score", spoiled)
    again = hosts.score_systems(chosen.to_toml(), USERS, vector, vector)[0].rows
    assert {row["user"]: row["choice"] for row in again["chosen"]} == before
    test_rows = [row["nats_per_token"] for row in again["both"] if row["split"] == "test"]
    assert set(test_rows) == {0.0}


def test_the_choice_is_made_on_validation_records_by_the_rule(scored, monkeypatch):
    chosen, vector, rows, *_ = scored
    seen = []

    def watched(names, nats, tokens, **options):
        choice = choose(names, nats, tokens, **options)
        seen.append((names, nats, tokens, options, choice))
        return choice

    monkeypatch.setattr(building, "choose", watched)
    hosts.score_systems(chosen.to_toml(), USERS, vector, vector)
    for user, (names, nats, tokens, options, choice) in zip(USERS, seen, strict=True):
        (row,) = (row for row in rows["global"] if (row["user"], row["split"]) == (user, "validation"))
        assert tokens.sum() == row["tokens"]
        assert nats[names.index("global")].sum() / tokens.sum() == pytest.approx(row["nats_per_token"])
        assert options == {"reference": "global", "confidence": 0.95}
        assert {row["choice"] for row in rows["chosen"] if row["user"] == user} == {choice.system}
        assert {f"{name}{mix.suffix}" for name in ("both", "both+retrieval") for mix in MIXES} <= set(names)


def test_another_is_the_private_adapter_of_the_user_before(scored):
    _, vector, rows, adapters, _ = scored
    host = hosts.open_host(scored[0].to_toml())
    encoded = host.population.encoded(USERS[1]).test
    scores = host.personal.score(
        encoded,
        adapters=adapters["over-global"][:1],
        owner=np.zeros(len(encoded), dtype=np.intp),
        under=(vector, host.trainer.layout, host.trainer.scaling),
    )
    (row,) = (row for row in rows["another"] if (row["user"], row["split"]) == (USERS[1], "test"))
    assert row["nats_per_token"] == pytest.approx(scores.nats.sum() / scores.tokens.sum(), rel=1e-4)


def test_a_mixture_is_both_adapters_at_their_strengths(scored):
    _, vector, _, adapters, _ = scored
    host = hosts.open_host(scored[0].to_toml())
    encoded = host.population.encoded(USERS[0]).test
    own = np.zeros(len(encoded), dtype=np.intp)
    for mix, mixed in zip(
        MIXES,
        building._mixed(
            "both",
            host.personal,
            adapters["over-global"][:1],
            (vector, host.trainer.layout, host.trainer.scaling),
            "plain",
        ),
        strict=True,
    ):
        assert mixed.name == f"both{mix.suffix}"
        parts = [(vector, host.trainer.layout, host.trainer.scaling * mix.shared)]
        parts += [(adapters["over-global"][0], host.personal.layout, host.personal.scaling * mix.private)]
        joined, layout = concatenate(parts)
        expected = host.trainer.score(encoded, under=(joined, layout, 1.0)).nats
        found = mixed.trainer.score(encoded, adapters=mixed.adapters, owner=own, under=mixed.under).nats
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def inside():
    """A run with the levels that are neither text nor adapter."""
    chosen = config(levels="soft-prompt,steering", personal_steps=4)
    host = hosts.open_host(chosen.to_toml())
    vector = initial_vector(host.trainer.layout, np.random.default_rng(0))
    vector += np.random.default_rng(1).normal(0, 0.02, vector.shape).astype(np.float32)
    return host, vector, hosts.score_systems(chosen.to_toml(), USERS, vector, None)[0].rows


def test_soft_prompt_and_steering_have_rows_and_can_be_chosen(inside):
    rows = inside[2]
    assert {"soft-prompt", "steering"} <= set(rows)
    by_place = {name: {(row["user"], row["split"]): row for row in own} for name, own in rows.items()}
    for name in ("soft-prompt", "steering"):
        for place, row in by_place[name].items():
            assert row["tokens"] == by_place["base"][place]["tokens"]
            assert row["nats_per_token"] != by_place["global"][place]["nats_per_token"]


def test_steering_adds_the_user_s_own_style_vector_over_the_shared_adapter(inside):
    host, vector, rows = inside
    under = (vector, host.trainer.layout, host.trainer.scaling)
    user = USERS[2]
    encoded = host.population.encoded(user)
    (direction,) = style_vectors(host.trainer, [encoded.train], under=under)
    with host.trainer.over_base(under), steered(host.base, middle_layer(host.base), direction, 1.0):
        scores = score_with_prefix(host.base, None, encoded.test)
    (row,) = (row for row in rows["steering"] if (row["user"], row["split"]) == (user, "test"))
    assert row["nats_per_token"] == pytest.approx(scores.nats.sum() / scores.tokens.sum(), rel=1e-4)


def test_questions_of_each_kind_are_told_apart(scored):
    row = scored[2]["base"][0]
    kinds = {name for name in row if name.startswith("nats_") and name != "nats_per_token"}
    assert kinds <= {"nats_abstraction", "nats_extraction", "nats_generalization"}
    assert kinds


def test_without_levels_and_without_sharing_only_adapters_are_compared():
    chosen = config(method="local", levels="none")
    found, adapters = hosts.score_systems(chosen.to_toml(), USERS[:2], None, None)
    rows = found.rows
    assert set(rows) == {"base", "private", "another", "chosen"}
    assert set(adapters) == {"alone"}
    assert {row["choice"] for row in rows["chosen"]} <= {"base", "private"}


def test_pooling_trains_one_adapter_on_everybody_s_records():
    assert hosts.fit_pooled(config(pooled_steps=0).to_toml()) is None
    pooled = hosts.fit_pooled(config(pooled_steps=2, users=20).to_toml())
    host = hosts.open_host(config(pooled_steps=2).to_toml())
    assert pooled.shape == (host.trainer.layout.size,)
    assert np.isfinite(pooled).all()


def test_every_test_record_is_told_by_system_and_adds_up_to_the_user_s_row(scored):
    rows, queries = scored[2], scored[4]
    for system in ("base", "both+retrieval", "another", "chosen"):
        for row in rows[system]:
            if row["split"] != "test":
                continue
            own = [one for one in queries if (one["system"], one["user"]) == (system, row["user"])]
            assert [one["query"] for one in own] == list(range(row["records"]))
            assert sum(one["tokens"] for one in own) == row["tokens"]
            assert sum(one["nats"] for one in own) / row["tokens"] == pytest.approx(row["nats_per_token"])


def test_answers_in_words_are_looked_at_for_loops(scored, monkeypatch):
    chosen, vector, rows, *_ = scored
    assert all(row["degeneration"] in (0.0, 1.0) for row in rows["both"] if row["split"] == "test")
    asked = []

    def answer(trainer, prompts, tokens, **options):
        asked.append((prompts, options.get("owner")))
        words = ["a b a b a b a b", "a fine answer", "", "the day was long"]
        return [trainer.base.tokenizer(words[at % 4])["input_ids"] for at in range(len(prompts))]

    monkeypatch.setattr(levels, "greedy_answers", answer)
    found, _ = hosts.score_systems(chosen.to_toml(), USERS, vector, None)
    shares = [row["degeneration"] for row in found.rows["base"] if row["split"] == "test"]
    assert shares == [1.0, 0.0, 1.0, 0.0]
    assert len(asked[0][0]) == len(USERS)
    none = config(answered=0)
    silent = hosts.score_systems(none.to_toml(), USERS[:1], vector, None)[0].rows
    assert all(np.isnan(row["degeneration"]) for row in silent["base"] if row["split"] == "test")
