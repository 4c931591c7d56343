"""Lets strangers go: the runner of :mod:`.strangers`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from sparkle_mesh import limits
from sparkle_mesh.fabric.interface import Address, Fabric, FabricEvent, PeerConnected, PeerId
from sparkle_mesh.fabric.networks import source_of
from sparkle_mesh.membership.strangers import Strangers

logger = logging.getLogger(__name__)


class StrangerWatch:
    """Watches the connected peers that have not proven anything.

    Parameters
    ----------
    is_admitted
        Whether a peer has proven that it is of the mesh.
    refused
        Told of those that are let go because they proved nothing, and why.
    start_soon
        Starts a task with its arguments.
    """

    def __init__(
        self,
        fabric: Fabric,
        *,
        is_admitted: Callable[[PeerId], bool],
        refused: Callable[[PeerId, str], object],
        start_soon: Callable[[Callable[[PeerId], Awaitable[None]], PeerId], object],
    ) -> None:
        self._fabric, self._is_admitted, self._refused, self._start_soon = fabric, is_admitted, refused, start_soon
        self._came = trio.Event()
        #: To be read only.
        self.strangers = Strangers()

    def note(self, event: FabricEvent) -> None:
        """A connection has come or gone."""
        if not isinstance(event, PeerConnected):
            self.strangers.went(event.peer_id)
        elif not self._is_admitted(event.peer_id):
            self.came(event.peer_id, event.remote_address)

    def came(self, peer_id: PeerId, address: Address | None) -> None:
        """``peer_id`` is connected from ``address`` and has proven nothing, or its proof is over."""
        leaves = self.strangers.came(peer_id, source_of(address) or peer_id, trio.current_time())
        self._came.set()
        if leaves is not None:
            logger.info("stranger %s makes way for another: %d are connected", leaves, len(self.strangers))
            self._start_soon(self._fabric.disconnect, leaves)

    async def run(self) -> None:
        """Let those go who do not prove anything, until cancelled."""
        while True:
            self._came = trio.Event()
            wakeup = self.strangers.next_wakeup()
            with trio.move_on_at(float("inf") if wakeup is None else wakeup):
                await self._came.wait()
            for peer_id in self.strangers.overdue(trio.current_time()):
                reason = f"peer {peer_id} did not prove within {limits.STRANGER_STAY_MAX_S:g} s that it is of this mesh"
                logger.info("not admitted: %s", reason)
                self._refused(peer_id, reason)
                self._start_soon(self._fabric.disconnect, peer_id)
