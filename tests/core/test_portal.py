"""The background trio run: calls, failures, Ctrl-C, closing."""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio

from sparkle_mesh.errors import MeshClosedError, UsageError
from sparkle_mesh.portal import Portal


class Resource:
    """Something that is opened and closed in the background run."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.cancelled = threading.Event()
        self.waiting = threading.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Resource]:
        try:
            yield self
        finally:
            self.closed.set()

    async def wait_for_ever(self) -> None:
        self.waiting.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()


def opened() -> tuple[Portal, Resource]:
    portal, resource = Portal("test portal"), Resource()
    assert portal.open(resource.open) is resource
    return portal, resource


def test_calls_return_and_raise_what_the_function_does() -> None:
    portal, resource = opened()
    try:

        async def double(value: int) -> int:
            await trio.lowlevel.checkpoint()
            return 2 * value

        async def fail() -> None:
            raise UsageError("as planned")

        assert portal.call(double, 21) == 42
        with pytest.raises(UsageError, match="as planned"):
            portal.call(fail)
        assert portal.call(double, 1) == 2, "a failed call leaves the portal usable"
    finally:
        portal.close()
    assert resource.closed.is_set()
    with pytest.raises(MeshClosedError, match="join again"):
        portal.call(double, 1)
    portal.close()


def test_an_error_while_opening_comes_out_bare_and_ends_the_thread() -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        async with trio.open_nursery():
            raise UsageError("cannot open")
        yield

    portal = Portal("broken portal")
    with pytest.raises(UsageError, match="cannot open"):
        portal.open(broken)
    assert not any(thread.name == "broken portal" for thread in threading.enumerate())


def test_closing_a_portal_that_was_never_opened_is_nothing() -> None:
    Portal("unopened").close()


def test_closing_ends_calls_in_progress_from_other_threads() -> None:
    portal, resource = opened()
    errors: list[BaseException] = []

    def call() -> None:
        try:
            portal.call(resource.wait_for_ever)
        except MeshClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert resource.waiting.wait(5)
    portal.close()
    thread.join(5)
    assert len(errors) == 1
    assert resource.cancelled.is_set()


def interrupt_when(event: threading.Event) -> Callable[[], None]:
    """Return what, in a thread, sends this process's main thread a SIGINT once ``event`` is set."""

    def run() -> None:
        event.wait(5)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    return run


def test_ctrl_c_cancels_the_call_and_leaves_the_portal_usable() -> None:
    portal, resource = opened()
    try:
        thread = threading.Thread(target=interrupt_when(resource.waiting))
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            portal.call(resource.wait_for_ever)
        thread.join()
        assert resource.cancelled.wait(5)

        async def alive() -> str:
            return "yes"

        assert portal.call(alive) == "yes"
    finally:
        portal.close()


def test_ctrl_c_while_opening_closes_again() -> None:
    resource = Resource()

    @asynccontextmanager
    async def slow() -> AsyncIterator[None]:
        await resource.wait_for_ever()
        yield

    thread = threading.Thread(target=interrupt_when(resource.waiting))
    thread.start()
    portal = Portal("slow portal")
    with pytest.raises(KeyboardInterrupt):
        portal.open(slow)
    thread.join()
    assert resource.cancelled.is_set()
    assert not any(other.name == "slow portal" for other in threading.enumerate())


def test_ctrl_c_the_moment_before_the_wait_is_not_lost() -> None:
    """A signal handler runs between bytecodes: what it does then must be seen though it woke no wait."""
    portal, resource = opened()
    interrupted = False

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    async def wait_for_ever() -> None:
        # The handler is due from here on, and no system call of the main thread is interrupted.
        signal.raise_signal(signal.SIGINT)
        await resource.wait_for_ever()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        portal.call(wait_for_ever)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGINT, previous)
        portal.close()
    assert interrupted
    assert resource.cancelled.is_set()


def test_ctrl_c_while_the_thread_starts_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted_start(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    resource = Resource()
    portal = Portal("ghost portal")
    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    with pytest.raises(KeyboardInterrupt):
        portal.open(resource.open)
    assert not any(thread.name == "ghost portal" for thread in threading.enumerate())


def test_ctrl_c_while_closing_hurries_and_is_raised() -> None:
    leaving, cancelled = threading.Event(), threading.Event()

    @asynccontextmanager
    async def reluctant() -> AsyncIterator[None]:
        try:
            yield
        finally:
            leaving.set()
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

    portal = Portal("reluctant portal")
    portal.open(reluctant)
    thread = threading.Thread(target=interrupt_when(leaving))
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        portal.close()
    thread.join()
    assert cancelled.is_set()


def test_a_run_that_fails_fails_later_calls_with_a_named_error() -> None:
    failing = threading.Event()

    @asynccontextmanager
    async def fails_later() -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:

            async def fail() -> None:
                await trio.lowlevel.checkpoint()
                raise UsageError("the service broke")

            nursery.start_soon(fail)
            try:
                yield
            finally:
                failing.set()

    portal = Portal("failing portal")
    manager: Callable[[], AbstractAsyncContextManager[None]] = fails_later
    portal.open(manager)
    assert failing.wait(5)
    portal.close()

    async def anything() -> None: ...

    with pytest.raises(MeshClosedError, match="the service broke"):
        portal.call(anything)
