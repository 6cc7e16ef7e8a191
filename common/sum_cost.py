"""What a run's secure sums cost: bits, bytes, seconds and signal, from public numbers, before anything is run.

Seconds are a fit to the table of docs/performance.md, of one thread; a phone is slower, a busy machine too. Bits and
bytes are exact, but for who drops out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.mask_graph import FULL_GRAPH, neighbours
from common.masks import packed_bytes
from common.secure_sum import CORRUPT, THRESHOLD, SecureSum
from common.wire import ReleaseSpec

__all__ = ["SumCost", "sum_cost"]

ENCODE_SECONDS = 9.3e-8
"""Per coordinate: clip, rotate, round and noise."""

MASK_SECONDS = 1.1e-9
"""Per coordinate and mask."""

CHECK_SECONDS = 4e-4
"""Per device in the round: its three signatures and its shares, on every device."""

UNPACK_SECONDS = 5.6e-9
"""Per coordinate and device, at the coordinator: unpack, add, take the self mask off."""

JOIN_SECONDS = (1.3e-3, 2e-6)
"""Per device at the coordinator, and per device and device."""


@dataclass(frozen=True)
class SumCost:
    """What a round of the expected size costs, and what the noise is worth to each of two adversaries.

    Attributes:
        bits: Width of one coordinate.
        coordinates: Coordinates that are sent, padded to a power of two.
        bytes_up: What a device sends, keys, shares and signatures included.
        bytes_down: What it receives beside the shared vector.
        device_seconds: Processor time of one device, training apart.
        coordinator_seconds: Processor time of the coordinator when nobody drops out.
        coordinator_epsilon: Against the coordinator, of a user at the cap, as text.
        participation_cap: Rounds in which one user takes part at most.
        smallest_cohort: Devices below which a round is called off.
        largest_cohort: Devices above which it is.
        noise_to_central: Published noise over what central noise for the same epsilon would be.
    """

    bits: int
    coordinates: int
    bytes_up: int
    bytes_down: int
    device_seconds: float
    coordinator_seconds: float
    coordinator_epsilon: str
    participation_cap: int
    smallest_cohort: int
    largest_cohort: int
    noise_to_central: float

    def lines(self) -> tuple[str, ...]:
        """Return it as lines of text."""
        against = "no bound" if self.coordinator_epsilon == "inf" else f"epsilon {float(self.coordinator_epsilon):.3g}"
        return (
            f"against the coordinator, who sees noised sums and who takes part: {against}, for a user who takes "
            f"part in at most {self.participation_cap} rounds",
            f"secure sums of {self.smallest_cohort} to {self.largest_cohort} devices: {self.bits} bits for each of "
            f"{self.coordinates:,} coordinates, {self.bytes_up / 1e6:.2f} MB up and {self.bytes_down / 1e6:.2f} MB "
            f"down per device and round; about {self.device_seconds:.2f} s on a device and "
            f"{self.coordinator_seconds:.1f} s at the coordinator",
            f"the published noise is {self.noise_to_central:.2f} times that of central noise at the same epsilon",
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def sum_cost(spec: ReleaseSpec, central_multiplier: float) -> SumCost:
    """Say what a round of the expected size under `spec` costs.

    Args:
        spec: With secure sums.
        central_multiplier: What central noise would need for the same epsilon; 0 where there is none.

    Raises:
        Refusal: It has no secure sums.
    """
    sums = SecureSum.of(spec)
    devices = min(max(round(spec.sampling_rate * spec.population), sums.smallest_cohort), sums.largest_cohort)
    noise = sums.noise(spec, devices)
    dim = noise.padded_dim
    holders = devices - 1 if devices <= FULL_GRAPH else neighbours(devices, THRESHOLD, CORRUPT)
    masks = 1 + (holders if devices <= FULL_GRAPH else 2 * holders)
    return SumCost(
        bits=noise.bits,
        coordinates=dim,
        # docs/secagg.md has the table of messages that these add up.
        bytes_up=274 + 178 + 97 * holders + 210 + packed_bytes(dim, noise.bits) + 210 + 146 + 35 * (holders + 1),
        bytes_down=50 + 160 * devices + 52 + 2 * devices + 97 * holders + 54 + 66 * devices + 50 + 66 * devices,
        device_seconds=ENCODE_SECONDS * dim + MASK_SECONDS * dim * masks + CHECK_SECONDS * devices,
        coordinator_seconds=UNPACK_SECONDS * dim * devices
        + JOIN_SECONDS[0] * devices
        + JOIN_SECONDS[1] * devices * devices,
        coordinator_epsilon=sums.epsilon,
        participation_cap=sums.participation_cap,
        smallest_cohort=sums.smallest_cohort,
        largest_cohort=sums.largest_cohort,
        noise_to_central=noise.level * noise.step / (central_multiplier * spec.clip) if central_multiplier else 1.0,
    )
