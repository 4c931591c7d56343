"""Presence over gossip: each peer publishes now and then that it is in the mesh and where it listens.

It is the safety net under discovery: halves of a mesh that know each other through one common peer learn of
all the rest. With a key the payloads are sealed; what does not unseal or decode is dropped and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import SYSTEM_ENTROPY, Entropy
from sparkle_mesh.errors import ProtocolError
from sparkle_mesh.fabric.interface import Address, Fabric, PeerId
from sparkle_mesh.membership.keys import MeshSecrets
from sparkle_mesh.membership.messages import Presence, Role

logger = logging.getLogger(__name__)


class PresenceService:
    """Publishes this process's presence and reports that of others to ``heard``."""

    def __init__(
        self,
        fabric: Fabric,
        secrets: MeshSecrets,
        *,
        role: Role,
        incarnation: bytes,
        heard: Callable[[PeerId, Sequence[Address], str], None],
        entropy: Entropy = SYSTEM_ENTROPY,
    ) -> None:
        self._fabric, self._secrets, self._entropy = fabric, secrets, entropy
        self._role: Role = role
        self._incarnation = incarnation
        self._heard = heard
        self.refused_count = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Publish and listen until cancelled."""
        async with self._fabric.subscribe(self._secrets.topic) as published, trio.open_nursery() as nursery:
            nursery.start_soon(self._publish_forever)
            task_status.started()
            async for message in published:
                self._take(message.peer_id, message.data)

    def _take(self, peer_id: PeerId, sealed: bytes) -> None:
        try:
            presence = wire.decode(self._secrets.unseal(sealed), Presence)
        except ProtocolError as error:
            self.refused_count += 1
            logger.debug("presence of %s dropped: %s", peer_id, error)
            return
        self._heard(peer_id, presence.addresses, "gossip")

    async def _publish_forever(self) -> None:
        while True:
            # Late enough for the first links of a start-up to stand, so that the first one is heard.
            await trio.sleep(limits.PRESENCE_INTERVAL_S * self._entropy.uniform(0.5, 1.5))
            presence = Presence(
                role=self._role,
                incarnation=self._incarnation,
                addresses=tuple(self._fabric.addresses)[: limits.ADDRESSES_PER_PEER_MAX_COUNT],
            )
            sealed = self._secrets.seal(wire.encode(presence), self._entropy)
            await self._fabric.publish(self._secrets.topic, sealed)
