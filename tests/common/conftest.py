"""A secure sum in one process: real devices, the real coordinator, and every message between them at hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from common.errors import Refusal
from common.keys import SigningKey
from common.privacy import Randomness
from common.secagg import Participant
from common.secagg_coordinator import Coordinator
from common.secagg_messages import AggregationPolicy, Leg, Terms

ANSWERS = {Leg.SHARES: "share", Leg.MASKED: "mask", Leg.CONSENT: "consent", Leg.UNMASK: "unmask"}


def make_terms(**changes) -> Terms:
    facts = {"run": "ab", "round": 1, "spec": "0" * 64, "dim": 64, "bits": 16, "smallest_cohort": 3}
    return Terms(**facts | {"largest_cohort": 200} | changes)


@dataclass
class InMemoryRound:
    """One round among `count` devices; the n-th device's keys, vector and choices come from `seed` and n.

    Attributes:
        refusals: Code of each device that refused, by name.
        sent: Every answer of every device, by leg and name.
    """

    count: int
    terms: Terms = field(default_factory=make_terms)
    policy: AggregationPolicy = field(default_factory=lambda: AggregationPolicy(smallest_cohort=3))
    seed: int = 0
    vectors: dict[str, np.ndarray] | None = None

    def __post_init__(self):
        signing = [SigningKey(Randomness.rehearsal(self.seed, "enrolment", at).bytes(32)) for at in range(self.count)]
        self.signing = {key.verify_key.hex: key for key in signing}
        self.names = list(self.signing)
        self.enrolled = set(self.signing)
        self.devices = {name: self.join(name) for name in self.names}
        if self.vectors is None:
            self.vectors = {
                name: Randomness.rehearsal(self.seed, "vector", at)
                .integers(2**self.terms.bits, self.terms.dim)
                .astype(np.uint32)
                for at, name in enumerate(self.names)
            }
        self.coordinator = Coordinator(self.terms, enrolled=self.enrolled)
        self.refusals: dict[str, str] = {}
        self.sent: dict[tuple[Leg, str], bytes] = {}
        self.requests: dict[Leg, dict[str, bytes]] = {}

    def join(self, name, **changes) -> Participant:
        facts = {
            "policy": self.policy,
            "signing_key": self.signing[name],
            "enrolled": self.enrolled,
            "answered": set(),
            "randomness": Randomness.rehearsal(self.seed, "device", name),
        }
        return Participant(self.terms, **facts | changes)

    def ask(self, leg: Leg, name: str, request: bytes = b"") -> bytes:
        """Return a device's answer to one leg's request."""
        device = self.devices[name]
        if leg is Leg.KEYS:
            return device.keys()
        extra = (self.vectors[name],) if leg is Leg.MASKED else ()
        return getattr(device, ANSWERS[leg])(request, *extra)

    def leg(self, leg: Leg, without=()) -> None:
        """Play one leg: send its requests, and hand in the answers of everybody but `without`."""
        requests = dict.fromkeys(self.names, b"") if leg is Leg.KEYS else self.coordinator.advance()
        self.requests[leg] = requests
        for name in requests:
            if name in without or name in self.refusals:
                continue
            try:
                answer = self.ask(leg, name, requests[name])
            except Refusal as refusal:
                self.refusals[name] = refusal.code
                continue
            self.sent[leg, name] = answer
            self.coordinator.receive(answer)

    def play(self, dropped=None, until: Leg = Leg.UNMASK) -> None:
        """Play all legs to `until`; `dropped` names, by leg, who is gone from that leg on."""
        gone: set[str] = set()
        for leg in (Leg.KEYS, *ANSWERS):
            if leg > until:
                return
            gone |= set((dropped or {}).get(leg, ()))
            self.leg(leg, gone)

    def expected(self) -> np.ndarray:
        """The sum of the vectors of those whose masked vector came in."""
        names = [name for leg, name in self.sent if leg is Leg.MASKED]
        total = sum((self.vectors[name].astype(np.uint64) for name in names), np.zeros(self.terms.dim, dtype=np.uint64))
        return (total % 2**self.terms.bits).astype(np.uint32)


@pytest.fixture(scope="session")
def terms_with():
    """A function that makes valid terms of a round, with changes."""
    return make_terms


@pytest.fixture(scope="session")
def secure_round():
    """The class of rounds that are played in memory."""
    return InMemoryRound
