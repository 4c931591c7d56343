"""A training process for tests: joins, reduces, and tells how it is connected, one JSON object a line.

Usage: trainer.py DATA_DIR KEY_FILE BOOTSTRAP MIN_PEERS [JOIN ...]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import trio

import sparkle_mesh as sparkle

COUNT = 100_000


def tell(**facts: object) -> None:
    """Print one line."""
    print(json.dumps(facts), flush=True)


async def main(data_dir: str, key_file: str, bootstrap: str, min_peers: str, *join: str) -> None:
    """Reduce a few times, and leave together."""
    opening = sparkle.open_mesh(
        "nat-test",
        key=sparkle.MeshKey.load(key_file),
        bootstrap=[item for item in bootstrap.split(",") if item],
        data_dir=Path(data_dir),
        listen=[os.environ.get("SPARKLE_TEST_LISTEN", "/ip4/0.0.0.0/tcp/45654")],
        join=join,
        lan=False,
        min_peers=int(min_peers),
        timeout_s=60,
    )
    async with opening as mesh:
        rank, size = mesh.rank, mesh.size
        for _ in range(5):
            total = await mesh.all_reduce(np.arange(COUNT, dtype=np.float64) + rank)
        expected = size * np.arange(COUNT) + sum(range(size))
        started_at = trio.current_time()
        await mesh.all_reduce(np.ones(1 << 20))
        seconds = trio.current_time() - started_at
        node = mesh._node
        others = [member.peer_id for member in mesh.view.members if member.peer_id != node.peer_id]
        tell(
            rank=rank,
            size=size,
            right=bool((total == expected).all()),
            megabytes_per_s=round(8.4 / seconds, 1),
            members={peer_id: node.fabric.remote_address(peer_id) for peer_id in others},
            addresses=node.fabric.addresses,
            discovery=node.status().discovery,
        )
        await mesh.barrier()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
