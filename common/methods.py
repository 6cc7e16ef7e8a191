"""Model-level methods as data: which tensors are shared, which private, and in what order they train.

The trainer, the gate and the server read these rows; none of them knows a method by name. Adding a method is adding a
row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.adapters import Layout
from common.errors import ConfigError

__all__ = ["METHODS", "Method", "method_named"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: Its name here.
        shared: Which factors of the shared adapter leave the device, clipped: "A", "B", or both; empty shares nothing.
        private: Whether a private adapter is trained over the frozen shared one, after it, and stays.
        aliases: What papers call it.
        leaves: What a device sends, in words.
        stays: What it keeps, in words.
        noise: How noise enters what is used: linear where one factor moves, quadratic where both do.
        source: Where it comes from.
    """

    name: str
    shared: frozenset[Literal["A", "B"]]
    private: bool
    aliases: tuple[str, ...]
    leaves: str
    stays: str
    noise: str
    source: str

    def shared_layout(self, layout: Layout) -> Layout:
        """The tensors of `layout` that leave the device, in order."""
        return layout.select(tensor.name for tensor in layout.tensors if _factor(tensor.name) in self.shared)

    def shared_mask(self, layout: Layout) -> NDArray[np.bool_]:
        """Which of the layout's values leave, shape `(layout.size,)`."""
        mask = np.zeros(layout.size, dtype=bool)
        for tensor in self.shared_layout(layout).tensors:
            mask[layout.offsets[tensor.name]] = True
        return mask


def _factor(name: str) -> str:
    return "A" if ".lora_A." in name else "B"


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            name="local",
            shared=frozenset(),
            private=True,
            aliases=("oppu without the shared stage",),
            leaves="nothing",
            stays="a private adapter over the base",
            noise="none",
            source="the local-only baseline of every table",
        ),
        Method(
            name="fedavg",
            shared=frozenset({"A", "B"}),
            private=False,
            aliases=("fedit",),
            leaves="both factors of the shared adapter",
            stays="nothing but the data",
            noise="quadratic: both factors are noised, and the product of the noises enters",
            source="McMahan et al. (2017), arXiv:1602.05629; Zhang et al. (2024), arXiv:2305.05644",
        ),
        Method(
            name="dual",
            shared=frozenset({"A", "B"}),
            private=True,
            aliases=("feddpa-f",),
            leaves="both factors of the shared adapter",
            stays="a private adapter, trained over the frozen shared one after the federation",
            noise="quadratic in the shared part; none in the private part",
            source="Yang et al. (2024), arXiv:2403.19211",
        ),
    )
}
"""The methods that work today, in the order of the documentation."""

PLANNED = ("ffa", "fedsa", "dual-joint", "ditto", "layers", "flexlora")


def method_named(name: str) -> Method:
    """Look a method up.

    Raises:
        ConfigError: It is unknown, or known and not built yet.
    """
    if name in METHODS:
        return METHODS[name]
    known = ", ".join(METHODS)
    if name in PLANNED:
        raise ConfigError(f"method: {name} is not built yet; {known} are")
    raise ConfigError(f"method: {name} is unknown; choose from {known}")
