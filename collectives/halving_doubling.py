"""Recursive halving and doubling: a reduce-scatter and an all-gather in ``2 log2(size)`` exchanges.

In the first half of the exchanges two ranks that differ in one bit of their numbers halve the range that they are both
at: each sends the half that the other keeps, and adds what comes to its own. In the second half the same pairs, in
reverse order, send each other what they have finished. The bytes are the ring's, in far fewer rounds, for numbers of
ranks that are powers of two. Other numbers: of the first ``2 (size - p)`` ranks, for the largest power ``p``, each
even one gives its whole vector to the odd one after it, and gets the result from it.

Source: R. Rabenseifner, "Optimization of collective reduction operations", ICCS 2004, sections 2.3 and 2.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparkle_mesh.collectives.schedule import Content, Receive, Reduce, Schedule, Send, Space, Step, segments

_NAME = "halving_doubling"
# Rounds: folding, unfolding, halving, doubling.
_FOLD, _UNFOLD, _HALVE, _DOUBLE = 0, 1, 2, 64


@dataclass(frozen=True, slots=True)
class _Exchange:
    """One of the pairs of a rank: what each of both keeps while halving, and has finished while doubling."""

    turn: int
    peer: int
    first: bool
    peer_folds: bool
    ours: tuple[int, int]
    theirs: tuple[int, int]


def halving_doubling_all_reduce(rank: int, size: int, element_count: int, segment_elements: int) -> Schedule:
    """Return ``rank``'s part. All arguments but ``rank`` must be the same on every rank."""
    if size == 1:
        return Schedule(_NAME, rank, size, element_count, (), Space.INPUT)
    folded = size - (1 << (size.bit_length() - 1))
    whole = list(segments(0, element_count, segment_elements))
    steps: list[Step] = []
    if rank < 2 * folded and rank % 2 == 0:
        steps += [Send(rank + 1, low, high, Space.INPUT, _FOLD, n, Content.INPUT) for n, low, high in whole]
        steps += [Receive(rank + 1, low, high, Space.WORK, _UNFOLD, n, Content.RESULT) for n, low, high in whole]
        return Schedule(_NAME, rank, size, element_count, tuple(steps), cut_alike=False)
    folds = rank < 2 * folded
    for number, low, high in whole if folds else ():
        steps.append(Receive(rank - 1, low, high, Space.SCRATCH, _FOLD, number, Content.INPUT))
        steps.append(Reduce(rank - 1, low, high, Space.INPUT))
    exchanges = list(_exchanges(rank, size, element_count))
    for exchange in exchanges:
        steps += _halve(exchange, folds, exchange is exchanges[-1], segment_elements)
    for exchange in reversed(exchanges):
        steps += _double(exchange, segment_elements)
    if folds:
        steps += [Send(rank - 1, low, high, Space.WORK, _UNFOLD, n, Content.RESULT) for n, low, high in whole]
    return Schedule(_NAME, rank, size, element_count, tuple(steps), cut_alike=False)


def _exchanges(rank: int, size: int, element_count: int) -> Iterator[_Exchange]:
    """The exchanges of a rank that takes part, in the order of halving."""
    participants = 1 << (size.bit_length() - 1)
    folded = size - participants
    # Those that take part, numbered anew.
    place = rank // 2 if rank < 2 * folded else rank - folded
    low, high = 0, element_count
    for turn in range(participants.bit_length() - 1):
        peer = place ^ (1 << turn)
        middle = (low + high) // 2
        first = place < peer
        ours, theirs = ((low, middle), (middle, high)) if first else ((middle, high), (low, middle))
        peer_rank = 2 * peer + 1 if peer < folded else peer + folded
        yield _Exchange(turn, peer_rank, first, peer < folded, ours, theirs)
        low, high = ours


def _halve(exchange: _Exchange, folds: bool, last: bool, segment_elements: int) -> list[Step]:
    steps: list[Step] = []
    turn, peer = _HALVE + exchange.turn, exchange.peer
    # Bare inputs are exchanged first, by those that nobody has folded into.
    bare = not exchange.turn and not folds
    source, content = (Space.INPUT, Content.INPUT) if bare else (Space.WORK, Content.PARTIAL)
    for number, low, high in segments(*exchange.theirs, segment_elements):
        steps.append(Send(peer, low, high, source, turn, number, content))
    content = Content.INPUT if not exchange.turn and not exchange.peer_folds else Content.PARTIAL
    for number, low, high in segments(*exchange.ours, segment_elements):
        steps.append(Receive(peer, low, high, Space.SCRATCH, turn, number, content))
        steps.append(Reduce(peer, low, high, source, last, received_first=not exchange.first))
    return steps


def _double(exchange: _Exchange, segment_elements: int) -> list[Step]:
    steps: list[Step] = []
    turn, peer = _DOUBLE + exchange.turn, exchange.peer
    for number, low, high in segments(*exchange.ours, segment_elements):
        steps.append(Send(peer, low, high, Space.WORK, turn, number, Content.RESULT))
    for number, low, high in segments(*exchange.theirs, segment_elements):
        steps.append(Receive(peer, low, high, Space.WORK, turn, number, Content.RESULT))
    return steps
