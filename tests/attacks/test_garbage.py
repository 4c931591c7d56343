"""Garbage on everything that a node reads: random, cut short, over-long, well-formed and out of place, dribbled."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.pubsub.pb import rpc_pb2

from sparkle_mesh import limits, wire
from sparkle_mesh.capabilities.messages import PROTOCOL as KAD_PROTOCOL
from sparkle_mesh.capabilities.messages import Done, Find, Sealed, seal_context
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.framing import encode_frame, receive_message, send_message
from sparkle_mesh.fabric.libp2p_fabric import Libp2pFabric
from sparkle_mesh.membership.messages import PROTOCOL as MESH_PROTOCOL
from sparkle_mesh.membership.messages import (
    Hello,
    Leave,
    Pong,
    Presence,
    Proof,
    Refused,
)
from sparkle_mesh.node import MeshNode, open_node
from sparkle_mesh.transport.connector import LinkConnector
from sparkle_mesh.transport.handshake import MAGIC

# Of everything that the honest pair does, under attack, on a machine that is busy.
DEADLINE_S = 4.0
SEED = 20


def served_by(node: MeshNode) -> list[str]:
    """Return every protocol that the node serves, whatever registered it."""
    return [str(protocol) for protocol in node.fabric._host.get_mux().get_protocols() if protocol]


def garbage() -> list[bytes]:
    chooser = random.Random(SEED)
    hello = encode_frame(Hello(version_min=1, version_max=1, nonce=b"n" * 32))
    return [
        *(chooser.randbytes(size) for size in (1, 3, 4, 5, 64, 1000, 20_000)),
        # Lengths: none, over the limit, all ones, in four bytes and as a varint.
        b"\x00" * 4,
        (limits.CONTROL_MESSAGE_MAX_BYTES + 1).to_bytes(4, "big") + b"x",
        b"\xff" * 4 + b"x" * 100,
        b"\xff" * 9 + b"\x01",
        b"\x80" * 11,
        # A message cut short, two in one, one that ends too late.
        hello[:-1],
        hello + hello,
        (len(hello) + 100).to_bytes(4, "big") + hello[4:],
        # MessagePack that announces what does not come, and that is nested too deep.
        b"\x00\x00\x00\x05\xdf\xff\xff\xff\xff",
        b"\x00\x00\x00\x05\xc6\xff\xff\xff\xff",
        (50_000).to_bytes(4, "big") + b"\x91" * 50_000,
        # What is well-formed, and means something elsewhere.
        hello,
        encode_frame(Proof(proof=b"p" * 32)),
        encode_frame(Refused(code="key", reason="no")),
        encode_frame(Pong(probe=1)),
        encode_frame(Leave()),
        encode_frame(Sealed(sealed=b"sealed" * 20)),
        encode_frame(Done()),
        rpc_pb2.RPC(publish=[rpc_pb2.Message(data=b"x", topicIDs=["a", "b"], from_id=b"me")]).SerializeToString(),
        b"\x13/multistream/1.0.0\n",
        MAGIC * 8,
        b"GET / HTTP/1.1\r\n\r\n",
    ]


async def send_garbage(attacker: Libp2pFabric, node: MeshNode, protocol: str) -> int:
    """Send all of it, each on a stream of its own; return how many streams took it."""
    taken = 0
    for number, data in enumerate(garbage()):
        with suppress(SparkleError):
            await attacker.connect(node.peer_id, node.fabric.addresses)
            stream = await attacker.open_stream(node.peer_id, protocol)
            await stream.write(data)
            taken += 1
            # Some stay open, some end here, some are cut off.
            if number % 3 == 1:
                await stream.aclose()
            elif number % 3 == 2:
                await stream.reset()
    return taken


async def test_on_every_protocol_that_is_served(honest_pair, open_strangers):
    one = honest_pair.one
    protocols = served_by(one)
    assert {MESH_PROTOCOL, KAD_PROTOCOL, "/meshsub/1.1.0", "/ipfs/ping/1.0.0", "/echo"} <= set(protocols)
    async with honest_pair.working(DEADLINE_S), open_strangers(len(protocols)) as crowd:
        for protocol, stranger in zip(protocols, crowd, strict=True):
            # Of some protocols (ping) one peer gets a few streams at a time.
            assert await send_garbage(stranger, one, protocol) > 2, protocol
    assert one.peers()
    assert one.fabric.counters.handler_failures > 0


async def test_of_one_that_holds_the_key(honest_pair, node_config, until):
    """On the streams of one that is admitted: it is let go, and banned in the end."""
    one = honest_pair.one
    async with honest_pair.working(DEADLINE_S), open_node(node_config(one)) as insider:
        await until(lambda: one.peer_id in insider.membership.channels)
        await until(lambda: insider.peer_id in one.membership.channels)
        # It breaks the DHT's protocol often enough: it is let go, and comes in no more.
        await send_garbage(insider.fabric, one, KAD_PROTOCOL)
        await until(lambda: insider.peer_id not in one.membership.channels)
        assert not one.membership.is_welcome(insider.peer_id)
        # What is sealed well gets no answer from now on either.
        with suppress(SparkleError):
            await insider.fabric.connect(one.peer_id, one.fabric.addresses)
            stream = await insider.fabric.open_stream(one.peer_id, KAD_PROTOCOL)
            sealed = insider.secrets.seal(
                wire.encode(Find(key=b"k" * 32)), context=seal_context(insider.peer_id, one.peer_id)
            )
            await send_message(stream, Sealed(sealed=sealed))
            await receive_message(stream, Sealed, max_bytes=limits.KAD_FRAME_MAX_BYTES)
            pytest.fail("one that is banned was answered")


@pytest.mark.parametrize(
    "message",
    [
        Hello(version_min=1, version_max=1, nonce=b"n" * 32),
        Presence(role="node", incarnation=b"i" * 16, addresses=()),
    ],
    ids=lambda message: type(message).__name__,
)
async def test_messages_out_of_place_of_one_that_is_admitted(honest_pair, node_config, until, message):
    one = honest_pair.one
    async with honest_pair.working(DEADLINE_S), open_node(node_config(one)) as insider:
        await until(lambda: one.peer_id in insider.membership.channels)
        await until(lambda: insider.peer_id in one.membership.channels)
        channel = one.membership.channels[insider.peer_id]
        insider.membership.channels[one.peer_id].send(message)
        await until(lambda: channel.gone_reason is not None)
        assert "it broke the protocol" in channel.gone_reason


STARTS = [
    b"",
    b"\x13",
    b"\x13/multistream/1.0.0\n",
    b"\x13/multistream/1.0.0\n\x07/noise\n",
    b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20" + b"e" * 32,
    b"\x13/multistream/1.0.0\n\x0f/yamux/1.0.0\n\n",
    MAGIC[:5],
    MAGIC,
]


async def test_on_the_port_below_every_protocol(honest_pair, until):
    """Before and in the handshakes of multistream and Noise, and with the magic of a direct link."""
    one = honest_pair.one
    port = int(one.fabric.addresses[0].rpartition("/")[2])
    async with (
        honest_pair.working(DEADLINE_S),
        LinkConnector(one.fabric, mesh_id=one.secrets.mesh_id, authorize=one.membership.is_admitted),
    ):
        before = one.fabric.counters.upgrades_failed + one.fabric.counters.handler_failures
        sent = 0
        for start in STARTS:
            for data in garbage():
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(start + data)
                await stream.aclose()
                sent += 1
        await until(lambda: one.fabric.counters.upgrades_failed + one.fabric.counters.handler_failures >= before + sent)
        assert one.fabric.connected_peers() == {honest_pair.other.peer_id}
    assert len(one.fabric._port._gate) == 0


async def test_in_the_frames_of_a_proven_connection(honest_pair, open_strangers):
    one = honest_pair.one
    async with honest_pair.working(DEADLINE_S), open_strangers(1) as (stranger,):
        for data in garbage():
            with suppress(SparkleError):
                await stranger.connect(one.peer_id, one.fabric.addresses)
            for connection in list(stranger._connections.get(one.peer_id, ())):
                # It ends at the first header of no known version or type.
                with suppress(ConnectionClosedError):
                    await connection.muxed_conn._write_frame(data)
                    await connection.muxed_conn._write_frame(bytes(12 - len(data) % 12))
            await stranger.disconnect(one.peer_id)


async def test_on_the_topic_of_the_mesh(honest_pair, open_strangers, until):
    """A stranger sees the topic's name. What it publishes there is neither taken nor passed on."""
    one, other = honest_pair.one, honest_pair.other
    topic = one.secrets.topic
    async with honest_pair.working(DEADLINE_S), open_strangers(1) as (stranger,), stranger.subscribe(topic):
        await stranger.connect(one.peer_id, one.fabric.addresses)
        refused, heard = one.fabric.counters.publications_refused, other.fabric.counters.publications_refused
        # Until gossip has met.
        while one.fabric.counters.publications_refused == refused:
            await stranger.publish(topic, b"junk")
            await trio.sleep(0.05)
        refused = one.fabric.counters.publications_refused
        for data in garbage():
            await stranger.publish(topic, data)
        # Overheard, and published once more.
        genuine = one.secrets.seal(b"whatever", context=f"news\0{other.peer_id}".encode())
        await stranger.publish(topic, genuine)
        await until(lambda: one.fabric.counters.publications_refused >= refused + len(garbage()) + 1)
        assert other.fabric.counters.publications_refused == heard


async def dribble(write: Callable[[bytes], Any], data: bytes) -> None:
    """Write byte after byte, until nobody takes it."""
    with suppress(SparkleError, trio.BrokenResourceError):
        for byte in data:
            await write(bytes([byte]))
            await trio.sleep(0.1)
        pytest.fail("a dribble was taken to its end")


async def dribble_at(port: int, start: bytes) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await dribble(stream.send_all, start + bytes(60))


# Frames of a length that may be, and never come to their end.
DRIBBLED = (4000).to_bytes(4, "big") + b"\x91" * 100
MULTISTREAM = b"\x13/multistream/1.0.0\n\x07/noise\n\x20\x00"


async def test_dribbled_on_one_stream_or_socket(honest_pair, open_strangers, monkeypatch, until):
    """A byte now and then, so that nothing is ever silent: the deadlines count from the start."""
    one = honest_pair.one
    port = int(one.fabric.addresses[0].rpartition("/")[2])
    async with honest_pair.working(DEADLINE_S), open_strangers(2) as crowd:
        for name in ("UPGRADE_TIMEOUT_S", "MESH_PROOF_TIMEOUT_S", "KAD_STREAM_IDLE_S"):
            monkeypatch.setattr(limits, name, 0.7)
        with trio.fail_after(3.0):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(dribble_at, port, MULTISTREAM)
                nursery.start_soon(dribble_at, port, MAGIC[:5] + b"x" + MULTISTREAM)
                # One peer each: who is refused on the mesh's stream is let go.
                for stranger, protocol in zip(crowd, (MESH_PROTOCOL, KAD_PROTOCOL), strict=True):
                    await stranger.connect(one.peer_id, one.fabric.addresses)
                    stream = await stranger.open_stream(one.peer_id, protocol)
                    nursery.start_soon(dribble, stream.write, DRIBBLED)
    await until(lambda: not len(one.fabric._port._gate))
    assert one.membership._greeting == {}


async def test_dribbled_on_every_protocol(honest_pair, open_strangers, monkeypatch):
    """Where a stream may be slow for as long as it likes, the stranger at its other end may not."""
    one = honest_pair.one
    monkeypatch.setattr(one.membership.strangers, "_stay_max_s", 1.5)
    async with honest_pair.working(DEADLINE_S), open_strangers(1) as (stranger,):
        await stranger.connect(one.peer_id, one.fabric.addresses)
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                for protocol in served_by(one):
                    stream = await stranger.open_stream(one.peer_id, protocol)
                    nursery.start_soon(dribble, stream.write, DRIBBLED)
