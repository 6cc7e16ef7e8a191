"""Attack 8: an old round's message or release again, the same client twice in a round."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import Refusal
from common.wire import Assignment, Release
from server.aggregation import RunningSum
from server.checkpoint import Checkpoint
from simulations.run import Progress


def test_attack_08_an_old_release_does_not_enter_another_round_another_run_or_another_spec(study):
    host = study.host()
    device = study.device(host, trust_coordinator=True)
    spec = study.spec(host)
    release = device.ask(study.assignment(spec))
    assert RunningSum(spec, 1).add(release, 1)
    for other, number in ((spec, 2), (study.spec(host, run="cd" * 16), 1), (study.spec(host, clip=2.0), 1)):
        total = RunningSum(other, number)
        assert not total.add(release, 1)
        assert total.rejected == {"receipt": 1}
        assert not total.total.any()
    device.close()


def test_attack_08_a_replayed_round_message_gives_the_same_bytes_under_the_same_debit(study):
    """Fresh noise on the same update would average away; another vector would be a second question for one price."""
    host = study.host()
    device = study.device(host, epsilon=100.0)
    spec = study.spec(host, noise="local")
    first = device.ask(study.assignment(spec))
    again = device.ask(study.assignment(spec))
    other_vector = device.ask(study.assignment(spec, vector=np.ones(spec.model_dim, np.float32)))
    for release in (again, other_vector):
        assert (release.total == first.total).all()
        assert release.receipt == first.receipt
    assert device.count("debit") == device.count("release") == 1
    device.close()
    restarted = study.device(host, epsilon=100.0)
    assert (restarted.ask(study.assignment(spec)).total == first.total).all()
    assert restarted.count("debit") == 1
    restarted.close()


def test_attack_08_one_client_counts_once_in_a_round(study):
    host = study.host()
    with pytest.raises(Refusal, match="twice"):
        host.vault.train(study.assignment(study.spec(host), users=("3", "3")))
    study.tap.forge = lambda reply, question: [reply, reply]
    doubled = study.start("doubled", rounds=1, chunk=1, rehearsal=True, rounds_only=True)
    study.tap.forge = None
    once = study.start("once", rounds=1, chunk=1, rehearsal=True, rounds_only=True)
    vectors = [Checkpoint.load(path / "checkpoint.safetensors").vector for path in (doubled, once)]
    assert (vectors[0] == vectors[1]).all()


def test_attack_08_releases_of_round_one_that_are_sent_again_in_round_two_are_left_out(study):
    kept = []

    def replay(reply, question):
        if Assignment.from_records(question.content).round == 1:
            kept.append(Release.from_records(reply.content))
        else:
            reply.content = kept[0].to_records()
        return [reply]

    study.tap.forge = replay
    lines = []
    study.start(rounds=2, chunk=1, cohort=16, rounds_only=True, progress=Progress(round=lines.append))
    assert kept
    assert lines[0]["rejected"] == {}
    assert set(lines[1]["rejected"]) == {"receipt"}
