"""The mesh's own DHT as a whole, over a fabric in memory and in virtual time."""

from __future__ import annotations

import random

import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.capabilities.messages import Renew, Withdraw
from sparkle_mesh.capabilities.search import DeviceQuery
from sparkle_mesh.capabilities.service import CapabilityService
from sparkle_mesh.capabilities.store import RecordStore
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import UnreachableError

GIB = 1 << 30


def device(kind: str = "cpu", gib: float = 8, index: int = 0, **more) -> DeviceInfo:
    return DeviceInfo(kind=kind, index=index, name=f"a {kind}", memory_bytes=int(gib * GIB), **more)


async def test_every_one_finds_every_others_devices(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        peers = []
        for _ in range(12):
            peers.append(await mesh.add([device()], peers))
        await trio.sleep(5.0)
        everyone = sorted(peer.peer_id for peer in peers)
        for peer in peers:
            assert sorted(await peer.finds("cpu")) == everyone


@pytest.mark.untraced
async def test_peers_that_know_a_few_find_the_devices_of_all(open_mesh, autojump_clock):
    chooser = random.Random(1)
    async with open_mesh() as mesh:
        peers = []
        for number in range(40):
            devices = [device()] if number % 3 else [device(), device("cuda", 24)]
            peers.append(await mesh.add(devices, chooser.sample(peers, min(len(peers), 2))))
        await trio.sleep(2.5 * limits.CAPABILITY_REPUBLISH_MIN_S)
        with_gpu = sorted(peer.peer_id for peer in peers[::3])
        times = []
        for peer in chooser.sample(peers, 10):
            started = trio.current_time()
            assert sorted(await peer.finds("cuda", min_memory="16GB")) == with_gpu
            times.append(trio.current_time() - started)
        assert sorted(times)[len(times) // 2] < 0.3
        # Nobody holds more than their share: each has three keys at most.
        held = sum(len(peer.service.store) for peer in peers)
        assert held <= 40 * 3 * 2 * limits.CAPABILITY_HOLDERS_COUNT


async def test_the_dead_are_gone_within_a_minute_and_lookups_stay_fast(open_mesh, autojump_clock):
    async with open_mesh(delay_s=0.02) as mesh:
        peers = []
        for _ in range(30):
            peers.append(await mesh.add([device()], peers))
        mesh.nursery.start_soon(_hear, peers)
        # Until just after they have heard each other: that is when the dead are remembered for longest.
        await trio.sleep(2 * limits.NODE_PING_INTERVAL_S + 1.0)
        for dead in peers[::3]:
            dead.kill()
        peers[:] = left = [peer for number, peer in enumerate(peers) if number % 3]
        killed_at = trio.current_time()
        times = []
        while trio.current_time() < killed_at + 60.0:
            started = trio.current_time()
            found = await left[0].finds("cpu")
            times.append(trio.current_time() - started)
            assert {peer.peer_id for peer in left} <= set(found)
            await trio.sleep(1.0)
        assert sorted(await left[0].finds("cpu")) == sorted(peer.peer_id for peer in left)
        assert sorted(times)[len(times) // 2] < 0.5
        assert max(times) < 2.0


async def test_who_leaves_is_gone_at_once(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        peers = []
        for _ in range(5):
            peers.append(await mesh.add([device()], peers))
        await trio.sleep(5.0)
        await peers[0].service.leave()
        peers[0].kill()
        await trio.sleep(0.1)
        assert peers[0].peer_id not in await peers[1].finds("cpu")


async def test_what_is_offered_anew_is_found_and_what_was_before_is_not(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        peers = []
        for _ in range(12):
            peers.append(await mesh.add([device("cuda", 80)], peers))
        await trio.sleep(5.0)
        changed = peers[3]
        changed.service.offer([device("cuda", 8)])
        await trio.sleep(5.0)
        assert changed.peer_id not in await peers[0].finds("cuda", min_memory="16GB")
        found = await peers[0].finds("cuda", min_memory="4GB")
        assert sorted(found) == sorted(peer.peer_id for peer in peers)
        # The largest first.
        assert found[-1] == changed.peer_id


@pytest.mark.parametrize("alone", [True, False])
async def test_alone_one_finds_its_own(open_mesh, autojump_clock, alone):
    async with open_mesh() as mesh:
        peer = await mesh.add([device("cuda", 24, gflops={"float32": 80_000.0}), device()])
        if not alone:
            await mesh.add([], [peer])
            await trio.sleep(5.0)
        assert await peer.finds("cuda", min_gflops=50_000) == [peer.peer_id]
        assert await peer.finds("cuda", min_gflops=50_000, dtype="float64") == []
        assert await peer.finds() == [peer.peer_id, peer.peer_id]
        assert await peer.finds(limit=1) == [peer.peer_id]


async def test_what_was_found_by_the_deadline_is_told(open_mesh, autojump_clock):
    """Though one of those who are to be asked says nothing at all."""
    async with open_mesh() as mesh:
        peers = []
        for _ in range(6):
            peers.append(await mesh.add([device()], peers))
        await trio.sleep(5.0)
        silent = peers[2]
        mesh.network.partition([silent.peer_id], [peer.peer_id for peer in peers if peer is not silent])
        started = trio.current_time()
        found = await peers[0].service.find_devices(DeviceQuery.of("cpu"), timeout_s=1.0)
        assert trio.current_time() - started <= 1.0
        assert {one.peer_id for one in found} == {peer.peer_id for peer in peers}
        mesh.network.heal()


async def test_who_has_left_publishes_no_more(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        peers = []
        for _ in range(3):
            peers.append(await mesh.add([device()], peers))
        await trio.sleep(5.0)
        mesh.nursery.start_soon(_hear, peers)
        await peers[0].service.leave()
        for _ in range(3):
            await trio.sleep(limits.CAPABILITY_RENEW_S)
            assert peers[0].peer_id not in await peers[1].finds("cpu")


async def _settled(mesh, count):
    """Return peers that hear each other, and have not looked for other holders for a while."""
    peers = []
    for _ in range(count):
        peers.append(await mesh.add([device()], peers))
    mesh.nursery.start_soon(_hear, peers)
    await trio.sleep(6 * limits.CAPABILITY_REPUBLISH_MIN_S)
    return peers


async def _hear(peers) -> None:
    """Let all that are connected hear each other, as the pings of membership do."""
    while True:
        await trio.sleep(limits.NODE_PING_INTERVAL_S)
        for peer in peers:
            for other in peers:
                if other.peer_id in peer.fabric.connected_peers():
                    peer.service.is_there(other.peer_id)


async def test_while_they_hear_each_other_little_is_said(open_mesh, autojump_clock, monkeypatch):
    questions = []
    asked = CapabilityService._ask

    async def ask(self, peer, question):
        questions.append(type(question))
        return await asked(self, peer, question)

    monkeypatch.setattr(CapabilityService, "_ask", ask)
    async with open_mesh() as mesh:
        peers = []
        for _ in range(4):
            peers.append(await mesh.add([device()], peers))
        mesh.nursery.start_soon(_hear, peers)
        span_s = 20 * 60.0
        await trio.sleep(span_s)
        in_silence = span_s / limits.CAPABILITY_UNHEARD_S * len(peers) * (len(peers) - 1)
        assert questions.count(Renew) < in_silence / 3
        for peer in peers:
            assert len(await peer.finds("cpu")) == len(peers)


async def test_a_holder_that_comes_back_with_nothing_is_told_again(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        peers = await _settled(mesh, 3)
        peers[0].kill()
        await trio.sleep(1.0)
        again = await mesh.add([device()], peers[1:], identity=peers[0].identity)
        peers[0] = again
        await trio.sleep(2 * limits.CAPABILITY_LOOK_S)
        assert len(again.service.store) == 3
        assert len(await again.finds("cpu")) == 3


async def test_former_holders_are_told_to_forget(open_mesh, autojump_clock, monkeypatch):
    monkeypatch.setattr(limits, "CAPABILITY_HOLDERS_COUNT", 2)
    async with open_mesh() as mesh:
        peers = []
        mesh.nursery.start_soon(_hear, peers)
        for _ in range(12):
            peers.append(await mesh.add([device()], peers))
            await trio.sleep(2.0)
        await trio.sleep(3 * limits.CAPABILITY_REPUBLISH_MIN_S)
        assert sorted(len(peer.service.store) for peer in peers) == [0] * 10 + [len(peers)] * 2


async def test_a_record_that_made_way_is_held_again_soon(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        peers = []
        mesh.nursery.start_soon(_hear, peers)
        for _ in range(3):
            peers.append(await mesh.add([device()], peers))
        await trio.sleep(6 * limits.CAPABILITY_REPUBLISH_MIN_S)
        store, lost = peers[0].service.store, peers[1].peer_id
        # As one that made way for others; the service tells of it with the next question that it answers.
        store.withdraw(lost)
        store._displaced.append(lost)
        await peers[2].finds("cpu")
        await trio.sleep(2 * limits.CAPABILITY_LOOK_S)
        assert lost in store._held
        assert store.take_displaced() == []


async def test_who_did_not_move_for_longer_than_its_record_lives_tells_it_again(open_mesh, autojump_clock):
    async with open_mesh() as mesh:
        peers = await _settled(mesh, 3)
        publisher, now = peers[1].service._publisher, trio.current_time()
        holder = next(one for one in publisher._holders.values() if one.peer.peer_id == peers[0].peer_id)
        assert not holder.is_due(now, limits.CAPABILITY_RENEW_S)
        # It hears again, as late as its holder may have let go of it.
        publisher.heard(peers[0].peer_id, holder.heard_at + limits.CAPABILITY_LIFETIME_S)
        assert holder.is_due(now, limits.CAPABILITY_RENEW_S)


async def test_a_former_holder_that_cannot_be_told_is_told_later(open_mesh, autojump_clock, monkeypatch):
    failing, withdrawn = [True], []
    asked = CapabilityService._ask

    async def ask(self, peer, question):
        if isinstance(question, Withdraw):
            withdrawn.append(trio.current_time())
            if failing[0]:
                raise UnreachableError("it is busy")
        return await asked(self, peer, question)

    monkeypatch.setattr(CapabilityService, "_ask", ask)
    monkeypatch.setattr(limits, "CAPABILITY_HOLDERS_COUNT", 2)
    async with open_mesh() as mesh:
        peers = []
        mesh.nursery.start_soon(_hear, peers)
        for _ in range(12):
            peers.append(await mesh.add([device()], peers))
            await trio.sleep(2.0)
        assert withdrawn
        await trio.sleep(limits.CAPABILITY_UNHEARD_S)
        failing[0] = False
        await trio.sleep(2 * limits.CAPABILITY_UNHEARD_S)
        assert sorted(len(peer.service.store) for peer in peers) == [0] * 10 + [len(peers)] * 2


async def test_for_a_holder_that_dies_another_holds_what_it_held(open_mesh, autojump_clock, monkeypatch):
    monkeypatch.setattr(limits, "CAPABILITY_HOLDERS_COUNT", 2)
    async with open_mesh() as mesh:
        peers = []
        mesh.nursery.start_soon(_hear, peers)
        for _ in range(12):
            peers.append(await mesh.add([device()], peers))
        await trio.sleep(6 * limits.CAPABILITY_REPUBLISH_MIN_S)
        dead = max(peers, key=lambda peer: len(peer.service.store))
        dead.kill()
        peers.remove(dead)
        await trio.sleep(3 * limits.CAPABILITY_LOOK_S)
        assert sum(len(peer.service.store) >= len(peers) for peer in peers) == 2


@pytest.mark.untraced
async def test_more_alike_than_one_key_holds_are_found_all_the_same(open_mesh, autojump_clock, monkeypatch):
    monkeypatch.setitem(RecordStore.__init__.__kwdefaults__, "per_key_max_count", 4)
    monkeypatch.setattr(limits, "CAPABILITY_REPUBLISH_S", 100.0)
    chooser = random.Random(3)
    async with open_mesh() as mesh:
        peers = []
        for _ in range(32):
            peers.append(await mesh.add([device()], chooser.sample(peers, min(len(peers), 3))))
        await trio.sleep(60.0)
        everyone = {peer.peer_id for peer in peers}
        for peer in chooser.sample(peers, 4):
            assert set(await peer.finds("cpu")) == everyone
        # Nobody has to hold all of them.
        most = max(len(peer.service.store) for peer in peers)
        assert most <= limits.CAPABILITIES_HELD_MAX_COUNT
        dead = peers[::2]
        for peer in dead:
            peer.kill()
        await trio.sleep(60.0)
        left = peers[1::2]
        for peer in chooser.sample(left, 4):
            assert set(await peer.finds("cpu")) == {peer.peer_id for peer in left}
        # Where there is room again, records come up again, and are found on the way.
        until = trio.current_time() + 3 * limits.CAPABILITY_REPUBLISH_S
        while trio.current_time() < until:
            assert set(await left[0].finds("cpu")) == {peer.peer_id for peer in left}
            await trio.sleep(7.0)
        newcomer = await mesh.add([device()], left[:2])
        await trio.sleep(10.0)
        assert newcomer.peer_id in await left[5].finds("cpu")
