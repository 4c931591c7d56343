"""A forked child that lives on keeps no connection of its dead parent alive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import trio

from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import PeerConnected, PeerDisconnected
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Runs a fabric in a thread, as a training process does; forks from the main thread; the child outlives it.
PARENT = """
import os, stat, sys, threading, time
import trio
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric

peer_id, address, hooked = sys.argv[1], sys.argv[2], sys.argv[3] == "hooked"
ready = threading.Event()
kept = []

async def raw(stream):
    kept.append(stream)
    await trio.sleep_forever()

async def run():
    async with open_libp2p_fabric(Identity.generate()) as fabric:
        fabric.handle_raw(b"MAGIC", raw)
        kept.append(fabric)
        await fabric.connect(peer_id, [address])
        direct = await trio.open_tcp_stream("127.0.0.1", int(fabric.addresses[0].rpartition("/")[2]))
        await direct.send_all(b"MAGIC")
        while len(kept) < 2:
            await trio.sleep(0.01)
        os.register_at_fork(after_in_child=fabric.close_in_child if hooked else lambda: None)
        ready.set()
        await trio.sleep_forever()

threading.Thread(target=trio.run, args=(run,), daemon=True).start()
ready.wait()
inherited = {int(name) for name in os.listdir("/proc/self/fd")} if os.path.exists("/proc/self/fd") else set()
child = os.fork()
if child == 0:
    def kind(descriptor):
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            return ""
    kinds = [kind(descriptor) for descriptor in inherited]
    left = [text for text in kinds if text.startswith(("socket:", "anon_inode:[eventpoll]"))]
    print(os.getpid(), len(left), flush=True)
    sys.stdout.close()
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.parametrize("hook", ["hooked", "bare"])
async def test_the_death_of_a_parent_is_seen_although_its_child_lives(hook):
    async with open_libp2p_fabric(Identity.generate()) as fabric, fabric.events() as events:
        arguments = [sys.executable, "-W", "ignore", "-c", PARENT, fabric.peer_id, fabric.addresses[0], hook]
        parent = await trio.lowlevel.open_process(arguments, stdout=subprocess.PIPE)
        child = None
        try:
            with trio.fail_after(40):
                assert isinstance(await events.receive(), PeerConnected)
                report = b""
                while not report.endswith(b"\n"):
                    report += await parent.stdout.receive_some()
            child, left = map(int, report.split())
            os.kill(parent.pid, signal.SIGKILL)
            await parent.wait()
            if hook == "hooked":
                # One is the test's own client of the direct connection, which the fabric knows nothing of.
                assert left <= 1
                with trio.fail_after(5):
                    assert isinstance(await events.receive(), PeerDisconnected)
            else:
                # What the hook is for.
                assert left > 3
                with trio.move_on_after(0.5) as scope:
                    await events.receive()
                assert scope.cancelled_caught
            os.kill(child, 0)
        finally:
            if child is not None:
                os.kill(child, signal.SIGKILL)
            if parent.returncode is None:
                parent.kill()
                await parent.wait()
            await parent.stdout.aclose()
