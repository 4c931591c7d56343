"""News of peers over gossip: who has come, who has moved, and who was revoked.

It is how halves of a mesh that meet through one common peer become one: whoever meets a peer that nobody has told of
yet publishes where it listens, once. Nobody publishes that nothing has changed; what gets lost, the lookups of the
mesh's DHT find. The payloads are sealed for their publisher, so that nobody passes on as their own what they have
overheard; what does not unseal or decode is dropped, counted, and not passed on.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import trio

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import SYSTEM_ENTROPY, Entropy
from sparkle_mesh.errors import ProtocolError
from sparkle_mesh.fabric.interface import Address, Fabric, PeerId
from sparkle_mesh.membership.keys import MeshSecrets
from sparkle_mesh.membership.messages import Met, Presence, Revoked, Role
from sparkle_mesh.wire import PeerAddress

logger = logging.getLogger(__name__)


def _seal_context(publisher: PeerId) -> bytes:
    return f"news\0{publisher}".encode()


class PresenceService:
    """Publishes news of peers, and reports those of others to ``heard``.

    Parameters
    ----------
    role, incarnation
        What this process tells of itself.
    heard
        Takes a peer id, where it is said to listen, whether it said so itself (``"gossip"``, else ``"exchange"``), and
        its role if that was told.
    revoked
        Takes a list of revoked peers that somebody publishes; raises ProtocolError if it is forged.
    """

    def __init__(
        self,
        fabric: Fabric,
        secrets: MeshSecrets,
        *,
        role: Role,
        incarnation: bytes,
        heard: Callable[[PeerId, Sequence[Address], str, str], None],
        revoked: Callable[[bytes], object] = lambda encoded: None,
        entropy: Entropy = SYSTEM_ENTROPY,
    ) -> None:
        self._fabric, self._secrets, self._entropy = fabric, secrets, entropy
        self._role: Role = role
        self._incarnation = incarnation
        self._heard, self._revoked = heard, revoked
        self._revocations: bytes | None = None
        # What the mesh was told already, by whomever.
        self._told: OrderedDict[PeerId, tuple[Address, ...]] = OrderedDict()
        self._to_tell: dict[PeerId, tuple[Role, tuple[Address, ...]]] = {}
        self._wake = trio.Event()
        self.refused_count = 0

    def met(self, peer_id: PeerId, addresses: Sequence[Address], role: Role) -> None:
        """``peer_id`` has proven that it is of the mesh; the others are told unless they were."""
        told = tuple(addresses)
        if told and self._told.get(peer_id) != told and len(self._to_tell) < limits.MESH_PEERS_MAX_COUNT:
            self._to_tell[peer_id] = role, told
            self._wake.set()

    def moved(self) -> None:
        """This process can be reached elsewhere than before: the others are told."""
        self._wake.set()

    def gone(self, peer_id: PeerId) -> None:
        """``peer_id`` is connected no more; should it come back, that is news."""
        self._told.pop(peer_id, None)
        self._to_tell.pop(peer_id, None)

    def revoke(self, revocations: bytes) -> None:
        """Tell the mesh of a list of revoked peers, now; only the last one if there are several."""
        self._revocations = revocations
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Publish and listen until cancelled."""
        async with (
            self._fabric.subscribe(self._secrets.topic, self._accepts) as published,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._publish_forever)
            task_status.started()
            async for message in published:
                self._take(message.peer_id, message.data)

    def _accepts(self, publisher: PeerId, sealed: bytes) -> bool:
        try:
            self._open(publisher, sealed)
        except ProtocolError as error:
            self.refused_count += 1
            logger.debug("news from %s dropped: %s", publisher, error)
            return False
        return True

    def _open(self, publisher: PeerId, sealed: bytes) -> Presence | Met | Revoked:
        payload = self._secrets.unseal(sealed, context=_seal_context(publisher))
        news: Presence | Met | Revoked = wire.decode(payload, Presence | Met | Revoked)
        return news

    def _take(self, publisher: PeerId, sealed: bytes) -> None:
        news = self._open(publisher, sealed)
        if isinstance(news, Revoked):
            try:
                self._revoked(news.revocations)
            except ProtocolError as error:
                self.refused_count += 1
                logger.debug("revocations from %s dropped: %s", publisher, error)
        elif isinstance(news, Presence):
            self._take_in(publisher, news.addresses, "gossip", news.role)
        else:
            for peer in news.peers:
                self._take_in(peer.peer_id, peer.addresses, "exchange", peer.role)

    def _take_in(self, peer_id: PeerId, addresses: tuple[Address, ...], source: str, role: str) -> None:
        self._note_told(peer_id, addresses)
        if peer_id != self._fabric.peer_id:
            self._heard(peer_id, addresses, source, role)

    def _note_told(self, peer_id: PeerId, addresses: tuple[Address, ...]) -> None:
        self._told[peer_id] = addresses
        self._told.move_to_end(peer_id)
        if len(self._told) > limits.MESH_PEERS_MAX_COUNT:
            self._told.popitem(last=False)
        if peer_id in self._to_tell and self._to_tell[peer_id][1] == addresses:
            del self._to_tell[peer_id]

    async def _publish_forever(self) -> None:
        mine = self._own_addresses()
        while True:
            with trio.move_on_after(limits.PRESENCE_LOOK_S):
                await self._wake.wait()
                # Several may have met the same peer: the first to tell spares the rest.
                await trio.sleep(limits.PRESENCE_SETTLE_S * self._entropy.uniform(0.5, 1.5))
            self._wake = trio.Event()
            if self._revocations is not None:
                revocations, self._revocations = self._revocations, None
                await self._publish(Revoked(revocations=revocations))
            while self._to_tell:
                await self._publish_met()
            if self._own_addresses() != mine:
                mine = self._own_addresses()
                await self._publish(Presence(role=self._role, incarnation=self._incarnation, addresses=mine))

    async def _publish_met(self) -> None:
        some = list(self._to_tell.items())[: limits.PEER_EXCHANGE_MAX_COUNT]
        for peer_id, (_, addresses) in some:
            self._note_told(peer_id, addresses)
        await self._publish(Met(peers=tuple(PeerAddress(who, where, role) for who, (role, where) in some)))

    async def _publish(self, news: Presence | Met | Revoked) -> None:
        context = _seal_context(self._fabric.peer_id)
        sealed = self._secrets.seal(wire.encode(news), self._entropy, context=context)
        await self._fabric.publish(self._secrets.topic, sealed)

    def _own_addresses(self) -> tuple[Address, ...]:
        return tuple(self._fabric.addresses)[: limits.ADDRESSES_PER_PEER_MAX_COUNT]
