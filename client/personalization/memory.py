"""What a device holds of its user for the prompt: an index over past records and a profile, ready to be put in.

The same memory serves at use, in scoring and when the private adapter is trained with what it will see at use. It
offers past records only: in training a record is never shown itself, and plain text nothing that came after it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from client.personalization.context import Context, ContextEncoder
from client.personalization.profile import Profile, make_profile
from client.personalization.retrieval import Embed, Found, RetrievalIndex
from client.user_data import Encoded, Record

__all__ = ["Memory", "Shown"]


@dataclass(frozen=True)
class Shown:
    """What stands before one question: records, the best first, lines about the user, and both as a context."""

    found: tuple[Found, ...]
    context: Context
    lines: tuple[str, ...] = field(default=(), repr=False)


class Memory:
    """One user's past records and profile.

    Attributes:
        index: Over the records, the oldest first.
        profile: Lines about the user.
    """

    def __init__(
        self,
        records: Sequence[Record],
        encoder: ContextEncoder,
        *,
        profile: Profile | None = None,
        embed: Embed | None = None,
    ) -> None:
        """Remember `records`, in the order of time; the profile is made from them where none is given."""
        self.index = RetrievalIndex(records, embed=embed)
        self.profile = make_profile(records) if profile is None else profile
        self._encoder = encoder
        self._pieces = {plain: [encoder.piece(record, plain=plain) for record in records] for plain in (False, True)}

    def retrieve(self, question: Record, *, own: int | None = None) -> Shown:
        """Choose the records that stand before `question`.

        Args:
            question: What is asked; only its prompt is looked at.
            own: The question's own position among the records, when it is one of them.
        """
        plain = not question.prompt
        ranked = self.index.search(question.prompt, but=own, before=own if plain else None)
        context = self._encoder.context(question, self._pieces[plain], [found.position for found in ranked])
        standing = set(context.shown)
        return Shown(tuple(found for found in ranked if found.position in standing), context)

    def with_retrieval(self, question: Record, example: Encoded, *, own: int | None = None) -> Encoded:
        """Put what is retrieved for `question` before it."""
        return self._encoder.put_before(question, example, self.retrieve(question, own=own).context)

    def with_levels(
        self, question: Record, example: Encoded, levels: Collection[str], *, own: int | None = None
    ) -> Encoded:
        """Put what several levels say before `question`, the profile's lines first, in one budget."""
        return self._encoder.put_before(question, example, self.recall(question, levels, own=own).context)

    def recall(
        self,
        question: Record,
        levels: Collection[str],
        *,
        own: int | None = None,
        lines: Sequence[str] = (),
        budget: int | None = None,
    ) -> Shown:
        """Choose what several levels put before `question`, in one budget: lines first, then records.

        Args:
            question: What is asked; only its prompt is looked at.
            levels: Of `profile` and `retrieval`.
            own: The question's own position among the records, when it is one of them.
            lines: Told before those of the profile, whatever the levels.
            budget: Most tokens, where that is less than the encoder's.
        """
        plain = not question.prompt
        ranked: list[Found] = []
        if "retrieval" in levels:
            ranked = self.index.search(question.prompt, but=own, before=own if plain else None)
        told = (*lines, *(line for line in self.profile.texts if line not in lines)) if "profile" in levels else lines
        places = [found.position for found in ranked]
        context = self._encoder.context(question, self._pieces[plain], places, told, most=budget)
        standing = set(context.shown)
        found = tuple(one for one in ranked if one.position in standing)
        return Shown(found, context, tuple(told[: context.lines]))

    def with_profile(self, question: Record, example: Encoded) -> Encoded:
        """Put the profile before `question`."""
        return self._encoder.put_before(question, example, self._encoder.context(question, lines=self.profile.texts))
