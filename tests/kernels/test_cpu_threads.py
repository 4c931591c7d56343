"""Threads share the pieces of a task: each is done once, and what goes wrong comes out in the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sparkle_mesh.errors import KernelStoppedError
from sparkle_mesh.kernels import cpu_threads
from sparkle_mesh.kernels.cpu_threads import Portions, WorkerThreads


@pytest.fixture
def workers() -> Iterator[WorkerThreads]:
    made = WorkerThreads(3)
    yield made
    made.close()


def test_each_piece_is_done_once(workers: WorkerThreads) -> None:
    done: list[int] = []
    workers.share(1000, lambda portions: done.extend(portions))
    assert sorted(done) == list(range(1000))
    workers.share(0, lambda portions: done.extend(portions))
    assert len(done) == 1000


def test_threads_work_at_the_same_time(workers: WorkerThreads) -> None:
    meeting = threading.Barrier(3)

    def work(portions: Portions) -> None:
        for _ in portions:
            meeting.wait(10)

    workers.share(3, work)
    assert not meeting.broken


def test_small_tasks_stay_with_the_caller(workers: WorkerThreads) -> None:
    seen: set[int] = set()
    workers.share(5, lambda portions: seen.update(threading.get_ident() for _ in portions), alone=True)
    assert seen == {threading.get_ident()}


def test_a_caller_does_not_wait_for_helpers_that_are_busy_elsewhere(workers: WorkerThreads) -> None:
    release, held = threading.Event(), threading.Barrier(4)

    def hold(portions: Portions) -> None:
        for _ in portions:
            held.wait(10)
            release.wait(10)

    other = threading.Thread(target=workers.share, args=(3, hold))
    other.start()
    # All helpers are inside, and the other caller.
    held.wait(10)
    done: list[int] = []
    workers.share(10, lambda portions: done.extend(portions))
    assert sorted(done) == list(range(10))
    release.set()
    other.join()


def test_what_a_helper_raises_comes_out_in_the_caller(workers: WorkerThreads) -> None:
    caller = threading.get_ident()
    failed = threading.Event()

    def work(portions: Portions) -> None:
        for _ in portions:
            if threading.get_ident() != caller:
                failed.set()
                raise ZeroDivisionError("a helper's")
            # Until a helper has failed.
            failed.wait(10)

    with pytest.raises(ZeroDivisionError, match="a helper's"):
        workers.share(1000, work)
    done: list[int] = []
    workers.share(10, lambda portions: done.extend(portions))
    assert len(done) == 10


def test_an_interrupted_caller_leaves_no_one_working(workers: WorkerThreads) -> None:
    caller = threading.get_ident()
    working: set[int] = set()

    def work(portions: Portions) -> None:
        working.add(threading.get_ident())
        try:
            for _ in portions:
                if threading.get_ident() == caller:
                    raise KeyboardInterrupt
        finally:
            working.discard(threading.get_ident())

    with pytest.raises(KeyboardInterrupt):
        workers.share(10**6, work)
    assert not working


def test_an_interruption_while_it_waits_leaves_no_one_working(
    workers: WorkerThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    working: set[int] = set()
    caller = threading.get_ident()
    begun, waited = threading.Event(), threading.Event()

    def work(portions: Portions) -> None:
        if threading.get_ident() == caller:
            begun.wait(10)
            return
        working.add(threading.get_ident())
        for _ in portions:
            begun.set()
            waited.wait(10)
        working.discard(threading.get_ident())

    really_wait = cpu_threads.wait
    interruptions = [KeyboardInterrupt("first"), KeyboardInterrupt("second")]

    def interrupted(futures: Any) -> Any:
        if interruptions:
            raise interruptions.pop(0)
        waited.set()
        return really_wait(futures)

    monkeypatch.setattr(cpu_threads, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt, match="second"):
        workers.share(10**6, lambda portions: quietly_stopped(work, portions, working))
    assert not working


def quietly_stopped(work: Callable[[Portions], None], portions: Portions, working: set[int]) -> None:
    try:
        work(portions)
    except KernelStoppedError:
        working.discard(threading.get_ident())
        raise


def test_a_task_is_given_up_when_its_caller_wants(workers: WorkerThreads) -> None:
    for alone in (True, False):
        done = []

        def work(portions: Portions, done: list[int] = done) -> None:
            done.extend(portions)

        with pytest.raises(KernelStoppedError):
            workers.share(10**6, work, alone=alone, should_stop=lambda: True)
        assert len(done) < 10**6


def test_helpers_do_not_warn(workers: WorkerThreads) -> None:
    meeting = threading.Barrier(3)
    found: list[str] = []

    def work(portions: Portions) -> None:
        for _ in portions:
            meeting.wait(10)
            found.append(np.geterr()["over"])

    workers.share(3, work)
    assert found == ["ignore"] * 3


def test_closed_threads_are_started_anew(workers: WorkerThreads) -> None:
    for _ in range(2):
        done: list[int] = []
        workers.share(100, lambda portions, done=done: done.extend(portions))  # type: ignore[misc]
        assert len(done) == 100
        workers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sparkle-kernels")]


def test_a_caller_does_it_all_where_no_thread_can_be_started(
    workers: WorkerThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        workers.share(10, lambda portions: done.extend(portions))
    assert sorted(done) == list(range(10))
