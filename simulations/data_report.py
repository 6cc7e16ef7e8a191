"""What a data set is to a model: the report of `homespun sim data PATH --model M`.

It counts before anything is trained: users and those with too little, tokens, what a limit cuts, what is dropped, and
how the split falls. It also shows one record as the model sees it, on the terminal of whoever holds the data; what
goes elsewhere (`DataReport.to_json`) has no text in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from client.user_data import Encoded, Encoder, User, split
from common.config import BUILT_IN
from common.errors import DataError
from common.model_files import model_folder
from simulations.worlds.built_in import base_folder, population
from simulations.worlds.loaders import UserSource, load_users

__all__ = ["DataReport", "render_report", "report_data", "report_of", "show_report"]

PERCENTILES = (10, 50, 90, 99, 100)

USERS_AT_ONCE = 64
"""Users whose records are encoded together: enough to keep the tokenizer busy, few enough to hold."""

BUILT_IN_USERS = 300
"""Users of the built-in world when nobody says how many: they are all alike in what is counted here."""

LONGEST_SHOWN = 2000
"""Characters of the shown record, per side of the mask."""


@dataclass(frozen=True)
class Shown:
    """A record as the model sees it, special tokens included; `labels` is what counts in the loss."""

    context: str = field(repr=False)
    labels: str = field(repr=False)
    context_tokens: int
    label_tokens: int


@dataclass(frozen=True)
class DataReport:
    """Counts over all users of a source.

    Attributes:
        name: The source as the caller named it.
        source_digest: SHA-256 of the source, in hex.
        max_tokens: The limit the records were cut to.
        users: All users.
        users_too_little: Those that cannot be split, by reason; they take part in use and are not scored.
        users_by_time: Those whose every record has a time, so that the split is by time.
        records: All records.
        tasks: Records by task.
        tokens: Percentile -> tokens of an uncut record, special tokens included; empty where nothing could be encoded.
        records_per_user: Percentile -> records.
        truncated: Records that lose tokens.
        responses_cut: Those of them that lose tokens of their response.
        dropped: Records with nothing to learn.
        train: Records to train on, over all users; `validation` and `test` likewise.
        labels: Tokens that count in the loss, after cutting.
        chat_template: Whether prompts go through the tokenizer's chat template.
        notes: What the reader left out, counted by reason.
        shown: One record, as the model sees it.
    """

    name: str
    source_digest: str
    max_tokens: int
    users: int
    users_too_little: dict[str, int]
    users_by_time: int
    records: int
    tasks: dict[str, int]
    tokens: dict[int, int]
    records_per_user: dict[int, int]
    truncated: int
    responses_cut: int
    dropped: int
    train: int
    validation: int
    test: int
    labels: int
    chat_template: bool
    notes: dict[str, int]
    shown: Shown | None

    def to_json(self) -> dict[str, Any]:
        """Return everything but texts, as JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "shown"}
        for name in ("tokens", "records_per_user"):
            values[name] = {_percentile_name(key): value for key, value in values[name].items()}
        return values


def report_of(
    path: str,
    *,
    model: str = BUILT_IN,
    max_tokens: int,
    users: int | None = None,
    user_column: str | None = None,
    text_column: str | None = None,
    time_column: str | None = None,
) -> DataReport:
    """Report on what a run would be given as `--data` and `--model`; only the model's tokenizer is opened.

    Args:
        path: What `load_users` takes as text, or "built-in".
        model: "built-in", a folder, or a name on the hub.
        max_tokens: The limit the run would have.
        users: Look at this many users only.
        user_column: As in `load_users`, likewise the next two.
        text_column: The column with the text.
        time_column: The column with the time.

    Raises:
        DataError: The data or the tokenizer cannot be read.
    """
    if path == BUILT_IN:
        source = load_users(population(0, users or BUILT_IN_USERS), name="the built-in world")
    else:
        source = load_users(
            path, user_column=user_column, text_column=text_column, time_column=time_column, limit=users
        )
    return report_data(source, _tokenizer_of(base_folder() if model == BUILT_IN else model_folder(model)), max_tokens)


def report_data(source: UserSource, tokenizer: Any, max_tokens: int) -> DataReport:
    """Read all of `source` once and count.

    Args:
        source: Users.
        tokenizer: The model's transformers tokenizer.
        max_tokens: The limit the run would have.

    Raises:
        DataError: The source cannot be read, or the tokenizer's chat template cannot be used.
    """
    encoder = Encoder(tokenizer, max_tokens)
    count: Counter[str] = Counter()
    too_little: Counter[str] = Counter()
    tasks: Counter[str] = Counter()
    per_user: list[int] = []
    lengths: list[int] = []
    shown: Shown | None = None
    for users in _batches(source):
        records = [record for user in users for record in user.records]
        for user in users:
            parts = split(user)
            per_user.append(len(user.records))
            count["by_time"] += all(record.time is not None for record in user.records)
            count.update(train=len(parts.train), validation=len(parts.validation), test=len(parts.test))
            if parts.reason is not None:
                too_little[parts.reason] += 1
        tasks.update(record.task for record in records)
        for encoded in encoder.encode_batch(records):
            if encoded is None:
                count["dropped"] += 1
                continue
            lengths.append(encoded.uncut_tokens)
            count["truncated"] += encoded.truncated
            count["responses_cut"] += encoded.response_cut or (
                encoded.rejected is not None and encoded.rejected.response_cut
            )
            count["labels"] += len(encoded.ids) - encoded.first_label
            shown = shown or _show(tokenizer, encoded)
    return DataReport(
        name=source.name,
        source_digest=source.source_digest,
        max_tokens=max_tokens,
        users=len(per_user),
        users_too_little=dict(sorted(too_little.items())),
        users_by_time=count["by_time"],
        records=sum(per_user),
        tasks=dict(sorted(tasks.items())),
        tokens=_percentiles(lengths),
        records_per_user=_percentiles(per_user),
        truncated=count["truncated"],
        responses_cut=count["responses_cut"],
        dropped=count["dropped"],
        train=count["train"],
        validation=count["validation"],
        test=count["test"],
        labels=count["labels"],
        chat_template=encoder.uses_chat_template,
        notes=source.notes,
        shown=shown,
    )


def render_report(report: DataReport) -> RenderableType:
    """Lay the report out for a terminal: a table, then the record with its loss mask marked.

    The mark is a letter before each line as well as a colour, for terminals and pipes without any. Characters that
    could steer the terminal are shown by their codes.
    """
    encoded = report.records - report.dropped
    table = Table(title=Text(f"{report.name} at {report.max_tokens} tokens"), show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = [
        ("users", f"{report.users:,}"),
        ("  with too little, not scored", _counts(report.users_too_little) or "none"),
        ("  split by time, the others by order", f"{report.users_by_time:,}"),
        ("records", f"{report.records:,} ({_counts(report.tasks)})"),
        ("  per user", _spread(report.records_per_user)),
        ("  tokens each, before cutting", _spread(report.tokens)),
        ("  cut to the limit", _share(report.truncated, encoded)),
        ("    of these, the response too", _share(report.responses_cut, encoded)),
        ("  dropped, nothing to learn", _share(report.dropped, report.records)),
        ("train, validation, test", f"{report.train:,}, {report.validation:,}, {report.test:,}"),
        ("tokens in the loss", f"{report.labels:,}"),
        ("prompt format", "the tokenizer's chat template" if report.chat_template else "prompt, newline, response"),
        *((f"left out: {reason}", f"{count:,}") for reason, count in report.notes.items()),
        ("SHA-256", report.source_digest),
    ]
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    if report.shown is None:
        return table
    shown = report.shown
    return Group(
        table,
        Text("\nOne record as the model sees it:"),
        Text(f"  {shown.context_tokens} tokens that are only read", style="dim"),
        _marked(shown.context, "  | ", "dim"),
        Text(f"  {shown.label_tokens} tokens that are learned (in the loss)", style="bold green"),
        _marked(shown.labels, "  > ", "green"),
    )


def show_report(report: DataReport, console: Console) -> None:
    """Print the report."""
    console.print(render_report(report))


def _tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise DataError(f"{folder}: no tokenizer that can be opened here ({type(error).__name__})") from None


def _batches(source: Iterable[User]) -> Iterator[list[User]]:
    users = iter(source)
    while batch := list(islice(users, USERS_AT_ONCE)):
        yield batch


def _show(tokenizer: Any, encoded: Encoded) -> Shown:
    context, labels = encoded.ids[: encoded.first_label], encoded.ids[encoded.first_label :]
    return Shown(
        context=tokenizer.decode(context.tolist(), skip_special_tokens=False),
        labels=tokenizer.decode(labels.tolist(), skip_special_tokens=False),
        context_tokens=len(context),
        label_tokens=len(labels),
    )


def _percentiles(values: Sequence[int]) -> dict[int, int]:
    """Percentiles that are values of the data, none between two."""
    if not values:
        return {}
    found = np.percentile(np.asarray(values), PERCENTILES, method="inverted_cdf")
    return {percent: int(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def _percentile_name(percent: int) -> str:
    return "max" if percent == 100 else f"p{percent}"


def _spread(percentiles: Mapping[int, int]) -> str:
    return ", ".join(f"{_percentile_name(percent)} {value:,}" for percent, value in percentiles.items()) or "none"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else "0"


def _marked(text: str, mark: str, style: str) -> Text:
    """Put a mark before each line, cut what is too long, and defuse control characters."""
    cut = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} ... ({len(text):,} characters in all)"
    lines = [
        "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line) for line in cut.split("\n")
    ]
    return Text("\n".join(mark + line for line in lines), style=style)
