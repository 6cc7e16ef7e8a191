"""The front door: the `homespun` command, and the Python API below it.

It imports nothing slow and nothing of Homespun's own until it knows what was asked, so that
`homespun audit verify` starts at once on a machine that has neither torch nor Flower.

In the wheel this file is `homespun/__init__.py` and the role folders lie beside it; in the repository
they lie beside it too. Either way their import path is their file path (`common.ledger`), never
`homespun.common.ledger`: no module can be imported under two names.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Never, cast

if TYPE_CHECKING:
    import subprocess

    import pandas
    import typer

__all__ = [
    "Comparison",
    "ConfigError",
    "HomespunError",
    "Plan",
    "Refusal",
    "Round",
    "Run",
    "RunConfig",
    "Statement",
    "Users",
    "VerificationError",
    "__version__",
    "load_users",
    "main",
    "open_run",
    "plan",
    "simulate",
]

__version__ = "0.1.0"

_FOLDER = Path(__file__).resolve().parent
_ROLES = ("common", "client", "server", "simulations")

if __spec__ is not None and __spec__.submodule_search_locations is not None:
    # A package, so this is the wheel. Its only submodule is `homespun.__main__`.
    __path__ = [str(_FOLDER / "_run")]


class _Command(NamedTuple):
    """One row of the table of commands.

    Attributes:
        target: `module:attribute`, a Typer app or a function that becomes one; imported when asked for.
        extra: The pip extra that brings whatever this command may import.
        summary: Its line in `homespun --help`.
    """

    target: str
    extra: str
    summary: str


_COMMANDS = {
    "demo": _Command("simulations.cli:demo", "sim", "personalize a population on the built-in world, end to end"),
    "plan": _Command(
        "simulations.cli:plan", "sim", "what a budget allows: noise, and whether a signal is left; trains nothing"
    ),
    "chat": _Command("simulations.cli:chat", "sim", "talk to the base, the global and a user's personal model"),
    "sim": _Command("simulations.cli:app", "sim", "many users on one machine: run, resume, show, export"),
    "device": _Command("client.cli:app", "device", "the vault of this device: what it holds, and what may leave it"),
    "server": _Command(
        "server.cli:app", "server", "the coordinator of a federation: who is enrolled, what runs, what it costs"
    ),
    "doctor": _Command(
        "client.doctor_cli:doctor", "device", "what is wrong with this machine, and what to do about it"
    ),
    "audit": _Command("simulations.audit_cli:app", "sim", "check a ledger, and recompute what it proves"),
}

_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Nothing that Homespun imports may report home. Who sets a variable otherwise has decided otherwise."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 1 failed, 2 usage, 3 refused on purpose, 4 evidence fails, 130 interrupted. Whatever goes wrong is
    one line on stderr; `HOMESPUN_DEBUG=1` adds the traceback.

    Args:
        argv: The words after `homespun`; those of this process when absent.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        _use_own_folders()
        return _dispatch(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader has left (`homespun ... | head`); keep the interpreter from complaining as it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("HOMESPUN_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        return _explain(error, words[0] if words else "")


def _use_own_folders() -> None:
    """Put the folder that holds the roles first on `sys.path`, once."""
    own = str(_FOLDER)
    sys.path[:] = [own, *(entry for entry in sys.path if entry != own)]
    for role in _ROLES:
        found = getattr(sys.modules.get(role), "__file__", None)
        if found is not None and Path(found).resolve().parent != _FOLDER / role:
            raise ImportError(f"a module named {role} that is not Homespun's is already imported from {found}")


def _dispatch(words: Sequence[str]) -> int:
    if not words:
        sys.stderr.write(_help())
        return 2
    word, *rest = words
    if word in {"-h", "--help", "help"}:
        sys.stdout.write(_help())
        return 0
    if word in {"version", "--version"}:
        return _version(rest)
    if word not in _COMMANDS:
        import difflib

        near = difflib.get_close_matches(word, [*_COMMANDS, "version"], n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        return _fail(f"no command {word!r}{guess} (homespun --help lists them)", 2)
    module, _, attribute = _COMMANDS[word].target.partition(":")
    return _run(word, getattr(importlib.import_module(module), attribute), rest)


def _run(word: str, target: typer.Typer | Callable[..., Any], rest: Sequence[str]) -> int:
    import click
    import typer

    class Formatter(click.HelpFormatter):
        """Typer escapes brackets for Rich, also where help is printed without it."""

        def write(self, string: str) -> None:
            super().write(string.replace("\\[", "["))

    click.Context.formatter_class = Formatter
    if isinstance(target, typer.Typer):
        app = target
    else:
        app = typer.Typer(add_completion=False)
        app.command()(target)
    try:
        # Not standalone: Typer's own handler prints tracebacks with local variables, which may be user data.
        result = typer.main.get_command(app).main(list(rest), f"homespun {word}", standalone_mode=False)
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else f"homespun {word}"
        return _fail(f"{error.format_message()} ({path} --help shows how)", error.exit_code)
    if result == 130:  # what Typer makes of an interrupt, without a word
        raise KeyboardInterrupt
    return result if type(result) is int else 0


def _help() -> str:
    rows = {name: command.summary for name, command in _COMMANDS.items()}
    rows["version"] = "versions, and the digest of the code that goes into the Flower bundle"
    lines = "\n".join(f"  {name:<9} {summary}" for name, summary in rows.items())
    return (
        "Usage: homespun COMMAND ...\n\n"
        "Personalize a language model for every user without taking the user's text.\n\n"
        f"{lines}\n\n"
        "`homespun COMMAND --help` says more about one of them.\n"
        "Exit codes: 0 done, 1 failed, 2 usage, 3 refused on purpose, 4 evidence fails.\n"
    )


def _version(rest: Sequence[str]) -> int:
    import json
    import platform
    from importlib import metadata

    from common.places import state_home
    from common.source import source_digest

    if not set(rest) <= {"--json"}:
        return _fail("version takes no argument but --json", 2)
    facts: dict[str, str | None] = {
        "homespun": __version__,
        "source": source_digest(_FOLDER),
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "peft", "flwr", "dp-accounting"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    facts["state"] = str(state_home())
    if rest:
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        sys.stdout.writelines(f"{name:<14} {value or 'not installed'}\n" for name, value in facts.items())
    return 0


def _explain(error: Exception, word: str) -> int:
    """Say in one line what went wrong; never the text of an exception that is not ours, it may hold user data."""
    from common.errors import HomespunError

    if isinstance(error, HomespunError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] not in _ROLES:
        extra = _COMMANDS[word].extra if word in _COMMANDS else ""
        package = f"homespun[{extra}]" if extra else "homespun"
        remedy = "make setup" if (_FOLDER / "pyproject.toml").exists() else f"pip install '{package}'"
        return _fail(f"{word} needs {error.name.partition('.')[0]}, which is not installed: {remedy}", 1)
    if isinstance(error, OSError) and error.strerror:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1)
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else ""
    return _fail(f"unexpected {type(error).__name__}{where}; HOMESPUN_DEBUG=1 shows the traceback", 1)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"homespun: {message}\n")
    return code


# ----------------------------------------------------------------------------------------------------------------------
# The Python API. A caller may have a `common`, a `client` or a `server` of their own, imported already, so nothing of
# ours is imported here: what needs our code is asked of a child process, `homespun` itself, which answers in JSON.


class HomespunError(Exception):
    """Something went wrong that a person can act on; `str(error)` says what, in one line."""


class ConfigError(HomespunError, ValueError):
    """What was asked for cannot be done; `problems` holds every reason found, one line each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Keep `problems`, a line or several, and join them into the message."""
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


class Refusal(HomespunError):
    """A no on purpose, such as an epsilon that would not be true or a budget that is spent."""


class VerificationError(HomespunError):
    """Evidence does not check out."""


class RunConfig:
    """What a run does and what it promises: the keys of `homespun sim run --help`, with the defaults that stand there.

    Names are checked here; values are checked, all of them at once, when the configuration is used.

    Attributes:
        values: The keys that were given.
    """

    # fmt: off
    def __init__(
        self, *, model: Any = None, data: Any = None, user_column: Any = None, text_column: Any = None,
        time_column: Any = None, users: Any = None, max_tokens: Any = None, method: Any = None, rounds: Any = None,
        cohort: Any = None, local_steps: Any = None, local_batch: Any = None, optimizer: Any = None,
        learning_rate: Any = None, server_learning_rate: Any = None, server_momentum: Any = None,
        server_optimizer: Any = None, server_adaptivity: Any = None, rank: Any = None,
        alpha: Any = None, targets: Any = None, shared_layers: Any = None, ranks: Any = None, init_adapter: Any = None,
        update_dtype: Any = None, base_precision: Any = None,
        epsilon: Any = None, delta: Any = None, unit: Any = None, noise: Any = None, coordinator_epsilon: Any = None,
        participation_cap: Any = None, secagg: Any = None, clip: Any = None, clip_quantile: Any = None,
        clip_learning_rate: Any = None, noised_metrics: Any = None, count_share: Any = None, spare_rounds: Any = None,
        example_records: Any = None, private_noise: Any = None,
        as_if_population: Any = None, personal_steps: Any = None, personal_batch: Any = None,
        personal_learning_rate: Any = None, personal_rank: Any = None, proximal_weight: Any = None,
        levels: Any = None, shared_levels: Any = None, context_tokens: Any = None, choice_confidence: Any = None,
        evaluation_users: Any = None, answered: Any = None, metric: Any = None, pooled_steps: Any = None,
        round_timeout: Any = None, evaluate_every: Any = None, availability: Any = None, dropout: Any = None,
        stragglers: Any = None,
        seed: Any = None, rehearsal: Any = None,
        engine: Any = None, ray_address: Any = None, workers: Any = None, chunk: Any = None,
        **unknown: Never,
    ) -> None:
        # fmt: on
        """Keep the keys that are not None.

        Raises:
            ConfigError: There is no such key; all that there are not, with what may have been meant.
        """
        given = {key: value for key, value in locals().items() if key not in ("self", "unknown")}
        if unknown:
            raise ConfigError([_unknown_key(key, given) for key in unknown])
        self.values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}

    def replace(self, **changes: Any) -> RunConfig:
        """Return the same configuration with some keys changed; None takes a key out."""
        return RunConfig(**{**self.values, **changes})

    def flags(self) -> list[str]:
        """Say it as the command line does."""
        words: list[str] = []
        for key, value in self.values.items():
            flag = key.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                listed = isinstance(value, list | tuple)
                words.append(f"--{flag}={','.join(map(str, cast('Sequence[Any]', value))) if listed else value}")
        return words

    def __repr__(self) -> str:
        return f"RunConfig({', '.join(f'{key}={value!r}' for key, value in self.values.items())})"


def _unknown_key(key: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(key, list(known), n=1)
    return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")


class Users:
    """Users and their records, as `load_users` takes them: where they are, or a copy of what was in memory."""

    def __init__(self, name: str, columns: Mapping[str, str], parts: Callable[[], Iterable[str]] | None = None) -> None:
        """Keep what `--data` takes, or the `parts` of a JSONL text in its place, and the keys that name columns."""
        self.name = name
        self.columns = columns
        self._parts = parts

    def __repr__(self) -> str:
        return f"<users: {', '.join([self.name, *(f'{key} {name}' for key, name in self.columns.items())])}>"

    @contextlib.contextmanager
    def on_disk(self, place: Path | None = None, digest: str | None = None) -> Generator[str]:
        """Give what `--data` takes; data in memory lie in a file, which only this OS user can read, while this lasts.

        Args:
            place: Where that file has to be: a run that goes on looks for its data where they were.
            digest: SHA-256 in hex that it has to have.
        """
        if self._parts is None:
            yield self.name
            return
        import hashlib
        import tempfile

        place = place or Path(tempfile.mkdtemp(prefix="homespun-")) / _IN_MEMORY
        _own_folder(place.parent)
        try:
            place.unlink(missing_ok=True)  # of a process that was killed
            found = hashlib.sha256()
            with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                for part in self._parts():
                    found.update(part.encode())
                    file.write(part.encode())
            if digest not in (None, found.hexdigest()):
                raise ConfigError("users: not the data that the run was made from")
            yield str(place)
        finally:
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)
                place.parent.rmdir()


def _own_folder(folder: Path) -> None:
    """Make a folder that only this OS user can enter, unless it is there and is just that."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    private = (found.st_uid, found.st_mode & 0o170077) == (os.getuid(), 0o040000)
    if not private or not folder.name.startswith("homespun-"):
        raise HomespunError(f"{folder}: not a private folder of this user; data are not put there")


_IN_MEMORY = "users-in-memory.jsonl"
_COLUMNS = "user text time times texts examples pairs profile prompt response chosen rejected"
"""What is read of a table besides the columns that are named; it may hold images, or vectors, as well."""


def load_users(source: Any, *, user: str | None = None, text: str | None = None, time: str | None = None) -> Users:
    """Take users from wherever their records are.

    A path is handed on as it is: JSONL, JSON, CSV, TSV, Parquet, a folder of them, LaMP's files, a saved Hugging Face
    data set; so is the name of one on the hub (`owner/name`). Of data in memory a copy is kept: of a pandas DataFrame,
    a Hugging Face Dataset, or a dict of user id -> list of texts, of {"text", "time"}, of {"prompt", "response"} or of
    {"prompt", "chosen", "rejected"}. While a run trains, goes on or looks a user up, they lie in a file that only this
    OS user can read (mode 0600), in a temporary folder that is removed afterwards (unless this process is killed): a
    run's own folder holds adapters and scores, never data. To go on in another session, give `open_run` the same users.

    Args:
        source: A path, a name on the hub, or data in memory.
        user: Tables: the column that names the user; "user" when absent.
        text: Tables: the column with the text; "text", or "prompt" and "response", and so on, when absent.
        time: Tables: the column with the time; "time", where there is one, when absent.

    Raises:
        ConfigError: There is no such file or column, or nothing that can be read as users.
    """
    named = {"user_column": user, "text_column": text, "time_column": time}
    columns = {key: name for key, name in named.items() if name is not None}
    if isinstance(source, Users):
        return source
    if isinstance(source, str | os.PathLike):
        name = os.fspath(cast("str | os.PathLike[str]", source))
        path = Path(name).expanduser().absolute()
        if path.exists():
            return Users(str(path), columns)
        if re.fullmatch(r"[\w.-]+/[\w.-]+([:@].*)?", name) and not path.parent.is_dir():
            return Users(name, columns)  # on the hub
        raise ConfigError(f"{name}: no such file or folder")
    if hasattr(source, "iloc") or hasattr(source, "column_names"):
        return _users_of_table(source, {"user_column": "user", **columns})
    if not isinstance(source, Mapping) or columns:
        raise ConfigError("users: a path, a DataFrame, a Dataset, or a dict without column names is expected")
    people = cast("Mapping[object, object]", source)
    lines = [_line_of_person(number, *person) for number, person in enumerate(people.items(), start=1)]
    return Users(f"{len(lines):,} users in memory", {}, lambda: lines)


def _users_of_table(table: Any, columns: Mapping[str, str]) -> Users:
    """Take the rows of a DataFrame, as they are now, or of a Hugging Face Dataset, which never changes."""
    if isinstance(table, Mapping):
        raise ConfigError(f"users: choose a split of the data set: {', '.join(cast('Mapping[str, Any]', table))}")
    is_frame = hasattr(table, "iloc")
    there: list[Any] = list(table.columns if is_frame else table.column_names)
    absent = [name for name in columns.values() if name not in there]
    if absent:
        shown = ", ".join(map(str, there[:30]))
        raise ConfigError([f"users: no column {name!r}; columns there: {shown}" for name in absent])
    needed = [name for name in there if name in (*_COLUMNS.split(), *columns.values())]

    def lines(frame: Any) -> str:
        return frame.to_json(orient="records", lines=True, date_format="iso", date_unit="us", double_precision=15)

    name = f"{len(table):,} rows in memory"
    if is_frame:
        copy = lines(table[needed])
        return Users(name, columns, lambda: [copy])
    return Users(name, columns, lambda: map(lines, table.select_columns(needed).to_pandas(batched=True)))


def _line_of_person(number: int, name: object, records: object) -> str:
    """Write one user as a line of JSON; `number` is all that an error may say about them."""
    import json

    items = cast("list[Any]", records) if isinstance(records, list | tuple) else []
    person: dict[str, Any] = {"user": name if isinstance(name, str | int) else str(name)}
    if items and all(isinstance(item, str) for item in items):
        person |= {"texts": items}
    elif items and all(isinstance(item, Mapping) for item in items):
        fields = [field for field in ("text", "chosen", "response") if all(field in item for item in items)]
        if fields[:1] == ["text"]:
            person |= {"texts": [item["text"] for item in items], "times": [item.get("time") for item in items]}
        elif fields:
            person |= {"pairs" if fields[0] == "chosen" else "examples": items}
    if len(person) == 1:
        raise ConfigError(f"users: user {number} has no list of texts, or of records of one kind")
    return json.dumps(person, default=str) + "\n"


class _Facts:
    """What a command has found out; `facts` holds all of it by name, and so does the object itself."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """Wrap what was printed as JSON, which has no infinite numbers."""
        self.facts = {name: float("inf") if value == "inf" else value for name, value in facts.items()}

    def __getattr__(self, name: str) -> Any:
        if name == "facts" or name not in self.facts:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return self.facts[name]

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self.facts]

    def __repr__(self) -> str:
        return str(self)


class Plan(_Facts):
    """What a configuration would do, before anything is trained: noise, the signal against it, a verdict."""

    def __str__(self) -> str:
        return self.text


class Statement(_Facts):
    """What a run may say about privacy: a `sentence`, with `epsilon`, `delta`, `unit`, `adjacency` and more by name.

    It is no number, and cannot be made one: epsilon means nothing without the rest.
    """

    def __str__(self) -> str:
        return self.sentence


class Comparison(_Facts):
    """A run against another, paired by user; gains are positive where the run is better than the other."""

    def frame(self) -> pandas.DataFrame:
        """One row per metric and pair of systems; `_low` and `_high` are the ends of an interval."""
        import pandas

        return pandas.DataFrame(self.differences)

    def _gains(self) -> pandas.DataFrame:
        frame = self.frame()
        shown = ["system", "reference_system", "users", "gain", "gain_low", "gain_high", "helped", "harmed", "verdict"]
        return frame.loc[frame["metric"] == frame["metric"][0], shown]

    def __str__(self) -> str:
        return f"{self.sentence}\n{self._gains().to_string(index=False)}"

    def _repr_html_(self) -> str:
        import html

        return f"<p>{html.escape(self.sentence)}</p>{self._gains().to_html(index=False)}"


class Round(dict[str, Any]):
    """What a round did, by name, as in the run's `rounds.jsonl`; `print` shows the gist."""

    def __str__(self) -> str:
        spent = self["epsilon_spent"]
        parts = [f"round {self['round']}", f"epsilon {spent if spent == 'inf' else format(spent, '.2f')} spent so far"]
        if "evaluation" in self:
            parts.append("global {global:.4f} nats per token, base {base:.4f}".format_map(self["evaluation"]))
        return ", ".join(parts)


_OnRound = Callable[[Round], object]
_OnPersonal = Callable[[int, int], object]


class Run:
    """A run's folder, as `homespun sim show` takes it; everything is read from there when it is asked for."""

    def __init__(self, path: Path, users: Users | None = None) -> None:
        """Look at the run in `path`; `users` are needed where it was made from data in memory."""
        self.path = path
        self._users = users

    @property
    def finished(self) -> bool:
        """Whether all rounds are done and users are scored; otherwise `resume` goes on."""
        return (self.path / "summary.json").is_file()

    @property
    def config(self) -> RunConfig:
        """The configuration, every key resolved."""
        return RunConfig(**self._keys)

    @property
    def rounds(self) -> list[Round]:
        """The rounds that are done."""
        import json

        lines = (self.path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        return [Round(json.loads(line)) for line in lines if line.endswith("}")]  # a kill may leave half a line

    @property
    def statement(self) -> Statement:
        """What the run may say about privacy, priced from its ledger."""
        return Statement(self._read("statement.json"))

    @property
    def report(self) -> Path:
        """The page that people read: one HTML file that needs nothing else."""
        return self.path / "report.html"

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        done, asked = len(self.rounds), self._keys["rounds"]
        return f"finished, {done} rounds" if self.finished else f"not finished, {done} of {asked} rounds are done"

    def users(self, split: str = "test") -> pandas.DataFrame:
        """Read the scores, one row per user and system. Users are numbers: their places in the data, if all take part.

        Args:
            split: Records that were scored, "test" or "validation".
        """
        import pandas

        self._read("summary.json")
        frame = pandas.read_parquet(self.path / "users.parquet")
        return frame.loc[frame["split"] == split].drop(columns="split").reset_index(drop=True)

    def resume(self, on_round: _OnRound | None = None, on_personal: _OnPersonal | None = None) -> Run:
        """Go on where the run was interrupted, with the budget it has spent; does nothing when it is finished.

        Args:
            on_round: As for `simulate`.
            on_personal: As for `simulate`.
        """
        if not self.finished:
            with self._data_in_place():
                _follow(self, ["sim", "resume", str(self.path)], on_round, on_personal)
        return self

    def load(self, user: str | int | None = None, system: str = "both") -> tuple[Any, Any]:
        """Open a model as whoever has Transformers and PEFT does; "base" and "global" need no user.

        Args:
            user: A user's id in the data, or number in the run.
            system: "both" (shared and private adapter in one), "private", "global" or "base".

        Returns:
            A `peft.PeftModel` (for "base", the base model itself) in evaluation mode, and the tokenizer.

        Raises:
            ConfigError: The run has no such system, or no user was named.
            HomespunError: The run has no such user, or is not finished.
        """
        import tempfile

        with tempfile.TemporaryDirectory(prefix="homespun-") as folder:
            adapter = None if system == "base" else self._adapter(user, system, Path(folder))
            import torch
            from peft import PeftModel
            from transformers import AutoModelForCausalLM, AutoTokenizer

            name = self._keys["model"]
            base = _FOLDER / "simulations" / "worlds" / "base" if name == "built-in" else Path(name)
            model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
            if adapter is not None:
                model = PeftModel.from_pretrained(model, adapter)
        return model.eval(), AutoTokenizer.from_pretrained(base, local_files_only=True)

    def compare(self, other: Run | str | os.PathLike[str]) -> Comparison:
        """Compare this run with another on the same users, user by user, with intervals.

        Raises:
            ConfigError: Their users or records are not the same.
        """
        reference = other if isinstance(other, Run) else open_run(other)
        return Comparison(_ask(["sim", "compare", str(reference.path), str(self.path), "--json"]))

    def _adapter(self, user: str | int | None, system: str, folder: Path) -> Path:
        """Find a PEFT folder; what is a user's own is written under `folder`."""
        self._read("summary.json")
        if system == "global" and (self.path / "global").is_dir():
            return self.path / "global"
        if user is None:
            raise ConfigError(f"user: whose {system} model? as in load('alice', {system!r})")
        with self._data_in_place():
            words = ["sim", "export", str(self.path), f"--user={user}", f"--out={folder / 'adapters'}", "--json"]
            written: dict[str, str] = _ask(words)
        if system not in written:
            raise ConfigError(f"system: no {system!r} here; there are {', '.join(['base', *written])}")
        return Path(written[system])

    @contextlib.contextmanager
    def _data_in_place(self) -> Generator[None]:
        """Put data that were in memory back where the run looks for them, while this lasts."""
        place = Path(self._keys["data"])
        if place.name != _IN_MEMORY:
            yield
        elif self._users is None:
            raise ConfigError(
                f"users: {self.path} was made from data in memory; open_run(path, users) takes them again"
            )
        else:
            with self._users.on_disk(place, self._read("data.json")["digest"]):
                yield

    @property
    def _keys(self) -> dict[str, Any]:
        import tomllib

        return tomllib.loads((self.path / "config.toml").read_text(encoding="utf-8"))

    def _read(self, name: str) -> dict[str, Any]:
        import json

        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise HomespunError(f"{self.path}: {self.state}; run.resume() goes on") from None

    def __repr__(self) -> str:
        return f"<run {self.path}: {self.state}>"

    def _repr_html_(self) -> str:
        """Show the first table of the report, without its drawings, and the claim."""
        import html

        page = self.report.read_text(encoding="utf-8") if self.finished else ""
        table = re.search("<table.*?</table>", page, re.DOTALL)
        if table is None:
            return f"<p>{html.escape(repr(self))}</p>"
        return re.sub("<svg.*?</svg>", "", table[0], flags=re.DOTALL) + f"<p>{html.escape(self.statement.sentence)}</p>"


def open_run(path: str | os.PathLike[str] | None = None, users: Any = None) -> Run:
    """Open a run that exists.

    Args:
        path: Its folder, or its name under runs/; the newest there when absent.
        users: What it was made from, where that was data in memory and the run goes on or looks a user up.

    Raises:
        ConfigError: There is no run.
    """
    own = Path("runs")
    if path is None:
        found = [file for file in own.glob("*/config.toml") if not file.parent.is_symlink()]
        folders = [file.parent for file in sorted(found, key=lambda file: file.stat().st_mtime)[-1:]]
    else:
        folders = [folder for folder in (Path(path), own / path) if (folder / "config.toml").is_file()]
    if not folders:
        raise ConfigError(f"{own if path is None else os.fspath(path)}: no run in this folder; simulate(...) makes one")
    return Run(folders[0].absolute(), None if users is None else load_users(users))


def plan(config: RunConfig | None = None, users: Any = None) -> Plan:
    """Say what a configuration's budget allows; trains nothing.

    Args:
        config: What is to be done; every default when absent.
        users: What `load_users` takes or gives; what the configuration says when absent.

    Raises:
        ConfigError: Something cannot be used; every problem is listed.
        Refusal: The promise could not be kept.
    """
    with _flags(config or RunConfig(), None if users is None else load_users(users)) as flags:
        return Plan(_ask(["plan", *flags, "--json"]))


def simulate(
    config: RunConfig | None = None,
    users: Any = None,
    *,
    out: str | os.PathLike[str] | None = None,
    on_round: _OnRound | None = None,
    on_personal: _OnPersonal | None = None,
) -> Run:
    """Train a population as `homespun sim run` does: shared rounds, then personal models for a sample, then the report.

    An interrupt (Ctrl-C, a notebook's stop button) lets the round in hand end and returns the unfinished run, which
    `run.resume()` continues; a second interrupt stops at once, and `open_run().resume()` continues.

    Args:
        config: What is to be done; every default when absent.
        users: What `load_users` takes or gives; what the configuration says when absent.
        out: Folder of the run; runs/<method>-<time> when absent.
        on_round: Called after every round; `print` will do. What it raises ends the run after the round in hand.
        on_personal: Called as personal models are done, with how many are and how many there will be.

    Raises:
        ConfigError: Something cannot be used; every problem is listed, and nothing was written.
        Refusal: The promise could not be kept.
        HomespunError: It went wrong on the way; `open_run(...).resume()` may go on.
    """
    config, people = config or RunConfig(), None if users is None else load_users(users)
    with _flags(config, people) as flags:
        run = Run(Path(out).absolute() if out is not None else _new_folder(config), people)
        _follow(run, ["sim", "run", *flags, f"--out={run.path}"], on_round, on_personal)
    return run


@contextlib.contextmanager
def _flags(config: RunConfig, users: Users | None) -> Generator[list[str]]:
    """Say a configuration and its users as the command line does, with data in memory on disk while this lasts."""
    if users is None:
        yield config.flags()
        return
    twice = [key for key in ("data", "user_column", "text_column", "time_column") if key in config.values]
    if twice:
        raise ConfigError([f"{key}: stands in the configuration, and users are given as well" for key in twice])
    with users.on_disk() as source:
        yield config.replace(data=source, **users.columns).flags()


def _new_folder(config: RunConfig) -> Path:
    """Name a run after its method and the time, as the command line does."""
    import itertools
    import time

    method = re.sub(r"[^a-z0-9-]", "", str(config.values.get("method", "dual")).lower())
    name = f"{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := Path("runs", name).absolute()).exists())


def _ask(words: Sequence[str]) -> Any:
    """Run a command to its end and return the JSON that it prints."""
    import json

    printed: list[str] = []
    code, message = _child(words, printed.append)
    if code != 0:
        raise _error(code, message)
    return json.loads("".join(printed))


def _follow(run: Run, words: Sequence[str], on_round: _OnRound | None, on_personal: _OnPersonal | None) -> None:
    """Run a command that trains and hand on what it tells; return when it has ended or was interrupted."""
    import json
    import signal

    def tell(line: str) -> None:
        event = json.loads(line)
        kind = event.pop("event")
        if kind == "round" and on_round is not None:
            on_round(Round(event))
        elif kind == "personal" and on_personal is not None:
            on_personal(event["done"], event["total"])
        elif kind == "note":
            sys.stderr.write(f"homespun: {event['text']}\n")

    ours = words[1] == "resume" or not (run.path / "config.toml").exists()
    code, message = _child([*words, "--events"], tell, patient=True)
    begun = ours and (run.path / "config.toml").exists()
    if code in (130, -signal.SIGINT):
        if not begun:
            raise KeyboardInterrupt
        sys.stderr.write(f"homespun: interrupted: {run.state}; run.resume() goes on\n")
    elif code != 0:
        raise _error(code, f"{message} (the run is in {run.path})" if begun else message)


def _child(words: Sequence[str], on_line: Callable[[str], object], *, patient: bool = False) -> tuple[int, str]:
    """Run `homespun` in a process of its own; return its exit code and its last words.

    The process has a session of its own, so that an interrupt reaches it through here alone. Where the caller is
    `patient`, the first interrupt is handed on and waited for.
    """
    import signal
    import subprocess
    import tempfile

    interrupts = 0

    def interrupt(*_: object) -> None:
        nonlocal interrupts
        interrupts += 1
        process.send_signal(signal.SIGINT)
        if not patient or interrupts > 1:
            raise KeyboardInterrupt
        with contextlib.suppress(RuntimeError):  # it may be a write that was interrupted
            sys.stderr.write("homespun: finishing the round in hand; interrupt again to stop at once\n")

    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", str(Path(__file__).resolve()), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            start_new_session=True,
        ) as process,
    ):
        try:
            with _handling_interrupts(interrupt):
                for line in process.stdout or ():
                    on_line(line)
                code = process.wait()
        except BaseException as error:
            _end(process, asked=interrupts > 0, seconds=10 if isinstance(error, KeyboardInterrupt) else None)
            raise
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if os.environ.get("HOMESPUN_DEBUG") == "1":
        sys.stderr.write(said)
    lines = [line for line in said.splitlines() if line.startswith("homespun: ")]
    return code, lines[-1].removeprefix("homespun: ") if lines else f"homespun {words[0]} ended with code {code}"


@contextlib.contextmanager
def _handling_interrupts(handler: Callable[..., None]) -> Generator[None]:
    """Handle SIGINT by `handler`, where that can be done and nobody has chosen to ignore it."""
    import signal
    import threading

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(process: subprocess.Popen[str], *, asked: bool, seconds: float | None) -> None:
    """End a process that nobody listens to any more: after the round in hand, for which it has `seconds`."""
    import signal
    import subprocess

    try:
        if not asked:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=seconds)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
        process.wait()


def _error(code: int, message: str) -> HomespunError:
    """Make an exit code the exception that it stands for."""
    if code == 2:
        # One line holds all problems, and each begins with the key that it is about.
        keys = "|".join(RunConfig.__init__.__kwdefaults__ or ())
        return ConfigError(re.split(rf"; (?=(?:{keys})(?:\.\d+)?: )", message))
    return {3: Refusal, 4: VerificationError}.get(code, HomespunError)(message)


if __name__ == "__main__":
    sys.exit(main())
