"""Attack 2: a private tensor under a shared name, a tensor more, another shape: refused, and the round goes on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from client.gate import Gate
from common.errors import GateRefused, Refusal
from common.wire import Assignment, Release, receipt_digest
from simulations.run import Progress


def private_name(spec):
    name = spec.names[0].replace("q_proj", "private")
    return {"names": (name, *spec.names[1:])}


def one_more(spec):
    return {"names": (*spec.names, "private.lora_A.weight"), "shapes": (*spec.shapes, (2, 8))}


def swapped(spec):
    return {"names": (spec.names[1], spec.names[0], *spec.names[2:])}


def reshaped(spec):
    (rows, columns), *rest = spec.shapes
    return {"shapes": ((columns, rows), *rest)}


def one_less(spec):
    return {"names": spec.names[1:], "shapes": spec.shapes[1:]}


@pytest.mark.parametrize("change", [private_name, one_more, swapped, reshaped, one_less])
def test_attack_02_a_device_refuses_a_spec_with_other_tensors_than_its_method_shares(study, change):
    host = study.host()
    device = study.device(host, trust_coordinator=True)
    honest = study.spec(host)
    with pytest.raises(Refusal) as refused:
        device.ask(study.assignment(study.spec(host, **change(honest))))
    assert refused.value.code == "layout-mismatch"
    assert [entry.kind for entry in device.ledger.entries()] == ["open"]
    assert device.ask(study.assignment(honest)).total.shape == (honest.dim,)
    device.close()


def test_attack_02_a_method_that_shares_nothing_sends_nothing(study):
    host = study.host()
    device = study.device(host, trust_coordinator=True)
    with pytest.raises(Refusal) as refused:
        device.ask(study.assignment(replace(study.spec(host), method="local")))
    assert refused.value.code == "layout-mismatch"
    device.close()


@pytest.mark.parametrize(
    "updates",
    [
        np.zeros((1, 9), np.float32),
        np.zeros((1, 7), np.float32),
        np.zeros(8, np.float32),
        np.zeros((0, 8), np.float32),
        np.zeros((1, 8), np.float64),
        np.zeros((1, 8), np.float16),
        np.full((1, 8), np.nan, np.float32),
        np.array([[0.0] * 7 + [np.inf]], np.float32),
        np.full((1, 8), 0.36, np.float32),
    ],
)
def test_attack_02_the_gate_lets_nothing_else_out_and_records_nothing(study, updates):
    spec = study.spec(study.host(), names=("a",), shapes=((2, 4),), clip=1.0)
    log = []
    with pytest.raises(GateRefused):
        Gate(lambda *entry: log.append(entry)).release(updates, spec, 1)
    assert log == []
    assert Gate().release(np.full((1, 8), 0.35, np.float32), spec, 1).total.size == spec.dim


def test_attack_02_a_reply_with_a_tensor_more_is_left_out_and_the_round_goes_on(study):
    def add_a_tensor(reply, question):
        release = Release.from_records(reply.content)
        longer = np.concatenate([release.total, np.zeros(4, release.total.dtype)])
        spec = Assignment.from_records(question.content).spec
        reply.content = Release(longer, release.users, receipt_digest(longer, spec, 1, release.users)).to_records()
        return [reply]

    study.tap.forge = add_a_tensor
    lines = []
    study.start(rounds=1, rounds_only=True, progress=Progress(round=lines.append))
    assert lines[0]["rejected"]["misshapen"] > 0
