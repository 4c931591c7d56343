"""What every fabric promises, in memory and over libp2p."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, UnreachableError, UsageError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import PeerConnected, PeerDisconnected, Published


async def read_exactly(stream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = await stream.read(count - len(data))
        assert piece, f"the stream ended after {len(data)} of {count} bytes"
        data += piece
    return bytes(data)


async def wait_for_no_peers(fabric) -> None:
    async with fabric.events() as events:
        peers = set(fabric.connected_peers())
        while peers:
            event = await events.receive()
            if isinstance(event, PeerDisconnected):
                peers.discard(event.peer_id)


async def test_connecting_is_told_to_both_sides(open_fabric):
    async with open_fabric() as one, open_fabric() as other, one.events() as ones, other.events() as others:
        assert one.peer_id != other.peer_id
        assert one.connected_peers() == frozenset()
        assert one.remote_address(other.peer_id) is None
        await one.connect(other.peer_id, other.addresses)
        assert await ones.receive() == PeerConnected(other.peer_id, other.addresses[0], outbound=True)
        event = await others.receive()
        assert isinstance(event, PeerConnected)
        assert event.peer_id == one.peer_id
        assert not event.outbound
        assert event.remote_address == other.remote_address(one.peer_id)
        assert one.connected_peers() == {other.peer_id}
        assert other.connected_peers() == {one.peer_id}
        assert one.remote_address(other.peer_id) == other.addresses[0]


async def test_events_begin_with_the_peers_present(pair):
    one, other = pair
    async with one.events() as events:
        assert events.receive_nowait() == PeerConnected(other.peer_id, other.addresses[0], outbound=True)
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()


async def test_connecting_again_is_no_event(pair):
    one, other = pair
    async with one.events() as events:
        await events.receive()
        await one.connect(other.peer_id, [])
        await one.connect(other.peer_id, other.addresses)
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()


async def test_disconnecting_is_told_to_both_sides(pair):
    one, other = pair
    async with one.events() as ones, other.events() as others:
        await ones.receive()
        await others.receive()
        await one.disconnect(other.peer_id)
        assert await ones.receive() == PeerDisconnected(other.peer_id)
        assert await others.receive() == PeerDisconnected(one.peer_id)
        await one.disconnect(other.peer_id)
    assert one.connected_peers() == other.connected_peers() == frozenset()
    await one.connect(other.peer_id, other.addresses)
    assert one.connected_peers() == {other.peer_id}


async def test_a_fabric_that_closes_is_seen_to_go(open_fabric):
    async with open_fabric() as one:
        async with open_fabric() as other:
            await one.connect(other.peer_id, other.addresses)
            async with other.events() as events:
                await events.receive()
        with trio.fail_after(10):
            await wait_for_no_peers(one)
        with pytest.raises(UnreachableError):
            await one.connect(other.peer_id, other.addresses, timeout_s=5)


async def test_simultaneous_dials_leave_a_connection(open_fabric, echo, check_serving):
    async with open_fabric() as one, open_fabric() as other:
        other.handle("/echo", echo)
        async with one.events() as events:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.connect, other.peer_id, other.addresses)
                nursery.start_soon(other.connect, one.peer_id, one.addresses)
            assert isinstance(await events.receive(), PeerConnected)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert one.connected_peers() == {other.peer_id}
            assert other.connected_peers() == {one.peer_id}
            with pytest.raises(trio.WouldBlock):
                events.receive_nowait()
        await check_serving(one, other)


async def test_many_concurrent_calls_make_one_connection(open_fabric):
    async with open_fabric() as one, open_fabric() as other, other.events() as events:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one.connect, other.peer_id, other.addresses)
        assert isinstance(await events.receive(), PeerConnected)
        await one.disconnect(other.peer_id)
        assert isinstance(await events.receive(), PeerDisconnected)


async def test_another_peer_at_the_address_is_refused(open_fabric):
    wanted = Identity.generate().peer_id
    async with open_fabric() as one, open_fabric() as other:
        with pytest.raises(UnreachableError, match=other.peer_id) as caught:
            await one.connect(wanted, other.addresses)
        assert wanted in str(caught.value)
        assert other.addresses[0] in str(caught.value)
        assert wanted not in one.connected_peers()


async def test_every_address_that_failed_is_listed(open_fabric):
    addresses = ["/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.2/tcp/1"]
    async with open_fabric() as one:
        with pytest.raises(UnreachableError) as caught:
            await one.connect(Identity.generate().peer_id, addresses)
        for address in addresses:
            assert f"{address}: connection refused" in str(caught.value)
        with pytest.raises(UnreachableError, match="no address is known"):
            await one.connect(Identity.generate().peer_id, [])


async def test_a_good_address_after_bad_ones(open_fabric):
    async with open_fabric() as one, open_fabric() as other:
        await one.connect(other.peer_id, ["/ip4/127.0.0.1/tcp/1", *other.addresses])
        assert one.connected_peers() == {other.peer_id}


async def test_connecting_to_oneself_is_a_mistake(open_fabric):
    async with open_fabric() as one:
        with pytest.raises(UsageError, match="itself"):
            await one.connect(one.peer_id, one.addresses)


async def test_streams_carry_bytes_both_ways(pair, echo):
    one, other = pair
    other.handle("/echo", echo)
    one.handle("/echo", echo)
    data = bytes(range(256)) * 4000
    for client, server in ((one, other), (other, one)):
        stream = await client.open_stream(server.peer_id, "/echo")
        assert stream.peer_id == server.peer_id
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, data)
            assert await read_exactly(stream, len(data)) == data
        await stream.aclose()


async def test_what_was_sent_before_closing_is_read_and_then_the_end(pair):
    one, other = pair

    async def say(stream) -> None:
        assert stream.peer_id == one.peer_id
        await stream.write(b"last words")
        await stream.aclose()
        await stream.aclose()

    other.handle("/say", say)
    stream = await one.open_stream(other.peer_id, "/say")
    assert await read_exactly(stream, 10) == b"last words"
    assert await stream.read(10) == b""
    assert await stream.read(10) == b""
    with pytest.raises(LinkClosedError):
        await stream.write(b"anybody?")


async def test_a_stream_closed_here_is_closed(pair, echo):
    one, other = pair
    other.handle("/echo", echo)
    stream = await one.open_stream(other.peer_id, "/echo")
    await stream.aclose()
    with pytest.raises(LinkClosedError, match="closed here"):
        await stream.read(1)
    with pytest.raises(LinkClosedError, match="closed here"):
        await stream.write(b"x")
    await stream.aclose()
    await stream.reset()


async def test_closing_wakes_the_reader_here(pair):
    one, other = pair
    served = trio.open_memory_channel(1)
    other.handle("/hold", served[0].send)
    stream = await one.open_stream(other.peer_id, "/hold")
    raised = []

    async def read() -> None:
        with pytest.raises(LinkClosedError) as caught:
            await stream.read(1)
        raised.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await stream.aclose()
    assert raised


async def test_a_reset_fails_the_peer(pair):
    one, other = pair
    outcome = trio.open_memory_channel(1)

    async def read(stream) -> None:
        try:
            await stream.read(1)
        except LinkClosedError as error:
            with pytest.raises(LinkClosedError):
                await stream.write(b"x")
            await outcome[0].send(error)

    other.handle("/read", read)
    stream = await one.open_stream(other.peer_id, "/read")
    await stream.reset()
    assert isinstance(await outcome[1].receive(), LinkClosedError)
    with pytest.raises(LinkClosedError):
        await stream.read(1)
    await stream.reset()


async def test_streams_fail_with_their_connection(pair):
    one, other = pair
    served = trio.open_memory_channel(1)
    other.handle("/hold", served[0].send)
    stream = await one.open_stream(other.peer_id, "/hold")
    theirs = await served[1].receive()
    await one.disconnect(other.peer_id)
    for end in (stream, theirs):
        with pytest.raises(LinkClosedError):
            await end.read(1)
        with pytest.raises(LinkClosedError):
            await end.write(b"x")
        await end.aclose()
        await end.reset()


async def test_what_arrived_before_the_connection_ended_is_read(pair):
    one, other = pair
    served = trio.open_memory_channel(1)
    one.handle("/receive", served[0].send)
    sender = await other.open_stream(one.peer_id, "/receive")
    receiver = await served[1].receive()
    await sender.write(b"farewell")
    await sender.aclose()
    await other.disconnect(one.peer_id)
    await wait_for_no_peers(one)
    assert await read_exactly(receiver, 4) == b"fare"
    assert await read_exactly(receiver, 4) == b"well"
    assert await receiver.read(4) == b""


async def test_a_slow_reader_holds_the_writer_back(pair):
    one, other = pair
    served = trio.open_memory_channel(1)
    other.handle("/hold", served[0].send)
    stream = await one.open_stream(other.peer_id, "/hold")
    theirs = await served[1].receive()
    block = bytes(range(256)) * 256
    written_count = 0
    stalled = False
    while not stalled:
        assert written_count < 16, "1 MiB was written that nobody has read"
        with trio.move_on_after(0.3) as scope:
            await stream.write(block)
            written_count += 1
        stalled = scope.cancelled_caught
    assert await read_exactly(theirs, written_count * len(block)) == block * written_count


async def test_protocols_that_nobody_serves(pair):
    one, other = pair
    with pytest.raises(UnreachableError, match="/nobody"):
        await one.open_stream(other.peer_id, "/nobody")
    with pytest.raises(UnreachableError, match="not connected"):
        await one.open_stream(Identity.generate().peer_id, "/nobody")


@pytest.mark.parametrize("error", [ValueError("bad"), LinkClosedError("gone"), ExceptionGroup("two", [ValueError()])])
async def test_a_handler_that_raises_ends_its_stream_alone(pair, echo, check_serving, error):
    one, other = pair

    async def fail(stream) -> None:
        await stream.read(1)
        raise error

    other.handle("/fail", fail)
    other.handle("/echo", echo)
    stream = await one.open_stream(other.peer_id, "/fail")
    await stream.write(b"x")
    with pytest.raises(LinkClosedError):
        await stream.read(1)
    assert other.counters.handler_failures == 1
    await check_serving(one, other)


async def test_publications_reach_subscribers_and_not_the_publisher(pair):
    one, other = pair
    async with other.subscribe("topic") as messages, other.subscribe("topic") as copies, one.subscribe("topic") as own:
        async with trio.open_nursery() as nursery:

            async def publish() -> None:
                while True:
                    await one.publish("topic", b"data")
                    await one.publish("elsewhere", b"other data")
                    await trio.sleep(0.1)

            nursery.start_soon(publish)
            assert await messages.receive() == Published(one.peer_id, b"data")
            assert await copies.receive() == Published(one.peer_id, b"data")
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.WouldBlock):
            own.receive_nowait()
    with pytest.raises(UsageError, match="at most"):
        await one.publish("topic", bytes(limits.GOSSIP_MESSAGE_MAX_BYTES + 1))


async def test_the_largest_publication_arrives(pair):
    one, other = pair
    data = bytes(limits.GOSSIP_MESSAGE_MAX_BYTES)
    async with other.subscribe("topic") as messages, trio.open_nursery() as nursery:

        async def publish() -> None:
            while True:
                await one.publish("topic", data)
                await trio.sleep(0.2)

        nursery.start_soon(publish)
        assert (await messages.receive()).data == data
        nursery.cancel_scope.cancel()


async def test_subscriptions_and_events_end_with_the_fabric(open_fabric):
    async with open_fabric() as one:
        events_scope, messages_scope = one.events(), one.subscribe("topic")
        events, messages = await events_scope.__aenter__(), await messages_scope.__aenter__()
    with pytest.raises(trio.EndOfChannel):
        await events.receive()
    with pytest.raises(trio.EndOfChannel):
        await messages.receive()
    with trio.move_on_after(1):
        await messages_scope.__aexit__(None, None, None)
    await events_scope.__aexit__(None, None, None)


async def test_an_error_in_the_block_comes_out_bare(open_fabric):
    with pytest.raises(KeyError, match="mine"):
        async with open_fabric():
            raise KeyError("mine")
