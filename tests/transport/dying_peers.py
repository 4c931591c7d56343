"""Forks peers that open a link and talk without end, until they are killed.

Reads one line of JSON for each from standard input, and prints the new process's id. The keys of the links follow from
their numbers, so that no control plane is needed. A peer whose link ends before it is killed ends by itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

import trio

from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.errors import LinkClosedError
from sparkle_mesh.transport.ciphers import AES_256_GCM
from sparkle_mesh.transport.data_connections import DataConnections
from sparkle_mesh.transport.handshake import SHARED_MEMORY, LinkAnswer, LinkKeys, StreamKeys
from sparkle_mesh.transport.shared_memory import SharedMemory

HOST_ID = b"h" * 16
PAYLOAD = bytes(4 * 2**20)


def link_keys(number: int) -> LinkKeys:
    """Return the keys of link ``number``."""
    one, other, opening, welcome = (bytes([kind]) * 28 + number.to_bytes(4, "big") for kind in range(4))
    return LinkKeys(number.to_bytes(16, "big"), AES_256_GCM, (StreamKeys(one, other),), opening, welcome)


async def talk(kind: str, number: int, addresses: list[str], local_address: str) -> None:
    """Open link ``number``, say where this process itself could be met, and send what nobody will read to its end."""
    memory = SharedMemory.open(SYSTEM_ENTROPY) if kind == SHARED_MEMORY else None
    fabric: Any = SimpleNamespace(addresses=(), remote_address=lambda _: None)
    connections = DataConnections(fabric, HOST_ID, memory)
    answer = LinkAnswer(
        version=1,
        secret=bytes(32),
        cipher=AES_256_GCM,
        host_id=HOST_ID,
        addresses=tuple(addresses),
        kinds=(kind,),
        local_address=local_address,
    )
    async with trio.open_nursery() as nursery:
        if memory is not None:
            await nursery.start(memory.serve, trio.aclose_forcefully)
        link = await connections.reach("survivor", answer, link_keys(number), set())
        try:
            await link.send(memory.address.encode() if memory else b"")
            while True:
                await link.send(b"", (PAYLOAD,))
        except LinkClosedError:
            nursery.cancel_scope.cancel()


def main() -> None:
    """Fork a peer for every line."""
    # Nobody waits for them; so the system does not keep what is left of them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                trio.run(talk, wanted["kind"], wanted["number"], wanted["addresses"], wanted["local_address"])
            finally:
                os._exit(0)
        print(child, flush=True)
    # Children that are ignored are waited for all the same: this fails once there are none.
    try:
        os.wait()
    except ChildProcessError:
        return


if __name__ == "__main__":
    main()
