"""A profile: a few lines about the user, made from the user's own records by rules that anyone can read.

Three kinds of line, each with the number of records that say so:

- *facts*: what the user said of themselves in so many words ("my dog is called Biscuit"); of two that begin alike the
  later one stands;
- *phrases*: words that come in answer after answer, where the question does not say them itself;
- *answers*: short answers that come up again and again, such as a tag or a score.

The user can read, change and delete every line. A line that the user wrote is kept when the profile is made again; a
line that the user deleted does not come back. No model is asked, nothing is sent, and the lines go nowhere but into the
prompt of the model beside them.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Self

from client.user_data import Record
from common.errors import StoreError

__all__ = ["Line", "Profile", "make_profile"]

Kind = Literal["fact", "phrases", "answers", "own words"]

LONGEST_FACT_WORDS, MOST_FACTS = 14, 12
FEWEST_REPEATS = 3
"""Records that must agree before a habit is called one."""
SMALLEST_SHARE = 0.2
"""Share of the records of a task that must agree."""
MOST_PHRASES, MOST_ANSWERS = 6, 4
LONGEST_ANSWER_WORDS = 3
LONGEST_LINE = 300
"""Characters."""

_SENTENCE = re.compile(r"[^.!?\n:;]+")
_ABOUT_ME = re.compile(
    r"\b(?P<subject>my(?: \w+){1,3}? (?:is|are|was)(?: called| named)?|i(?: am|'m| live in| live at| work as| work at"
    r"| work for| work in| like| love| prefer| hate| have| study| come from| was born in| was born on| speak))"
    r" (?P<value>[^,]+)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Line:
    """One line of a profile.

    Attributes:
        text: What the model is told.
        kind: What it was made from; "own words" where the user wrote it.
        records: How many records say so; 0 for the user's own words.
    """

    text: str = field(repr=False)
    kind: Kind
    records: int = 0


@dataclass(frozen=True)
class Profile:
    """What is told to the model about the user.

    Attributes:
        lines: In the order in which they are told.
        deleted: Lines that the user deleted, so that they do not come back.
    """

    lines: tuple[Line, ...] = ()
    deleted: frozenset[str] = frozenset()

    @property
    def texts(self) -> tuple[str, ...]:
        """The lines as the model is told them."""
        return tuple(line.text for line in self.lines)

    def edited(self, number: int, text: str) -> Self:
        """Return the profile with line `number`, from 1, in the user's own words, or one line more after the last.

        Raises:
            ValueError: There is no such line, or the text is empty, long or more than one line.
        """
        text = text.strip()
        if not text or len(text) > LONGEST_LINE or not text.isprintable():
            raise ValueError(f"a line is 1 to {LONGEST_LINE} printable characters")
        if not 1 <= number <= len(self.lines) + 1:
            raise ValueError(f"the profile has {len(self.lines)} lines")
        lines = list(self.lines)
        gone = self.deleted
        if number <= len(lines):
            gone = gone | {lines[number - 1].text}
        lines[number - 1 : number] = [Line(text, "own words")]
        return replace(self, lines=tuple(lines), deleted=gone - {text})

    def without(self, number: int) -> Self:
        """Return the profile without line `number`, from 1, which does not come back.

        Raises:
            ValueError: There is no such line.
        """
        if not 1 <= number <= len(self.lines):
            raise ValueError(f"the profile has {len(self.lines)} lines")
        kept = self.lines[: number - 1] + self.lines[number:]
        return replace(self, lines=kept, deleted=self.deleted | {self.lines[number - 1].text})

    def renewed(self, records: Sequence[Record]) -> Profile:
        """Make the profile again from `records`, with the user's own words first and what was deleted left out."""
        own = [line for line in self.lines if line.kind == "own words"]
        known = {line.text for line in own} | self.deleted
        made = [line for line in make_profile(records).lines if line.text not in known]
        return Profile((*own, *made), self.deleted)

    def to_bytes(self) -> bytes:
        """Write the profile for an encrypted store."""
        plain = {"version": 1, "lines": [asdict(line) for line in self.lines], "deleted": sorted(self.deleted)}
        return json.dumps(plain).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Profile:
        """Read what `to_bytes` wrote.

        Raises:
            StoreError: It is something else.
        """
        try:
            plain: dict[str, Any] = json.loads(content)
            if plain["version"] != 1:
                raise ValueError
            return cls(tuple(Line(**line) for line in plain["lines"]), frozenset(plain["deleted"]))
        except (ValueError, KeyError, TypeError):
            raise StoreError("not the bytes of a profile") from None


def make_profile(records: Sequence[Record]) -> Profile:
    """Make a profile of `records`, which stand in the order of time."""
    used = [record for record in records if not record.empty]
    lines = [*_facts(used), *_phrases(used), *_answers(used)]
    return Profile(tuple(line for line in lines if len(line.text) <= LONGEST_LINE))


def _facts(records: Sequence[Record]) -> Iterator[Line]:
    """What the user said of themselves: in prompts, and in plain text, which is the user's own too."""
    said: dict[str, tuple[str, int]] = {}
    for record in records:
        for sentence in _SENTENCE.findall(record.prompt or record.response):
            found = _ABOUT_ME.search(sentence)
            if found is None or len(sentence.split()) > LONGEST_FACT_WORDS or _is_question(record.prompt, sentence):
                continue
            subject, value = found["subject"].lower().replace("i'm", "i am"), found["value"].strip()
            text = f"{found['subject']} {value}."
            before = said.pop(subject, ("", 0))  # the later one stands, and stands last
            said[subject] = (text[0].upper() + text[1:], before[1] + 1)
    newest = list(said.values())[::-1][:MOST_FACTS]
    yield from (Line(text, "fact", count) for text, count in newest)


def _is_question(text: str, sentence: str) -> bool:
    return text[text.find(sentence) + len(sentence) :].lstrip().startswith("?")


def _phrases(records: Sequence[Record]) -> Iterator[Line]:
    """Words and pairs of words that come in response after response, in the order in which they come.

    Words of the question say nothing about the user. A word that mostly comes in a pair is told as the pair.
    """
    counts: Counter[str] = Counter()
    places: defaultdict[str, float] = defaultdict(float)
    for own in _by_task(records).values():
        found: Counter[str] = Counter()
        for record in own:
            words = record.response.split()
            if len(words) <= LONGEST_ANSWER_WORDS:
                continue
            asked = set(record.prompt.split())
            seen = {(word,): at for at, word in reversed(list(enumerate(words)))}
            seen |= {pair: at for at, pair in reversed(list(enumerate(pairwise(words))))}
            for phrase, at in seen.items():
                if not asked & set(phrase):
                    found[" ".join(phrase)] += 1
                    places[" ".join(phrase)] += at / len(words)
        needed = max(FEWEST_REPEATS, SMALLEST_SHARE * len(own))
        counts.update({phrase: count for phrase, count in found.items() if count >= needed})
    usual = [phrase for phrase, _ in counts.most_common()]
    whole = [
        one
        for one in usual
        if not any(one != two and one in two.split() and counts[two] >= 0.8 * counts[one] for two in usual)
    ]
    if whole:
        chosen = sorted(whole[:MOST_PHRASES], key=lambda phrase: places[phrase] / counts[phrase])
        yield Line(f"I often write {' / '.join(chosen)}.", "phrases", min(counts[phrase] for phrase in chosen))


def _answers(records: Sequence[Record]) -> Iterator[Line]:
    """Short answers that come up again and again, task by task; sentences are not answers of this kind."""
    for own in _by_task(records).values():
        short = [record.response.strip() for record in own if len(record.response.split()) <= LONGEST_ANSWER_WORDS]
        short = [answer for answer in short if answer[-1:] not in ".!?" and "'" not in answer]
        if len(short) < max(FEWEST_REPEATS, 0.5 * len(own)):
            continue
        counted = Counter(short).most_common(MOST_ANSWERS)
        usual = [answer for answer, count in counted if count >= FEWEST_REPEATS]
        if usual:
            say = "I mostly give" if all(answer.isnumeric() for answer in usual) else "I like"
            yield Line(f"{say} {', '.join(usual)}.", "answers", sum(count for _, count in counted[: len(usual)]))


def _by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    tasks: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        tasks[record.task].append(record)
    return tasks
