"""The shared port: addresses, and who gets an accepted connection."""

from __future__ import annotations

import errno
import os
import socket
from functools import partial

import psutil
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError

from sparkle_mesh import limits
from sparkle_mesh.errors import UsageError
from sparkle_mesh.fabric import tcp
from sparkle_mesh.fabric.hubs import FabricCounters
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric


async def connect(fabric) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", int(fabric.addresses[0].rpartition("/")[2]))


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("/ip4/127.0.0.1/tcp/0", ("ip4", "127.0.0.1", 0)),
        ("/ip6/::1/tcp/65535", ("ip6", "::1", 65535)),
        ("/dns/example.org/tcp/1", ("dns", "example.org", 1)),
        ("/dns4/example.org/tcp/1/p2p/12D3KooW", ("dns4", "example.org", 1)),
    ],
)
def test_addresses_are_parsed(address, parts):
    assert tcp.parse_tcp_address(address) == parts


@pytest.mark.parametrize(
    "address",
    ["", "/", "127.0.0.1:1", "/ip4/127.0.0.1", "/ip4/127.0.0.1/udp/1", "/ip4/::1/tcp/1", "/ip6/127.0.0.1/tcp/1",
     "/ip4/127.0.0.1/tcp/65536", "/ip4/127.0.0.1/tcp/-1", "/ip4/127.0.0.1/tcp/x", "/ip4/127.0.0.1/tcp/1/ws",
     "/dns//tcp/1", "/ip4/127.0.0.1/tcp/²", "x/ip4/127.0.0.1/tcp/1", "/ip4/1.2.3.4/tcp/1/p2p-circuit"],
)  # fmt: skip
def test_other_texts_are_not_tcp_addresses(address):
    with pytest.raises(UsageError, match=r"is not a TCP address; one looks like /ip4/"):
        tcp.parse_tcp_address(address)


@given(st.text())
def test_any_text_parses_or_is_refused(text):
    try:
        tcp.parse_tcp_address(text)
    except UsageError:
        return
    assert text.startswith("/")


def test_wildcards_become_interface_addresses_with_loopback_last(monkeypatch):
    def entry(family: int, address: str) -> object:
        return type("Entry", (), {"family": family, "address": address})

    v4, v6 = socket.AF_INET, socket.AF_INET6
    interfaces = {
        "lo": [entry(v4, "127.0.0.1"), entry(v6, "::1")],
        "eth0": [entry(v4, "192.168.1.4"), entry(v6, "fe80::1%eth0"), entry(v6, "2001:db8::4")],
        "down0": [entry(v4, "10.0.0.1")],
    }
    status = {name: type("Status", (), {"isup": name != "down0"}) for name in interfaces}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: status)
    assert tcp.expand_wildcard("/ip4/0.0.0.0/tcp/5") == ["/ip4/192.168.1.4/tcp/5", "/ip4/127.0.0.1/tcp/5"]
    assert tcp.expand_wildcard("/ip6/::/tcp/5") == ["/ip6/2001:db8::4/tcp/5", "/ip6/::1/tcp/5"]
    assert tcp.expand_wildcard("/ip4/127.0.0.1/tcp/5") == ["/ip4/127.0.0.1/tcp/5"]


async def test_listening_on_wildcards_and_both_families():
    async with open_libp2p_fabric(Identity.generate(), listen=("/ip4/0.0.0.0/tcp/0", "/ip6/::1/tcp/0")) as fabric:
        assert any(address.startswith("/ip4/127.0.0.1/tcp/") for address in fabric.addresses)
        assert any(address.startswith("/ip6/::1/tcp/") for address in fabric.addresses)
        assert not any("0.0.0.0" in address for address in fabric.addresses)
        async with open_libp2p_fabric(Identity.generate(), listen=()) as other:
            assert other.addresses == ()
            v6 = [address for address in fabric.addresses if address.startswith("/ip6")]
            await other.connect(fabric.peer_id, v6)
            assert other.remote_address(fabric.peer_id) == v6[0]
            assert fabric.remote_address(other.peer_id).startswith("/ip6/::1/tcp/")


async def test_a_port_in_use_is_said_clearly():
    async with open_libp2p_fabric(Identity.generate()) as fabric:
        with pytest.raises(UsageError, match=rf"cannot listen on {fabric.addresses[0]}: Address already in use"):
            async with open_libp2p_fabric(Identity.generate(), listen=fabric.addresses):
                pytest.fail("two on one port")
    async with open_libp2p_fabric(Identity.generate(), listen=fabric.addresses) as again:
        assert again.addresses == fabric.addresses


@pytest.mark.parametrize("address", ["/ip4/192.0.2.1/tcp/0", "/dns/localhost/tcp/0", "nonsense"])
async def test_other_addresses_cannot_be_listened_on(address):
    with pytest.raises(UsageError, match=address):
        async with open_libp2p_fabric(Identity.generate(), listen=[address]):
            pytest.fail("it listens")


async def test_a_magic_leads_to_its_handler_unconsumed(libp2p_pair, echo, check_serving):
    fabric, other = libp2p_pair
    fabric.handle("/echo", echo)
    received = []

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            received.append(await stream.receive_some(100))
            await stream.send_all(b"answer")

    fabric.handle_raw(b"MAGIC-1\n", answer)
    fabric.handle_raw(b"MAGIC-2\n", answer)
    for pieces in ([b"MAGIC-1\n"], [b"MAGIC-2\nand more"], [b"M", b"AGIC", b"-1\n"]):
        stream = await connect(fabric)
        for piece in pieces:
            await stream.send_all(piece)
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert await stream.receive_some() == b"answer"
        assert await stream.receive_some() == b""
        await stream.aclose()
    assert [data[:8] for data in received] == [b"MAGIC-1\n", b"MAGIC-2\n", b"MAGIC-1\n"]
    await check_serving(other, fabric)


async def test_a_raw_handler_that_raises_ends_its_connection_alone(libp2p_pair, echo, check_serving):
    fabric, other = libp2p_pair
    fabric.handle("/echo", echo)

    async def fail(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        raise RuntimeError("a bug")

    fabric.handle_raw(b"MAGIC", fail)
    stream = await connect(fabric)
    await stream.send_all(b"MAGIC")
    with trio.fail_after(5):
        assert await stream.receive_some() == b""
    await stream.aclose()
    assert fabric.counters.handler_failures == 1
    await check_serving(other, fabric)


async def test_magics_that_cannot_be_told_apart_are_refused(libp2p_pair):
    fabric, _ = libp2p_pair
    fabric.handle_raw(b"MAGIC", trio.aclose_forcefully)
    fabric.handle_raw(b"MAGIC", trio.aclose_forcefully)
    for magic in (b"MAG", b"MAGIC-2"):
        with pytest.raises(UsageError, match="cannot be told from"):
            fabric.handle_raw(magic, trio.aclose_forcefully)
    for magic in (b"", bytes(limits.RAW_MAGIC_MAX_BYTES + 1)):
        with pytest.raises(UsageError, match="a magic has 1 to"):
            fabric.handle_raw(magic, trio.aclose_forcefully)


async def test_a_failing_accept_is_tried_again(libp2p_pair, echo, check_serving, monkeypatch):
    fabric, other = libp2p_pair
    fabric.handle("/echo", echo)
    accept = trio.SocketListener.accept
    failures = [OSError(errno.EMFILE, "Too many open files")] * 2

    async def accept_sometimes(listener: trio.SocketListener) -> trio.SocketStream:
        if failures:
            stream = await accept(listener)
            await stream.aclose()
            raise failures.pop()
        return await accept(listener)

    monkeypatch.setattr(trio.SocketListener, "accept", accept_sometimes)
    for _ in range(3):
        stream = await connect(fabric)
        await stream.aclose()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert not failures
    await other.disconnect(fabric.peer_id)
    await check_serving(other, fabric)


async def test_the_oldest_unproven_of_the_busiest_source_makes_way(monkeypatch):
    monkeypatch.setattr(limits, "UNPROVEN_SOCKETS_MAX_COUNT", 3)
    counters = FabricCounters()
    gate = tcp.UnprovenGate(counters)
    with gate.admit("quiet") as quiet, gate.admit("busy") as oldest, gate.admit("busy") as newer:
        assert len(gate) == 3
        with gate.admit("other") as other:
            assert oldest.cancel_called
            assert not any(scope.cancel_called for scope in (quiet, newer, other))
            assert len(gate) == 3
    assert len(gate) == 0
    assert counters.sockets_refused == 1


async def test_a_closed_connection_says_so(libp2p_pair):
    fabric, _ = libp2p_pair
    connection = tcp.TcpConnection(await connect(fabric))
    assert connection.get_remote_address() == ("127.0.0.1", int(fabric.addresses[0].rpartition("/")[2]))
    await connection.close()
    with pytest.raises(ConnectionClosedError):
        await connection.read(1)
    with pytest.raises(ConnectionClosedError):
        await connection.write(b"x")


async def test_a_connection_gives_what_was_asked_for():
    async def say_digits(stream: trio.SocketStream) -> None:
        await stream.send_all(b"0123456789")

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, say_digits, 0, host="127.0.0.1"))
        stream = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        connection = tcp.TcpConnection(stream)
        assert [await connection.read(count) for count in (1, 3, 4)] == [b"0", b"123", b"4567"]
        assert await connection.read() == b"89"
        assert await connection.read(5) == b""
        await connection.close()
        nursery.cancel_scope.cancel()


async def test_a_failed_dial_leaves_no_socket():
    register = tcp.SocketRegister()
    with pytest.raises(OSError, match="refused"):
        await tcp.dial_tcp("127.0.0.1", 1, register)
    assert len(register) == 0


async def test_the_register_closes_what_is_open_and_nothing_else():
    register = tcp.SocketRegister()
    sockets = [trio.socket.socket() for _ in range(3)]
    for sock in sockets:
        register.add(sock)
    sockets[0].close()
    descriptors = [sock.fileno() for sock in sockets]
    assert len(register) == 2
    register.close_in_child()
    assert len(register) == 0
    for descriptor in descriptors[1:]:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    register.close_in_child()
    tcp.close_descriptor(descriptors[1])
