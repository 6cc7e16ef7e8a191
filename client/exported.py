"""An export of a device, read back and taken in by this one: records, profile, and adapters where the base is the same.

Every file is what the manifest says it is, or nothing is taken. Records that are here already are kept once, the
owner's own words of the profile are added to those here, and the private adapters replace those here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.device_home import DeviceHome
from client.export import FORMAT, MANIFEST, PROFILE, RECORD_LINES, digests_of, read_parts
from client.learned_store import Learned, LearnedStore
from client.level_store import LevelStore
from client.owner_files import read_paths
from client.personalization.profile import Line, Profile
from client.record_store import Added, NewRecord, RecordStore
from common.errors import ConfigError, DataError, Refusal
from common.model_files import linear_modules, model_digest, precision_of

__all__ = ["Exported", "Taken", "take_in"]

_FACTS = ("rank_alone", "rank_over_global", "max_tokens", "chosen", "losses", "test_losses", "report")


@dataclass(frozen=True)
class Exported:
    """An export whose files are what its manifest says.

    Attributes:
        folder: Where it lies.
        manifest: What it says of itself.
        records: Its records.
        profile: Its profile.
    """

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    records: Sequence[NewRecord] = field(repr=False)
    profile: Profile = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> Exported:
        """Read and check everything but the adapters.

        Raises:
            DataError: It is no export, or a file is missing, changed or added.
        """
        try:
            manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise DataError(f"{folder / MANIFEST}: of a format that this version does not read")
            files = dict(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{folder}: not an export of a device; {MANIFEST} is missing or damaged") from None
        found = digests_of(folder)
        for name in sorted(files.keys() | found.keys()):
            if files.get(name) != found.get(name):
                raise DataError(f"{folder / name}: not as it was exported")
        try:
            plain = json.loads((folder / PROFILE).read_text(encoding="utf-8"))
            profile = Profile(tuple(Line(**line) for line in plain["lines"]), frozenset(map(str, plain["deleted"])))
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{folder / PROFILE}: not a profile") from None
        return cls(folder, manifest, read_paths([folder / RECORD_LINES]).records, profile)

    @property
    def base(self) -> str | None:
        """Digest of the base model that its adapters are over; None where it has none."""
        learned = self.manifest.get("learned")
        return None if learned is None or not self.manifest.get("parts") else str(learned["base"])

    def learned(self, base: Path) -> Learned:
        """Read its adapters.

        Raises:
            Refusal: They are over another base.
            DataError: They are not what the manifest says.
        """
        if self.base is None or precision_of(self.base, model_digest(base)) is None:
            raise Refusal(
                "model-mismatch", f"its adapters are over another base model than {base}; --model names theirs"
            )
        try:
            facts = self.manifest["learned"]
            targets = tuple(map(str, facts["targets"]))
            parts = read_parts(self.folder, self.manifest, linear_modules(base, targets))
            known = {name: facts[name] for name in (*_FACTS, "rank", "run", "round")}
            return Learned(
                str(facts["base"]),
                targets,
                float(facts["scaling"]),
                shared=parts.get("shared"),
                alone=parts.get("alone"),
                over_global=parts.get("over_global"),
                in_context=parts.get("in_context"),
                others={"preference": parts["preference"]} if "preference" in parts else {},
                **known,
            )
        except (KeyError, TypeError, ValueError, ConfigError):
            raise DataError(f"{self.folder / MANIFEST}: does not say what its adapters are") from None


@dataclass(frozen=True)
class Taken:
    """What was taken in: what became of the records, lines of the profile in the owner's words, and adapters."""

    records: Added
    own_words: int
    adapters: tuple[str, ...]


def take_in(home: DeviceHome, exported: Exported, base: Path | None) -> Taken:
    """Take everything in; adapters only where `base` is named.

    Raises:
        Refusal, DataError: The adapters do not fit; nothing was taken in then.
    """
    learned = None if base is None or exported.base is None else exported.learned(base)
    store, levels = RecordStore(home), LevelStore(home)
    added = store.add(exported.records)
    here = levels.profile() or Profile()
    words = [line for line in exported.profile.lines if line.kind == "own words" and line.text not in here.texts]
    joined = Profile((*here.lines, *words), here.deleted | exported.profile.deleted)
    levels.keep_profile(joined.renewed([one.record for one in store.records()]))
    if learned is None:
        return Taken(added, len(words), ())
    kept = LearnedStore(home).load(learned.base)
    if kept is not None and kept.shared is not None and not _same(kept.shared, learned.shared):
        # The federation's adapter here is newer than an export can be; what was trained over another is of no use.
        learned = _over_base_alone(learned, kept)
    LearnedStore(home).keep(replace(learned, removals=store.removals))
    names = ("shared", "alone", "over_global", "in_context")
    return Taken(added, len(words), tuple(name for name in names if getattr(learned, name) is not None))


def _over_base_alone(learned: Learned, here: Learned) -> Learned:
    """Keep of an import what does not stand on its own global adapter; the choice is made anew at the next refit."""
    return replace(
        learned,
        shared=here.shared,
        rank=here.rank,
        run=here.run,
        round=here.round,
        over_global=None,
        in_context=None,
        others={},
        rank_over_global=0,
        chosen="global",
        losses={},
        test_losses={},
        report={},
    )


def _same(one: NDArray[np.float32], two: NDArray[np.float32] | None) -> bool:
    return two is not None and np.array_equal(one, two)
