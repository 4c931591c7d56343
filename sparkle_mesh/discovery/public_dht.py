"""The public DHT as a meeting place: who is of a mesh says so under the mesh's key, and finds who else did.

No server of ours is needed for it, and nothing is stored there but that a peer is to be asked about a key; for a mesh
with a key that key says nothing to anybody else. What is found is a hint: the peer has to prove that it is of the mesh.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from sparkle_mesh import limits
from sparkle_mesh.discovery.lookup import Lookup, LookupBounds
from sparkle_mesh.discovery.lookup_run import run_lookup
from sparkle_mesh.discovery.public_peers import PublicPeers
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.interface import Address, Fabric, PeerId
from sparkle_mesh.wire import PeerAddress

logger = logging.getLogger(__name__)

_BOUNDS = LookupBounds(
    parallel_count=limits.PUBLIC_DHT_PARALLEL_COUNT,
    peers_max_count=limits.PUBLIC_DHT_PEERS_MAX_COUNT,
    named_max_count=limits.PUBLIC_DHT_NAMED_MAX_COUNT,
    patience_s=limits.PUBLIC_DHT_PATIENCE_S,
)


class Answer(Protocol):
    """What one peer of the DHT says of a key."""

    @property
    def providers(self) -> list[PeerAddress]: ...
    @property
    def closer(self) -> list[PeerAddress]: ...


class KadClient(Protocol):
    """What this needs of :class:`sparkle_mesh.fabric.kad_client.KadClient`."""

    def place_of_key(self, key: bytes) -> bytes: ...
    def place_of_peer(self, peer_id: PeerId) -> bytes: ...
    async def ask(self, peer_id: PeerId, key: bytes) -> Answer: ...
    async def tell(self, peer_id: PeerId, key: bytes, addresses: Sequence[Address]) -> None: ...


class PublicDht:
    """Lookups in the public DHT.

    Parameters
    ----------
    roots
        Returns peers to begin with.
    public_peers
        Told of whom this is connected to only to ask.
    """

    def __init__(
        self, fabric: Fabric, kad: KadClient, *, roots: Callable[[], Iterable[PeerAddress]], public_peers: PublicPeers
    ) -> None:
        self._fabric, self._kad, self._roots, self._public_peers = fabric, kad, roots, public_peers

    async def meet(
        self, key: bytes, addresses: Sequence[Address], found: Callable[[PeerAddress], object]
    ) -> tuple[int, int]:
        """Look for providers of ``key``, handing each to ``found`` at once, then say that this process is one.

        Takes ``limits.PUBLIC_DHT_TIMEOUT_S`` at most.

        Parameters
        ----------
        addresses
            Where this process can be reached; it says nothing if there are none.

        Returns
        -------
        tuple of int, int
            How many peers have answered, and how many were told.
        """
        told_count = 0
        with trio.move_on_after(limits.PUBLIC_DHT_TIMEOUT_S):
            async with self._asking() as held:
                closest = await self._look(key, found, held)
                if addresses:

                    async def tell(peer: PeerAddress) -> None:
                        nonlocal told_count
                        try:
                            await self._kad.tell(peer.peer_id, key, addresses)
                            told_count += 1
                        except SparkleError as error:
                            logger.debug("not told: %s", error)

                    async with trio.open_nursery() as nursery:
                        for peer in closest:
                            nursery.start_soon(tell, peer)
                return len(closest), told_count
        return 0, told_count

    async def _look(self, key: bytes, found: Callable[[PeerAddress], object], held: set[PeerId]) -> list[PeerAddress]:
        now = trio.current_time()
        lookup = Lookup(
            self._kad.place_of_key(key),
            self._fabric.peer_id,
            self._roots(),
            now=now,
            timeout_s=limits.PUBLIC_DHT_TIMEOUT_S / 2,
            count=limits.PUBLIC_DHT_HOLDERS_COUNT,
            place_of=self._kad.place_of_peer,
            bounds=_BOUNDS,
        )

        async def ask(peer: PeerAddress) -> None:
            if peer.peer_id not in self._fabric.connected_peers():
                self._public_peers.hold(peer.peer_id)
                held.add(peer.peer_id)
                await self._fabric.connect(peer.peer_id, peer.addresses, timeout_s=limits.PUBLIC_DHT_PATIENCE_S)
            answer = await self._kad.ask(peer.peer_id, key)
            lookup.answered(peer.peer_id, answer.closer)
            for provider in answer.providers:
                if provider.peer_id != self._fabric.peer_id:
                    found(provider)

        return await run_lookup(lookup, ask)

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[set[PeerId]]:
        """Whom this connects to meanwhile, to ask, is let go at the end."""
        held: set[PeerId] = set()
        try:
            yield held
        finally:
            with trio.move_on_after(limits.CLOSE_TIMEOUT_S) as scope:
                scope.shield = True
                async with trio.open_nursery() as nursery:
                    for peer_id in held:
                        nursery.start_soon(self._let_go, peer_id)

    async def _let_go(self, peer_id: PeerId) -> None:
        try:
            # Somebody else may have come to need it.
            if self._public_peers.held_count(peer_id) == 1:
                await self._fabric.disconnect(peer_id)
        finally:
            self._public_peers.release(peer_id)
