"""py-libp2p with its sharp edges covered.

Each class here states what py-libp2p 0.8.1 does by itself and what it does instead. All of it was seen to
fail in tests without the guard; a new minor version of py-libp2p needs these read again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import trio
from libp2p.abc import INetConn, INetStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.identity.identify_push.identify_push import ID_PUSH
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.network import swarm
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection import swarm_connection
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream
from libp2p.transport.upgrader import TransportUpgrader

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError, SparkleError, UnreachableError
from sparkle_mesh.fabric.hubs import FabricCounters, run_guarded

logger = logging.getLogger("sparkle_mesh.fabric")


def quiet_libp2p_logging() -> None:
    """Keep py-libp2p's log off standard error unless its user asked for it by ``LIBP2P_DEBUG``.

    It logs as errors what any passing stranger can cause, and leaves them to Python's handler of last resort.
    Its connections also log through the root logger's functions, which install a handler on standard error that
    the program never asked for.
    """
    library = logging.getLogger("libp2p")
    if not library.handlers:
        library.addHandler(logging.NullHandler())
    vars(swarm_connection)["logging"] = logging.getLogger("libp2p.network.connection")


@contextmanager
def translated(what: str, error_type: type[SparkleError] = LinkClosedError) -> Iterator[None]:
    """Raise ``error_type`` for whatever py-libp2p raises: its exceptions have no common base."""
    try:
        yield
    except SparkleError:
        raise
    except Exception as error:
        raise error_type(f"{what}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Return what ``error`` says, with what its causes add."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 4:
        text = str(cause) or type(cause).__name__
        if not any(text in known for known in texts):
            texts.append(text)
        cause = cause.__cause__
    return ": ".join(texts)[: limits.REASON_MAX_CHARS]


class GuardedTasks:
    """Stands in for a py-libp2p service's manager; a task that fails is logged and counted, and ends alone.

    With the original, any exception in any task of a service ends the service and the program's nursery.
    """

    def __init__(self, nursery: trio.Nursery, counters: FabricCounters) -> None:
        self._nursery = nursery
        self._counters = counters
        self._finished = trio.Event()

    @property
    def is_running(self) -> bool:
        return not self._finished.is_set()

    def run_task(self, task: Callable[..., Awaitable[Any]], *args: Any, **_options: Any) -> None:
        """Start ``task``; the options (its name, whether it is a daemon) mean nothing here."""
        if self.is_running:
            what = f"py-libp2p's {getattr(task, '__qualname__', task)}"
            self._nursery.start_soon(run_guarded, what, partial(task, *args), trio.lowlevel.checkpoint, self._counters)

    run_daemon_task = run_task

    async def wait_finished(self) -> None:
        await self._finished.wait()

    async def stop(self) -> None:
        self._finished.set()


class _BoundedBuffers(dict[int, bytearray]):
    """A connection's unread bytes by stream; refuses what exceeds the bound over all of them."""

    class Buffer(bytearray):
        owner: _BoundedBuffers

        def extend(self, data: Any) -> None:
            if sum(map(len, self.owner.values())) + len(data) > limits.UNREAD_BYTES_PER_CONNECTION_MAX:
                # The one exception that makes Yamux close the connection instead of going on.
                raise trio.TooSlowError(f"over {limits.UNREAD_BYTES_PER_CONNECTION_MAX} bytes are unread")
            super().extend(data)

    def __setitem__(self, stream_id: int, data: bytearray) -> None:
        buffer = _BoundedBuffers.Buffer(data)
        buffer.owner = self
        super().__setitem__(stream_id, buffer)


class GuardedStream(YamuxStream):
    """A stream whose receive window stays as it is and is refilled by the half, whose waits are for events.

    The original doubles a window at every read that follows another closely, however small: the negotiation of
    a protocol alone takes it to megabytes for a stream that nobody reads. It answers most reads, of one byte too,
    with a frame of its own, and loses what was read if it is cancelled meanwhile. Its writers look every 10 ms
    whether the window has room.
    """

    #: Where tasks wait for room in the peer's window, or for the stream's end.
    changed: trio.lowlevel.ParkingLot

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in ("send_window", "recv_closed", "closed"):
            self.changed.unpark_all()

    async def read(self, n: int | None = -1) -> bytes:
        # The credit for what was read before: to be cancelled here loses nothing.
        await self._return_credit()
        return await super().read(n)

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        self._pending_recv_release += bytes_read

    async def _return_credit(self) -> None:
        increment = self._pending_recv_release
        if increment < self.target_recv_window // 2 or self.recv_closed:
            return
        # If the connection is gone, what has arrived can still be read.
        with suppress(RawConnError, IOException):
            await self.send_window_update(increment)
        self._pending_recv_release -= increment
        self.recv_window += increment

    async def widen(self, window_bytes: int) -> None:
        """Let the peer send up to ``window_bytes`` ahead of what is read here."""
        increment = window_bytes - self.target_recv_window
        if increment > 0:
            self.recv_window += increment
            await self.send_window_update(increment)
            self.target_recv_window = window_bytes


class _GuardedStreams(dict[int, YamuxStream]):
    """A connection's streams, which become guarded ones: the original makes its own whatever the class."""

    def __setitem__(self, stream_id: int, stream: YamuxStream) -> None:
        vars(stream)["changed"] = trio.lowlevel.ParkingLot()
        stream.__class__ = GuardedStream
        super().__setitem__(stream_id, stream)


class GuardedUpgrader(TransportUpgrader):
    """Speaks Noise and yamux alone. The original makes its own Yamux whatever class it is given."""

    def __init__(self, noise: Noise) -> None:
        super().__init__(
            {NOISE_PROTOCOL: noise}, {TProtocol(YAMUX_PROTOCOL): GuardedYamux}, int(limits.UPGRADE_TIMEOUT_S)
        )

    async def upgrade_connection(self, conn: ISecureConn, peer_id: ID) -> GuardedYamux:
        await self.muxer_multistream.select_transport(conn)
        return GuardedYamux(conn, peer_id)


class GuardedYamux(Yamux):
    """Yamux that bounds what a peer may leave unread, and survives cancelled callers.

    The original only logs when a peer ignores its window. A caller that is cancelled while it writes leaves
    half a frame on the wire, which breaks every stream of the connection; one cancelled while it opens a
    stream leaks one of 256 places. Bytes that arrived before the connection ended are dropped unread.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.streams = _GuardedStreams()
        self.stream_buffers = _BoundedBuffers()

    async def _write_frame(self, data: bytes) -> None:
        async with self._write_lock:
            with trio.move_on_after(limits.FRAME_WRITE_TIMEOUT_S) as scope:
                scope.shield = True
                await self.secured_conn.write(data)
            if scope.cancelled_caught:
                # Half a frame may be on the wire.
                await self.secured_conn.close()
                raise ConnectionClosedError(f"peer took nothing for {limits.FRAME_WRITE_TIMEOUT_S:g} s")

    async def wait_for_place(self) -> None:
        """Wait until a stream can be opened at once: a free place of the 256, and nobody in the middle of a write."""
        async with self._write_lock:
            pass
        while self.stream_backlog_semaphore.value == 0:
            await self.stream_backlog_semaphore.acquire()
            self.stream_backlog_semaphore.release()

    async def _cleanup_on_error(self) -> None:
        for stream_id, stream in self.streams.items():
            unread = bytes(self.stream_buffers.get(stream_id, b""))
            vars(stream).update(unread_at_end=unread, ended_by_peer=stream.recv_closed)
        await super()._cleanup_on_error()


class _NoAutoConnector:
    """In place of py-libp2p's, which dials all it knows and remembers everybody who left; discovery decides here."""

    def record_disconnect(self, peer_id: ID) -> None:
        """Keep no record."""

    async def maybe_connect(self) -> None:
        """Dial nobody."""


class GuardedSwarm(Swarm):
    """A swarm that dials nobody by itself and reports connections as they come and go.

    Its ``run`` is never called: that would start the pruner and the auto-connector, and end with errors of either.
    """

    def __init__(
        self,
        peer_id: ID,
        peerstore: PeerStore,
        upgrader: GuardedUpgrader,
        tasks: GuardedTasks,
        on_connected: Callable[[INetConn], Awaitable[None]],
        on_disconnected: Callable[[INetConn], None],
    ) -> None:
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        with _without_resolver():
            super().__init__(peer_id, peerstore, upgrader, [], connection_config=_connection_config())
        # Assigned as attributes of another type than declared: both have what is called of the originals.
        vars(self).update(auto_connector=_NoAutoConnector(), _manager=tasks)

    async def notify_connected(self, conn: INetConn) -> None:
        await self._on_connected(conn)

    async def announce(self, conn: INetConn) -> None:
        """Tell py-libp2p's own protocols of a connection that :meth:`notify_connected` has told the fabric of."""
        await super().notify_connected(conn)

    def remove_conn(self, swarm_conn: SwarmConn) -> None:
        super().remove_conn(swarm_conn)
        peer_id = swarm_conn.muxed_conn.peer_id
        if not self.connections.get(peer_id) and peer_id in self.peerstore.peer_ids():
            # Else everybody who ever came is remembered; there is a bound, but it gives up this peer's own entry first.
            self.peerstore.clear_peerdata(peer_id)
        self._on_disconnected(swarm_conn)


@contextmanager
def _without_resolver() -> Iterator[None]:
    """Keep a swarm that is made meanwhile from making a DNS resolver: loading one takes long, and none is needed."""
    names = vars(swarm)
    original, names["DNSResolver"] = names["DNSResolver"], lambda: None
    try:
        yield
    finally:
        names["DNSResolver"] = original


def _connection_config() -> ConnectionConfig:
    count = limits.CONNECTIONS_MAX_COUNT
    return ConnectionConfig(
        max_connections=count,
        high_watermark=count,
        low_watermark=0,
        min_connections=0,
        max_connections_per_peer=limits.CONNECTIONS_PER_PEER_MAX_COUNT,
        grace_period=0.0,
        inbound_upgrade_timeout=limits.UPGRADE_TIMEOUT_S,
        outbound_upgrade_timeout=limits.UPGRADE_TIMEOUT_S,
        outbound_stream_protocol_negotiation_timeout=limits.OPEN_STREAM_TIMEOUT_S,
        inbound_stream_protocol_negotiation_timeout=limits.OPEN_STREAM_TIMEOUT_S,
    )


class GuardedHost(BasicHost):
    """A host whose stream handlers, py-libp2p's own included, cannot end the program.

    The original lets an exception of any handler (garbage on a gossip stream raises one) end the swarm, asks
    every new peer for its identity and addresses by system tasks that can crash trio, and keeps streams open
    whose negotiation was cancelled.
    """

    def __init__(self, network: GuardedSwarm, counters: FabricCounters, **options: Any) -> None:
        self._counters = counters
        super().__init__(network, disable_identify_address_discovery=True, **options)
        # What a peer says there of itself would be kept, and nobody reads it.
        self.remove_stream_handler(ID_PUSH)

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        """Discovery tells addresses, and streams are opened for one protocol: there is nothing to ask."""

    async def _swarm_stream_handler(self, net_stream: INetStream) -> None:
        what = f"a stream of {net_stream.muxed_conn.peer_id}"
        handler = partial(self._handle_stream, net_stream)
        await run_guarded(what, handler, net_stream.reset, self._counters)

    async def _handle_stream(self, net_stream: INetStream) -> None:
        streams: dict[int, YamuxStream] = getattr(net_stream.muxed_conn, "streams", {})
        count = sum(not stream.is_initiator for stream in streams.values())
        if count > limits.INBOUND_STREAMS_PER_CONNECTION_MAX_COUNT:
            raise ProtocolError(f"{count} streams are open on one connection")
        await super()._swarm_stream_handler(net_stream)

    async def new_stream(self, peer_id: ID, protocol_ids: Sequence[TProtocol]) -> INetStream:
        """Open a stream on a standing connection, if there is one that needs no relay; the caller sets the deadline."""
        connections = [conn for conn in self._network.get_connections(peer_id) if not conn.is_closed]
        if not connections:
            # It has just ended, and the news of that are on their way.
            raise UnreachableError(f"peer {peer_id.to_base58()} is not connected any more; connect to it again")
        connections.sort(key=lambda conn: conn.get_connection_type() is ConnectionType.RELAYED)
        return await self.new_stream_over(connections[0], protocol_ids)

    async def new_stream_over(self, connection: INetConn, protocol_ids: Sequence[TProtocol]) -> INetStream:
        """Open a stream on this ``connection``; the caller sets the deadline."""
        if connection.is_closed:
            peer = connection.muxed_conn.peer_id.to_base58()
            raise UnreachableError(f"peer {peer} is not connected any more; connect to it again")
        muxed_conn = connection.muxed_conn
        if isinstance(muxed_conn, GuardedYamux):
            await muxed_conn.wait_for_place()
        # A caller that is cancelled between the stream's opening and its registration would leak its place.
        with trio.CancelScope(shield=True):
            net_stream = await connection.new_stream()
        selected = None
        try:
            selected = await self.multiselect_client.select_one_of(
                list(protocol_ids), MultiselectCommunicator(net_stream), int(limits.OPEN_STREAM_TIMEOUT_S)
            )
        finally:
            if selected is None:
                with trio.move_on_after(limits.CLOSE_TIMEOUT_S) as scope:
                    scope.shield = True
                    await net_stream.reset()
        net_stream.set_protocol(selected)
        return net_stream
