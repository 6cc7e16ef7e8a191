"""Configurations whose epsilon would be false do not start: through the command, the server or the vault.

What no configuration of today can reach is refused by `check_claim`, which every calibration asks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

import homespun
from client.user_data import Record, User
from client.vault import Vault
from common.claims import check_claim
from common.errors import ClaimRefused, ConfigError, Refusal
from common.methods import METHODS
from common.privacy import Adjacency, Unit
from common.promise import promise_of


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--delta", "0.01"], 3, "delta"),
        (["--delta", "0.006"], 3, "delta"),
        (["--unit", "example", "--delta", "0.002"], 3, "delta"),
        (["--cohort", "21"], 2, "cohort"),
        (["--epsilon", "0"], 2, "epsilon"),
        (["--epsilon", "nan"], 2, "epsilon"),
        (["--as-if-population", "10"], 2, "as_if_population"),
        (["--method", "dual-joint", "--unit", "example"], 3, "private part"),
        (["--method", "fedsa", "--unit", "example"], 3, "private part"),
        (["--method", "layers", "--unit", "example"], 3, "private part"),
        (["--method", "fedrep", "--unit", "example"], 3, "private part"),
        (["--unit", "example", "--example-records", "1000000"], 3, "delta"),
        (["--noise", "none"], 2, "noise"),
        (["--clip", "inf"], 2, "clip"),
    ],
)
def test_the_command_refuses_before_anything_is_written(study, arguments, code, words, monkeypatch, capsys):
    monkeypatch.chdir(study.folder)
    (study.folder / "run.toml").write_text(study.config().to_toml())
    assert homespun.main(["sim", "run", "run.toml", "--out", "run", *arguments]) == code
    error = capsys.readouterr().err
    assert words in error
    assert not (study.folder / "run").exists()


def test_a_method_with_private_state_in_the_shared_forward_pass_promises_nothing_about_records():
    """Where records are clipped one by one, it would carry each into all others; a user's clip covers it."""
    inside = {name for name, row in METHODS.items() if row.private_in_pass}
    assert inside == {"fedsa", "dual-joint", "layers", "layers-by-turns"}
    for name, row in METHODS.items():
        row.check_claim("user", private_noise=False)
        row.check_claim("example", private_noise=True)
        if name in inside:
            with pytest.raises(ClaimRefused, match="no clip bounds"):
                row.check_claim("example", private_noise=False)
        else:
            row.check_claim("example", private_noise=False)


@pytest.mark.parametrize("method", ["dual-joint", "fedsa", "layers", "layers-by-turns"])
def test_a_vault_refuses_a_silo_spec_with_a_private_part_in_the_pass_and_opens_no_record(study, method):
    host = study.host(unit="example")
    spec = study.spec(host, unit="example")
    asked = replace(spec, method=method)

    def open_user(_):
        raise AssertionError("a record was opened")

    with pytest.raises(ClaimRefused):
        Vault(host.trainer, open_user, seed=0).train(study.assignment(asked))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"recipe": {"example_records": 0}}, "bad-request"),
        ({"recipe": {"example_records": -5}}, "bad-request"),
        ({"recipe": {"example_records": 0.5}}, "bad-request"),
        ({"recipe": {"local_batch": 0}}, "bad-request"),
        ({"recipe": {"local_steps": 0}}, "bad-request"),
        ({"unit": "household"}, "bad-request"),
        ({"noise": "distributed"}, "bad-request"),
    ],
)
def test_a_vault_refuses_a_spec_from_which_no_true_price_follows(study, change, code):
    host = study.host(unit="example")
    spec = study.spec(host, unit="example")
    recipe = {**spec.recipe, **change.get("recipe", {})}
    with pytest.raises(Refusal) as refused:
        host.vault.train(study.assignment(replace(spec, **{**change, "recipe": recipe})))
    assert refused.value.code == code


def test_a_silo_whose_public_number_of_records_is_not_named_is_refused(study):
    host = study.host(unit="example")
    spec = study.spec(host, unit="example")
    recipe = {name: value for name, value in spec.recipe.items() if name != "example_records"}
    with pytest.raises(Refusal) as refused:
        host.vault.train(study.assignment(replace(spec, recipe=recipe)))
    assert refused.value.code == "bad-request"


def test_a_silos_rate_divisor_and_steps_are_public_numbers_whatever_it_holds(study):
    """The same spec, so the same price, for a party with one record and for one with a thousand."""
    host = study.host(unit="example")
    spec = study.spec(host, unit="example")
    promise = promise_of(spec)
    assert promise.rate == spec.recipe["local_batch"] / spec.recipe["example_records"]
    assert promise.steps == spec.recipe["local_steps"]
    encoded = host.population.encoded("4")
    assert len(encoded.train) not in (spec.recipe["example_records"], spec.recipe["local_batch"])


def test_records_do_not_change_each_other_when_they_are_encoded(study):
    """A record joined with its neighbours in one row, or shown in another's prompt, would couple their gradients."""
    encoder = study.host().population.encoder
    user = User("a", tuple(Record("", f"w{n} w{n + 1} w{n + 2}") for n in range(10, 20)))
    together = encoder.encode_batch(user.records)
    for record, encoded in zip(user.records, together, strict=True):
        alone = encoder.encode(record)
        assert (alone.ids == encoded.ids).all()
        assert alone.first_label == encoded.first_label


SILO = {
    "unit": Unit.EXAMPLE,
    "noise": "local",
    "adjacency": Adjacency.ADD_REMOVE,
    "sampling": "poisson",
    "sampling_rate": 0.1,
    "delta": 1e-6,
    "population": 100,
}
CENTRAL = {**SILO, "unit": Unit.USER, "noise": "central", "adjacency": Adjacency.ZERO_OUT}
LOCAL = {**CENTRAL, "noise": "local", "adjacency": Adjacency.REPLACE_ONE, "sampling": "none", "sampling_rate": 1.0}


@pytest.mark.parametrize(
    ("facts", "change", "words"),
    [
        (SILO, {"private_state_in_shared_forward": True, "private_state_training": "raw"}, "private state"),
        (SILO, {"loss": "batch-mean"}, "batch-mean"),
        (SILO, {"public_rate": False}, "sampling rate"),
        (SILO, {"public_steps": False}, "number of steps"),
        (SILO, {"public_divisor": False}, "divided by who answered"),
        (SILO, {"sampling": "shuffled"}, "shuffled"),
        (CENTRAL, {"sampling": "fixed"}, "fixed"),
        (CENTRAL, {"clip_scope": "per-tensor"}, "each tensor"),
        (CENTRAL, {"weights": "examples"}, "weights"),
        (CENTRAL, {"metrics": "raw"}, "metrics"),
        (CENTRAL, {"events_per_cohort": 2}, "one cohort"),
        (CENTRAL, {"participation_secret": False}, "secret participation"),
        (CENTRAL, {"public_divisor": False}, "divided by who answered"),
        (CENTRAL, {"delta": 1.1e-5}, "delta"),
        (LOCAL, {"sampling": "poisson", "sampling_rate": 0.1}, "no amplification"),
        (LOCAL, {"adjacency": Adjacency.ZERO_OUT}, "replace-one"),
    ],
)
def test_every_other_false_claim_is_refused_with_its_reason_and_the_true_one_is_not(facts, change, words):
    check_claim(**facts)
    with pytest.raises(ClaimRefused, match=words):
        check_claim(**{**facts, **change})


def test_calibration_asks_whether_the_claim_may_be_made(study):
    host = study.host()
    with pytest.raises(ClaimRefused):
        promise_of(study.spec(host)).calibrate(8.0, 0.01, 3)
    with pytest.raises(ConfigError):
        study.spec(host, cohort=21)
