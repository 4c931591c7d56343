"""Honest nodes that go on with their work while they are attacked, and the attackers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import trio

from sparkle_mesh.capabilities.search import DeviceQuery
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import Libp2pFabric, open_libp2p_fabric
from sparkle_mesh.fabric.memory import MemoryFabricNetwork
from sparkle_mesh.membership.keys import MeshKey
from sparkle_mesh.node import MeshNode, NodeConfig, open_node
from sparkle_mesh.nurseries import bare_errors

ECHO = "/echo"
CPU = DeviceInfo(kind="cpu", index=0, name="a CPU", memory_bytes=8 << 30)
QUERY = DeviceQuery.of("cpu")

OpenHonestNode: TypeAlias = Callable[..., AbstractAsyncContextManager[MeshNode]]


async def echo(stream: Any) -> None:
    while data := await stream.read(1 << 16):
        await stream.write(data)
    await stream.aclose()


class HonestPair:
    """Two nodes that keep searching for each other's devices, pinging each other, and using a stream."""

    def __init__(self, one: MeshNode, other: MeshNode) -> None:
        self.one, self.other = one, other
        #: How often all of it was done, and how long it took at most.
        self.rounds = 0
        self.slowest_s = 0.0
        self._done = trio.Event()

    async def meet(self) -> None:
        """Wait until both are of the mesh and know each other's devices."""
        for node in (self.one, self.other):
            node.fabric.handle(ECHO, echo)
            # They are published within a second.
            while True:
                found = {each.peer_id for each in await node.find_devices(QUERY)}
                if found >= {self.one.peer_id, self.other.peer_id}:
                    break
                await trio.sleep(0.05)

    async def work(self, deadline_s: float) -> None:
        """Do everything once, and fail if it is not done by the deadline."""
        started = trio.current_time()
        for node, peer in ((self.one, self.other), (self.other, self.one)):
            found = {each.peer_id for each in await node.find_devices(QUERY, timeout_s=deadline_s)}
            assert found >= {self.one.peer_id, self.other.peer_id}, f"found {found} of the pair"
            assert await node.membership.channels[peer.peer_id].answers(deadline_s), "a ping was not answered"
            stream = await node.fabric.open_stream(peer.peer_id, ECHO)
            await stream.write(b"still there?")
            assert await stream.read(100) == b"still there?"
            await stream.aclose()
        took_s = trio.current_time() - started
        assert took_s <= deadline_s, f"the pair's work took {took_s:.2f} s, more than {deadline_s} s"
        self.rounds, self.slowest_s = self.rounds + 1, max(self.slowest_s, took_s)
        self._done.set()
        self._done = trio.Event()

    @asynccontextmanager
    async def working(self, deadline_s: float) -> AsyncIterator[None]:
        """Work again and again until the block ends, and once more after it."""
        rounds = self.rounds

        async def work_forever() -> None:
            while True:
                await self.work(deadline_s)
                await trio.sleep(0.05)

        with bare_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(work_forever)
                yield
                while self.rounds < rounds + 2:
                    await self._done.wait()
                nursery.cancel_scope.cancel()


@pytest.fixture
def make_pair() -> type[HonestPair]:
    return HonestPair


@pytest.fixture
def until() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """Return what waits until something holds that nobody tells of."""

    async def wait(holds: Callable[[], object]) -> None:
        while True:
            if holds():
                return
            await trio.sleep(0.01)

    return wait


@pytest.fixture
def node_config(tmp_path: Path) -> Callable[..., NodeConfig]:
    """Return what makes the configuration of one more node of the same mesh, which joins at the nodes given."""
    key = MeshKey.generate()

    def make(*nodes: MeshNode, **changes: Any) -> NodeConfig:
        identity = changes.get("identity") or Identity.generate()
        settings: dict[str, Any] = {
            "mesh": "run",
            "key": key,
            "identity": identity,
            "listen": ("/ip4/127.0.0.1/tcp/0",),
            "join": tuple(f"{node.fabric.addresses[0]}/p2p/{node.peer_id}" for node in nodes),
            "data_dir": tmp_path / identity.peer_id,
            "lan": False,
        }
        return NodeConfig(**(settings | changes))

    return make


@pytest.fixture
async def honest_pair(node_config: Callable[..., NodeConfig]) -> AsyncIterator[HonestPair]:
    """Two nodes of a mesh with a key, over TCP, that have met."""
    async with open_node(node_config()) as one, open_node(node_config(one)) as other:
        pair = HonestPair(one, other)
        with trio.fail_after(20):
            await pair.meet()
        yield pair


@pytest.fixture
def open_memory_node(
    node_config: Callable[..., NodeConfig], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AbstractAsyncContextManager[MeshNode]]:
    """Return what opens a whole node over a fabric in memory, at whatever address it pretends to have."""

    async def offer(node: MeshNode) -> None:
        # Without a thread, which virtual time would not wait for.
        node._devices = (CPU,)
        node.capabilities.offer(node._devices)

    monkeypatch.setattr(MeshNode, "_offer_devices", offer)

    @asynccontextmanager
    async def opened(
        network: MemoryFabricNetwork, ip: str, *nodes: MeshNode, **changes: Any
    ) -> AsyncIterator[MeshNode]:
        settings = node_config(*nodes, **changes)
        with bare_errors():
            async with (
                network.open(settings.identity, addresses=(f"/ip4/{ip}/tcp/45654",)) as fabric,
                trio.open_nursery() as nursery,
            ):
                node = MeshNode(settings, fabric)
                await nursery.start(node.run)
                try:
                    yield node
                finally:
                    nursery.cancel_scope.cancel()

    return opened


@pytest.fixture
def open_strangers() -> Callable[..., AbstractAsyncContextManager[list[Libp2pFabric]]]:
    """Return what opens so many fabrics, each of which proves an identity of its own and nothing else.

    The id of every second one is smaller than that of ``beside``, if it is given, and the others' are larger: of two
    peers it is the one with the smaller id that opens the mesh's stream.
    """

    @asynccontextmanager
    async def opened(count: int, *, beside: MeshNode | None = None) -> AsyncIterator[list[Libp2pFabric]]:
        strangers: list[Libp2pFabric] = []

        async def hold(*, task_status: trio.TaskStatus[None]) -> None:
            identity = Identity.generate()
            while beside is not None and (identity.peer_id < beside.peer_id) != len(strangers) % 2:
                identity = Identity.generate()
            async with open_libp2p_fabric(identity, listen=()) as fabric:
                strangers.append(fabric)
                task_status.started()
                await trio.sleep_forever()

        with bare_errors():
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    await nursery.start(hold)
                yield strangers
                nursery.cancel_scope.cancel()

    return opened
