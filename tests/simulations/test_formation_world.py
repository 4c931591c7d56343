"""A fixed set of simulated worlds, and the command that runs more."""

from __future__ import annotations

import pytest

from simulations import __main__ as command
from simulations.formation import World
from simulations.network import InvariantBroken
from sparkle_mesh.membership.formation import Formation


def test_fixed_seeds_hold_the_invariants() -> None:
    exercised = [world.exercised for world in map(run, range(150))]
    assert sum(e.crashes for e in exercised) > 100
    assert sum(e.disconnects for e in exercised) > 200
    assert sum(e.views for e in exercised) > 300


def run(seed: int) -> World:
    world = World(seed)
    world.run()
    return world


def run_many(count: int) -> None:
    for seed in range(count):
        run(seed)


def test_one_seed_is_one_trace() -> None:
    assert run(11).trace == run(11).trace


def test_the_checks_catch_a_machine_that_enters_whatever_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that accepts without promising lets two views come to life for one process, or stalls."""
    monkeypatch.setattr(Formation, "_can_be_member_of", lambda self, view: None)
    with pytest.raises(InvariantBroken):
        run_many(300)


def test_the_command_prints_a_summary_and_replays(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--world", "formation", "--seeds", "8", "--first-seed", "5"]) == 0
    assert "8 seeds from 5: 0 failed" in capsys.readouterr().out
    assert command.main(["--world", "formation", "--seed", "5", "--trace"]) == 0
    assert "starts" in capsys.readouterr().out


def test_the_command_fails_with_a_replay_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: World) -> None:
        raise InvariantBroken(f"seed {self.seed}: planted")

    monkeypatch.setattr(World, "run", broken)
    assert command.main(["--world", "formation", "--seed", "5"]) == 1
    assert "planted" in capsys.readouterr().out
    assert command.main(["--world", "formation", "--seeds", "1", "--first-seed", "5"]) == 1
    assert "--world formation --seed 5 --trace" in capsys.readouterr().out
