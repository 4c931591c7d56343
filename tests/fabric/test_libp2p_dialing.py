from __future__ import annotations

import subprocess
import sys

import pytest
import trio
from libp2p.utils import dns_utils
from multiaddr import Multiaddr

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError, UnreachableError
from sparkle_mesh.fabric import importing
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

    monkeypatch.setattr(dns_utils, "resolve_multiaddr_with_retry", resolve)
    await one.connect(other.peer_id, [f"/dns4/peer.example/tcp/{port}"])
    assert one.connected_peers() == {other.peer_id}


@pytest.mark.parametrize(("found", "match"), [([], "its name has no address"), (OSError("no server"), "no server")])
async def test_names_that_do_not_resolve(two, monkeypatch, found, match):
    one, other = two

    async def resolve(address: Multiaddr, max_retries: int) -> list[Multiaddr]:
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(dns_utils, "resolve_multiaddr_with_retry", resolve)
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


def run_python(code: str) -> None:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_what_a_fabric_does_not_use_is_not_loaded_for_it() -> None:
    run_python("""
import gc, sys, trio
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric

async def main():
    gc.disable()
    async with open_libp2p_fabric(Identity.generate()):
        assert not gc.isenabled()
    gc.enable()
    async with open_libp2p_fabric(Identity.generate()):
        assert gc.isenabled()

trio.run(main)
assert "libp2p.host.basic_host" in sys.modules
unwanted = ("aioquic", "dns", "Crypto", "zeroconf", "prometheus_client", "urllib3", "httpx", "requests", "asyncio")
loaded = sorted(name for name in unwanted if name in sys.modules)
assert not loaded, loaded
""")


def test_what_was_postponed_is_there_when_it_is_asked_for() -> None:
    run_python("""
import sys
from sparkle_mesh.fabric.importing import import_libp2p
import_libp2p()

# Stand-ins in libp2p's own modules: called, compared with, asked for names.
from libp2p.crypto import serialization
from libp2p.host import basic_host
from libp2p.network import swarm
assert not isinstance(swarm, swarm.DNSResolver) and "dns" not in sys.modules
assert isinstance(swarm.DNSResolver(), swarm.DNSResolver) and "dns" in sys.modules
assert not isinstance(1, swarm.DNSResolver)
assert basic_host.MDNSDiscovery.start.__name__ == "start" and "zeroconf" in sys.modules
import libp2p.crypto.rsa as rsa
key = rsa.create_new_key_pair(1024).public_key
assert serialization.deserialize_public_key(key.serialize()) == key

# Other code gets the real modules, whole.
import requests.adapters
from requests import Session
import httpx, prometheus_client, aioquic.quic.connection
assert httpx.Client and issubclass(requests.HTTPError, OSError) and Session and prometheus_client.Counter
assert isinstance(aioquic.quic.connection.QuicConnectionError, type(Exception))
import libp2p
assert libp2p.new_host and libp2p.network.swarm is swarm
for module in (libp2p, httpx):
    try:
        module.nonsense
    except AttributeError as error:
        assert "nonsense" in str(error)
    else:
        sys.exit("a name that is not there was found")
from libp2p.kad_dht import KadDHT
from libp2p.relay.circuit_v2 import CircuitV2Protocol
from libp2p.transport.quic.transport import QUICTransport
assert libp2p.new_host(enable_quic=True)
""")


def test_another_thread_that_imports_meanwhile_gets_the_real_modules() -> None:
    run_python("""
import sys, threading
from sparkle_mesh.fabric import importing

got = []

def other():
    import requests.adapters
    from httpx import Client
    class Mine(requests.Session, Client): pass
    got.append(Mine)

with importing.postponed("requests", "httpx"):
    import requests as postponed
    from httpx import Client as stand_in
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
import httpx
assert got and issubclass(got[0], httpx.Client) and postponed.Session in got[0].__mro__
assert stand_in is not httpx.Client and not isinstance(1, stand_in)
""")


def test_packages_of_others_and_loaded_modules_are_left_alone() -> None:
    with importing.postponed("no_such_module_anywhere", "subprocess"):
        import libp2p.network.swarm as loaded

        assert "no_such_module_anywhere" not in sys.modules
        assert sys.modules["subprocess"] is subprocess
    assert "dial_peer" in dir(loaded.Swarm)


async def test_a_connection_that_has_just_ended_is_no_other_error(two, monkeypatch):
    """Whoever opens a stream is told what the interface says, before the news of the end have come, too."""
    one, other = two
    await one.connect(other.peer_id, other.addresses)
    monkeypatch.setattr(type(one._connections[other.peer_id][0]), "is_closed", True)
    with pytest.raises(UnreachableError, match=f"peer {other.peer_id} is not connected any more; connect to it again"):
        await one.open_stream(other.peer_id, "/test/1")


@pytest.mark.parametrize("error", [LinkClosedError("it was reset"), ProtocolError("no such thing")])
async def test_whatever_ends_the_opening_of_a_stream_is_told_as_one_error(two, monkeypatch, error):
    one, other = two
    await one.connect(other.peer_id, other.addresses)

    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(one, "_new_stream", fail)
    with pytest.raises(UnreachableError, match=f"could not be opened: {error}"):
        await one.open_stream(other.peer_id, "/test/1")
