"""Views that follow views: a fixed set of worlds, and deliberate bugs that they must catch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest

from simulations import __main__ as command
from simulations import coverage, succession
from simulations.network import InvariantBroken
from simulations.planted_bugs import PlantedBugs
from simulations.small_collectives import Exercised, Process
from simulations.succession import World
from sparkle_mesh.membership import operations, view_change
from sparkle_mesh.membership.messages import Chosen
from sparkle_mesh.membership.operations import OpenOperations
from sparkle_mesh.membership.view import Member
from sparkle_mesh.membership.view_change import ViewChange

#: Within these each planted bug is caught.
SEEDS = range(300)


def run(seed: int) -> World:
    world = World(seed)
    world.run()
    return world


@pytest.mark.timeout(240)
@pytest.mark.untraced
@pytest.mark.parametrize("part", range(2))
def test_fixed_seeds_hold_the_invariants(part: int) -> None:
    exercised = [run(seed).exercised for seed in SEEDS[part:120:2]]
    rare = {"proposer_deaths": 5, "quorum_losses": 0, "refused_for_room": 0}
    for name in (field.name for field in fields(Exercised)):
        assert sum(getattr(one, name) for one in exercised) >= rare.get(name, 20), name


def test_what_one_gave_up_before_the_others_came_to_it_is_not_what_a_newcomer_begins_with() -> None:
    """Whoever gave it up has to be gone before others come in: one seed in ten thousand."""
    run(3569)


def test_one_seed_is_one_trace_in_any_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(succession.__file__).parents[1])
    assert command.main(["--seed", "12", "--repeat", "3"]) == 0
    assert command.main(["--seed", "12", "--digest"]) == 0
    *_, repeated, once = capfd.readouterr().out.splitlines()
    assert repeated.split() == ["3", once]
    assert run(12).trace == run(12).trace != run(13).trace


def test_what_simulation_leaves_out_of_the_machine_is_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(succession.__file__).parents[1])
    assert coverage.main(["--seeds", "3"]) == 2
    out = capfd.readouterr().out
    assert "0 failed" in out
    assert "membership/view_change.py" in out


def test_what_a_node_fails_with_is_what_its_seed_fails_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(World, "_proceed", lambda self, process, epoch, stream: [][0])
    with pytest.raises(SystemExit):
        command.main(["--trace"])
    assert command.main(["--seeds", "1", "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "IndexError" in out
    assert "replay: python -m simulations --world succession --seed 0 --trace" in out


def test_the_command_replays_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--seeds", "4", "--first-seed", "7"]) == 0
    assert "4 seeds from 7: 0 failed" in capsys.readouterr().out
    assert command.main(["--seed", "7", "--trace"]) == 0
    assert "enters epoch" in capsys.readouterr().out


# --- Deliberate bugs, one at a time ------------------------------------------------------------------

BUGS = PlantedBugs(run, SEEDS)
bug = BUGS.bug


@contextmanager
def changed(owner: Any, **values: Any) -> Iterator[None]:
    """``owner`` with other attributes inside."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@bug(caught_by=6)
def commits_when_itself_has_prepared(patch: pytest.MonkeyPatch) -> None:
    def look(self: World, process: Process, number: int) -> None:
        state = process.operations.state(number)
        if number in process.heard and state is not None and state.state == "prepared":
            process.heard[number].prepared = dict.fromkeys(process.view.members, state.digest)
        original(self, process, number)

    original = World._look
    patch.setattr(World, "_look", look)


@bug(caught_by=9)
def a_minority_is_a_quorum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(view_change, "is_quorum", lambda view, members: len(set(members)) >= 1)


@bug(caught_by=9)
def half_is_a_quorum_without_the_first_member(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        view_change, "is_quorum", lambda view, members: 2 * len(set(members) & set(view.members)) >= view.size
    )


@bug(caught_by=8)
def a_promise_does_not_freeze(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenOperations, "freeze", lambda self: None)


@bug(caught_by=72)
def a_successor_ignores_what_was_accepted(patch: pytest.MonkeyPatch) -> None:
    def value(self: ViewChange, promises: dict[Any, Any]) -> Any:
        bare = {
            member: msgspec.structs.replace(promise, accepted_ballot=None, accepted_view=None)
            for member, promise in promises.items()
        }
        return original(self, bare)

    original = ViewChange._value
    patch.setattr(ViewChange, "_value", value)


@bug(caught_by=12)
def what_one_has_prepared_is_committed(patch: pytest.MonkeyPatch) -> None:
    def decide(standings: Any) -> Any:
        outcomes, streams = original(standings)
        prepared = {s.number: s for one in standings.values() for s in one.operations if s.state == "prepared"}
        return tuple(
            msgspec.structs.replace(prepared[one.number], state="committed") if one.number in prepared else one
            for one in outcomes
        ), streams

    original = view_change.decide
    patch.setattr(view_change, "decide", decide)


@bug(caught_by=6)
def what_all_have_prepared_is_aborted(patch: pytest.MonkeyPatch) -> None:
    def decide(standings: Any) -> Any:
        outcomes, streams = original(standings)
        begun = {rank: dict(one.streams).get(0, 0) for rank, one in standings.items()}
        named = {rank: {state.number for state in one.operations} for rank, one in standings.items()}
        committed = {n.number for n in outcomes for rank in begun if begun[rank] >= n.number not in named[rank]}
        return tuple(
            one if one.number in committed else msgspec.structs.replace(one, state="aborted", digest=b"")
            for one in outcomes
        ), streams

    original = view_change.decide
    patch.setattr(view_change, "decide", decide)


@bug(caught_by=6)
def what_is_not_named_counts_as_never_begun(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(operations, "_state", lambda number, table, begun: table[number].state if number in table else None)


@bug(caught_by=4)
def what_is_repeated_is_not_named_in_the_next_epoch(patch: pytest.MonkeyPatch) -> None:
    original = OpenOperations.begin_epoch
    patch.setattr(OpenOperations, "begin_epoch", lambda self, outcomes=(): original(self))


@bug(caught_by=9)
def newcomers_begin_after_what_is_repeated(patch: pytest.MonkeyPatch) -> None:
    def settled(outcomes: Any, begun: Any) -> Any:
        return original((), begun)

    original = operations._settled
    patch.setattr(operations, "_settled", settled)


@bug(caught_by=6)
def a_quorum_of_promises_is_enough_to_decide(patch: pytest.MonkeyPatch) -> None:
    def advance(self: ViewChange, now: float) -> Any:
        proposal = self._proposal
        if proposal is not None and proposal.value is None:
            silent = {member: None for member in self.view.members if member not in proposal.promises}
            with changed(self, _suspected={**self._suspected, **silent}):
                # As if the others were gone: but they are proposed all the same.
                return original(self, now)
        return original(self, now)

    def value(self: ViewChange, promises: dict[Any, Any]) -> Any:
        everybody = {member: next(iter(promises.values())) for member in self.view.members} | promises
        with changed(self, _suspected={}):
            view = original_value(self, everybody).view
        return original_value(self, promises)._replace(view=view)

    original, original_value = ViewChange._advance, ViewChange._value
    patch.setattr(ViewChange, "_advance", advance)
    patch.setattr(ViewChange, "_value", value)


@bug(caught_by=24)
def a_prepared_member_gives_up(patch: pytest.MonkeyPatch) -> None:
    original = OpenOperations.abort
    patch.setattr(OpenOperations, "abort", lambda self, number, told=False: original(self, number, told=True))


@bug(caught_by=1)
def ranks_are_told_different_outcomes(patch: pytest.MonkeyPatch) -> None:
    def chosen(self: ViewChange, sender: Any, message: Any, now: float) -> Any:
        flipped = tuple(msgspec.structs.replace(one, state="aborted", digest=b"") for one in message.outcomes)
        return original(self, sender, msgspec.structs.replace(message, outcomes=flipped), now)

    original = ViewChange._on_chosen
    patch.setattr(ViewChange, "_on_chosen", chosen)


@bug(caught_by=66)
def messages_of_any_epoch_count(patch: pytest.MonkeyPatch) -> None:
    def hear(self: World, process: Process, sender: Any, epoch: int, number: int, word: str, digest: bytes) -> None:
        epoch = epoch if process.machine is None else process.machine.view.epoch
        original(self, process, sender, epoch, number, word, digest)

    original = World._hear
    patch.setattr(World, "_hear", hear)


@bug(caught_by=45)
def a_restart_has_the_old_incarnation(patch: pytest.MonkeyPatch) -> None:
    def new_process(self: World, index: int) -> Process:
        process = original(self, index)
        del self.processes[process.member]
        process.member = Member(peer_id=process.member.peer_id, incarnation=index.to_bytes(16, "big"))
        self.processes[process.member] = process
        return process

    original = World._new_process
    patch.setattr(World, "_new_process", new_process)


@bug(caught_by=12)
def a_newcomer_begins_with_what_was_given_up_before(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenOperations, "_note_ended", lambda self, outcomes: None)


@bug(caught_by=28)
def who_waits_is_forgotten_when_it_is_suspected(patch: pytest.MonkeyPatch) -> None:
    def trust(self: ViewChange, member: Member, *, now: float) -> Any:
        if member in self._suspected:
            self._suspected[member] = False
        return original(self, member, now=now)

    original = ViewChange.trust
    patch.setattr(ViewChange, "trust", trust)


@bug(caught_by=8)
def who_leaves_with_the_view_that_it_proposed_is_not_believed(patch: pytest.MonkeyPatch) -> None:
    def deliver(self: World, sender: Member, receiver: Member, message: Any) -> None:
        if isinstance(message, Chosen) and sender not in message.view.members:
            return
        original(self, sender, receiver, message)

    original = World._deliver
    patch.setattr(World, "_deliver", deliver)


@bug(caught_by=58)
def any_epoch_is_entered(patch: pytest.MonkeyPatch) -> None:
    def chosen(self: ViewChange, sender: Any, message: Any, now: float) -> Any:
        return self._enter(message, now, tell=False) if message.view.epoch > self.view.epoch else []

    patch.setattr(ViewChange, "_on_chosen", chosen)


@bug(caught_by=14)
def nobody_steps_in_for_a_dead_proposer(patch: pytest.MonkeyPatch) -> None:
    def at(self: ViewChange, now: float) -> float | None:
        return original(self, now) if self.view.members[0] == self._me else None

    original = ViewChange._propose_at
    patch.setattr(ViewChange, "_propose_at", at)


@pytest.mark.timeout(240)
@pytest.mark.untraced
@pytest.mark.parametrize("name", BUGS.names)
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvariantBroken):
        BUGS.run(name, monkeypatch)
