"""Signals from the first moment on, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from sparkle_mesh.cli.signals import StopSignals

PRELUDE = """
import os, signal, sys
from sparkle_mesh.cli.signals import StopSignals
def send(number): os.kill(os.getpid(), number)
stop = StopSignals()
stop.listen()
"""
WAIT = """
import trio
async def main():
    received = await stop.wait()
    print(received.name, flush=True)
trio.run(main)
"""


def run(program: str, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PRELUDE + program], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_before_the_wait_is_kept(name: str) -> None:
    assert run(f"send(signal.{name})" + WAIT) == (0, f"{name}\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_during_the_wait_ends_it(name: str) -> None:
    program = f"""
import trio, trio.testing
async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        send(signal.{name})
async def wait():
    print((await stop.wait()).name)
trio.run(main)
"""
    assert run(program) == (0, f"{name}\n")


def test_the_second_signal_ends_the_process_at_once() -> None:
    assert run("send(signal.SIGINT); send(signal.SIGTERM); print('still here')") == (-signal.SIGTERM, "")
    assert run("send(signal.SIGINT)" + WAIT + "send(signal.SIGINT); print('still here')") == (
        -signal.SIGINT,
        "SIGINT\n",
    )


def test_signals_that_are_given_back_are_the_systems() -> None:
    assert run("stop.release(); send(signal.SIGTERM); print('still here')") == (-signal.SIGTERM, "")
    assert run("send(signal.SIGINT); stop.release(); print('still here')") == (-signal.SIGINT, "")
    assert run("stop.release(); print('fine')") == (0, "fine\n")


def test_a_signal_that_came_takes_effect_when_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    stop = StopSignals()
    stop.listen()
    signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    stop.release()
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_nohup_is_respected_and_a_background_jobs_sigint_is_not() -> None:
    assert run("send(signal.SIGHUP); print(stop.received)", ("nohup",)) == (0, "None\n")
    ignoring = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
    assert run("send(signal.SIGINT); print(stop.received.name)", ignoring) == (0, "SIGINT\n")
