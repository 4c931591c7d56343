"""Whose turn it is on a device: the most urgent first, and of these who came first."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count


class Turns:
    """Lets one at a time in."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: list[tuple[int, int]] = []
        self._numbers = count()
        self._taken = False

    @contextmanager
    def turn(self, priority: int = 0) -> Iterator[None]:
        """Wait for a turn, and have it until the block ends; those of higher ``priority`` come first."""
        with self._condition:
            ticket = -priority, next(self._numbers)
            heapq.heappush(self._waiting, ticket)
            has_come = False
            try:
                self._condition.wait_for(lambda: not self._taken and self._waiting[0] == ticket)
                has_come = True
            finally:
                # One that is interrupted while it waits must not stand before the others for good.
                self._waiting.remove(ticket)
                heapq.heapify(self._waiting)
                self._taken |= has_come
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._taken = False
                self._condition.notify_all()
