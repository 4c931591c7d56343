"""What others see of this process: identify and dial-backs among our own."""

from __future__ import annotations

import pytest
import trio
from libp2p.host.autonat.pb import autonat_pb2 as pb

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, UnreachableError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import FabricStream
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric
from sparkle_mesh.fabric.observers import AUTONAT_PROTOCOL, ask_identity, ask_to_dial_back
from sparkle_mesh.fabric.protobuf import receive_protobuf, send_protobuf


async def test_where_it_is_seen_and_what_is_spoken(libp2p_pair) -> None:
    one, other = libp2p_pair
    report = await ask_identity(one, other.peer_id)
    # Dialed from any port.
    assert report.seen_at is not None
    assert report.seen_at not in one.addresses
    assert {"/ipfs/id/1.0.0", "/meshsub/1.1.0", "/libp2p/dcutr"} <= report.protocols
    # The one that was dialed is seen where it listens, and so is one that dials from there.
    seen_at = await one.reach.ask_where_seen(other.peer_id, other.addresses[0])
    assert seen_at == one.addresses[0]


async def test_connections_from_the_listening_port() -> None:
    async with open_libp2p_fabric(Identity.generate()) as one, open_libp2p_fabric(Identity.generate()) as other:
        await one.connect(other.peer_id, other.addresses, from_port=True)
        assert one.reach.is_from_port(other.peer_id)
        assert (await ask_identity(one, other.peer_id)).seen_at == one.addresses[0]
        assert other.remote_address(one.peer_id) == one.addresses[0]
        await one.disconnect(other.peer_id)
        assert not one.reach.is_from_port(other.peer_id)


async def test_nobody_else_can_listen_on_a_port_that_connections_are_made_from() -> None:
    from sparkle_mesh.errors import UsageError

    async with open_libp2p_fabric(Identity.generate()) as one:
        with pytest.raises(UsageError, match="cannot listen on"):
            async with open_libp2p_fabric(Identity.generate(), listen=one.addresses):
                raise AssertionError


async def test_a_dial_back(libp2p_pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DIAL_BACK_INTERVAL_S", 0.0)
    one, other = libp2p_pair
    assert await ask_to_dial_back(one, other.peer_id, one.addresses) == "unknown"
    other.reach.serve_dial_backs()
    assert await ask_to_dial_back(one, other.peer_id, one.addresses) == "yes"
    connections = len(other._connections[one.peer_id])
    # Nobody listens there; and somebody else does.
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert await ask_to_dial_back(one, other.peer_id, [f"/ip4/127.0.0.1/tcp/{port}"]) == "no"
    assert await ask_to_dial_back(one, other.peer_id, other.addresses) == "no"
    assert len(other._connections[one.peer_id]) == connections == 1


async def test_nobody_has_others_dialed_at_addresses_that_it_does_not_come_from(libp2p_pair) -> None:
    one, other = libp2p_pair
    other.reach.serve_dial_backs()
    dialed = []

    async def refuse(peer_id: str, address: str) -> None:
        dialed.append(address)
        raise UnreachableError("no")

    other.reach._dial_back = refuse
    other.reach.serve_dial_backs()
    away = ["/ip4/44.0.0.1/tcp/1", "/ip4/127.0.0.2/tcp/1", "/ip4/127.0.0.1/udp/1", "/dns4/localhost/tcp/1"]
    assert await ask_to_dial_back(one, other.peer_id, away) == "unknown"
    assert dialed == []
    assert await ask_to_dial_back(one, other.peer_id, [f"/ip4/127.0.0.1/tcp/{port}" for port in range(1, 9)]) == "no"
    assert len(dialed) == limits.DIAL_BACK_ADDRESSES_MAX_COUNT
    # Nor as often as it likes.
    assert await ask_to_dial_back(one, other.peer_id, one.addresses) == "unknown"


async def test_garbage_for_an_answer(libp2p_pair) -> None:
    one, other = libp2p_pair

    async def lie(stream: FabricStream) -> None:
        await receive_protobuf(stream, pb.Message)
        await stream.write(b"\x05\x0a\x09abc")
        await stream.aclose()

    other.handle(AUTONAT_PROTOCOL, lie)
    assert await ask_to_dial_back(one, other.peer_id, one.addresses) == "unknown"
    other.handle("/ipfs/id/1.0.0", lie)
    with pytest.raises(UnreachableError, match="does not say who it is"):
        await ask_identity(one, other.peer_id)
    other.reach.serve_dial_backs()
    stream = await one.open_stream(other.peer_id, AUTONAT_PROTOCOL)
    await send_protobuf(stream, pb.Message(type=pb.Message.DIAL_RESPONSE))
    with pytest.raises(LinkClosedError):
        await stream.read(1)
