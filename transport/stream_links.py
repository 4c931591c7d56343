"""Links that go over the control plane, because no direct connection came about, and their moves to one that does.

Both ends try now and then to connect directly, each by a handshake of its own, which the other answers at once: it has
the link already. The pauses between the tries grow, and end when the addresses of this process change. Only one try is
under way for a link; one that comes in meanwhile is refused.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.errors import ClosedError, LinkRefusedError, ProtocolError, UnreachableError
from sparkle_mesh.fabric.framing import send_message
from sparkle_mesh.fabric.interface import Address, Fabric, FabricStream, PeerId
from sparkle_mesh.transport.data_connections import DataConnections
from sparkle_mesh.transport.handshake import (
    LINK_VERSION,
    TCP,
    LinkOffer,
    LinkOverStream,
    LinkParty,
    LinkRefusal,
    decode_last_word,
    decode_reply,
)
from sparkle_mesh.transport.handshake_streams import LINK_PROTOCOL, end_stream, receive_raw, refuse
from sparkle_mesh.transport.libp2p_stream import open_stream_link
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.upgradable import UpgradableLink

logger = logging.getLogger("sparkle_mesh.transport")


class _Standing:
    """A link that goes over the control plane still, and what is under way to change that."""

    def __init__(self) -> None:
        self.link: UpgradableLink
        self.moving = False
        self._over = False
        self._scopes: set[trio.CancelScope] = set()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Cancel what is inside once the link no longer goes over the control plane."""
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            if self._over:
                scope.cancel()
            try:
                yield
            finally:
                self._scopes.discard(scope)

    def end(self) -> None:
        self._over = True
        for scope in self._scopes:
            scope.cancel()


class StreamLinks:
    """The links of one process that began over the control plane.

    Parameters
    ----------
    fabric
        The control plane.
    party
        Who this process is in handshakes.
    data
        Makes direct connections, and keeps every link.
    entropy
        Source of ids, and of what keeps two ends from trying at the same time for ever.
    """

    def __init__(self, fabric: Fabric, party: LinkParty, data: DataConnections, entropy: Entropy) -> None:
        self._fabric = fabric
        self._party = party
        self._data = data
        self._entropy = entropy
        self._standing: dict[tuple[PeerId, bytes], _Standing] = {}
        self._whole: weakref.WeakKeyDictionary[Link, UpgradableLink] = weakref.WeakKeyDictionary()

    def whole(self, link: Link) -> Link:
        """Return the link that ``link`` is a part of; itself if it is of none."""
        return self._whole.get(link, link)

    # --- Making them -----------------------------------------------------------------------------

    async def dial(self, stream: FabricStream, offer: LinkOffer, nursery: trio.Nursery) -> Link:
        """Tell the answerer that ``stream`` is the link, and return it.

        Raises
        ------
        UnreachableError, LinkClosedError, ProtocolError
            If the answerer does not want it (any more).
        """
        asked_at = trio.current_time()
        await send_message(stream, LinkOverStream(version=LINK_VERSION))
        with trio.move_on_after(limits.LINK_HANDSHAKE_TIMEOUT_S):
            reply = decode_last_word(await receive_raw(stream))
            if isinstance(reply, LinkRefusal):
                raise UnreachableError(f"peer {stream.peer_id} wants no link over the control plane: {reply.reason}")
            return await self._make(stream, offer.link_id, nursery, latency_s=(trio.current_time() - asked_at) / 2)
        raise UnreachableError(f"peer {stream.peer_id} did not agree to a link over the control plane in time")

    async def accept(self, stream: FabricStream, offer: LinkOffer, nursery: trio.Nursery) -> Link:
        """Say back what the dialer has told, and return the link. Raises LinkClosedError."""
        await send_message(stream, LinkOverStream(version=LINK_VERSION))
        return await self._make(stream, offer.link_id, nursery, latency_s=None)

    async def _make(
        self, stream: FabricStream, link_id: bytes, nursery: trio.Nursery, *, latency_s: float | None
    ) -> Link:
        key = (stream.peer_id, link_id)
        standing = _Standing()

        def released(first: Link) -> None:
            self._data.links.discard(first)
            self._standing.pop(key, None)
            standing.end()

        first = await open_stream_link(stream, latency_s=latency_s, on_released=released)
        self._data.check_open()
        standing.link = UpgradableLink(first, link_id)
        self._data.keep(first)
        self._whole[first] = standing.link
        if TCP in self._party.kinds:
            self._standing[key] = standing
            # The one that dialed begins, so that the two do not always try at the same time.
            nursery.start_soon(self._improve, standing, 1 if latency_s is not None else 2)
        return standing.link

    # --- Moving them -----------------------------------------------------------------------------

    def begin_move(self, peer_id: PeerId, link_id: bytes) -> UpgradableLink:
        """Return the link that a peer wants to move; :meth:`move` or :meth:`give_up_move` must follow.

        Raises
        ------
        LinkRefusedError
            If it cannot be moved (now).
        """
        standing = self._standing.get((peer_id, link_id))
        if standing is None:
            raise LinkRefusedError("there is no such link over the control plane (any more)")
        if standing.moving:
            raise LinkRefusedError("another direct connection for that link is being tried")
        standing.moving = True
        return standing.link

    def give_up_move(self, link: UpgradableLink) -> None:
        """Let ``link`` be moved another time."""
        standing = self._standing.get((link.peer_id, link.link_id))
        if standing is not None:
            standing.moving = False

    async def move(self, link: UpgradableLink, direct: Link) -> None:
        """Move ``link`` to ``direct``; if that fails, it stays as it is until another time."""
        standing = self._standing.get((link.peer_id, link.link_id))
        if standing is None:
            await direct.aclose()
            return
        self._whole[direct] = link
        try:
            with standing.scope():
                await link.move_to(direct)
        except (UnreachableError, ClosedError, ProtocolError) as error:
            logger.debug("the link to peer %s did not move: %s", link.peer_id, error)
        finally:
            standing.moving = False

    async def _improve(self, standing: _Standing, patience: int) -> None:
        """Try for a direct connection until there is one, or the link is closed."""
        pause_s = patience * limits.LINK_UPGRADE_PAUSE_MIN_S
        link = standing.link
        with standing.scope():
            while True:
                if await self._pause(pause_s * self._entropy.uniform(0.75, 1.25)):
                    pause_s = limits.LINK_UPGRADE_PAUSE_MIN_S
                pause_s = min(2 * pause_s, limits.LINK_UPGRADE_PAUSE_MAX_S)
                if standing.moving:
                    continue
                standing.moving = True
                try:
                    direct = await self._dial(link)
                except (UnreachableError, ClosedError, ProtocolError) as error:
                    logger.debug("no direct connection for the link to peer %s yet: %s", link.peer_id, error)
                else:
                    await self.move(link, direct)
                finally:
                    standing.moving = False

    async def _pause(self, pause_s: float) -> bool:
        """Wait for so long, or until this process has other addresses; return whether it has."""
        addresses: tuple[Address, ...] = self._fabric.addresses
        until = trio.current_time() + pause_s
        while trio.current_time() < until:
            await trio.sleep_until(min(until, trio.current_time() + limits.INTERFACE_ADDRESSES_CACHE_S))
            if self._fabric.addresses != addresses:
                return True
        return False

    async def _dial(self, link: UpgradableLink) -> Link:
        """Return a new direct link to the peer of ``link``, by a handshake of its own."""
        stream = await self._fabric.open_stream(link.peer_id, LINK_PROTOCOL)
        done = False
        try:
            with trio.move_on_after(limits.LINK_HANDSHAKE_TIMEOUT_S):
                offer = self._party.upgrade(link.link_id, self._fabric.addresses, self._entropy)
                await send_message(stream, offer)
                answer = decode_reply(await receive_raw(stream))
                keys = self._party.accept(offer, answer, link.peer_id)
                try:
                    direct = await self._data.reach(link.peer_id, answer, keys, set())
                except UnreachableError as error:
                    await refuse(stream, str(error))
                    raise
                done = True
                return direct
            raise UnreachableError(f"peer {link.peer_id} did not answer in time")
        finally:
            await end_stream(stream, done)
