"""Whole nodes in virtual time: a fixed set of worlds, and deliberate bugs that they must catch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from simulations import nodes
from simulations.network import InvariantBroken
from simulations.nodes import World
from simulations.planted_bugs import PlantedBugs
from sparkle_mesh.collectives.agreement import Agreement
from sparkle_mesh.collectives.exchange import Exchange
from sparkle_mesh.collectives.group_state import GroupState
from sparkle_mesh.collectives.group_views import GroupViews
from sparkle_mesh.membership.meetings import Meetings, Weight
from sparkle_mesh.membership.messages import Meeting, Merger
from sparkle_mesh.state_chunks import StateChunks
from sparkle_mesh.view_follower import ViewFollower

SEEDS = range(24)


def run(seed: int) -> World:
    world = World(seed)
    world.run()
    return world


@pytest.mark.timeout(240)
@pytest.mark.untraced
@pytest.mark.parametrize("part", range(4))
def test_fixed_seeds_hold_the_invariants(part: int) -> None:
    exercised = [run(seed).exercised for seed in SEEDS[part::4]]
    kinds = ("crashes", "link_losses", "partitions", "pauses", "joins", "views", "reductions", "synchronized")
    for name in kinds:
        assert sum(getattr(one, name) for one in exercised) > 0, name


def test_meshes_that_formed_apart_or_were_split_become_one() -> None:
    split = run(201).exercised
    assert (split.forks, split.merged) == (2, 4)
    assert run(3).exercised.merged == 4


@pytest.mark.timeout(240)
def test_one_seed_is_one_trace_in_any_process() -> None:
    program = "from simulations.nodes import World; w = World(0); w.run(); print(*w.trace, sep=chr(10))"
    root = Path(nodes.__file__).parents[1]
    traces = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert traces == {"\n".join(run(0).trace) + "\n"}


# --- Deliberate bugs, one at a time ------------------------------------------------------------------

BUGS = PlantedBugs(run, SEEDS)
bug = BUGS.bug


@bug(caught_by=19)
def one_prepared_rank_is_enough(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Agreement, "settled", property(lambda self: self.rank in self.prepared))


@bug(caught_by=1)
def arrays_are_written_before_all_have_prepared(patch: pytest.MonkeyPatch) -> None:
    def progress(self: GroupState, operation: Any) -> None:
        original(self, operation)
        if operation.sent_prepared and not operation.finished.is_set():
            operation.commit()

    original = GroupState.progress
    patch.setattr(GroupState, "progress", progress)


@bug(caught_by=10)
def what_is_held_shares_one_buffer(patch: pytest.MonkeyPatch) -> None:
    buffer = bytearray(1 << 20)

    async def receive_whole(self: Exchange, nbytes: int) -> Any:
        view = memoryview(buffer)[:nbytes]
        if nbytes:
            await self.link.receive_into((view,))
        return view

    patch.setattr(Exchange, "_receive_whole", receive_whole)


@bug(caught_by=20)
def some_ranks_repeat_what_others_commit(patch: pytest.MonkeyPatch) -> None:
    async def settle(self: GroupViews, outcomes: Any, *arguments: Any, **options: Any) -> None:
        if self.rank % 2:
            outcomes = {number: "repeat" if ends == "committed" else ends for number, ends in outcomes.items()}
        await original(self, outcomes, *arguments, **options)

    original = GroupViews.settle
    patch.setattr(GroupViews, "settle", settle)


@bug(caught_by=13)
def newcomers_count_from_the_beginning(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GroupViews, "join_at", lambda self, streams, outcomes: None)


@bug(caught_by=17)
def what_is_repeated_waits_for_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GroupViews, "_note_repeats", lambda self, operations, given_up: None)


@bug(caught_by=1)
def newcomers_keep_their_own_state(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StateChunks, "write", lambda self, chunk, data: None)


@bug(caught_by=1)
def a_lost_link_is_not_made_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ViewFollower, "_link_lost", lambda self, rank, reason: None)


@bug(caught_by=11)
def meshes_that_meet_ignore_each_other(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nodes, "ENDS_AT_S", 60.0)
    patch.setattr(Meetings, "next_wakeup", lambda self, mine, others, *, leads: None)


@bug(caught_by=9)
def of_two_meshes_that_meet_both_give_way(patch: pytest.MonkeyPatch) -> None:
    def asked(self: Meetings, meeting: Meeting, mine: Weight, *, leads: bool) -> Merger | None:
        answer = original(self, meeting, mine, leads=leads)
        if answer is not None:
            self.told(Merger(dissolves=mine.lineage, into=meeting.lineage), mine.lineage)
            return Merger(dissolves=meeting.lineage, into=mine.lineage)
        return None

    original = Meetings.asked
    patch.setattr(Meetings, "asked", asked)


@pytest.mark.timeout(300)
@pytest.mark.untraced
@pytest.mark.parametrize("name", BUGS.names)
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some bugs end in an error of the program.
    with pytest.raises((InvariantBroken, BaseExceptionGroup, KeyError, ValueError)):
        BUGS.run(name, monkeypatch)


class LinksLostAmidEntry(World):
    """Whenever a node makes a link, it loses another one: so a view is entered while links of its members end."""

    async def _connect(self, node: nodes.Node, peer_id: str) -> nodes.Link:
        link = await super()._connect(node, peer_id)
        others = [other for other in node.links if other is not link and not other.closed]
        if others and not self._quiet and self.random.random() < 0.5:
            self.random.choice(others).drop()
            for _ in range(20):
                await trio.lowlevel.checkpoint()
        return link


@pytest.mark.timeout(240)
def test_links_that_are_lost_while_a_view_is_entered_lead_to_another_view() -> None:
    for seed in range(4):
        LinksLostAmidEntry(seed).run()


def test_what_is_given_up_while_its_view_ends_is_given_up_in_the_next_as_well() -> None:
    """Whoever stops waiting just then makes way for what comes after it, and tells the others, who repeat it."""
    run(70116)


class ViewsAmidEntry(World):
    """Links take long to make, and other views are called for meanwhile: members are in different ones."""

    async def _connect(self, node: nodes.Node, peer_id: str) -> nodes.Link:
        if not self._quiet:
            await trio.sleep(self.random.choice([0, 0.3, 1.0]))
        link = await super()._connect(node, peer_id)
        if not self._quiet and self.random.random() < 0.3:
            self._nursery.start_soon(self._renew, node)
        return link

    async def _renew(self, node: nodes.Node) -> None:
        await trio.sleep(self.random.uniform(0, 0.5))
        if node.alive and node.service.succession is not None:
            node.service.renew()


@pytest.mark.timeout(240)
def test_views_that_end_before_all_have_entered_them_lead_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Seed 74 has a member that measures lines, over a link to one that is in the next view already.
    monkeypatch.setattr(nodes, "FAULTS_UNTIL_S", 8.0)
    for seed in range(70, 76):
        ViewsAmidEntry(seed).run()


class Severed(World):
    """Two nodes cannot reach each other, though all others reach both, and nothing else is wrong."""

    def __init__(self, seed: int, *, newcomer: bool) -> None:
        super().__init__(seed)
        self.count = 5
        self._newcomer = newcomer
        self._rates = dict.fromkeys(self._rates, 0.0)

    async def _begin(self) -> None:
        for _ in range(self.count):
            await self._start(self.count)

    async def _do_damage(self) -> None:
        await trio.sleep(2.0)
        one, other = self._nodes[1].name, f"node-{6 if self._newcomer else 4:03}"
        self._network.partition([one], [other])
        for node in self._nodes:
            for link in node.links:
                if {node.name, link.peer_id} == {one, other}:
                    link.drop()
        if self._newcomer:
            await self._start(nodes.NEVER)
        await trio.sleep(60.0)
        self._quiet = True

    def _what_is_missing(self) -> str | None:
        late = [node.name for node in self._nodes[:5] if node.alive and node.steps_after < nodes.STEPS_AFTER_COUNT]
        return f"{late} do not go on" if late else None


@pytest.mark.parametrize("seed", range(3))
def test_of_two_that_cannot_reach_each_other_one_is_left_out(seed: int) -> None:
    world = Severed(seed, newcomer=False)
    world.run()
    left = [node.name for node in world._nodes if node.alive]
    assert len(left) == 4
    assert {"node-001", "node-003", "node-005"} <= set(left)
    assert world.exercised.views <= 4


@pytest.mark.parametrize("seed", range(3))
def test_a_newcomer_that_one_member_cannot_reach_waits_and_holds_nobody_up(seed: int) -> None:
    world = Severed(seed, newcomer=True)
    world.run()
    *members, newcomer = world._nodes
    assert not newcomer.is_member
    assert all(node.alive and node.group.size == 5 for node in members)
    assert world.exercised.views == 1
