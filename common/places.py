"""Where Homespun keeps things on this machine.

`$HOMESPUN_HOME` moves all of it to one folder; otherwise the folders of the XDG Base Directory
Specification 0.8 are used. Functions say where; they create nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["cache_home", "runtime_home", "state_home"]


def state_home(environment: Mapping[str, str] | None = None) -> Path:
    """Return the folder of what must survive: keys, ledgers, private adapters, device and server state.

    Args:
        environment: Variables to read; those of this process when absent.
    """
    return _place("XDG_STATE_HOME", Path(".local/state"), "", environment)


def cache_home(environment: Mapping[str, str] | None = None) -> Path:
    """Return the folder of what can be made again.

    Args:
        environment: Variables to read; those of this process when absent.
    """
    return _place("XDG_CACHE_HOME", Path(".cache"), "cache", environment)


def runtime_home(environment: Mapping[str, str] | None = None) -> Path:
    """Return the folder of sockets and locks, which do not outlive a boot where the platform has such a place.

    Args:
        environment: Variables to read; those of this process when absent.
    """
    variables = os.environ if environment is None else environment
    if not variables.get("HOMESPUN_HOME") and not _absolute(variables.get("XDG_RUNTIME_DIR")):
        return state_home(variables) / "run"
    return _place("XDG_RUNTIME_DIR", Path(), "run", variables)


def _place(variable: str, default: Path, part: str, environment: Mapping[str, str] | None) -> Path:
    variables = os.environ if environment is None else environment
    if own := variables.get("HOMESPUN_HOME"):
        return Path(own).expanduser().absolute() / part
    # The specification: a variable that is not an absolute path is to be ignored.
    base = _absolute(variables.get(variable)) or Path.home() / default
    return base / "homespun"


def _absolute(value: str | None) -> Path | None:
    return Path(value) if value and Path(value).is_absolute() else None
