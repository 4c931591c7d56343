"""One process over the real control plane; run by the tests with its settings as JSON in the first argument.

Prints a JSON line once it listens, one more once it is connected to as many peers as wanted, and ends when its
standard input does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import trio

from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.discovery.lan import LanBeacons
from sparkle_mesh.discovery.service import DiscoveryService
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric


def say(**fields):
    print(json.dumps({"at": time.monotonic(), "cpu_s": time.process_time(), **fields}), flush=True)


async def run(settings):
    tag = bytes.fromhex(settings["tag"])
    async with open_libp2p_fabric(Identity.generate(), listen=("/ip4/127.0.0.1/tcp/0",)) as fabric:
        beacons = None
        if settings["beacon_port"] is not None:
            beacons = LanBeacons(
                fabric.peer_id,
                tag,
                addresses=lambda: fabric.addresses,
                heard=lambda hint: service._take(hint),
                entropy=SYSTEM_ENTROPY,
                port=settings["beacon_port"],
                interfaces=lambda: ("127.0.0.1",),
            )
        service = DiscoveryService(
            fabric,
            mesh_tag=tag,
            role="trainer",
            data_dir=Path(settings["data_dir"]),
            lan=False,
            beacons=beacons,
        )
        async with trio.open_nursery() as nursery:
            async with fabric.events() as events:
                await nursery.start(service.run)
                say(peer_id=fabric.peer_id)
                while len(fabric.connected_peers()) < settings["peers"]:
                    await events.receive()
                say(connected=sorted(fabric.connected_peers()), status=service.status())
            await trio.to_thread.run_sync(sys.stdin.buffer.read, abandon_on_cancel=True)
            say(final=True)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(run, json.loads(sys.argv[1]))
