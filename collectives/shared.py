"""All-reduce among the ranks of one host: one-sided, over memory that they map.

Nobody sends anything. Every rank writes down where its operand lies (:mod:`.board`), reads the others' operands where
they are, reduces its own part into memory that all can read, and takes the other parts from there. The vector is cut
into *chunks*, and a chunk into one *part* per rank.

Where every operand lies in an arena (``mesh.allocate``, or copied there because it is small), chunks are small, so that
what one rank has just reduced is still in the cache that all share when the others take it. Where one lies elsewhere,
it is read by cross-memory attach, and a vector is one chunk: such an operand is gone with its owner, so nobody takes
anything before all of it is reduced.

**The outcome** is decided by stores and loads alone, and is the same for all. An operation is *committed* once all
ranks have reduced the first chunk (all chunks, in the second case); before that, no array is touched. Who wants to
abort it writes a mark first, then looks: if all have reduced that much it is too late, and the mark is withdrawn. Who
has seen that all have reduced that much then looks for marks: one that stands means that it was aborted. Of the two at
least one sees the other (:func:`.board.fence`). A mark whose owner is lost before it has decided counts for nothing.

**A death** after that loses nothing: what the dead rank had reduced is still mapped, and so is its operand. Chunks
before its last are taken as always. The others are untouched on every rank, because nobody takes a chunk that is not
reduced by all; so each survivor reduces the rest by itself, from all operands, and takes it once all survivors have.
All of them end with the same bits as if nobody had died.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives.board import Boards, Word, count_of, counted
from sparkle_mesh.collectives.reduction import FLOAT32, Array, Reduction, is_half
from sparkle_mesh.collectives.shared_plan import (
    Chunk,
    MappedOperand,
    Operand,
    Place,
    RemoteOperand,
    SharedLane,
    mapped,
    plan_chunks,
    work_bytes,
)
from sparkle_mesh.errors import LinkClosedError, ProtocolError
from sparkle_mesh.transport.shared_memory import PeerMemory


class Mark(IntEnum):
    """How far a rank is with aborting an operation."""

    TRYING = 1
    ABORTED = 2
    WITHDRAWN = 3


class Recovery(IntEnum):
    """How far a survivor is with what a dead rank left."""

    REDUCED = 1
    TAKING = 2


class Setback(Exception):
    """Why an operation did not end well here."""


class AbortedError(Setback):
    """The operation is aborted on every rank; no array was changed."""


class ExcludedError(Setback):
    """The others have gone on without this rank; what its arrays hold is undefined."""


class OperandError(Setback):
    """The operand of ``rank`` cannot be read (any more); nothing is committed."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(reason)
        self.rank = rank


class SharedReduction:
    """One all-reduce on this rank, once all ranks have begun the same.

    Parameters
    ----------
    boards
        Of all ranks.
    peers
        The others' memory.
    rank, number
        This rank, and the number of the operation.
    lanes
        This rank's vectors.
    reduction
        How to combine.
    work
        This rank's bytes for reduced parts, as said on its board.
    lost
        The ranks that are lost; looked at again whenever this rank is woken.
    given_up
        Whether this rank shall stop; looked at as well.

    Raises
    ------
    OperandError
        If a board says what cannot be.
    """

    def __init__(
        self,
        boards: Boards,
        peers: Mapping[int, PeerMemory],
        *,
        rank: int,
        number: int,
        lanes: Sequence[SharedLane],
        reduction: Reduction,
        work: Array,
        lost: Mapping[int, str],
        given_up: Callable[[], bool],
    ) -> None:
        self._boards = boards
        self._rank = rank
        self._size = len(peers) + 1
        self._number = number
        self._lanes = lanes
        self._reduction = reduction
        self._lost = lost
        self._given_up = given_up
        #: Whether arrays may have been written to.
        self.committed = False
        self._taken = 0
        self._budget_bytes = limits.LINK_TURN_BYTES
        counts, item_bytes = tuple(lane.data.size for lane in lanes), tuple(lane.data.itemsize for lane in lanes)
        self._operands = [self._find_operands(index, lane, peers) for index, lane in enumerate(lanes)]
        whole = any(isinstance(operand, RemoteOperand) for row in self._operands for operand in row) or any(
            lane.place is Place.MEMORY for lane in lanes
        )
        self._plan = plan_chunks(counts, item_bytes, self._size, whole=whole)
        nbytes = work_bytes(counts, item_bytes, self._size)
        types = [(lane.data.itemsize, lane.data.dtype) for lane in lanes]
        bytes_of_work = [
            work if other == rank else _mapped(peers, other, boards.get(other, Word.WORK), nbytes, np.dtype(np.uint8))
            for other in range(self._size)
        ]
        # Every rank's work as elements of a lane.
        self._work = [[each[: each.size // n * n].view(dtype) for each in bytes_of_work] for n, dtype in types]
        self._recovered: list[Array] | None = None
        self._scratch = np.empty(limits.SHARED_BLOCK_BYTES if whole else 0, np.uint8)

    def _find_operands(self, index: int, lane: SharedLane, peers: Mapping[int, PeerMemory]) -> list[Operand]:
        """Return every rank's vector of one lane."""
        operands: list[Operand] = []
        for rank in range(self._size):
            if rank == self._rank:
                operands.append(MappedOperand(lane.data))
                continue
            place, where = (self._boards.get(rank, Word.LANES + 2 * index + at) for at in (0, 1))
            if place == Place.ARENA:
                operands.append(MappedOperand(_mapped(peers, rank, where, lane.data.size, lane.data.dtype)))
            elif place == Place.MEMORY:
                operands.append(RemoteOperand(peers[rank], where))
            else:
                raise OperandError(rank, f"it says that it lies in a place of kind {place}")
        return operands

    # --- Running ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry it out; return when the result is in this rank's vectors. If it is interrupted, it can be run again.

        Raises
        ------
        AbortedError, ExcludedError, OperandError
            See there.
        """
        while not self.committed:
            await self._run_until_committed()
        if not self._boards.in_thread:
            # What is committed is carried through, but for others that keep it waiting.
            with trio.move_on_after(limits.SHARED_FINISH_S, shield=True):
                await self._run_on()
        await self._run_on()

    async def _run_until_committed(self) -> None:
        ready = self._boards.least(Word.REDUCED, self._number)
        if self._given_up():
            raise AbortedError
        if ready >= self._plan.commit_at:
            await self._commit()
        elif self._lost:
            if self.try_to_abort():
                raise AbortedError
        elif self._may_reduce():
            await self._reduce(self._plan.chunks[self._reduced])
        else:
            await self._wait()

    async def _run_on(self) -> None:
        """Take what is reduced, reduce what is not; cancelling it loses nothing."""
        chunks = self._plan.chunks
        while self._taken < len(chunks):
            ready = self._boards.least(Word.REDUCED, self._number)
            if ready > self._taken:
                await self._take(chunks[self._taken : ready])
            elif self._lost and self._taken == self._left_by_the_lost():
                await self._recover()
            elif self._may_reduce():
                await self._reduce(chunks[self._reduced])
            else:
                self._check_not_left_behind()
                await self._wait()
        self._check_not_left_behind()

    def _check_not_left_behind(self) -> None:
        """What was read is what belongs there only if nobody has gone on since. Raises ExcludedError.

        A rank that is held up for so long that the others go on in another view finds their memory used again.
        """
        if self._boards.have_left(self._lost):
            raise ExcludedError

    def _may_reduce(self) -> bool:
        """Whether there is a next chunk, and room for this rank's part of it."""
        reduced = self._reduced
        if reduced == len(self._plan.chunks):
            return False
        return reduced < self._boards.least(Word.TAKEN, self._number) + self._plan.ahead

    @property
    def _reduced(self) -> int:
        """How many chunks this rank has reduced: what it has told the others, whatever interrupted it after."""
        return count_of(self._boards.get(self._rank, Word.REDUCED), self._number)

    async def _wait(self) -> None:
        conditions = [(Word.REDUCED, counted(self._number, max(self._taken + 1, self._plan.commit_at)))]
        if self._reduced < len(self._plan.chunks):
            least = max(self._reduced + 1 - self._plan.ahead, 0)
            conditions.append((Word.TAKEN, counted(self._number, least)))
        await self._boards.until(*conditions)

    async def _reduce(self, chunk: Chunk) -> None:
        """Reduce this rank's part of its next chunk."""
        low, high = chunk.part_of(self._rank)
        if high > low:
            await self._combine(chunk.lane, low, high, self._part(self._rank, chunk))
        self._boards.publish(Word.REDUCED, counted(self._number, self._reduced + 1))

    async def _combine(self, lane: int, low: int, high: int, out: Array) -> None:
        """Write the reduction of elements ``[low, high)`` of a lane to ``out``, block by block."""
        step = limits.SHARED_BLOCK_BYTES // out.itemsize
        half = is_half(out.dtype)
        if self._size == 2 and not self._scratch.size and not half:
            # Two operands, both mapped, are read once and added: nothing need stay in a cache meanwhile.
            step = max(out.size, 1)
        scratch = self._scratch.view(out.dtype)
        sums = np.empty(min(step, out.size), FLOAT32) if half else out
        for start in range(low, high, step):
            stop = min(start + step, high)
            block = out[start - low : stop - low]
            total = self._read(lane, 0, start, stop, block)
            into = block
            if half:
                into = sums[: stop - start]
                into[:] = total
                total = into
            for rank in range(1, self._size):
                self._reduction.combine(total, self._read(lane, rank, start, stop, scratch), into)
                total = into
            self._reduction.finish(into)
            if half:
                with np.errstate(over="ignore"):
                    block[:] = into
            await self._let_others_run(block.nbytes * self._size)

    def _read(self, lane: int, rank: int, start: int, stop: int, into: Array) -> Array:
        try:
            return self._operands[lane][rank].read(start, stop, into)
        except LinkClosedError as error:
            raise OperandError(rank, str(error)) from error

    async def _take(self, chunks: Sequence[Chunk]) -> None:
        """Copy the reduced parts of ``chunks`` of all ranks into this rank's vectors."""
        for chunk in chunks:
            low, stop = chunk.start, chunk.stop
            if low < stop:
                data = self._lanes[chunk.lane].data
                at = chunk.work_at // data.itemsize
                for work in self._work[chunk.lane]:
                    high = min(low + chunk.part, stop)
                    data[low:high] = work[at : at + high - low]
                    await self._let_others_run((high - low) * data.itemsize)
                    low = high
            self._taken += 1
        self._boards.publish(Word.TAKEN, counted(self._number, self._taken))

    def _part(self, rank: int, chunk: Chunk) -> Array:
        """Return where the part of ``rank`` is when it is reduced."""
        low, high = chunk.part_of(rank)
        work = self._work[chunk.lane][rank]
        at = chunk.work_at // work.itemsize
        return work[at : at + high - low]

    async def _let_others_run(self, nbytes: int) -> None:
        self._budget_bytes -= nbytes
        if self._budget_bytes < 0:
            self._budget_bytes = limits.LINK_TURN_BYTES
            await self._boards.let_others_run()

    # --- The outcome -----------------------------------------------------------------------------

    async def _commit(self) -> None:
        """All have reduced enough: unless it was aborted, go on to take.

        Raises
        ------
        AbortedError
        """
        marks = self._boards.counts(Word.MARK, self._number)
        if Mark.ABORTED in marks:
            raise AbortedError
        if any(mark == Mark.TRYING and rank not in self._lost for rank, mark in enumerate(marks)):
            # It is about to look; it rings when it has.
            await self._boards.sleep()
            return
        if self._boards.was_aborted(self._number):
            # Long ago: who aborted it is at another one, and only that makes it look as if it had reduced this one.
            raise AbortedError
        self.committed = True

    def try_to_abort(self) -> bool:
        """Abort the operation on every rank, unless it is committed; return whether it is aborted."""
        return not self.committed and try_to_abort(self._boards, self._number, self._plan.commit_at)

    def _left_by_the_lost(self) -> int:
        """Return how many chunks all of the lost ranks have reduced."""
        counts = self._boards.counts(Word.REDUCED, self._number)
        return min(counts[rank] for rank in self._lost)

    async def _recover(self) -> None:
        """Reduce all that is left, alone; take it once all other survivors have reduced it, too."""
        chunks = self._plan.chunks[self._taken :]
        results = self._recovered
        if results is None:
            results = []
            for chunk in chunks:
                out = np.empty(chunk.stop - chunk.start, self._lanes[chunk.lane].data.dtype)
                await self._combine(chunk.lane, chunk.start, chunk.stop, out)
                results.append(out)
            if Recovery.TAKING in self._boards.counts(Word.RECOVERED, self._number):
                raise ExcludedError
            self._recovered = results
        self._boards.publish(Word.RECOVERED, counted(self._number, Recovery.REDUCED))
        self._boards.ring_all()
        while not self._survivors_have_recovered():
            self._check_not_left_behind()
            await self._boards.sleep()
        self._boards.publish(Word.RECOVERED, counted(self._number, Recovery.TAKING))
        for chunk, out in zip(chunks, results, strict=True):
            self._lanes[chunk.lane].data[chunk.start : chunk.stop] = out
        self._taken = len(self._plan.chunks)

    def _survivors_have_recovered(self) -> bool:
        counts = self._boards.counts(Word.RECOVERED, self._number)
        return all(count >= Recovery.REDUCED or rank in self._lost for rank, count in enumerate(counts))


def _mapped(peers: Mapping[int, PeerMemory], rank: int, offset: int, count: int, dtype: np.dtype[Any]) -> Array:
    try:
        return mapped(peers[rank].arena, offset, count, dtype)
    except (ProtocolError, ValueError) as error:
        raise OperandError(rank, str(error)) from error


def try_to_abort(boards: Boards, number: int, commit_at: int) -> bool:
    """Abort operation ``number`` on every rank, unless all have reduced ``commit_at`` chunks; return whether it is."""
    boards.publish(Word.MARK, counted(number, Mark.TRYING))
    late = min(boards.counts(Word.REDUCED, number)) >= commit_at
    aborted = not late or Mark.ABORTED in boards.counts(Word.MARK, number) or boards.was_aborted(number)
    if aborted:
        boards.note_aborted(number)
    boards.publish(Word.MARK, counted(number, Mark.ABORTED if aborted else Mark.WITHDRAWN))
    boards.ring_all()
    return aborted
