"""Each guard around py-libp2p, by what happens without it."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
import warnings
from contextlib import suppress

import psutil
import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from multiaddr import Multiaddr

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, UnreachableError
from sparkle_mesh.fabric import guards
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric


def port_of(fabric) -> int:
    return int(fabric.addresses[0].rpartition("/")[2])


def socket_count() -> int:
    gc.collect()
    return sum(1 for entry in psutil.Process().net_connections("tcp") if entry.status != psutil.CONN_CLOSE)


async def test_a_plaintext_dial_is_refused(echo, check_serving):
    key_pair = create_new_key_pair()
    security = {PLAINTEXT_PROTOCOL_ID: InsecureTransport(key_pair)}
    async with open_libp2p_fabric(Identity.generate()) as fabric, open_libp2p_fabric(Identity.generate()) as honest:
        fabric.handle("/echo", echo)
        host = new_host(key_pair=key_pair, sec_opt=security)
        async with host.run(listen_addrs=[]):
            info = PeerInfo(ID.from_base58(fabric.peer_id), [Multiaddr(fabric.addresses[0])])
            with pytest.raises(Exception, match="unable to connect"), trio.fail_after(20):
                await host.connect(info)
            await host.close()
        assert fabric.connected_peers() == frozenset()
        await check_serving(honest, fabric)


async def test_an_honest_py_libp2p_host_is_accepted(echo):
    """The counterpart of the test above: it is the plaintext that is refused."""
    async with open_libp2p_fabric(Identity.generate()) as fabric:
        host = new_host(key_pair=create_new_key_pair())
        async with host.run(listen_addrs=[]):
            await host.connect(PeerInfo(ID.from_base58(fabric.peer_id), [Multiaddr(fabric.addresses[0])]))
            assert fabric.connected_peers() == {host.get_id().to_base58()}
            await host.close()


GARBAGE = [
    b"\x00",
    b"\xff" * 64,
    b"\x05hello",
    b"\x80" * 11,
    bytes(range(256)),
    b"\x0a\x03\x08\x01",
    b"\xff\xff\xff\xff\x0f",
]


async def test_garbage_on_every_protocol_leaves_the_node_serving(libp2p_pair, echo, check_serving):
    one, other = libp2p_pair
    other.handle("/echo", echo)
    protocols = list(other._host.get_mux().get_protocols())
    assert {"/meshsub/1.1.0", "/meshsub/1.0.0", "/ipfs/id/1.0.0", "/ipfs/ping/1.0.0"} <= set(map(str, protocols))
    assert "/ipfs/id/push/1.0.0" not in protocols
    for protocol in filter(None, protocols):
        for garbage in GARBAGE:
            stream = await one.open_stream(other.peer_id, protocol)
            await stream.write(garbage)
            await stream.aclose()
    await trio.testing.wait_all_tasks_blocked(0.05)
    await check_serving(one, other)


async def test_garbage_after_the_first_bytes_of_a_connection(echo, check_serving):
    async with open_libp2p_fabric(Identity.generate()) as fabric, open_libp2p_fabric(Identity.generate()) as honest:
        fabric.handle("/echo", echo)
        for start in (
            b"",
            b"\x13/multistream/1.0.0\n",
            b"\x13/multistream/1.0.0\n\x07/noise\n",
            b"GET / HTTP/1.1\r\n\r\n",
        ):
            for garbage in GARBAGE:
                stream = await trio.open_tcp_stream("127.0.0.1", port_of(fabric))
                await stream.send_all(start + garbage)
                await stream.aclose()
        await check_serving(honest, fabric)
        assert fabric.connected_peers() == {honest.peer_id}


async def test_garbage_frames_on_a_proven_connection(libp2p_pair, echo, check_serving):
    one, other = libp2p_pair
    other.handle("/echo", echo)
    for garbage in GARBAGE:
        await one.connect(other.peer_id, other.addresses)
        connection = one._connections[other.peer_id][0]
        await connection.muxed_conn._write_frame(garbage * 12)
        await one.disconnect(other.peer_id)
    await check_serving(one, other)


async def test_a_peer_that_ignores_its_window_loses_the_connection(libp2p_pair, echo, check_serving, monkeypatch):
    one, other = libp2p_pair
    monkeypatch.setattr(limits, "UNREAD_BYTES_PER_CONNECTION_MAX", 512 * 1024)
    served = trio.open_memory_channel(1)
    other.handle("/hold", served[0].send)
    other.handle("/echo", echo)
    stream = await one.open_stream(other.peer_id, "/hold")
    theirs = await served[1].receive()
    stream._muxed.send_window = 1 << 30
    with trio.fail_after(20), suppress(LinkClosedError):
        while True:
            await stream.write(bytes(60_000))
    assert sum(map(len, theirs._muxed.conn.stream_buffers.values())) <= limits.UNREAD_BYTES_PER_CONNECTION_MAX
    with trio.fail_after(10):
        async with one.events() as events:
            while one.connected_peers():
                await events.receive()
    await check_serving(one, other)


async def test_small_reads_neither_grow_a_window_nor_are_answered(libp2p_pair, echo, monkeypatch):
    one, other = libp2p_pair
    other.handle("/echo", echo)
    stream = await one.open_stream(other.peer_id, "/echo")
    updates = []

    async def count(increment: int) -> None:
        updates.append(increment)

    monkeypatch.setattr(stream._muxed, "send_window_update", count)
    for _ in range(50):
        await stream.write(b"x")
        await stream.read(1)
    assert stream._muxed.target_recv_window == 256 * 1024
    assert updates == []


async def test_a_connection_that_takes_nothing_is_given_up(libp2p_pair, monkeypatch):
    one, other = libp2p_pair
    monkeypatch.setattr(limits, "FRAME_WRITE_TIMEOUT_S", 0.1)
    muxed_conn = one._connections[other.peer_id][0].muxed_conn

    async def clog(data: bytes) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(muxed_conn.secured_conn, "write", clog)
    with pytest.raises(UnreachableError, match=r"took nothing for 0.1 s"), trio.fail_after(10):
        await one.open_stream(other.peer_id, "/echo")


async def test_cancelled_writers_do_not_break_the_connection(libp2p_pair, echo, check_serving):
    one, other = libp2p_pair
    served = trio.open_memory_channel(10)
    other.handle("/hold", served[0].send)
    other.handle("/echo", echo)
    for steps in range(10):
        stream = await one.open_stream(other.peer_id, "/hold")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, bytes(1 << 20))
            for _ in range(steps * 7):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        await stream.reset()
    async with one.events() as events:
        await events.receive()
        await check_serving(one, other)
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()


async def test_the_257th_stream_waits_until_its_deadline(libp2p_pair, echo):
    one, other = libp2p_pair
    served = trio.open_memory_channel(300)
    other.handle("/hold", served[0].send)
    places = one._connections[other.peer_id][0].muxed_conn.stream_backlog_semaphore
    streams = [await one.open_stream(other.peer_id, "/hold") for _ in range(3)]
    assert 240 < places.value < 256
    while places.value:
        await places.acquire()
    with pytest.raises(UnreachableError, match=r"did not answer within 0.2 s when a /hold stream"), trio.fail_after(10):
        await one.open_stream(other.peer_id, "/hold", timeout_s=0.2)
    await streams.pop().reset()
    streams.append(await one.open_stream(other.peer_id, "/hold"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.open_stream, other.peer_id, "/hold")
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        await streams.pop().reset()


async def test_cancelled_opens_leak_no_place(libp2p_pair, echo, check_serving):
    one, other = libp2p_pair
    other.handle("/echo", echo)
    semaphore = one._connections[other.peer_id][0].muxed_conn.stream_backlog_semaphore
    before = semaphore.value
    for steps in range(40):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.open_stream, other.peer_id, "/nobody")
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    assert semaphore.value == before
    await check_serving(one, other)


async def test_too_many_inbound_streams_are_reset(libp2p_pair, echo, monkeypatch):
    one, other = libp2p_pair
    monkeypatch.setattr(limits, "INBOUND_STREAMS_PER_CONNECTION_MAX_COUNT", 20)
    served = trio.open_memory_channel(100)
    other.handle("/hold", served[0].send)
    with suppress(UnreachableError):
        for _ in range(25):
            await one.open_stream(other.peer_id, "/hold", timeout_s=5)
    assert 0 < served[1].statistics().current_buffer_used <= 20
    assert other.counters.handler_failures > 0


async def test_idle_sockets_do_not_keep_honest_dials_out(echo, check_serving):
    async with open_libp2p_fabric(Identity.generate()) as fabric, open_libp2p_fabric(Identity.generate()) as honest:
        fabric.handle("/echo", echo)
        idle = []
        try:
            for _ in range(500):
                idle.append(socket.create_connection(("127.0.0.1", port_of(fabric))))
                await trio.lowlevel.checkpoint()
            with trio.fail_after(3):
                await check_serving(honest, fabric)
            assert len(fabric._port._gate) <= limits.UNPROVEN_SOCKETS_MAX_COUNT
            assert fabric.counters.sockets_refused >= 500 - limits.UNPROVEN_SOCKETS_MAX_COUNT - 50
        finally:
            for sock in idle:
                sock.close()


async def test_an_unproven_socket_is_closed_in_time(monkeypatch):
    monkeypatch.setattr(limits, "UPGRADE_TIMEOUT_S", 0.05)
    async with open_libp2p_fabric(Identity.generate()) as fabric:
        fabric.handle_raw(b"MAGIC", trio.aclose_forcefully)
        for start in (b"", b"MAG"):
            stream = await trio.open_tcp_stream("127.0.0.1", port_of(fabric))
            await stream.send_all(start)
            with trio.fail_after(5), suppress(trio.BrokenResourceError):
                assert await stream.receive_some() == b""
            await stream.aclose()
        assert fabric.counters.upgrades_failed == 2


async def test_closed_inbound_connections_leave_no_task_behind(echo):
    async with open_libp2p_fabric(Identity.generate()) as fabric, open_libp2p_fabric(Identity.generate()) as other:
        await other.connect(fabric.peer_id, fabric.addresses)
        await other.disconnect(fabric.peer_id)
        before = None
        for _ in range(5):
            await other.connect(fabric.peer_id, fabric.addresses)
            await other.disconnect(fabric.peer_id)
            await trio.testing.wait_all_tasks_blocked(0.3)
            tasks = trio.lowlevel.current_statistics().tasks_living
            assert before is None or tasks <= before
            before = tasks


async def test_nothing_is_remembered_of_who_is_gone(echo):
    async with open_libp2p_fabric(Identity.generate()) as fabric:
        for _ in range(3):
            async with open_libp2p_fabric(Identity.generate()) as other:
                await other.connect(fabric.peer_id, fabric.addresses)
                assert fabric.connected_peers() == {other.peer_id}
            async with fabric.events() as events:
                while fabric.connected_peers():
                    await events.receive()
        assert [peer_id.to_base58() for peer_id in fabric._swarm.peerstore.peer_ids()] == [fabric.peer_id]


async def test_close_leaks_no_socket_and_no_thread(echo):
    async with open_libp2p_fabric(Identity.generate()):
        pass
    sockets, threads = socket_count(), threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        async with (
            open_libp2p_fabric(Identity.generate()) as one,
            open_libp2p_fabric(Identity.generate()) as two,
            open_libp2p_fabric(Identity.generate()) as three,
        ):
            await one.connect(two.peer_id, two.addresses)
            await two.connect(three.peer_id, three.addresses)
            idle = await trio.open_tcp_stream("127.0.0.1", port_of(one))
            with trio.CancelScope() as scope:
                async with one.subscribe("topic"):
                    scope.cancel()
        await idle.aclose()
        gc.collect()
    await trio.testing.wait_all_tasks_blocked()
    assert socket_count() == sockets
    assert threading.active_count() <= threads


async def test_a_cancelled_block_closes_too(echo):
    sockets = socket_count()
    with trio.CancelScope() as scope:
        async with open_libp2p_fabric(Identity.generate()) as one, open_libp2p_fabric(Identity.generate()) as two:
            await one.connect(two.peer_id, two.addresses)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert socket_count() == sockets


async def test_it_dials_nobody_by_itself(libp2p_pair):
    one, other = libp2p_pair
    async with open_libp2p_fabric(Identity.generate()) as third:
        one._host.get_peerstore().add_addrs(ID.from_base58(third.peer_id), [Multiaddr(third.addresses[0])], 1000)
        # What py-libp2p would take for too few connections, and seek more.
        one._swarm.connection_config.min_connections = one._swarm.connection_config.low_watermark = 10
        await one.disconnect(other.peer_id)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert one.connected_peers() == third.connected_peers() == frozenset()


async def test_a_failing_task_of_the_library_ends_alone(libp2p_pair, echo, check_serving):
    one, other = libp2p_pair
    other.handle("/echo", echo)

    async def fail() -> None:
        raise RuntimeError("a bug")

    other._tasks.run_task(fail)
    other._tasks.run_daemon_task(fail, name="daemon")
    await trio.testing.wait_all_tasks_blocked()
    assert other.counters.handler_failures == 2
    await check_serving(one, other)


@pytest.mark.parametrize("configure", ["", "logging.basicConfig()"])
def test_the_librarys_log_is_quiet_and_the_root_logger_untouched(configure):
    code = f"""
import logging, trio
{configure}
from sparkle_mesh.errors import UnreachableError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric

async def main():
    async with open_libp2p_fabric(Identity.generate()) as one, open_libp2p_fabric(Identity.generate()) as other:
        await one.connect(other.peer_id, other.addresses)
        try:
            await one.open_stream(other.peer_id, "/nobody")
        except UnreachableError:
            await one.disconnect(other.peer_id)

before = list(logging.getLogger().handlers)
trio.run(main)
assert logging.getLogger().handlers == before, logging.getLogger().handlers
assert sum(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("libp2p").handlers) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_errors_are_described_with_their_causes():
    error = KeyError()
    error.__cause__ = ValueError("cause")
    assert guards.describe(error) == "KeyError: cause"
    assert len(guards.describe(ValueError("x" * 10_000))) == limits.REASON_MAX_CHARS
