"""What a secure sum costs: processor seconds of one device and of the coordinator, and bytes up and down.

::

    python -m simulations.bench.secagg                      # 100 devices, a million coordinates
    python -m simulations.bench.secagg --devices 100 --drop 10
    python -m simulations.bench.secagg --growth             # from 10 to 1,000 devices, few coordinates

Everything runs in this process, one device after the other, with every check on and keys and noise from the operating
system. Seconds are of this process's processor time, so a busy machine changes them little.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np

from common.distributed_noise import DistributedNoise
from common.keys import SigningKey
from common.mask_graph import neighbours
from common.privacy import Randomness
from common.secagg import Participant
from common.secagg_coordinator import Coordinator
from common.secagg_messages import AggregationPolicy, Leg, Terms
from common.secagg_roster import Roster

__all__ = ["Cost", "main", "measure"]

GROWTH = (10, 30, 100, 300, 1000)
GROWTH_DIM = 1 << 12
PLACE = b"benchmark"


@dataclass(frozen=True)
class Cost:
    """What one round cost.

    Attributes:
        devices: Devices in the round.
        dropped: How many of them sent no vector.
        dim: Values per update.
        bits: Width of the modulus.
        degree: Holders that each device drew.
        encode_seconds: Processor time of one device to clip, rotate, round and noise; mean over the measured.
        device_seconds: Processor time of one device for the legs.
        coordinator_seconds: Processor time of the coordinator for the round, decoding included.
        bytes_up: What one device that stays sends.
        bytes_down: What it receives.
        error: Root mean square difference of the decoded sum from the exact one, over the noise that was stated.
    """

    devices: int
    dropped: int
    dim: int
    bits: int
    degree: int
    encode_seconds: float
    device_seconds: float
    coordinator_seconds: float
    bytes_up: int
    bytes_down: int
    error: float


def measure(devices: int, dim: int, dropped: int = 0, measured: int | None = None) -> Cost:
    """Play one round and return what it cost.

    Args:
        devices: Devices in the round.
        dim: Values per update.
        dropped: Devices that are gone before they send their vector.
        measured: Devices whose time is taken; all by default. The others do not check signatures, which for all of
            them together takes a time that grows with the square of their number.
    """
    measured = devices if measured is None else measured
    sized = Terms(run="0b", round=1, spec="0" * 64, dim=1, bits=1, smallest_cohort=devices, largest_cohort=devices)
    noise = DistributedNoise(
        dim=dim, clip_norm=1.0, noise_multiplier=1.0, fewest_honest=sized.fewest_honest, largest_cohort=devices
    )
    terms = Terms(
        run="0b",
        round=1,
        spec="0" * 64,
        dim=noise.padded_dim,
        bits=noise.bits,
        smallest_cohort=devices,
        largest_cohort=devices,
    )
    signing = [SigningKey.generate() for _ in range(devices)]
    enrolled = {key.verify_key.hex for key in signing}
    participants = {
        key.verify_key.hex: Participant(
            terms,
            policy=AggregationPolicy(smallest_cohort=devices),
            signing_key=key,
            enrolled=enrolled,
            answered=set(),
            randomness=Randomness.system(),
        )
        for key in signing
    }
    coordinator = Coordinator(terms, enrolled=enrolled)
    names = list(participants)
    timed, gone = set(names[:measured]), set(names[devices - dropped :])
    encoding: dict[str, float] = defaultdict(float)
    spent: dict[str, float] = defaultdict(float)
    up: dict[str, int] = defaultdict(int)
    down: dict[str, int] = defaultdict(int)
    exact = np.zeros(dim)
    coordinating = 0.0
    for leg in (Leg.KEYS, Leg.SHARES, Leg.MASKED, Leg.CONSENT, Leg.UNMASK):
        begun = time.process_time()
        requests = dict.fromkeys(names, b"") if leg is Leg.KEYS else coordinator.advance()
        coordinating += time.process_time() - begun
        for name, request in requests.items():
            if leg >= Leg.MASKED and name in gone:
                continue
            vector = np.empty(0, dtype=np.uint32)
            if leg is Leg.MASKED:
                update = Randomness.system().normal(dim).astype(np.float32)
                update /= 2.0 * np.linalg.norm(update)
                exact += update
                begun = time.process_time()
                vector = noise.encode(update, PLACE, Randomness.system())
                encoding[name] += time.process_time() - begun
            unchecked = contextlib.nullcontext() if name in timed else mock.patch.object(Roster, "verify")
            with unchecked:
                begun = time.process_time()
                answer = _answer(participants[name], leg, request, vector)
                spent[name] += time.process_time() - begun
            up[name] += len(answer)
            down[name] += len(request)
            begun = time.process_time()
            coordinator.receive(answer)
            coordinating += time.process_time() - begun
    begun = time.process_time()
    decoded = noise.decode(coordinator.total(), PLACE)
    coordinating += time.process_time() - begun
    stayed = [name for name in names if name in timed and name not in gone]
    return Cost(
        devices=devices,
        dropped=dropped,
        dim=dim,
        bits=terms.bits,
        degree=neighbours(devices, terms.threshold, terms.corrupt),
        encode_seconds=float(np.mean([encoding[name] for name in stayed])),
        device_seconds=float(np.mean([spent[name] for name in stayed])),
        coordinator_seconds=coordinating,
        bytes_up=max(up[name] for name in stayed),
        bytes_down=max(down[name] for name in stayed),
        error=float(np.sqrt(np.mean((decoded - exact) ** 2))) / noise.standard_deviation(devices - dropped),
    )


def _answer(participant: Participant, leg: Leg, request: bytes, vector: np.ndarray) -> bytes:
    if leg is Leg.KEYS:
        return participant.keys()
    if leg is Leg.SHARES:
        return participant.share(request)
    if leg is Leg.MASKED:
        return participant.mask(request, vector)
    return participant.consent(request) if leg is Leg.CONSENT else participant.unmask(request)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and write a line of a table per round."""
    parser = argparse.ArgumentParser(description="Measure what a secure sum costs.")
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--dim", type=int, default=1_000_000)
    parser.add_argument("--drop", type=int, default=0, help="devices that are gone before they send their vector")
    parser.add_argument("--growth", action="store_true", help=f"{GROWTH} devices, {GROWTH_DIM:,} coordinates")
    chosen = parser.parse_args(arguments)
    sys.stdout.write(
        "| devices | dropped | values | bits | holders | device: numbers, s | device: legs, s | coordinator, s "
        "| up, bytes | down, bytes |\n|" + "---:|" * 10 + "\n"
    )
    rounds = [(count, GROWTH_DIM, 0, 10) for count in GROWTH]
    for devices, dim, dropped, measured in (
        rounds if chosen.growth else [(chosen.devices, chosen.dim, chosen.drop, None)]
    ):
        cost = measure(devices, dim, dropped, measured)
        sys.stdout.write(
            f"| {cost.devices:,} | {cost.dropped} | {cost.dim:,} | {cost.bits} | {cost.degree} "
            f"| {cost.encode_seconds:.3f} | {cost.device_seconds:.3f} | {cost.coordinator_seconds:.2f} "
            f"| {cost.bytes_up:,} | {cost.bytes_down:,} |\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
