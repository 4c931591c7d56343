"""The service over fabrics in memory: exact under a virtual clock; the registry and the cache are real files."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.discovery.cache import CachedPeer, PeerCache
from sparkle_mesh.discovery.lan import LanBeacons
from sparkle_mesh.discovery.local import LocalRegistry
from sparkle_mesh.discovery.service import DiscoveryService
from sparkle_mesh.errors import UsageError
from sparkle_mesh.fabric.memory import MemoryFabricNetwork

GRACE = limits.DISCOVERY_DIAL_GRACE_S


@pytest.fixture
def network():
    return MemoryFabricNetwork(delay_s=0.001)


@pytest.fixture
def open_service(network, tag, entropy, wall_clock, tmp_path):
    """Return a context manager that runs a service on a fabric of its own."""

    @asynccontextmanager
    async def open_service(peer_id=None, *, addresses=None, data_dir=tmp_path, **options):
        settings = {
            "mesh_tag": tag,
            "role": "trainer",
            "lan": False,
            "entropy": entropy,
            "clock": wall_clock,
            **options,
        }
        async with network.open(peer_id, addresses=addresses) as fabric:
            service = DiscoveryService(fabric, data_dir=data_dir, **settings)
            async with trio.open_nursery() as nursery:
                await nursery.start(service.run)
                try:
                    yield fabric, service
                finally:
                    nursery.cancel_scope.cancel()

    return open_service


def join_address(fabric):
    return f"{fabric.addresses[0]}/p2p/{fabric.peer_id}"


async def test_processes_of_one_host_find_each_other(autojump_clock, open_service, peer_ids):
    async with open_service(peer_ids[0]) as (first, _), open_service(peer_ids[1]) as (second, service):
        await trio.sleep(limits.REGISTRY_POLL_S + 0.1)
        assert second.connected_peers() == {first.peer_id}
        assert first.connected_peers() == {second.peer_id}
        # The one with the smaller id has dialed.
        assert "0 dials" in service.status()[-1]
        assert "1 other processes of this mesh" in service.status()[1]


async def test_the_larger_dials_if_the_smaller_does_not(autojump_clock, network, open_service, peer_ids, tag, tmp_path):
    async with network.open(peer_ids[0]) as silent, open_service(peer_ids[1]) as (fabric, _):
        registry = LocalRegistry(tmp_path)
        registry.announce(silent.peer_id, addresses=silent.addresses, mesh_tags=(tag,), role="trainer")
        await trio.sleep(0.9 * GRACE)
        assert fabric.connected_peers() == frozenset()
        await trio.sleep(GRACE)
        assert fabric.connected_peers() == {silent.peer_id}


async def test_ten_processes_started_together_are_soon_all_connected(autojump_clock, open_service, peer_ids):
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(open_service(peer_id)) for peer_id in peer_ids[:10]]
        await trio.sleep(1.0)
        assert all(len(fabric.connected_peers()) == 9 for fabric, _ in running)
        # Nobody dialed in vain.
        assert sum(service._dial_count for _, service in running) == 45


async def test_other_meshes_are_left_alone(autojump_clock, open_service):
    async with open_service() as (fabric, service), open_service(mesh_tag=b"u" * 32, role="node") as (other, _):
        await trio.sleep(10)
        assert fabric.connected_peers() == other.connected_peers() == frozenset()
        assert "0 other processes" in service.status()[1]


async def test_nodes_of_other_meshes_are_connected_if_asked_for(autojump_clock, open_service):
    async with (
        open_service(mesh_tag=b"u" * 32, role="node") as (node, _),
        open_service(mesh_tag=b"u" * 32) as (trainer, _),
        open_service(any_node=True) as (fabric, _),
    ):
        await trio.sleep(10)
        assert fabric.connected_peers() == {node.peer_id}
        assert trainer.peer_id in node.connected_peers()


async def test_a_lost_connection_is_made_again(autojump_clock, open_service):
    async with open_service() as (first, _), open_service() as (second, _):
        await trio.sleep(10)
        await first.disconnect(second.peer_id)
        await trio.sleep(0.1)
        assert second.connected_peers() == frozenset()
        await trio.sleep(3)
        assert second.connected_peers() == {first.peer_id}


async def test_a_process_that_ends_is_no_longer_in_the_registry(autojump_clock, open_service, tmp_path):
    async with open_service() as (_, service):
        async with open_service():
            await trio.sleep(1)
        assert len(list((tmp_path / "run").iterdir())) == 1
        await trio.sleep(1)
        assert "0 other processes" in service.status()[1]
    assert list((tmp_path / "run").iterdir()) == []


# --- Addresses given --------------------------------------------------------------------------------


async def test_an_address_given_is_joined_at(autojump_clock, network, open_service):
    async with network.open() as there, open_service(join=(join_address(there),)) as (fabric, service):
        await trio.sleep(0.1)
        assert fabric.connected_peers() == {there.peer_id}
        assert f"address given: {join_address(there)}: connected" in service.status()


async def test_an_address_that_does_not_answer_is_told_once_and_tried_on(
    autojump_clock, network, open_service, peer_ids, caplog
):
    caplog.set_level(logging.INFO)
    address = "/ip4/10.9.9.9/tcp/1"
    async with open_service(peer_ids[0], join=(f"{address}/p2p/{peer_ids[1]}",)) as (fabric, service):
        await trio.sleep(300)
        assert caplog.text.count("cannot be reached") == 1
        assert any("unreachable: " in line and "connection refused" in line for line in service.status())
        assert service.status()[-1].startswith("last error: ")
        async with network.open(peer_ids[1], addresses=[address]):
            await trio.sleep(1.25 * limits.DISCOVERY_CONFIGURED_BACKOFF_MAX_S + 1)
            assert fabric.connected_peers() == {peer_ids[1]}
        assert caplog.text.count("is connected now") == 1


async def test_own_address_is_ignored_and_told(autojump_clock, open_service, peer_ids, caplog):
    own = f"/ip4/10.9.9.9/tcp/1/p2p/{peer_ids[0]}"
    async with open_service(peer_ids[0], join=(own,)) as (fabric, service):
        await trio.sleep(5)
        assert fabric.connected_peers() == frozenset()
        assert f"address given: {own}: this process itself" in service.status()
    assert "own; ignored" in caplog.text


async def test_a_wrong_address_is_refused_at_once(network, tag, tmp_path):
    async with network.open() as fabric:
        with pytest.raises(UsageError, match="lacks the peer id"):
            DiscoveryService(fabric, mesh_tag=tag, role="node", data_dir=tmp_path, join=("/ip4/1.2.3.4/tcp/5",))


async def test_status_stays_within_its_bound(autojump_clock, open_service, peer_ids):
    many = tuple(f"/ip4/10.9.{i}.9/tcp/1/p2p/{peer_ids[1]}" for i in range(200))
    async with open_service(peer_ids[0], join=many) as (_, service):
        await trio.sleep(1)
        lines = service.status()
        assert len(lines) <= limits.STATUS_DISCOVERY_MAX_COUNT
        assert len(lines[-1]) <= limits.NAME_MAX_CHARS


# --- What membership tells --------------------------------------------------------------------------


async def test_what_others_tell_is_dialed(autojump_clock, network, open_service):
    async with network.open() as told, open_service() as (fabric, service):
        service.heard(told.peer_id, told.addresses, "exchange")
        assert any("to be dialed" in line for line in service.status())
        await trio.sleep(0.5)
        assert fabric.connected_peers() == {told.peer_id}


async def test_states_of_a_dial_are_told(autojump_clock, network, open_service):
    network.delay_s = 1.0
    async with network.open() as told, open_service() as (_, service):
        service.heard(told.peer_id, told.addresses, "gossip")
        await trio.sleep(0.5)
        assert any("1 dialing" in line for line in service.status())


async def test_a_refused_peer_is_let_go_after_it_could_read_why(autojump_clock, network, open_service):
    async with network.open() as stranger, open_service() as (fabric, service):
        service.heard(stranger.peer_id, stranger.addresses, "gossip")
        await trio.sleep(0.5)
        service.refused(stranger.peer_id, "it is of another mesh")
        await trio.sleep(limits.DISCOVERY_REFUSED_LINGER_S / 2)
        assert fabric.connected_peers() == {stranger.peer_id}
        await trio.sleep(limits.DISCOVERY_REFUSED_LINGER_S)
        assert fabric.connected_peers() == frozenset()
        assert any("1 refused" in line for line in service.status())
        service.heard(stranger.peer_id, stranger.addresses, "gossip")
        await trio.sleep(limits.DISCOVERY_REFUSED_BACKOFF_MIN_S / 2)
        assert fabric.connected_peers() == frozenset()


async def test_a_refused_peer_that_is_admitted_meanwhile_stays(autojump_clock, network, open_service):
    async with network.open() as peer, open_service() as (fabric, service):
        service.heard(peer.peer_id, peer.addresses, "gossip")
        await trio.sleep(0.5)
        service.refused(peer.peer_id)
        service.heard(peer.peer_id, peer.addresses, "introduction")
        await trio.sleep(2 * limits.DISCOVERY_REFUSED_LINGER_S)
        assert fabric.connected_peers() == {peer.peer_id}


async def test_refusals_before_the_start_are_remembered(network, tag, tmp_path, peer_ids):
    async with network.open() as fabric:
        service = DiscoveryService(fabric, mesh_tag=tag, role="node", data_dir=tmp_path, lan=False)
        service.refused(peer_ids[0])
        assert service.directory.get(peer_ids[0]).refusals == 1
        service.close_in_child()


async def test_a_peer_that_hangs_up_at_once_is_a_failure(autojump_clock, network, open_service, monkeypatch):
    async with network.open() as peer, open_service() as (fabric, service):

        async def connect(peer_id, addresses, *, timeout_s):
            await trio.sleep(0.01)

        monkeypatch.setattr(fabric, "connect", connect)
        service.heard(peer.peer_id, peer.addresses, "gossip")
        await trio.sleep(0.5)
        assert service.directory.get(peer.peer_id).failures >= 1
        assert "closed the connection at once" in service.status()[-1]


async def test_a_flood_of_hints_does_not_keep_an_honest_peer_waiting(autojump_clock, network, open_service):
    async with open_service() as (fabric, service):
        network.delay_s = 3.0  # each made-up address swallows the dial for some seconds
        for number in range(3000):
            service.heard(f"fake{number}", [f"/ip4/10.66.{number % 256}.{number // 256}/tcp/1"], "exchange")
        await trio.sleep(1)
        async with network.open() as honest:
            network.delay_s = 0.001
            service.heard(honest.peer_id, honest.addresses, "introduction")
            await trio.sleep(0.5)
            assert fabric.connected_peers() == {honest.peer_id}
            assert len(service.directory) <= limits.DISCOVERY_CONTACTS_MAX_COUNT


async def test_falling_behind_the_events_is_made_up_for(autojump_clock, network, open_service, peer_ids):
    async with (
        open_service(peer_ids[0]) as (fabric, service),
        open_service(peer_ids[1]) as (other, _),
    ):
        await trio.sleep(10)
        assert service.directory.get(other.peer_id).connected
        # The channel of a subscriber that is too far behind is closed.
        fabric._events.close()
        await fabric.disconnect(other.peer_id)
        await trio.sleep(10)
        assert fabric.connected_peers() == {other.peer_id}
        assert service.directory.get(other.peer_id).connected


async def test_a_peer_gone_while_nobody_followed_is_dialed_again(autojump_clock, network, open_service):
    async with network.open() as peer, open_service() as (fabric, service):
        service.heard(peer.peer_id, peer.addresses, "gossip")
        await trio.sleep(10)
        assert fabric.connected_peers() == {peer.peer_id}
        fabric._events.close()
        await fabric.disconnect(peer.peer_id)
        await trio.sleep(5)
        assert fabric.connected_peers() == {peer.peer_id}


# --- The registry -----------------------------------------------------------------------------------


async def test_a_registry_that_cannot_be_written_is_told_once(autojump_clock, open_service, tmp_path, caplog):
    (tmp_path / "run").write_text("in the way")
    async with open_service() as (_, service):
        await trio.sleep(3 * limits.REGISTRY_CHECK_S)
        assert "cannot be written" in service.status()[1]
    assert caplog.text.count("may not find this one") == 1


async def test_an_entry_that_cannot_be_withdrawn_is_told(autojump_clock, open_service, tmp_path, caplog):
    async with open_service() as (fabric, service):
        path = service._registry.path_of(fabric.peer_id)
        path.unlink()
        (path / "full").mkdir(parents=True)
    assert "may not find this one" in caplog.text


async def test_an_entry_that_somebody_removed_or_that_is_outdated_is_written_again(
    autojump_clock, open_service, tmp_path
):
    other = LocalRegistry(tmp_path)
    async with open_service() as (fabric, service):
        service._registry.path_of(fabric.peer_id).unlink()
        await trio.sleep(limits.REGISTRY_CHECK_S + 1)
        assert [entry.peer_id for entry in other.read_all()] == [fabric.peer_id]
        fabric._addresses = ("/ip4/10.1.1.1/tcp/9",)
        await trio.sleep(limits.REGISTRY_CHECK_S + 1)
        assert [entry.addresses for entry in other.read_all()] == [("/ip4/10.1.1.1/tcp/9",)]


async def test_a_node_that_was_restarted_is_dialed_again_soon(autojump_clock, network, open_service, peer_ids):
    address = "/ip4/10.9.9.9/tcp/1"
    async with open_service(peer_ids[0]) as (fabric, service):
        async with open_service(peer_ids[1], addresses=[address]):
            await trio.sleep(10)
            assert fabric.connected_peers() == {peer_ids[1]}
        await trio.sleep(200)
        assert service.directory.get(peer_ids[1]).failures > 4
        async with open_service(peer_ids[1], addresses=[address]):
            await trio.sleep(limits.REGISTRY_POLL_SLOW_S + limits.DISCOVERY_FRESH_RETRY_S)
            assert fabric.connected_peers() == {peer_ids[1]}


# --- The cache --------------------------------------------------------------------------------------


async def test_peers_of_the_last_run_are_found_without_being_told(autojump_clock, network, open_service, tmp_path):
    async with network.open() as peer:
        async with open_service(join=(join_address(peer),)) as (fabric, _):
            await trio.sleep(1)
        async with open_service() as (fabric, service):
            await trio.sleep(1)
            assert fabric.connected_peers() == {peer.peer_id}
            assert any("cache 1" in line for line in service.status())


async def test_the_cache_is_written_soon_after_a_connection(
    autojump_clock, network, open_service, tmp_path, tag, wall_clock, entropy
):
    cache = PeerCache(tmp_path, tag, clock=wall_clock, entropy=entropy)
    async with network.open() as peer, open_service(join=(join_address(peer),)):
        await trio.sleep(limits.PEER_CACHE_WRITE_DELAY_S + 1)
        assert cache.load() == (CachedPeer(peer_id=peer.peer_id, addresses=peer.addresses, seen_at=wall_clock.time),)


async def test_the_cache_keeps_neither_the_refused_nor_the_unreachable_nor_those_of_this_host(
    autojump_clock, network, open_service, tmp_path, tag, wall_clock, entropy, peer_ids
):
    cache = PeerCache(tmp_path, tag, clock=wall_clock, entropy=entropy)
    cache.save([CachedPeer(peer_id=peer_ids[5], addresses=("/ip4/10.9.9.9/tcp/1",), seen_at=wall_clock.time)])
    async with (
        network.open() as stranger,
        network.open() as gone,
        network.open() as untouched,
        open_service(),
        open_service() as (fabric, service),
    ):
        for peer in (stranger, gone):
            service.heard(peer.peer_id, peer.addresses, "gossip")
        await trio.sleep(1)
        service.refused(stranger.peer_id)
        network.kill(gone.peer_id)
        await trio.sleep(9)
        assert len(fabric.connected_peers()) == 1
        service.heard(untouched.peer_id, (), "gossip")
    ((seen_peer, seen_at),) = [(peer.peer_id, peer.seen_at) for peer in cache.load()]
    assert seen_peer == gone.peer_id
    assert seen_at < wall_clock.time


# --- Multicast --------------------------------------------------------------------------------------


async def test_peers_of_the_local_network_find_each_other(open_service, tmp_path, tag, entropy, group_port, network):
    """Real sockets, so the real clock; the data directories differ, so only multicast can tell."""

    @asynccontextmanager
    async def on_the_lan(name):
        beacons = LanBeacons(
            name,
            tag,
            addresses=lambda: (f"/ip4/10.0.0.9/tcp/{name}",),
            heard=lambda hint: hints[name](hint),
            entropy=entropy,
            port=group_port,
            interfaces=lambda: ("127.0.0.1",),
        )
        address = f"/ip4/10.0.0.9/tcp/{name}"
        data_dir = tmp_path / name
        async with open_service(name, addresses=[address], data_dir=data_dir, beacons=beacons) as (fabric, service):
            hints[name] = service._take
            yield fabric, service

    hints = {}
    async with on_the_lan("1"), on_the_lan("2") as (second, service):
        async with second.events() as events:
            with trio.fail_after(10):
                assert (await events.receive()).peer_id == "1"
        assert second.connected_peers() == {"1"}
        assert service.status()[0].startswith("local network: multicast on 1 interfaces")


async def test_by_default_beacons_tell_where_the_fabric_listens(network, tag, tmp_path):
    async with network.open() as fabric:
        service = DiscoveryService(fabric, mesh_tag=tag, role="node", data_dir=tmp_path)
        assert service._beacons._addresses() == fabric.addresses
        assert service._beacons._port == limits.BEACON_PORT
        assert service.status()[0] == "local network: not started"
        service.close_in_child()
