"""A node's run, in this process, around a fake node: what it prints and how it ends."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparkle_mesh.cli.control import run_dir
from sparkle_mesh.cli.output import Reporter
from sparkle_mesh.cli.run import NodeRun, is_port_taken
from sparkle_mesh.cli.settings import DEFAULT_LISTEN, NodeSettings
from sparkle_mesh.cli.signals import StopSignals
from sparkle_mesh.errors import NodeRunningError, SparkleError, UsageError
from sparkle_mesh.membership.events import PeerRefused, ViewChanged
from sparkle_mesh.membership.view import Member, View
from sparkle_mesh.node import PeerJoined, PeerLeft


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Outcome:
    """What a run said, as decoded JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code: int | None = None

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    return Outcome(tmp_path / "stdout")


@pytest.fixture
def run_node(data_dir: Path, outcome: Outcome) -> Callable[..., int]:
    """Return a function that runs a node until it ends by itself or by a signal."""

    def run(launch: Any, stop: StopSignals | None = None, **changes: Any) -> int:
        if stop is None:
            stop = StopSignals()
            stop.listen()
        settings = NodeSettings(mesh="a-mesh", data_dir=data_dir, **changes)
        with outcome.path.open("ab") as stdout:
            reporter = Reporter("json", stdout=stdout.fileno(), stderr=stdout.fileno())
            try:
                return NodeRun(settings, reporter, stop, launch).run()
            finally:
                reporter.close()

    return run


def test_from_start_to_ctrl_c(fake: ModuleType, run_node: Callable[..., int], outcome: Outcome, data_dir: Path) -> None:
    view = View(mesh_id=bytes(32), lineage=bytes(32), epoch=0, members=(Member(peer_id="A", incarnation=bytes(16)),))
    launch = fake.FakeLaunch(
        [
            PeerJoined(fake.peer()),  # was told of already
            PeerJoined(fake.peer("12D3KooWLate")),
            PeerRefused("12D3KooWStranger", "it holds another key", wrong_key=True),
            ViewChanged(view, mine=False),
            PeerLeft("12D3KooWLate", "it left the mesh"),
            PeerJoined(fake.peer("12D3KooWLate")),
            "something new that this version does not know",
            interrupt,
        ]
    )
    assert run_node(launch) == 0
    assert outcome.events == [
        "started",
        "peer_joined",
        "peer_joined",
        "peer_refused",
        "view_changed",
        "peer_left",
        "peer_joined",
        "stopping",
        "stopped",
    ]
    assert [line["peer"]["peer_id"] for line in outcome.lines if line["event"] == "peer_joined"] == [
        "12D3KooWPeer",
        "12D3KooWLate",
        "12D3KooWLate",
    ]
    assert (launch.closed_count, launch.farewell_count) == (1, 1)
    assert [path for path in data_dir.rglob("*") if path.is_file() or path.is_socket()] == []


def test_events_that_came_too_fast_are_made_up_for(
    fake: ModuleType, run_node: Callable[..., int], outcome: Outcome
) -> None:
    # The first subscription ends, as one that fell behind does; the second has nothing but the signal.
    launch = fake.FakeLaunch([], [interrupt])
    assert run_node(launch) == 0
    assert outcome.events == ["started", "peer_joined", "stopping", "stopped"]


def test_a_signal_before_the_start_opens_nothing(
    fake: ModuleType, run_node: Callable[..., int], outcome: Outcome
) -> None:
    stop = StopSignals()
    stop.listen()
    interrupt()
    launch = fake.FakeLaunch()
    assert run_node(launch, stop) == 0
    assert (outcome.events, launch.opened) == (["stopped"], [])


def test_a_signal_during_the_start_closes_what_was_opened(
    fake: ModuleType, run_node: Callable[..., int], outcome: Outcome
) -> None:
    launch = fake.FakeLaunch()
    launch.on_open = interrupt
    assert run_node(launch) == 0
    assert launch.closed_count == 1
    assert outcome.events[-2:] == ["stopping", "stopped"]


def test_another_port_if_the_usual_one_is_taken(
    fake: ModuleType, run_node: Callable[..., int], outcome: Outcome
) -> None:
    launch = fake.FakeLaunch([interrupt], taken=(DEFAULT_LISTEN,))
    assert run_node(launch) == 0
    assert [settings.listen for settings in launch.opened] == [(DEFAULT_LISTEN,), ("/ip4/0.0.0.0/tcp/0",)]
    assert outcome.events[:2] == ["port_taken", "started"]
    assert outcome.lines[0]["wanted"] == [DEFAULT_LISTEN]


def test_no_other_port_than_the_one_asked_for(fake: ModuleType, run_node: Callable[..., int], outcome: Outcome) -> None:
    launch = fake.FakeLaunch(taken=(DEFAULT_LISTEN,))
    with pytest.raises(UsageError, match="it is in use") as caught:
        run_node(launch, listen=(DEFAULT_LISTEN,), listen_chosen=True)
    assert is_port_taken(caught.value)
    assert outcome.events == []


def test_other_errors_are_not_taken_for_a_port(fake: ModuleType, run_node: Callable[..., int]) -> None:
    launch = fake.FakeLaunch()

    def fail() -> None:
        raise SparkleError("no such luck") from OSError(13, "Permission denied")

    launch.on_open = fail
    with pytest.raises(SparkleError, match="no such luck") as caught:
        run_node(launch)
    assert not is_port_taken(caught.value)
    assert len(launch.opened) == 1


def test_a_node_that_fails_later_ends_with_its_error(
    fake: ModuleType, run_node: Callable[..., int], outcome: Outcome
) -> None:
    def fail() -> None:
        raise SparkleError("the network went away")

    launch = fake.FakeLaunch([fail])
    with pytest.raises(SparkleError, match="the network went away"):
        run_node(launch)
    assert (outcome.events, launch.closed_count) == (["started", "peer_joined"], 1)


def test_a_control_socket_that_cannot_be_made_is_told(
    fake: ModuleType, run_node: Callable[..., int], data_dir: Path
) -> None:
    run_dir(data_dir).write_text("in the way")
    launch = fake.FakeLaunch()
    with pytest.raises(UsageError, match="run"):
        run_node(launch)
    assert launch.closed_count == 1


def test_the_second_node_opens_nothing(fake: ModuleType, run_node: Callable[..., int]) -> None:
    second = fake.FakeLaunch()

    def start_another() -> None:
        with pytest.raises(NodeRunningError, match=str(os.getpid())):
            run_node(second, StopSignals())
        interrupt()

    assert run_node(fake.FakeLaunch([start_another])) == 0
    assert second.opened == []


@contextmanager
def broken_pipe() -> Iterator[int]:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        yield write_end
    finally:
        os.close(write_end)


def run_with_broken_output(launch: Any, data_dir: Path, *, before: bool) -> tuple[int, NodeRun]:
    runs: list[NodeRun] = []
    with broken_pipe() as stdout, open(os.devnull, "wb") as stderr:  # noqa: PTH123 (a descriptor is wanted)
        reporter = Reporter("text", stdout=stdout, stderr=stderr.fileno(), on_broken=lambda: runs[0].output_broken())
        stop = StopSignals()
        stop.listen()
        runs.append(NodeRun(NodeSettings(mesh="m", data_dir=data_dir), reporter, stop, launch))
        if before:
            runs[0].output_broken()
        try:
            return runs[0].run(), runs[0]
        finally:
            reporter.close()


@pytest.mark.parametrize("before", [False, True])
def test_a_node_whose_reader_left_ends(fake: ModuleType, data_dir: Path, before: bool) -> None:
    launch = fake.FakeLaunch()
    code, run = run_with_broken_output(launch, data_dir, before=before)
    assert code == 1
    assert launch.closed_count == len(launch.opened) == (0 if before else 1)
    run.output_broken()  # too late to matter
