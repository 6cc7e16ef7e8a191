"""What a device says to its coordinator now and then, and what it does with the answer.

Every enrolled device calls alike, chosen or not: it says which version it runs and whether it would take part in what
is open, gets the newest global adapter, and keeps the coordinator's signed statements of what was spent, to hand them
back should the coordinator come back from an old backup.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from client.base_fetch import fetch_base
from client.coordinator_link import CoordinatorLink
from client.device_backup import settle_restored
from client.device_home import RESTORED, DeviceHome
from client.joined_sums import has_roster, keep_roster
from client.membership import Membership, UsageMeter
from client.record_store import RecordStore
from common.errors import DataError, HomespunError, Refusal, VerificationError
from common.files import write_private_file
from common.keys import VerifyKey
from common.ledger import Ledger, Verified
from common.model_files import precision_of
from common.places import cache_home
from common.source import installed_version
from common.spent_proof import check_proof
from common.wire import ReleaseSpec

if TYPE_CHECKING:
    from client.vault_host import ChildVault

__all__ = ["REFUSALS", "Calls", "judge", "kept_proofs", "verdict_on"]

REFUSALS = "refusals.json"
MOST_REFUSALS = 20
MOST_RUNS = 64
MOST_PROOFS = 16
REFIT_SECONDS = 3600.0

_CODE = str(Path(__file__).resolve().parent.parent)
_RUN_VERDICT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from client.coordinator_calls import judge; judge(sys.argv[1])"
)


class Calls:
    """The calls of one device."""

    def __init__(self, membership: Membership) -> None:
        """Call in the name of `membership`."""
        self._membership = membership
        self._home = membership.home
        self._meter = UsageMeter(self._home.folder)
        self._refitted = float("-inf")
        self._judged: tuple[object, str] = (None, "")
        self._told: set[tuple[str, str]] = set()
        self._noting = threading.Lock()

    def until_ready(self, membership: Membership) -> Membership:
        """See whether the device was approved by now, and has its base model; fetch that where it has not."""
        self._membership = membership
        if membership.model.is_dir() and membership.status in ("approved", "paused"):
            return membership
        try:
            with self._link() as link:
                link.ask("standing", version=installed_version(), verdict="")
                model = fetch_base(
                    membership.invite.base,
                    cache_home() / "models",
                    link,
                    allowed_megabytes=self._allowance(),
                    say=lambda text: None,  # noqa: ARG005
                    count=self._count,
                )
        except Refusal as refusal:
            if refusal.code != "pending":
                self.note_refusal(refusal.code, str(refusal))
            return membership
        except HomespunError:
            return membership
        found = Membership(self._home, membership.invite, membership.data, membership.user, model, "approved")
        self._membership = found.save()
        return self._membership

    def keep_up(self, vault: ChildVault) -> None:
        """Call once; whatever goes wrong is noted for the owner, and tried again at the next call."""
        self._membership = Membership.load(self._home)
        try:
            with self._link() as link:
                kept = self._membership.standing()
                verdict = self._verdict(kept)
                reply = link.ask(
                    "standing",
                    version=installed_version(),
                    verdict=verdict,
                    ledger=self._home.read_ledger().entries[-1].head.to_json(),
                    proofs=kept.get("proofs", [])[-MOST_PROOFS:],
                )
                if self._membership.status not in ("approved", "paused"):
                    self._membership = self._membership.save(status="approved")
                self._take(reply, link)
            self._membership.note_standing(called=datetime.now(UTC).isoformat(timespec="seconds"), away="")
        except Refusal as refusal:
            if refusal.code in ("revoked", "left", "not-enrolled"):
                self._membership = self._membership.save(status="revoked")
            self.note_refusal(refusal.code, str(refusal))
        except HomespunError as error:
            self._membership.note_standing(away=str(error))
        self._refit(vault)

    def note_refusal(self, code: str, reason: str) -> None:
        """Keep a refusal for the owner to see in `homespun device status`.

        The same one again is counted: a bundle that asks a thousand times hides nothing that was refused before.
        """
        path = self._home.folder / REFUSALS
        with self._noting:
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))["refusals"]
                same = [one for one in kept if (one["code"], one["reason"]) == (code, reason)]
            except (OSError, ValueError, KeyError, TypeError):
                kept, same = [], []
            times = 1 + sum(int(one.get("times", 1)) for one in same)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            one = {"code": code, "reason": reason, "time": now, "times": times}
            others = [other for other in kept if other not in same]
            content = json.dumps({"format": 1, "refusals": [*others, one][-MOST_REFUSALS:]}).encode()
            write_private_file(path, content, replace=True)

    def _verdict(self, kept: dict[str, Any]) -> str:
        """Why this device would refuse what is open, as a code; empty where it would not.

        Pricing takes memory that an idle device should have back, so another process does it, when something changed.
        """
        specs = [str(run["spec"]) for run in kept.get("runs", ()) if run.get("open")]
        if not specs:
            return ""
        rosters = tuple(sorted(path.name for path in self._home.folder.glob("roster-*.json")))
        known = (self._home.read_ledger().entries[-1].hash, self._home.policy().digest, tuple(specs), rosters)
        if self._judged[0] != known:
            command = [sys.executable, "-c", _RUN_VERDICT, _CODE, str(self._home.folder)]
            done = subprocess.run(command, input=json.dumps(specs), capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode:
                return "failed"
            self._judged = known, done.stdout.strip()
        return self._judged[1]

    def _take(self, reply: dict[str, Any], link: CoordinatorLink) -> None:
        """Keep what the coordinator said, as far as it is what it should be."""
        kept, runs = self._membership.standing(), list[dict[str, Any]]()
        fetched: dict[str, Any] = dict(kept.get("adapters", {}))
        proofs: list[Any] = list(kept.get("proofs", []))
        rolled_back = str(kept.get("rolled_back", ""))
        for run in reply.get("runs", [])[:MOST_RUNS]:
            spec = ReleaseSpec.from_text(str(run["spec"]))
            if precision_of(spec.model, self._membership.invite.base.digest) is None:
                continue
            runs.append(
                {"name": str(run["name"])[:64], "run": spec.run, "spec": spec.to_text(), "open": bool(run["open"])}
            )
            proofs, went_back = kept_proofs(proofs, run["proof"], VerifyKey.from_hex(self._membership.invite.writer))
            rolled_back = datetime.now(UTC).date().isoformat() if went_back else rolled_back
            if spec.noise == "distributed" and bool(run["open"]) and not has_roster(self._home, spec):
                self._take_roster(spec)
            facts = run["adapter"]
            have = fetched.get(spec.run, {})
            if int(facts["round"]) > int(have.get("round", 0)) and facts["sha256"] != have.get("sha256"):
                if (4 + 4 * spec.model_dim) / 1e6 > self._allowance():
                    self.note_refusal("megabytes", "the newest global adapter waits: today's traffic is used up")
                    continue
                content = link.adapter(spec.run)
                self._keep_adapter(spec, content)
                digest = hashlib.sha256(content).hexdigest()
                fetched[spec.run] = {"round": int(np.frombuffer(content[:4], "<u4")[0]), "sha256": digest}
        self._membership.note_standing(
            runs=runs, adapters=fetched, proofs=proofs, rolled_back=rolled_back, version=str(reply.get("version"))[:32]
        )
        self._settle(reply)

    def _settle(self, reply: dict[str, Any]) -> None:
        """Where this device was put back from a copy, take as spent what the coordinator says: all, or nothing yet."""
        if not (self._home.folder / RESTORED).exists():
            return
        if reply.get("untold"):
            self.note_refusal("not-now", "the coordinator cannot read all of its runs, so it cannot say what was spent")
            return
        invite, told = self._membership.invite, list[tuple[ReleaseSpec, int]]()
        for run in reply.get("runs", []):  # however many: one that is left out could be spent a second time
            spec = ReleaseSpec.from_text(str(run["spec"]))
            if precision_of(spec.model, invite.base.digest) is not None:
                told.append((spec, check_proof(run["proof"], VerifyKey.from_hex(invite.writer))[1]))
        settle_restored(self._home, told, writer=invite.writer)
        if (self._home.folder / RESTORED).exists():
            reason = (
                "the copy that this device was put back from is of another federation, whose coordinator alone can "
            )
            self.note_refusal("not-now", reason + "say what was spent; join that one again")

    def fetch_roster(self, spec: ReleaseSpec) -> None:
        """Fetch who is in the secure sums of a run, check it and keep it.

        Raises:
            Refusal: `unknown-key`: it is not to be had, or does not check out.
        """
        try:
            with self._link() as link:
                keep_roster(self._membership, spec, link.roster(spec.run))
        except DataError as error:
            raise Refusal("unknown-key", f"the roster of the run's devices is not to be had: {error}") from None

    def _take_roster(self, spec: ReleaseSpec) -> None:
        """Fetch the roster of a run; of one that does not check out the owner is told once."""
        try:
            self.fetch_roster(spec)
        except Refusal as refusal:
            if (spec.run, str(refusal)) not in self._told:
                self._told.add((spec.run, str(refusal)))
                self.note_refusal(refusal.code, str(refusal))

    def _keep_adapter(self, spec: ReleaseSpec, content: bytes) -> None:
        if len(content) != 4 + 4 * spec.model_dim or not np.isfinite(np.frombuffer(content[4:], "<f4")).all():
            raise DataError("the coordinator sent something that is no adapter of its run")
        write_private_file(self._home.folder / f"global-{spec.run}.bin", content, replace=True)

    def _refit(self, vault: ChildVault) -> None:
        """Refit the private adapter over a newer global one: when a run is over, and else once an hour."""
        kept = self._membership.standing()
        for run in kept.get("runs", ()):
            have = kept.get("adapters", {}).get(run["run"])
            fitted = kept.get("personal", {})
            if have is None or (fitted.get("run"), fitted.get("round", -1)) == (run["run"], have["round"]):
                continue
            if run["open"] and time.monotonic() - self._refitted < REFIT_SECONDS:
                continue
            if run["open"] and self._refitted == float("-inf"):
                self._refitted = time.monotonic()  # not in the first hour of a run
                continue
            if have["round"] == 0 or not len(RecordStore(self._home)):
                continue
            try:
                content = (self._home.folder / f"global-{run['run']}.bin").read_bytes()
                vector = np.frombuffer(content[4:], "<f4").astype(np.float32)
                personal = vault.personalize(ReleaseSpec.from_text(run["spec"]), int(have["round"]), vector)
            except (HomespunError, OSError) as error:
                self._membership.note_standing(refit=str(error))
                return
            self._refitted = time.monotonic()
            self._membership.note_standing(personal=personal, refit="")
            return

    def _link(self) -> CoordinatorLink:
        return CoordinatorLink(
            self._membership.invite,
            self._membership.key(),
            count=self._count,
        )

    def _count(self, size: int) -> None:
        self._meter.add(megabytes=size / 1e6)

    def _allowance(self) -> float:
        return self._home.policy().megabytes_per_day - self._meter.today().megabytes_today


class _ReadOnly:
    """A ledger as the keeper reads it, beside the child that holds it open."""

    def __init__(self, verified: Verified) -> None:
        self._verified = verified

    def entries(self) -> Any:
        return self._verified.entries

    @property
    def header(self) -> dict[str, Any]:
        return self._verified.header


def judge(folder: str) -> None:
    """Read specs on standard input, and write the first refusal's code to standard output."""
    home = DeviceHome.open(Path(folder))
    for text in json.load(sys.stdin):
        try:
            refusal = verdict_on(home, ReleaseSpec.from_text(text))
        except Refusal as malformed:
            refusal = malformed
        if refusal is not None:
            sys.stdout.write(refusal.code)
            return


def verdict_on(home: DeviceHome, spec: ReleaseSpec) -> Refusal | None:
    """Why the owner's policy or budget would refuse a run's next round; None where it would not. Writes nothing."""
    from client.budget_keeper import BudgetKeeper

    keeper = BudgetKeeper(home, cast(Ledger, _ReadOnly(home.read_ledger())))
    try:
        with suppress(DataError):  # who joined nothing is asked by nobody
            named = precision_of(spec.model, Membership.load(home).invite.base.digest)
            home.policy().precision(named)
        keeper.check(spec, 1)
        if spec.noise == "distributed" and not has_roster(home, spec):
            raise Refusal("unknown-key", "this device holds no roster that it could check of that run's devices")
    except Refusal as refusal:
        return refusal
    return None


def kept_proofs(kept: list[Any], proof: Any, writer: VerifyKey) -> tuple[list[Any], bool]:
    """Add a signed statement to those that are kept; tell whether the coordinator's ledger went back.

    Of each ledger the furthest statement is kept, and of a history that is denied now the furthest as well, for good.

    Raises:
        DataError: It is not signed by the writer that the invite named.
    """
    try:
        head, _ = check_proof(proof, writer)
    except VerificationError:
        raise DataError("the coordinator's statement of what was spent is not signed as it should be") from None
    last = next((one for one in kept if one["head"]["ledger"] == head.ledger and not one.get("lost")), None)
    others = [one for one in kept if one is not last]
    if last is None or head.index > last["head"]["index"]:
        return [*others, proof], False
    if (head.index, head.hash) == (last["head"]["index"], last["head"]["hash"]):
        return kept, False
    return [*others, {**last, "lost": True}, proof][-MOST_PROOFS:], True
