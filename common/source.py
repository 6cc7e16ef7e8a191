"""Which source files go into the Flower bundle, and one digest over them.

The digest gives every ledger entry and every peer a name for the code that ran. The same files have the same
digest in the repository, in the wheel, and unpacked from a bundle.
"""

from __future__ import annotations

import hashlib
import tomllib
from importlib import metadata
from pathlib import Path

__all__ = ["bundle_files", "installed_version", "source_digest"]

CLIENT_FILES = ("__init__.py", "app.py", "vault_stub.py", "vault_pb2.py", "vault_pb2_grpc.py")
"""All of `client/` that a server may push. The rest is trusted code, which only the owner installs."""


def bundle_files(folder: Path) -> tuple[str, ...]:
    """List the bundle's source files that exist under `folder`, as sorted POSIX paths relative to it.

    Args:
        folder: Holds `common/`, `client/` and `server/`.
    """
    whole = (path for role in ("common", "server") for path in (folder / role).rglob("*.py"))
    client = (path for name in CLIENT_FILES if (path := folder / "client" / name).is_file())
    return tuple(sorted(path.relative_to(folder).as_posix() for path in (*whole, *client)))


def source_digest(folder: Path | None = None) -> str:
    """Return SHA-256 over names and contents of the bundle's source files, hex.

    Guarantee: two trees have one digest only if their bundle files have the same names and bytes; each part is
    hashed with its length before it, so that no two lists of files read alike.

    Args:
        folder: Holds the roles; that of the running code when absent.
    """
    root = Path(__file__).resolve().parent.parent if folder is None else folder
    digest = hashlib.sha256(b"homespun source 1\n")
    for name in bundle_files(root):
        for part in (name.encode(), (root / name).read_bytes()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def installed_version() -> str:
    """Version of Homespun that runs here: of the wheel, or of the repository whose folders are used in place."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    try:
        return metadata.version("homespun")
    except metadata.PackageNotFoundError:  # unpacked from a bundle
        return "unknown"
