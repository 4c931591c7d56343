"""Many whole nodes in one process, in virtual time: the production services over a control plane in memory.

Every peer is a :class:`~sparkle_mesh.node.MeshNode` as ``sparkle-node`` runs it: discovery, membership, presence and
capabilities. Modelled are

- the network: each way takes ``DELAY_S``, nothing is lost; addresses are of a private network, so that no bound on
  peers of one public network applies;
- bytes: what is written is counted with what a connection of libp2p adds to it, as measured on a loopback interface
  (the constants below), keepalive of TCP included;
- GossipSub: news reach everybody that is connected, over however many others, after one delay; so many copies are
  counted for each as there are at a degree of ``GOSSIP_DEGREE``, and its own control messages are not;
- devices: drawn, and the same sort of machines for every seed. No disk, no multicast, no other process of a host.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import trio

from simulations.trio_run import SeededEntropy
from sparkle_mesh import limits
from sparkle_mesh.capabilities.search import DeviceQuery
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import ClosedError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import Address, PeerId, Published
from sparkle_mesh.fabric.memory import Delivery, MemoryFabric, MemoryFabricNetwork, MemoryStream
from sparkle_mesh.node import MeshNode, NodeConfig
from sparkle_mesh.nurseries import bare_errors

DELAY_S = 0.02
GIB = 1 << 30
GOSSIP_DEGREE = 6
# What py-libp2p puts on the wire, headers of Ethernet, IP and TCP and acknowledgements included, each end its half:
# TCP's, Noise's and yamux's handshakes, identify, and the streams of GossipSub; the negotiation of a stream, and its
# end; what a message costs beside its own bytes (yamux, Noise, one packet, its acknowledgement); a further packet.
CONNECTION_BYTES = 2100
STREAM_BYTES = 332
STREAM_END_BYTES = 67
MESSAGE_BYTES = 108
PACKET_BYTES = 66
PACKET_PAYLOAD_BYTES = 1448
#: A probe of TCP's keepalive, or its answer: one of each from both ends when nothing has passed for so long.
KEEPALIVE_BYTES, KEEPALIVE_S = 66, float(limits.CONTROL_KEEPALIVE_IDLE_S)
#: Machines: kind, GiB of memory, how many in a hundred.
CPUS = ((3, 5), (8, 15), (16, 20), (32, 25), (64, 20), (128, 10), (512, 5))
GPUS = ((0, 55), (8, 15), (12, 8), (24, 14), (48, 3), (80, 5))


@asynccontextmanager
async def bare_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery whose one error comes out as it is."""
    with bare_errors():
        async with trio.open_nursery() as nursery:
            yield nursery


def wire_bytes(nbytes: int) -> int:
    """Return what a message of ``nbytes`` bytes costs on the wire."""
    return nbytes + MESSAGE_BYTES + nbytes // PACKET_PAYLOAD_BYTES * PACKET_BYTES


class CountingNetwork(MemoryFabricNetwork):
    """Counts what each fabric sends and receives."""

    def __init__(self) -> None:
        super().__init__(delay_s=DELAY_S)
        self.sent: dict[PeerId, float] = {}
        self.received: dict[PeerId, float] = {}
        self.connections_made = 0
        self._by_address: dict[Address, MemoryFabric] = {}
        # When something passed between two, last.
        self._passed_at: dict[frozenset[PeerId], float] = {}
        # All ways take equally long: what is sent first arrives first.
        self._under_way: deque[tuple[float, PeerId, Delivery]] = deque()
        self._sent_some = trio.Event()

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            if not self._under_way:
                self._sent_some = trio.Event()
                await self._sent_some.wait()
            await trio.sleep_until(self._under_way[0][0])
            while self._under_way and self._under_way[0][0] <= trio.current_time():
                _, target, delivery = self._under_way.popleft()
                if target in self._fabrics:
                    delivery()

    def enter(self, fabric: MemoryFabric) -> None:
        """Count for ``fabric``, and let others dial it."""
        self.sent[fabric.peer_id] = self.received[fabric.peer_id] = 0.0
        self._by_address.update(dict.fromkeys(fabric.addresses, fabric))
        add = fabric._add_connection

        def add_and_count(connection: Any) -> None:
            self.connections_made += connection.outbound
            self._passed_at[frozenset({fabric.peer_id, connection.peer_id})] = trio.current_time()
            self._count_both(fabric.peer_id, connection.peer_id, CONNECTION_BYTES / 2)
            add(connection)

        serve = fabric._serve

        def serve_and_count(protocol: str, handler: Any, stream: MemoryStream) -> None:
            self._count_both(fabric.peer_id, stream.peer_id, STREAM_BYTES)
            serve(protocol, handler, stream)

        spread = partial(self._spread, fabric)
        vars(fabric).update(_add_connection=add_and_count, _serve=serve_and_count, _spread=spread)

    def _spread(self, source: MemoryFabric, topic: str, message_id: tuple[PeerId, int], data: bytes) -> None:
        """Let what ``source`` publishes reach all that are connected to it, over however many others."""
        # With the signature, the key and the name of the topic.
        nbytes = (GOSSIP_DEGREE - 1) * wire_bytes(len(data) + 200)
        reached, edge = {source.peer_id}, [source.peer_id]
        arrives_at = trio.current_time() + DELAY_S
        while edge:
            fabric = self._fabrics.get(edge.pop())
            if fabric is None:
                continue
            self.sent[fabric.peer_id] += nbytes
            self.received[fabric.peer_id] += nbytes
            if fabric is not source and topic in fabric._topics:
                delivery = partial(fabric._topics.deliver, topic, Published(message_id[0], data))
                self._under_way.append((arrives_at, fabric.peer_id, delivery))
            new = fabric._connections.keys() - reached
            reached |= new
            edge.extend(sorted(new))
        self._sent_some.set()

    def _count(self, source: PeerId, target: PeerId, nbytes: float) -> None:
        self._count_probes(source, target)
        self._passed_at[frozenset({source, target})] = trio.current_time()
        self.sent[source] += nbytes
        self.received[target] += nbytes

    def _count_both(self, one: PeerId, other: PeerId, nbytes: float) -> None:
        self._count(one, other, nbytes)
        self._count(other, one, nbytes)

    def _count_probes(self, one: PeerId, other: PeerId) -> None:
        """Count those of the time since something passed between two that are connected."""
        pair = frozenset({one, other})
        passed_at = self._passed_at.setdefault(pair, trio.current_time())
        count = (trio.current_time() - passed_at) // KEEPALIVE_S
        if count:
            self._passed_at[pair] = passed_at + count * KEEPALIVE_S
            for peer_id in pair:
                self.sent[peer_id] += 2 * count * KEEPALIVE_BYTES
                self.received[peer_id] += 2 * count * KEEPALIVE_BYTES

    def count_probes(self) -> None:
        """Count the probes of all connections up to now."""
        for fabric in self._fabrics.values():
            for peer_id in fabric.connected_peers():
                self._count_probes(fabric.peer_id, peer_id)

    def _listening_at(self, address: Address) -> MemoryFabric | None:
        fabric = self._by_address.get(address)
        return fabric if fabric is not None and not fabric._dead else None

    def _deliver(self, source: PeerId, target: PeerId, delivery: Delivery) -> None:
        if isinstance(delivery, partial) and delivery.func.__name__ == "_arrive":
            self._count(source, target, wire_bytes(len(delivery.args[0])))
        elif target in self.received:
            self._count(source, target, STREAM_END_BYTES)
        self._under_way.append((trio.current_time() + DELAY_S, target, delivery))
        self._sent_some.set()


class SimulatedNode(MeshNode):
    """A node without a disk, with made-up devices."""

    def __init__(self, config: NodeConfig, fabric: MemoryFabric, devices: tuple[DeviceInfo, ...]) -> None:
        # Each is a machine of its own.
        with mock.patch("sparkle_mesh.node.host_id", return_value=config.entropy.token(16)):
            super().__init__(config, fabric)
        vars(self.discovery).update(_registry=_NoRegistry(), _cache=_NoCache(), _watch_registry=trio.sleep_forever)
        self._made_up = devices

    async def _offer_devices(self) -> None:
        self.capabilities.offer(self._made_up)


class _NoRegistry:
    folder = Path("/nowhere")

    def announce(self, peer_id: PeerId, **told: object) -> None: ...
    def withdraw(self, peer_id: PeerId) -> None: ...


class _NoCache:
    def load(self) -> tuple[()]:
        return ()

    def save(self, seen: object, *, unreachable: object) -> None: ...


class _VirtualClock:
    def now(self) -> float:
        return trio.current_time()

    def wall_time(self) -> float:
        return 1.8e9 + trio.current_time()


def _drawn(source: random.Random, table: tuple[tuple[int, int], ...]) -> int:
    return source.choices([gib for gib, _ in table], [weight for _, weight in table])[0]


def made_up_devices(source: random.Random) -> tuple[DeviceInfo, ...]:
    """Return the devices of one machine: a CPU, and often a GPU."""
    cores = source.choice([4, 8, 16, 32])
    devices = [
        DeviceInfo(
            kind="cpu", index=0, name=f"{cores}-Core Processor", memory_bytes=_drawn(source, CPUS) * GIB, cores=cores
        )
    ]
    if gib := _drawn(source, GPUS):
        devices.append(DeviceInfo(kind="cuda", index=0, name=f"a GPU of {gib} GiB", memory_bytes=gib * GIB))
    return tuple(devices)


@dataclass(slots=True)
class Peer:
    """One running node."""

    node: SimulatedNode
    fabric: MemoryFabric
    scope: trio.CancelScope
    alive: bool = True

    @property
    def peer_id(self) -> PeerId:
        return self.fabric.peer_id


class ManyPeers:
    """The peers of one run.

    Parameters
    ----------
    nursery
        Runs them.
    source
        All chance comes from it.
    """

    def __init__(self, nursery: trio.Nursery, source: random.Random) -> None:
        self._nursery, self._random = nursery, source
        self.network = CountingNetwork()
        self.peers: list[Peer] = []
        nursery.start_soon(self.network.run)

    async def start(self, knows: Peer | None, role: str = "node") -> Peer:
        """Start one that knows the address of ``knows``."""
        join = () if knows is None else (f"{knows.fabric.addresses[0]}/p2p/{knows.peer_id}",)
        peer: Peer = await self._nursery.start(self._live, join, role)
        self.peers.append(peer)
        return peer

    async def _live(self, join: tuple[str, ...], role: str, *, task_status: trio.TaskStatus[Peer]) -> None:
        source = random.Random(self._random.random())
        config = NodeConfig(
            mesh="many",
            role=cast("Any", role),
            identity=Identity(source.randbytes(32)),
            listen=(),
            join=join,
            data_dir=Path("/nowhere"),
            lan=False,
            entropy=SeededEntropy(source),
            clock=_VirtualClock(),
        )
        with trio.CancelScope() as scope, bare_errors():
            try:
                async with self.network.open(config.identity) as fabric:
                    self.network.enter(fabric)
                    node = SimulatedNode(config, fabric, made_up_devices(source))
                    peer = Peer(node, fabric, scope)
                    async with trio.open_nursery() as nursery:
                        await nursery.start(node.run)
                        task_status.started(peer)
            except ClosedError:
                # It was killed.
                scope.cancel()

    def kill(self, peer: Peer) -> None:
        """End ``peer`` as the death of its process would."""
        peer.alive = False
        self.network.kill(peer.peer_id)
        peer.scope.cancel()

    @property
    def alive(self) -> list[Peer]:
        """Those that live."""
        return [peer for peer in self.peers if peer.alive]

    def parts(self) -> list[set[PeerId]]:
        """Return the parts of the graph of admitted peers that hang together, the largest first."""
        left = {peer.peer_id: peer.node.membership.channels.keys() for peer in self.alive}
        parts = []
        while left:
            start, found = next(iter(left)), set()
            edge = [start]
            while edge:
                one = edge.pop()
                if one in left:
                    found.add(one)
                    edge.extend(left.pop(one))
            parts.append(found)
        return sorted(parts, key=len, reverse=True)

    async def found_by(self, peer: Peer) -> set[PeerId]:
        """Return whose devices ``peer`` finds: every machine has a CPU."""
        query = DeviceQuery.of("cpu", limit=limits.FOUND_DEVICES_MAX_COUNT)
        return {found.peer_id for found in await peer.node.find_devices(query)}

    async def until(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``holds()``, for ``timeout_s`` at most; return whether it does."""
        for _ in range(round(4 * timeout_s)):
            if holds():
                return True
            await trio.sleep(0.25)
        return holds()
