"""Everything that this device holds of its owner is erased; what it owes to others stays.

What stays is a closed list: whose device it is, what it may send, what it sent and spent, and the federation that it is
part of. Every other file of the device's folder is overwritten, with the keys in it under which its rows were sealed,
and removed; a store that somebody adds tomorrow is erased without being named here. What was spent stays spent, and a
tombstone in the ledger says that the rest is gone.

What this does not reach: the files that the owner brought, copies and backups that were made before, and, for a while,
blocks that flash storage keeps. All of them need the master key, which lies elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from client.budget_keeper import BudgetKeeper, account_of
from client.device_home import DeviceHome
from client.membership import Membership
from common.errors import DataError, HomespunError, Refusal
from common.files import sync_folder, take_lock
from common.wire import ReleaseSpec

__all__ = ["KEPT", "Forgetting", "forget", "plan"]

KEPT = (
    *("device.key", "policy.toml", "policy.toml.sig", "ledger.jsonl", "ledger.head", "master-key.json"),
    *("fleet.json", "node.key", "standing.json", "usage.json", "refusals.json", "authority.pem"),
    *("roster-*.json", "restored.json"),
)
"""Files of the device's folder that stay: keys, policy, ledger, and the federation that it is part of."""

OF_FEDERATION = ("runs", "proofs", "called", "away", "rolled_back", "version")
"""What stays of what the coordinator said; not what the owner's own model was worth, nor which adapters are here."""

BLOCK = 1 << 20


@dataclass(frozen=True)
class Forgetting:
    """What forgetting erases, and what it cannot.

    Attributes:
        records: Records that go.
        profile_lines: Lines of the profile that go.
        adapters: Whether anything was learned.
        files: Files that are overwritten and removed, and how large they are in bytes.
        cannot: What stays outside, in sentences.
    """

    records: int
    profile_lines: int
    adapters: bool
    files: dict[str, int]
    cannot: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Say it as JSON."""
        return {
            "records": self.records,
            "profile_lines": self.profile_lines,
            "adapters": self.adapters,
            "files": self.files,
            "kept": list(KEPT),
            "cannot_be_undone": list(self.cannot),
        }


def plan(home: DeviceHome) -> Forgetting:
    """Say what `forget` would erase; changes nothing."""
    return Forgetting(
        _counted(home, "records"),
        _counted(home, "profile"),
        bool(_counted(home, "adapters")),
        {str(path.relative_to(home.folder)): path.stat().st_size for path in _going(home.folder)},
        cannot_be_undone(home),
    )


def forget(home: DeviceHome) -> None:
    """Erase; may be done again after a crash in the middle.

    Guarantee: when this returns, no file below the device's folder holds a record, a line of the profile, an adapter,
        feedback, or a key that opens one; the subject, its ledger, what was spent, and a tombstone stay.

    Raises:
        Refusal: Another process has a store or the ledger open.
    """
    with home.open_ledger() as ledger:
        _wipe(home.folder)
        BudgetKeeper(home, ledger).forget("all")
        _wipe(home.folder)  # the stores that were opened anew to be erased
    try:
        joined = Membership.load(home)
    except DataError:
        return
    standing = joined.standing()
    joined.replace_standing({name: standing[name] for name in OF_FEDERATION if name in standing})
    Membership(
        home, joined.invite, None, None, joined.model, joined.status
    ).save()  # a file named there is not read again


def cannot_be_undone(home: DeviceHome) -> tuple[str, ...]:
    """Say what was released, which nobody can take back, and what bounds it: a statement, never a bare number."""
    entries = home.read_ledger().entries
    account = account_of(entries, home.policy())
    count = sum(run.debited for run in account.runs)
    if not count:
        return ("Nothing ever left this device, so nothing of yours is in anybody else's model.",)
    noises, names = _known_runs(home)
    said = [
        f"{count} update(s) of this device are part of the global models of {len(account.runs)} run(s); nobody can "
        "take them out again. What they may give away of you is bounded:",
        account.sentence(),
    ]
    for run in account.runs:
        if not run.debited:
            continue
        name, noise = names.get(run.run, run.run[:16]), noises.get(run.run)
        if noise == "central":
            said.append(
                f"Run {name}: that holds against everybody who sees its global model. Its coordinator saw each of your "
                "clipped updates before noise, and no epsilon bounds what it learned from them."
            )
        elif noise is None:
            said.append(
                f"Run {name}: its terms are not kept here any more. If its coordinator added the noise, it saw your "
                "clipped updates without it, and no epsilon bounds what it learned from them."
            )
    return tuple(said)


def _known_runs(home: DeviceHome) -> tuple[dict[str, str], dict[str, str]]:
    noises, names = dict[str, str](), dict[str, str]()
    try:
        runs = Membership.load(home).standing().get("runs", [])
        for run in runs:
            spec = ReleaseSpec.from_text(str(run["spec"]))
            noises[spec.run], names[spec.run] = spec.noise, str(run["name"])
    except (HomespunError, KeyError, TypeError):
        return noises, names
    return noises, names


def _counted(home: DeviceHome, what: str) -> int:
    """Count what can be counted; forgetting what is damaged needs no count."""
    from client.learned_store import LearnedStore
    from client.level_store import LevelStore
    from client.record_store import RecordStore

    try:
        if what == "records":
            return len(RecordStore(home))
        if what == "profile":
            profile = LevelStore(home).profile()
            return 0 if profile is None else len(profile.lines)
        return int(LearnedStore(home).load() is not None)
    except Refusal:
        raise
    except HomespunError:
        return 0


def _going(folder: Path) -> list[Path]:
    found: list[Path] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        kept = len(parts) == 1 and any(fnmatch(parts[0], name) for name in KEPT)
        if (path.is_file() or path.is_symlink()) and not kept and path.suffix != ".lock":
            found.append(path)
    return found


def _wipe(folder: Path) -> None:
    going = _going(folder)
    with ExitStack() as stack:
        # Before the first byte goes: nobody writes into a store while it is overwritten.
        for path in going:
            if path.suffix == ".sqlite":
                stack.callback(os.close, take_lock(path, "store-locked"))
        for path in going:
            _destroy(path)
    for path in sorted((one for one in folder.rglob("*") if one.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    _remove_locks(going)
    sync_folder(folder)


def _destroy(path: Path) -> None:
    """Overwrite a file and remove it; a link is removed, and what it leads to is left alone."""
    if path.is_symlink():
        path.unlink()
        return
    size = path.stat().st_size
    with path.open("r+b") as file:
        for start in range(0, size, BLOCK):
            file.write(bytes(min(BLOCK, size - start)))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def _remove_locks(paths: Sequence[Path]) -> None:
    for path in paths:
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
