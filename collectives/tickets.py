"""Turns that are taken in the order in which they were asked for, by whoever asked, whenever that gets to run."""

from __future__ import annotations

import trio


class Ticket:
    """A place in a queue: :meth:`wait` for the turn, then :meth:`leave` it to the next. Leaving early is allowed."""

    __slots__ = ("_before", "_left", "_next", "passed")

    def __init__(self, before: Ticket | None) -> None:
        self._before = before
        self._next: Ticket | None = None
        self._left = False
        #: Set once this and all before it have left.
        self.passed = trio.Event()
        if before is not None:
            before._next = self

    async def wait(self) -> None:
        """Wait until all before have left; no checkpoint if they have."""
        if self._before is not None:
            await self._before.passed.wait()

    def leave(self) -> None:
        """Give way to the next; if it is not this one's turn yet, as soon as it is."""
        self._left = True
        ticket: Ticket | None = self
        while ticket is not None and ticket._left and (ticket._before is None or ticket._before.passed.is_set()):
            ticket.passed.set()
            ticket._before = None
            ticket = ticket._next


class Queue:
    """Hands out tickets. ``busy`` tells, from any thread, whether somebody has one and has not left."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: Ticket | None = None

    @property
    def busy(self) -> bool:
        last = self._last
        return last is not None and not last.passed.is_set()

    def take(self) -> Ticket:
        """Return the next ticket."""
        before = self._last if self.busy else None
        self._last = Ticket(before)
        return self._last
