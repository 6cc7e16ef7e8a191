"""The built-in world: any number of made-up users with learnable habits, each a function of a seed and an index.

A person has a register, a few favourite phrases, tastes, a bias as a critic and some personal facts; dated records
show them in the field's shapes (LaMP, Salemi et al. 2023, arXiv:2304.11406): tags, ratings, short texts in the
person's own style, facts to remember, choices, and preference pairs. Two things can be learned and pay:

- what today's users have in common and the public text lacks: late phrases, late customs, late tags, kinder ratings;
- what is one's own: everything a person draws from the distribution that all share.

The base model is pretrained on public people: the same kinds of person from another seed space, most of them of the
early era, so that it can express any trait but expects none of today's. Nothing here is anybody's data, and no result
is written into it: only distributions are.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, overload

from client.user_data import Record, User
from simulations.worlds.lexicon import (
    CUSTOMS,
    FACTS,
    GENRE_CUES,
    LATE_TAGS,
    OPINIONS,
    PROMPTS,
    REGISTERS,
    SLOTS,
    TAG_FAMILIES,
    TAGS,
    WORDS,
)

__all__ = ["WORLD_VERSION", "Population", "base_folder", "built_in_user", "population", "public_people"]

WORLD_VERSION = 1
"""Changes whenever the same seed and index would give another user, or the base another digest."""

FEWEST_RECORDS, MOST_RECORDS = 10, 500
RECORD_TAIL = 0.9
"""Tail exponent of the record counts: the median user has about 21 records, one in forty has 500."""
TASKS = ("note", "subject", "tag", "rating", "fact", "choice", "preference")
SECONDS_PER_DAY = 86_400

_Draw = Callable[[], float]
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Era:
    """What the people of an era have in common. Shares are probabilities."""

    tasks: tuple[float, ...]
    """Shares of `TASKS` among their records, about which people vary."""
    start: int
    """First second of their records, since 1970 UTC."""
    registers: tuple[float, ...]
    """Shares of the registers."""
    adopters: float
    """Share of people who took up the late phrases and customs."""
    late_adopter: float
    """How often an adopter draws a late phrase or custom."""
    late_other: float
    """How often anyone else does."""
    late_tag_taste: float
    """Added to a person's taste for each late tag; the standard deviation of taste is 1.3."""
    biases: tuple[float, ...]
    """Shares of the rating biases -2, -1, 0, 1, 2 stars."""
    late_topics: float
    """How often a topic is a late one."""


_PUBLIC = _Era(
    tasks=(0.22, 0.12, 0.24, 0.08, 0.16, 0.14, 0.04),
    start=1_262_304_000,
    registers=(0.2,) * 5,
    adopters=0.1,
    late_adopter=0.4,
    late_other=0.03,
    late_tag_taste=-0.8,
    biases=(0.1, 0.25, 0.4, 0.2, 0.05),
    late_topics=0.15,
)
_TODAY = _Era(
    tasks=(0.28, 0.16, 0.15, 0.10, 0.12, 0.10, 0.09),
    start=1_704_067_200,
    registers=(0.1, 0.35, 0.15, 0.1, 0.3),
    adopters=0.95,
    late_adopter=0.95,
    late_other=0.7,
    late_tag_taste=1.2,
    biases=(0.03, 0.07, 0.15, 0.4, 0.35),
    late_topics=0.7,
)

_KINDS = {"fact": "extraction", "choice": "generalization"}


def _pick(draw: _Draw, options: Sequence[_T]) -> _T:
    return options[int(draw() * len(options))]


def _weighted(draw: _Draw, options: Sequence[_T], shares: Sequence[float]) -> _T:
    rest = draw()
    for option, share in zip(options, shares, strict=True):
        rest -= share
        if rest < 0:
            return option
    return options[-1]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class _Person:
    """A person's latent traits, and the way they make records of them."""

    def __init__(self, draw: _Draw, era: _Era) -> None:
        self.draw = draw
        self.era = era
        self.register = self._register()
        self.lateness = era.late_adopter if draw() < era.adopters else era.late_other
        self.habit = 0.86 + 0.12 * draw()
        self.tasks = self._tasks()
        self.favourites = {slot: self._phrase(slot) for slot in SLOTS}
        self.customs = {custom: draw() < self.lateness for custom in CUSTOMS}
        self.length = _weighted(draw, (0, 1, 2), (0.35, 0.4, 0.25))
        self.taste = self._taste()
        self.bias = _weighted(draw, (-2, -1, 0, 1, 2), era.biases)
        self.facts = {told: _pick(draw, values) for told, (_, _, values) in FACTS.items()}
        self.told: list[str] = []
        self.tellable = 1 + int(draw() * 3)

    def _normal(self) -> float:
        # Irwin-Hall: six uniform draws, scaled to variance 1; exact enough for a taste.
        draw = self.draw
        return (draw() + draw() + draw() + draw() + draw() + draw() - 3.0) * 1.4142135623730951

    def _tasks(self) -> tuple[float, ...]:
        """What the person comes with: the shares of the era, each times a log-normal factor of the person's own."""
        weights = [share * math.exp(0.8 * self._normal()) for share in self.era.tasks]
        total = sum(weights)
        return tuple(weight / total for weight in weights)

    def _taste(self) -> dict[str, float]:
        taste: dict[str, float] = {}
        for family in TAG_FAMILIES:
            shared = 1.2 * self._normal()
            for tag in family:
                taste[tag] = shared + 0.5 * self._normal() + (self.era.late_tag_taste if tag in LATE_TAGS else 0.0)
        return taste

    def _register(self) -> int:
        return _weighted(self.draw, range(len(REGISTERS)), self.era.registers)

    def _phrase(self, slot: str) -> str:
        """Draw a phrase as anyone of this register and lateness might."""
        draw = self.draw
        register = self.register if draw() < 0.8 else self._register()
        return SLOTS[slot][draw() < self.lateness][register][draw() < 0.5]

    def say(self, slot: str) -> str:
        """The person's phrase for a slot: the favourite by habit, else what comes to mind."""
        return self.favourites[slot] if self.draw() < self.habit else self._phrase(slot)

    def _someone_else(self) -> _Person:
        """Make a person of this era and another register."""
        while True:
            other = _Person(self.draw, self.era)
            if other.register != self.register:
                return other

    def form(self, custom: str) -> str:
        """The person's form of a custom, with a slip now and then."""
        return CUSTOMS[custom][self.customs[custom] != (self.draw() < 0.03)]

    def topic(self) -> str:
        topics = WORDS["topic"]
        half = len(topics) // 2
        return topics[int(self.draw() * half) + (half if self.draw() < self.era.late_topics else 0)]

    def cue(self) -> tuple[str, str]:
        """A cue and its tag; late and early tags come up alike."""
        tag = _pick(self.draw, TAGS)
        return _pick(self.draw, GENRE_CUES[tag]), tag

    def cues(self) -> tuple[str, str, str]:
        """Two cues of different tags, and the tag that the person would give to both."""
        (one, first), (two, second) = self.cue(), self.cue()
        while second == first:
            two, second = self.cue()
        liked = first if self.taste[first] + 0.2 * self._normal() > self.taste[second] else second
        return one, two, liked

    def ask(self, task: str, **matter: str) -> str:
        """Put a task in one of the usual ways."""
        return _pick(self.draw, PROMPTS[task]).format(**matter)

    def note(self, name: str, topic: str, state: str) -> str:
        opener = f"{self.say('opener')} the" if self.length else "the"
        more = f" {self.say('filler')}{self.say('mark')}" if self.length == 2 else ""
        return (
            f"{self.say('greeting')} {name}{self.form('address')} {opener} {topic} {self.form('copula')} "
            f"{self.say('intensifier')} {state}{self.say('mark')}{more} {self.say('closing')}{self.form('stamp')}"
        )

    def describe(self) -> tuple[str, ...]:
        """The person in a few lines: facts told, phrases, tastes, and kindness as a critic."""
        facts = [f"{told[0].upper()}{told[1:]} {self.facts[told]}." for told in self.told]
        phrases = " / ".join(self.favourites[slot] for slot in ("greeting", "intensifier", "closing", "mark"))
        liked = sorted(TAGS, key=self.taste.__getitem__, reverse=True)[:3]
        critic = "fair" if not self.bias else "kind" if self.bias > 0 else "harsh"
        return (*facts, f"I often write {phrases}.", f"I like {', '.join(liked)}.", f"I am a {critic} critic.")

    def record(self, task: str, time: float) -> Record:
        draw = self.draw
        rejected = None
        if task == "fact":
            prompt, response = self._fact()
        elif task == "subject":
            matter = {"topic": self.topic(), "verb": _pick(draw, WORDS["verb"]), "day": _pick(draw, WORDS["day"])}
            prompt = self.ask(task, **matter)
            response = f"{self.say('prefix')} {self.form('date').format(**matter)}{self.say('mark')}"
        elif task == "tag":
            one, two, response = self.cues()
            prompt = self.ask(task, one=_article(one), two=_article(two), place=_pick(draw, WORDS["place"]))
        elif task == "choice":
            one, two, liked = self.cues()
            prompt = self.ask(task, one=one, two=two)
            wanted, other = (one, two) if one in GENRE_CUES[liked] else (two, one)
            film = self.form("choice").format(wanted=wanted, other=other)
            response = f"{self.say('verdict')} {film}{self.say('mark')}"
        elif task == "rating":
            level = int(draw() * len(OPINIONS))
            first, second = _pick(draw, WORDS["aspect"]), _pick(draw, WORDS["aspect"])
            praise, more = _pick(draw, OPINIONS[level]), _pick(draw, OPINIONS[level])
            prompt = self.ask(task, first=first, second=second, praise=praise, more=more)
            response = str(min(5, max(1, level + 1 + self.bias)))
        else:
            matter = {"name": _pick(draw, WORDS["name"]), "topic": self.topic(), "state": _pick(draw, WORDS["state"])}
            prompt = self.ask("note", **matter)
            response = self.note(**matter)
            if task == "preference":
                rejected = self._someone_else().note(**matter)
        return Record(prompt, response, time, task, rejected, _KINDS.get(task, "abstraction"))

    def _fact(self) -> tuple[str, str]:
        """Tell a fact for the first time, or ask for one that was told."""
        draw = self.draw
        if not self.told or (len(self.told) < self.tellable and draw() < 0.2):
            told = _pick(draw, [told for told in FACTS if told not in self.told])
            self.told.append(told)
            receipt = self.form("receipt").format(subject=FACTS[told][1], value=self.facts[told])
            return self.ask("fact", told=told, value=self.facts[told]), f"{self.say('acknowledgement')} {receipt}"
        told = _pick(draw, self.told)
        questions = FACTS[told][0]
        return _pick(draw, questions), self.form("answer").format(value=self.facts[told])


def _person(realm: str, seed: int, index: int, era: _Era, *, described: bool = False) -> User:
    if seed < 0 or index < 0:
        raise ValueError("seed and index must not be negative")
    label = f"homespun built-in world {WORLD_VERSION}/{realm}/{seed}/{index}".encode()
    # A hash of everything that names the person, so that neighbours and realms share nothing; `random()` alone is
    # drawn from, because it alone is promised to stay the same in later Pythons.
    draw = random.Random(int.from_bytes(hashlib.blake2b(label, digest_size=16).digest())).random  # noqa: S311 not a secret
    count = min(MOST_RECORDS, int(FEWEST_RECORDS * (1.0 - draw()) ** (-1.0 / RECORD_TAIL)))
    person = _Person(draw, era)
    time = era.start + int(draw() * 365) * SECONDS_PER_DAY
    records: list[Record] = []
    for _ in range(count):
        time += 60 + int(draw() * 3 * SECONDS_PER_DAY)
        records.append(person.record(_weighted(draw, TASKS, person.tasks), float(time)))
    return User(f"{realm}-{seed}-{index}", tuple(records), person.describe() if described else ())


def built_in_user(seed: int, index: int) -> User:
    """Make user `index` of the population `seed`; the same two numbers always give the same user.

    Raises:
        ValueError: A number is negative.
    """
    return _person("user", seed, index, _TODAY)


class Population(Sequence[User]):
    """Users 0 to `count` - 1 of a seed, each made when asked for and not kept."""

    def __init__(self, seed: int, count: int) -> None:
        if seed < 0 or count < 0:
            raise ValueError("seed and count must not be negative")
        self.seed = seed
        self._indices = range(count)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> User: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[User]: ...
    def __getitem__(self, index: int | slice) -> User | Sequence[User]:
        if isinstance(index, slice):
            return [built_in_user(self.seed, each) for each in self._indices[index]]
        return built_in_user(self.seed, self._indices[index])


def population(seed: int, count: int) -> Population:
    """The first `count` users of a seed, as a sequence that holds none of them."""
    return Population(seed, count)


def public_people(count: int, *, first: int = 0) -> Iterator[User]:
    """People whose records are public: the base is pretrained on them, and none is ever a user.

    Unlike a user, each comes with a profile, so that the base learns what a profile is for; a user's is for the user's
    device to make, from the user's records.
    """
    for index in range(first, first + count):
        yield _person("public", 0, index, _PUBLIC, described=True)


def base_folder() -> Path:
    """The folder of the built-in base model, in Hugging Face format."""
    return Path(__file__).parent / "base"
