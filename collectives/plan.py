"""From a schedule to a plan: which steps wait for which.

A schedule means its steps one after the other; a plan keeps that meaning and drops every wait that it does not need.
A step waits for an earlier one only where both touch the same elements of WORK and one of them writes (the
three hazards of pipelined processors: read after write, write after read, write after write), and a reduction waits
for the receive that fills its scratch.

What else orders steps is the executor's: messages to one peer leave in schedule order; messages from one peer are
received in schedule order; and the next one is not received before the previous one's reduction is done, because
there is one scratch segment per peer. The verifier runs plans under exactly these rules.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache

from sparkle_mesh import limits
from sparkle_mesh.collectives.schedule import (
    Accumulate,
    Content,
    Copy,
    Receive,
    Reduce,
    Schedule,
    Send,
    Space,
    Step,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule with its dependencies. Steps are named by their index in ``schedule.steps``.

    Attributes
    ----------
    waits_for
        How many steps must be done before each step.
    dependents
        The steps that wait for each step.
    sends, receives
        By peer: indices in the order of the messages; a receive comes with its reduction, or None.
    local
        The steps that need no peer: copies and accumulations.
    digests
        Indices after which the step's range holds final values, in the order of the ranges. None if ranks do not end
        with the same, or not range by range.
    result_sends
        By range: how often this rank sends the finished numbers of it.
    awaited_count
        How many steps must be done before this rank holds its result.
    in_place
        Whether INPUT and WORK are the same memory.
    blocks_in_order
        Whether what comes from a peer waits for peers of lower rank alone. If that is so of all operations in flight,
        readers of links may wait for each other and never do so in a circle, whatever order messages come in.
    """

    schedule: Schedule
    waits_for: tuple[int, ...]
    dependents: tuple[tuple[int, ...], ...]
    sends: dict[int, tuple[int, ...]]
    receives: dict[int, tuple[tuple[int, int | None], ...]]
    local: tuple[int, ...]
    digests: dict[int, int]
    result_sends: dict[tuple[int, int], int]
    awaited_count: int
    in_place: bool
    blocks_in_order: bool


class _Hazards:
    """Who last wrote, and who has read since, each cell of WORK."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self._bounds = sorted({bound for step in steps for bound in (step.start, step.stop)})
        self._writer: list[int | None] = [None] * len(self._bounds)
        self._readers: list[list[int]] = [[] for _ in self._bounds]

    def _cells(self, step: Step) -> range:
        return range(bisect_left(self._bounds, step.start), bisect_left(self._bounds, step.stop))

    def read(self, index: int, step: Step) -> set[int]:
        before = set()
        for cell in self._cells(step):
            writer = self._writer[cell]
            if writer is not None:
                before.add(writer)
            self._readers[cell].append(index)
        return before

    def write(self, index: int, step: Step) -> set[int]:
        before = set()
        for cell in self._cells(step):
            writer = self._writer[cell]
            if writer is not None:
                before.add(writer)
            before.update(self._readers[cell])
            self._writer[cell] = index
            self._readers[cell] = []
        return before


def make_plan(schedule: Schedule, in_place: bool = False) -> Plan:
    """Derive the plan of ``schedule``.

    ``in_place`` lets WORK overwrite INPUT, for algorithms that read no input of elements that they have written: then
    reading INPUT counts as reading WORK.
    """
    builder = _Builder(schedule, in_place)
    for index, step in enumerate(schedule.steps):
        builder.add(index, step)
    return builder.build()


class _Builder:
    def __init__(self, schedule: Schedule, in_place: bool) -> None:
        self._schedule = schedule
        self._in_place = in_place
        self._hazards = _Hazards(schedule.steps)
        self._before: list[set[int]] = []
        self._sends: dict[int, list[int]] = {}
        self._receives: dict[int, list[tuple[int, int | None]]] = {}
        self._filled: dict[int, int] = {}
        self._local: list[int] = []
        self._final: dict[tuple[int, int], int] = {}

    def _reads(self, index: int, step: Step, space: Space) -> set[int]:
        return self._hazards.read(index, step) if space is Space.WORK or self._in_place else set()

    def add(self, index: int, step: Step) -> None:
        before, hazards = self._before, self._hazards
        match step:
            case Send():
                before.append(self._reads(index, step, step.source))
                self._sends.setdefault(step.peer, []).append(index)
                if self._schedule.result is Space.INPUT:
                    self._final.setdefault((step.start, step.stop), index)
                return
            case Receive(target=Space.SCRATCH):
                before.append(set())
                self._filled[step.peer] = len(self._receives.setdefault(step.peer, []))
                self._receives[step.peer].append((index, None))
                return
            case Receive():
                before.append(hazards.write(index, step))
                self._receives.setdefault(step.peer, []).append((index, None))
            case Reduce():
                slot = self._filled.pop(step.peer)
                received = self._receives[step.peer][slot][0]
                self._receives[step.peer][slot] = (received, index)
                # Reading and writing the same cells, a step must not wait for itself.
                waits = self._reads(index, step, step.operand)
                before.append((waits | hazards.write(index, step) | {received}) - {index})
            case Copy():
                before.append((self._reads(index, step, Space.INPUT) | hazards.write(index, step)) - {index})
                self._local.append(index)
            case Accumulate():
                before.append((hazards.read(index, step) | hazards.write(index, step)) - {index})
                self._local.append(index)
        self._final[step.start, step.stop] = index

    def build(self) -> Plan:
        schedule, before = self._schedule, self._before
        dependents: list[list[int]] = [[] for _ in schedule.steps]
        for index, earlier in enumerate(before):
            for other in earlier:
                dependents[other].append(index)
        compared = schedule.replicated and schedule.cut_alike
        final = sorted(self._final.items()) if compared else []
        digests = {index: order for order, (_, index) in enumerate(final)}
        awaited = sum(not isinstance(step, Send) or index in digests for index, step in enumerate(schedule.steps))
        return Plan(
            schedule=schedule,
            waits_for=tuple(len(earlier) for earlier in before),
            dependents=tuple(tuple(later) for later in dependents),
            sends={peer: tuple(indices) for peer, indices in self._sends.items()},
            receives={peer: tuple(pairs) for peer, pairs in self._receives.items()},
            local=tuple(self._local),
            digests=digests,
            result_sends=Counter(
                (step.start, step.stop)
                for step in schedule.steps
                if isinstance(step, Send) and step.content is Content.RESULT
            ),
            awaited_count=awaited,
            in_place=self._in_place,
            blocks_in_order=self._blocks_in_order(),
        )

    def _blocks_in_order(self) -> bool:
        # Per step, the peers that must have sent something before it can be done, as bits.
        needs: list[int] = []
        for index, step in enumerate(self._schedule.steps):
            need = 0
            # Whoever sends a result has had all that this rank gave for it: such a receive finds nothing to wait for.
            if not (isinstance(step, Receive) and step.content is Content.RESULT):
                for earlier in self._before[index]:
                    need |= needs[earlier]
            if isinstance(step, Receive | Reduce):
                if need >> (step.peer + 1):
                    return False
                need |= 1 << step.peer
            needs.append(need)
        return True


@lru_cache(maxsize=limits.COLLECTIVE_PLANS_CACHED_MAX_COUNT)
def cached_plan(in_place: bool, algorithm: Callable[..., Schedule], *arguments: Hashable) -> Plan:
    """Return the plan of ``algorithm(*arguments)``; training repeats the same few shapes over and over."""
    return make_plan(algorithm(*arguments), in_place)
