"""A relay of ours between two peers of ours: who may use it, what it carries, and what ends a circuit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, UnreachableError
from sparkle_mesh.fabric.circuits import parse_circuit
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import FabricEvent, FabricStream, PeerConnected, PeerDisconnected, PeerId
from sparkle_mesh.fabric.libp2p_fabric import Libp2pFabric, open_libp2p_fabric
from sparkle_mesh.fabric.relay_book import RelayLimits


@dataclass
class Trio:
    """Three fabrics: ``hidden`` is to be reached by ``other`` through ``relay``."""

    relay: Libp2pFabric
    hidden: Libp2pFabric
    other: Libp2pFabric
    refused: set[PeerId] = field(default_factory=set)

    def serve(self, **bounds: object) -> None:
        """Make ``relay`` one."""
        from sparkle_mesh.fabric.relay_service import RelayService

        self.service = RelayService(
            self.relay,
            RelayLimits(**{"bytes_per_s": 1e9, **bounds}),  # type: ignore[arg-type]
            may_use=lambda peer_id: peer_id not in self.refused,
        )
        self.service.start()

    async def reserve(self) -> str:
        await self.hidden.connect(self.relay.peer_id, self.relay.addresses)
        return (await self.hidden.reach.relays.reserve(self.relay.peer_id)).address

    async def connect(self) -> None:
        await self.other.connect(self.hidden.peer_id, [await self.reserve()])


@pytest.fixture
async def three() -> AsyncIterator[Trio]:
    async with (
        open_libp2p_fabric(Identity.generate()) as relay,
        open_libp2p_fabric(Identity.generate()) as hidden,
        open_libp2p_fabric(Identity.generate()) as other,
    ):
        yield Trio(relay, hidden, other)


async def until_gone(fabric: Libp2pFabric, peer_id: PeerId) -> None:
    with trio.fail_after(20):
        async with fabric.events() as events:
            while peer_id in fabric.connected_peers():
                await events.receive()


def drained(events: trio.MemoryReceiveChannel[FabricEvent]) -> list[FabricEvent]:
    found = []
    with contextlib.suppress(trio.WouldBlock):
        while True:
            found.append(events.receive_nowait())
    return found


async def echo(stream: FabricStream) -> None:
    while data := await stream.read(65536):
        await stream.write(data)
    await stream.aclose()


async def test_a_stream_through_it(three: Trio) -> None:
    three.serve()
    three.hidden.handle("/echo", echo)
    async with three.hidden.events() as events:
        await three.connect()
        with trio.fail_after(20):
            seen = [await events.receive(), await events.receive()]
            assert [event.peer_id for event in seen] == [three.relay.peer_id, three.other.peer_id]
            where = seen[1].remote_address if isinstance(seen[1], PeerConnected) else None
            assert where == f"{three.relay.addresses[0]}/p2p/{three.relay.peer_id}/p2p-circuit"
            stream = await three.other.open_stream(three.hidden.peer_id, "/echo")
            payload, echoed = os.urandom(3_000_000), bytearray()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.write, payload)
                while len(echoed) < len(payload):
                    echoed += await stream.read(65536)
            assert bytes(echoed) == payload
            assert three.service.book.carried_bytes > 6_000_000
            assert "1 of 128 peers can be reached through here, 1 of 128 circuits are open" in three.service.status()
            await three.other.disconnect(three.hidden.peer_id)
            assert await events.receive() == PeerDisconnected(three.other.peer_id)
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert three.service.book.circuit_count == 0


async def test_who_may_not_use_it(three: Trio) -> None:
    three.serve()
    three.refused.add(three.hidden.peer_id)
    with pytest.raises(UnreachableError, match="gave no place: status 200"):
        await three.reserve()
    three.refused = {three.other.peer_id}
    with pytest.raises(UnreachableError, match="does not connect to it: status 202"):
        await three.connect()


async def test_what_is_no_relay_or_has_no_place_is_told_so(three: Trio) -> None:
    with pytest.raises(UnreachableError, match="is not connected directly"):
        await three.hidden.reach.relays.reserve(three.relay.peer_id)
    with pytest.raises(UnreachableError, match="hop"):
        await three.reserve()
    three.serve(reservations_max_count=0)
    with pytest.raises(UnreachableError, match="gave no place: status 200"):
        await three.reserve()
    through = f"{three.relay.addresses[0]}/p2p/{three.relay.peer_id}/p2p-circuit"
    with pytest.raises(UnreachableError, match="does not connect to it: status 204"):
        await three.other.connect(three.hidden.peer_id, [through])
    itself = f"{three.other.addresses[0]}/p2p/{three.other.peer_id}/p2p-circuit"
    with pytest.raises(UnreachableError, match="through this process itself"):
        await three.other.connect(three.hidden.peer_id, [itself])


async def test_a_place_that_was_forgotten_or_has_ended_takes_no_circuit(three: Trio) -> None:
    three.serve()
    address = await three.reserve()
    three.hidden.reach.relays.forget(three.relay.peer_id)
    with pytest.raises(UnreachableError, match="does not connect to it: status 203"):
        await three.other.connect(three.hidden.peer_id, [address])
    await three.hidden.reach.relays.reserve(three.relay.peer_id)
    await three.hidden.disconnect(three.relay.peer_id)
    await until_gone(three.relay, three.hidden.peer_id)
    with pytest.raises(UnreachableError, match="does not connect to it: status 204"):
        await three.other.connect(three.hidden.peer_id, [address])


async def test_a_circuit_ends_when_it_has_carried_all_that_it_may(three: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RELAY_USEFUL_MIN_BYTES", 1000)
    three.serve(circuit_max_bytes=200_000)
    three.hidden.handle("/echo", echo)
    await three.connect()
    stream = await three.other.open_stream(three.hidden.peer_id, "/echo")
    with pytest.raises(LinkClosedError), trio.fail_after(20):
        await stream.write(bytes(3_000_000))
    await until_gone(three.hidden, three.other.peer_id)


async def test_a_circuit_ends_when_its_time_is_up(three: Trio) -> None:
    three.serve(circuit_max_s=1.0)
    await three.connect()
    await until_gone(three.hidden, three.other.peer_id)


async def test_what_carries_little_is_not_taken_for_a_connection(three: Trio) -> None:
    three.serve(circuit_max_bytes=1 << 17)
    with pytest.raises(
        UnreachableError, match="no direct connection came about, and the relay carries 131072 bytes only"
    ):
        await three.connect()
    assert three.other.peer_id not in three.hidden.connected_peers()


async def test_it_does_not_carry_faster_than_its_owner_allows(three: Trio) -> None:
    three.serve(bytes_per_s=1e6)
    three.hidden.handle("/echo", echo)
    await three.connect()
    stream = await three.other.open_stream(three.hidden.peer_id, "/echo")
    started_at = trio.current_time()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, bytes(1_000_000))
            count = 0
            while count < 1_000_000:
                count += len(await stream.read(65536))
    # There and back, after a second's worth at once.
    assert trio.current_time() - started_at > 0.8


async def test_when_one_of_two_connections_ends_the_other_takes_its_place(three: Trio) -> None:
    three.serve()
    three.hidden.handle("/echo", echo)
    await three.connect()
    async with three.other.events() as events:
        relayed = three.other._connections[three.hidden.peer_id][0]
        assert isinstance(await events.receive(), PeerConnected)
        assert isinstance(await events.receive(), PeerConnected)
        await three.other._dial(three.hidden.peer_id, three.hidden.addresses[0], trio.Event(), False)
        assert len(three.other._connections[three.hidden.peer_id]) == 2
        await relayed.close()
        with trio.fail_after(10):
            assert await events.receive() == PeerDisconnected(three.hidden.peer_id)
            assert await events.receive() == PeerConnected(three.hidden.peer_id, three.hidden.addresses[0], True)
        stream = await three.other.open_stream(three.hidden.peer_id, "/echo")
        await stream.write(b"x")
        assert await stream.read(1) == b"x"


async def test_two_that_dial_each_other_at_once_stay_connected(three: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    three.serve()
    ends = [three.hidden, three.other]
    for fabric in ends:
        await fabric.connect(three.relay.peer_id, three.relay.addresses)
    addresses = [(await fabric.reach.relays.reserve(three.relay.peer_id)).address for fabric in ends]
    both_came = [trio.Event(), trio.Event()]

    # Each side is done first with the circuit that the other has opened: it is in use when its own is looked at.
    async def invite(*_: object) -> None: ...

    for own, fabric in enumerate(ends):

        async def until_other_is_in_use(peer_id: PeerId, own: int = own) -> None:
            async with ends[own].events() as events:
                while peer_id not in ends[own].connected_peers():
                    await events.receive()
            both_came[own].set()
            await both_came[1 - own].wait()

        monkeypatch.setattr(fabric.reach, "_invite", invite)
        monkeypatch.setattr(fabric.reach.puncher, "await_invitation", until_other_is_in_use)
    with trio.fail_after(20):
        async with three.hidden.events() as events, trio.open_nursery() as nursery:
            nursery.start_soon(three.hidden.connect, three.other.peer_id, [addresses[1]])
            nursery.start_soon(three.other.connect, three.hidden.peer_id, [addresses[0]])
            await trio.testing.wait_all_tasks_blocked(0.3)
            assert [event for event in drained(events) if isinstance(event, PeerDisconnected)] == []
    three.hidden.handle("/echo", echo)
    stream = await three.other.open_stream(three.hidden.peer_id, "/echo")
    await stream.write(b"here")
    assert await stream.read(4) == b"here"


async def test_garbage_and_floods_leave_it_serving(three: Trio) -> None:
    from sparkle_mesh.fabric.relay_service import HOP_PROTOCOL, STOP_PROTOCOL

    three.serve(circuits_per_peer_max_count=4)
    three.hidden.handle("/echo", echo)
    await three.connect()
    async with open_libp2p_fabric(Identity.generate()) as attacker:
        await attacker.connect(three.relay.peer_id, three.relay.addresses)
        await attacker.connect(three.hidden.peer_id, three.hidden.addresses)
        for target, protocol in ((three.relay, HOP_PROTOCOL), (three.hidden, STOP_PROTOCOL)):
            for garbage in (b"", b"\xff" * 64, b"\x03\x08\x63\x00", b"\x02\x08\x01", b"\x00", b"\x04\x12\x02\x0a\x00"):
                stream = await attacker.open_stream(target.peer_id, protocol)
                await stream.write(garbage)
                await stream.aclose()
        through = f"{three.relay.addresses[0]}/p2p/{three.relay.peer_id}/p2p-circuit"
        circuit = parse_circuit(through)
        assert circuit is not None
        refused, held = 0, []
        for _ in range(12):
            # Opened, and nothing said on them.
            try:
                held.append(await attacker.reach.relays.open_circuit(circuit, three.hidden.peer_id, through))
            except UnreachableError as error:
                refused += "status 201" in str(error)
        assert (len(held), refused) == (3, 9)
        with trio.fail_after(10):
            stream = await three.other.open_stream(three.hidden.peer_id, "/echo")
            await stream.write(b"still there")
            assert await stream.read(100) == b"still there"
