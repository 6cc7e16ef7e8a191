"""The front door: the `homespun` command.

It imports nothing slow and nothing of Homespun's own until it knows what was asked, so that
`homespun audit verify` starts at once on a machine that has neither torch nor Flower.

In the wheel this file is `homespun/__init__.py` and the role folders lie beside it; in the repository
they lie beside it too. Either way their import path is their file path (`common.ledger`), never
`homespun.common.ledger`: no module can be imported under two names.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import typer

__all__ = ["__version__", "main"]

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
        return _fail(f"{error.strerror}: {error.filename}" if error.filename else error.strerror, 1)
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else ""
    return _fail(f"unexpected {type(error).__name__}{where}; HOMESPUN_DEBUG=1 shows the traceback", 1)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"homespun: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
