"""Who takes part in a round, and where they live.

Each enrolled user is drawn independently with the same probability, as the accountant assumes; nothing else may be
called Poisson (Chua et al. (2024), arXiv:2403.17673). Source: Abadi et al. (2016), arXiv:1607.00133.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import ConfigError, DataError
from common.privacy import Randomness

__all__ = ["Roster"]


@dataclass(frozen=True)
class Roster:
    """The enrolled users and the nodes they live on.

    Attributes:
        subjects: Every enrolled user, in a fixed public order.
        nodes: The nodes that were heard, in order.
        homes: Which node a subject lives on, as far as it was heard.
        takes_anyone: Whether a node takes any user, as a simulation's do.
    """

    subjects: Sequence[str]
    nodes: tuple[int, ...]
    homes: Mapping[str, int]
    takes_anyone: bool

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
            return cls(sorted(homes), nodes, homes, takes_anyone=False)
        if population is None:
            raise ConfigError("the nodes have no residents, and this is not a simulation")
        return cls([str(number) for number in range(population)], nodes, {}, takes_anyone=True)

    @classmethod
    def of_homes(cls, path: Path, subjects: Sequence[str], online: Collection[int]) -> Roster:
        """The roster of these enrolled subjects, where the coordinator wrote down that their devices are.

        Raises:
            DataError: The file is damaged.
        """
        try:
            homes: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))["homes"]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{path}: damaged; the coordinator writes it anew when it starts") from None
        here = {subject: homes[subject] for subject in subjects if homes.get(subject) in online}
        return cls(subjects, tuple(sorted(here.values())), here, takes_anyone=False)

    def of(self, subjects: Sequence[str]) -> Roster:
        """The roster of an enrolment that was written down: these subjects, wherever they were heard."""
        known = {subject: self.homes[subject] for subject in subjects if subject in self.homes}
        return replace(self, subjects=subjects, homes=known)

    def followed(self, hellos: Mapping[int, Sequence[str]], online: Collection[int]) -> Roster:
        """Follow enrolled subjects to the nodes they answer from now; nobody is enrolled by it.

        A claim on a subject whose node is still online counts for nothing, and neither does one that two nodes make.
        """
        claims: dict[str, list[int]] = {}
        for node, subjects in hellos.items():
            for subject in subjects:
                claims.setdefault(subject, []).append(node)
        homes = {subject: node for subject, node in self.homes.items() if node in online}
        for subject in self.subjects:
            if subject not in homes and len(claims.get(subject, ())) == 1:
                homes[subject] = claims[subject][0]
        return replace(self, homes=homes, nodes=tuple(sorted({*self.nodes, *hellos} & set(online))))

    def cohort(self, rate: float, randomness: Randomness) -> list[str]:
        """Draw a cohort; it may be empty.

        Guarantee: every subject is in it with probability `rate`, independently of every other subject and round.
        """
        return [self.subjects[int(index)] for index in randomness.poisson_sample(len(self.subjects), rate)]

    def place(self, cohort: Sequence[str], chunk: int) -> list[tuple[int, tuple[str, ...]]]:
        """Cut a cohort into assignments: `(node, users)`; one user each on devices, up to `chunk` in a simulation.

        A subject whose device was not heard of since the server started is in no assignment.
        """
        if not self.takes_anyone:
            return [(self.homes[subject], (subject,)) for subject in cohort if subject in self.homes]
        pieces = [tuple(cohort[start : start + chunk]) for start in range(0, len(cohort), chunk)]
        return [(self.nodes[index % len(self.nodes)], piece) for index, piece in enumerate(pieces)]
