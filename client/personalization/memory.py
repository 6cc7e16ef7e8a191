"""What a device holds of its user for the prompt: an index over past records and a profile, ready to be put in.

The same memory serves at use, in scoring and when the private adapter is trained with what it will see at use. It
offers past records only: in training a record is never shown itself, and plain text nothing that came after it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from client.personalization.context import Context, ContextEncoder
from client.personalization.profile import Profile, make_profile
from client.personalization.retrieval import Embed, Found, RetrievalIndex
from client.user_data import Encoded, Record

__all__ = ["Memory", "Shown"]


@dataclass(frozen=True)
class Shown:
    """What was retrieved for one question: the records that stand in the prompt, best first, and the context."""

    found: tuple[Found, ...]
    context: Context


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
        plain = not question.prompt
        ranked: list[Found] = []
        if "retrieval" in levels:
            ranked = self.index.search(question.prompt, but=own, before=own if plain else None)
        lines = self.profile.texts if "profile" in levels else ()
        places = [found.position for found in ranked]
        context = self._encoder.context(question, self._pieces[plain], places, lines)
        return self._encoder.put_before(question, example, context)

    def with_profile(self, question: Record, example: Encoded) -> Encoded:
        """Put the profile before `question`."""
        return self._encoder.put_before(question, example, self._encoder.context(question, lines=self.profile.texts))
