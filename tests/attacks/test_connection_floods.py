"""Connections that are held for nothing: idle sockets, half-open handshakes, strangers, streams."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric
from sparkle_mesh.fabric.memory import MemoryFabricNetwork
from sparkle_mesh.membership.messages import PROTOCOL
from sparkle_mesh.node import MeshNode, PeerJoined, open_node

# Of everything that the honest pair does, under attack, on a machine that is busy.
DEADLINE_S = 4.0


def port_of(node: MeshNode) -> int:
    return int(node.fabric.addresses[0].rpartition("/")[2])


def served_by(node: MeshNode) -> list[str]:
    """Return every protocol that the node serves, whatever registered it."""
    return [str(protocol) for protocol in node.fabric._host.get_mux().get_protocols() if protocol]


@contextmanager
def sockets(node: MeshNode, count: int, starts: list[bytes]) -> Iterator[list[socket.socket]]:
    """Hold sockets that have sent one of ``starts`` each."""
    held: list[socket.socket] = []
    try:
        for number in range(count):
            held.append(socket.create_connection(("127.0.0.1", port_of(node))))
            held[-1].sendall(starts[number % len(starts)])
        yield held
    finally:
        for sock in held:
            sock.close()


async def test_sockets_that_say_nothing_or_half_of_it_keep_nobody_out(honest_pair, until):
    # Idle, half a greeting, half a handshake.
    starts = [b"", b"\x13/multistream", b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20half"]
    one = honest_pair.one
    with sockets(one, 400, starts):
        async with honest_pair.working(DEADLINE_S):
            await until(lambda: one.fabric.counters.sockets_refused > 100)
            assert len(one.fabric._port._gate) <= limits.UNPROVEN_SOCKETS_MAX_COUNT
            # One that comes new gets in, too.
            with trio.fail_after(DEADLINE_S):
                async with open_libp2p_fabric(Identity.generate()) as newcomer:
                    await newcomer.connect(one.peer_id, one.fabric.addresses)


async def test_strangers_make_way_for_those_who_are_of_the_mesh(honest_pair, open_strangers, node_config, until):
    one = honest_pair.one
    # Fewer places than there are strangers, though a few more than they may have: those who go take a moment.
    one.fabric._swarm.connection_config.max_connections = limits.STRANGERS_PER_ADDRESS_MAX_COUNT + 40
    count = limits.STRANGERS_PER_ADDRESS_MAX_COUNT + 60
    async with honest_pair.working(DEADLINE_S), open_strangers(count) as crowd:
        for stranger in crowd:
            with suppress(SparkleError):
                await stranger.connect(one.peer_id, one.fabric.addresses)
        assert len(one.membership.strangers) <= limits.STRANGERS_PER_ADDRESS_MAX_COUNT
        with trio.fail_after(DEADLINE_S):
            async with open_node(node_config(one)) as newcomer:
                await until(lambda: one.peer_id in newcomer.membership.channels)
        # The oldest have gone, the newest are there.

        def present(some: Any) -> int:
            return sum(stranger.peer_id in one.fabric.connected_peers() for stranger in some)

        # Those who go take a moment, longer on a busy machine.
        with trio.fail_after(DEADLINE_S):
            await until(lambda: not present(crowd[:30]))
            await until(lambda: present(crowd) <= limits.STRANGERS_PER_ADDRESS_MAX_COUNT)


@pytest.mark.parametrize("speaks", [False, True])
async def test_who_proves_nothing_is_let_go_in_time(honest_pair, open_strangers, monkeypatch, until, speaks):
    one = honest_pair.one
    monkeypatch.setattr(one.membership.strangers, "_stay_max_s", 1.0)
    opened = trio.open_memory_channel[Any](100)
    async with honest_pair.working(DEADLINE_S), open_strangers(12, beside=one) as crowd:
        for stranger in crowd:
            if speaks:
                # It takes the node's stream, and its own, and says nothing on either.
                stranger.handle(PROTOCOL, opened[0].send)
            await stranger.connect(one.peer_id, one.fabric.addresses)
            if speaks:
                await stranger.open_stream(one.peer_id, PROTOCOL)
        with trio.fail_after(DEADLINE_S):
            await until(lambda: len(one.membership.strangers) == 0)
        assert one.fabric.connected_peers() == {honest_pair.other.peer_id}
    assert one.membership._greeting == {}


async def test_streams_up_to_every_limit(honest_pair, open_strangers, monkeypatch):
    """Streams that say nothing, of one that holds as many as it gets, on its own protocol each time and on none."""
    one = honest_pair.one
    # On a busy machine these take longer than a stranger may stay, and than it has to prove itself.
    monkeypatch.setattr(one.membership.strangers, "_stay_max_s", 1000.0)
    monkeypatch.setattr(limits, "MESH_PROOF_TIMEOUT_S", 1000.0)
    async with honest_pair.working(DEADLINE_S), open_strangers(1) as (stranger,):
        await stranger.connect(one.peer_id, one.fabric.addresses)
        (connection,) = stranger._connections[one.peer_id]
        connection.muxed_conn.stream_backlog_semaphore = trio.Semaphore(10_000)
        for protocol in served_by(one):
            for _ in range(20):
                with suppress(SparkleError):
                    await stranger.open_stream(one.peer_id, protocol)
        for _ in range(limits.INBOUND_STREAMS_PER_CONNECTION_MAX_COUNT + 200):
            await connection.muxed_conn.open_stream()
        (theirs,) = one.fabric._connections[stranger.peer_id]
        inbound = [stream for stream in theirs.muxed_conn.streams.values() if not stream.is_initiator]
        assert len(inbound) > 100
        # The last ones are still on their way out.
        assert len(inbound) <= limits.INBOUND_STREAMS_PER_CONNECTION_MAX_COUNT + 20
        assert one.membership._greeting[stranger.peer_id] <= limits.MESH_STREAMS_PER_STRANGER_MAX_COUNT


async def test_a_thousand_refusals_at_one_moment_do_not_end_the_node(make_pair, open_memory_node, autojump_clock):
    """A node follows what its membership tells, which is bounded: it ended when that was told too much at once."""
    network = MemoryFabricNetwork(delay_s=0.01)
    async with (
        open_memory_node(network, "9.9.1.1") as one,
        open_memory_node(network, "9.9.2.2", one) as other,
        network.open() as stranger,
    ):
        pair = make_pair(one, other)
        await pair.meet()
        async with pair.working(DEADLINE_S):
            await stranger.connect(one.peer_id, one.fabric.addresses)
            async with trio.open_nursery() as nursery:
                for _ in range(limits.NODE_EVENTS_MAX_COUNT + 500):
                    nursery.start_soon(stranger.open_stream, one.peer_id, PROTOCOL)
            assert 0 < one.membership._greeting[stranger.peer_id] <= limits.MESH_STREAMS_PER_STRANGER_MAX_COUNT
            with one.membership.events() as events:
                await stranger.disconnect(one.peer_id)
                await trio.sleep(1.0)
                assert 0 < events.statistics().current_buffer_used < 20
        # The node still follows: one that comes is told of.
        with trio.fail_after(DEADLINE_S), one.events() as told:
            async with open_memory_node(network, "9.9.3.3", one) as third:
                async for event in told:
                    if isinstance(event, PeerJoined) and event.peer.peer_id == third.peer_id:
                        break
