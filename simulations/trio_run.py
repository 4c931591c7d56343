"""The trio run of a simulated world: the order of its tasks, and all chance, follow from the seed; its nodes can pause.

A node pauses as a stopped process or a sleeping laptop does: its tasks are not run when they are woken, but held until
it goes on. Time passes for it all the same: its deadlines run out, and what others send waits in its buffers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import trio

_Task = trio.lowlevel.Task


class Pauses:
    """The nodes of one trio run, each a task with all that it has started, and which of them are paused."""

    def __init__(self) -> None:
        self._roots: dict[_Task, str] = {}
        self._held: dict[str, list[_Task]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block, trio runs no task of a paused node."""
        runner_type: Any = trio._core._run.Runner
        reschedule = runner_type.reschedule

        def hold_back(runner: Any, task: _Task, *arguments: Any) -> None:
            reschedule(runner, task, *arguments)
            if self._held and (held := self._held.get(self._node_of(task))) is not None:
                # It was put last just now.
                held.append(runner.runq.pop())

        with mock.patch.object(runner_type, "reschedule", hold_back):
            yield

    def adopt(self, name: str) -> None:
        """The task that calls this, and all that run below it, are the node called ``name``."""
        self._roots[trio.lowlevel.current_task()] = name

    def pause(self, name: str) -> bool:
        """Hold the tasks of the node from now on; False if they are held already."""
        if name in self._held:
            return False
        queue = _queue()
        mine = [task for task in queue if self._node_of(task) == name]
        for task in mine:
            queue.remove(task)
        self._held[name] = mine
        return True

    def resume(self, name: str) -> None:
        """Let the node go on, if it is paused."""
        _queue().extend(self._held.pop(name, ()))

    def resume_all(self) -> None:
        """Let all nodes go on."""
        for name in list(self._held):
            self.resume(name)

    def _node_of(self, task: _Task) -> str:
        above: _Task | None = task
        while above is not None:
            if above in self._roots:
                return self._roots[above]
            above = None if above.parent_nursery is None else above.parent_nursery.parent_task
        return ""


def _queue() -> Any:
    """What trio runs next."""
    return trio._core._run.GLOBAL_RUN_CONTEXT.runner.runq


@contextmanager
def deterministic_scheduling(seed: int) -> Iterator[None]:
    """Let trio run tasks in an order that follows from ``seed``, within the block."""
    run: Any = trio._core._run
    before = run._ALLOW_DETERMINISTIC_SCHEDULING
    run._ALLOW_DETERMINISTIC_SCHEDULING = True
    run._r.seed(seed)
    try:
        yield
    finally:
        run._ALLOW_DETERMINISTIC_SCHEDULING = before


class SeededEntropy:
    """Random bytes and fractions that follow from the seed."""

    def __init__(self, source: random.Random) -> None:
        self._random = source

    def token(self, nbytes: int) -> bytes:
        """Return ``nbytes`` bytes."""
        return self._random.randbytes(nbytes)

    def uniform(self, low: float, high: float) -> float:
        """Return a number in ``[low, high)``."""
        return self._random.uniform(low, high)
