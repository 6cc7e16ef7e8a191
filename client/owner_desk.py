"""What the owner's page and programs may see and change of a device, as JSON objects.

Every answer is quick, also while training goes on in the other process: nothing here opens a model, and what an epsilon
comes to is worked out by a process of its own, which is gone afterwards, whenever something was released. Until it is
done the number before stands, and says of which release it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.device_home import DeviceHome
from client.feedback_store import FeedbackStore
from client.level_store import LEVELS, LevelStore
from client.membership import Membership, UsageMeter
from client.model_process import ModelProcess, resident_megabytes
from client.personalization.profile import Profile
from client.record_store import NewRecord, RecordStore
from client.user_data import Record
from common.errors import ConfigError, DataError, Refusal
from common.ledger import Verified

__all__ = ["OwnersDesk", "count_account"]

_CODE = str(Path(__file__).resolve().parent.parent)
_RUN_ACCOUNT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from client.owner_desk import count_account; "
    "count_account(sys.argv[1])"
)
_RUN_COMMAND = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import typer; from client.cli import app; "
    "sys.exit(typer.main.get_command(app).main(sys.argv[1:], standalone_mode=False) or 0)"
)
"""What takes memory that an idle device should have back, or stops this very process, is the command's to do."""

MOST_SENT = 50


class OwnersDesk:
    """One device, for its owner.

    Attributes:
        port: On which the page is served; 0 before it is.
    """

    def __init__(self, home: DeviceHome, process: Callable[[], ModelProcess], *, base: Callable[[], str]) -> None:
        """Answer for `home`; `process` is where its model is at the moment, and `base` what that is called."""
        self.port = 0
        self._home = home
        self._process = process
        self._base = base
        self._levels = LevelStore(home)
        self._records = RecordStore(home)
        self._feedback = FeedbackStore(home)
        self._lock = threading.Lock()
        self._ledger: tuple[object, Verified] | None = None
        self._account: dict[str, Any] = {}
        self._counted: threading.Event | None = None

    def chat(
        self, system: str, turns: Sequence[tuple[str, str]], sampling: Mapping[str, Any]
    ) -> Generator[dict[str, Any]]:
        """Answer a conversation: first what the model was given, then pieces.

        Raises:
            DataError: There is no such model here.
            Refusal: The process that answers did not.
        """
        asked = {"do": "answer", "system": system, "turns": [list(turn) for turn in turns], "sampling": dict(sampling)}
        return self._process().talk(asked)

    def systems(self) -> dict[str, Any]:
        """Every model of this device: what it is made of, and why `personal` is what it is."""
        return next(self._process().talk({"do": "systems"}))["systems"]

    def status(self) -> dict[str, Any]:
        """How the device stands."""
        joined, used, policy = self._membership(), UsageMeter(self._home.folder).today(), self._home.policy()
        pid = self._process().pid
        kept = joined.standing() if joined is not None else {}
        return {
            "joined": None if joined is None else joined.invite.name,
            "state": "alone" if joined is None else joined.status,
            "paused": joined is not None and joined.status == "paused",
            "base": self._base(),
            "port": self.port,
            "model_megabytes": round(resident_megabytes(pid)) if pid is not None else None,
            "records": len(self._records),
            "called": kept.get("called"),
            "away": kept.get("away") or None,
            "today": {
                "minutes": round(used.minutes_today, 2),
                "minutes_granted": policy.minutes_per_day,
                "megabytes": round(used.megabytes_today, 3),
                "megabytes_granted": policy.megabytes_per_day,
            },
        }

    def budget(self) -> dict[str, Any]:
        """What was spent and what is left, with unit and delta."""
        ledger = self._read_ledger()
        key = [ledger.head.hash, self._home.policy().digest]
        if self._account.get("key") != key:
            first = not self._account
            done = self._count_again(key)
            if first:
                done.wait(60.0)
        if not self._account:
            raise Refusal("failed", "the budget could not be counted; `homespun device budget show` says why")
        facts = {name: value for name, value in self._account.items() if name != "key"}
        return {**facts, "counting": self._account.get("key") != key}

    def sent(self) -> dict[str, Any]:
        """What left this device: numbers, how many bytes, when; the newest first."""
        rows = [entry for entry in self._read_ledger().entries if entry.kind == "release"]
        total = sum(int(entry.body["bytes"]) for entry in rows)
        listed = [
            {
                "id": entry.index,
                "time": entry.time,
                "run": str(entry.body["run"])[:16],
                "round": entry.body["round"],
                "bytes": entry.body["bytes"],
                "kind": entry.body["dtype"],
            }
            for entry in rows[: -MOST_SENT - 1 : -1]
        ]
        words = f"{size_words(total)} of numbers, no text" if rows else "Nothing ever left this device"
        return {"releases": len(rows), "bytes": total, "words": words, "newest": listed}

    def profile(self) -> dict[str, Any]:
        """What the model is told about its owner."""
        shown = self._shown_profile()
        lines = [
            {"line": number, "text": line.text, "kind": line.kind, "records": line.records}
            for number, line in enumerate(shown.lines, 1)
        ]
        return {"on": "profile" not in self._levels.off(), "lines": lines}

    def edit_line(self, number: int, text: str) -> dict[str, Any]:
        """Put a line into the owner's own words, or add one behind the last.

        Raises:
            ConfigError: There is no such line, or the text is none.
        """
        try:
            self._levels.keep_profile(self._shown_profile().edited(number, text))
        except ValueError as error:
            raise ConfigError(f"profile: {error}") from None
        return self.profile()

    def delete_line(self, number: int) -> dict[str, Any]:
        """Delete a line, which does not come back.

        Raises:
            ConfigError: There is no such line.
        """
        try:
            self._levels.keep_profile(self._shown_profile().without(number))
        except ValueError as error:
            raise ConfigError(f"profile: {error}") from None
        return self.profile()

    def levels(self) -> dict[str, Any]:
        """Every level, whether it is on, and what `personal` shall be."""
        off = self._levels.off()
        rows = [{"name": name, "on": name not in off, "words": words} for name, words in LEVELS.items()]
        return {"levels": rows, "use": self._levels.use()}

    def switch(self, level: str, *, on: bool) -> dict[str, Any]:
        """Turn a level on or off, from the next question on.

        Raises:
            ConfigError: There is no such level.
        """
        self._levels.switch(level, on=on)
        return self.levels()

    def use(self, system: str) -> dict[str, Any]:
        """Have `personal` be one system, or, with an empty name, what validation records say.

        Raises:
            ConfigError: This device has no such system.
        """
        if system and (system == "personal" or system not in self.systems()):
            raise ConfigError("personal: not a model of this device")
        self._levels.prefer(system)
        return self.levels()

    def keep_turn(self, prompt: str, response: str) -> dict[str, Any]:
        """Keep a question and its answer as a record to learn from; asked for explicitly, each time.

        Raises:
            ConfigError: The answer is empty.
        """
        record = Record(prompt, response, time.time(), task="reply")
        if record.empty:
            raise ConfigError("keep: there is no answer to learn from")
        added = self._records.add([NewRecord(record, "chat")])
        return {"kept": list(added.ids), "records": len(self._records)}

    def feedback(self) -> dict[str, Any]:
        """What the owner said of answers, the newest first."""
        said = [{"id": name, **asdict(one)} for name, one in self._feedback.all().items()]
        return {"feedback": said[::-1]}

    def add_feedback(self, prompt: str, answer: str, kind: str, edited: str | None) -> dict[str, Any]:
        """Keep a thumb or an edit, and the pair that it makes.

        Raises:
            ConfigError: It says nothing.
        """
        name = self._feedback.add(prompt, answer, kind, edited)
        pairs = sum(1 for one in self._records.records() if one.record.rejected is not None)
        return {"id": name, "pairs": pairs}

    def remove_feedback(self, name: str) -> dict[str, Any]:
        """Take back what was said.

        Raises:
            DataError: There is nothing of that id.
        """
        self._feedback.remove(name)
        return self.feedback()

    def pause(self, *, paused: bool) -> dict[str, Any]:
        """Train no more, or again.

        Raises:
            Refusal: This device is in no federation that it could pause, or not let in.
        """
        joined = self._membership()
        if joined is None or joined.status not in ("approved", "paused"):
            raise Refusal("not-now", "this device takes part in nothing that could be paused")
        joined.save(status="paused" if paused else "approved")
        return self.status()

    def export(self) -> dict[str, Any]:
        """Write what this device learned and holds into a folder of the owner's, in the clear.

        Raises:
            Refusal: It could not be written.
        """
        folder = Path.home() / f"homespun-export-{time.strftime('%Y%m%d-%H%M%S')}"
        manifest = self._command("export", "--out", str(folder), "--json")
        return {"folder": str(folder), "records": manifest["records"], "systems": manifest["systems"]}

    def forget(self, *, confirmed: bool) -> dict[str, Any]:
        """Say what forgetting would erase, and what it cannot; or, once it was confirmed, erase.

        Raises:
            Refusal: It could not be done.
        """
        planned = self._command("forget", "--dry-run", "--json")
        cannot = " ".join(planned["cannot_be_undone"])
        what = f"{planned['records']} records, {planned['profile_lines']} lines of profile, adapters and feedback"
        if not confirmed:
            return {"words": f"Erased, for good: {what}. What was spent stays spent. {cannot}"}
        # In a session of its own: it stops this process first.
        self._start_command("forget", "--yes")
        self._process().end()
        return {"words": f"The device stops and erases {what}. `homespun device up` or `serve` starts it again."}

    def _command(self, *words: str) -> dict[str, Any]:
        found = subprocess.run(  # noqa: S603
            [sys.executable, "-c", _RUN_COMMAND, _CODE, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode:
            raise Refusal("failed", f"that did not work; `homespun device {words[0]}` in a terminal says why")
        return json.loads(found.stdout)

    def _start_command(self, *words: str) -> None:
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _RUN_COMMAND, _CODE, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def begin_counting(self) -> None:
        """Work out the account before anybody asks for it."""
        self._count_again([self._read_ledger().head.hash, self._home.policy().digest])

    def _shown_profile(self) -> Profile:
        return self._levels.profile_of([one.record for one in self._records.records()])

    def _membership(self) -> Membership | None:
        try:
            return Membership.load(self._home)
        except DataError:
            return None

    def _read_ledger(self) -> Verified:
        """The ledger, checked again when it grew."""
        facts = (self._home.folder / "ledger.jsonl").stat()
        stamp = (facts.st_mtime_ns, facts.st_size)
        with self._lock:
            if self._ledger is None or self._ledger[0] != stamp:
                self._ledger = stamp, self._home.read_ledger()
            return self._ledger[1]

    def _count_again(self, key: list[str]) -> threading.Event:
        """Have a process work the account out, one at a time; the event is set when it has."""
        done = threading.Event()

        def count() -> None:
            try:
                command = [sys.executable, "-c", _RUN_ACCOUNT, _CODE, str(self._home.folder)]
                found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
                if found.returncode == 0:
                    self._account = {**json.loads(found.stdout), "key": key}
            finally:
                self._counted = None
                done.set()

        with self._lock:
            if self._counted is not None:
                return self._counted
            self._counted = done
        threading.Thread(target=count, name="account", daemon=True).start()
        return done


def count_account(folder: str) -> None:
    """Write the account of the device in `folder` to standard output."""
    from client.budget_keeper import account_of

    home = DeviceHome.open(Path(folder))
    entries = home.read_ledger().entries
    account = account_of(entries, home.policy())
    releases = sum(1 for entry in entries if entry.kind == "release")
    facts = {
        "limit": account.limit if account.limit < float("inf") else "inf",
        "delta": account.delta,
        "unit": None if account.unit is None else str(account.unit),
        "adjacency": str(account.adjacency),
        "reserved": account.reserved if account.reserved < float("inf") else "inf",
        "released": account.released if account.released < float("inf") else "inf",
        "releases": releases,
        "runs": len(account.runs),
        "sentence": account.sentence(),
    }
    sys.stdout.write(json.dumps(facts))


def size_words(count: int) -> str:
    """Say a number of bytes as people do: 131 kB."""
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
