"""Meshes of real processes on this host: they find each other, agree, compute, die."""

from __future__ import annotations

import signal
from collections.abc import Callable

import psutil
import pytest

from sparkle_mesh.membership.keys import MeshKey

Start = Callable[..., "Worker"]  # noqa: F821  (the class lives in conftest.py)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_form_one_view_and_all_reduce(start_worker: Start, size: int) -> None:
    workers = [start_worker("reduce_once", str(size)) for _ in range(size)]
    views = {worker.wait_for("view") for worker in workers}
    results = {worker.wait_for("result") for worker in workers}
    total = float(sum(range(1, size + 1)))
    assert len(views) == 1
    assert results == {f"{total} {total}"}
    assert [worker.end() for worker in workers] == [0] * size


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("forked", "memory"), [("0", "ordinary"), ("2", "ordinary"), ("0", "allocated"), ("0", "tcp")])
def test_sigkill_in_a_collective_raises_on_every_survivor_or_on_none(
    start_worker: Start, forked: str, memory: str
) -> None:
    workers = [start_worker("reduce_for_ever", "3", forked, memory) for _ in range(3)]
    ranks = {worker.wait_for("started"): worker for worker in workers}
    assert sorted(ranks) == ["0", "1", "2"]
    for worker in workers:
        while sum(line.startswith("child") for line in worker.lines) < int(forked):
            assert worker.wait_for("child").startswith("ForkedProcessError")
    children = [child for worker in workers for child in psutil.Process(worker.process.pid).children()]
    assert len(children) == 3 * int(forked)
    states: list[str] = []
    errors: set[str] = set()
    try:
        ranks["1"].signal(signal.SIGKILL)
        for rank in ("0", "2"):
            states.append(ranks[rank].wait_for("state", 15))
            error = ranks[rank].wait_for("error", 15)
            # Between two calls, or where its result was agreed on already, the loss ends none of them.
            assert error == "none" or error.startswith("PeerLostError lost rank 1 "), error
            errors.add(error.split()[0])
            assert ranks[rank].end() == 0
        assert len(errors) == 1
        # What the survivors hold is the last input, and over shared memory as many reductions came before on both.
        assert all(state.endswith("1.0 1.0") for state in states), states
        assert len(set(states)) == 1, states
        if forked != "0":
            assert all(child.is_running() for child in children), "the forked workers live on"
    finally:
        for child in children:
            child.kill()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("memory", ["ordinary", "allocated", "tcp"])
@pytest.mark.parametrize("victim", ["0", "2"])
def test_survivors_of_a_sigkill_go_on_among_themselves(start_worker: Start, memory: str, victim: str) -> None:
    workers = [start_worker("goes_on", "3", "20", memory) for _ in range(3)]
    ranks = {worker.wait_for("started"): worker for worker in workers}
    ranks.pop(victim).signal(signal.SIGKILL)
    for worker in ranks.values():
        assert sorted(worker.wait_for("whose").split()) == sorted(ranks)
        assert worker.wait_for("changes") == "2"
        assert worker.end() == 0


@pytest.mark.timeout(120)
def test_of_two_the_first_goes_on_alone_and_the_second_knows_that_it_may_not(start_worker: Start) -> None:
    for victim, rest in (("1", "0"), ("0", "1")):
        workers = [start_worker("goes_on", "2", "3") for _ in range(2)]
        ranks = {worker.wait_for("started"): worker for worker in workers}
        ranks[victim].signal(signal.SIGKILL)
        if rest == "0":
            assert ranks[rest].wait_for("whose") == "0"
        else:
            assert ranks[rest].wait_for("error", 20).startswith("QuorumLostError")
        assert ranks[rest].end() == 0
        ranks[victim].destroy()


@pytest.mark.timeout(60)
def test_who_holds_the_interpreter_for_eight_seconds_is_waited_for(start_worker: Start) -> None:
    workers = [start_worker("holds_the_interpreter", "3", "8") for _ in range(3)]
    assert {worker.wait_for("started") for worker in workers} == {"0", "1", "2"}
    assert {worker.wait_for("ended") for worker in workers} == {"3 3 0"}
    assert [worker.end() for worker in workers] == [0, 0, 0]


def test_ctrl_c_in_a_collective_ends_it_everywhere(start_worker: Start) -> None:
    workers = [start_worker("interrupted", "3") for _ in range(3)]
    ranks = {worker.wait_for("waiting"): worker for worker in workers}
    ranks["0"].wait_for("calling")
    ranks["0"].signal(signal.SIGINT)
    ranks["0"].wait_for("interrupted")
    assert ranks["0"].end() == 0
    ranks["2"].go_on()
    ends = {ranks[rank].wait_for("ended", 15).split()[0] for rank in ("1", "2")}
    # It may have been interrupted before it began.
    assert ends in ({"CollectiveAbortedError"}, {"2.0"})
    assert [ranks[rank].end() for rank in ("1", "2")] == [0, 0]


def test_the_end_of_the_program_leaves_the_mesh(start_worker: Start) -> None:
    workers = [start_worker("never_closes", "2") for _ in range(2)]
    assert {worker.wait_for("result") for worker in workers} == {"2.0"}
    assert [worker.end(20) for worker in workers] == [0, 0]


def test_a_mismatch_is_named_on_every_rank_and_the_mesh_goes_on(start_worker: Start) -> None:
    workers = [start_worker("mismatched", "3") for _ in range(3)]
    errors = {worker.wait_for("error") for worker in workers}
    assert len(errors) == 1, errors
    (error,) = errors
    assert error.startswith("MismatchError")
    assert "rank 1" in error
    assert {worker.wait_for("result") for worker in workers} == {"3.0"}


def test_the_right_key_admits_and_a_wrong_one_is_told_on_both_sides(start_worker: Start) -> None:
    right, wrong = MeshKey.generate().to_text(), MeshKey.generate().to_text()
    members = [start_worker("keyed", "2", right, "40") for _ in range(2)]
    assert [member.wait_for("joined") for member in members] == ["2", "2"]
    stranger = start_worker("keyed", "2", wrong, "4")
    error = stranger.wait_for("error")
    assert error.startswith("JoinTimeoutError")
    assert "1 of 2 peers" in error
    assert "the key is wrong" in error
    for member in members:
        assert "the key is wrong" in member.wait_for("not admitted")
        member.go_on()
    assert [worker.end() for worker in (*members, stranger)] == [0, 0, 0]
