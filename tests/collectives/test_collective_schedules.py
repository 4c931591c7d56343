"""Every schedule, proved by the verifier; and the verifier, shown to catch what is wrong."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh.collectives.broadcast import chain_broadcast, tree_broadcast
from sparkle_mesh.collectives.butterfly import butterfly_all_reduce, split_by_weight
from sparkle_mesh.collectives.direct import direct_all_reduce
from sparkle_mesh.collectives.halving_doubling import halving_doubling_all_reduce
from sparkle_mesh.collectives.hierarchical import hierarchical_all_reduce
from sparkle_mesh.collectives.parts import all_gather, gather, point_to_point, reduce_scatter, scatter
from sparkle_mesh.collectives.plan import make_plan
from sparkle_mesh.collectives.ring import ring_all_reduce
from sparkle_mesh.collectives.rooted import chain_reduce, tree_reduce
from sparkle_mesh.collectives.schedule import (
    Content,
    Copy,
    Receive,
    Reduce,
    Schedule,
    Send,
    Space,
    segments,
    split_evenly,
)
from sparkle_mesh.collectives.tree import binary_trees, tree_all_reduce, tree_height
from sparkle_mesh.collectives.verifier import ScheduleError, sent_by_rank, verify


def two_per_host(rank: int, size: int, count: int, segment: int) -> Schedule:
    return hierarchical_all_reduce(rank, size, count, segment, tuple(other // 2 for other in range(size)))


def scattered_hosts(rank: int, size: int, count: int, segment: int) -> Schedule:
    return hierarchical_all_reduce(rank, size, count, segment, tuple(other % 3 for other in range(size)))


def uneven_butterfly(rank: int, size: int, count: int, segment: int) -> Schedule:
    shards = split_by_weight(count, [0.0 if other == size // 2 > 0 else 1.0 + other for other in range(size)])
    return butterfly_all_reduce(rank, size, count, segment, shards)


def shuffled_ring(rank: int, size: int, count: int, segment: int) -> Schedule:
    order = list(range(size))
    random.Random(size).shuffle(order)
    return ring_all_reduce(rank, size, count, segment, tuple(order))


ALL_REDUCE = [
    ring_all_reduce,
    shuffled_ring,
    tree_all_reduce,
    direct_all_reduce,
    halving_doubling_all_reduce,
    butterfly_all_reduce,
    uneven_butterfly,
    hierarchical_all_reduce,
    two_per_host,
    scattered_hosts,
]
BROADCAST = [chain_broadcast, tree_broadcast]
REDUCE = [chain_reduce, tree_reduce]
# Large groups are made by the same code as small ones.
SIZES = [*range(1, 18), *(pytest.param(size, marks=pytest.mark.untraced) for size in range(18, 65))]
# Elements and segment: none, one, fewer than ranks, uneven cuts.
CUTS = [(0, 1), (1, 1), (3, 2), (67, 40), (129, 1000)]


def from_root(root: int) -> dict[str, Any]:
    """For verify(): every result must be what ``root`` gives."""
    return {"expected": lambda rank, element: frozenset({root}), "reduced": False}


def everyone(algorithm: Callable[..., Schedule], size: int, *arguments: Any) -> list[Schedule]:
    return [algorithm(rank, size, *arguments) for rank in range(size)]


@pytest.mark.parametrize("algorithm", ALL_REDUCE)
@pytest.mark.parametrize("size", SIZES)
def test_all_reduce_of_every_size_is_proved(algorithm: Callable[..., Schedule], size: int) -> None:
    # Large groups take turns with the cuts.
    cuts = [*CUTS, (size + 1, 1), (97, 7)] if size < 10 else CUTS if size < 18 else [CUTS[size % 3], CUTS[3 + size % 2]]
    for count, segment in cuts:
        verify(everyone(algorithm, size, count, segment), seed=size)


@pytest.mark.parametrize("algorithm", [algorithm for algorithm in ALL_REDUCE if algorithm is not direct_all_reduce])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 13, 16])
def test_all_but_direct_may_overwrite_their_input(algorithm: Callable[..., Schedule], size: int) -> None:
    for count, segment in CUTS:
        for seed in range(3):
            verify(everyone(algorithm, size, count, segment), seed=seed, in_place=True)


def test_direct_may_not_overwrite_its_input() -> None:
    with pytest.raises(ScheduleError):
        verify(everyone(direct_all_reduce, 3, 5, 5), in_place=True)


def test_a_circle_of_links_that_wait_for_each_other_cannot_come_about() -> None:
    in_order = {
        algorithm: all(
            make_plan(schedule).blocks_in_order for size in (2, 5, 8) for schedule in everyone(algorithm, size, 99, 7)
        )
        for algorithm in ALL_REDUCE
    }
    assert {algorithm.__name__ for algorithm, known in in_order.items() if not known} == {
        "halving_doubling_all_reduce",
        "scattered_hosts",
        "two_per_host",
    }


@pytest.mark.parametrize("algorithm", BROADCAST)
@pytest.mark.parametrize("size", SIZES)
def test_broadcast_of_every_size_is_proved(algorithm: Callable[..., Schedule], size: int) -> None:
    for root in {0, size // 2, size - 1}:
        for count, segment in [(0, 1), (1, 1), (5, 2)]:
            verify(everyone(algorithm, size, count, segment, root), **from_root(root), seed=size)


@pytest.mark.parametrize("algorithm", REDUCE)
@pytest.mark.parametrize("size", SIZES)
def test_reduce_of_every_size_is_proved(algorithm: Callable[..., Schedule], size: int) -> None:
    everybody = frozenset(range(size))
    for root in {0, size // 2, size - 1}:

        def at_root(rank: int, element: int, root: int = root) -> frozenset[int]:
            return everybody if rank == root else frozenset()

        for count, segment in [(0, 1), (1, 1), (5, 2)]:
            verify(everyone(algorithm, size, count, segment, root), expected=at_root, seed=size)


@pytest.mark.parametrize("size", SIZES)
def test_the_collectives_of_parts_are_proved(size: int) -> None:
    everybody = frozenset(range(size))
    for count, segment in CUTS if size < 18 else [CUTS[size % 3], CUTS[3 + size % 2]]:
        parts = tuple(split_evenly(count, size))

        def owner(rank: int, element: int, parts: Any = parts) -> frozenset[int]:
            return frozenset(other for other, (low, high) in enumerate(parts) if low <= element < high)

        def of_the_root(rank: int, element: int, root: int = size - 1) -> frozenset[int]:
            return frozenset({root})

        def anybody(rank: int, element: int) -> frozenset[int]:
            return everybody

        verify(everyone(reduce_scatter, size, count, segment, parts), expected=anybody, seed=size)
        verify(everyone(all_gather, size, count, segment, parts), expected=owner, reduced=False, seed=size)
        for root in {0, size - 1}:
            gathered = everyone(gather, size, count, segment, root, parts)
            verify(gathered, expected=owner, reduced=False, seed=size)
        scattered = everyone(scatter, size, count, segment, size - 1, parts)
        traffic = verify(scattered, expected=of_the_root, reduced=False, seed=size)
        assert sum(traffic.values()) == count - (parts[-1][1] - parts[-1][0])
        for target in {0, size // 2} - {size - 1}:

            def at_target(rank: int, element: int, target: int = target) -> frozenset[int]:
                return frozenset({size - 1}) if rank == target else frozenset()

            sent = everyone(point_to_point, size, count, segment, size - 1, target)
            traffic = verify(sent, expected=at_target, reduced=False, seed=size)
            assert traffic == ({(size - 1, target): count} if count else {})


@settings(max_examples=40, deadline=None)
@given(
    algorithm=st.sampled_from(ALL_REDUCE),
    size=st.integers(1, 9),
    count=st.integers(0, 120),
    segment=st.integers(1, 50),
    seed=st.integers(0, 2**32),
)
def test_any_interleaving_of_any_cut_is_proved(
    algorithm: Callable[..., Schedule], size: int, count: int, segment: int, seed: int
) -> None:
    verify(everyone(algorithm, size, count, segment), seed=seed)


def test_the_ring_sends_what_its_cost_formula_says() -> None:
    size, count = 4, 4000
    traffic = verify(everyone(ring_all_reduce, size, count, 100))
    for rank in range(size):
        assert set(traffic) == {(r, (r + 1) % size) for r in range(size)}
        assert abs(sent_by_rank(traffic, rank) - 2 * (size - 1) / size * count) <= 4 * size * 16


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 16, 33])
def test_the_double_tree_spreads_what_it_sends(size: int) -> None:
    count = 1000
    traffic = verify(everyone(tree_all_reduce, size, count, 500))
    assert sum(traffic.values()) == 2 * (size - 1) * count
    assert max(sent_by_rank(traffic, rank) for rank in range(size)) <= 2.1 * count


def test_the_chain_sends_every_element_once_per_link() -> None:
    traffic = verify(everyone(chain_broadcast, 5, 100, 7, 3), **from_root(3))
    assert traffic == {(3, 4): 100, (4, 0): 100, (0, 1): 100, (1, 2): 100}


@pytest.mark.parametrize("size", range(1, 130))
def test_no_rank_is_an_inner_node_of_both_trees(size: int) -> None:
    first, second = binary_trees(size)
    assert not [rank for rank in range(size) if first[rank].children and second[rank].children]
    for tree in (first, second):
        assert sum(node.parent is None for node in tree) == 1
        assert all(len(node.children) <= 2 for node in tree)
        for rank in range(size):
            steps, at = 0, rank
            while (above := tree[at].parent) is not None:
                at, steps = above, steps + 1
                assert steps <= tree_height(size)


@given(count=st.integers(0, 10_000), parts=st.integers(1, 70), segment=st.integers(1, 999))
def test_cuts_cover_everything_once_and_in_order(count: int, parts: int, segment: int) -> None:
    shards = split_evenly(count, parts)
    assert len(shards) == parts
    pieces = [piece for shard in shards for piece in segments(*shard, segment)]
    assert [i for _, start, stop in pieces for i in range(start, stop)] == list(range(count))
    assert all(0 < stop - start <= segment for _, start, stop in pieces)


def test_long_vectors_are_cut_where_vector_instructions_like_it() -> None:
    assert all(start % 16 == 0 for start, _ in split_evenly(100_003, 7))


# --- A schedule of all instructions, and planted bugs ----------------------------------------------


def copying(rank: int, size: int, count: int) -> Schedule:
    """Rank 1 copies its input and sends the copy; rank 0 adds it to a copy of its own and sends the sum back."""
    other = 1 - rank
    if rank == 1:
        steps: tuple[Any, ...] = (
            Copy(0, count),
            Send(other, 0, count, Space.WORK, 0, 0, Content.INPUT),
            Receive(other, 0, count, Space.WORK, 1, 0, Content.RESULT),
        )
    else:
        steps = (
            Copy(0, count),
            Receive(other, 0, count, Space.SCRATCH, 0, 0, Content.INPUT),
            Reduce(other, 0, count, Space.WORK, finish=True),
            Send(other, 0, count, Space.WORK, 1, 0, Content.RESULT),
        )
    return Schedule("copying", rank, size, count, steps)


def test_copies_are_part_of_the_language() -> None:
    verify([copying(0, 2, 5), copying(1, 2, 5)])


def test_a_plan_waits_only_where_steps_touch_the_same_elements() -> None:
    plan = make_plan(copying(1, 2, 5))
    # The send reads what the copy wrote; the receive overwrites what the send reads (and the copy wrote).
    assert plan.waits_for == (0, 1, 2)
    assert plan.dependents == ((1, 2), (2,), ())
    assert plan.local == (0,)
    assert plan.digests == {2: 0}
    ring = make_plan(ring_all_reduce(0, 4, 64, 4))
    first_round = [i for i, step in enumerate(ring.schedule.steps) if isinstance(step, Send) and step.round == 0]
    assert all(ring.waits_for[i] == 0 for i in first_round)


def change(schedules: list[Schedule], rank: int, index: int, **changes: Any) -> list[Schedule]:
    steps = list(schedules[rank].steps)
    steps[index] = dataclasses.replace(steps[index], **changes)
    changed = list(schedules)
    changed[rank] = dataclasses.replace(schedules[rank], steps=tuple(steps))
    return changed


def without(schedules: list[Schedule], rank: int, indices: set[int]) -> list[Schedule]:
    steps = tuple(step for index, step in enumerate(schedules[rank].steps) if index not in indices)
    return [*schedules[:rank], dataclasses.replace(schedules[rank], steps=steps), *schedules[rank + 1 :]]


def find(schedule: Schedule, kind: type, **fields: Any) -> int:
    return next(
        index
        for index, step in enumerate(schedule.steps)
        if isinstance(step, kind) and all(getattr(step, name) == value for name, value in fields.items())
    )


def test_a_contribution_counted_twice_is_caught() -> None:
    ring = everyone(ring_all_reduce, 3, 30, 30)
    # Rank 0 sends a sum that already holds its input, where its own input belongs: by reducing twice.
    index = find(ring[0], Reduce)
    step = ring[0].steps[index]
    assert isinstance(step, Reduce)
    doubled = dataclasses.replace(
        ring[0], steps=(*ring[0].steps[: index - 1], Copy(step.start, step.stop), *ring[0].steps[index - 1 :])
    )
    broken = change([doubled, *ring[1:]], 0, index + 1, operand=Space.WORK)
    verify(broken)  # a copy of the input is the input: fine
    tree = everyone(tree_all_reduce, 4, 8, 8)
    inner = next(rank for rank in range(4) if sum(isinstance(step, Reduce) for step in tree[rank].steps) == 2)
    second = find(tree[inner], Reduce, operand=Space.WORK)
    with pytest.raises(ScheduleError, match="result holds"):
        verify(change(tree, inner, second, operand=Space.INPUT))
    with pytest.raises(ScheduleError, match="twice"):
        verify(_echo())


def _echo() -> list[Schedule]:
    """Two ranks add, exchange the sums, and add again."""

    def one(rank: int) -> Schedule:
        other = 1 - rank
        steps = (
            Send(other, 0, 4, Space.INPUT, 0, 0, Content.INPUT),
            Receive(other, 0, 4, Space.SCRATCH, 0, 0, Content.INPUT),
            Reduce(other, 0, 4, Space.INPUT),
            Send(other, 0, 4, Space.WORK, 1, 0, Content.PARTIAL),
            Receive(other, 0, 4, Space.SCRATCH, 1, 0, Content.PARTIAL),
            Reduce(other, 0, 4, Space.WORK, finish=True),
        )
        return Schedule("echo", rank, 2, 4, steps)

    return [one(0), one(1)]


def test_a_missing_contribution_is_caught() -> None:
    ring = everyone(ring_all_reduce, 3, 3, 1)
    drop = find(ring[1], Send, round=0)
    take = find(ring[2], Receive, peer=1, round=0)
    broken = without(without(ring, 1, {drop}), 2, {take, take + 1})
    with pytest.raises(ScheduleError, match=r"never written|result holds"):
        verify(broken)


def test_reading_what_was_never_written_is_caught() -> None:
    ring = everyone(ring_all_reduce, 3, 30, 30)
    with pytest.raises(ScheduleError, match="never written"):
        verify(change(ring, 0, find(ring[0], Send, round=0), source=Space.WORK))


def test_reading_scratch_and_writing_the_input_are_caught() -> None:
    ring = everyone(ring_all_reduce, 2, 4, 4)
    with pytest.raises(ScheduleError, match="reads scratch"):
        verify(change(ring, 0, find(ring[0], Send), source=Space.SCRATCH))
    with pytest.raises(ScheduleError, match="writes the input"):
        verify(change(ring, 0, find(ring[0], Receive, target=Space.WORK), target=Space.INPUT))


def test_deadlock_is_caught() -> None:
    def one(rank: int) -> Schedule:
        steps = (
            Receive(1 - rank, 0, 1, Space.WORK, 0, 0, Content.INPUT),
            Send(1 - rank, 0, 1, Space.WORK, 0, 0, Content.INPUT),
        )
        return Schedule("wait for each other", rank, 2, 1, steps)

    with pytest.raises(ScheduleError, match="deadlock: rank 0 has 2 steps left"):
        verify([one(0), one(1)])


def test_a_message_too_many_or_another_one_than_expected_is_caught() -> None:
    chain = everyone(chain_broadcast, 2, 4, 2)
    with pytest.raises(ScheduleError, match="more messages than it receives"):
        verify(without(chain, 1, {1}), **from_root(0))
    with pytest.raises(ScheduleError, match="where rank 1 expects"):
        verify(change(chain, 0, 0, start=1), **from_root(0))
    with pytest.raises(ScheduleError, match="where rank 1 expects"):
        verify(change(chain, 0, 0, segment=5), **from_root(0))


def test_forgotten_and_premature_completion_are_caught() -> None:
    ring = everyone(ring_all_reduce, 2, 4, 4)
    with pytest.raises(ScheduleError, match=r"finished=False\) as Content.RESULT"):
        verify(change(ring, 0, find(ring[0], Reduce), finish=False))
    ring = everyone(ring_all_reduce, 3, 30, 30)
    with pytest.raises(ScheduleError, match=r"finished=True\) as Content.PARTIAL"):
        verify(change(ring, 0, find(ring[0], Reduce, finish=False), finish=True))


def test_steps_outside_the_vector_and_foreign_schedules_are_caught() -> None:
    ring = everyone(ring_all_reduce, 2, 4, 4)
    with pytest.raises(ScheduleError, match="not within"):
        verify(change(ring, 0, 0, stop=9))
    with pytest.raises(ScheduleError, match="schedule 0 is for rank 1"):
        verify([ring[1], ring[0]])


def test_a_wrong_result_of_a_broadcast_is_caught() -> None:
    with pytest.raises(ScheduleError, match="not \\[1\\]"):
        verify(everyone(chain_broadcast, 2, 4, 4, 0), **from_root(1))
    with pytest.raises(ScheduleError, match="holds nothing"):
        verify([Schedule("nothing", 0, 1, 4, ())])


def test_digests_that_differ_or_do_not_cover_are_caught() -> None:
    chain = everyone(chain_broadcast, 2, 4, 2)
    halves = everyone(chain_broadcast, 2, 4, 4)
    plans = [make_plan(chain[0]), make_plan(chain[1])]
    with pytest.raises(ScheduleError, match="rank 1 digests"):
        verify(
            chain, **from_root(0), plans=[plans[0], dataclasses.replace(plans[1], digests=make_plan(halves[1]).digests)]
        )
    with pytest.raises(ScheduleError, match="do not cover"):
        verify(chain, **from_root(0), plans=[dataclasses.replace(plan, digests={}) for plan in plans])


def test_a_plan_that_forgets_a_dependency_is_caught() -> None:
    ring = everyone(ring_all_reduce, 3, 90, 5)
    plans = [make_plan(schedule) for schedule in ring]
    none = tuple(0 for _ in ring[0].steps)
    loose = dataclasses.replace(plans[0], waits_for=none, dependents=tuple(() for _ in none))

    def caught(seed: int) -> bool:
        try:
            verify(ring, seed=seed, plans=[loose, *plans[1:]])
        except ScheduleError:
            return True
        return False

    assert any(caught(seed) for seed in range(20))


def test_overwriting_what_is_being_sent_is_caught() -> None:
    early = (
        Receive(1, 0, 5, Space.WORK, 0, 0, Content.RESULT),
        Send(1, 0, 5, Space.WORK, 0, 0, Content.RESULT),
        Copy(0, 5),
    )
    sender = Schedule("early", 0, 2, 5, early)
    receiver = Schedule(
        "early",
        1,
        2,
        5,
        (Send(0, 0, 5, Space.INPUT, 0, 0, Content.RESULT), Receive(0, 0, 5, Space.WORK, 0, 0, Content.RESULT)),
    )
    plans = [make_plan(sender), make_plan(receiver)]
    loose = dataclasses.replace(plans[0], waits_for=(0, 1, 1), dependents=((1, 2), (), ()))

    def failure(seed: int) -> str:
        try:
            verify([sender, receiver], **from_root(0), seed=seed, plans=[loose, plans[1]])
        except ScheduleError as error:
            return str(error)
        return ""

    assert any("overwritten while it was being sent" in failure(seed) for seed in range(50))
