"""Attack 21 on distributed noise: ask report and audit against whom a number holds, and forge one of the two."""

from __future__ import annotations

import json

import pytest

from common.errors import ConfigError
from common.evidence import read_evidence
from common.ledger_format import verify
from simulations.recomputation import price_ledger
from simulations.run_evidence import examine

EVERYBODY = {"noise": "distributed", "cohort": 20, "rounds": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Filled by the first test that needs it: the folder of one finished run."""
    return {}


@pytest.fixture
def folder(study, finished, tmp_path_factory):
    if "folder" not in finished:
        study.folder = tmp_path_factory.mktemp("distributed")
        finished["folder"] = study.start(**EVERYBODY, participation_cap=3, coordinator_epsilon=6.0)
        finished["answered"] = [release for _, release in study.tap.train()]
    return finished["folder"]


def findings(folder):
    evidence = read_evidence(folder)
    verified = verify(evidence.ledger)
    return examine(evidence, verified, price_ledger(verified, "run"))


def verdicts(folder):
    return {finding.claim: finding.verdict for finding in findings(folder)}


def test_attack_21_the_statement_names_both_adversaries_each_with_its_epsilon(folder):
    statement = json.loads((folder / "statement.json").read_text())
    assert statement["epsilon"] < 8.0
    assert statement["coordinator"]["epsilon"] <= 6.0
    assert "against them, with up to 2 colluding devices, epsilon" in statement["sentence"]
    assert "no amplification" in statement["coordinator"]["sentence"]
    assert statement["collusion"][-1][0] == 1
    page = (folder / "report.html").read_text()
    assert "Against the coordinator" in page
    assert "If more devices collude" in page


def test_attack_21_the_audit_recomputes_both(folder):
    verified = verify((folder / "ledger.jsonl").read_bytes())
    price = price_ledger(verified, "run")
    assert price.verdict == "holds"
    ((promised, cost),) = price.known
    assert promised == 6.0
    assert 5.9 < cost <= 6.0
    assert set(verdicts(folder).values()) == {"holds"}


def test_attack_21_a_statement_that_makes_either_number_smaller_is_contradicted(folder, tmp_path):
    import shutil

    for who in ("outsiders", "coordinator"):
        forged = tmp_path / who
        shutil.copytree(folder, forged)
        statement = json.loads((forged / "statement.json").read_text())
        (statement if who == "outsiders" else statement["coordinator"])["epsilon"] *= 0.9
        (forged / "statement.json").write_text(json.dumps(statement))
        contradicted = [claim for claim, verdict in verdicts(forged).items() if verdict == "contradicted"]
        assert any("two adversaries" in claim for claim in contradicted)


def test_attack_04_what_a_node_sends_is_integers_with_noise_in_them_and_no_update(folder, finished):
    for release in finished["answered"]:
        assert str(release.total.dtype) == "uint32"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"unit": "example"}, "hides a user"),
        ({"as_if_population": 10_000}, "not scaled down"),
        ({"coordinator_epsilon": float("inf")}, "must be finite"),
        ({"secagg": "full", "engine": "ray"}, "engine grid"),
        ({"noise": "central", "participation_cap": 3}, "is of distributed noise"),
        ({"noise": "local", "secagg": "full"}, "masks are for distributed noise"),
    ],
)
def test_a_configuration_whose_numbers_would_be_false_is_refused(study, change, reason):
    with pytest.raises(ConfigError, match=reason):
        study.config(**{**EVERYBODY, **change})


def test_attack_21_a_plan_says_both_numbers_bits_and_seconds(study):
    from simulations.planning import plan_of

    found = plan_of(study.config(**EVERYBODY), users=20)
    text = "\n".join(found.lines())
    for words in ("against the coordinator", "bits", "MB up", "times that of central noise"):
        assert words in text
    tight = plan_of(study.config(**EVERYBODY, coordinator_epsilon=1.0), users=20)
    assert tight.noise_to_clip > 2 * found.noise_to_clip
    assert found.to_json()["secure_sum"]["participation_cap"] == 4
