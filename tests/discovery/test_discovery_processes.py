"""Real processes over the real control plane find each other, by either of the ways that need no address."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from sparkle_mesh.discovery.local import SUFFIX

WORKER = Path(__file__).with_name("discovery_worker.py")


@pytest.fixture
async def start(tmp_path, tag):
    """Return a function that starts a worker; what is left of them is ended with the test."""
    processes = []

    async def start(peers, *, data_dir=tmp_path, beacon_port=None):
        settings = {"peers": peers, "data_dir": str(data_dir), "beacon_port": beacon_port, "tag": tag.hex()}
        command = [sys.executable, str(WORKER), json.dumps(settings)]
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        return Worker(process)

    yield start
    for process in processes:
        process.kill()
        await process.wait()
        await process.stdin.aclose()
        await process.stdout.aclose()


class Worker:
    """A started worker and the lines it says."""

    def __init__(self, process):
        self.process = process
        self._rest = b""

    async def line(self):
        """Return what it says next."""
        while b"\n" not in self._rest:
            chunk = await self.process.stdout.receive_some()
            assert chunk, "the worker ended"
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


@pytest.mark.parametrize(("way", "count"), [("registry", 3), ("multicast", 2)])
async def test_processes_started_together_find_each_other(start, tmp_path, group_port, way, count):
    with trio.fail_after(50):
        workers = []
        for number in range(count):
            options = {} if way == "registry" else {"data_dir": tmp_path / str(number), "beacon_port": group_port}
            workers.append(await start(count - 1, **options))
        up = [await worker.line() for worker in workers]
        connected = [await worker.line() for worker in workers]
        for worker in workers:
            await worker.process.stdin.aclose()
            assert await worker.process.wait() == 0
    everybody = {line["peer_id"] for line in up}
    assert len(everybody) == count
    for mine, found in zip(up, connected, strict=True):
        assert set(found["connected"]) == everybody - {mine["peer_id"]}
    assert [path for path in tmp_path.rglob("run/*") if path.suffix == SUFFIX] == []
