"""Beside the real go-libp2p: its DHT as the meeting place, its GossipSub, its relay, its identify."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sparkle_mesh.discovery.public_dht import PublicDht
from sparkle_mesh.discovery.public_peers import PublicPeers
from sparkle_mesh.errors import UnreachableError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import FabricStream
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric
from sparkle_mesh.membership.keys import MeshKey
from sparkle_mesh.wire import PeerAddress
from tests.interop.go_peer import GoPeer, go_peer, needs_go
from tests.reach.lines import read_lines

pytestmark = [pytest.mark.interop, needs_go]

TRAINER = Path(__file__).parents[1] / "reach" / "trainer.py"


@pytest.fixture
def go() -> Iterator[GoPeer]:
    with go_peer() as peer:
        yield peer


async def test_provider_records_by_which_two_peers_that_know_only_it_find_each_other(go: GoPeer) -> None:
    key = b"\x12\x20" + hashlib.sha256(b"a mesh").digest()
    root = PeerAddress(peer_id=go.peer_id, addresses=(go.address,))
    async with open_libp2p_fabric(Identity.generate()) as one, open_libp2p_fabric(Identity.generate()) as other:
        dhts = [PublicDht(f, f.reach.kad, roots=lambda: [root], public_peers=PublicPeers()) for f in (one, other)]
        found: list[PeerAddress] = []
        with trio.fail_after(30):
            assert await dhts[0].meet(key, one.addresses, found.append) == (1, 1)
            assert found == []
            while not found:
                await dhts[1].meet(key, other.addresses, found.append)
        assert found[0] == PeerAddress(peer_id=one.peer_id, addresses=one.addresses)
        # Whom they had connected to only to ask, they let go.
        assert go.peer_id not in one.connected_peers() | other.connected_peers()


async def test_signed_gossip_both_ways(go: GoPeer) -> None:
    async with open_libp2p_fabric(Identity.generate()) as fabric, fabric.subscribe("topic") as messages:
        await fabric.connect(go.peer_id, [go.address])
        with trio.fail_after(30), go.control() as control, go.control() as subscription:
            await trio.to_thread.run_sync(subscription.subscribe, "topic")
            received = None
            while received is None:
                await trio.to_thread.run_sync(control.publish, "topic", b"from go")
                with trio.move_on_after(0.5):
                    received = await messages.receive()
            assert (received.peer_id, received.data) == (go.peer_id, b"from go")
            await fabric.publish("topic", b"from here")
            message = None
            while message is None or message.data != b"from here":
                message = await trio.to_thread.run_sync(subscription.next_message)
            assert list(message.topicIDs) == ["topic"]
            assert message.signature


async def test_what_it_sees_of_this_process_and_serves(go: GoPeer) -> None:
    from sparkle_mesh.fabric.observers import ask_identity, ask_to_dial_back

    async with open_libp2p_fabric(Identity.generate()) as fabric:
        await fabric.connect(go.peer_id, [go.address], from_port=True)
        report = await ask_identity(fabric, go.peer_id)
        # It was dialed from the very port on which this process listens.
        assert report.seen_at == fabric.addresses[0]
        assert {"/ipfs/kad/1.0.0", "/meshsub/1.1.0", "/libp2p/circuit/relay/0.2.0/hop"} <= report.protocols
        # It serves no dial-backs unless told so, and says so.
        assert await ask_to_dial_back(fabric, go.peer_id, fabric.addresses) == "unknown"


async def test_what_its_relay_carries_by_default_is_too_little_for_a_mesh(go: GoPeer) -> None:
    async with open_libp2p_fabric(Identity.generate()) as hidden, open_libp2p_fabric(Identity.generate()) as other:
        await hidden.connect(go.peer_id, [go.address])
        place = await hidden.reach.relays.reserve(go.peer_id)
        assert place.carries_bytes == 128 * 1024
        with pytest.raises(UnreachableError, match="the relay carries 131072 bytes only"):
            await other.connect(hidden.peer_id, [place.address])
        assert other.peer_id not in hidden.connected_peers()


async def test_a_stream_through_it_as_relay() -> None:
    async def echo(stream: FabricStream) -> None:
        while data := await stream.read(65536):
            await stream.write(data)
        await stream.aclose()

    for _ in range(8):
        # Two services of the daemon compete for the protocol; one carries 4 GiB, the other 128 KiB.
        with go_peer(("-relayService=1", "-autonat", "-forceReachabilityPublic")) as go:
            async with (
                open_libp2p_fabric(Identity.generate()) as hidden,
                open_libp2p_fabric(Identity.generate()) as one,
            ):
                hidden.handle("/echo", echo)
                await hidden.connect(go.peer_id, [go.address])
                place = await hidden.reach.relays.reserve(go.peer_id)
                if place.carries_bytes is not None:
                    continue
                with trio.fail_after(30):
                    try:
                        await one.connect(hidden.peer_id, [place.address])
                    except UnreachableError as error:
                        assert "bytes only" in str(error)  # noqa: PT017 - the service changed since
                        continue
                    assert one.remote_address(hidden.peer_id) == place.address
                    stream = await one.open_stream(hidden.peer_id, "/echo")
                    payload = os.urandom(2_000_000)
                    echoed = bytearray()
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(stream.write, payload)
                        while len(echoed) < len(payload):
                            echoed += await stream.read(65536)
                    assert bytes(echoed) == payload
                    return
    pytest.fail("the daemon never offered the relay that carries 4 GiB")


def test_nodes_and_trainers_that_know_only_it_form_a_mesh_and_reduce(go: GoPeer, tmp_path: Path) -> None:
    key_file = tmp_path / "mesh.key"
    MeshKey.generate().save(key_file)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "SPARKLE_BOOTSTRAP": "none"}
    nodes, trainers = [], []
    try:
        for name in ("one", "other"):
            nodes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "sparkle_mesh.cli.node", "--mesh", "nat-test", "--key-file", key_file,
                     "--data-dir", tmp_path / name, "--listen", "/ip4/127.0.0.1/tcp/0", "--no-lan", "--no-port-mapping",
                     "--bootstrap", go.bootstrap],
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment,
                )
            )  # fmt: skip
        for node in nodes:
            assert read_lines(node, until="peer joined", timeout_s=30)
        for name in ("third", "fourth"):
            command = [sys.executable, TRAINER, tmp_path / name, key_file, go.bootstrap, "2"]
            trainers.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                    env={**environment, "SPARKLE_TEST_LISTEN": "/ip4/127.0.0.1/tcp/0"},
                )
            )  # fmt: skip
        for trainer in trainers:
            output, _ = trainer.communicate(timeout=50)
            assert trainer.returncode == 0
            assert '"right": true' in output
    finally:
        for process in (*nodes, *trainers):
            if process.poll() is None:
                process.terminate()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()
