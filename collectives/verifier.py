"""Proves a set of schedules by running all ranks symbolically.

Values are sets of contributing ranks; a link hands over a message only when both ends are at it (rendezvous, no
buffering at all, the hardest case for deadlock); the order of everything is the executor's (:mod:`.plan`). What
could run next is picked by a seeded choice, so that different seeds try different interleavings; a send is in
flight for a while, and what it reads must not change meanwhile.

Checked: every contribution is counted exactly once in every element of every rank's result; completing
(dividing) happens exactly once and before anybody is given the element; nothing unwritten is read; the input
is never written; both ends of each link agree on the order and ranges of messages; the digest ranges cut the
vector alike on every rank; messages are said to be what they are; nothing waits for ever. The elements sent over
each link come back, to be compared with the cost formula.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sparkle_mesh.collectives.plan import Plan, make_plan
from sparkle_mesh.collectives.schedule import Accumulate, Content, Receive, Reduce, Schedule, Send, Space, Step


class ScheduleError(Exception):
    """A set of schedules does not do what it should; the message names rank, step and elements."""


@dataclass(frozen=True, slots=True)
class _Value:
    """The symbolic content of a cell: whose contributions it sums, and whether it is completed."""

    ranks: frozenset[int]
    finished: bool = False


@dataclass(slots=True)
class _Rank:
    plan: Plan
    waiting: list[int]
    input: list[_Value | None]
    work: list[_Value | None]
    scratch: dict[int, list[_Value]] = field(default_factory=dict)
    send_position: dict[int, int] = field(default_factory=dict)
    receive_position: dict[int, int] = field(default_factory=dict)
    # A receive whose reduction is due: the peer's next message is not taken before it is done.
    reducing: dict[int, int] = field(default_factory=dict)
    in_flight: dict[int, list[_Value]] = field(default_factory=dict)
    undone: set[int] = field(default_factory=set)


#: Given a rank and an element of its result: whose contributions it must hold.
Expected = Callable[[int, int], frozenset[int]]


def verify(
    schedules: Sequence[Schedule],
    *,
    expected: Expected | None = None,
    reduced: bool = True,
    seed: int = 0,
    plans: Sequence[Plan] | None = None,
    in_place: bool = False,
) -> dict[tuple[int, int], int]:
    """Run ``schedules`` (one per rank) and check them.

    Parameters
    ----------
    schedules
        One per rank, in rank order.
    expected
        Whose contributions each element of each rank's result must hold; empty for those that do not matter. If None,
        every rank's result must be the sum over all ranks.
    reduced
        Whether contributions are added up and completed; else they are only moved.
    seed
        Picks the interleaving.
    plans
        What to run instead of the schedules' own plans (to show that a wrong plan is caught).
    in_place
        Whether WORK overwrites INPUT.

    Returns
    -------
    dict
        Elements sent, by ``(from rank, to rank)``.

    Raises
    ------
    ScheduleError
        Naming what is wrong and where.
    """
    return _Run(schedules, expected, reduced, seed, plans, in_place).run()


class _Run:
    def __init__(
        self,
        schedules: Sequence[Schedule],
        expected: Expected | None,
        reduced: bool,
        seed: int,
        plans: Sequence[Plan] | None,
        in_place: bool,
    ) -> None:
        self.size = len(schedules)
        self.expected = expected
        self.reduced = reduced
        self.in_place = in_place
        self.count = schedules[0].element_count
        self.pick = random.Random(seed)
        bounds = {0, self.count}
        for rank, schedule in enumerate(schedules):
            if (schedule.rank, schedule.size, schedule.element_count) != (rank, self.size, self.count):
                raise ScheduleError(f"schedule {rank} is for rank {schedule.rank} of {schedule.size}")
            bounds.update((*schedule.input_range, *schedule.work_range))
            for step in schedule.steps:
                if not 0 <= step.start < step.stop <= self.count:
                    raise ScheduleError(f"rank {rank}: {step} is not within [0, {self.count})")
                bounds.update((step.start, step.stop))
        self.cells = {bound: cell for cell, bound in enumerate(sorted(bounds))}
        self.starts = sorted(bounds)
        self.widths = [high - low for low, high in zip(sorted(bounds), sorted(bounds)[1:], strict=False)]
        self.ranks = [
            self._rank(rank, plan)
            for rank, plan in enumerate(plans or [make_plan(schedule, in_place) for schedule in schedules])
        ]
        self.traffic: dict[tuple[int, int], int] = {}
        #: What may be able to go on: a link, a reduction of what came from a peer, a local step.
        self.awake: list[tuple[str, int, int]] = []

    def _rank(self, rank: int, plan: Plan) -> _Rank:
        cells = len(self.widths)
        own: list[_Value | None] = [None] * cells
        for cell in self._cells(plan.schedule.input_range):
            own[cell] = _Value(frozenset({rank}), finished=not self.reduced)
        work: list[_Value | None] = own if self.in_place else [None] * cells
        steps = range(len(plan.schedule.steps))
        return _Rank(plan, list(plan.waits_for), own, work, undone=set(steps))

    def _cells(self, bounds: tuple[int, int]) -> range:
        return range(self.cells[bounds[0]], self.cells[bounds[1]])

    def _span(self, step: Step) -> range:
        return range(self.cells[step.start], self.cells[step.stop])

    def run(self) -> dict[tuple[int, int], int]:
        for rank, state in enumerate(self.ranks):
            self.awake += [("link", rank, peer) for peer in state.plan.sends]
            self.awake += [("local", rank, index) for index in state.plan.local if not state.waiting[index]]
        while self.awake:
            # Any of what could go on, as the seed has it.
            place = self.pick.randrange(len(self.awake))
            self.awake[place], self.awake[-1] = self.awake[-1], self.awake[place]
            kind, rank, other = self.awake.pop()
            if kind == "link":
                self._go_on(rank, other)
            elif kind == "reduce":
                self._reduce(rank, other)
            else:
                self._do_locally(rank, other)
        for rank, state in enumerate(self.ranks):
            if state.undone:
                step = state.plan.schedule.steps[min(state.undone)]
                raise ScheduleError(f"deadlock: rank {rank} has {len(state.undone)} steps left, the first is {step}")
            self._check_result(rank, state)
        self._check_digests()
        return self.traffic

    def _go_on(self, rank: int, peer: int) -> None:
        """Begin to send the next message from ``rank`` to ``peer``, or let it arrive, if that can be now."""
        state = self.ranks[rank]
        sends, position = state.plan.sends[peer], state.send_position.get(peer, 0)
        if position == len(sends):
            return
        index = sends[position]
        if index in state.in_flight:
            self._deliver(rank, peer, index)
        elif not state.waiting[index] and self._receiver_ready(rank, peer):
            self._start(rank, peer, index)
        else:
            return
        self.awake.append(("link", rank, peer))

    def _receiver_ready(self, sender: int, receiver: int) -> bool:
        state = self.ranks[receiver]
        position = state.receive_position.get(sender, 0)
        receives = state.plan.receives.get(sender, ())
        if position == len(receives):
            raise ScheduleError(f"rank {sender} sends rank {receiver} more messages than it receives")
        return sender not in state.reducing and not state.waiting[receives[position][0]]

    def _start(self, rank: int, peer: int, index: int) -> None:
        state = self.ranks[rank]
        step = state.plan.schedule.steps[index]
        assert isinstance(step, Send)
        values = state.in_flight[index] = self._read(rank, step, step.source)
        for value in values:
            if (step.content is Content.INPUT and value.ranks != {rank}) or (
                self.reduced and value.finished != (step.content is Content.RESULT)
            ):
                raise ScheduleError(f"rank {rank}: {step} sends {value} as {step.content}")

    def _deliver(self, rank: int, peer: int, index: int) -> None:
        state, receiver = self.ranks[rank], self.ranks[peer]
        step = state.plan.schedule.steps[index]
        received, reduction = receiver.plan.receives[rank][receiver.receive_position.get(rank, 0)]
        target = receiver.plan.schedule.steps[received]
        assert isinstance(step, Send)
        assert isinstance(target, Receive)
        sent = (step.start, step.stop, step.round, step.segment, step.content)
        if sent != (target.start, target.stop, target.round, target.segment, target.content):
            raise ScheduleError(f"rank {rank} sends {step} where rank {peer} expects {target}")
        values = state.in_flight.pop(index)
        if self._read(rank, step, step.source) != values:
            raise ScheduleError(f"rank {rank}: what {step} reads was overwritten while it was being sent")
        if target.target is Space.SCRATCH:
            assert reduction is not None
            receiver.scratch[rank] = values
            receiver.reducing[rank] = reduction
            self.awake.append(("reduce", peer, rank))
        else:
            self._write(peer, target, values)
        state.send_position[peer] = state.send_position.get(peer, 0) + 1
        receiver.receive_position[rank] = receiver.receive_position.get(rank, 0) + 1
        self.traffic[rank, peer] = self.traffic.get((rank, peer), 0) + step.stop - step.start
        self._done(rank, index)
        self._done(peer, received)

    def _reduce(self, rank: int, peer: int) -> None:
        state = self.ranks[rank]
        index = state.reducing.get(peer)
        if index is None or state.waiting[index]:
            return
        step = state.plan.schedule.steps[index]
        assert isinstance(step, Reduce)
        ours, theirs = self._read(rank, step, step.operand), state.scratch.pop(peer)
        self._write(rank, step, self._sum(rank, step, ours, theirs, step.finish))
        del state.reducing[peer]
        self.awake.append(("link", peer, rank))
        self._done(rank, index)

    def _sum(self, rank: int, step: Step, one: list[_Value], other: list[_Value], finish: bool) -> list[_Value]:
        result = []
        for ours, theirs in zip(one, other, strict=True):
            if twice := ours.ranks & theirs.ranks:
                raise ScheduleError(f"rank {rank}: {step} counts the contribution of ranks {sorted(twice)} twice")
            if ours.finished or theirs.finished:
                raise ScheduleError(f"rank {rank}: {step} reduces elements that were completed already")
            result.append(_Value(ours.ranks | theirs.ranks, finish))
        return result

    def _do_locally(self, rank: int, index: int) -> None:
        step = self.ranks[rank].plan.schedule.steps[index]
        values = self._read(rank, step, Space.INPUT)
        if isinstance(step, Accumulate):
            values = self._sum(rank, step, self._read(rank, step, Space.WORK), values, step.finish)
        self._write(rank, step, values)
        self._done(rank, index)

    def _read(self, rank: int, step: Step, space: Space) -> list[_Value]:
        if space is Space.SCRATCH:
            raise ScheduleError(f"rank {rank}: {step} reads scratch")
        state = self.ranks[rank]
        values = []
        for cell in self._span(step):
            value = state.input[cell] if space is Space.INPUT else state.work[cell]
            if value is None:
                raise ScheduleError(f"rank {rank}: {step} reads elements that were never written")
            values.append(value)
        return values

    def _write(self, rank: int, step: Step, values: list[_Value]) -> None:
        if isinstance(step, Receive) and step.target is Space.INPUT:
            raise ScheduleError(f"rank {rank}: {step} writes the input")
        held = self._cells(self.ranks[rank].plan.schedule.work_range)
        for cell, value in zip(self._span(step), values, strict=True):
            if cell not in held:
                raise ScheduleError(f"rank {rank}: {step} writes where it holds nothing")
            self.ranks[rank].work[cell] = value

    def _done(self, rank: int, index: int) -> None:
        state = self.ranks[rank]
        state.undone.discard(index)
        for later in state.plan.dependents[index]:
            state.waiting[later] -= 1
            if state.waiting[later]:
                continue
            match state.plan.schedule.steps[later]:
                case Send(peer=peer):
                    self.awake.append(("link", rank, peer))
                case Receive(peer=peer):
                    self.awake.append(("link", peer, rank))
                case Reduce(peer=peer):
                    self.awake.append(("reduce", rank, peer))
                case _:
                    self.awake.append(("local", rank, later))

    def _check_result(self, rank: int, state: _Rank) -> None:
        schedule = state.plan.schedule
        everybody = frozenset(range(self.size))
        result = state.input if schedule.result is Space.INPUT else state.work
        for cell in self._cells(schedule.result_range):
            expected = everybody if self.expected is None else self.expected(rank, self.starts[cell])
            if not expected:
                continue
            value = result[cell]
            if value is None or value.ranks != expected:
                got = "nothing" if value is None else f"the contributions of {sorted(value.ranks)}"
                raise ScheduleError(f"rank {rank}: cell {cell} of the result holds {got}, not {sorted(expected)}")
            if not value.finished and self.size > 1:
                raise ScheduleError(f"rank {rank}: cell {cell} of the result was never completed")

    def _check_digests(self) -> None:
        cuts = []
        if not all(state.plan.schedule.replicated and state.plan.schedule.cut_alike for state in self.ranks):
            return
        for state in self.ranks:
            steps = state.plan.schedule.steps
            cuts.append(sorted((steps[index].start, steps[index].stop) for index in state.plan.digests))
        for rank, cut in enumerate(cuts):
            if cut != cuts[0]:
                raise ScheduleError(f"rank {rank} digests {cut[:3]}…, rank 0 digests {cuts[0][:3]}…")
            if self.size > 1 and sum(stop - start for start, stop in cut) != self.count:
                raise ScheduleError(f"rank {rank}: the digests do not cover every element once")


def sent_by_rank(traffic: Mapping[tuple[int, int], int], rank: int) -> int:
    """Return the elements that ``rank`` sends in total."""
    return sum(count for (sender, _), count in traffic.items() if sender == rank)
