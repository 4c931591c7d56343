"""Whole nodes on the real control plane: their settings, and waiting for what happens to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from sparkle_mesh.environment import IDENTITY_NAME
from sparkle_mesh.fabric.identity import Identity, load_or_create_identity
from sparkle_mesh.membership.keys import MeshKey
from sparkle_mesh.node import MeshNode, NodeConfig, NodeEvent

KEY = MeshKey.generate()


def config(data_dir: Path, **changes: Any) -> NodeConfig:
    """Return the settings of a node, or of a trainer, of the mesh ``run`` that all tests' nodes are of."""
    settings: dict[str, Any] = {
        "mesh": "run",
        "key": KEY,
        "identity": load_or_create_identity(data_dir / IDENTITY_NAME),
        "listen": ("/ip4/127.0.0.1/tcp/0",),
        "data_dir": data_dir,
        "lan": False,
    }
    if changes.get("role") == "trainer":
        settings["identity"] = Identity.generate()
    return NodeConfig(**(settings | changes))


def address_of(node: MeshNode) -> str:
    """Return where others can join ``node``."""
    return f"{node.fabric.addresses[0]}/p2p/{node.peer_id}"


async def until(node: MeshNode, holds: Callable[[NodeEvent | None], bool]) -> None:
    """Wait until that holds of an event of the node, or of none to begin with."""
    with trio.fail_after(30), node.events() as events:
        if holds(None):
            return
        async for event in events:
            if holds(event):
                return


async def until_joined(node: MeshNode, *others: MeshNode) -> None:
    """Wait until the peers of ``node`` are these."""
    wanted = {other.peer_id for other in others}
    await until(node, lambda event: {peer.peer_id for peer in node.peers()} == wanted)
