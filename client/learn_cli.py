"""`homespun device learn`: the private adapter of this device, trained now, and judged on its owner's own records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.owner_cli import open_home
from common.config import BUILT_IN
from common.errors import DataError, HomespunError, StoreError

if TYPE_CHECKING:
    from client.device_home import DeviceHome
    from client.learned_store import Learned

__all__ = ["add_to", "base_of", "own_facts", "remember_base", "worth"]

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Model = Annotated[
    str | None,
    typer.Option(
        help="base model: a folder, a hub name or built-in; the federation's, else what was learned on, when absent",
        show_default=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    """Put this command into `homespun device`."""
    app.command("learn")(learn)


def learn(
    model: Model = None,
    rank: Annotated[int, typer.Option(min=1, max=256, help="LoRA rank of the private adapter")] = 2,
    steps: Annotated[
        int | None, typer.Option(min=1, help="training steps; three passes when absent", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="a record is cut to this many tokens")] = 64,
    as_json: Json = False,
) -> int:
    """Train the private adapter on this device's records, without any federation, and say what it is worth.

    The newest records are set aside: some choose what is used, the others only measure. Nothing leaves the device.

    Example: homespun device learn
    """
    home = open_home()
    folder = base_of(home, model)
    import os

    import torch

    from client.refit import Wish
    from client.refit import learn as fit

    torch.set_num_threads(max(1, min(home.policy().threads, os.cpu_count() or 1)))
    wish = Wish(rank=rank, steps=steps, max_tokens=max_tokens)
    found = fit(home, folder, wish, say=lambda text: print(text, file=sys.stderr if as_json else sys.stdout))
    remember_base(home, found.base, folder)
    if as_json:
        print(json.dumps(worth(found)))
        return 0
    for line in _lines(found):
        print(line)
    return 0


def worth(found: Learned) -> dict[str, Any]:
    """What was learned is worth, as JSON."""
    return {
        "base": found.base,
        "run": found.run or None,
        "round": found.round,
        "chosen": found.chosen,
        "validation_nats_per_token": found.losses,
        "test_nats_per_token": found.test_losses,
        "report": found.report,
    }


def own_facts(home: DeviceHome) -> dict[str, Any]:
    """How much there is to learn from, and what is in use; None where that cannot be read at this moment."""
    from client.learned_store import LearnedStore
    from client.level_store import LevelStore
    from client.record_store import RecordStore

    try:
        learned = LearnedStore(home).load()
        worth = None if learned is None else {"chosen": learned.chosen, "losses": learned.losses}
        return {"records": len(RecordStore(home)), "learned": worth, "off": sorted(LevelStore(home).off())}
    except HomespunError:
        return {"records": None, "learned": None, "off": None}


BASES = "bases.json"
"""Where the base models lie that this device has learned on, by digest."""


def base_of(home: DeviceHome, model: str | None = None) -> Path:
    """Find the base model: what is asked for, the federation's, what was learned on last, or the built-in one.

    Raises:
        DataError: It is not there.
    """
    from client.learned_store import LearnedStore
    from client.membership import Membership
    from common.model_files import base_folder

    if model is not None:
        return base_folder(model)
    try:
        joined = Membership.load(home)
    except DataError:
        joined = None
    if joined is not None and joined.status != "left":
        if not joined.model.is_dir():
            raise DataError(f"{joined.model}: not here yet; `homespun device up` fetches it")
        return joined.model
    found = LearnedStore(home).load()
    known = _bases(home).get(found.base) if found is not None else None
    return Path(known) if known is not None and Path(known).is_dir() else base_folder(BUILT_IN)


def remember_base(home: DeviceHome, digest: str, folder: Path) -> None:
    """Note where the base with this digest lies."""
    from common.files import write_private_file

    content = json.dumps({"format": 1, "bases": {**_bases(home), digest: str(folder.absolute())}}).encode() + b"\n"
    write_private_file(home.folder / BASES, content, replace=True)


def _bases(home: DeviceHome) -> dict[str, str]:
    path = home.folder / BASES
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {str(digest): str(folder) for digest, folder in values["bases"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise StoreError(f"{path}: damaged; delete it, and name the model with --model") from None


def _lines(found: Learned) -> list[str]:
    if not found.losses:
        return [
            "too few records to set some aside, so nothing is known of what it is worth;",
            f"{found.chosen} stays in use until there are more",
        ]
    report = found.report
    lines = [
        f"trained on {report['train_records']} records; on {report['records']} newer ones, which choose, and "
        f"{report['test_records']} newest ones, which only measure, nats per token (lower is better):",
        f"  {'':<20}{'choosing':>10}{'measured':>10}",
    ]
    for name, loss in sorted(found.losses.items(), key=lambda item: item[1]):
        mark = "  in use" if name == found.chosen else ""
        lines.append(f"  {name:<20}{loss:>10.3f}{found.test_losses.get(name, float('nan')):>10.3f}{mark}")
    if "preferences" in report:
        told = report["preferences"]
        which = "pairs that were set aside" if told["set_aside"] else "the pairs that it was tuned on"
        lines.append(
            f"of {told['pairs']} {which}, the answer you preferred was the likelier one in {told['before']:.0%} before "
            f"tuning on your corrections, and in {told['after']:.0%} after"
        )
    reference = "global" if found.shared is not None else "base"
    if found.chosen == reference:
        lines.append(f"nothing is surely better than {reference} on your own records, so that stays in use")
    return lines
