"""One sender, many bounded receivers, all in one trio run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Broadcast(Generic[T]):
    """Hand every item to every current subscriber.

    A subscriber that falls ``capacity`` items behind is cut off: its channel ends, so that it knows.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._senders: set[trio.MemorySendChannel[T]] = set()

    def send(self, item: T) -> None:
        """Give ``item`` to all subscribers; never waits."""
        for sender in list(self._senders):
            try:
                sender.send_nowait(item)
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._senders.discard(sender)
                sender.close()

    @contextmanager
    def subscribe(self) -> Iterator[trio.MemoryReceiveChannel[T]]:
        """Receive what is sent from now until the block ends."""
        sender, receiver = trio.open_memory_channel[T](self._capacity)
        self._senders.add(sender)
        try:
            yield receiver
        finally:
            self._senders.discard(sender)
            sender.close()
            receiver.close()

    def close(self) -> None:
        """End all subscriptions."""
        for sender in self._senders:
            sender.close()
        self._senders.clear()
