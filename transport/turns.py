"""Turns among tasks, without a turn of the scheduler where nobody waits."""

from __future__ import annotations

import trio


class Turns:
    """One task at a time, in the order in which they came.

    A :class:`trio.Lock` of which taking a free one costs nothing; deadlines and others' progress are its user's care.
    """

    def __init__(self) -> None:
        self.taken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def take(self) -> None:
        """Wait for a turn. Cancelling gives up the place in the queue."""
        if self.taken:
            # Whoever has the turn hands it over to the first that waits.
            await self._waiting.park()
        else:
            self.taken = True

    def release(self) -> None:
        """End a turn."""
        if self._waiting:
            self._waiting.unpark()
        else:
            self.taken = False
