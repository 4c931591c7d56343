"""Opens links to peers: the handshake over the control plane, then shared memory, direct TCP, or the same stream.

Both sides call :meth:`LinkConnector.connect`. The one with the smaller peer id *dials*: it offers a link over the
control plane, and connects to an address of the answer. The other *waits*: an offer is answered only while this
process wants a link to that peer, so that nobody is given a link that nobody uses. Each handshake tries one kind of
link, the best that both can do; where it fails, the next handshake offers one kind less. Where nothing but the control
plane is left, the handshake's own stream becomes the link, which moves to a direct connection once there is one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_ENTROPY, Entropy
from sparkle_mesh.errors import (
    ClosedError,
    LinkClosedError,
    LinkRefusedError,
    ProtocolError,
    UnreachableError,
    UsageError,
    VersionError,
)
from sparkle_mesh.fabric.framing import send_message
from sparkle_mesh.fabric.interface import Fabric, FabricStream, PeerId
from sparkle_mesh.transport.addresses import host_id
from sparkle_mesh.transport.attempts import Attempt, WaitingOffer
from sparkle_mesh.transport.ciphers import preferred_ciphers
from sparkle_mesh.transport.data_connections import DataConnections, receive_exactly
from sparkle_mesh.transport.handshake import (
    LIBP2P_STREAM,
    LINK_KINDS,
    MAGIC,
    OPENING_BYTES,
    SHARED_MEMORY,
    TCP,
    LinkAnswer,
    LinkOffer,
    LinkParty,
    LinkRefusal,
    LinkUpgrade,
    PendingLinks,
    decode_last_word,
    decode_offer,
    decode_reply,
)
from sparkle_mesh.transport.handshake_streams import LINK_PROTOCOL, end_stream, receive_raw, refuse, until_ended
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.shared_memory import SharedMemory
from sparkle_mesh.transport.stream_links import StreamLinks

logger = logging.getLogger("sparkle_mesh.transport")


@dataclass(slots=True)
class _Expected:
    """A link that was agreed on and whose data streams are to be opened by ``peer_id``.

    ``streams`` are those that came; a link takes them away. ``opened`` is set when it has, or never will.
    """

    peer_id: PeerId
    attempt: Attempt
    opened: trio.Event
    streams: dict[int, trio.SocketStream] = field(default_factory=dict)


class LinkConnector:
    """Makes links between this process and others; an async context manager.

    Parameters
    ----------
    fabric
        The control plane; its listening port also takes the data connections.
    mesh_id
        32 bytes; only peers that have the same get links.
    authorize
        Whether a peer may have a link now. Asked before anything is sent to or kept for a peer.
    kinds
        Of links that may be made, of :data:`~.handshake.LINK_KINDS`; all that this machine can do if None.
    entropy
        Source of secrets and ids.
    """

    def __init__(
        self,
        fabric: Fabric,
        *,
        mesh_id: bytes,
        authorize: Callable[[PeerId], bool],
        kinds: Sequence[str] | None = None,
        entropy: Entropy = SYSTEM_ENTROPY,
    ) -> None:
        if len(mesh_id) != 32:
            raise UsageError(f"mesh_id has {len(mesh_id)} bytes; it must have 32")
        if kinds is not None:
            check_kinds(kinds)
        self._fabric = fabric
        self._authorize = authorize
        self._entropy = entropy
        allowed = LINK_KINDS if kinds is None else kinds
        self._memory = SharedMemory.open(entropy) if SHARED_MEMORY in allowed else None
        self._party = LinkParty(
            fabric.peer_id,
            mesh_id,
            host_id(mesh_id, entropy),
            preferred_ciphers(),
            tuple(kind for kind in LINK_KINDS if kind in allowed and (kind != SHARED_MEMORY or self._memory)),
            self._memory.address if self._memory else "",
            limits.LINK_STREAMS_MAX_COUNT,
        )
        self._attempts: dict[PeerId, Attempt] = {}
        self._offers: dict[PeerId, WaitingOffer] = {}
        self._pending = PendingLinks()
        self._expected: dict[bytes, _Expected] = {}
        self._data = DataConnections(fabric, self._party.host_id, self._memory)
        self._streams = StreamLinks(fabric, self._party, self._data, entropy)
        self._nursery_manager = trio.open_nursery()
        self._nursery: trio.Nursery

    async def __aenter__(self) -> Self:
        self._nursery = await self._nursery_manager.__aenter__()
        self._fabric.handle(LINK_PROTOCOL, self._serve_offer)
        self._fabric.handle_raw(MAGIC, self._serve_data_stream)
        if self._memory is not None:
            await self._nursery.start(self._memory.serve, self._serve_local_stream)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
        # Without the block's own error, which a nursery would wrap in a group.
        await self._nursery_manager.__aexit__(None, None, None)

    @property
    def links(self) -> frozenset[Link]:
        """The links that stand."""
        return frozenset(map(self._streams.whole, self._data.links))

    @property
    def memory(self) -> SharedMemory | None:
        """This process's memory that peers on this host can read; None where there is none."""
        return self._memory

    async def connect(self, peer_id: PeerId, *, timeout_s: float = limits.LINK_HANDSHAKE_TIMEOUT_S) -> Link:
        """Return a new link to ``peer_id``, which must call this too; concurrent calls get the same link.

        Raises
        ------
        LinkRefusedError
            If the peer refused, or is not authorized here.
        VersionError
            If the peer speaks another version of the protocol.
        UnreachableError
            If there is no link within ``timeout_s``; the message says what was tried last.
        LinkClosedError
            If the connector is closed.
        """
        self._check_can_connect(peer_id)
        attempt = self._wanting(peer_id)
        if attempt is None:
            attempt = self._attempts[peer_id] = Attempt()
            if self._fabric.peer_id < peer_id:
                self._nursery.start_soon(self._dial, peer_id, attempt)
            elif peer_id in self._offers:
                self._offers[peer_id].wanted.set()
        attempt.waiters += 1
        try:
            with trio.move_on_after(timeout_s):
                await attempt.done.wait()
            if attempt.error is not None:
                # Of this type again, because several callers may get it and each adds its own traceback.
                raise type(attempt.error)(str(attempt.error)) from attempt.error
            if attempt.link is not None:
                attempt.taken = True
                return attempt.link
            raise UnreachableError(f"no link to peer {peer_id} within {timeout_s:g} s: {attempt.last_failure}")
        finally:
            attempt.waiters -= 1
            if (not attempt.waiters or attempt.done.is_set()) and self._attempts.get(peer_id) is attempt:
                del self._attempts[peer_id]
            if not attempt.waiters:
                attempt.give_up()
                if attempt.link is not None and not attempt.taken and not self._data.closed:
                    self._nursery.start_soon(attempt.link.aclose)

    def _wanting(self, peer_id: PeerId) -> Attempt | None:
        attempt = self._attempts.get(peer_id)
        return attempt if attempt is not None and not attempt.done.is_set() else None

    def _check_can_connect(self, peer_id: PeerId) -> None:
        self._data.check_open()
        if peer_id == self._fabric.peer_id:
            raise UsageError(f"{peer_id} is this process itself; a link needs two")
        if not self._authorize(peer_id):
            raise LinkRefusedError(f"peer {peer_id} is not admitted here")

    # --- Dialing ---------------------------------------------------------------------------------

    async def _dial(self, peer_id: PeerId, attempt: Attempt) -> None:
        attempt.last_failure = "it did not answer the offer"
        with attempt.scope():
            while True:
                try:
                    attempt.succeed(await self._dial_once(peer_id, attempt))
                    return
                except (LinkRefusedError, VersionError) as error:
                    attempt.fail(error)
                    return
                except (UnreachableError, ClosedError, ProtocolError) as error:
                    attempt.last_failure = str(error)
                    logger.debug("no link to peer %s yet: %s", peer_id, error)
                await trio.sleep(limits.LINK_RETRY_S)

    async def _dial_once(self, peer_id: PeerId, attempt: Attempt) -> Link:
        stream = await self._fabric.open_stream(peer_id, LINK_PROTOCOL)
        done = kept = False
        try:
            offer = self._party.offer(self._fabric.addresses, self._entropy, without=attempt.failed_kinds)
            await send_message(stream, offer)
            attempt.last_failure = "it has the offer, and does not want a link (yet)"
            answer = decode_reply(await receive_raw(stream))
            keys = self._party.accept(offer, answer, peer_id)
            if answer.kinds[0] != LIBP2P_STREAM:
                try:
                    link = await self._data.reach(peer_id, answer, keys, attempt.failed_kinds)
                    done = True
                    return link
                except UnreachableError as error:
                    if answer.kinds[1:2] != (LIBP2P_STREAM,):
                        await refuse(stream, str(error))
                        raise
                    logger.info("a link goes over the control plane: %s", error)
            link = await self._streams.dial(stream, offer, self._nursery)
            kept = True
            return link
        finally:
            if not kept:
                await end_stream(stream, done)

    # --- Being dialed ----------------------------------------------------------------------------

    async def _serve_offer(self, stream: FabricStream) -> None:
        peer_id = stream.peer_id
        done = kept = False
        try:
            reason = self._objection(peer_id)
            if reason is not None:
                await refuse(stream, reason)
                done = True
                return
            with trio.fail_after(limits.LINK_HANDSHAKE_TIMEOUT_S):
                data = await receive_raw(stream)
            try:
                offer = decode_offer(data)
                if isinstance(offer, LinkUpgrade):
                    await self._answer_upgrade(stream, offer)
                elif peer_id > self._fabric.peer_id:
                    raise LinkRefusedError("the peer with the smaller id is the one to offer")
                else:
                    attempt = await self._until_wanted(stream)
                    kept = attempt is not None and await self._answer(stream, offer, attempt)
            except VersionError as error:
                attempt = self._wanting(peer_id)
                if attempt is not None:
                    attempt.fail(error)
                await refuse(stream, str(error))
            except LinkRefusedError as error:
                await refuse(stream, str(error))
            done = True
        finally:
            if not kept:
                await end_stream(stream, done)

    def _objection(self, peer_id: PeerId) -> str | None:
        """Return why ``peer_id`` gets no link, whatever it offers."""
        if self._data.closed:
            return "the peer is closing"
        if not self._authorize(peer_id):
            return "you are not admitted to the mesh there"
        if peer_id not in self._offers and len(self._offers) >= limits.LINK_OFFERS_WAITING_MAX_COUNT:
            return "too many peers are waiting for a link"
        return None

    async def _until_wanted(self, stream: FabricStream) -> Attempt | None:
        """Wait until this process wants a link to the peer; None if the offer ends before."""
        peer_id = stream.peer_id
        if peer_id in self._offers:
            # The peer gave up on the older one, or it would not have made another.
            self._offers.pop(peer_id).scope.cancel()
        if self._wanting(peer_id) is None:
            offered = self._offers[peer_id] = WaitingOffer()
            with offered.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(until_ended, stream, nursery.cancel_scope)
                    await offered.wanted.wait()
                    nursery.cancel_scope.cancel()
            if self._offers.get(peer_id) is offered:
                del self._offers[peer_id]
            if not offered.wanted.is_set():
                return None
        return self._wanting(peer_id)

    async def _answer(self, stream: FabricStream, offer: LinkOffer, attempt: Attempt) -> bool:
        """Answer ``offer`` and wait for its data stream; return whether ``stream`` has become the link."""
        peer_id = stream.peer_id
        if offer.link_id in self._expected:
            raise LinkRefusedError("the link id is in use")
        answer, keys = self._party.answer(offer, peer_id, self._fabric.addresses, self._entropy)
        self._pending.add(keys, peer_id, trio.current_time())
        over_stream = trio.Event()
        expected = self._expected[keys.link_id] = _Expected(peer_id, attempt, trio.Event())
        attempt.last_failure = "it did not open the data connection that was agreed on"
        try:
            await send_message(stream, answer)
            with attempt.scope(), trio.move_on_after(limits.LINK_HANDSHAKE_TIMEOUT_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hear_failure, stream, answer, attempt, over_stream, nursery.cancel_scope)
                    await expected.opened.wait()
                    nursery.cancel_scope.cancel()
        finally:
            self._pending.discard(keys.link_id)
            del self._expected[keys.link_id]
            expected.opened.set()
        if not over_stream.is_set() or attempt.done.is_set():
            return False
        link = await self._streams.accept(stream, offer, self._nursery)
        attempt.succeed(link)
        if not attempt.waiters:
            # All gave up at the last moment.
            await link.aclose()
        return True

    async def _answer_upgrade(self, stream: FabricStream, offer: LinkUpgrade) -> None:
        """Answer an offer of a direct connection for a link that goes over the control plane."""
        link = self._streams.begin_move(stream.peer_id, offer.moves)
        attempt = Attempt()
        try:
            await self._answer(stream, offer, attempt)
        finally:
            if attempt.link is not None and not self._data.closed:
                self._nursery.start_soon(self._streams.move, link, attempt.link)
            else:
                self._streams.give_up_move(link)

    async def _hear_failure(
        self,
        stream: FabricStream,
        answer: LinkAnswer,
        attempt: Attempt,
        over_stream: trio.Event,
        done: trio.CancelScope,
    ) -> None:
        """Wait for the dialer to say that it cannot reach this process, or to close the stream."""
        try:
            word = decode_last_word(await receive_raw(stream))
        except LinkClosedError:
            # The dialer has its link, and the data connection may be a moment behind; or it has given up.
            return
        except ProtocolError as error:
            attempt.last_failure = str(error)
            done.cancel()
            return
        if isinstance(word, LinkRefusal):
            attempt.last_failure = word.reason
        elif LIBP2P_STREAM in answer.kinds:
            over_stream.set()
        else:
            raise ProtocolError(f"peer {stream.peer_id} wants a link over the control plane, which was not agreed on")
        done.cancel()

    async def _serve_data_stream(self, stream: trio.SocketStream) -> None:
        """Take a data connection from the fabric's port, if it opens a stream that is expected."""
        await self._accept(stream, TCP)

    async def _serve_local_stream(self, stream: trio.SocketStream) -> None:
        """Take a connection of a peer on this host, if it opens a stream that is expected."""
        await self._accept(stream, SHARED_MEMORY)

    async def _accept(self, stream: trio.SocketStream, kind: str) -> None:
        with trio.fail_after(limits.LINK_HANDSHAKE_TIMEOUT_S):
            opening = await receive_exactly(stream, OPENING_BYTES)
            keys, number, count = self._pending.open(opening, trio.current_time())
            expected = self._expected[keys.link_id]
            await stream.send_all(keys.welcome(number, count))
            self._data.check_open()
            if expected.attempt.done.is_set() or self._expected.get(keys.link_id) is not expected:
                raise LinkClosedError(f"nobody wants the link that peer {expected.peer_id} opened any more")
            expected.streams[number] = stream
            if len(expected.streams) < count:
                await expected.opened.wait()
                if number in expected.streams:
                    raise LinkClosedError(f"peer {expected.peer_id} did not open the other streams of its link")
                return
            streams = [expected.streams.pop(each) for each in range(count)]
            link = await self._data.accepted(streams, kind, expected.peer_id, keys)
        expected.attempt.succeed(link)
        expected.opened.set()

    # --- Closing ---------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Close every link, and give up what was on its way. Idempotent."""
        self._data.closed = True
        for offered in list(self._offers.values()):
            offered.scope.cancel()
        for attempt in list(self._attempts.values()):
            attempt.give_up()
            attempt.fail(LinkClosedError("the connector was closed"))
        await self._data.aclose()

    def close_in_child(self) -> None:
        """In a forked child: close inherited descriptors, sending nothing. Never raises."""
        self._data.close_in_child()


def check_kinds(kinds: Sequence[str]) -> None:
    """Refuse kinds of links that there are none of. Raises UsageError."""
    if not kinds or any(kind not in LINK_KINDS for kind in kinds):
        wrong = next((f"{kind!r} is not one" for kind in kinds if kind not in LINK_KINDS), "it is empty")
        raise UsageError(f"links is {list(kinds)!r}: {wrong}; give some of {', '.join(map(repr, LINK_KINDS))}")
