"""A control plane within one process: for tests, and exact under a virtual clock.

Whatever passes from one fabric to another (stream bytes, opened and closed streams and connections,
publications) is a *delivery* on the ordered, delayed path between the two. A partition stops the paths
between two sets of peers as a dropped network cable does: nothing is lost, nothing arrives until it heals.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TypeAlias

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import ClosedError, LinkClosedError, UnreachableError, UsageError
from sparkle_mesh.fabric.hubs import EventHub, FabricCounters, TopicHub, run_guarded
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import (
    Accepts,
    Address,
    FabricEvent,
    PeerConnected,
    PeerDisconnected,
    PeerId,
    Published,
    RawHandler,
    StreamHandler,
)
from sparkle_mesh.nurseries import bare_errors

Delivery: TypeAlias = Callable[[], None]


class MemoryFabricNetwork:
    """Joins memory fabrics.

    Parameters
    ----------
    delay_s
        One-way delay of everything that passes between two fabrics.
    """

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self._fabrics: dict[PeerId, MemoryFabric] = {}
        self._opened_count = 0
        self._cuts: list[tuple[frozenset[PeerId], frozenset[PeerId]]] = []
        self._healed = trio.Event()
        self._paths: dict[tuple[PeerId, PeerId], deque[tuple[float, Delivery]]] = {}

    @asynccontextmanager
    async def open(
        self, identity: Identity | PeerId | None = None, *, addresses: Sequence[Address] | None = None
    ) -> AsyncIterator[MemoryFabric]:
        """Run a fabric until the block ends. Without an identity it gets a new one; addresses are made up."""
        if identity is None:
            identity = Identity.generate()
        peer_id = identity if isinstance(identity, str) else identity.peer_id
        if peer_id in self._fabrics:
            raise UsageError(f"{peer_id} is open on this network already")
        self._opened_count += 1
        if addresses is None:
            high, low = divmod(self._opened_count, 256)
            addresses = (f"/ip4/10.0.{high}.{low}/tcp/{limits.DEFAULT_PORT}",)
        with bare_errors():
            async with trio.open_nursery() as nursery:
                fabric = MemoryFabric(self, peer_id, tuple(addresses))
                nursery.start_soon(fabric._run)
                await fabric._started.wait()
                self._fabrics[peer_id] = fabric
                try:
                    yield fabric
                finally:
                    fabric._shut_down()

    def partition(self, some: Iterable[PeerId], others: Iterable[PeerId]) -> None:
        """Stop everything between ``some`` and ``others``, both ways, until :meth:`heal`."""
        self._cuts.append((frozenset(some), frozenset(others)))

    def heal(self) -> None:
        """End every partition; what waited is delivered in order."""
        self._cuts.clear()
        self._healed.set()
        self._healed = trio.Event()

    def kill(self, peer_id: PeerId) -> None:
        """End ``peer_id`` as its process' death would: connections close, its handlers stop, it dials no more."""
        self._fabrics[peer_id]._shut_down()

    def _listening_at(self, address: Address) -> MemoryFabric | None:
        return next((fabric for fabric in self._fabrics.values() if address in fabric.addresses), None)

    def _is_cut(self, one: PeerId, other: PeerId) -> bool:
        return any((one in a and other in b) or (one in b and other in a) for a, b in self._cuts)

    async def _passable(self, one: PeerId, other: PeerId) -> None:
        while self._is_cut(one, other):
            await self._healed.wait()

    def _deliver(self, source: PeerId, target: PeerId, delivery: Delivery) -> None:
        """Have ``delivery`` called at ``target``, in the order and after the delay of the path."""
        fabric = self._fabrics.get(target)
        if fabric is None or fabric._ended:
            return
        key = (source, target)
        path = self._paths.get(key)
        if path is not None:
            path.append((trio.current_time() + self.delay_s, delivery))
        elif self.delay_s == 0 and not self._is_cut(source, target):
            delivery()
        else:
            path = self._paths[key] = deque([(trio.current_time() + self.delay_s, delivery)])
            fabric._nursery.start_soon(self._carry, key, path)

    async def _carry(self, key: tuple[PeerId, PeerId], path: deque[tuple[float, Delivery]]) -> None:
        while path:
            await trio.sleep_until(path[0][0])
            await self._passable(*key)
            path.popleft()[1]()
        if self._paths.get(key) is path:
            del self._paths[key]

    def _forget(self, peer_id: PeerId) -> None:
        """Remove a fabric; what was on its way to it has nowhere to go."""
        del self._fabrics[peer_id]
        for key in [key for key in self._paths if key[1] == peer_id]:
            del self._paths[key]


class _Connection:
    """One fabric's end of a connection."""

    def __init__(self, fabric: MemoryFabric, peer_id: PeerId, address: Address, *, outbound: bool) -> None:
        self.fabric = fabric
        self.peer_id = peer_id
        self.address = address
        self.outbound = outbound
        self.other: _Connection
        self.streams: set[MemoryStream] = set()

    def close(self) -> None:
        """Close here at once, and at the other end when the news arrives there."""
        if self._end(f"the connection to {self.peer_id} was closed"):
            self.fabric._network._deliver(
                self.fabric.peer_id, self.peer_id, lambda: self._close_other(self.fabric.peer_id)
            )

    def _close_other(self, closer: PeerId) -> None:
        self.other._end(f"{closer} closed the connection")

    def _end(self, reason: str) -> bool:
        connections = self.fabric._connections.get(self.peer_id, [])
        if self not in connections:
            return False
        connections.remove(self)
        for stream in list(self.streams):
            stream._break(reason)
        if not connections:
            del self.fabric._connections[self.peer_id]
            self.fabric._events.emit(PeerDisconnected(self.peer_id))
        return True


class MemoryStream:
    """One end of a stream between two memory fabrics; satisfies ``FabricStream``."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._other: MemoryStream
        self._received: deque[bytes] = deque()
        # Bytes the peer has sent and nobody here has read: what the peer's writes wait for.
        self._unread_bytes = 0
        self._ended = False
        self._closed = False
        self._broken: str | None = None
        self._changed = trio.Event()
        self._writing = trio.Lock()
        connection.streams.add(self)

    @property
    def peer_id(self) -> PeerId:
        return self._connection.peer_id

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _break(self, reason: str) -> None:
        self._connection.streams.discard(self)
        if self._broken is None:
            self._broken = reason
            self._notify()

    def _tell_other(self, delivery: Delivery) -> None:
        connection = self._connection
        connection.fabric._network._deliver(connection.fabric.peer_id, connection.peer_id, delivery)

    def _arrive(self, data: bytes) -> None:
        self._received.append(data)
        self._notify()

    def _arrive_end(self) -> None:
        self._ended = True
        self._connection.streams.discard(self)
        self._notify()

    async def read(self, max_bytes: int) -> bytes:
        """As ``FabricStream.read``."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise LinkClosedError(f"the stream to {self.peer_id} was closed here")
            if self._received:
                return self._take(max_bytes)
            if self._broken is not None:
                raise LinkClosedError(self._broken)
            if self._ended:
                return b""
            await self._changed.wait()

    def _take(self, max_bytes: int) -> bytes:
        data = self._received.popleft()
        if len(data) > max_bytes:
            self._received.appendleft(data[max_bytes:])
            data = data[:max_bytes]
        self._unread_bytes -= len(data)
        self._other._notify()
        return data

    async def write(self, data: bytes | memoryview) -> None:
        """As ``FabricStream.write``; waits while the peer has a full buffer unread."""
        async with self._writing:
            await self._write(memoryview(data))

    async def _write(self, rest: memoryview) -> None:
        while rest:
            if self._closed:
                raise LinkClosedError(f"the stream to {self.peer_id} was closed here")
            if self._broken is not None:
                raise LinkClosedError(self._broken)
            if self._ended:
                raise LinkClosedError(f"peer {self.peer_id} closed the stream")
            room = limits.MEMORY_STREAM_BUFFER_MAX_BYTES - self._other._unread_bytes
            if room <= 0:
                await self._changed.wait()
                continue
            piece, rest = bytes(rest[:room]), rest[room:]
            self._other._unread_bytes += len(piece)
            self._tell_other(partial(self._other._arrive, piece))

    async def aclose(self) -> None:
        """As ``FabricStream.aclose``."""
        if not self._closed:
            self._closed = True
            self._connection.streams.discard(self)
            self._notify()
            self._tell_other(self._other._arrive_end)
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """As ``FabricStream.reset``."""
        self.abort()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """As ``FabricStream.abort``."""
        self._received.clear()
        self._break("the stream was reset here")
        self._tell_other(partial(self._other._break, f"peer {self._connection.fabric.peer_id} reset the stream"))

    async def widen(self, window_bytes: int) -> None:
        """As ``FabricStream.widen``; a buffer here is the same for all."""
        await trio.lowlevel.checkpoint()


class MemoryFabric:
    """A ``Fabric`` whose peers are in the same process. Made by :meth:`MemoryFabricNetwork.open`."""

    def __init__(self, network: MemoryFabricNetwork, peer_id: PeerId, addresses: tuple[Address, ...]) -> None:
        self._network = network
        self._peer_id = peer_id
        self._addresses = addresses
        self._nursery: trio.Nursery
        self._started = trio.Event()
        self.counters = FabricCounters()
        self._events = EventHub(self.counters)
        self._topics = TopicHub(self.counters)
        self._connections: dict[PeerId, list[_Connection]] = {}
        self._handlers: dict[str, StreamHandler] = {}
        self._seen: OrderedDict[tuple[PeerId, int], None] = OrderedDict()
        self._published_count = 0
        self._dead = self._ended = False

    async def _run(self) -> None:
        # Handlers run in a nursery of their own, so that a kill ends them and not the caller's block.
        async with trio.open_nursery() as self._nursery:
            self._started.set()
            try:
                await trio.sleep_forever()
            finally:
                self._ended = True

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def addresses(self) -> tuple[Address, ...]:
        return self._addresses

    def connected_peers(self) -> frozenset[PeerId]:
        return frozenset(self._connections)

    def remote_address(self, peer_id: PeerId) -> Address | None:
        connections = self._connections.get(peer_id)
        return connections[0].address if connections else None

    def events(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[FabricEvent]]:
        return self._events.subscribe(
            lambda: [PeerConnected(peer, ends[0].address, ends[0].outbound) for peer, ends in self._connections.items()]
        )

    async def connect(
        self, peer_id: PeerId, addresses: Sequence[Address], *, timeout_s: float = limits.DIAL_TIMEOUT_S
    ) -> None:
        """As ``Fabric.connect``; a dial takes one round trip."""
        await trio.lowlevel.checkpoint()
        self._require_alive()
        if peer_id == self._peer_id:
            raise UsageError(f"{peer_id} is this peer itself")
        if peer_id in self._connections:
            return
        reasons = []
        with trio.move_on_after(timeout_s) as scope:
            for address in addresses:
                reason = await self._dial(peer_id, address)
                if reason is None:
                    return
                reasons.append(f"{address}: {reason}")
        if scope.cancelled_caught:
            reasons.append(f"no answer within {timeout_s:g} s")
        raise UnreachableError(f"peer {peer_id} could not be reached: {'; '.join(reasons) or 'no address is known'}")

    async def _dial(self, peer_id: PeerId, address: Address) -> str | None:
        """Connect to ``address``; return why that failed, None if a connection stands."""
        target = self._network._listening_at(address)
        if target is not None:
            await self._network._passable(self._peer_id, target.peer_id)
        await trio.sleep(2 * self._network.delay_s)
        if target is None or target._dead:
            return "connection refused"
        if target.peer_id != peer_id:
            return f"peer {target.peer_id} answered"
        if peer_id not in self._connections:
            self._require_alive()
            mine = _Connection(self, peer_id, address, outbound=True)
            theirs = _Connection(target, self._peer_id, next(iter(self._addresses), "/memory"), outbound=False)
            mine.other, theirs.other = theirs, mine
            self._add_connection(mine)
            target._add_connection(theirs)
        return None

    def _add_connection(self, connection: _Connection) -> None:
        ends = self._connections.setdefault(connection.peer_id, [])
        ends.append(connection)
        if len(ends) == 1:
            self._events.emit(PeerConnected(connection.peer_id, connection.address, connection.outbound))

    async def disconnect(self, peer_id: PeerId) -> None:
        """As ``Fabric.disconnect``."""
        for connection in list(self._connections.get(peer_id, ())):
            connection.close()
        await trio.lowlevel.checkpoint()

    async def open_stream(
        self, peer_id: PeerId, protocol: str, *, timeout_s: float = limits.OPEN_STREAM_TIMEOUT_S
    ) -> MemoryStream:
        """As ``Fabric.open_stream``; takes one round trip."""
        await trio.lowlevel.checkpoint()
        self._require_alive()
        connections = self._connections.get(peer_id)
        if not connections:
            raise UnreachableError(f"peer {peer_id} is not connected; connect to it first")
        connection = connections[0]
        with trio.move_on_after(timeout_s):
            await self._network._passable(self._peer_id, peer_id)
            await trio.sleep(2 * self._network.delay_s)
            handler = connection.other.fabric._handlers.get(protocol)
            if connection not in self._connections.get(peer_id, ()) or connection.other.fabric._dead:
                # It may have died without the news having arrived here.
                raise UnreachableError(f"peer {peer_id} went away while a stream was opened")
            if handler is None:
                raise UnreachableError(f"peer {peer_id} does not speak {protocol}")
            mine, theirs = MemoryStream(connection), MemoryStream(connection.other)
            mine._other, theirs._other = theirs, mine
            connection.other.fabric._serve(protocol, handler, theirs)
            return mine
        raise UnreachableError(
            f"peer {peer_id} did not answer within {timeout_s:g} s when a {protocol} stream was opened"
        )

    def _serve(self, protocol: str, handler: StreamHandler, stream: MemoryStream) -> None:
        what = f"the {protocol} handler for {stream.peer_id}"
        self._nursery.start_soon(run_guarded, what, partial(handler, stream), stream.reset, self.counters)

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """As ``Fabric.handle``."""
        self._handlers[protocol] = handler

    def handle_raw(self, magic: bytes, handler: RawHandler) -> None:
        """As ``Fabric.handle_raw``; there is no port, so that the handler is never called."""

    async def publish(self, topic: str, data: bytes) -> None:
        """As ``Fabric.publish``; subscribers pass it on to their own peers."""
        await trio.lowlevel.checkpoint()
        self._require_alive()
        if len(data) > limits.GOSSIP_MESSAGE_MAX_BYTES:
            raise UsageError(f"a publication takes {len(data)} bytes; at most {limits.GOSSIP_MESSAGE_MAX_BYTES} may be")
        self._published_count += 1
        self._spread(topic, (self._peer_id, self._published_count), bytes(data))

    def _spread(self, topic: str, message_id: tuple[PeerId, int], data: bytes) -> None:
        self._seen[message_id] = None
        if len(self._seen) > limits.GOSSIP_SEEN_MAX_COUNT:
            self._seen.popitem(last=False)
        for ends in list(self._connections.values()):
            other = ends[0].other.fabric
            self._network._deliver(
                self._peer_id, other.peer_id, partial(other._receive_published, topic, message_id, data)
            )

    def _receive_published(self, topic: str, message_id: tuple[PeerId, int], data: bytes) -> None:
        known = message_id in self._seen or message_id[0] == self._peer_id
        if not known and self._topics.takes(topic, message_id[0], data):
            self._topics.deliver(topic, Published(message_id[0], data))
            self._spread(topic, message_id, data)

    def subscribe(
        self, topic: str, accepts: Accepts | None = None
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Published]]:
        """As ``Fabric.subscribe``."""
        return self._topics.subscribe(topic, accepts)

    def close_in_child(self) -> None:
        """As ``Fabric.close_in_child``; there are no descriptors."""

    def _require_alive(self) -> None:
        if self._dead:
            raise ClosedError(f"the fabric of {self._peer_id} is closed")

    def _shut_down(self) -> None:
        if self._dead:
            return
        self._dead = True
        for ends in list(self._connections.values()):
            for connection in list(ends):
                connection.close()
        self._network._forget(self._peer_id)
        self._events.close()
        self._topics.close()
        self._nursery.cancel_scope.cancel()
