"""The page people read: one run folder in, one self-contained `report.html` out.

The page loads nothing, runs nothing and names nobody: numbers over users, one unlabelled point per user in one chart,
never a text. A part that a run does not have (an unfinished run, nothing shared, no claim) is said in words, not
drawn empty. The wording of the promise is in `simulations.privacy_words`, the charts are in `simulations.run_charts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from common.config import RunConfig, load_config, read_config_file
from common.errors import DataError
from common.evaluation import (
    ACCURACY,
    DEGENERATION,
    EXACT,
    NATS,
    PREFERENCE,
    Interval,
    MetricSummary,
    Summary,
    UserScores,
    summarize,
    user_scores,
)
from common.methods import METHODS
from common.query_tests import QueryComparison
from simulations.number_words import duration, number, p_value, percent, signed, size
from simulations.privacy_words import describe_privacy
from simulations.report_tables import KIND_PREFIX, SYSTEM_WORDS, kind_metrics, query_tests, tables_of
from simulations.run_charts import comparison_marks, figures, share_bar

__all__ = ["terminal_table", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"

FOCUS = ("chosen", "both", "private", "global")
"""What the page is about: the first of these systems that the run scored."""

UNCLEAR = {"no clear difference": "unclear"}
"""The verdict where a terminal of 80 columns has no room for it."""

Column = NDArray[Any]


@dataclass(frozen=True)
class _Run:
    """What a run folder holds; what is missing is None or empty."""

    path: Path
    config: RunConfig
    rounds: list[dict[str, Any]]
    data: dict[str, Any]
    statement: dict[str, Any] | None
    frame: dict[str, Column] | None
    ledger_entries: int | None
    spent_on_data: str | None = None

    @property
    def population(self) -> int | None:
        """Enrolled users."""
        return self.config.users or self.data.get("users")


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into `run_folder`, and `summary.json` where users were scored; return the page's path.

    Intervals are resampled with a fixed seed: the same folder gives the same page, byte for byte.

    Raises:
        ConfigError: There is no usable `config.toml`.
        DataError: A file of the run cannot be read as what it is.
    """
    run = _read_run(run_folder)
    summary, scores = _score(run.frame)
    page = run_folder / "report.html"
    queries = query_tests(run_folder) if summary is not None else []
    _replace(page, _environment().get_template("report.html.j2").render(_page(run, summary, scores, queries)))
    if summary is not None:
        found = {**summary.to_json(), "queries": [one.to_json() for one in queries]}
        _replace(run_folder / "summary.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    return page


def terminal_table(summary: Summary, statement: Mapping[str, Any] | None) -> Table:
    """Lay out the page's first table for a terminal, with the privacy claim as its caption.

    Args:
        summary: What `summary.json` holds.
        statement: What `statement.json` holds, or None for a run that has none.
    """
    claim = describe_privacy(statement)
    caption = f"{claim.headline} ({claim.status})"
    if not summary.metrics:
        return Table("no user was scored", caption=caption)
    leading = summary.metrics[0]
    title = f"{leading.users:,} users, {leading.metric.unit}; at the right, users helped/harmed"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True  # a terminal of 80 columns shows every number whole
    table.add_column("system", no_wrap=True)
    for heading in ("mean", "median", "worst decile"):
        table.add_column(heading, justify="right", no_wrap=True)
    compared = {entry.reference for entry in leading.comparisons}
    references = [name for name in ("base", "global") if name in compared]
    for reference in references:
        table.add_column(f"against\n{reference}", justify="right", no_wrap=True)
    for entry in leading.systems:
        cells = [f"{number(part.estimate)}\n{_span(part)}" for part in (entry.mean, entry.median, entry.worst_decile)]
        for reference in references:
            against = leading.against(entry.system, reference)
            if against is None:
                cells.append("")
            else:
                shares = f"{percent(against.helped.estimate)}/{percent(against.harmed.estimate)}"
                cells.append(f"{shares}\n{UNCLEAR.get(against.verdict, against.verdict)}")
        table.add_row(entry.system, *cells)
    return table


def _read_run(folder: Path) -> _Run:
    ledger = folder / "ledger.jsonl"
    return _Run(
        path=folder,
        config=load_config(read_config_file(folder / "config.toml")),
        rounds=_read_lines(folder / "rounds.jsonl"),
        data=_read_json(folder / "data.json") or {},
        statement=_read_json(folder / "statement.json"),
        frame=_read_frame(folder / "users.parquet"),
        ledger_entries=len(ledger.read_bytes().splitlines()) if ledger.is_file() else None,
        spent_on_data=(_read_json(folder / "spent_on_data.json") or {}).get("sentence"),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path}: not valid JSON") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    found: list[dict[str, Any]] = []
    for position, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            # a run that was killed may leave its last line half-written
            if position < len(lines):
                raise DataError(f"{path}: line {position} is not valid JSON") from None
    return found


def _read_frame(path: Path) -> dict[str, Column] | None:
    if not path.is_file():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError):
        raise DataError(f"{path}: not a Parquet file") from None
    missing = [name for name in ("user", "system", NATS.name) if name not in table.column_names]
    if missing:
        raise DataError(f"{path}: has no column {', '.join(missing)}")
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def _score(frame: dict[str, Column] | None) -> tuple[Summary | None, UserScores | None]:
    """Summarize the test rows; those of the first split there is where a run has no test rows."""
    if frame is None or not len(frame["user"]):
        return None, None
    splits = sorted({str(name) for name in frame["split"]}) if "split" in frame else []
    split = "test" if not splits or "test" in splits else splits[0]
    measures = (NATS, ACCURACY, EXACT, PREFERENCE, DEGENERATION, *kind_metrics(list(frame)))
    summary = summarize(frame, np.random.default_rng(0), metrics=measures, split=split)
    if not summary.metrics or summary.metrics[0].metric != NATS:
        return None, None
    return summary, user_scores(frame, split=split if splits else None)


def _records(frame: dict[str, Column] | None, scores: UserScores | None) -> NDArray[np.float64] | None:
    """Return how many records each of the scored users trained on, in their order, or None where it is not known."""
    if frame is None or scores is None or "train_records" not in frame:
        return None
    known = dict(
        zip(frame["user"].astype(str).tolist(), frame["train_records"].astype(np.float64).tolist(), strict=True)
    )
    return np.array([known[label] for label in scores.labels])


def _replace(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, range=_range, percent=percent, signed=signed, size=size, p_value=p_value)
    return environment


def _page(
    run: _Run, summary: Summary | None, scores: UserScores | None, queries: Sequence[QueryComparison]
) -> dict[str, Any]:
    """Gather everything that the template prints."""
    nats = summary.metrics[0] if summary is not None else None
    present = [entry.system for entry in nats.systems] if nats else []
    focus = next((name for name in FOCUS if name in present), None)
    return {
        "name": run.path.resolve().name,
        "focus": focus,
        "unfinished": run.frame is None,
        "rounds_done": len(run.rounds),
        "rounds_planned": run.config.rounds,
        "expected_rounds": number(len(run.rounds) * run.config.cohort / (run.population or run.config.cohort), 2),
        "others": _others(summary),
        "tables": tables_of(run.path, summary, queries),
        "headline": _headline(nats, focus),
        "lede": _lede(run),
        "result": _result(nats, focus),
        "summary": summary,
        "nats": nats,
        "references": [name for name in ("base", "global") if name in present and name != present[-1]],
        "system_words": SYSTEM_WORDS,
        "share_bar": share_bar,
        "verdicts": _verdicts,
        "privacy": describe_privacy(run.statement, run.config),
        "spent_on_data": run.spent_on_data,
        "figures": figures(run.config, run.rounds, nats, scores, _records(run.frame, scores), focus),
        "comparisons": comparison_marks(nats),
        "traffic": _traffic(run),
        "facts": _facts(run, nats),
        "config_text": _public_config(run.config).to_toml(),
        "rehearsal": run.config.rehearsal,
        "ledger_entries": run.ledger_entries,
        "has_users": run.frame is not None,
    }


def _verdicts(nats: MetricSummary, system: str, references: Sequence[str]) -> list[tuple[str, str]]:
    """Return (verdict, against what), with one entry where the verdicts agree."""
    found: dict[str, list[str]] = {}
    for reference in references:
        comparison = nats.against(system, reference)
        if comparison is not None:
            found.setdefault(comparison.verdict, []).append(reference)
    return [
        (verdict, f"{'from' if verdict.startswith('no') else 'than'} {' and '.join(names)}")
        for verdict, names in found.items()
    ]


def _keeps(config: RunConfig) -> bool:
    """Whether users of the run's method end up with anything of their own; a row from outside is taken to."""
    row = METHODS.get(config.method)
    return row is None or row.private


def _headline(nats: MetricSummary | None, focus: str | None) -> str:
    comparison = nats.against(focus, "base") if nats and focus else None
    if comparison is None:
        return "No user has been scored yet"
    helped, harmed = percent(comparison.helped.estimate), percent(comparison.harmed.estimate)
    subject = "Personalization" if focus != "global" else "The shared adapter"
    return {
        "better": f"{subject} helped {helped} of users and harmed {harmed}",
        "worse": f"{subject} made the model worse: {harmed} of users harmed, {helped} helped",
        "no clear difference": f"{subject} made no clear difference: {helped} of users helped, {harmed} harmed",
    }[comparison.verdict]


def _lede(run: _Run) -> str:
    config = run.config
    who = f"{run.population:,} users" if run.population else "The users"
    data = "of the built-in world" if config.data == "built-in" else f"of {_last(config.data)}"
    model = "the built-in base model" if config.model == "built-in" else _last(config.model)
    rounds = f"over {len(run.rounds)} rounds of about {config.cohort:,} users" if run.rounds else ""
    if config.method == "local":
        rank = config.personal_rank or config.rank
        return f"{who} {data} each trained a private LoRA adapter of rank {rank} on {model}; nothing was shared."
    private = "" if not _keeps(config) else ", and each a private one that never left"
    what = f"trained one shared LoRA adapter of rank {config.rank} on {model} {rounds}".rstrip()
    return f"{who} {data} {what}{private} (method {config.method})."


def _result(nats: MetricSummary | None, focus: str | None) -> str:
    if nats is None:
        return ""
    text = f"{nats.users:,} users were scored on held-out records of their own"
    text += f"; {nats.excluded:,} could not be, for want of them." if nats.excluded else "."
    before, after = nats.system("base"), nats.system(focus) if focus else None
    if before is None or after is None:
        return text
    perplexities = f"{before.perplexity.estimate:.2f} to {after.perplexity.estimate:.2f}"
    return f"{text} Their perplexity goes from {perplexities} (geometric mean)."


def _others(summary: Summary | None) -> list[dict[str, Any]]:
    """Return the measures beside nats, which are shares of 0 to 1."""
    found = [] if summary is None else summary.metrics[1:]
    return [
        {"name": entry.metric.name.replace("_", " ").capitalize(), "words": entry.metric.unit, "summary": entry}
        for entry in found
        if not entry.metric.name.startswith(KIND_PREFIX)
    ]


def _traffic(run: _Run) -> list[dict[str, Any]]:
    """Return bytes down and up: per chosen user and round, expected per enrolled user, and over everyone."""
    if not run.rounds or not run.population:
        return []
    rows: list[dict[str, Any]] = []
    for words, name in (("down to the user", "bytes_down_per_user"), ("up from the user", "bytes_up_per_user")):
        total = float(sum(line.get(name) or 0 for line in run.rounds))
        rows.append(
            {
                "direction": words,
                "round": total / len(run.rounds),
                "user": total * run.config.cohort / run.population,
                "all": total * run.config.cohort,
            }
        )
    return rows


def _facts(run: _Run, nats: MetricSummary | None) -> list[tuple[str, str]]:
    """Return the run's facts in the order in which they are asked for; what is not known is left out."""
    config, data = _public_config(run.config), run.data
    facts: list[tuple[str, str]] = [("Base model", config.model), ("Data", config.data)]
    if run.population:
        facts.append(("Users", f"{run.population:,} enrolled" + (f", {nats.users:,} scored" if nats else "")))
    if records := data.get("records"):
        facts.append(("Records", f"{records:,}"))
    if per_user := data.get("records_per_user"):
        facts.append(("Records per user", _percentiles(per_user) if isinstance(per_user, dict) else f"{per_user:,.1f}"))
    tokens = data.get("token_percentiles") or data.get("tokens")
    if isinstance(tokens, dict) and tokens:
        facts.append(("Tokens per record", f"{_percentiles(tokens)}; cut at {config.max_tokens}"))
    if dropped := _total(data.get("dropped")):
        facts.append(("Records dropped", f"{dropped:,}"))
    if config.method != "local":
        rate = f", sampling rate {config.cohort / run.population:.3g}" if run.population else ""
        facts += [
            ("Shared adapter", f"LoRA rank {config.rank}, scaling {config.scaling:g}, on {', '.join(config.targets)}"),
            ("Rounds", f"{len(run.rounds)} of {config.rounds}, about {config.cohort:,} users each{rate}"),
            ("Local work", f"{config.local_steps} steps of {config.local_batch} records, {config.optimizer}"),
            ("Clip", _clip_words(config, run)),
        ]
    if measured := _measured_words(config, run):
        facts.append(("Measured in the last round, noised", measured))
    noise = [line["noise_over_clip"] for line in run.rounds if isinstance(line.get("noise_over_clip"), int | float)]
    if noise and config.private:
        facts.append(("Noise on the mean update", f"{np.median(noise):.2f} of the clip, expected L2 norm"))
    if rejected := sum(_total(line.get("rejected")) for line in run.rounds):
        facts.append(("Updates rejected", f"{rejected:,}, not finite or misshapen"))
    if _keeps(config):
        rank = config.personal_rank or config.rank
        facts.append(("Private adapter", f"LoRA rank {rank}, {config.personal_steps} steps of {config.personal_batch}"))
    seconds = [line["seconds"] for line in run.rounds if isinstance(line.get("seconds"), int | float)]
    if seconds:
        facts.append(("Time in rounds", f"{duration(sum(seconds))}, {np.median(seconds):.2g} s a round"))
    kind = "rehearsal: noise and cohorts are seeded too" if config.rehearsal else "noise and cohorts are not seeded"
    facts.append(("Seed", f"{config.seed}; {kind}"))
    return facts


def _clip_words(config: RunConfig, run: _Run) -> str:
    clips = [line["counts"]["clip"] for line in run.rounds if isinstance(line.get("counts"), dict)]
    if config.clip_quantile is None or not clips:
        return f"{config.clip:g}, L2 norm of the whole update"
    return (
        f"from {clips[0]:.3g} to {clips[-1]:.3g}, L2 norm of the whole update; it followed the noised "
        f"{config.clip_quantile:g} quantile of their lengths"
    )


def _measured_words(config: RunConfig, run: _Run) -> str:
    """What the cohort's validation records said, as it was released."""
    counts = next((line["counts"] for line in reversed(run.rounds) if isinstance(line.get("counts"), dict)), {})
    said = [
        f"{name} {number(counts[name])} nats per token, noise of {number(counts[f'{name}_noise'])} standard deviation"
        for name in config.noised_metrics
        if isinstance(counts.get(name), int | float)
    ]
    return "; ".join(said)


def _range(interval: Interval) -> str:
    return f"{number(interval.low)} to {number(interval.high)}" if np.isfinite(interval.low) else number(interval.low)


def _percentiles(values: Mapping[str, Any]) -> str:
    """Write percentile -> value in rising order, the middle one as what it is."""
    named = sorted((float("".join(c for c in str(key) if c.isdigit() or c == ".") or 0), values[key]) for key in values)
    return ", ".join(f"{'median' if key == 50 else f'{key:g}th percentile'} {value:,.0f}" for key, value in named)


def _total(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_total(part) for part in value.values())
    return int(value) if isinstance(value, int | float) else 0


def _span(interval: Interval) -> str:
    return f"{number(interval.low)}..{number(interval.high)}" if np.isfinite(interval.low) else ""


def _public_config(config: RunConfig) -> RunConfig:
    """Return `config` with paths cut to their last part: folders tell who ran it, not what was run."""
    cut = {name: _last(getattr(config, name)) for name in ("model", "data", "init_adapter") if getattr(config, name)}
    return config.model_copy(update=cut)


def _last(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name
