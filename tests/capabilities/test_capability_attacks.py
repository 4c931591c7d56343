"""Peers that lie, flood, or are of no mesh: what they can do to the search for devices."""

from __future__ import annotations

import random

import msgspec
import pytest
import trio

from sparkle_mesh import limits, wire
from sparkle_mesh.capabilities.labels import MEMORY_RANGES_COUNT, index_labels
from sparkle_mesh.capabilities.messages import (
    PROTOCOL,
    Done,
    Find,
    Found,
    HeldRecord,
    Refused,
    Renew,
    Sealed,
    Store,
    seal_context,
)
from sparkle_mesh.capabilities.records import CapabilityRecord, sign_record
from sparkle_mesh.capabilities.search import DeviceQuery
from sparkle_mesh.capabilities.streams import Asker
from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import LinkClosedError, SparkleError
from sparkle_mesh.fabric.framing import receive_message, send_message
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.membership.keys import MeshKey, MeshSecrets
from sparkle_mesh.wire import PeerAddress

GIB = 1 << 30
CPU = DeviceInfo(kind="cpu", index=0, name="a CPU", memory_bytes=8 * GIB)
GPU = DeviceInfo(kind="cuda", index=0, name="a GPU", memory_bytes=80 * GIB)


def record_of(identity: Identity, *devices: DeviceInfo) -> CapabilityRecord:
    return CapabilityRecord(
        host_id=identity.peer_id[-16:].encode(), role="node", software="s", addresses=(), devices=devices
    )


async def honest_mesh(mesh, count: int = 6):
    peers = []
    for _ in range(count):
        peers.append(await mesh.add([CPU], peers))
    await trio.sleep(5.0)
    return peers


def lie(peer, records) -> None:
    """Have ``peer`` hand out ``records`` under every key, and name nobody."""

    def answer(question, sender, remote_address, now):
        return Found(peers=(), records=tuple(records)) if isinstance(question, Find) else Done()

    peer.service._answers.answer = answer


async def test_what_a_holder_made_up_is_not_believed(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        peers = await honest_mesh(mesh)
        victim, nobody = peers[1], Identity.generate()
        honest = sign_record(record_of(nobody, CPU), nobody, mesh.secrets, sequence=1)
        other_mesh = sign_record(record_of(nobody, CPU), nobody, MeshSecrets("another", None), sequence=1)
        misfiled = sign_record(record_of(nobody, GPU), nobody, mesh.secrets, sequence=1)
        lies = {
            "forged": HeldRecord(
                record=msgspec.structs.replace(honest, publisher=victim.peer_id, sequence=2**60), age_s=0.0
            ),
            "of another mesh": HeldRecord(record=other_mesh, age_s=0.0),
            "misfiled": HeldRecord(record=misfiled, age_s=0.0),
            "expired": HeldRecord(record=honest, age_s=limits.CAPABILITY_LIFETIME_S),
        }
        lie(peers[0], lies.values())
        found = await peers[2].service.find_devices(DeviceQuery.of("cpu"))
        assert sorted(one.peer_id for one in found) == sorted(peer.peer_id for peer in peers)
        # One lookup for each range of memory; what is expired is not even looked at.
        assert peers[2].service.forged_count == (len(lies) - 1) * MEMORY_RANGES_COUNT
        # One that is true is found, whoever hands it out.
        lie(peers[0], [HeldRecord(record=honest, age_s=1.0)])
        assert nobody.peer_id in await peers[2].finds("cpu")


async def test_what_is_replayed_gives_way_to_what_is_newer(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        peers = await honest_mesh(mesh)
        victim = peers[1]
        old = sign_record(record_of(victim.identity, CPU, GPU), victim.identity, mesh.secrets, sequence=1)
        lie(peers[0], [HeldRecord(record=old, age_s=0.0)])
        assert sorted(await peers[2].finds("cpu")) == sorted(peer.peer_id for peer in peers)
        found = await peers[2].service.find_devices(DeviceQuery.of("cpu"))
        assert next(one for one in found if one.peer_id == victim.peer_id).device == CPU


async def test_nobody_stores_for_another_and_nothing_that_does_not_hold(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        peers = await honest_mesh(mesh)
        attacker, victim, target = peers[0], peers[1], PeerAddress(peers[2].peer_id, ())
        asker = Asker(attacker.fabric, mesh.secrets, SYSTEM_ENTROPY)

        async def refused(record, keys) -> str:
            answer = await asker.ask(target, Store(record=record, keys=tuple(keys)))
            assert isinstance(answer, Refused)
            return answer.reason

        theirs = record_of(victim.identity, GPU)
        stolen = sign_record(theirs, victim.identity, mesh.secrets, sequence=2**60)
        their_keys = map(mesh.secrets.locate, index_labels(theirs.role, theirs.devices))
        assert "everybody stores their own" in await refused(stolen, their_keys)
        mine = record_of(attacker.identity, CPU)
        signed = sign_record(mine, attacker.identity, mesh.secrets, sequence=2**60)
        keys = frozenset(map(mesh.secrets.locate, index_labels(mine.role, mine.devices)))
        assert "not its own" in await refused(signed, [mesh.secrets.locate("device 5 cuda")])
        assert "not signed by it" in await refused(msgspec.structs.replace(signed, lifetime_s=600.0), keys)
        assert isinstance(await asker.ask(target, Store(record=signed, keys=tuple(keys))), Done)
        older = sign_record(mine, attacker.identity, mesh.secrets, sequence=1)
        assert "is stale" in await refused(older, keys)
        assert peers[2].service._answers.refused_count == 4


async def test_ten_thousand_junk_records_of_one_peer_are_one_at_most(open_mesh, autojump_clock):
    async with open_mesh(delay_s=0.0) as mesh:
        peers = await honest_mesh(mesh)
        attacker, target = peers[0], peers[1]
        asker = Asker(attacker.fabric, mesh.secrets, SYSTEM_ENTROPY)
        mine = record_of(attacker.identity, CPU, GPU)
        keys = tuple(map(mesh.secrets.locate, index_labels(mine.role, mine.devices)))
        signed = sign_record(mine, attacker.identity, mesh.secrets, sequence=2**60)
        held_before = len(target.service.store)
        slowest_s, sent = 0.0, 0

        async def flood() -> None:
            nonlocal sent
            for number in range(10_000):
                junk = msgspec.structs.replace(signed, sequence=2**60 + number)
                await asker.ask(PeerAddress(target.peer_id, ()), Store(record=junk, keys=keys), timeout_s=60.0)
                sent += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            for _ in range(10):
                started = trio.current_time()
                assert target.peer_id in await peers[2].finds("cpu")
                slowest_s = max(slowest_s, trio.current_time() - started)
                await trio.sleep(10.0)
            # Its questions wait for each other, those of others do not.
            assert sent < 10_000
            nursery.cancel_scope.cancel()
        assert slowest_s < 0.5
        assert len(target.service.store) <= held_before + 1


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xff" * 4, b"\x00\x00\x00\x05junk!", b"GET / HTTP/1.1\r\n\r\n"])
async def test_garbage_ends_its_own_stream_alone(open_mesh, autojump_clock, data):
    async with open_mesh() as mesh:
        peers = await honest_mesh(mesh, 3)
        for _ in range(50):
            stream = await peers[0].fabric.open_stream(peers[1].peer_id, PROTOCOL)
            await stream.write(data)
            await stream.aclose()
        await trio.sleep(1.0)
        assert sorted(await peers[2].finds("cpu")) == sorted(peer.peer_id for peer in peers)


async def test_who_does_not_hold_the_key_is_not_answered(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        key = MeshKey.generate()
        ours, theirs = MeshSecrets("a mesh", key), MeshSecrets("a mesh", None)
        inside = await mesh.add([CPU], secrets=ours)
        outside = await mesh.add([CPU], [inside], secrets=theirs)
        asker = Asker(outside.fabric, theirs, SYSTEM_ENTROPY)
        with pytest.raises(SparkleError):
            await asker.ask(PeerAddress(inside.peer_id, ()), Find(key=b"k" * 32))
        assert inside.service._answerer.malformed_count == 1
        assert await inside.finds() == [inside.peer_id]
        # What one sealed for somebody else is of no use to a third.
        third = await mesh.add([CPU], [inside], secrets=ours)
        eavesdropper = await mesh.add([], [inside], secrets=ours)
        stream = await eavesdropper.fabric.open_stream(inside.peer_id, PROTOCOL)
        context = seal_context(third.peer_id, inside.peer_id)
        overheard = Sealed(sealed=ours.seal(wire.encode(Renew(sequence=1, keys=())), context=context))
        await send_message(stream, overheard)
        with pytest.raises(LinkClosedError):
            await receive_message(stream, Sealed)


@pytest.mark.untraced
async def test_a_crowd_from_one_network_does_not_surround_a_joining_peer(open_mesh, autojump_clock):
    async with open_mesh(delay_s=0.0) as mesh:
        crowd = [await mesh.add([], addresses=[f"/ip4/8.8.4.{n}/tcp/45654"]) for n in range(60)]
        for sybil in crowd:
            named = [PeerAddress(other.peer_id, other.fabric.addresses) for other in crowd[:16]]
            sybil.service._answers.answer = lambda *_, named=named: Found(peers=tuple(named))
        # They are there first; then come a few that are honest.
        newcomer = await mesh.add([CPU], crowd)
        honest = []
        for number in range(4):
            honest.append(await mesh.add([CPU], [*honest, newcomer], addresses=[f"/ip4/9.9.{number}.9/tcp/45654"]))
        await trio.sleep(2.5 * limits.CAPABILITY_REPUBLISH_MIN_S)
        table = newcomer.service.table
        assert all(peer.peer_id in table for peer in honest)
        assert sum(sybil.peer_id in table for sybil in crowd) <= limits.ROUTING_NETWORK_MAX_COUNT
        assert {peer.peer_id for peer in honest} <= set(await newcomer.finds("cpu"))


async def test_more_streams_than_one_peer_may_have_are_refused(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        peers = await honest_mesh(mesh, 3)
        streams = [await peers[0].fabric.open_stream(peers[1].peer_id, PROTOCOL) for _ in range(40)]
        await trio.sleep(0.5)
        assert peers[1].service._answerer._streams[peers[0].peer_id] <= limits.KAD_STREAMS_PER_PEER_MAX_COUNT
        assert sorted(await peers[2].finds("cpu")) == sorted(peer.peer_id for peer in peers)
        # Those that say nothing are closed.
        await trio.sleep(limits.KAD_STREAM_IDLE_S + 1.0)
        assert peers[1].service._answerer._streams[peers[0].peer_id] <= 1
        for stream in streams:
            await stream.aclose()


async def test_records_of_random_bytes_are_refused(open_mesh, autojump_clock):
    chooser = random.Random(7)
    async with open_mesh() as mesh:
        peers = await honest_mesh(mesh, 3)
        attacker = peers[0]
        asker = Asker(attacker.fabric, mesh.secrets, SYSTEM_ENTROPY)
        signed = sign_record(record_of(attacker.identity, CPU), attacker.identity, mesh.secrets, sequence=2**60)
        for _ in range(100):
            noise = msgspec.structs.replace(signed, sealed=chooser.randbytes(chooser.randrange(8192)))
            answer = await asker.ask(
                PeerAddress(peers[1].peer_id, ()), Store(record=noise, keys=(chooser.randbytes(32),))
            )
            assert isinstance(answer, Refused)
