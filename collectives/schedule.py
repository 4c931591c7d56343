"""Schedules as data: what one rank sends, receives and reduces, over which elements.

Nomenclature, used throughout the package:

*element*
    one number; all ranges ``[start, stop)`` are in elements of one flat vector, never in bytes.
*shard*
    the part of the vector that one rank owns in an algorithm that divides it.
*segment*
    the unit that is sent in one message; a shard is cut into segments so that steps overlap.
*step*
    one instruction of a schedule; also, in a message, the number of the algorithm's round.
*space*
    where elements live: ``INPUT`` (the caller's data, never written), ``WORK`` (the result as it grows) or
    ``SCRATCH`` (one segment per peer, between a receive and its reduction).

A schedule has the meaning of its steps executed one after the other. What may really overlap follows from
that (:mod:`sparkle_mesh.collectives.plan`), so an algorithm is written as a plain loop and is one small file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import TypeAlias


class Space(Enum):
    """Where elements live."""

    INPUT = "input"
    WORK = "work"
    SCRATCH = "scratch"


class Content(Enum):
    """What the elements of a message are: they may travel in different forms."""

    #: One rank's own numbers.
    INPUT = "input"
    #: The sum of some.
    PARTIAL = "partial"
    #: What all ranks will hold.
    RESULT = "result"


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``[start, stop)`` of ``source`` (INPUT or WORK) to ``peer``."""

    peer: int
    start: int
    stop: int
    source: Space
    round: int
    segment: int
    content: Content


@dataclass(frozen=True, slots=True)
class Receive:
    """Receive ``[start, stop)`` from ``peer`` into WORK, or into SCRATCH for the :class:`Reduce` that follows."""

    peer: int
    start: int
    stop: int
    target: Space
    round: int
    segment: int
    content: Content


@dataclass(frozen=True, slots=True)
class Reduce:
    """``WORK = operand + SCRATCH (from peer)``; ``finish`` on the step that completes these elements.

    The operand is INPUT for the first reduction into a range (out of place: it costs no extra pass and leaves
    the caller's data alone) and WORK for later ones. Finishing (a mean's division) happens once, at the one
    rank that completes the elements, before anybody else receives them.

    Which comes first matters where ranks each add up the same (of two NaNs the first one's bits win, and of zeros of
    both signs, for a minimum): ``received_first`` turns the order around.
    """

    peer: int
    start: int
    stop: int
    operand: Space
    finish: bool = False
    received_first: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """``WORK = INPUT`` over ``[start, stop)``."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Accumulate:
    """``WORK = WORK + INPUT`` over ``[start, stop)``; ``finish`` as for :class:`Reduce`."""

    start: int
    stop: int
    finish: bool = False


Step: TypeAlias = Send | Receive | Reduce | Copy | Accumulate


@dataclass(frozen=True, slots=True)
class Schedule:
    """What one rank does.

    Attributes
    ----------
    algorithm
        Its name, for people.
    rank, size, element_count
        Whose it is, and over what.
    steps
        What to do.
    result
        The space that holds the result when all steps are done; None if this rank gets none.
    gives, holds
        The elements that this rank has in INPUT, and needs in WORK; all of them if None.
    replicated
        Whether all ranks end with the same elements.
    cut_alike
        Whether what is complete after one step is so on every rank, so that digests can be taken range by range.
    """

    algorithm: str
    rank: int
    size: int
    element_count: int
    steps: tuple[Step, ...]
    result: Space | None = Space.WORK
    gives: tuple[int, int] | None = None
    holds: tuple[int, int] | None = None
    replicated: bool = True
    cut_alike: bool = True

    @property
    def input_range(self) -> tuple[int, int]:
        """The elements that INPUT holds."""
        return self.gives or (0, self.element_count)

    @property
    def work_range(self) -> tuple[int, int]:
        """The elements that WORK holds."""
        return self.holds or (0, self.element_count)

    @property
    def result_range(self) -> tuple[int, int]:
        """The elements of the result on this rank."""
        if self.result is None:
            return (0, 0)
        return self.work_range if self.result is Space.WORK else self.input_range


#: Shards and segments begin at multiples of this many elements where the vector is long enough, so that
#: vectorised loops start aligned.
ALIGN_ELEMENTS = 16


def split_evenly(element_count: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``[0, element_count)`` into ``parts`` ranges that differ by little; some are empty if it is short.

    >>> split_evenly(10, 4)
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    align = ALIGN_ELEMENTS if element_count >= parts * ALIGN_ELEMENTS * 4 else 1
    bounds = [element_count * part // parts // align * align for part in range(parts)]
    bounds.append(element_count)
    return list(pairwise(bounds))


def segments(start: int, stop: int, segment_elements: int) -> Iterator[tuple[int, int, int]]:
    """Cut ``[start, stop)`` into ``(segment number, start, stop)`` of at most ``segment_elements`` each."""
    for number, low in enumerate(range(start, stop, segment_elements)):
        yield number, low, min(low + segment_elements, stop)
