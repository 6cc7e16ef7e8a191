"""A run's folder against its ledger: everything holds on an honest run; each edit of the folder is found."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from common.evidence import read_evidence
from common.ledger_format import verify
from common.wire import ReleaseSpec
from server.checkpoint import Checkpoint
from simulations.recomputation import price_ledger
from simulations.run_evidence import examine

CLAIMS = {
    "configuration": "the configuration is the one that the run began with",
    "code": "the run was made by the code that is installed here",
    "spec": "devices were asked for what was reserved",
    "schedule": "the noise and the sampling that devices were told are those that were charged",
    "size": "what was released is the shared vector and nothing more",
    "witnesses": "the published noise witnesses have the noise that was promised",
    "counts": "what was published beside the adapter was charged with it, and nothing else was",
    "rounds": "every round that was run was debited",
    "scores": "no score of anyone's records was collected without noise",
    "checkpoint": "the checkpoint stands where the ledger says",
    "adapter": "the shared adapter is what the last release was",
    "statement": "the published statement is no smaller than what was spent",
}


def examined(folder):
    verified = verify((folder / "ledger.jsonl").read_bytes())
    return {one.claim: one for one in examine(read_evidence(folder), verified, price_ledger(verified, "run"))}


def contradicted(folder) -> set[str]:
    found = examined(folder)
    return {name for name, claim in CLAIMS.items() if claim in found and found[claim].verdict == "contradicted"}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_everything_holds_on_an_honest_run(run):
    found = examined(run)
    assert set(found) == set(CLAIMS.values())
    assert {one.verdict for one in found.values()} == {"holds"}
    assert set(found[CLAIMS["code"]].to_json()) == {"claim", "verdict", "why"}


def test_a_configuration_that_was_changed_afterwards(run):
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("clip = 1.0", "clip = 2.0"))
    assert contradicted(run) == {"configuration"}


def test_a_rehearsal_that_is_passed_off_as_a_release(run, forge):
    path = forge(run, header={"rehearsal": True})
    (run / "ledger.jsonl").write_bytes(path.read_bytes())
    assert "configuration" in contradicted(run)


def test_a_spec_with_another_clip_than_was_reserved(run):
    edit_json(run / "spec.json", clip=2.0)
    # The witnesses are judged by the clip that is told, so they speak up as well.
    assert contradicted(run) == {"spec", "witnesses"}


def test_a_spec_with_other_noise_than_was_charged(run):
    edit_json(run / "spec.json", noise_multiplier=3.0)
    assert {"spec", "schedule"} <= contradicted(run)


def test_a_schedule_with_another_rate_in_the_ledger(run, forge):
    def change(kind, body):
        event = body.get("event")
        if kind == "debit" and event:
            body["event"] = event | {"sampling_rate": 0.01}
        return body

    (run / "ledger.jsonl").write_bytes(forge(run, change).read_bytes())
    assert "schedule" in contradicted(run)


def test_more_bytes_than_the_shared_vector_has(run, forge):
    """A private tensor, or metrics, released beside the shared ones."""
    path = forge(run, lambda kind, body: body | {"bytes": body["bytes"] + 64} if kind == "release" else body)
    (run / "ledger.jsonl").write_bytes(path.read_bytes())
    assert "size" in contradicted(run)


def test_a_round_that_was_run_and_never_debited(run, forge):
    kept = []

    def change(kind, body):
        if body.get("round") == 2:
            return None
        kept.append(kind)
        return body

    (run / "ledger.jsonl").write_bytes(forge(run, change).read_bytes())
    assert "rounds" in contradicted(run)


def test_a_ledger_that_was_rolled_back_behind_the_checkpoint(run):
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-2]))
    assert verify((run / "ledger.jsonl").read_bytes())  # nobody kept a head: the ledger alone looks sound
    assert {"checkpoint", "rounds"} <= contradicted(run)


def test_another_ledger_than_the_run_had(run, forge):
    (run / "ledger.jsonl").write_bytes(forge(run).read_bytes())
    assert "checkpoint" in contradicted(run)


def test_an_adapter_that_was_never_released(run):
    state = Checkpoint.load(run / "checkpoint.safetensors")
    Checkpoint(state.round, state.vector + 1.0, state.velocity, state.head, state.layout).save(
        run / "checkpoint.safetensors"
    )
    assert contradicted(run) == {"adapter"}


def test_an_older_checkpoint_is_told_apart_from_a_fraud(run):
    release = next(e for e in verify((run / "ledger.jsonl").read_bytes()).entries if e.kind == "release")
    state = Checkpoint.load(run / "checkpoint.safetensors")
    Checkpoint(1, state.vector, state.velocity, release.hash, state.layout).save(run / "checkpoint.safetensors")
    found = examined(run)[CLAIMS["checkpoint"]]
    assert found.verdict == "not shown"
    assert "crash" in found.why


@pytest.mark.parametrize(
    "change",
    [{"epsilon": 1.0}, {"epsilon": float("nan")}, {"delta": 0.1}, {"delta": float("nan")}, {"unit": "example"}],
)
def test_a_statement_that_says_less_than_was_spent(run, change):
    edit_json(run / "statement.json", **change)
    assert contradicted(run) == {"statement"}


def witnesses(run):
    return np.array([json.loads(line)["values"] for line in (run / "witnesses.jsonl").read_text().splitlines()])


def write_witnesses(run, values):
    lines = [json.dumps({"round": number + 1, "values": row.tolist()}) for number, row in enumerate(values)]
    (run / "witnesses.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("fraud", "why"),
    [
        (lambda values: values / 2, "standard deviation"),
        (lambda values: values * 0, "0.000"),
        (lambda values: np.stack([values[0]] * 3), "fixed seed"),
        (lambda values: np.concatenate([values[:2], values[2:] / 2]), "promised"),
        (lambda values: values[:, :7], "numbers per round"),
    ],
)
def test_noise_witnesses_with_less_noise_than_was_promised(run, fraud, why):
    write_witnesses(run, fraud(witnesses(run)))
    found = examined(run)[CLAIMS["witnesses"]]
    assert (found.verdict, why in found.why) == ("contradicted", True)


def test_honest_witnesses_hold_over_and_over(run):
    spec = ReleaseSpec.from_text((run / "spec.json").read_text())
    generator = np.random.default_rng(0)
    for _ in range(50):
        write_witnesses(run, spec.noise_multiplier * spec.clip * generator.standard_normal((3, spec.witnesses)))
        assert contradicted(run) == set()


@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("config.toml", "configuration"),
        ("spec.json", "spec"),
        ("rounds.jsonl", "rounds"),
        ("witnesses.jsonl", "witnesses"),
        ("checkpoint.safetensors", "checkpoint"),
        ("statement.json", "statement"),
    ],
)
def test_what_is_missing_is_not_shown_and_never_holds(run, name, claim):
    (run / name).unlink()
    assert examined(run)[CLAIMS[claim]].verdict == "not shown"


@pytest.mark.parametrize("name", ["spec.json", "witnesses.jsonl", "checkpoint.safetensors", "statement.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff" * 64, b"null\n"])
def test_nonsense_is_no_evidence(run, name, content):
    (run / name).write_bytes(content)
    assert contradicted(run) or any(one.verdict == "not shown" for one in examined(run).values())


# Counts beside the adapter


@pytest.fixture(scope="session")
def counted_base(tmp_path_factory, tiny_base_folder, audited_base):
    """A run that released noised metrics and let its clip move."""
    from common.config import RunConfig
    from simulations import run

    folder = tmp_path_factory.mktemp("counted")
    config = RunConfig(
        model=str(tiny_base_folder),
        data=str(audited_base / "notes.jsonl"),
        cohort=12,
        rounds=2,
        local_batch=2,
        workers=0,
        max_tokens=32,
        clip_quantile=0.5,
        noised_metrics=("loss",),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOMESPUN_HOME", str(audited_base / "home"))
        patch.setattr(run, "_finish", lambda *_: None)
        run.start(config, folder / "run", run.Progress())
    return folder / "run"


@pytest.fixture
def counted(counted_base, audited_base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(audited_base / "home"))
    shutil.copytree(counted_base, tmp_path / "counted")
    return tmp_path / "counted"


def test_counts_that_were_charged_hold(counted):
    found = examined(counted)
    assert found[CLAIMS["counts"]].verdict == "holds"
    assert found[CLAIMS["schedule"]].verdict == "holds"
    assert found[CLAIMS["scores"]].verdict == "holds"
    assert not contradicted(counted)


def test_a_metric_that_nobody_charged_is_found_among_the_counts(counted):
    path = counted / "counts.jsonl"
    path.write_text(path.read_text().replace('"loss":', '"accuracy":0.5,"loss":'))
    assert "counts" in contradicted(counted)
    assert "accuracy" in examined(counted)[CLAIMS["counts"]].why


def test_a_count_that_was_changed_afterwards_is_found(counted):
    lines = [json.loads(line) for line in (counted / "counts.jsonl").read_text().splitlines()]
    lines[0]["loss"] = 1.0  # such as the true number
    (counted / "counts.jsonl").write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    assert "counts" in contradicted(counted)


def test_counts_that_are_missing_are_not_shown_and_counts_of_a_run_without_any_are_a_contradiction(counted, run):
    text = (counted / "counts.jsonl").read_bytes()
    (counted / "counts.jsonl").unlink()
    assert examined(counted)[CLAIMS["counts"]].verdict == "not shown"
    (run / "counts.jsonl").write_bytes(text)
    assert "counts" in contradicted(run)


def test_an_update_that_is_charged_without_its_counts_is_found(counted, forge):
    """The update's own multiplier alone would cost less than what was released."""

    def change(kind, body):
        event = body.get("event")
        if kind == "debit" and event:
            body["event"] = {
                "kind": "poisson-gaussian",
                "sampling_rate": event["sampling_rate"],
                "noise_multiplier": event["parts"][0]["noise_multiplier"],
            }
        return body

    path = forge(counted, change)
    (counted / "ledger.jsonl").write_bytes(path.read_bytes())
    assert "schedule" in contradicted(counted)
