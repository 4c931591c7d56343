"""One range of work shared by unequal workers: each begins with its part, and who is done takes from who is not.

Each worker takes what is left of its own part in pieces that get smaller, so that there is something to take from it
until the end, and few pieces all the same (guided self-scheduling: Polychronopoulos and Kuck, "Guided Self-Scheduling:
A Practical Scheduling Scheme for Parallel Supercomputers", 1987). Who has nothing left takes from the end of that part
which would last longest, as much as makes both end together, unless that would not pay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK, Clock
from sparkle_mesh.errors import KernelStoppedError


class Worker(Protocol):
    """Does ranges of the work; one at a time, in a thread of its own.

    Attributes
    ----------
    rate
        What it is expected to do, per second.
    overhead_s
        What each range costs beside that.
    """

    rate: float
    overhead_s: float

    def run(self, start: int, stop: int) -> None:
        """Do what is in ``[start, stop)``; return when it is done."""


@dataclass(slots=True)
class Share:
    """What one worker did.

    Attributes
    ----------
    ranges
        In the order in which it did them.
    seconds
        How long that took.
    stolen
        How much of it was in another's part at first.
    """

    ranges: list[tuple[int, int]] = field(default_factory=list)
    seconds: float = 0.0
    stolen: int = 0

    @property
    def length(self) -> int:
        """How much it did."""
        return sum(stop - start for start, stop in self.ranges)


@dataclass(slots=True)
class _Part:
    start: int
    stop: int
    rate: float
    overhead_s: float

    @property
    def left(self) -> int:
        return self.stop - self.start


def first_parts(length: int, rates: Sequence[float], overheads_s: Sequence[float], grain: int) -> list[int]:
    """Return how much each worker begins with: such that all end at one time, if they do as is expected.

    Whose overhead is more than it would save gets nothing; nobody gets less than ``grain``.
    """
    chosen = [number for number, rate in enumerate(rates) if rate >= limits.SHARE_RATE_MIN_PER_S]
    counts = [0] * len(rates)
    while chosen:
        # All end at t: the sum of rate * (t - overhead) is the length.
        speed = sum(rates[number] for number in chosen)
        end_s = (length + sum(rates[number] * overheads_s[number] for number in chosen)) / speed
        shares = {number: rates[number] * (end_s - overheads_s[number]) for number in chosen}
        slowest = min(shares, key=lambda number: (shares[number], -number))
        if shares[slowest] >= min(grain, length) or len(chosen) == 1:
            counts = [int(shares.get(number, 0.0)) for number in range(len(rates))]
            break
        chosen.remove(slowest)
    fastest = max(range(len(rates)), key=lambda number: (counts[number], -number))
    counts[fastest] += length - sum(counts)
    return counts


def _in_grains(counts: Sequence[int], grain: int) -> list[int]:
    """Return ``counts`` in whole grains, with the same sum; the last one that gets something has the rest."""
    ends, end, total = [], 0, sum(counts)
    for count in counts:
        end += count
        ends.append(total if end == total else min(round(end / grain) * grain, total))
    return [end - before for before, end in zip([0, *ends], ends, strict=False)]


class Sharing:
    """The work of one call.

    Parameters
    ----------
    length
        The work is ``[0, length)``.
    workers
        Who does it.
    counts
        How much each begins with; see :func:`first_parts`.
    grain
        The least that is worth a range of its own.
    should_stop
        Asked between ranges, from any of the threads.
    """

    def __init__(
        self,
        length: int,
        workers: Sequence[Worker],
        *,
        counts: Sequence[int] | None = None,
        grain: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._workers, self._grain, self._should_stop, self._clock = workers, max(grain, 1), should_stop, clock
        rates, overheads = [worker.rate for worker in workers], [worker.overhead_s for worker in workers]
        if counts is None:
            counts = first_parts(length, rates, overheads, self._grain)
        self._parts: list[_Part] = []
        start = 0
        for count, rate, overhead_s in zip(_in_grains(counts, self._grain), rates, overheads, strict=True):
            self._parts.append(_Part(start, start + count, rate, overhead_s))
            start += count
        self._lock = threading.Lock()
        self._broken = self._cancelled = False
        self.shares = [Share() for _ in workers]

    def run(self) -> list[Share]:
        """Do all of it; return what each worker did.

        Raises
        ------
        KernelStoppedError
            If ``should_stop`` said so: part of the work is done then.
        Exception
            What a worker raised; the others stop after what they are doing.
        """
        with ThreadPoolExecutor(len(self._workers), "sparkle-share") as threads:
            works = [threads.submit(self._work, number) for number in range(len(self._workers))]
        for work in works:
            work.result()
        if self._cancelled:
            raise KernelStoppedError("the kernel was cancelled; its results are not complete")
        return self.shares

    def _work(self, number: int) -> None:
        worker, share = self._workers[number], self.shares[number]
        finished = False
        try:
            while (taken := self.take(number)) is not None:
                started = self._clock.now()
                worker.run(*taken)
                seconds = self._clock.now() - started
                share.ranges.append(taken)
                share.seconds += seconds
                self.measured(number, taken[1] - taken[0], seconds)
            finished = True
        finally:
            self._broken |= not finished

    def measured(self, number: int, count: int, seconds: float) -> None:
        """Worker ``number`` took so long for ``count``: it is expected to go on so."""
        with self._lock:
            part = self._parts[number]
            useful_s = max(seconds - part.overhead_s, seconds / 4, 1e-9)
            part.rate = count / useful_s

    def take(self, number: int) -> tuple[int, int] | None:
        """Return what worker ``number`` does next; None if nothing is left for it."""
        if self._should_stop():
            self._cancelled = True
        with self._lock:
            if self._broken or self._cancelled:
                return None
            part = self._parts[number]
            if not part.left and not self._steal(number):
                return None
            count = max(self._grain, -(-part.left // limits.SHARE_PIECES_COUNT))
            # Few different lengths, for each of which a kernel is made ready: but for the last piece of all, grains
            # times a power of two.
            count = min(self._grain << (count // self._grain).bit_length() - 1, part.left)
            part.start += count
            return part.start - count, part.start

    def _steal(self, number: int) -> bool:
        """Give ``number`` the end of the part that would last longest, if it pays; return whether it did."""
        thief = self._parts[number]
        if thief.rate <= 0:
            return False
        others = [part for part in self._parts if part is not thief and part.left]
        if not others:
            return False
        victim = max(others, key=lambda part: part.left / part.rate if part.rate > 0 else float("inf"))
        # Both end together: (left - x) / rate = x / thief's rate + its overhead.
        count = victim.left
        if victim.rate > 0:
            both = victim.rate + thief.rate
            count = int((victim.left - victim.rate * thief.overhead_s) * thief.rate / both)
        count = victim.left - (victim.left - count) // self._grain * self._grain
        if count < self._grain or not victim.left:
            return False
        victim.stop -= count
        thief.start, thief.stop = victim.stop, victim.stop + count
        self.shares[number].stolen += count
        return True
