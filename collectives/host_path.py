"""The way that collectives of a group take whose ranks are all on one host and share memory: :mod:`.shared`.

Whether a group has this way is agreed on once, by what all ranks have written on their boards. A call that can take
it does on all ranks; nothing is sent over links then, unless something goes wrong: ranks that called different things
say so over their links, as for every other call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.arrays import Arrays, Bucket
from sparkle_mesh.collectives.board import Boards, Sharing, Word
from sparkle_mesh.collectives.calls import Call
from sparkle_mesh.collectives.executor import BufferPool
from sparkle_mesh.collectives.operation import Operation
from sparkle_mesh.collectives.parts_call import PartsCall
from sparkle_mesh.collectives.reduction import Array, Reduction
from sparkle_mesh.collectives.shared import (
    AbortedError,
    OperandError,
    Setback,
    SharedReduction,
    try_to_abort,
)
from sparkle_mesh.collectives.shared_plan import Place, SharedLane, work_bytes
from sparkle_mesh.errors import OutcomeUnknownError
from sparkle_mesh.transport.shared_memory import PeerMemory, SharedMemory, SharedMemoryLink

if TYPE_CHECKING:
    from sparkle_mesh.collectives.group_state import GroupState


class MismatchedError(Setback):
    """Ranks have called different things; they tell each other over their links."""


# Chunks.
_MORE_THAN_ANY = 2**31


class HostPath:
    """One-sided collectives of one group, on one rank.

    Parameters
    ----------
    group
        Whose.
    memory
        This process's.
    links
        To all other ranks, all of them of shared memory.
    """

    def __init__(self, group: GroupState, memory: SharedMemory, links: Mapping[int, SharedMemoryLink]) -> None:
        self._group = group
        self._arena = memory.arena
        self._peers: dict[int, PeerMemory] = {rank: link.memory for rank, link in links.items()}
        self._boards = Boards(group.rank, memory, links, group_number(group.lineage, group.epoch))
        self._sharing = Sharing.UNKNOWN
        self._pool = BufferPool(self._arena.allocate)
        self._work = self._arena.allocate(1)
        #: That of the last reduction that all had begun.
        self._work_in_use = self._work
        self._lanes: list[SharedLane] = []
        self._op = "sum"
        self._reduction: SharedReduction | None = None
        self._boards.open()

    # --- Before a call ---------------------------------------------------------------------------

    async def agreed(self) -> bool:
        """Whether all ranks can take this way; waits until all have said so, or one is lost."""
        while self._sharing is Sharing.UNKNOWN:
            if self._group.lost:
                return False
            self._sharing = await self._boards.until_all_are_open()
        return self._sharing is not Sharing.NOT

    @property
    def ready(self) -> bool:
        """Whether it is known already that all ranks can take this way."""
        return self._sharing in (Sharing.ARENAS, Sharing.MEMORY)

    @property
    def committed(self) -> bool:
        """Whether the call in flight cannot be aborted any more."""
        return self._reduction is not None and self._reduction.committed

    def takes(self, call: Call | PartsCall) -> bool:
        """Whether ``call`` goes this way, where it is agreed on."""
        return call.one_sided and len(call.arrays.dtypes) <= limits.SHARED_LANES_MAX_COUNT

    def stage(self, arrays: Arrays) -> list[Bucket]:
        """Return the vectors of a call: in the arena if the others could not read them where they are, or not as fast.

        Raises
        ------
        MemoryError
        """
        buckets = arrays.buckets(self._pool.take)
        for bucket in buckets:
            data = bucket.data
            if bucket.staged or self._arena.offset_of(data) is not None:
                continue
            if data.nbytes <= limits.SHARED_STAGED_MAX_BYTES or self._sharing is not Sharing.MEMORY:
                bucket.data = self._pool.take(data.size, data.dtype)
                np.copyto(bucket.data, data)
                bucket.staged = True
        return buckets

    def give_back(self, buckets: list[Bucket]) -> None:
        """Take back what :meth:`stage` gave; nothing reads it any more."""
        for bucket in buckets:
            if bucket.staged:
                self._pool.give(bucket.data)

    # --- A call ----------------------------------------------------------------------------------

    def begin(self, operation: Operation, call: Call | PartsCall) -> None:
        """Write down that ``operation`` has begun; not twice. Its buckets are staged."""
        if self._boards.get(self._group.rank, Word.BEGUN) == operation.number:
            return
        lanes = [self._lane(bucket.data) for bucket in operation.buckets]
        counts, item_bytes = tuple(lane.data.size for lane in lanes), tuple(lane.data.itemsize for lane in lanes)
        nbytes = work_bytes(counts, item_bytes, self._group.size)
        work = self._work
        if work.size < nbytes or work.size > max(4 * nbytes, limits.SHARED_WORK_KEPT_MAX_BYTES):
            # The others may still take from the one of the last reduction: it is kept until all have begun another.
            work = self._work = self._arena.allocate(nbytes)
        self._lanes, self._op = lanes, call.op
        offset = self._arena.offset_of(work)
        assert offset is not None
        self._boards.begin(
            operation.number,
            operation.begin.digest,
            offset,
            [(lane.place, lane.where) for lane in lanes],
            operation.begin.description,
        )

    def _lane(self, data: Array) -> SharedLane:
        offset = self._arena.offset_of(data)
        if offset is None:
            return SharedLane(data, Place.MEMORY, int(data.__array_interface__["data"][0]))
        return SharedLane(data, Place.ARENA, offset)

    async def run(self, operation: Operation) -> None:
        """Carry ``operation`` to its end: it is finished when this returns, or is left to the links."""
        try:
            await self._attempt(operation)
            operation.finished.set()
        except Setback as setback:
            await self.settle(operation, setback)

    def run_in_thread(self, operation: Operation, timeout_s: float) -> None:
        """Carry out ``operation``, blocking the calling thread, as long as all goes well.

        Raises
        ------
        Setback
            If it does not: :meth:`settle` it then, in trio.
        OutOfTimeError
            If that takes longer than ``timeout_s``; :meth:`run` goes on where it was.
        """
        with self._boards.waiting_in_thread(timeout_s):
            try:
                self._attempt(operation).send(None)
            except StopIteration:
                return
        raise AssertionError("a thread's wait was given to trio")

    async def _attempt(self, operation: Operation) -> None:
        """Carry out ``operation``; it can be called again after it was interrupted. Raises Setback."""
        if self._reduction is None:
            await self._until_all_have_begun(operation)
            self._work_in_use = self._work
            self._reduction = SharedReduction(
                self._boards,
                self._peers,
                rank=self._group.rank,
                number=operation.number,
                lanes=self._lanes,
                reduction=Reduction(self._op, self._group.size),
                work=self._work,
                lost=self._group.lost,
                given_up=operation.finished.is_set,
            )
        await self._reduction.run()

    async def settle(self, operation: Operation, setback: Setback) -> None:
        """End ``operation``, which did not go well here."""
        match setback:
            case MismatchedError():
                self._group.post_begin(operation)
            case AbortedError():
                await self._hear_why(operation)
            case OperandError():
                self._group.peer_lost(setback.rank, f"its operand cannot be read: {setback}")
                self._abort_for_the_lost(operation)
                await self._hear_why(operation)
            case _:
                operation.fail(
                    OutcomeUnknownError(
                        f"{operation.begin.description}, call number {operation.sequence}, was finished by the other "
                        "ranks without this one: what its arrays hold is undefined; join again and synchronise"
                    )
                )

    def succeeded(self) -> None:
        """A call has succeeded, whichever way it went."""
        self._boards.note_success()

    def finish(self) -> None:
        """Forget the call that was in flight."""
        self._reduction = None
        self._lanes = []

    async def _until_all_have_begun(self, operation: Operation) -> None:
        """Wait until all ranks have begun the same.

        Raises
        ------
        MismatchedError, AbortedError
        """
        others = [rank for rank in range(self._group.size) if rank != self._group.rank]
        while not operation.finished.is_set():
            begun = [rank for rank in others if self._boards.get(rank, Word.BEGUN) == operation.number]
            if len(operation.agreement.begins) > 1 or any(
                self._boards.digest(rank) != operation.begin.digest for rank in begun
            ):
                raise MismatchedError
            if len(begun) == len(others):
                return
            if self._group.lost:
                raise AbortedError
            if any(self._boards.get(rank, Word.BEGUN) > operation.number for rank in others):
                # It has given this one up, and says so over its link.
                await self._boards.sleep()
            else:
                await self._boards.until((Word.BEGUN, operation.number))
        raise AbortedError

    # --- Failure ---------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something has happened: let the call in flight look."""
        self._boards.wake()

    def try_to_abort(self, operation: Operation) -> bool:
        """Abort ``operation`` on every rank, unless it is committed; return whether it is aborted."""
        while self._reduction is None:
            # A thread may just be about to begin: then it is the reduction that knows when it is too late.
            aborted = try_to_abort(self._boards, operation.number, 1)
            if aborted or self._reduction is None:
                return aborted
        return self._reduction.try_to_abort()

    async def _hear_why(self, operation: Operation) -> None:
        """Another rank has aborted; its reason comes over its link."""
        while not operation.finished.is_set():
            if self._group.lost and not self._group.supervised:
                self._abort_for_the_lost(operation)
                return
            await self._boards.sleep()

    def _abort_for_the_lost(self, operation: Operation) -> None:
        """Nothing is committed, because this rank has not done its part, or has seen that it is aborted."""
        try_to_abort(self._boards, operation.number, _MORE_THAN_ANY)
        self._group.fail_for_the_lost(operation)

    def retire(self) -> None:
        """This rank makes no more calls; the others may go on with the last one, and read what it was given."""
        self._arena.retire()

    # --- For messages ----------------------------------------------------------------------------

    def absent(self, operation: Operation) -> list[int]:
        """Return the ranks that have not begun ``operation``."""
        return [rank for rank in range(self._group.size) if self._boards.get(rank, Word.BEGUN) < operation.number]

    def unfinished(self, operation: Operation) -> list[int]:
        """Return the ranks that have reduced less than others."""
        counts = self._boards.counts(Word.REDUCED, operation.number)
        return [rank for rank, count in enumerate(counts) if count < max(counts) or not count]

    def last_seen(self, rank: int) -> tuple[int, str]:
        """Return the number of the last call that ``rank`` made this way, and that for people."""
        return self._boards.last_call(rank)

    def close(self, *, last: bool = True) -> None:
        """Read no more of the others, and keep nothing in the arena; what they still take from it stays there.

        If it is not the ``last`` of this process, others follow over the same links.
        """
        if last:
            self.retire()
        self.finish()
        self._boards.close(last=last)
        self._pool = BufferPool()
        self._work = self._work_in_use = np.empty(0, np.uint8)


def group_number(lineage: bytes, epoch: int) -> int:
    """Return a number that only ranks of the same view have in common."""
    return int.from_bytes(lineage[:7], "big") << 8 | epoch & 0xFF or 1
