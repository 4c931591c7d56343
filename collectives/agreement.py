"""What the ranks of one operation have said so far, and what follows from it. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from sparkle_mesh.collectives.messages import SEQUENCE_MASK, Begin
from sparkle_mesh.errors import DivergenceError, MismatchError

Describe = Callable[[int], str]


def name_ranks(ranks: Iterable[int], describe: Describe) -> str:
    """Return ``rank 2 (…) and rank 5 (…)``, by the caller's way of describing a rank."""
    names = [describe(rank) for rank in sorted(ranks)]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@dataclass(slots=True)
class Agreement:
    """Begins and Prepareds of one operation among ``ranks``, those of this ``rank`` included."""

    ranks: Sequence[int]
    rank: int
    own: Begin
    begins: dict[int, Begin] = field(default_factory=dict)
    prepared: dict[int, bytes] = field(default_factory=dict)
    mismatched: bool = False

    def __post_init__(self) -> None:
        self.begun(self.rank, self.own)

    def begun(self, rank: int, begin: Begin) -> None:
        """``rank`` has called ``begin``."""
        self.begins[rank] = begin
        if begin.digest != self.own.digest:
            self.mismatched = True

    @property
    def absent(self) -> list[int]:
        """The ranks that have not called it."""
        return [rank for rank in self.ranks if rank not in self.begins]

    @property
    def unprepared(self) -> list[int]:
        """The ranks that have not said that they hold the result."""
        return [rank for rank in self.ranks if rank not in self.prepared]

    @property
    def settled(self) -> bool:
        """Whether the outcome is known: all have called and differ, or all have prepared."""
        return not self.absent if self.mismatched else not self.unprepared

    def verdict(self, describe: Describe) -> MismatchError | DivergenceError | None:
        """Return the error that follows from what is known; None if there is none.

        Once the operation is settled, that is its outcome, with the same text on every rank.
        """
        if self.mismatched:
            return MismatchError(self._mismatch(describe))
        if len(set(self.prepared.values())) > 1:
            return DivergenceError(self._divergence(describe))
        return None

    def _mismatch(self, describe: Describe) -> str:
        groups: dict[bytes, list[int]] = {}
        for rank, begin in sorted(self.begins.items()):
            groups.setdefault(begin.digest, []).append(rank)
        # The majority first, so that the message reads as "these, but that one"; ties go to the lowest rank.
        ordered = sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks[0]))
        said = [f"{name_ranks(ranks, describe)} called {self.begins[ranks[0]].description}" for ranks in ordered]
        text = f"call number {self.own.operation & SEQUENCE_MASK} is not the same on every rank: {'; '.join(said)}"
        if self.absent:
            text += f"; {name_ranks(self.absent, describe)} called nothing yet"
        if self.own.kind in ("send", "receive"):
            return f"{text}. What is received must look like what is sent; no array was changed"
        return f"{text}. Every rank must make the same calls in the same order; no array was changed"

    def _divergence(self, describe: Describe) -> str:
        groups: dict[bytes, list[int]] = {}
        for rank, digest in sorted(self.prepared.items()):
            groups.setdefault(digest, []).append(rank)
        ordered = sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks[0]))
        said = [f"{name_ranks(ranks, describe)} holds {self.prepared[ranks[0]].hex()[:16]}" for ranks in ordered]
        number = self.own.operation & SEQUENCE_MASK
        return (
            f"results of {self.own.description}, call number {number}, differ by their digests: "
            f"{'; '.join(said)}. No array was changed; suspect faulty memory or mixed versions"
        )
