"""The control plane as an interface: identities, streams, publish/subscribe, and a shared listening port.

Links, discovery and membership use this and nothing of libp2p, so that the simulator can stand in for it.
Peer ids are base58 text (``12D3Koo…``), addresses are multiaddr text without the ``/p2p/…`` tail
(``/ip4/192.168.1.4/tcp/45654``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import trio

PeerId: TypeAlias = str
Address: TypeAlias = str


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A first connection to ``peer_id`` stands; ``remote_address`` is where it is connected from or to."""

    peer_id: PeerId
    remote_address: Address | None
    outbound: bool


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The last connection to ``peer_id`` is gone."""

    peer_id: PeerId


FabricEvent: TypeAlias = PeerConnected | PeerDisconnected


@dataclass(frozen=True, slots=True)
class Published:
    """A message that ``peer_id`` (authenticated by its signature) published on a topic."""

    peer_id: PeerId
    data: bytes


class FabricStream(Protocol):
    """One authenticated, encrypted, ordered byte stream to a peer over the control plane."""

    @property
    def peer_id(self) -> PeerId: ...

    async def read(self, max_bytes: int) -> bytes:
        """Return 1 to ``max_bytes`` bytes, or ``b""`` once the peer has closed its side. Cancelling loses nothing.

        Raises
        ------
        LinkClosedError
            If the stream was reset or its connection is gone.
        """
        ...

    async def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data``, while the peer reads it; concurrent writers take turns.

        A cancelled call may have written part of it: reset the stream then.

        Raises
        ------
        LinkClosedError
            As for :meth:`read`, or if the peer has closed its side.
        """
        ...

    async def aclose(self) -> None:
        """Close both directions; never raises for a stream that is already gone."""
        ...

    async def reset(self) -> None:
        """Abort the stream: the peer's reads and writes fail. Never raises."""
        ...

    def abort(self) -> None:
        """As :meth:`reset`, and the peer is told in the background. Those who wait here get LinkClosedError."""
        ...

    async def widen(self, window_bytes: int) -> None:
        """Let the peer send up to ``window_bytes`` ahead of what is read here: for much data over long distances.

        Raises
        ------
        LinkClosedError
            As for :meth:`read`.
        """
        ...


StreamHandler: TypeAlias = Callable[[FabricStream], Awaitable[None]]
RawHandler: TypeAlias = Callable[[trio.SocketStream], Awaitable[None]]
#: Whether what a peer publishes is worth being passed on.
Accepts: TypeAlias = Callable[[PeerId, bytes], bool]


class Fabric(Protocol):
    """What a process needs of the control plane. All methods are called from the fabric's trio run."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Addresses this process listens on, wildcards expanded to interface addresses (loopback last)."""
        ...

    def connected_peers(self) -> frozenset[PeerId]: ...

    def remote_address(self, peer_id: PeerId) -> Address | None:
        """Where ``peer_id`` is connected from or to; None if it is not connected."""
        ...

    def events(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[FabricEvent]]:
        """Subscribe to connection events. Peers connected already are replayed first.

        A subscriber that falls more than ``limits.FABRIC_EVENTS_MAX_COUNT`` behind gets its channel closed.
        """
        ...

    async def connect(self, peer_id: PeerId, addresses: Sequence[Address], *, timeout_s: float = ...) -> None:
        """Make sure a connection to ``peer_id`` stands.

        Raises
        ------
        UnreachableError
            If no address led to that very peer within ``timeout_s``; the message lists each address and why.
        """
        ...

    async def disconnect(self, peer_id: PeerId) -> None:
        """Close all connections to ``peer_id``; no error if there are none."""
        ...

    async def open_stream(self, peer_id: PeerId, protocol: str, *, timeout_s: float = ...) -> FabricStream:
        """Open a stream to a connected peer.

        Raises
        ------
        UnreachableError
            If the peer is not connected, does not speak ``protocol``, or does not answer within ``timeout_s``.
        """
        ...

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve ``protocol``. The handler owns the stream, and may keep it when it returns.

        What it raises is logged, counted, and ends with that stream reset.
        """
        ...

    def handle_raw(self, magic: bytes, handler: RawHandler) -> None:
        """Serve TCP connections to the listening port whose first bytes are ``magic`` (not consumed).

        The handler owns the stream; what it raises is logged, counted, and ends with that stream closed.
        """
        ...

    async def publish(self, topic: str, data: bytes) -> None:
        """Publish ``data`` (signed by this peer) to those who subscribe to ``topic``; best effort."""
        ...

    def subscribe(
        self, topic: str, accepts: Accepts | None = None
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Published]]:
        """Receive what others publish on ``topic``. A slow reader loses messages, never memory.

        What ``accepts`` says no to is neither received nor passed on to others: anybody may publish. It must not raise.
        """
        ...

    def close_in_child(self) -> None:
        """In a forked child: close every descriptor this fabric holds, sending nothing. Never raises.

        Without it a child that lives on would keep a dead parent's connections open. The fabric cannot be
        used in the child.
        """
        ...
