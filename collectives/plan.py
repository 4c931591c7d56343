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
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from sparkle_mesh import limits
from sparkle_mesh.collectives.schedule import Accumulate, Copy, Receive, Reduce, Schedule, Send, Space, Step


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
        Indices after which the step's range holds final values, in the order of the ranges.
    """

    schedule: Schedule
    waits_for: tuple[int, ...]
    dependents: tuple[tuple[int, ...], ...]
    sends: dict[int, tuple[int, ...]]
    receives: dict[int, tuple[tuple[int, int | None], ...]]
    local: tuple[int, ...]
    digests: dict[int, int]


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


def make_plan(schedule: Schedule) -> Plan:
    """Derive the plan of ``schedule``."""
    hazards = _Hazards(schedule.steps)
    before: list[set[int]] = []
    sends: dict[int, list[int]] = {}
    receives: dict[int, list[tuple[int, int | None]]] = {}
    filled: dict[int, int] = {}
    local: list[int] = []
    final: dict[tuple[int, int], int] = {}
    for index, step in enumerate(schedule.steps):
        match step:
            case Send():
                before.append(hazards.read(index, step) if step.source is Space.WORK else set())
                sends.setdefault(step.peer, []).append(index)
                if schedule.result is Space.INPUT:
                    final.setdefault((step.start, step.stop), index)
            case Receive(target=Space.SCRATCH):
                before.append(set())
                filled[step.peer] = len(receives.setdefault(step.peer, []))
                receives[step.peer].append((index, None))
            case Receive():
                before.append(hazards.write(index, step))
                receives.setdefault(step.peer, []).append((index, None))
                final[step.start, step.stop] = index
            case Reduce():
                slot = filled.pop(step.peer)
                received = receives[step.peer][slot][0]
                receives[step.peer][slot] = (received, index)
                waits = hazards.read(index, step) if step.operand is Space.WORK else set()
                # Reading and writing the same cells, a step must not wait for itself.
                before.append((waits | hazards.write(index, step) | {received}) - {index})
                final[step.start, step.stop] = index
            case Copy():
                before.append(hazards.write(index, step))
                local.append(index)
                final[step.start, step.stop] = index
            case Accumulate():
                before.append((hazards.read(index, step) | hazards.write(index, step)) - {index})
                local.append(index)
                final[step.start, step.stop] = index
    dependents: list[list[int]] = [[] for _ in schedule.steps]
    for index, earlier in enumerate(before):
        for other in earlier:
            dependents[other].append(index)
    return Plan(
        schedule=schedule,
        waits_for=tuple(len(earlier) for earlier in before),
        dependents=tuple(tuple(later) for later in dependents),
        sends={peer: tuple(indices) for peer, indices in sends.items()},
        receives={peer: tuple(pairs) for peer, pairs in receives.items()},
        local=tuple(local),
        digests={index: order for order, (_, index) in enumerate(sorted(final.items()))},
    )


@lru_cache(maxsize=limits.COLLECTIVE_PLANS_CACHED_MAX_COUNT)
def cached_plan(algorithm: Callable[..., Schedule], *arguments: int) -> Plan:
    """Return the plan of ``algorithm(*arguments)``; training repeats the same few shapes over and over."""
    return make_plan(algorithm(*arguments))
