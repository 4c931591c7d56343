"""What the processes of these tests do: ``worker.py MESH SCENARIO [ARGUMENT …]``."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable

import numpy as np

import sparkle_mesh as sparkle
from sparkle_mesh.errors import SparkleError

SCENARIOS: dict[str, Callable[..., None]] = {}


def scenario(function: Callable[..., None]) -> Callable[..., None]:
    SCENARIOS[function.__name__] = function
    return function


def say(*words: object) -> None:
    """Write one line, at once and whole: forked children write to the same pipe."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def join(mesh: str, size: str, **options: object) -> sparkle.Mesh:
    return sparkle.join(mesh, min_peers=int(size), timeout_s=40, lan=False, **options)  # type: ignore[arg-type]


@scenario
def reduce_once(mesh: str, size: str) -> None:
    with join(mesh, size) as m:
        data = np.full(1000, float(m.rank + 1))
        m.all_reduce(data)
        say("view", m.view.lineage.hex(), m.size)
        say("result", data[0], data[-1])
        m.barrier()


@scenario
def reduce_for_ever(mesh: str, size: str, workers: str = "0", memory: str = "ordinary") -> None:
    """All-reduce until an error; with ``workers`` forked children that outlive this process.

    ``memory``: ``ordinary`` or ``allocated`` arrays in whatever way is best, or ``tcp``.
    """
    with join(mesh, size, links=("tcp",) if memory == "tcp" else None) as m:
        for _ in range(int(workers)):
            if os.fork() == 0:
                try:
                    m.barrier()
                except SparkleError as error:
                    say("child", type(error).__name__, os.getpid())
                os.dup2(os.open(os.devnull, os.O_RDWR), 1)
                os.dup2(1, 2)
                time.sleep(60)
                os._exit(0)
        data = m.allocate(4_000_000) if memory == "allocated" else np.ones(4_000_000, dtype=np.float32)
        m.all_reduce(data)
        rounds = 0
        say("started", m.rank)
        why = "none"
        try:
            while m.size == int(size):
                data[:] = 1
                m.all_reduce(data, timeout_s=20, on_failure="raise")
                assert (data == m.size).all()
                rounds += 1
            data[:] = 1
        except SparkleError as error:
            why = f"{type(error).__name__} {error}"
        say("state", rounds, data.min(), data.max())
        say("error", why)


@scenario
def goes_on(mesh: str, size: str, rounds: str, memory: str = "ordinary") -> None:
    """All-reduce what only this process gives, and check whose is in the sum; ``rounds`` after the last change."""
    with join(mesh, size, links=("tcp",) if memory == "tcp" else None) as m:
        changes: list[int] = []
        m.on_view_change(lambda view: changes.append(view.size))
        data = m.allocate(1_000_000) if memory == "allocated" else np.ones(1_000_000, dtype=np.float32)
        m.all_reduce(data)
        say("started", m.rank)
        mine = m.rank
        bits = 2 ** np.arange(int(size))
        left = int(rounds)
        try:
            while left:
                data[:] = 2**mine
                m.all_reduce(data, timeout_s=30)
                assert m.last_outcome is not None
                assert len(m.last_outcome.contributors) == m.size
                assert data.min() == data.max()
                given = int(data[0])
                assert bin(given).count("1") == m.size, (given, m.size)
                left -= bool(changes)
            say("whose", *np.flatnonzero(given & bits))
            say("changes", *changes)
            m.barrier()
        except SparkleError as error:
            say("error", type(error).__name__, error)


@scenario
def holds_the_interpreter(mesh: str, size: str, seconds: str) -> None:
    """Rank 1 runs C code that lets no other thread of it run, while the others wait for it in a collective."""
    with join(mesh, size) as m:
        m.barrier()
        say("started", m.rank)
        if m.rank == 1:
            ctypes.PyDLL(None).sleep(int(seconds))
        data = m.all_reduce(np.ones(3), timeout_s=60)
        say("ended", int(data[0]), m.size, m.view.epoch)
        m.barrier()


@scenario
def interrupted(mesh: str, size: str) -> None:
    """Rank 0 is interrupted in a collective that the last rank does not call before it is told to."""
    try:
        with join(mesh, size) as m:
            m.barrier()
            say("waiting", m.rank)
            if m.rank == m.size - 1:
                sys.stdin.readline()
            say("calling")
            data = m.all_reduce(np.ones(3), timeout_s=30)
            say("ended", data[0])
    except KeyboardInterrupt:
        say("interrupted")
    except SparkleError as error:
        say("ended", type(error).__name__, error)


@scenario
def never_closes(mesh: str, size: str) -> None:
    """Leave by the end of the program alone."""
    m = join(mesh, size)
    say("result", m.all_reduce(np.ones(3))[0])


@scenario
def keyed(mesh: str, size: str, key: str, timeout_s: str, *addresses: str) -> None:
    try:
        with sparkle.join(
            mesh, key=key, min_peers=int(size), timeout_s=float(timeout_s), lan=False, join=addresses
        ) as m:
            say("joined", m.size)
            sys.stdin.readline()
            m.barrier()
    except SparkleError as error:
        say("error", type(error).__name__, error)


@scenario
def mismatched(mesh: str, size: str) -> None:
    with join(mesh, size) as m:
        try:
            m.all_reduce(np.ones(3 + (m.rank == 1)))
        except SparkleError as error:
            say("error", type(error).__name__, error)
        say("result", m.all_reduce(np.ones(3))[0])
        m.barrier()


if __name__ == "__main__":
    SCENARIOS[sys.argv[2]](sys.argv[1], *sys.argv[3:])
