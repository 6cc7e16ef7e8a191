"""Model-level methods as data: what leaves a device, what stays on it, in what order they train, how sums are used.

The trainer, the gate and the server read these rows; none of them knows a method by name. Adding a method is adding a
row. What a row means for the tensors of one base is `common.split`.

================  ==================  ===================  =================================  ===================
row               leaves              stays                trained in a round                 server
================  ==================  ===================  =================================  ===================
local             nothing             an adapter           nothing                            nothing
fedavg            A and B             nothing              A and B                            mean
ffa               B                   nothing              B; A is public and frozen          mean
fedsa             A                   B                    A and B in one step                mean
dual              A and B             an adapter           A and B; the adapter afterwards    mean
dual-joint        A and B             a second adapter     both adapters in one step          mean
ditto             A and B             a copy of A and B    A and B, then the copy             mean
layers            lower layers        upper layers         all in one step (FedPer)           mean
layers-by-turns   lower layers        upper layers         upper, then lower (FedRep)         mean
flexlora          products B A        nothing              A and B of the device's own rank   mean, cut to a rank
================  ==================  ===================  =================================  ===================

What a server does with the noised mean afterwards (momentum, Adam, a cut to a rank) is post-processing and free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import ClaimRefused, ConfigError, GateRefused

__all__ = ["METHODS", "Method", "method_named"]

Transform = Callable[[NDArray[np.float64]], NDArray[np.float64]]
Sends = Literal["nothing", "A and B", "A", "B", "lower layers", "products"]
Keeps = Literal["nothing", "adapter", "B", "upper layers", "second adapter", "copy"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: Its name here.
        sends: What leaves the device, clipped and noised.
        keeps: What is trained on the device and stays there.
        aliases: What papers call it.
        leaves: What a device sends, in words.
        stays: What it keeps, in words.
        noise: How noise enters what is used: linear where one factor moves, quadratic where both do.
        source: Where it comes from.
        by_turns: Whether what stays is trained before what leaves, each with the other frozen, rather than together.
        transform: What a device does to its update before the clip, shape `(1, sent)` to the same.
    """

    name: str
    sends: Sends
    keeps: Keeps
    aliases: tuple[str, ...]
    leaves: str
    stays: str
    noise: str
    source: str
    by_turns: bool = False
    transform: Transform | None = None

    @property
    def shared(self) -> bool:
        """Whether anything leaves."""
        return self.sends != "nothing"

    @property
    def private(self) -> bool:
        """Whether a user ends up with anything of their own."""
        return self.keeps != "nothing"

    @property
    def remembers(self) -> bool:
        """Whether a device keeps what stays from round to round."""
        return self.keeps not in ("nothing", "adapter")

    @property
    def private_in_pass(self) -> bool:
        """Whether what stays lies in the forward pass that trains what leaves."""
        return self.keeps in ("B", "upper layers", "second adapter")

    @property
    def aggregation(self) -> str:
        """What the server does with the noised sum, in words."""
        if not self.shared:
            return "nothing"
        return "mean, cut to the rank by SVD" if self.sends == "products" else "mean"

    def transformed(self, update: NDArray[np.float64]) -> NDArray[np.float64]:
        """One user's update, shape `(sent,)`, after the row's own transform, shape `(1, sent)`.

        Raises:
            GateRefused: It is another shape: two rows would be clipped as two users', and move a sum by twice a clip.
        """
        row = update[np.newaxis]
        if self.transform is None:
            return row
        changed = self.transform(row)
        if np.shape(changed) != row.shape:
            raise GateRefused(f"the row's transform makes shape {np.shape(changed)} of an update of shape {row.shape}")
        return changed

    def check_claim(self, unit: str, *, private_noise: bool) -> None:
        """Refuse a promise that would not be true of this method.

        Where a user's whole update is clipped, whatever happened on the device is inside the clip. Where each record's
        gradient is clipped, a private part that was fitted to the records without noise, in the same forward pass,
        carries every record into every other record's gradient: the clip bounds none of it.

        Raises:
            ClaimRefused: The unit is one record, and what stays is in the forward pass without noise of its own.
        """
        if unit == "example" and self.private_in_pass and not private_noise:
            raise ClaimRefused(
                f"method {self.name} with unit example: its private part ({self.stays}) is in the forward pass of what "
                "is sent, so one record would move other records' gradients too, and no clip bounds that; "
                "--private-noise trains that part by DP-SGD as well, `dual` and `ditto` train theirs outside the pass"
            )


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            name="local",
            sends="nothing",
            keeps="adapter",
            aliases=("oppu without the shared stage",),
            leaves="nothing",
            stays="a private adapter over the base",
            noise="none",
            source="the local-only baseline of every table",
        ),
        Method(
            name="fedavg",
            sends="A and B",
            keeps="nothing",
            aliases=("fedit",),
            leaves="both factors of the shared adapter",
            stays="nothing but the data",
            noise="quadratic: both factors are noised, and the product of the noises enters",
            source="McMahan et al. (2017), arXiv:1602.05629; Zhang et al. (2024), arXiv:2305.05644",
        ),
        Method(
            name="ffa",
            sends="B",
            keeps="nothing",
            aliases=("ffa-lora",),
            leaves="B of the shared adapter; A is drawn from the run's public seed, alike on every device, and frozen",
            stays="nothing but the data",
            noise="linear: A is fixed, so the noise on B enters once",
            source="Sun et al. (2024), arXiv:2403.12313",
        ),
        Method(
            name="fedsa",
            sends="A",
            keeps="B",
            aliases=("fedsa-lora",),
            leaves="A of every layer",
            stays="B of every layer, trained with A and kept from round to round",
            noise="linear: the noise on A enters once, through a B that carries none",
            source="Guo et al. (2025), arXiv:2410.01463",
        ),
        Method(
            name="dual",
            sends="A and B",
            keeps="adapter",
            aliases=("feddpa-f", "oppu"),
            leaves="both factors of the shared adapter",
            stays="a private adapter, trained over the frozen shared one after the federation",
            noise="quadratic in the shared part; none in the private part",
            source="Yang et al. (2024), arXiv:2403.19211",
        ),
        Method(
            name="dual-joint",
            sends="A and B",
            keeps="second adapter",
            aliases=("feddpa-t",),
            leaves="both factors of the shared adapter",
            stays="a second adapter beside it, trained in the same steps and kept from round to round",
            noise="quadratic in the shared part; none in the private part",
            source="Yang et al. (2024), arXiv:2403.19211",
        ),
        Method(
            name="ditto",
            sends="A and B",
            keeps="copy",
            aliases=("ditto-lora", "mr-mtl"),
            leaves="both factors of the shared adapter",
            stays="a copy of it, trained by itself and pulled towards the shared one by proximal_weight / 2 times the "
            "squared distance, kept from round to round",
            noise="quadratic in the shared part; the copy meets it only as the point that it is pulled to",
            source="Li et al. (2021), arXiv:2012.04221, algorithm 1; Liu et al. (2022), arXiv:2206.07902",
        ),
        Method(
            name="layers",
            sends="lower layers",
            keeps="upper layers",
            aliases=("fedper",),
            leaves="both factors in the lower layers; shared_layers says how many",
            stays="both factors in the upper layers, trained in the same steps and kept from round to round",
            noise="quadratic in the lower layers; none in the upper ones",
            source="Arivazhagan et al. (2019), arXiv:1912.00818",
        ),
        Method(
            name="layers-by-turns",
            sends="lower layers",
            keeps="upper layers",
            aliases=("fedrep",),
            leaves="both factors in the lower layers; shared_layers says how many",
            stays="both factors in the upper layers, trained first, then frozen while the lower ones train",
            noise="quadratic in the lower layers; none in the upper ones",
            source="Collins et al. (2021), arXiv:2102.07078",
            by_turns=True,
        ),
        Method(
            name="flexlora",
            sends="products",
            keeps="nothing",
            aliases=("flex-lora",),
            leaves="the change of the product scaling x B A of every layer, clipped as one vector, whatever the "
            "device's rank",
            stays="nothing but the data, and the rank that the device has",
            noise="linear: it is added to products; more numbers carry it than two factors have",
            source="Bai et al. (2024), arXiv:2402.11505",
        ),
    )
}
"""The methods, in the order of the documentation."""


def method_named(name: str) -> Method:
    """Look a method up.

    Raises:
        ConfigError: It is unknown.
    """
    if name in METHODS:
        return METHODS[name]
    raise ConfigError(f"method: {name} is unknown; choose from {', '.join(METHODS)}")
