"""Our C code on this machine: compiled once, as Python compiles its own files, and loaded.

A library lies beside its source where that can be written, else in the cache folder, under a name that says what it was
compiled from, by what and for which processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.places import cache_home

__all__ = ["compiled", "compiler", "load_library", "processor"]

# Nothing that lets a compiler drop a NaN, and not -ffast-math, which changes denormals for the whole process.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
NATIVE = ("-march=native",)
COMPILE_SECONDS = 300


def compiler() -> str | None:
    """The C compiler of this machine; None where there is none."""
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")


def compiled(source: Path, *included: Path) -> Path:
    """The shared library of `source`, which includes the files `included`; compiled unless that was done before.

    Raises:
        OSError: There is no compiler, or nowhere to put what it makes.
        subprocess.SubprocessError: The compiler refuses.
    """
    program = compiler()
    if program is None:
        raise OSError("there is no C compiler")
    text = b"".join(path.read_bytes() for path in (source, *included))
    told = "\n".join([program, platform.machine(), platform.system(), processor(), *FLAGS, *NATIVE]).encode()
    name = f"{source.stem}-{hashlib.sha256(text + told).hexdigest()[:24]}.so"
    places = [source.with_name("__pycache__"), cache_home() / "kernels"]
    for place in places:
        if _is_ours(place / name, source):
            return place / name
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=place) as folder:  # workers may do this at the same time
                fresh = Path(folder) / name
                _compile(program, source, fresh)
                fresh.chmod(0o500)
                fresh.replace(place / name)
        except OSError:
            continue
        return place / name
    raise OSError("nowhere to put the compiled kernels")


def load_library(path: Path, signatures: Mapping[str, list[Any]], *, returning: tuple[str, ...] = ("",)) -> ctypes.CDLL:
    """Load what was compiled; functions whose names begin with one of `returning` return an int, the others nothing.

    Raises:
        OSError: It cannot be loaded.
        AttributeError: It lacks a function.
    """
    library = ctypes.CDLL(str(path))
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int if name.startswith(returning) else None
    return library


def processor() -> str:
    """What the processor can do: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((line for line in lines if line.startswith(word)), "") for word in ("model name", "flags"))


def _is_ours(path: Path, origin: Path) -> bool:
    """Whether a library was put there by us, or by whoever installed the source, and nobody else can change it."""
    try:
        facts, source = path.stat(), origin.stat()
    except OSError:
        return False
    return facts.st_uid in (os.getuid(), source.st_uid) and not facts.st_mode & 0o022


def _compile(program: str, source: Path, to: Path) -> None:
    for flags in ((*FLAGS, *NATIVE), FLAGS):  # a compiler may not know this processor by name
        ended = subprocess.run(  # noqa: S603 - the machine's own compiler on our own source
            [program, *flags, str(source), "-o", str(to), "-lm"],
            capture_output=True, check=False, timeout=COMPILE_SECONDS,
        )  # fmt: skip
        if ended.returncode == 0:
            return
    raise subprocess.SubprocessError("the compiler refused")
