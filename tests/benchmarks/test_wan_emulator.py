"""Real emulated networks: TCP sees their delay, rate and losses, and nothing is left of them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAM = BENCHMARKS / "wan_emulator.py"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and /dev/net/tun"
)


@pytest.fixture
def emulator(load_benchmark):
    return load_benchmark("wan_emulator")


@pytest.fixture
def settings(load_benchmark):
    return load_benchmark("_wan_link").Settings


def connect(wan, *, ipv6=False):
    """Return a connection from host 0 to host 1, both ends, and the seconds that connecting took."""
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    address = (wan.addresses6 if ipv6 else wan.addresses)[1]
    with wan.inside(1, lambda: socket.create_server((address, 0), family=family)) as listener:
        client = wan.inside(0, lambda: socket.socket(family))
        client.settimeout(10)
        started = time.monotonic()
        client.connect((address, listener.getsockname()[1]))
        seconds = time.monotonic() - started
        server, _ = listener.accept()
    server.settimeout(10)
    return client, server, seconds


def transfer(client, server, payload):
    """Send ``payload``; return what arrived and the seconds it took."""
    sender = threading.Thread(target=client.sendall, args=(payload,))
    started = time.monotonic()
    sender.start()
    received = bytearray()
    while len(received) < len(payload):
        received += server.recv(1 << 20)
    seconds = time.monotonic() - started
    sender.join()
    return bytes(received), seconds


def round_trip(client, server):
    started = time.monotonic()
    client.sendall(b"x")
    server.recv(1)
    server.sendall(b"y")
    client.recv(1)
    return time.monotonic() - started


@pytest.mark.parametrize("card", [False, True])
def test_delay_and_rate_are_as_asked_and_can_be_changed(emulator, settings, card):
    with emulator.Emulator([settings(20e6, 20e6, 0.02, card=card)] * 2) as wan:
        client, server, seconds = connect(wan)
        with client, server:
            assert 0.04 <= seconds < 0.3
            assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).strip(b"\0") == b"cubic"
            assert statistics.median(round_trip(client, server) for _ in range(5)) == pytest.approx(0.05, abs=0.01)
            payload = bytes(2_000_000)
            _, seconds = transfer(client, server, payload)
            assert 0.8 < seconds < 2.5  # 0.84 s for the bytes, the delay, and TCP's slow start
            wan.set_delay(0, 0.1)
            assert 0.12 <= min(round_trip(client, server) for _ in range(3)) < 0.2
            wan.set_delay(0, 0.0)
            wan.set_rate(0, up=100e6)
            wan.set_rate(1, down=100e6)
            assert min(transfer(client, server, payload)[1] for _ in range(3)) < 0.5
            wan.cut(1)
            client.sendall(b"z")
            server.settimeout(0.3)
            with pytest.raises(TimeoutError):
                server.recv(1)
            wan.restore(1)
            server.settimeout(10)
            assert server.recv(1) == b"z"
        stats = wan.stats()
        assert stats["hosts"][0]["sent_bytes"] > 4 * 2_000_000
        assert 0 < stats["router"]["cpu_share"] < 1


@pytest.mark.parametrize("ipv6", [False, True])
@pytest.mark.parametrize("mtu", [1500, 9000])
def test_bytes_survive_losses(emulator, settings, ipv6, mtu):
    payload = random.Random(2).randbytes(6_000_000)
    with emulator.Emulator([settings(1e9, 1e9, 0.0005, loss=0.01)] * 2, mtu=mtu) as wan:
        client, server, _ = connect(wan, ipv6=ipv6)
        with client, server:
            received, _ = transfer(client, server, payload)
        assert hashlib.sha256(received).digest() == hashlib.sha256(payload).digest()
        assert wan.stats()["hosts"][0]["lost"] > 0


def test_commands_know_where_they_are_and_their_exit_code_is_told():
    # Whole lines: the commands write to one pipe.
    line = "' '.join([*sys.argv[1:], os.environ['WAN_HOST'], os.environ['WAN_HOSTS']]) + os.linesep"
    code = f"import os, sys; os.write(1, ({line}).encode()); sys.exit(3)"
    command = [sys.executable, str(PROGRAM), "--hosts", "2", "--", sys.executable, "-c", code, "{address}", "{host}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 3, ended.stderr
    assert sorted(ended.stdout.splitlines()) == ["10.77.0.1 0 0 2", "10.77.0.2 1 1 2"]
    assert "emulator: " in ended.stderr


def test_nothing_is_left_when_it_is_killed():
    # Whole lines: the commands write to one pipe.
    inode = "os.stat('/proc/self/ns/net').st_ino"
    script = f"import os, time; os.write(1, b'%d\\n' % {inode}); time.sleep(60)"
    command = [sys.executable, str(PROGRAM), "--hosts", "3", "--", sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        namespaces = {int(killed.stdout.readline()) for _ in range(3)}
        assert len(namespaces - {Path("/proc/self/ns/net").stat().st_ino}) == 3
        children = psutil.Process(killed.pid).children(recursive=True)
        assert len(children) == 4  # the router and three commands
        killed_at = time.time()
        killed.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    # Their numbers may be those of namespaces that others have made since.
    assert namespaces.isdisjoint(namespaces_in_use(killed_at))


def namespaces_in_use(since):
    """Yield the network namespaces of processes that were there at ``since`` already."""
    for process in psutil.process_iter():
        try:
            if process.create_time() <= since:
                yield Path(f"/proc/{process.pid}/ns/net").stat().st_ino
        except (OSError, psutil.Error):  # it has ended
            continue


def test_small_benchmark_writes_rows(tmp_path):
    rows_file = tmp_path / "rows.json"
    small = [
        "--scenario",
        "wan",
        "--mtu",
        "1500",
        "--rounds",
        "1",
        "--iterations",
        "1",
        "--warmup",
        "0",
        "--hosts",
        "2",
    ]
    network = ["--bytes", "256KiB", "--rate", "50mbit", "--delay", "2ms", "--against"]
    command = [sys.executable, str(BENCHMARKS / "wan.py"), *small, *network, "--json", str(rows_file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 0, ended.stderr
    (row,) = json.loads(rows_file.read_text())["rows"]
    assert (row["what"], row["peer"], row["ranks"], row["bytes"]) == ("all_reduce", "raw", 2, 256 << 10)
    assert row["link"] == "wan: 2 hosts, 50 Mbit/s, 4 ms round trip, MTU 1500"
    assert row["ratio"] == pytest.approx(row["peer_s"] / row["ours_s"])
    assert row["of_wire"] == pytest.approx(row["wire_s"] / row["ours_s"])
    assert row["goal"] is None
    assert "emulator: " in ended.stdout
