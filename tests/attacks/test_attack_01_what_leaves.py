"""Attack 1: capture every byte of a run and look for what must not be there."""

from __future__ import annotations

import base64
import json
import zlib

import numpy as np
import pytest
from flwr.app import ArrayRecord

from client.adapter_store import unpack_vectors
from client.gate import Gate
from client.vault import Vault
from common.errors import HomespunError, Refusal
from common.wire import Assignment, Release, raw_bytes
from simulations.personal import ALONE, OVER_GLOBAL, open_store

WINDOW = 24
"""Bytes of a tensor that are looked for: six numbers in a row are nobody else's."""


def forms(vector: np.ndarray) -> list[bytes]:
    """How six numbers from the middle of a private vector could travel."""
    nonzero = np.flatnonzero(vector)
    part = vector[nonzero[len(nonzero) // 2] :][: WINDOW // 4]
    raw = [part.astype(kind).tobytes() for kind in ("<f4", "<f2", "<f8", ">f4")]
    text = [
        base64.b64encode(vector.astype("<f4").tobytes())[40:80],
        json.dumps([float(v) for v in part])[1:-1].encode(),
    ]
    return raw + text + [zlib.compress(vector.astype("<f4").tobytes())[:40]]


def test_attack_01_no_private_tensor_no_name_and_no_prompt_is_in_any_message(study, notes):
    path = study.start(method="dual", evaluation_users=20, personal_steps=4)
    sent = b"".join(study.tap.wire(study.tap.asked + study.tap.answered))
    assert len(study.tap.answered) > 2
    with open_store(path) as store:
        private = [
            unpack_vectors(store.get(user, name))["vector"]
            for user in store.subjects()
            for name in (ALONE, OVER_GLOBAL)
        ]
    assert len(private) == 40
    for vector in private:
        assert not any(form in sent for form in forms(vector))
    # The search finds what is there: the shared vector that was broadcast, by the same forms.
    assignment, release = next(iter(study.tap.train()))
    assert forms(assignment.vector)[0] in sent
    assert raw_bytes(release.total)[:WINDOW] in sent
    texts = [text for line in notes.read_text().splitlines() for text in json.loads(line)["texts"]]
    assert not any(text.encode() in sent for text in texts)
    assert b"secret-name" not in sent


def test_attack_01_no_file_of_a_run_holds_a_prompt_or_a_private_tensor(study, notes, home):
    path = study.start(method="dual", evaluation_users=20)
    with open_store(path) as store:
        private = [unpack_vectors(store.get(user, ALONE))["vector"] for user in store.subjects()]
    written = b"".join(file.read_bytes() for root in (path, home) for file in root.rglob("*") if file.is_file())
    assert b"w101" not in written
    assert b"secret-name" not in written
    assert not any(form in written for vector in private for form in forms(vector))


def test_attack_01_a_reply_is_one_array_and_one_receipt_and_the_gates_log_lists_exactly_it(study):
    host = study.host()
    log = []
    vault = Vault(host.trainer, host.population.encoded, seed=0, gate=Gate(lambda _, receipt: log.append(receipt)))
    spec = study.spec(host)
    vector = np.zeros(spec.model_dim, np.float32)
    release = vault.train(Assignment(spec, 1, ("3",), vector))
    records = release.to_records()
    assert set(records) == {"release", "receipt"}
    assert set(records["receipt"]) == {"format", "users", "sha256"}
    assert isinstance(records["release"], ArrayRecord)
    assert set(records["release"]) == {"total"}
    (receipt,) = log
    assert receipt["sha256"] == release.receipt == records["receipt"]["sha256"]
    assert receipt["bytes"] == len(records["release"]["total"].data)
    assert receipt["names"] == [*spec.names, "noise_witness"]
    assert sum(int(np.prod(shape)) for shape in receipt["shapes"]) * 4 == receipt["bytes"]


def test_attack_01_an_exception_that_holds_a_record_leaves_as_a_code(study, monkeypatch):
    def fail(self, assignment):
        raise ValueError("could not read: my diagnosis is w101 w102")

    monkeypatch.setattr(Vault, "train", fail)
    with pytest.raises(HomespunError) as told:  # a study ends and says so; a device's failure costs utility alone
        study.start(rounds=1, preflight=False)
    assert "diagnosis" not in str(told.value)
    path = study.folder / "run"
    replies = [m for m in study.tap.answered if m.metadata.message_type == "train"]
    assert replies
    sent = b"".join(study.tap.wire(study.tap.answered))
    assert b"diagnosis" not in sent
    assert b"ValueError" not in sent
    codes = set()
    for reply in replies:
        try:
            Release.from_records(reply.content)
        except Refusal as refusal:
            codes.add(refusal.code)
    assert codes == {"failed"}
    assert b"diagnosis" not in b"".join(f.read_bytes() for f in path.rglob("*") if f.is_file())
