"""What machines that agree by ballots have in common: telling messages apart, numbering, and their history."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Generic, TypeVar

from sparkle_mesh import limits
from sparkle_mesh.membership.messages import (
    Accept,
    Accepted,
    Agreement,
    Ballot,
    Chosen,
    Declined,
    Prepare,
    Promise,
)

#: How a machine names the peers that it hears.
Sender = TypeVar("Sender")
Instruction = TypeVar("Instruction")


class BallotMachine(ABC, Generic[Sender, Instruction]):
    """One part in a single-decree Paxos instance: proposer, acceptor and learner.

    Attributes
    ----------
    history
        The last events, for error messages and bug reports.
    """

    def __init__(self) -> None:
        self.history: deque[str] = deque(maxlen=limits.MACHINE_HISTORY_MAX_COUNT)
        self._promised: Ballot | None = None
        self._round = 0

    def _note(self, now: float, what: str) -> None:
        self.history.append(f"{now:.3f} {what}")

    def _next_ballot(self, proposer: str) -> Ballot:
        """Return one above all that this machine knows of."""
        self._round = max(self._round, 0 if self._promised is None else self._promised.round) + 1
        return Ballot(round=self._round, proposer=proposer)

    def _dispatch(self, sender: Sender, message: Agreement, now: float) -> list[Instruction]:
        match message:
            case Prepare():
                return self._on_prepare(sender, message, now)
            case Promise():
                return self._on_promise(sender, message, now)
            case Accept():
                return self._on_accept(sender, message, now)
            case Accepted():
                return self._on_accepted(sender, message, now)
            case Declined():
                return self._on_declined(sender, message, now)
            case _:
                return self._on_chosen(sender, message, now)

    @abstractmethod
    def _on_prepare(self, sender: Sender, prepare: Prepare, now: float) -> list[Instruction]: ...

    @abstractmethod
    def _on_promise(self, sender: Sender, promise: Promise, now: float) -> list[Instruction]: ...

    @abstractmethod
    def _on_accept(self, sender: Sender, accept: Accept, now: float) -> list[Instruction]: ...

    @abstractmethod
    def _on_accepted(self, sender: Sender, accepted: Accepted, now: float) -> list[Instruction]: ...

    @abstractmethod
    def _on_declined(self, sender: Sender, declined: Declined, now: float) -> list[Instruction]: ...

    @abstractmethod
    def _on_chosen(self, sender: Sender, chosen: Chosen, now: float) -> list[Instruction]: ...
