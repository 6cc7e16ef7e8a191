"""Every error that Homespun raises on purpose.

::

    HomespunError
    ├── ConfigError         a configuration that cannot be used; lists every problem at once   exit 2
    ├── DataError           a file that cannot be read as what it claims to be                 exit 1
    ├── StoreError          private state that cannot be opened, or not with this key          exit 1
    ├── Refusal             a no on purpose, with a code that may leave the device             exit 3
    │   ├── ClaimRefused    the configuration's epsilon would not be true
    │   ├── BudgetSpent     the release would exceed what the owner or the run granted
    │   └── GateRefused     something tried to leave that is not in the release spec
    └── VerificationError   evidence does not check out; names the first bad entry             exit 4

`ValueError` is left for a programmer's mistake. No message here ever holds user data: names, counts, shapes and
line numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BudgetSpent",
    "ClaimRefused",
    "ConfigError",
    "DataError",
    "GateRefused",
    "HomespunError",
    "Refusal",
    "StoreError",
    "VerificationError",
]


class HomespunError(Exception):
    """Something went wrong that a person can act on; `str(error)` says what, in one line."""

    exit_code = 1


class ConfigError(HomespunError):
    """A configuration that cannot be used.

    Attributes:
        problems: Every problem found, one line each; never only the first.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Keep `problems`, a line or several, and join them into the message."""
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


class DataError(HomespunError):
    """A file or folder that cannot be read as what it claims to be; names file and line or field, never content."""


class StoreError(HomespunError):
    """Private state that is missing, damaged, or sealed under another key."""


class Refusal(HomespunError):
    """A no on purpose.

    Attributes:
        code: A word from a closed list. It is all that a device tells a server about the reason.
    """

    exit_code = 3

    def __init__(self, code: str, reason: str) -> None:
        """Refuse with `code`, which may leave the device, and `reason`, which is for the owner."""
        self.code = code
        super().__init__(reason)


class ClaimRefused(Refusal):
    """The configuration's epsilon would not be true, so it does not start."""

    def __init__(self, reason: str) -> None:
        """Refuse the claim for `reason`."""
        super().__init__("claim-refused", reason)


class BudgetSpent(Refusal):
    """The release would exceed the budget that was granted; nothing was sent."""

    def __init__(self, reason: str) -> None:
        """Refuse the release for `reason`."""
        super().__init__("budget-spent", reason)


class GateRefused(Refusal):
    """Something tried to leave that is not in the release spec; nothing was sent."""

    def __init__(self, reason: str) -> None:
        """Refuse the release for `reason`."""
        super().__init__("gate-refused", reason)


class VerificationError(HomespunError):
    """Evidence that does not check out; a verifier raises nothing else.

    Attributes:
        entry: Index of the first bad entry, or None where the fault is not in one entry.
    """

    exit_code = 4

    def __init__(self, reason: str, entry: int | None = None) -> None:
        """Reject the evidence for `reason`, at `entry` where one is to blame."""
        self.entry = entry
        super().__init__(reason if entry is None else f"entry {entry}: {reason}")
