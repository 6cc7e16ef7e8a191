"""Input levels in the forward pass of the shared steps: where a claim covers them, and where it is refused.

A retrieved record, a line of a profile, a soft prompt or a style vector is made from the user's other records. Where a
user's whole update is clipped (unit user), all of that is inside the clip. Where each record's gradient is clipped
(unit example), it carries other records into a record's own forward pass: one record moves many clipped gradients, and
the clip of one bounds none of that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from common.errors import ClaimRefused, ConfigError, Refusal

__all__ = ["CARRIED", "check_shared_levels", "shared_levels_of"]

CARRIED = {
    "retrieval": "other records of the user stand in the prompt of each",
    "profile": "lines made from all records of the user stand in the prompt of each",
    "soft-prompt": "a prefix trained on all records of the user stands before each",
    "steering": "a direction computed from all records of the user is added to each",
}
"""Every input level, and how it carries records into each other's forward pass."""

IN_THE_PROMPT = ("retrieval", "profile")
"""What the shared steps can be trained with: text. The other two are trained or computed after the federation."""


def check_shared_levels(levels: Collection[str], unit: str, *, claimed: bool) -> None:
    """Refuse input levels in the shared forward pass where the claim would not be true, or nobody built them.

    Raises:
        ClaimRefused: The unit is one record and something is claimed.
        ConfigError: A level is unknown, or is none that the shared steps can be trained with.
    """
    unknown = [name for name in levels if name not in CARRIED]
    if unknown:
        raise ConfigError(f"shared_levels: {', '.join(unknown)} is unknown; there are {', '.join(CARRIED)}")
    if levels and unit == "example" and claimed:
        reasons = "; ".join(f"{name}: {CARRIED[name]}" for name in levels)
        raise ClaimRefused(
            f"shared_levels with unit example: {reasons}; one record would move the clipped gradients of others, and "
            "no clip bounds that. Use them in the private phase (--levels), where nothing leaves, or claim unit user"
        )
    if untrained := [name for name in levels if name not in IN_THE_PROMPT]:
        raise ConfigError(
            f"shared_levels: {', '.join(untrained)} is made after the federation, so the shared steps cannot be "
            f"trained with it; {' and '.join(IN_THE_PROMPT)} can"
        )


def shared_levels_of(recipe: Mapping[str, float | int | str], unit: str, epsilon: str) -> tuple[str, ...]:
    """Read which input levels a server wants in the forward pass of the shared steps; what a device relies on.

    Args:
        recipe: Of the release spec.
        unit: Whose presence is hidden.
        epsilon: What is claimed, "inf" for nothing.

    Raises:
        ClaimRefused: The unit is one record, so that no clip would bound what they carry over.
        Refusal: A level is none that shared steps are trained with.
    """
    names = tuple(name for name in str(recipe.get("shared_levels", "")).split(",") if name)
    try:
        check_shared_levels(names, unit, claimed=epsilon != "inf")
    except ConfigError:
        raise Refusal("bad-request", "the recipe asks for a level that shared steps are not trained with") from None
    return names
