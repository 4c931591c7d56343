from __future__ import annotations

import subprocess
import sys

import pytest
import trio
from multiaddr import Multiaddr

from sparkle_mesh import limits
from sparkle_mesh.errors import UnreachableError
from sparkle_mesh.fabric import assembly, importing
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric


@pytest.fixture
async def two():
    async with open_libp2p_fabric(Identity.generate()) as one, open_libp2p_fabric(Identity.generate()) as other:
        yield one, other


async def test_names_are_resolved(two, monkeypatch):
    one, other = two
    port = other.addresses[0].rpartition("/")[2]

    async def resolve(address: Multiaddr, max_retries: int) -> list[Multiaddr]:
        assert str(address) == f"/dns4/peer.example/tcp/{port}"
        return [Multiaddr("/ip4/127.0.0.1/tcp/1"), Multiaddr(other.addresses[0])]

    monkeypatch.setattr(assembly, "resolve_multiaddr_with_retry", resolve)
    await one.connect(other.peer_id, [f"/dns4/peer.example/tcp/{port}"])
    assert one.connected_peers() == {other.peer_id}


@pytest.mark.parametrize(("found", "match"), [([], "its name has no address"), (OSError("no server"), "no server")])
async def test_names_that_do_not_resolve(two, monkeypatch, found, match):
    one, other = two

    async def resolve(address: Multiaddr, max_retries: int) -> list[Multiaddr]:
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(assembly, "resolve_multiaddr_with_retry", resolve)
    with pytest.raises(UnreachableError, match=match):
        await one.connect(other.peer_id, ["/dns/peer.example/tcp/1"])


async def test_addresses_that_cannot_be_dialed_are_listed_with_the_reason(two):
    one, other = two
    stranger = Identity.generate().peer_id
    addresses = ["/ip4/127.0.0.1/udp/1/quic-v1", f"{other.addresses[0]}/p2p/{stranger}"]
    with pytest.raises(UnreachableError) as caught:
        await one.connect(other.peer_id, addresses)
    assert f"{addresses[0]}: '{addresses[0]}' is not a TCP address" in str(caught.value)
    assert f"{addresses[1]}: it is the address of {stranger}" in str(caught.value)
    with pytest.raises(UnreachableError, match="not an Ed25519 peer id"):
        await one.connect("nonsense", other.addresses)
    await one.connect(other.peer_id, [f"{other.addresses[0]}/p2p/{other.peer_id}"])
    assert one.remote_address(other.peer_id) == other.addresses[0]


async def test_a_silent_address_does_not_hold_the_next_one_back(two):
    one, other = two
    silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = f"/ip4/127.0.0.1/tcp/{silent[0].socket.getsockname()[1]}"
    with trio.fail_after(2 * limits.DIAL_HANDSHAKE_PATIENCE_S):
        await one.connect(other.peer_id, [address, *other.addresses])
    await one.disconnect(other.peer_id)
    with pytest.raises(UnreachableError, match=f"{address}: no answer in time"):
        await one.connect(other.peer_id, [address], timeout_s=0.1)
    with pytest.raises(UnreachableError, match=f"{address}: not tried yet"):
        await one.connect(other.peer_id, [address], timeout_s=0)
    assert not one._dialing
    for listener in silent:
        await listener.aclose()


async def test_somebody_who_does_not_speak_libp2p_is_refused(two):
    one, other = two

    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"SSH-2.0-OpenSSH_9.6\r\n")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, greet, 0)
        address = f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}"
        with pytest.raises(UnreachableError, match="the handshake failed"):
            await one.connect(other.peer_id, [address])
        nursery.cancel_scope.cancel()


def test_importing_the_fabric_loads_no_libp2p():
    code = "import sys, sparkle_mesh.fabric.libp2p_fabric; sys.exit('libp2p' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_http_clients_are_not_executed_until_they_are_used():
    code = """
import gc, sys
from sparkle_mesh.fabric.importing import import_libp2p
gc.disable()
import_libp2p()
assert not gc.isenabled()
gc.enable()
import_libp2p()
assert gc.isenabled()
assert "libp2p.host.basic_host" in sys.modules
assert "urllib3" not in sys.modules and "httpx._client" not in sys.modules
import requests.adapters
from requests import Session
import httpx
assert httpx.Client and issubclass(requests.HTTPError, OSError) and Session
assert "urllib3" in sys.modules and "httpx._client" in sys.modules
try:
    httpx.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    sys.exit("a name that is not there was found")
from libp2p.security.tls.autotls import acme
assert acme.requests.Session is Session and acme.httpx.Client is httpx.Client
import libp2p
assert libp2p.new_host
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_modules_that_are_absent_or_loaded_are_left_alone():
    with importing.imported_lazily("no_such_module_anywhere", "subprocess"):
        assert "no_such_module_anywhere" not in sys.modules
        assert sys.modules["subprocess"] is subprocess
