"""A node without a network, for tests of the command around it; also a program: ``sparkle-node`` with this node.

As a program it takes the arguments of ``sparkle-node``. ``FAKE_NODE_HANG=1`` makes it ignore being cancelled.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import trio

from sparkle_mesh.capabilities.search import DeviceQuery, FoundDevice
from sparkle_mesh.cli.settings import DEFAULT_LISTEN, NodeSettings
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import UsageError
from sparkle_mesh.status import NodeStatus, PeerStatus, RevocationStatus, ViewStatus

PEER_ID = "12D3KooWRawPbxPtP1eZaJpumGnyWX2DcUyd3RQnydr3eAto4Az7"


def peer(peer_id: str = "12D3KooWPeer", **changes: Any) -> PeerStatus:
    fields: dict[str, Any] = {"role": "trainer", "addresses": ("/ip4/10.0.0.2/tcp/4",), "connected_s": 61.5}
    return PeerStatus(peer_id=peer_id, **{**fields, "latency_ms": 0.25, "rank": 1, "admitted": True, **changes})


def found(peer_id: str = "12D3KooWPeer", **changes: Any) -> FoundDevice:
    device = DeviceInfo(kind="cuda", index=1, name="A GPU", memory_bytes=24 * 2**30, gflops={"float32": 82600.0})
    fields: dict[str, Any] = {"host_id": "ab" * 16, "role": "node", "software": "sparkle-mesh 0.1.0", "device": device}
    return FoundDevice(peer_id=peer_id, **{**fields, "addresses": ("/ip4/10.0.0.2/tcp/4",), "age_s": 7.5, **changes})


def status(settings: NodeSettings | None = None, **changes: Any) -> NodeStatus:
    fields: dict[str, Any] = {
        "peer_id": PEER_ID,
        "addresses": settings.listen if settings else (DEFAULT_LISTEN,),
        "mesh": settings.mesh if settings else "a-mesh",
        "keyed": settings is not None and settings.key is not None,
        "public": settings is not None and settings.public,
        "role": "node",
        "version": "0.1.0",
        "pid": os.getpid(),
        "uptime_s": 3700.0,
        "devices": (DeviceInfo(kind="cpu", index=0, name="A CPU", memory_bytes=2**33, cores=4, logical_cores=8),),
        "peer_count": 1,
        "view": ViewStatus(epoch=0, lineage_hex="ab" * 32, size=2, members=(PEER_ID, "12D3KooWPeer")),
        "discovery": ("lan: 2 peers heard",),
    }
    return NodeStatus(**{**fields, **changes})


class FakeNode:
    """Answers like a node; its events are what is put into ``feeds``, one list per subscription."""

    def __init__(self, settings: NodeSettings | None = None, *feeds: list[Any]) -> None:
        self.settings = settings
        self.known_peers = [peer()]
        self.feeds = list(feeds)
        self.failure: Exception | None = None

    def status(self) -> NodeStatus:
        if self.failure is not None:
            raise self.failure
        return status(self.settings)

    def peers(self) -> list[PeerStatus]:
        return self.known_peers

    def invite(self) -> str:
        return "sparkle-invite-1:fake"

    def revoke(self, peer_id: str) -> RevocationStatus:
        if peer_id == PEER_ID:
            raise UsageError("it is the founder")
        return RevocationStatus(sequence=3, revoked=("12D3KooWGone", peer_id))

    async def find_devices(self, query: DeviceQuery) -> list[FoundDevice]:
        if query.limit == 4096:
            raise UsageError("it has no devices to tell of")
        return [] if query.kind == "opencl" else [found()]

    @contextmanager
    def events(self) -> Iterator[AsyncIterator[Any]]:
        yield self._events(self.feeds.pop(0) if self.feeds else None)

    async def _events(self, feed: list[Any] | None) -> AsyncIterator[Any]:
        """Yield what is in the feed (call what can be called), then end; without a feed, wait for ever."""
        if feed is None:
            await trio.sleep_forever()
            return
        for item in feed:
            await trio.lowlevel.checkpoint()
            if callable(item):
                item()
            else:
                yield item


class FakeLaunch:
    """Opens fake nodes, and remembers the settings they were to run with."""

    def __init__(self, *feeds: list[Any], taken: tuple[str, ...] = ()) -> None:
        self.feeds, self.taken = feeds, taken
        self.opened: list[NodeSettings] = []
        self.closed_count = self.farewell_count = 0
        self.on_open: Callable[[], None] = lambda: None

    def __call__(self, settings: NodeSettings) -> AbstractAsyncContextManager[FakeNode]:
        return self._open(settings)

    @asynccontextmanager
    async def _open(self, settings: NodeSettings) -> AsyncIterator[FakeNode]:
        self.opened.append(settings)
        async with trio.open_nursery():  # as in a real one, errors come out in groups
            for address in settings.listen:
                if address in self.taken:
                    cause = OSError(errno.EADDRINUSE, "Address already in use")
                    raise UsageError(f"cannot listen on {address}: it is in use") from cause
            self.on_open()
            try:
                yield FakeNode(settings, *self.feeds)
            finally:
                self.closed_count += 1
                await trio.lowlevel.checkpoint()  # the farewell to its peers, unless cancelled
                self.farewell_count += 1


@asynccontextmanager
async def hanging_launch(settings: NodeSettings) -> AsyncIterator[FakeNode]:
    try:
        yield FakeNode(settings)
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()


if __name__ == "__main__":
    from sparkle_mesh.cli.commands import run_command_line
    from sparkle_mesh.cli.signals import StopSignals

    stop = StopSignals()
    stop.listen()
    launch = hanging_launch if os.environ.get("FAKE_NODE_HANG") else FakeLaunch()
    sys.exit(run_command_line(sys.argv[1:], stop, launch=launch))
