"""Brings the members of a mesh to one state at a step boundary, and takes in those who wait to join.

Every member calls it at the same place of its program. A first, small round says who is at which step, who is new, and
whether processes wait to be taken in; where all are alike and nobody waits, that is all. If somebody waits, all members
ask for a view with the newcomers, whose first call is this one, too. Then states are compared by the digests of their
chunks, and whoever is behind takes what it lacks from all that have it, at once; every chunk is verified.

The reference is the state that most of those hold who were synchronised before, or else that of the lowest rank among
them; where all are new, or one comes from another mesh that was further, that of the highest step. A death on the way
begins it again, with what was received already.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import (
    CollectiveTimeoutError,
    DivergenceError,
    MismatchError,
    PeerLostError,
    UsageError,
)
from sparkle_mesh.nurseries import is_cancellation, one_error
from sparkle_mesh.state_chunks import DIGEST_BYTES, StateChunks

if TYPE_CHECKING:
    from sparkle_mesh.async_mesh import AsyncMesh

logger = logging.getLogger(__name__)
Array = np.ndarray[Any, np.dtype[Any]]
#: Of a member: it was synchronised in this mesh; it was not yet; nor was it, but in another one before; and it holds a
#: mixture of states, which is no reference.
_OLD, _NEW, _VETERAN, _TORN = range(4)
#: step, standing, candidates, digest of layout (two words), digest of state (two words).
_ROW_WORDS = 7


@dataclass(frozen=True, slots=True)
class Synchronized:
    """How a synchronisation went.

    Attributes
    ----------
    step
        The step that all are at now: that of the reference.
    newcomers
        How many members came in.
    sources
        The ranks that hold the reference; all of them, if nobody was behind.
    bytes_received
        Of this member's state that came from others.
    largest_difference
        By how much this member's numbers differed from the reference at most; 0 if not at all, if it is new, or if only
        in the sign of a zero or the bits of what is not a number.
    """

    step: int
    newcomers: int
    sources: tuple[int, ...]
    bytes_received: int
    largest_difference: float


class Synchronizer:
    """What one member keeps between its synchronisations.

    Attributes
    ----------
    progress
        How much of what this member lacks has come, from 0 to 1.
    standing
        What its state is worth to others; that of a former membership, ``before``, goes on.
    """

    def __init__(self, mesh: AsyncMesh, before: Synchronizer | None = None) -> None:
        self._mesh = mesh
        self.standing: int = _NEW if before is None else before.standing
        if self.standing == _OLD:
            self.standing = _VETERAN
        self._no_admission_before = 0.0
        self.progress = 1.0

    async def run(self, state: object, step: int, *, on_drift: str, check: bool, timeout_s: float) -> Synchronized:
        """Synchronise; see :meth:`Mesh.synchronize`."""
        with _awaited_by_others(self._mesh):
            if isinstance(step, bool) or not isinstance(step, int | np.integer) or not 0 <= step < 2**62:
                raise UsageError(f"step is {step!r}; give how many steps this member has done, a whole number from 0")
            if on_drift not in ("repair", "raise"):
                raise UsageError(f"on_drift is {on_drift!r}; it must be 'repair' or 'raise'")
            run = _Run(self._mesh, self, StateChunks(state), int(step), on_drift, check)
        with trio.move_on_after(timeout_s):
            while True:
                try:
                    done = await run.once(self.standing)
                except PeerLostError as error:
                    # Another view: whoever is in it begins again.
                    logger.info("synchronising again: %s", error)
                    with _awaited_by_others(self._mesh):
                        await trio.lowlevel.checkpoint()
                    continue
                if done is not None:
                    self.standing = _OLD
                    self._mesh._node.membership.step = done.step
                    return done
        raise CollectiveTimeoutError(
            f"synchronize did not end in {timeout_s:.3g} s; it can be called again on all ranks"
        )

    def candidates(self, now: float) -> int:
        """Return how many wait to be taken in, unless that has just failed."""
        return 0 if now < self._no_admission_before else self._mesh._node.membership.succession.candidates

    async def admit(self) -> None:
        """Ask for a view with those who wait; return when there is one, or it takes too long."""
        membership, follower = self._mesh._node.membership, self._mesh._follower
        epoch = membership.succession.view.epoch
        membership.admit(True)
        with trio.move_on_after(limits.ADMISSION_TIMEOUT_S):
            while follower.opened_epoch <= epoch:
                await follower.until_changed()
            return
        membership.admit(False)
        self._no_admission_before = trio.current_time() + limits.ADMISSION_PAUSE_S


class _Run:
    """One synchronisation, which may take several attempts."""

    def __init__(
        self, mesh: AsyncMesh, owner: Synchronizer, chunks: StateChunks, step: int, on_drift: str, check: bool
    ) -> None:
        self._mesh, self._owner, self._chunks = mesh, owner, chunks
        self._step, self._on_drift, self._check = step, on_drift, check
        self._received_bytes = 0
        self._epoch = 0
        self._damaged = 0
        self._attempts = 0
        self._largest = 0.0
        self._differs = False
        self._newcomers = 0

    async def once(self, standing: int) -> Synchronized | None:
        """Try once; None if newcomers may have come in, and it is to be done again.

        Raises PeerLostError, and DivergenceError if nobody holds a state that can be the reference.
        """
        group, owner = self._mesh._group, self._owner
        # All that follows is of one view: in another one, members begin again, with the first round.
        with _awaited_by_others(self._mesh):
            await group.until_may_begin()
        self._epoch = group.epoch
        rows = await self._tell(standing, b"\0" * DIGEST_BYTES)
        if rows[:, 2].all():
            # Who is not connected to all members yet is not taken in.
            before = set(group.members)
            with _awaited_by_others(self._mesh):
                await owner.admit()
            self._newcomers += len(set(group.members) - before)
            return None
        steps, fresh = rows[:, 0], rows[:, 1].astype(bool)
        self._check_layouts(rows)
        if (steps == steps[0]).all() and not fresh.any() and not self._check:
            return Synchronized(int(steps[0]), self._newcomers, tuple(range(len(rows))), 0, 0.0)
        with _awaited_by_others(self._mesh):
            if self._chunks.nbytes > limits.STATE_CHUNK_BYTES:
                mine = await trio.to_thread.run_sync(self._chunks.digests)
            else:
                mine = self._chunks.digests()
        rows = await self._tell(standing, blake2b(mine.tobytes(), digest_size=DIGEST_BYTES).digest())
        sources = _choose_sources(rows)
        if not sources:
            # Told once, it is up to the program; what it goes on with is its state.
            owner.standing = _NEW
            raise DivergenceError(
                "all who held the state are lost, and those left have received a part of it each: load a checkpoint, "
                "or go on with the mixture that the arrays hold, and synchronise again"
            )
        reference = sources[0]
        if len(sources) < len(rows) and not await self._transfer(reference, sources, mine, fresh):
            return None
        owner.progress = 1.0
        largest = self._largest if standing == _OLD else 0.0
        step = int(rows[reference, 0])
        return Synchronized(step, self._newcomers, tuple(sources), self._received_bytes, largest)

    async def _tell(self, standing: int, digest: bytes) -> Array:
        """Return what every rank says of itself."""
        row = np.zeros(_ROW_WORDS, np.int64)
        row[:3] = self._step, standing, self._owner.candidates(trio.current_time())
        row[3:5] = np.frombuffer(self._chunks.layout, np.int64)
        row[5:7] = np.frombuffer(digest, np.int64)
        rows: Array = await self._mesh._group.all_gather(row, epoch=self._epoch)
        return rows

    def _check_layouts(self, rows: Array) -> None:
        layouts = {tuple(row[3:5]) for row in rows}
        if len(layouts) > 1:
            mine = tuple(rows[self._mesh._group.rank, 3:5])
            others = [rank for rank, row in enumerate(rows) if tuple(row[3:5]) != mine]
            raise MismatchError(
                f"states differ in their arrays: this rank gives {self._chunks.describe()}, and ranks "
                f"{', '.join(map(str, others))} give others; nothing was changed"
            )

    async def _transfer(self, reference: int, sources: Sequence[int], mine: Array, fresh: Array) -> bool:
        """Let every member that is behind take the chunks that it lacks, in turn from all ``sources``.

        Returns whether all came as they should have. Raises PeerLostError.
        """
        group = self._mesh._group
        right = mine.copy()
        await group.broadcast(right, reference, epoch=self._epoch)
        behind = group.rank not in sources
        lacking = (mine != right).any(axis=1) if behind else np.zeros(len(mine), bool)
        wanted = (
            (await group.all_gather(lacking.view(np.uint8), epoch=self._epoch)).astype(bool)
            if len(mine)
            else np.zeros((group.size, 0), bool)
        )
        writes = self._on_drift == "repair" or bool(fresh[group.rank])
        total, done = int(lacking.sum()), 0
        self._differs = bool(total) and not fresh[group.rank]
        takers = [rank for rank in range(group.size) if rank not in sources]

        async def take(chunks: Array, source: int) -> None:
            nonlocal done
            for chunk in chunks:
                await self._take(int(chunk), source, right[chunk], writes=writes)
                done += 1
                self._owner.progress = done / total

        with _awaited_by_others(self._mesh), one_error():
            async with trio.open_nursery() as nursery:
                for place, source in enumerate(sources):
                    for taker in takers:
                        chunks = np.flatnonzero(wanted[taker])[place :: len(sources)]
                        if source == group.rank:
                            nursery.start_soon(self._send, chunks, taker)
                        elif taker == group.rank:
                            nursery.start_soon(take, chunks, source)
        return await self._report(fresh)

    async def _send(self, chunks: Array, taker: int) -> None:
        for chunk in chunks:
            await self._mesh._group.send(self._chunks.read(int(chunk)), taker, tag=_TAG, epoch=self._epoch)

    async def _take(self, chunk: int, source: int, right: Array, *, writes: bool) -> None:
        data = np.empty(self._chunks.chunk_bytes(chunk), np.uint8)
        await self._mesh._group.receive(data, source, tag=_TAG, epoch=self._epoch)
        if blake2b(data.data, digest_size=DIGEST_BYTES).digest() != right.tobytes():
            logger.warning("chunk %d of the state, as rank %d sent it, is not what its digest says", chunk, source)
            self._damaged += 1
            return
        self._largest = max(self._largest, self._chunks.difference(chunk, data))
        self._received_bytes += data.size
        if writes:
            self._owner.standing = _TORN
            self._chunks.write(chunk, data)

    async def _report(self, fresh: Array) -> bool:
        """Tell all how far those were off that should not have been; return whether all have what they lacked."""
        group = self._mesh._group
        said = np.array([self._largest if not fresh[group.rank] else 0.0, self._damaged, self._differs])
        rows = await group.all_gather(said, epoch=self._epoch)
        damaged = [rank for rank, row in enumerate(rows) if row[1]]
        if damaged:
            self._attempts += 1
            self._damaged = 0
            if self._attempts == limits.STATE_ATTEMPTS_MAX_COUNT:
                raise DivergenceError(
                    f"ranks {', '.join(map(str, damaged))} got parts of the state that are not what their digests say,"
                    f" {self._attempts} times: memory may be faulty, or a state changes while it is synchronised"
                )
            return False
        drifted = [_describe_drift(rank, float(row[0])) for rank, row in enumerate(rows) if row[2]]
        if not drifted:
            return True
        text = f"states had drifted apart from the reference: {', '.join(drifted)}"
        if self._on_drift == "raise":
            raise DivergenceError(f"{text}; nothing was changed")
        logger.warning("%s; repaired", text)
        return True


_TAG = "\0state"


@contextmanager
def _awaited_by_others(mesh: AsyncMesh) -> Iterator[None]:
    """Of what is done between two rounds: whatever ends it here (an error, a cancellation) ends the next one on all.

    Within a round that is the collectives' affair: each has one outcome on all ranks. A view that ends has all begin
    again.
    """
    try:
        yield
    except PeerLostError:
        raise
    except BaseException as error:
        why = "it was given up" if is_cancellation(error) else f"{type(error).__name__}: {error}"
        mesh._group.give_up_next(f"its synchronize ended early: {why}"[: limits.REASON_MAX_CHARS])
        raise


def _describe_drift(rank: int, largest: float) -> str:
    by = f"by {largest:.3g} at most" if largest else "in bits alone (the sign of a zero, or of what is not a number)"
    return f"rank {rank} {by}"


def _choose_sources(rows: Array) -> list[int]:
    """Return the ranks that hold the state that counts; none if nobody holds one that can."""
    states = [(int(row[0]), int(row[5]), int(row[6])) for row in rows]
    whole = [rank for rank, row in enumerate(rows) if row[1] != _TORN]
    if not whole:
        return []
    old = [rank for rank in whole if rows[rank, 1] == _OLD]
    if old:
        state, count = Counter(states[rank] for rank in old).most_common(1)[0]
        if 2 * count <= len(old):
            state = states[old[0]]
    # What was trained furthest is not lost: neither in a mesh that has just formed, of members of another one perhaps,
    # nor where one of those comes into a mesh that others have begun anew meanwhile.
    others = [rank for rank in whole if rows[rank, 1] == _VETERAN or not old]
    furthest = max(others, key=lambda rank: (states[rank][0], -rank), default=None)
    if furthest is not None and (not old or states[furthest][0] > state[0]):
        state = states[furthest]
    return [rank for rank in whole if states[rank] == state]
