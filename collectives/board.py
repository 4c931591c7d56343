"""What the ranks of one host tell each other by writing it down where all others can read it.

Every rank has a *board*, a few hundred words at a fixed place in its arena: it alone writes there, all others read.
Saying something costs a store, hearing it a load; whoever has nothing to do yields, then sleeps until it is rung for.

All words are 64 bits, aligned, and are stored and loaded whole. Two orders matter, and :func:`fence` keeps them: what
a word announces is written before it; and of two ranks that each store one word and then load the other's, at least
one sees the other's store (so nobody sleeps through what it waits for, and nobody aborts what another commits).
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Final, TypeAlias

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.shared_memory import SharedMemory, SharedMemoryLink

_fence: Final = threading.Lock()
_COUNT_BITS: Final = 32
_COUNT_MASK: Final = 2**_COUNT_BITS - 1


class Word(IntEnum):
    """Places of words on a board."""

    #: Which group the board is of.
    GROUP = 0
    #: Whether this rank shares memory with all others of the group, see :class:`Sharing`.
    SHARING = 1
    #: The number of the last operation begun; what follows up to LANES is about that one.
    BEGUN = 2
    #: Counts of operation (see :func:`count_of`): chunks reduced, chunks taken, see :class:`Mark`, :class:`Recovery`.
    REDUCED = 3
    TAKEN = 4
    MARK = 5
    RECOVERED = 6
    #: What a sleeping rank waits for: up to two words, and the least value that all ranks must have there.
    SLEEPS = 7
    WAITS_FOR = 8
    WAITS_VALUE = 9
    WAITS_FOR_TOO = 10
    WAITS_VALUE_TOO = 11
    #: Where in the arena the reduced parts are.
    WORK = 12
    #: 32 bytes.
    CALL_DIGEST = 13
    #: Per lane: kind of place, place.
    LANES = 17
    #: The first and the last of the operations that this rank has aborted with no success between them (see
    #: :meth:`Boards.note_aborted`): a mark is overwritten by the next one's.
    ABORTED = 96


class Sharing(IntEnum):
    """Values of :attr:`Word.SHARING`."""

    UNKNOWN = 0
    #: All of the others' arenas can be read.
    ARENAS = 1
    #: And all of their memory.
    MEMORY = 2
    NOT = 3


_DESCRIPTION_OFFSET_BYTES: Final = 1024
_DESCRIPTION_BYTES: Final = limits.ARENA_BOARD_BYTES - _DESCRIPTION_OFFSET_BYTES

#: A word of all ranks, and the least value to wait for.
Condition: TypeAlias = tuple[Word, int]

assert Word.LANES + 2 * limits.SHARED_LANES_MAX_COUNT <= Word.ABORTED < _DESCRIPTION_OFFSET_BYTES // 8


_yield: Final = getattr(os, "sched_yield", lambda: None)


def fence() -> None:
    """Order all stores and loads before this before all after it: taking a lock does, on every processor."""
    with _fence:
        pass


def counted(operation: int, count: int) -> int:
    """Return the word for ``count`` things done of ``operation``."""
    return (operation & _COUNT_MASK) << _COUNT_BITS | count


def count_of(word: int, operation: int) -> int:
    """Return how many things of ``operation`` the word counts: none, if it is still of an earlier one."""
    return word & _COUNT_MASK if word >> _COUNT_BITS == operation & _COUNT_MASK else 0


class OutOfTimeError(Exception):
    """A thread has waited for as long as it may."""


class Boards:
    """The boards of all ranks of a group on one host, this rank's own among them.

    Parameters
    ----------
    rank
        This one.
    memory
        This rank's.
    links
        To all others.
    group
        A number that only ranks of the same group have in common.
    """

    def __init__(self, rank: int, memory: SharedMemory, links: Mapping[int, SharedMemoryLink], group: int) -> None:
        self._rank = rank
        self._memory = memory
        self._peers = {other: link.memory for other, link in links.items()}
        # Views of their own: those of the next group are others.
        arenas = [memory.arena if r == rank else links[r].memory.arena for r in range(len(links) + 1)]
        self._views = [memoryview(arena.board) for arena in arenas]
        self._words = [view.cast("Q") for view in self._views]
        self._own = self._words[rank]
        self._group = group
        self._thread_deadline: float | None = None
        self._poll = select.poll()
        self._poll.register(memory.bell, select.POLLIN)
        self._written = b""
        self._aborting = False

    # --- Writing ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the board this group's, and say how this rank can read the others."""
        readable = all(peer.readable for peer in self._peers.values())
        for index in range(len(self._own)):
            self._own[index] = 0
        self._written = b""
        self._own[Word.SHARING] = Sharing.MEMORY if readable else Sharing.ARENAS
        fence()
        self._own[Word.GROUP] = self._group
        self.ring_all()

    def begin(
        self, operation: int, digest: bytes, work: int, lanes: Sequence[tuple[int, int]], description: str
    ) -> None:
        """Say that ``operation`` has begun here, what it is, and where its operands lie."""
        own = self._own
        if digest != self._written:
            text = description.encode()[: _DESCRIPTION_BYTES - 8]
            start = _DESCRIPTION_OFFSET_BYTES
            own[start // 8] = len(text)
            self._views[self._rank][start + 8 : start + 8 + len(text)] = text
            self._views[self._rank][Word.CALL_DIGEST * 8 : Word.CALL_DIGEST * 8 + 32] = digest
            self._written = digest
        own[Word.WORK] = work
        for index, (kind, place) in enumerate(lanes):
            own[Word.LANES + 2 * index] = kind
            own[Word.LANES + 2 * index + 1] = place
        self.publish(Word.BEGUN, operation)

    def publish(self, word: Word, value: int) -> None:
        """Store ``value``, and ring for those who sleep until all ranks have said so."""
        fence()
        self._own[word] = value
        fence()
        for rank, peer in self._peers.items():
            words = self._words[rank]
            if words[Word.SLEEPS] and (
                (words[Word.WAITS_FOR] == word and self._reached(word, words[Word.WAITS_VALUE]))
                or (words[Word.WAITS_FOR_TOO] == word and self._reached(word, words[Word.WAITS_VALUE_TOO]))
            ):
                peer.ring()

    def note_aborted(self, operation: int) -> None:
        """Say that ``operation`` is aborted, for good.

        A rank may be held up for so long that others have aborted what it is at, and more after that. As none of them
        can succeed with anything meanwhile, all that one of them aborts forms one run of numbers, which is kept here.
        """
        first = self._own[Word.ABORTED] >> _COUNT_BITS if self._aborting else operation & _COUNT_MASK
        self._aborting = True
        fence()
        self._own[Word.ABORTED] = first << _COUNT_BITS | operation & _COUNT_MASK
        fence()

    def note_success(self) -> None:
        """An operation has succeeded: what is aborted after it is of another run."""
        self._aborting = False

    def was_aborted(self, operation: int) -> bool:
        """Whether any rank says that it has aborted ``operation``."""
        fence()
        said = [words[Word.ABORTED] for words in self._words]
        return any(word >> _COUNT_BITS <= operation & _COUNT_MASK <= word & _COUNT_MASK for word in said if word)

    def ring_all(self) -> None:
        """Wake all others, whatever they wait for."""
        for peer in self._peers.values():
            peer.ring()

    def wake(self) -> None:
        """Let :meth:`until` of this rank return."""
        self._memory.ring_own_bell()

    @staticmethod
    def refuse(memory: SharedMemory, links: Iterable[Link], group: int) -> None:
        """Say, where there are no boards for this rank, that it does not share memory with all of the group."""
        words = memory.arena.board.cast("Q")
        words[Word.SHARING] = Sharing.NOT
        fence()
        words[Word.GROUP] = group
        for link in links:
            if isinstance(link, SharedMemoryLink):
                link.memory.ring()

    # --- Reading ---------------------------------------------------------------------------------

    def get(self, rank: int, word: int) -> int:
        """Return a word of ``rank``'s board."""
        return self._words[rank][word]

    def counts(self, word: Word, operation: int) -> list[int]:
        """Return every rank's count of ``operation``."""
        return [count_of(words[word], operation) for words in self._words]

    def least(self, word: Word, operation: int) -> int:
        """Return the least of every rank's counts of ``operation``."""
        return count_of(min([words[word] for words in self._words]), operation)

    def digest(self, rank: int) -> bytes:
        """Return the digest of the call that ``rank`` has begun last."""
        return bytes(self._views[rank][Word.CALL_DIGEST * 8 : Word.CALL_DIGEST * 8 + 32])

    def last_call(self, rank: int) -> tuple[int, str]:
        """Return the number of the last call of ``rank``, and that for people."""
        number = self._words[rank][Word.BEGUN]
        if not number:
            return 0, "nothing yet"
        start = _DESCRIPTION_OFFSET_BYTES
        length = min(self._words[rank][start // 8], _DESCRIPTION_BYTES - 8)
        text = bytes(self._views[rank][start + 8 : start + 8 + length]).decode(errors="replace")
        return number, f"call {number}, {text}"

    def sharing(self) -> Sharing:
        """Return what all ranks of the group can do with each other's memory; UNKNOWN before all have said so."""
        said = [words[Word.SHARING] if words[Word.GROUP] == self._group else 0 for words in self._words]
        if Sharing.NOT in said:
            return Sharing.NOT
        if Sharing.UNKNOWN in said:
            return Sharing.UNKNOWN
        return Sharing.MEMORY if all(each == Sharing.MEMORY for each in said) else Sharing.ARENAS

    def have_left(self, lost: Container[int]) -> bool:
        """Whether a rank that is not ``lost`` has gone on to another group: what it had to be read is no more."""
        fence()
        return any(words[Word.GROUP] != self._group and rank not in lost for rank, words in enumerate(self._words))

    async def until_all_are_open(self) -> Sharing:
        """Wait until all ranks have said what they can do with each other's memory, or this rank is woken."""
        if self.sharing() is Sharing.UNKNOWN:
            await self.sleep()
        return self.sharing()

    # --- Waiting ---------------------------------------------------------------------------------

    def _reached(self, word: int, value: int) -> bool:
        return min([words[word] for words in self._words]) >= value

    async def until(self, *conditions: Condition) -> None:
        """Return once one of one or two ``conditions`` holds, or this rank is woken: look what there is.

        Yields at first, because others of this host may need this core to get there; then it sleeps.
        """
        own = self._own
        first, second = conditions[0], conditions[-1]
        for _ in range(limits.SHARED_YIELDS_COUNT):
            if self._reached(*first) or (second is not first and self._reached(*second)):
                return
            _yield()
        own[Word.WAITS_FOR], own[Word.WAITS_VALUE] = first
        own[Word.WAITS_FOR_TOO], own[Word.WAITS_VALUE_TOO] = second
        own[Word.SLEEPS] = 1
        fence()
        try:
            if not any(self._reached(*condition) for condition in conditions):
                await self._rest()
        finally:
            own[Word.SLEEPS] = 0
            self._memory.quiet()

    async def sleep(self) -> None:
        """Return once this rank is woken, here or by another's :meth:`ring_all`."""
        await self._rest()
        self._memory.quiet()

    async def _rest(self) -> None:
        if self._thread_deadline is None:
            await trio.lowlevel.wait_readable(self._memory.bell)
            return
        left_s = self._thread_deadline - SYSTEM_CLOCK.now()
        if left_s <= 0:
            raise OutOfTimeError
        # In slices: a Ctrl-C that comes just before the thread begins to wait interrupts nothing.
        self._poll.poll(min(left_s, limits.SIGNAL_LOOK_INTERVAL_S) * 1000)

    async def let_others_run(self) -> None:
        """Give way after much work."""
        if self._thread_deadline is None:
            await trio.lowlevel.checkpoint()

    @property
    def in_thread(self) -> bool:
        """Whether whoever waits here blocks its own thread, instead of being a task of trio's."""
        return self._thread_deadline is not None

    @contextmanager
    def waiting_in_thread(self, timeout_s: float) -> Iterator[None]:
        """Within the block, waiting blocks the calling thread, and raises OutOfTimeError after ``timeout_s``."""
        self._thread_deadline = SYSTEM_CLOCK.now() + timeout_s
        try:
            yield
        finally:
            self._thread_deadline = None

    def close(self, *, last: bool = True) -> None:
        """Read no more; let go of the others' arenas, too, if these are the ``last`` boards.

        If they are not, memory that others may still read is about to be used for something else, and they are told.
        """
        if not last:
            self._own[Word.GROUP] = 0
            fence()
        for words, view in zip(self._words, self._views, strict=True):
            words.release()
            with suppress(BufferError):
                view.release()
        if last:
            for peer in self._peers.values():
                peer.arena.close()
