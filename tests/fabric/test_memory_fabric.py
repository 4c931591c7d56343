"""What only memory fabrics have: delays, partitions and kills, exact under a virtual clock."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from sparkle_mesh import limits
from sparkle_mesh.errors import ClosedError, LinkClosedError, UnreachableError, UsageError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import PeerConnected, PeerDisconnected, Published
from sparkle_mesh.fabric.memory import MemoryFabricNetwork


@pytest.fixture
def network() -> MemoryFabricNetwork:
    return MemoryFabricNetwork(delay_s=0.5)


@pytest.fixture
async def trio_of_fabrics(network):
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(network.open(name)) for name in ("a", "b", "c")]


async def echo(stream) -> None:
    while data := await stream.read(100):
        await stream.write(data)
    await stream.aclose()


async def test_identities_and_addresses(autojump_clock, network):
    identity = Identity.generate()
    async with network.open(identity) as one, network.open() as two, network.open("x", addresses=["/a", "/b"]) as three:
        assert one.peer_id == identity.peer_id
        assert two.peer_id.startswith("12D3KooW")
        assert three.addresses == ("/a", "/b")
        assert not set(one.addresses) & set(two.addresses)
        with pytest.raises(UsageError, match="x is open"):
            async with network.open("x"):
                pytest.fail("two of one name")
    async with network.open("x"):
        pass


async def test_everything_takes_the_delay(autojump_clock, trio_of_fabrics):
    a, b, _ = trio_of_fabrics
    b.handle("/echo", echo)
    start = trio.current_time()
    await a.connect("b", b.addresses)
    assert trio.current_time() - start == 1.0
    stream = await a.open_stream("b", "/echo")
    assert trio.current_time() - start == 2.0
    await stream.write(b"one")
    await stream.write(b"two")
    assert trio.current_time() - start == 2.0
    assert await stream.read(100) == b"one"
    assert await stream.read(100) == b"two"
    assert trio.current_time() - start == 3.0
    async with b.events() as events:
        assert await events.receive() == PeerConnected("a", a.addresses[0], outbound=False)
        await a.disconnect("b")
        assert await events.receive() == PeerDisconnected("a")
    assert trio.current_time() - start == 3.5


async def test_a_partition_holds_everything_back_until_it_heals(autojump_clock, trio_of_fabrics, network):
    a, b, c = trio_of_fabrics
    b.handle("/echo", echo)
    await a.connect("b", b.addresses)
    await a.connect("c", c.addresses)
    stream = await a.open_stream("b", "/echo")
    await stream.write(b"before")
    network.partition({"a"}, {"b", "c"})
    await stream.write(b"after")
    with trio.move_on_after(100) as scope:
        await stream.read(100)
    assert scope.cancelled_caught
    with pytest.raises(UnreachableError, match="did not answer within 3 s"):
        await a.open_stream("b", "/echo", timeout_s=3)
    await a.disconnect("c")
    with pytest.raises(UnreachableError, match="no answer within 3 s"):
        await a.connect("c", c.addresses, timeout_s=3)
    assert b.connected_peers() == {"a"}
    assert c.connected_peers() == {"a"}
    await b.connect("c", c.addresses)
    network.heal()
    assert await stream.read(100) == b"before"
    assert await stream.read(100) == b"after"
    assert c.connected_peers() == {"b"}


async def test_a_kill_is_seen_by_the_others_after_the_delay(autojump_clock, trio_of_fabrics, network):
    a, b, c = trio_of_fabrics
    ended = trio.Event()

    async def hang(stream) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    b.handle("/hang", hang)
    await a.connect("b", b.addresses)
    await c.connect("b", b.addresses)
    stream = await a.open_stream("b", "/hang")
    network.kill("b")
    await ended.wait()
    with pytest.raises(ClosedError):
        await b.connect("a", a.addresses)
    with pytest.raises(ClosedError):
        await b.publish("t", b"")
    assert a.connected_peers() == {"b"}
    with pytest.raises(LinkClosedError, match="b closed the connection"):
        await stream.read(1)
    assert a.connected_peers() == c.connected_peers() == frozenset()
    with pytest.raises(UnreachableError, match="connection refused"):
        await a.connect("b", b.addresses)


async def test_deliveries_to_the_dead_are_lost(autojump_clock, trio_of_fabrics, network):
    a, b, _ = trio_of_fabrics
    b.handle("/echo", echo)
    await a.connect("b", b.addresses)
    stream = await a.open_stream("b", "/echo")
    await stream.write(b"x")
    network.kill("b")
    await trio.sleep(10)
    with pytest.raises(LinkClosedError):
        await stream.write(b"x")
    async with network.open("b") as reborn:
        reborn.handle("/echo", echo)
        await a.connect("b", reborn.addresses)
        stream = await a.open_stream("b", "/echo")
        await stream.write(b"y")
        assert await stream.read(10) == b"y"


async def test_a_peer_that_dies_while_a_stream_is_opened(autojump_clock, trio_of_fabrics, network):
    a, b, _ = trio_of_fabrics
    b.handle("/echo", echo)
    await a.connect("b", b.addresses)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.testing.wait_all_tasks_blocked)
        nursery.start_soon(b.disconnect, "a")
        with pytest.raises(UnreachableError, match="went away"):
            await a.open_stream("b", "/echo")


async def test_writes_wait_for_a_slow_reader(autojump_clock, trio_of_fabrics):
    a, b, _ = trio_of_fabrics
    served = trio.open_memory_channel(1)
    b.handle("/hold", served[0].send)
    await a.connect("b", b.addresses)
    stream = await a.open_stream("b", "/hold")
    other = await served[1].receive()
    data = bytes(range(256)) * (limits.MEMORY_STREAM_BUFFER_MAX_BYTES // 128)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, data)
        await trio.sleep(100)
        assert len(nursery.child_tasks) == 1
        received = bytearray()
        while len(received) < len(data):
            received += await other.read(100_000)
    assert received == data


async def test_publications_go_on_by_way_of_subscribers(autojump_clock, trio_of_fabrics):
    a, b, c = trio_of_fabrics
    await a.connect("b", b.addresses)
    await b.connect("c", c.addresses)
    async with c.subscribe("t") as messages:
        await a.publish("t", b"lost: nobody between subscribes")
        await trio.sleep(5)
        async with b.subscribe("t"):
            await a.publish("t", b"passed on")
            assert await messages.receive() == Published("a", b"passed on")
    with pytest.raises(UsageError, match="at most"):
        await a.publish("t", bytes(limits.GOSSIP_MESSAGE_MAX_BYTES + 1))


async def test_what_was_seen_is_remembered_in_bounds(autojump_clock, trio_of_fabrics):
    a, _, _ = trio_of_fabrics
    for _ in range(limits.GOSSIP_SEEN_MAX_COUNT + 5):
        await a.publish("t", b"")
    assert len(a._seen) == limits.GOSSIP_SEEN_MAX_COUNT


async def test_it_has_no_port_and_no_descriptors(autojump_clock, trio_of_fabrics):
    a, _, _ = trio_of_fabrics
    a.handle_raw(b"MAGIC", trio.aclose_forcefully)
    a.close_in_child()
