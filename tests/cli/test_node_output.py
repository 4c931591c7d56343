"""The node's lines against readers that stop, leave, or share the pipe."""

from __future__ import annotations

import json
import logging
import os
import select
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from sparkle_mesh.cli import render
from sparkle_mesh.cli.output import LineWriter, LogFormat, Reporter, start_logging


class Pipe:
    """Both ends of a pipe."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self._open = {self.read_end, self.write_end}

    def fill(self) -> int:
        """Write until not one byte more fits; return how many went in."""
        os.set_blocking(self.write_end, False)
        count = 0
        for size in (65536, 1):
            try:
                while True:
                    count += os.write(self.write_end, b"." * size)
            except BlockingIOError:
                continue
        os.set_blocking(self.write_end, True)
        return count

    def read(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            data += os.read(self.read_end, nbytes - len(data))
        return data

    def read_rest(self) -> str:
        """Close the end that is written to and return all that is still to be read."""
        self.close(self.write_end)
        with os.fdopen(os.dup(self.read_end)) as stream:
            return stream.read()

    def close(self, *ends: int) -> None:
        for end in ends or tuple(self._open):
            if end in self._open:
                self._open.remove(end)
                os.close(end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def notice(count: int) -> str:
    return f"{count} dropped"


def test_lines_come_out_in_order(pipe: Pipe) -> None:
    writer = LineWriter(pipe.write_end, notice=notice)
    for number in range(1000):
        writer.write(str(number))
    writer.close()
    assert pipe.read_rest().split() == [str(number) for number in range(1000)]


def test_a_reader_that_stops_costs_lines_and_not_time(pipe: Pipe) -> None:
    filled = pipe.fill()
    writer = LineWriter(pipe.write_end, notice=notice, capacity=10)
    for number in range(100):
        writer.write(f"line {number}")
    pipe.read(filled)
    writer.close(timeout_s=30)
    lines = pipe.read_rest().splitlines()
    (told,) = [line for line in lines if line.endswith(" dropped")]
    kept = [line for line in lines if line.startswith("line ")]
    assert int(told.split()[0]) + len(kept) == 100
    assert kept == [f"line {number}" for number in range(len(kept))]
    assert len(kept) <= 11


def test_a_reader_that_stopped_does_not_hold_up_the_end(pipe: Pipe) -> None:
    filled = pipe.fill()
    writer = LineWriter(pipe.write_end, notice=notice, capacity=1)
    writer.write("x" * filled)
    writer.close(timeout_s=0.01)
    writer.close(timeout_s=0.01)  # now the queue is full for sure
    pipe.read(filled)
    pipe.close(pipe.read_end)  # lets the threads end


def test_a_reader_that_left_is_noticed_once(pipe: Pipe) -> None:
    pipe.close(pipe.read_end)
    broken: list[int] = []
    writer = LineWriter(pipe.write_end, notice=notice, on_broken=lambda: broken.append(1))
    for _ in range(10):
        writer.write("x")
    writer.close()
    assert broken == [1]


def test_a_pipe_that_somebody_made_non_blocking(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = pipe.fill()
    os.set_blocking(pipe.write_end, False)
    waits, select_really = threading.Event(), select.select

    def select_noted(*arguments: Any) -> Any:
        waits.set()
        return select_really(*arguments)

    monkeypatch.setattr(select, "select", select_noted)
    writer = LineWriter(pipe.write_end, notice=notice)
    writer.write("x" * filled)
    assert waits.wait(30)
    assert pipe.read(2 * filled + 1) == b"." * filled + b"x" * filled + b"\n"
    writer.close()


def test_what_is_no_unicode_is_escaped(pipe: Pipe) -> None:
    writer = LineWriter(pipe.write_end, notice=notice)
    writer.write("a\udcffb")
    writer.close()
    assert pipe.read_rest() == "a\\udcffb\n"


class FixedClock:
    def now(self) -> float:
        return 0.0

    def wall_time(self) -> float:
        return 1_700_000_000.25


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_reporter_speaks_one_format(log_format: LogFormat) -> None:
    out, err = Pipe(), Pipe()
    reporter = Reporter(log_format, stdout=out.write_end, stderr=err.write_end, clock=FixedClock())
    stop_logging = start_logging(reporter, "info")
    reporter.say(render.stopped())
    logging.getLogger("sparkle_mesh.somewhere").info("kept\nin one line")
    logging.getLogger("sparkle_mesh.somewhere").debug("below the level")
    logging.getLogger("elsewhere").info("not ours")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    stop_logging()
    logging.getLogger("sparkle_mesh.somewhere").error("after the end")
    reporter.close()
    said, complained = out.read_rest().splitlines(), err.read_rest().splitlines()
    out.close()
    err.close()
    assert len(said) == 1
    assert len(complained) == 2
    if log_format == "json":
        assert json.loads(said[0]) == {"time": 1_700_000_000.25, "event": "stopped"}
        assert json.loads(complained[0])["message"] == "kept\nin one line"
        assert "careful" in json.loads(complained[1])["message"]
    else:
        assert said[0].endswith(" stopped")
        assert complained[0].endswith(" info: kept\\nin one line")
        assert "careful" in complained[1]


def test_dropped_lines_are_told_in_the_readers_format(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    err = Pipe()
    filled = pipe.fill()
    reporter = Reporter("json", stdout=pipe.write_end, stderr=err.write_end)
    for _ in range(6000):
        reporter.say(render.stopped())
    collected: list[bytes] = []

    def collect() -> None:
        while piece := os.read(pipe.read_end, 65536):
            collected.append(piece)

    collector = threading.Thread(target=collect)
    collector.start()
    reporter.close()
    pipe.close(pipe.write_end)
    collector.join()
    err.close()
    events = [json.loads(line) for line in b"".join(collected)[filled:].splitlines()]
    (told,) = [event for event in events if event["event"] == "dropped"]
    assert told["lines"] + sum(event["event"] == "stopped" for event in events) == 6000
