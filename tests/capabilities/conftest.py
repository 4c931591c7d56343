"""Meshes of capability services over a fabric in memory, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256

import pytest
import trio

from sparkle_mesh.capabilities.search import DeviceQuery
from sparkle_mesh.capabilities.service import CapabilityService
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import PeerConnected, PeerDisconnected
from sparkle_mesh.fabric.memory import MemoryFabric, MemoryFabricNetwork
from sparkle_mesh.membership.keys import MeshSecrets

GIB = 1 << 30


def device(kind: str = "cpu", gib: float = 8, index: int = 0, **more: object) -> DeviceInfo:
    return DeviceInfo(kind=kind, index=index, name=f"a {kind}", memory_bytes=int(gib * GIB), **more)  # type: ignore[arg-type]


@dataclass
class Peer:
    """One process of the mesh."""

    fabric: MemoryFabric
    service: CapabilityService
    identity: Identity
    scope: trio.CancelScope

    @property
    def peer_id(self) -> str:
        return self.fabric.peer_id

    async def finds(self, *arguments: object, **query: object) -> list[str]:
        """Return who offers what fits, in the order found."""
        found = await self.service.find_devices(DeviceQuery.of(*arguments, **query))  # type: ignore[arg-type]
        return [one.peer_id for one in found]

    def kill(self) -> None:
        self.scope.cancel()


@dataclass
class Mesh:
    """Opens peers that connect to whom they are told to."""

    network: MemoryFabricNetwork
    nursery: trio.Nursery
    secrets: MeshSecrets

    async def add(
        self,
        devices: Sequence[DeviceInfo] = (),
        know: Sequence[Peer] = (),
        *,
        identity: Identity | None = None,
        secrets: MeshSecrets | None = None,
        host: str | None = None,
        addresses: Sequence[str] | None = None,
    ) -> Peer:
        identity = identity or Identity.generate()
        peer = await self.nursery.start(
            self._run, identity, secrets or self.secrets, host or identity.peer_id, addresses
        )
        if devices:
            peer.service.offer(devices)
        for other in know:
            await peer.fabric.connect(other.peer_id, other.fabric.addresses)
        return peer

    async def _run(
        self,
        identity: Identity,
        secrets: MeshSecrets,
        host: str,
        addresses: Sequence[str] | None,
        *,
        task_status: trio.TaskStatus[Peer],
    ) -> None:
        scope = trio.CancelScope()
        with scope:
            async with self.network.open(identity, addresses=addresses) as fabric, trio.open_nursery() as nursery:
                service = CapabilityService(
                    fabric,
                    identity,
                    secrets,
                    host_id=sha256(host.encode()).digest()[:16],
                    role="node",
                    software="sparkle-mesh test",
                )
                peer = Peer(fabric, service, identity, scope)
                await nursery.start(service.run)
                nursery.start_soon(self._follow, peer)
                task_status.started(peer)
                await trio.sleep_forever()

    async def _follow(self, peer: Peer) -> None:
        """Whoever is connected counts as admitted."""
        async with peer.fabric.events() as events:
            async for event in events:
                if isinstance(event, PeerConnected):
                    other = self.network._fabrics[event.peer_id]
                    peer.service.admitted(event.peer_id, other.addresses)
                elif isinstance(event, PeerDisconnected):
                    peer.service.gone(event.peer_id, for_good=False)


@pytest.fixture
def open_mesh() -> Callable[..., AbstractAsyncContextManager[Mesh]]:
    """Return a function that opens a mesh whose peers are ``delay_s`` apart."""

    @asynccontextmanager
    async def opened(*, delay_s: float = 0.01) -> AsyncIterator[Mesh]:
        network = MemoryFabricNetwork(delay_s=delay_s)
        async with trio.open_nursery() as nursery:
            yield Mesh(network, nursery, MeshSecrets("a mesh", None))
            nursery.cancel_scope.cancel()

    return opened
