"""What every fabric does the same way: hand events and publications to bounded subscriptions, guard handlers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.interface import Accepts, FabricEvent, PeerConnected, PeerId, Published

logger = logging.getLogger("sparkle_mesh.fabric")


@dataclass(slots=True)
class FabricCounters:
    """What went wrong, counted since the fabric opened."""

    handler_failures: int = 0
    publications_dropped: int = 0
    publications_malformed: int = 0
    publications_refused: int = 0
    event_subscribers_dropped: int = 0
    sockets_refused: int = 0
    upgrades_failed: int = 0


async def run_guarded(
    what: str,
    handler: Callable[[], Awaitable[None]],
    abort: Callable[[], Awaitable[None]],
    counters: FabricCounters,
    *,
    expected: bool = False,
) -> None:
    """Run a peer's handler; what it raises is logged and counted, and ends with ``abort`` called.

    ``expected`` failures (whoever scans a port causes them) are told in one line and without alarm.

    This is the one place where any exception is caught: a handler runs on bytes of a peer, and nothing a
    peer sends may end the process.
    """
    finished = False
    try:
        await handler()
        finished = True
    except SparkleError as error:
        counters.handler_failures += 1
        logger.info("%s ended: %s", what, error)
    except Exception as error:
        counters.handler_failures += 1
        if expected:
            logger.info("%s failed: %s", what, str(error) or type(error).__name__)
            logger.debug("%s failed", what, exc_info=True)
        else:
            logger.warning("%s failed", what, exc_info=True)
    finally:
        if not finished:
            with trio.move_on_after(limits.CLOSE_TIMEOUT_S) as scope:
                scope.shield = True
                await abort()


class EventHub:
    """Connection events for any number of subscribers, each behind a bounded channel."""

    def __init__(self, counters: FabricCounters) -> None:
        self._counters = counters
        self._subscribers: set[trio.MemorySendChannel[FabricEvent]] = set()

    def emit(self, event: FabricEvent) -> None:
        """Tell every subscriber; one that is too far behind loses its channel."""
        for channel in list(self._subscribers):
            try:
                channel.send_nowait(event)
            except trio.BrokenResourceError:
                self._subscribers.discard(channel)
            except trio.WouldBlock:
                # Events that were left out would be worse than none: the subscriber's picture would be false.
                self._subscribers.discard(channel)
                self._counters.event_subscribers_dropped += 1
                channel.close()

    @asynccontextmanager
    async def subscribe(
        self, present: Callable[[], Iterable[PeerConnected]]
    ) -> AsyncIterator[trio.MemoryReceiveChannel[FabricEvent]]:
        send, receive = trio.open_memory_channel[FabricEvent](limits.FABRIC_EVENTS_MAX_COUNT)
        for event in present():
            send.send_nowait(event)
        self._subscribers.add(send)
        with send, receive:
            try:
                yield receive
            finally:
                self._subscribers.discard(send)

    def close(self) -> None:
        """End every subscription."""
        for channel in self._subscribers:
            channel.close()
        self._subscribers.clear()


class TopicHub:
    """Publications for any number of subscribers by topic, each behind a bounded channel."""

    def __init__(self, counters: FabricCounters) -> None:
        self._counters = counters
        # With what each of them accepts.
        self._subscribers: dict[str, dict[trio.MemorySendChannel[Published], Accepts | None]] = {}

    def __contains__(self, topic: str) -> bool:
        return topic in self._subscribers

    def takes(self, topic: str, publisher: PeerId, data: bytes) -> bool:
        """Whether there are subscribers, and all of them accept the message: else it is not passed on either."""
        tests = self._subscribers.get(topic)
        if tests is None:
            return False
        accepted = all(accepts is None or accepts(publisher, data) for accepts in tests.values())
        self._counters.publications_refused += not accepted
        return accepted

    def deliver(self, topic: str, published: Published) -> None:
        """Hand ``published`` to those who subscribe; the newest is dropped for one whose channel is full."""
        for channel in list(self._subscribers.get(topic, ())):
            try:
                channel.send_nowait(published)
            except trio.WouldBlock:
                self._counters.publications_dropped += 1
            except trio.BrokenResourceError:
                # The reader closed its end and is about to leave the block that discards the channel.
                continue

    @asynccontextmanager
    async def subscribe(
        self, topic: str, accepts: Accepts | None = None
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Published]]:
        send, receive = trio.open_memory_channel[Published](limits.SUBSCRIPTION_MAX_COUNT)
        self._subscribers.setdefault(topic, {})[send] = accepts
        with send, receive:
            try:
                yield receive
            finally:
                subscribers = self._subscribers.get(topic, {})
                subscribers.pop(send, None)
                if not subscribers:
                    self._subscribers.pop(topic, None)

    def close(self) -> None:
        """End every subscription."""
        for channels in self._subscribers.values():
            for channel in channels:
                channel.close()
        self._subscribers.clear()
