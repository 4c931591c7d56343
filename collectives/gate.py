"""Who may start an operation of a group: one at a time, a task of trio's or another thread."""

from __future__ import annotations

import threading

import trio


class Gate:
    """A lock that threads try and tasks wait for. Tasks take turns among themselves before (a group's ``_turn``)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: trio.Event | None = None
        self._token: trio.lowlevel.TrioToken | None = None

    def try_to_enter(self) -> bool:
        """From any thread: enter if nobody is in and no task waits."""
        return self._opened is None and self._lock.acquire(False)

    async def enter(self) -> None:
        """From a task: wait until nobody is in, and enter."""
        while not self._lock.acquire(False):
            self._token = trio.lowlevel.current_trio_token()
            self._opened = opened = trio.Event()
            try:
                # Whoever leaves from now on sees that somebody waits.
                if self._lock.acquire(False):
                    return
                await opened.wait()
            finally:
                self._opened = None

    def leave(self) -> None:
        """From any thread: let the next one in."""
        self._lock.release()
        opened, token = self._opened, self._token
        if opened is not None and token is not None:
            token.run_sync_soon(opened.set)
