"""Makes links of data connections: dials them where an answer says, takes those that peers dialed.

Either way the handshake (:mod:`.handshake`) has agreed on keys before, and the connection's first bytes prove them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import AuthenticationError, LinkClosedError, SparkleError, UnreachableError
from sparkle_mesh.fabric.interface import Fabric, PeerId
from sparkle_mesh.nurseries import bare_errors
from sparkle_mesh.tcp_info import read_tcp_info
from sparkle_mesh.transport.addresses import IpAddress, dial_order
from sparkle_mesh.transport.handshake import SHARED_MEMORY, WELCOME_BYTES, LinkAnswer, LinkKeys
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.local_sockets import connect_local
from sparkle_mesh.transport.records import RecordOpener, RecordSealer
from sparkle_mesh.transport.shared_memory import SharedMemory
from sparkle_mesh.transport.sockets import congestion_control, stream_count, tune_socket
from sparkle_mesh.transport.striped import StripedTcpLink
from sparkle_mesh.transport.tcp import TcpLink


class DataConnections:
    """The data connections of one process, and the links that they became.

    Attributes
    ----------
    links
        Those that stand.
    closed
        Whether no more are made.
    """

    def __init__(self, fabric: Fabric, host_id: bytes, memory: SharedMemory | None) -> None:
        self.links: set[Link] = set()
        self.closed = False
        self._fabric = fabric
        self._host_id = host_id
        self._memory = memory
        self._dialing: set[trio.socket.SocketType] = set()

    # --- Dialing ---------------------------------------------------------------------------------

    async def reach(self, peer_id: PeerId, answer: LinkAnswer, keys: LinkKeys, failed_kinds: set[str]) -> Link:
        """Make the first kind of link of ``answer``.

        Raises
        ------
        UnreachableError
            If that fails; ``failed_kinds`` has the kind then, if others are left to be tried.
        """
        kind = answer.kinds[0]
        if kind != SHARED_MEMORY:
            return await self._reach_tcp(peer_id, answer, keys)
        try:
            with trio.fail_after(limits.LINK_DIAL_TIMEOUT_S):
                return await self._reach_locally(peer_id, answer, keys)
        except (OSError, trio.BrokenResourceError, SparkleError, trio.TooSlowError) as error:
            if len(answer.kinds) > 1:
                failed_kinds.add(kind)
            raise UnreachableError(f"no memory can be shared with peer {peer_id}: {error}") from error

    async def _reach_locally(self, peer_id: PeerId, answer: LinkAnswer, keys: LinkKeys) -> Link:
        sock = await connect_local(answer.local_address)
        self._dialing.add(sock)
        try:
            stream = trio.SocketStream(sock)
            await stream.send_all(keys.opening(0))
            keys.check_welcome(0, await receive_exactly(stream, WELCOME_BYTES))
            self.check_open()
            return await self._share(stream, peer_id)
        finally:
            self._dialing.discard(sock)
            # Does nothing if a link took it over.
            sock.close()

    async def _reach_tcp(self, peer_id: PeerId, answer: LinkAnswer, keys: LinkKeys) -> Link:
        """Make a link to an address of ``answer`` behind which the holder of ``keys`` is.

        They are tried in order, the next one when the one before fails or takes long to be connected to.
        """
        order = dial_order(
            answer.addresses,
            same_host=answer.host_id == self._host_id,
            proven=self._fabric.remote_address(peer_id),
            mine=self._fabric.addresses,
        )
        no_answer = f"no answer within {limits.LINK_DIAL_TIMEOUT_S:g} s"
        reasons = dict.fromkeys(order, no_answer)
        links: list[Link] = []

        async def dial(address: tuple[IpAddress, int], connected: trio.Event, failed: trio.Event) -> None:
            try:
                links.append(await self._open_link(peer_id, *address, keys, connected, connect_by))
                nursery.cancel_scope.cancel()
            except (
                OSError,
                trio.BrokenResourceError,
                trio.TooSlowError,
                AuthenticationError,
                LinkClosedError,
            ) as error:
                late = f"no welcome within {limits.LINK_WELCOME_TIMEOUT_S:g} s" if connected.is_set() else no_answer
                reasons[address] = str(error) or late
                connected.set()
                failed.set()

        connect_by = trio.current_time() + limits.LINK_DIAL_TIMEOUT_S
        # All of them have at least half of the time.
        stagger_s = min(limits.DIAL_STAGGER_S, limits.LINK_DIAL_TIMEOUT_S / 2 / max(1, len(order)))
        async with trio.open_nursery() as nursery:
            for address in order:
                connected, failed = trio.Event(), trio.Event()
                nursery.start_soon(dial, address, connected, failed)
                with trio.move_on_after(stagger_s):
                    await connected.wait()
                if connected.is_set():
                    with trio.move_on_after(limits.DIAL_HANDSHAKE_PATIENCE_S):
                        await failed.wait()
        for link in links[1:]:
            # Of a peer that welcomes twice.
            await link.aclose()
        if links:
            return links[0]
        tried = "; ".join(f"{ip} port {port}: {reason}" for (ip, port), reason in reasons.items())
        raise UnreachableError(
            f"peer {peer_id} answered, but a direct connection failed: {tried or 'it gave no address'}"
        )

    async def _open_link(
        self,
        peer_id: PeerId,
        ip: IpAddress,
        port: int,
        keys: LinkKeys,
        connected: trio.Event,
        connect_by: float,
    ) -> Link:
        """Open as many streams to one address as its distance asks for, and make a link of them."""
        streams: dict[int, trio.SocketStream] = {}
        try:
            asked_at = trio.current_time()
            with trio.fail_at(connect_by):
                first = await self._connect(ip, port)
            connected.set()
            streams[0] = trio.SocketStream(first)
            round_trip_s = trio.current_time() - asked_at
            # The kernel's own measurement has no waiting for this process's turn in it.
            info = read_tcp_info(first)
            if info is not None and info.round_trip_s is not None:
                round_trip_s = info.round_trip_s
            tune_socket(first)
            count = stream_count(round_trip_s, congestion_control(first), len(keys.streams))

            async def open_stream(number: int) -> None:
                if number:
                    streams[number] = trio.SocketStream(await self._connect(ip, port))
                await streams[number].send_all(keys.opening(number, count))
                welcome = await receive_exactly(streams[number], WELCOME_BYTES)
                keys.check_welcome(number, welcome, count)

            with trio.fail_after(limits.LINK_WELCOME_TIMEOUT_S), bare_errors():
                # The others only where the first has shown that the right peer is there.
                await open_stream(0)
                async with trio.open_nursery() as nursery:
                    for number in range(1, count):
                        nursery.start_soon(open_stream, number)
            self.check_open()
            ordered = [streams[number] for number in range(count)]
            return self.keep(self._encrypted(ordered, peer_id, keys, dialer=True, latency_s=round_trip_s / 2))
        finally:
            for stream in streams.values():
                self._dialing.discard(stream.socket)
                # Does nothing if a link took it over.
                stream.socket.close()

    async def _connect(self, ip: IpAddress, port: int) -> trio.socket.SocketType:
        sock = trio.socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
        self._dialing.add(sock)
        try:
            await sock.connect((str(ip), port))
        except BaseException:
            self._dialing.discard(sock)
            sock.close()
            raise
        return sock

    # --- Being dialed ----------------------------------------------------------------------------

    async def accepted(self, streams: Sequence[trio.SocketStream], kind: str, peer_id: PeerId, keys: LinkKeys) -> Link:
        """Make a link of ``streams``, which a peer has dialed and opened. Raises SparkleError, OSError."""
        if kind == SHARED_MEMORY:
            return await self._share(streams[0], peer_id)
        return self.keep(self._encrypted(streams, peer_id, keys, dialer=False, latency_s=None))

    # --- Making links ----------------------------------------------------------------------------

    async def _share(self, stream: trio.SocketStream, peer_id: PeerId) -> Link:
        assert self._memory is not None
        return self.keep(await self._memory.share(stream, peer_id, self.links.discard))

    def _encrypted(
        self,
        streams: Sequence[trio.SocketStream],
        peer_id: PeerId,
        keys: LinkKeys,
        *,
        dialer: bool,
        latency_s: float | None,
    ) -> Link:
        ends = []
        for number, (stream, of_stream) in enumerate(zip(streams, keys.streams, strict=False)):
            there, back = of_stream.dialer_to_answerer, of_stream.answerer_to_dialer
            mine, theirs = (there, back) if dialer else (back, there)
            placed = number > 0
            sealer = RecordSealer(keys.cipher, mine, placed=placed)
            ends.append((stream, sealer, RecordOpener(keys.cipher, theirs, placed=placed)))
        released = self.links.discard
        if len(ends) > 1:
            return StripedTcpLink(ends, peer_id, latency_s=latency_s, on_released=released)
        return TcpLink(ends[0][0], peer_id, ends[0][1], ends[0][2], latency_s=latency_s, on_released=released)

    def keep(self, link: Link) -> Link:
        """Count ``link`` among those that stand, until it is released."""
        self.links.add(link)
        return link

    # --- Closing ---------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise LinkClosedError if no more links are made."""
        if self.closed:
            raise LinkClosedError("the connector is closed")

    async def aclose(self) -> None:
        """Close every link, and make no more. Idempotent."""
        self.closed = True
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for link in list(self.links):
                    nursery.start_soon(link.aclose)
        if self._memory is not None:
            self._memory.close()

    def close_in_child(self) -> None:
        """In a forked child: close inherited descriptors, sending nothing. Never raises."""
        self.closed = True
        for link in list(self.links):
            link.close_in_child()
        if self._memory is not None:
            self._memory.close_in_child()
        for sock in list(self._dialing):
            descriptor = sock.detach()
            if descriptor >= 0:
                with suppress(OSError):
                    os.close(descriptor)


async def receive_exactly(stream: trio.SocketStream, count: int) -> bytearray:
    """Receive ``count`` bytes. Raises LinkClosedError if the stream ends before."""
    received = bytearray()
    while len(received) < count:
        piece = await stream.receive_some(count - len(received))
        if not piece:
            raise LinkClosedError("the connection was closed during the handshake")
        received += piece
    return received
