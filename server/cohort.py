"""Who takes part in a round, and where they live.

Each enrolled user is drawn independently with the same probability, as the accountant assumes; nothing else may be
called Poisson (Chua et al. (2024), arXiv:2403.17673). Source: Abadi et al. (2016), arXiv:1607.00133.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import ConfigError
from common.privacy import Randomness

__all__ = ["Roster"]


@dataclass(frozen=True)
class Roster:
    """The enrolled users and the nodes they live on.

    Attributes:
        subjects: Every enrolled user, in a fixed public order.
        homes: Which node a subject lives on; a simulation's nodes take any user, so it is empty there.
        nodes: The nodes, in order.
    """

    subjects: Sequence[str]
    nodes: tuple[int, ...]
    homes: Mapping[str, int]

    @classmethod
    def of_hellos(cls, hellos: Mapping[int, Sequence[str]], population: int | None) -> Roster:
        """Build the roster from what the nodes said lives there.

        `population` is the number of simulated users; None where nodes are devices.

        Raises:
            ConfigError: No node answered, or one subject lives on two nodes.
        """
        if not hellos:
            raise ConfigError("no node answered; is a device or a simulated node connected?")
        homes: dict[str, int] = {}
        for node, subjects in sorted(hellos.items()):
            for subject in subjects:
                if subject in homes:
                    raise ConfigError("one subject is enrolled on two nodes; one device per subject and round")
                homes[subject] = node
        nodes = tuple(sorted(hellos))
        if homes:
            return cls(sorted(homes), nodes, homes)
        if population is None:
            raise ConfigError("the nodes have no residents, and this is not a simulation")
        return cls([str(number) for number in range(population)], nodes, {})

    def cohort(self, rate: float, randomness: Randomness) -> list[str]:
        """Draw a cohort; it may be empty.

        Guarantee: every subject is in it with probability `rate`, independently of every other subject and round.
        """
        return [self.subjects[int(index)] for index in randomness.poisson_sample(len(self.subjects), rate)]

    def place(self, cohort: Sequence[str], chunk: int) -> list[tuple[int, tuple[str, ...]]]:
        """Cut a cohort into assignments: `(node, users)`; one user each on devices, up to `chunk` in a simulation."""
        if self.homes:
            return [(self.homes[subject], (subject,)) for subject in cohort]
        pieces = [tuple(cohort[start : start + chunk]) for start in range(0, len(cohort), chunk)]
        return [(self.nodes[index % len(self.nodes)], piece) for index, piece in enumerate(pieces)]
