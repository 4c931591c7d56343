"""One call of a collective, from its begin to its outcome."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import trio

from sparkle_mesh.collectives.agreement import Agreement
from sparkle_mesh.collectives.arrays import Bucket
from sparkle_mesh.collectives.calls import Call
from sparkle_mesh.collectives.executor import Execution, Lane
from sparkle_mesh.collectives.feedback import ErrorFeedback
from sparkle_mesh.collectives.ledger import Ledger, OneView
from sparkle_mesh.collectives.messages import SEQUENCE_MASK, Begin
from sparkle_mesh.collectives.parts_call import PartsCall
from sparkle_mesh.collectives.schedule import Space
from sparkle_mesh.errors import SparkleError

# What these hand out is the root's.
_FROM_ROOT = ("broadcast", "scatter", "send", "receive")


class SupersededError(SparkleError):
    """The view ended before the operation did; nobody has its result, and it can be made again in the next view."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the last collective went.

    Attributes
    ----------
    kind, algorithm
        ``all_reduce`` by ``ring``, for example.
    contributors
        The ranks whose data is in the result.
    epoch, operation
        The view's epoch, and the number of the call in it.
    bytes
        Of the caller's arrays.
    bytes_sent
        Payload that this rank sent to others.
    seconds
        From the call to its return.
    """

    kind: str
    algorithm: str
    contributors: tuple[int, ...]
    epoch: int
    operation: int
    bytes: int
    bytes_sent: int
    seconds: float


@dataclass(slots=True)
class Operation:
    """A collective in flight on this rank. Ends once: with ``failure``, or without one."""

    begin: Begin
    agreement: Agreement
    execution: Execution
    buckets: list[Bucket]
    lanes: list[Lane]
    finished: trio.Event = field(default_factory=trio.Event)
    failure: SparkleError | None = None
    sent_prepared: bool = False
    #: By rank: how many messages had been posted to it when the last one of this operation was.
    last_words: dict[int, int] = field(default_factory=dict)
    #: Whether it is done over shared memory, with no word over the links.
    one_sided: bool = False
    feedback: ErrorFeedback | None = None
    #: Known once its caller has been told.
    ended_with: Outcome | None = None
    #: Asked before every step.
    ledger: Ledger = field(default_factory=OneView)
    #: Why it will have failed, if the next view says that it has.
    hint: SparkleError | None = None
    #: How long it took, where that is known before its caller is told.
    seconds: float = 0.0
    #: Who the ranks are.
    members: Sequence[Hashable] = ()

    @property
    def number(self) -> int:
        return self.begin.operation

    @property
    def sequence(self) -> int:
        """Which of its tag's calls it is, for people."""
        sequence: int = self.number & SEQUENCE_MASK
        return sequence

    @property
    def succeeded(self) -> bool:
        return self.finished.is_set() and self.failure is None

    def fail(self, error: SparkleError) -> None:
        """End with ``error``; nothing more is sent, and what still comes is dropped."""
        self.failure = error
        self.execution.stop()
        self.finished.set()

    def succeed(self) -> None:
        """End well, as the next view says; what was not sent nobody needs."""
        self.execution.stop()
        self.finished.set()

    def commit(self) -> None:
        """Write the agreed result into the caller's arrays."""
        if self.one_sided:
            for bucket in self.buckets:
                if bucket.staged:
                    bucket.commit(bucket.data)
            return
        # A collective of parts has no buckets: its results are new arrays.
        for bucket, lane in zip(self.buckets, self.lanes, strict=False):
            if lane.plan.schedule.result is Space.WORK:
                bucket.commit(lane.work)

    def keep_what_was_lost(self) -> None:
        """Keep for the next call what this one has lost, as far as error feedback was asked for."""
        if self.feedback is not None:
            for number, lane in enumerate(self.lanes):
                if lane.lost is not None:
                    self.feedback.commit((number, lane.dtype.name), lane.lost)

    def outcome(self, call: Call | PartsCall, seconds: float) -> Outcome:
        """Return how ``call`` went."""
        size = len(self.members)
        return Outcome(
            kind=call.kind,
            algorithm="shared" if self.one_sided else call.algorithm,
            contributors=(call.root,) if call.root is not None and call.kind in _FROM_ROOT else tuple(range(size)),
            epoch=self.begin.epoch,
            operation=self.sequence,
            bytes=call.arrays.nbytes,
            bytes_sent=self.execution.bytes_sent,
            seconds=seconds,
        )
