"""The adapter store: what was put comes back for its place only, nothing shows on disk, and erased is erased."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.adapter_store import AdapterStore, NewVersion, Version, pack_vectors, unpack_vectors
from common.errors import Refusal, StoreError

ROOT = Path(__file__).parents[2]
KEY = bytes(range(32))
BASE = "b5" * 32
ALICE = "a1" * 16
BOB = "b0" * 16
MARKER = b"the-planted-sentence-nobody-else-writes"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "adapters.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(path, KEY) as opened:
        yield opened


def written(folder: Path) -> bytes:
    """Everything that lies in `folder`, also in files that are not the store's own."""
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def run(path: Path, statement: str, *values: Any) -> list[Any]:
    """What somebody who has the file can read and change."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        return database.execute(statement, values).fetchall()


def test_what_was_put_is_got_back_after_a_restart(path: Path) -> None:
    with AdapterStore(path, KEY) as store:
        assert store.put(ALICE, "private", b"first", base_digest=BASE, version_note="round 3") == 1
        assert store.put(ALICE, "private", b"second", base_digest=BASE) == 2
        assert store.put(BOB, "private", b"", base_digest=BASE) == 1
    with AdapterStore(path, KEY) as store:
        assert store.get(ALICE, "private") == b"second"
        assert store.get(ALICE, "private", version=1, base_digest=BASE) == b"first"
        assert store.get(BOB, "private") == b""
        assert store.subjects() == (ALICE, BOB)
        assert store.names(ALICE) == ("private",)
        assert store.versions(ALICE, "private") == (
            Version("private", 1, BASE, "round 3", 5, is_current=False),
            Version("private", 2, BASE, "", 6, is_current=True),
        )


def test_nothing_that_is_not_there_is_got(store: AdapterStore) -> None:
    store.put(ALICE, "private", b"x", base_digest=BASE)
    for subject, name, version in ((BOB, "private", None), (ALICE, "profile", None), (ALICE, "private", 2)):
        with pytest.raises(StoreError, match="nothing under"):
            store.get(subject, name, version=version)
    assert store.versions(BOB, "private") == ()
    assert store.names(BOB) == ()
    assert store.get_many([(ALICE, "private"), (BOB, "private")]) == (b"x", None)


def test_an_adapter_of_another_base_model_is_refused(store: AdapterStore) -> None:
    store.put(ALICE, "private", b"x", base_digest=BASE)
    with pytest.raises(StoreError, match="another base model"):
        store.get(ALICE, "private", base_digest="cc" * 32)


def test_old_versions_go_and_numbers_are_not_used_again(path: Path) -> None:
    with AdapterStore(path, KEY, keep_versions=3) as store:
        for number in range(1, 8):
            assert store.put(ALICE, "private", bytes([number]), base_digest=BASE) == number
        assert [version.version for version in store.versions(ALICE, "private")] == [5, 6, 7]


def test_rolling_back_makes_an_older_version_current_and_keeps_the_newer(store: AdapterStore) -> None:
    for payload in (b"1", b"2", b"3"):
        store.put(ALICE, "private", payload, base_digest=BASE)
    assert store.rollback(ALICE, "private") == 2
    assert store.get(ALICE, "private") == b"2"
    assert store.rollback(ALICE, "private") == 1
    with pytest.raises(StoreError, match="no such version"):
        store.rollback(ALICE, "private")
    assert store.rollback(ALICE, "private", 3) == 3
    assert store.get(ALICE, "private") == b"3"
    with pytest.raises(StoreError, match="no such version"):
        store.rollback(ALICE, "private", 9)
    assert store.get(ALICE, "private") == b"3"
    store.rollback(ALICE, "private", 1)
    assert store.put(ALICE, "private", b"4", base_digest=BASE) == 4
    assert [version.is_current for version in store.versions(ALICE, "private")] == [False, False, False, True]


def test_a_group_is_stored_whole_or_not_at_all(store: AdapterStore) -> None:
    store.put(ALICE, "private", b"old", base_digest=BASE)
    broken = NewVersion(BOB, "private", "not bytes", BASE)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        store.put_many([NewVersion(ALICE, "private", b"new", BASE), NewVersion(BOB, "profile", b"x", BASE), broken])
    assert store.get(ALICE, "private") == b"old"
    assert store.subjects() == (ALICE,)
    # The key that was drawn for the failed group is not used for what comes later.
    store.put(BOB, "profile", b"y", base_digest=BASE)
    store.close()
    with AdapterStore(store.path, KEY) as again:
        assert again.get(BOB, "profile") == b"y"


SUBJECTS, NAMES = st.sampled_from(["", ALICE, "../../etc/passwd", "a\0b", "Zoë"]), st.sampled_from(["", "a", "b/c"])


@given(st.lists(st.tuples(SUBJECTS, NAMES, st.binary(max_size=60), st.booleans()), max_size=25))
@settings(max_examples=15, deadline=None)
def test_the_store_behaves_like_a_table_in_memory(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, bytes, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    table: dict[tuple[str, str], bytes] = {}
    with AdapterStore(folder / "adapters.sqlite", KEY) as store:
        for subject, name, payload, is_erase in steps:
            if is_erase:
                known = any(key[0] == subject for key in table)
                assert store.erase(subject) == known
                table = {key: value for key, value in table.items() if key[0] != subject}
            else:
                store.put(subject, name, payload, base_digest=BASE)
                table[subject, name] = payload
        assert store.get_many(table) == tuple(table.values())
        assert store.subjects() == tuple(sorted({subject for subject, _ in table}))
    assert {file.name for file in folder.iterdir()} == {"adapters.sqlite", "adapters.sqlite.lock"}


# --- at rest ---------------------------------------------------------------------------------------------------


def test_no_file_shows_a_payload_a_subject_a_name_or_a_key(path: Path, tmp_path: Path) -> None:
    with AdapterStore(path, KEY) as store:
        for number in range(3):
            vectors = {MARKER.decode(): np.full(50, number, dtype=np.float32)}
            store.put("alice@example.org", "profile of alice", MARKER + pack_vectors(vectors), base_digest=BASE)
        store.put(BOB, "private", os.urandom(200_000), base_digest=BASE, version_note=MARKER.decode())
        while_open = written(tmp_path)
        store.erase(BOB)
        store.rollback("alice@example.org", "profile of alice")
        while_open += written(tmp_path)
    everything = while_open + written(tmp_path)
    for secret in (MARKER, b"alice", b"profile", BASE.encode(), KEY, KEY.hex().encode(), BOB.encode()):
        assert secret not in everything
    assert len(everything) > 200_000


def test_only_the_owner_can_read_the_files(store: AdapterStore) -> None:
    store.put(ALICE, "private", b"x", base_digest=BASE)
    files = list(store.path.parent.iterdir())
    assert len(files) == 3  # the file, its log and its lock
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert store.path.parent.stat().st_mode & 0o777 == 0o700


def test_another_key_opens_nothing(path: Path) -> None:
    AdapterStore(path, KEY).close()
    with pytest.raises(StoreError, match="another key"):
        AdapterStore(path, bytes(32))
    AdapterStore(path, KEY).close()


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(MARKER * 100)
    with pytest.raises(StoreError, match="damaged, or not an adapter store") as caught:
        AdapterStore(text, KEY)
    assert MARKER.decode() not in str(caught.value)
    assert text.read_bytes() == MARKER * 100
    other = tmp_path / "other.sqlite"
    run(other, "CREATE TABLE store (anything)")
    with pytest.raises(StoreError):
        AdapterStore(other, KEY)


def test_a_row_that_was_changed_or_moved_is_refused(path: Path) -> None:
    with AdapterStore(path, KEY) as store:
        for subject in (ALICE, BOB):
            for name in ("one", "two"):
                for payload in (b"first", b"second"):
                    store.put(subject, name, payload, base_digest=BASE)
    rows = run(path, "SELECT subject, name, version, sealed_facts, sealed_payload FROM versions")
    assert len(rows) == 8
    place, facts, payload = rows[0][:3], rows[0][3], rows[0][4]

    def got(new_facts: bytes, new_payload: bytes) -> list[bytes]:
        """What the store gives back when the first row holds something else."""
        change = (
            "UPDATE versions SET sealed_facts = ?, sealed_payload = ? WHERE subject = ? AND name = ? AND version = ?"
        )
        run(path, change, new_facts, new_payload, *place)
        found: list[bytes] = []
        with AdapterStore(path, KEY) as store:
            for subject in (ALICE, BOB):
                for name in ("one", "two"):
                    for version in (1, 2):
                        try:
                            found.append(store.get(subject, name, version=version))
                        except StoreError:
                            found.append(b"refused")
        return found

    honest = [b"first", b"second"] * 4
    assert got(facts, payload) == honest
    refused = sorted([*honest[1:], b"refused"]), sorted([*honest[:1], *honest[2:], b"refused"])
    for other in rows[1:]:
        for moved in ((other[3], payload), (facts, other[4])):
            assert sorted(got(*moved)) in refused
    for bit in range(0, 8 * len(payload), 29):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        assert sorted(got(facts, bytes(flipped))) in refused
    keys = run(path, "SELECT subject, sealed_key FROM subjects")
    run(path, "UPDATE subjects SET sealed_key = ? WHERE subject = ?", keys[0][1], keys[1][0])
    assert got(facts, payload).count(b"refused") == 4


def test_one_bit_anywhere_in_the_file_never_gives_another_payload(path: Path) -> None:
    with AdapterStore(path, KEY) as store:
        store.put(ALICE, "private", b"first", base_digest=BASE)
        store.put(ALICE, "private", b"second", base_digest=BASE)
    content = path.read_bytes()
    generator = random.Random(3)  # noqa: S311 (chooses bits)
    for _ in range(60):
        bit = generator.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(changed))
        try:
            with AdapterStore(path, KEY) as store:
                # A changed `is_current` may name the other version; no third answer is possible.
                assert store.get(ALICE, "private") in {b"first", b"second"}
                assert store.get(ALICE, "private", version=2) == b"second"
        except (StoreError, Refusal):
            continue


def test_erasing_destroys_the_key_and_the_rows_of_one_subject_only(path: Path, tmp_path: Path) -> None:
    with AdapterStore(path, KEY) as store:
        store.put(ALICE, "private", b"a" * 100_000, base_digest=BASE)
        store.put(BOB, "private", b"b" * 100_000, base_digest=BASE)
    sealed = dict(run(path, "SELECT subject, sealed_key FROM subjects"))
    payloads = dict(run(path, "SELECT subject, sealed_payload FROM versions"))
    before = path.stat().st_size
    with AdapterStore(path, KEY) as store:
        store.put(ALICE, "profile", b"also in the log", base_digest=BASE)
        assert store.erase(ALICE)
        assert not store.erase(ALICE)
        remains = written(tmp_path)
        assert sum(key in remains for key in sealed.values()) == 1
        assert sum(payload[3000:3100] in remains for payload in payloads.values()) == 1
        assert store.subjects() == (BOB,)
        assert store.get(BOB, "private") == b"b" * 100_000
        with pytest.raises(StoreError, match="nothing under"):
            store.get(ALICE, "private")
        # Coming back means a new key; nothing of before is readable under it.
        store.put(ALICE, "private", b"anew", base_digest=BASE)
        assert len(store.versions(ALICE, "private")) == 1
    assert path.stat().st_size < before - 90_000


# --- one process, and crashes ----------------------------------------------------------------------------------


def test_a_second_process_is_refused(store: AdapterStore) -> None:
    with pytest.raises(Refusal, match="another process") as caught:
        AdapterStore(store.path, KEY)
    assert caught.value.code == "store-locked"
    program = (
        "import sys; from pathlib import Path; from client.adapter_store import AdapterStore\n"
        "from common.errors import Refusal\n"
        "try: AdapterStore(Path(sys.argv[1]), bytes(range(32)))\n"
        "except Refusal as refusal: print(refusal.code)\n"
    )
    command = [sys.executable, "-c", program, str(store.path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "store-locked\n"
    store.put(ALICE, "private", b"still works", base_digest=BASE)


CRASHING_WRITER = """
import sys
from pathlib import Path
from client.adapter_store import AdapterStore, NewVersion
store = AdapterStore(Path(sys.argv[1]), bytes(range(32)))
sys.stdout.write("open\\n"); sys.stdout.flush()
number = int(sys.argv[2])
while True:
    number += 1
    payload = number.to_bytes(4) * 500
    store.put_many([NewVersion(subject, "private", payload, "b5" * 32) for subject in ("one", "two", "three")])
    sys.stdout.write(f"{number}\\n"); sys.stdout.flush()
"""


def crash_rounds(path: Path, rounds: int) -> None:
    generator = random.Random(5)  # noqa: S311 (chooses instants, nothing else)
    last = 0
    for _ in range(rounds):
        command = [sys.executable, "-c", CRASHING_WRITER, str(path), str(last)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(generator.uniform(0.0, 0.05))
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
        acknowledged = [int(line) for line in rest.decode().splitlines(keepends=True) if line.endswith("\n")]
        last = max([last, *acknowledged])
        with AdapterStore(path, KEY) as store:
            found = store.get_many([("one", "private"), ("two", "private"), ("three", "private")])
        assert len(set(found)) == 1  # all of a group or none
        now = 0 if found[0] is None else int.from_bytes(found[0][:4])
        assert last <= now <= last + 1
        last = now


def test_kill_9_loses_nothing_that_was_acknowledged_and_splits_no_group(path: Path) -> None:
    crash_rounds(path, 6)


@pytest.mark.slow
def test_kill_9_a_hundred_times(path: Path) -> None:
    crash_rounds(path, 100)


# --- speed -----------------------------------------------------------------------------------------------------


def test_many_subjects_are_stored_read_and_opened_quickly(path: Path) -> None:
    payload = os.urandom(16_384)
    items = [NewVersion(f"{number:032x}", "private", payload, BASE) for number in range(1000)]
    with AdapterStore(path, KEY) as store:
        start = time.process_time()
        store.put_many(items)
        assert time.process_time() - start < 10
        start = time.process_time()
        found = store.get_many([(item.subject, "private") for item in items])
        assert time.process_time() - start < 5
        assert set(found) == {payload}
    start = time.process_time()
    AdapterStore(path, KEY).close()
    assert time.process_time() - start < 1  # the same for one subject and for a thousand


def test_the_store_and_the_policy_do_not_need_torch() -> None:
    program = (
        "import sys; import client.adapter_store, client.policy\n"
        "client.adapter_store.unpack_vectors(client.adapter_store.pack_vectors({}))\n"
        "print(sorted({'torch', 'flwr', 'scipy'} & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


# --- vectors ---------------------------------------------------------------------------------------------------


def test_vectors_survive_packing() -> None:
    vectors = {
        "lora_A": np.arange(12, dtype=np.float32).reshape(3, 4),
        "lora_B": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "empty": np.zeros((0,), dtype=np.float32),
    }
    found = unpack_vectors(pack_vectors(vectors))
    assert found.keys() == vectors.keys()
    for name, vector in vectors.items():
        np.testing.assert_array_equal(found[name], vector)
        assert found[name].dtype == np.float32


def test_other_than_float32_is_not_packed_and_not_unpacked() -> None:
    from safetensors.numpy import save

    with pytest.raises(ValueError, match="float32"):
        pack_vectors({"x": np.zeros(3)})
    with pytest.raises(StoreError, match="float32"):
        unpack_vectors(save({"x": np.zeros(3)}))


@given(st.binary(max_size=100))
@settings(max_examples=50, deadline=None)
def test_junk_is_not_unpacked(junk: bytes) -> None:
    with pytest.raises(StoreError):
        unpack_vectors(junk)


def test_a_pickle_is_not_unpacked() -> None:
    import pickle

    with pytest.raises(StoreError):
        unpack_vectors(pickle.dumps({"x": [1.0]}))


def test_looking_into_a_store_writes_nothing(tmp_path):
    with AdapterStore(tmp_path / "store", KEY) as store:
        store.put("ada", "x", b"1", base_digest="d")
    before = (tmp_path / "store").read_bytes(), (tmp_path / "store").stat().st_mtime_ns
    with AdapterStore(tmp_path / "store", KEY) as store:
        assert store.get("ada", "x") == b"1"
    assert ((tmp_path / "store").read_bytes(), (tmp_path / "store").stat().st_mtime_ns) == before
