from __future__ import annotations

import pytest
import trio
import trio.testing
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils.varint import encode_varint_prefixed

from sparkle_mesh import limits
from sparkle_mesh.fabric.gossip import _SeenMessages
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric


@pytest.fixture
async def gossiping(libp2p_pair):
    """Two fabrics whose gossip has met, and what the second receives."""
    one, other = libp2p_pair
    async with other.subscribe("topic") as messages, one.subscribe("topic"):
        with trio.fail_after(20):
            received = False
            while not received:
                await one.publish("topic", b"are you there?")
                with trio.move_on_after(0.1):
                    await messages.receive()
                    received = True
        await trio.testing.wait_all_tasks_blocked(0.2)
        while True:
            try:
                messages.receive_nowait()
            except trio.WouldBlock:
                break
        yield one, other, messages


def forged(one, **fields) -> rpc_pb2.RPC:
    fields = {"data": b"forged", "topicIDs": ["topic"], "seqno": b"12345678", **fields}
    fields.setdefault("from_id", one._swarm.get_peer_id().to_bytes())
    return rpc_pb2.RPC(publish=[rpc_pb2.Message(**fields)])


async def test_ordinary_bursts_are_not_dropped(gossiping):
    one, _, messages = gossiping
    for number in range(200):
        await one.publish("topic", b"%d" % number)
        if number % 50 == 49:
            await trio.testing.wait_all_tasks_blocked(0.02)
    with trio.fail_after(10):
        assert {(await messages.receive()).data for _ in range(200)} == {b"%d" % number for number in range(200)}


async def test_large_messages_at_once_arrive_whole(gossiping):
    one, other, messages = gossiping
    payloads = {bytes([number]) * 200_000 for number in range(8)}
    async with trio.open_nursery() as nursery:
        for payload in payloads:
            nursery.start_soon(one.publish, "topic", payload)
    with trio.fail_after(20):
        assert {(await messages.receive()).data for _ in payloads} == payloads
    assert other.counters.handler_failures == 0


async def test_concurrent_writers_to_one_peer_do_not_mix(gossiping):
    one, other, messages = gossiping
    pubsub = one._gossip._pubsub
    (stream,) = pubsub.peers.values()
    rpcs = [forged(one, data=bytes([number]) * 200_000) for number in range(4)]
    async with trio.open_nursery() as nursery:
        for rpc in rpcs:
            nursery.start_soon(pubsub.write_msg, stream, rpc)
    await one.publish("topic", b"honest")
    with trio.fail_after(10):
        assert (await messages.receive()).data == b"honest"
    assert other.counters.handler_failures == 0


async def test_a_message_that_was_cut_short_ends_its_stream(gossiping):
    one, _other, _messages = gossiping
    pubsub = one._gossip._pubsub
    (stream,) = pubsub.peers.values()
    await stream.reset()
    assert not await pubsub.write_msg(stream, forged(one))


async def test_forged_and_oversize_messages_are_dropped(gossiping):
    one, other, messages = gossiping
    rpcs = [
        forged(one),
        forged(one, signature=bytes(64)),
        forged(one, from_id=b"nobody", signature=bytes(64)),
        forged(one, from_id=b"", key=b"x", signature=b"x"),
        forged(one, topicIDs=["topic", "topic"]),
        forged(one, topicIDs=[]),
        forged(one, data=bytes(limits.GOSSIP_MESSAGE_MAX_BYTES + 1)),
    ]
    for rpc in rpcs:
        stream = await one.open_stream(other.peer_id, "/meshsub/1.1.0")
        await stream.write(encode_varint_prefixed(rpc.SerializeToString()))
        await trio.testing.wait_all_tasks_blocked(0.02)
        await stream.aclose()
    with pytest.raises(trio.WouldBlock):
        messages.receive_nowait()
    assert other.counters.publications_malformed == 3
    await one.publish("topic", b"honest")
    with trio.fail_after(10):
        assert (await messages.receive()).data == b"honest"


async def test_rpcs_over_the_limit_are_not_read(gossiping):
    one, other, messages = gossiping
    stream = await one.open_stream(other.peer_id, "/meshsub/1.1.0")
    await stream.write(b"\xff\xff\xff\x7f" + bytes(1000))
    with trio.fail_after(10):
        received = None
        while received is None:
            await one.publish("topic", b"honest")
            with trio.move_on_after(0.2):
                received = await messages.receive()
    assert received.data == b"honest"


async def test_a_topic_is_left_with_its_last_reader():
    async with open_libp2p_fabric(Identity.generate()) as fabric:
        pubsub = fabric._gossip._pubsub
        async with fabric.subscribe("topic"):
            async with fabric.subscribe("topic"):
                assert list(pubsub.topic_ids) == ["topic"]
            assert list(pubsub.topic_ids) == ["topic"]
        assert list(pubsub.topic_ids) == []
        assert not fabric._gossip._readers


def test_what_was_seen_is_remembered_in_bounds(monkeypatch):
    monkeypatch.setattr(limits, "GOSSIP_SEEN_MAX_COUNT", 2)
    seen = _SeenMessages()
    assert [seen.add(name) for name in (b"a", b"b", b"a", b"c")] == [True, True, False, True]
    assert [seen.has(name) for name in (b"a", b"b", b"c")] == [False, True, True]
