"""Many whole nodes in virtual time: they are one mesh, with few connections each, and find each other's devices."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from simulations import scale
from simulations.many_peers import ManyPeers, Peer, bare_nursery
from simulations.trio_run import deterministic_scheduling
from sparkle_mesh import limits

pytestmark = pytest.mark.untraced


def run(main: Callable[[ManyPeers], Awaitable[None]], seed: int = 0) -> None:
    async def all_of_it() -> None:
        async with bare_nursery() as nursery:
            await main(ManyPeers(nursery, random.Random(seed)))
            nursery.cancel_scope.cancel()

    with deterministic_scheduling(seed):
        trio.run(all_of_it, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.timeout(180)
def test_forty_peers_are_one_mesh_of_bounded_degree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "SEARCHERS_COUNT", 4)
    figures_file = tmp_path / "figures.json"
    assert scale.main(["--peers", "40", "--minutes", "1", "--seed", "1", "--json", str(figures_file)]) == 0
    figures = json.loads(figures_file.read_text())
    assert figures["one_mesh_s"] < 20.0
    assert figures["all_found_s"] < 60.0
    assert figures["search_s"] < 1.0
    assert figures["bytes_per_s_median"] < scale.GOALS["bytes_per_s_median"]
    assert figures["connections_median"] < 40
    assert figures["gone_s"] <= scale.GOALS["gone_s"]
    assert figures["missing_while_dying"] == 0


def test_a_mesh_that_does_not_come_about_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ManyPeers, "parts", lambda world: [set(), set()])
    assert scale.main(["--peers", "3", "--minutes", "1"]) == 1
    assert "failed: seed 0: after 300 s there are 2 parts" in capsys.readouterr().out


def test_halves_that_meet_at_one_place_are_soon_joined_at_many() -> None:
    size = 16

    async def main(world: ManyPeers) -> None:
        halves: list[list[Peer]] = [[], []]
        for half in halves:
            for _ in range(size):
                half.append(await world.start(random.Random(len(world.peers)).choice(half) if half else None))
                await trio.sleep(0.05)
        await trio.sleep(60)
        assert sorted(map(len, world.parts())) == [size, size]
        one, other = halves[0][7], halves[1][11]
        one.node.discovery.heard(other.peer_id, other.fabric.addresses, "join")
        assert await world.until(lambda: len(world.parts()) == 1, 30)
        await trio.sleep(120)
        ours = {peer.peer_id for peer in halves[0]}
        bridges = sum(len(peer.fabric.connected_peers() & ours) for peer in halves[1])
        assert bridges > size
        everyone = {peer.peer_id for peer in world.peers}
        for half in halves:
            assert await world.found_by(half[3]) == everyone

    run(main)


@pytest.mark.timeout(180)
def test_trainers_among_many_nodes_are_all_connected_and_have_few_nodes() -> None:
    async def main(world: ManyPeers) -> None:
        chance = random.Random(3)
        for _ in range(30):
            await world.start(chance.choice(world.peers) if world.peers else None)
            await trio.sleep(0.05)
        trainers = [await world.start(chance.choice(world.peers[:30]), "trainer") for _ in range(6)]
        everyone = {trainer.peer_id for trainer in trainers}

        def complete() -> bool:
            return all(everyone - {t.peer_id} <= t.node.membership.channels.keys() for t in trainers)

        assert await world.until(complete, 10)
        await trio.sleep(180)
        assert complete()
        # The news of who comes are lost on the way: the DHT tells of it all the same.
        for peer in world.peers:
            peer.node._presence._heard = lambda *told: None
        late = await world.start(world.peers[9], "trainer")
        trainers.append(late)
        everyone.add(late.peer_id)
        assert await world.until(complete, 30)
        await trio.sleep(120)
        nodes = {peer.peer_id for peer in world.peers} - everyone
        now = trio.current_time()
        for trainer in trainers:
            neighbours = trainer.node.discovery.degree.neighbours()
            idle = [n for n in neighbours if n.peer_id in nodes and not n.is_busy(now)]
            assert len(idle) <= limits.TRAINER_NODES_MAX_COUNT

    run(main)
