"""Where a member stands with each collective that is not ended everywhere, and how an epoch's end decides it. Pure.

A member *prepares* an operation when it holds its whole result, and *commits* it once all members that take part have
prepared it with the same digest. Before it has prepared it may *abort* it by itself: then nobody can commit it.

Operations are numbered for as long as the lineage lasts: the number of the :data:`stream <.messages.StreamCount>` in
the upper half, and which of its operations it is in the lower. A member begins those of a stream in their order, so
that how many it has begun says much: what it has begun and does not name as open, it has committed. What it has aborted
it goes on to name until nobody can have it in flight any more; and what has ended before it came to it, until it does:
whoever joins meanwhile must not begin with that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from sparkle_mesh import limits
from sparkle_mesh.membership.messages import OperationList, OperationState, Route, Stage, StreamCounts

SEQUENCE_BITS: Final = 32
SEQUENCE_MASK: Final = 2**SEQUENCE_BITS - 1


def is_routed(stream: int) -> bool:
    """Whether the operations of ``stream`` are between two members."""
    return stream >= limits.COLLECTIVE_STREAM_NUMBERS_COUNT


@dataclass(frozen=True, slots=True)
class Standing:
    """What a member promises about its operations: those that it names, and how many of each stream it has begun."""

    operations: OperationList = ()
    streams: StreamCounts = ()


class OpenOperations:
    """The operations of one member in the epoch that it is in.

    Attributes
    ----------
    frozen
        Whether the epoch ends: nothing changes any more until :meth:`begin_epoch`.
    on_freeze
        Called just before, for whoever has something to enter first.
    """

    def __init__(self) -> None:
        self.frozen = False
        self.on_freeze: Callable[[], None] = lambda: None
        self._states: dict[int, OperationState] = {}
        #: Those of them that were given up in this epoch; and the last of its stream that had begun here by then.
        self._aborted: dict[int, int] = {}
        #: Those of them that have ended with an earlier epoch, while one before them is repeated.
        self._settled: set[int] = set()
        self._begun: dict[int, int] = {}

    def begin(self, number: int, *, tag: str = "", route: Route = (), once: bool = False) -> bool:
        """Begin operation ``number``; False if it must wait: the epoch ends, or too many are named already.

        ``route`` are the ranks that take part if not all do; ``tag`` is for people. ``once`` is that it is not to be
        repeated.
        """
        state = OperationState(number=number, tag=tag, state="begun", digest=b"", route=route, once=once or bool(route))
        if not self._set(state):
            return False
        stream = number >> SEQUENCE_BITS
        self._begun[stream] = max(self._begun.get(stream, 0), number & SEQUENCE_MASK)
        return True

    @property
    def is_full(self) -> bool:
        """Whether nothing more can begin: too much was given up that others may yet come to; a view makes room."""
        return len(self._states) - len(self._settled) >= limits.OPERATIONS_OPEN_MAX_COUNT

    def prepare(self, number: int, digest: bytes) -> bool:
        """This member holds the result; False if it must not say so any more."""
        return self._change(number, "prepared", digest)

    def commit(self, number: int) -> bool:
        """All have prepared; False if this member must not commit by itself any more."""
        if self.frozen or number not in self._states:
            return False
        del self._states[number]
        if self._aborted or self._settled:
            self._forget(number)
        return True

    def _forget(self, committed: int) -> None:
        """Name no more what has ended and all know of: they have taken part in one that began here after that.

        What comes after one that is open goes on to be named: if that is repeated, who joins comes to both.
        """
        stream = committed >> SEQUENCE_BITS
        # A copy: threads that carry out collectives by themselves enter theirs here, too.
        named = sorted(number for number in list(self._states) if number >> SEQUENCE_BITS == stream)
        for number in named:
            if number not in self._aborted and number not in self._settled:
                break
            if committed > self._aborted.get(number, number):
                self._aborted.pop(number, None)
                self._settled.discard(number)
                del self._states[number]

    def abort(self, number: int, *, told: bool = False) -> bool:
        """Give up; False if it is not this member's to give up any more: it has prepared, or the epoch ends.

        ``told`` is that nobody can have committed: another member has given up, or digests differ.
        """
        state = self._states.get(number)
        if state is None or state.state not in ("begun", "prepared") or (state.state == "prepared" and not told):
            return False
        if not self._change(number, "aborted", b""):
            return False
        stream = number >> SEQUENCE_BITS
        self._aborted[number] = stream << SEQUENCE_BITS | self.begun(stream)
        return True

    def state(self, number: int) -> OperationState | None:
        """Return where this member stands with one of them; None if it does not name it."""
        return self._states.get(number)

    def begun(self, stream: int) -> int:
        """Return how many operations of ``stream`` were begun."""
        return self._begun.get(stream, 0)

    def _change(self, number: int, stage: Stage, digest: bytes) -> bool:
        known = self._states.get(number)
        if known is None:
            return False
        return self._set(msgspec.structs.replace(known, state=stage, digest=digest))

    def _set(self, state: OperationState) -> bool:
        if self.frozen or (self.is_full and state.number not in self._states):
            return False
        self._states[state.number] = state
        return True

    def freeze(self) -> None:
        """The epoch ends."""
        if not self.frozen:
            self.on_freeze()
        self.frozen = True

    def begin_epoch(self, outcomes: OperationList = ()) -> None:
        """Another epoch begins; what this member had begun and is to be repeated is begun in it, too."""
        again = {outcome.number for outcome in outcomes if outcome.state == "repeat"}
        self._states = {
            number: msgspec.structs.replace(state, state="begun", digest=b"")
            for number, state in self._states.items()
            if number in again
        }
        self._aborted, self._settled = {}, set()
        self._note_ended(outcomes)
        # Those between two members begin anew, because ranks do.
        self._begun = {stream: count for stream, count in self._begun.items() if not is_routed(stream)}
        self.frozen = False

    def join(self, streams: StreamCounts, outcomes: OperationList = ()) -> None:
        """This member begins where the others are."""
        self._begun = dict(streams)
        self._note_ended(outcomes)

    def _note_ended(self, outcomes: OperationList) -> None:
        """Pass over what has ended and would come next; name what has ended further ahead, of this member or others."""
        repeated: dict[int, int] = {}
        for outcome in outcomes:
            if outcome.state == "repeat":
                stream = outcome.number >> SEQUENCE_BITS
                repeated[stream] = min(repeated.get(stream, outcome.number), outcome.number)
        named = []
        for outcome in sorted(outcomes, key=lambda one: one.number):
            stream, sequence = outcome.number >> SEQUENCE_BITS, outcome.number & SEQUENCE_MASK
            if outcome.state == "repeat" or is_routed(stream):
                continue
            if sequence > self.begun(stream) + 1:
                named.append(outcome)
                continue
            self._begun[stream] = max(self.begun(stream), sequence)
            if outcome.state != "committed" and outcome.number > repeated.get(stream, outcome.number):
                # Who comes later begins with what is repeated, and comes to this one, too.
                named.append(outcome)
        for outcome in named[: limits.OPERATIONS_PER_PROMISE_MAX_COUNT - limits.OPERATIONS_OPEN_MAX_COUNT]:
            self._settled.add(outcome.number)
            self._states[outcome.number] = outcome

    def standing(self) -> Standing:
        """Return where each stands, for a promise."""
        return Standing(tuple(self._states.values()), tuple(sorted(self._begun.items())))


def decide(standings: Mapping[int, Standing]) -> tuple[OperationList, StreamCounts]:
    """Return how every operation ends that any of these members names, and where members that join begin.

    Parameters
    ----------
    standings
        By rank in the old view: of every member that goes on, as it promised, and perhaps of others.

    Returns
    -------
    outcomes
        ``aborted`` if a member has given it up, or results differ; ``committed`` if all that take part have the
        result, or somebody has committed; ``repeat`` else, because nobody can have committed it, or ``lost``
        if it is not to be repeated.
    streams
        For each stream the number of the last operation that is settled, and all before it.
    """
    tables = {rank: {state.number: state for state in one.operations} for rank, one in standings.items()}
    begun = {rank: dict(one.streams) for rank, one in standings.items()}
    named = {number: state for table in tables.values() for number, state in table.items()}
    outcomes = []
    for number in sorted(named):
        route = named[number].route
        part = [rank for rank in tables if rank in route or not route]
        states = [_state(number, tables[rank], begun[rank]) for rank in part]
        digests = {tables[rank][number].digest for rank in part if number in tables[rank]} - {b""}
        stage: Stage = "repeat"
        if "aborted" in states or len(digests) > 1:
            # Who has come to it and gone on does not name it for as long as others may.
            stage = "aborted"
        elif "lost" in states:
            # It was decided with an earlier view, and some have yet to come to it.
            stage = "lost"
        elif "committed" in states or all(state == "prepared" for state in states):
            stage = "committed"
        elif named[number].once:
            stage = "lost"
        digest = min(digests) if stage == "committed" and digests else b""
        outcomes.append(msgspec.structs.replace(named[number], state=stage, digest=digest))
    streams = _settled(outcomes, begun.values())
    return (*outcomes, *_committed_since(streams, named, begun.values())), streams


def _committed_since(
    streams: StreamCounts, named: Collection[int], begun: Iterable[Mapping[int, int]]
) -> Iterator[OperationState]:
    """What members that join would come to, and that is committed: it began after something that is repeated."""
    latest = [dict(counts) for counts in begun]
    for stream, settled in streams:
        for sequence in range(settled + 1, max(counts.get(stream, 0) for counts in latest) + 1):
            number = stream << SEQUENCE_BITS | sequence
            if number not in named:
                yield OperationState(number=number, tag="", state="committed", digest=b"")


def _state(number: int, table: Mapping[int, OperationState], begun: Mapping[int, int]) -> Stage | None:
    if number in table:
        return table[number].state
    return "committed" if begun.get(number >> SEQUENCE_BITS, 0) >= number & SEQUENCE_MASK else None


def _settled(outcomes: Iterable[OperationState], begun: Iterable[Mapping[int, int]]) -> StreamCounts:
    settled: dict[int, int] = {}
    for counts in begun:
        for stream, count in counts.items():
            if not is_routed(stream):
                settled[stream] = max(settled.get(stream, 0), count)
    for outcome in outcomes:
        stream = outcome.number >> SEQUENCE_BITS
        if outcome.state == "repeat":
            settled[stream] = min(settled[stream], (outcome.number & SEQUENCE_MASK) - 1)
    return tuple(sorted(settled.items()))
