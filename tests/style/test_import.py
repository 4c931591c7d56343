"""``import sparkle_mesh`` is quick, and touches neither the network nor a device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"libp2p", "torch", "cupy", "pyopencl", "jax", "sklearn", "matplotlib", "rich", "numpy", "trio"}
CPU_MAX_S = 0.5
# Prints what importing loaded, the CPU seconds it took, and the threads and sockets there are.
PROBE = """
import json, sys, time
before, started = set(sys.modules), time.process_time()
{statement}
spent = time.process_time() - started
import os, threading
names = []
for descriptor in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []:
    try:
        names.append(os.readlink("/proc/self/fd/" + descriptor))
    except OSError:
        continue
print(json.dumps({{
    "loaded": sorted({{name.split(".")[0] for name in set(sys.modules) - before}}),
    "cpu_s": spent,
    "threads": threading.active_count(),
    "sockets": sum(name.startswith("socket:") for name in names),
}}))
"""


def probe(statement):
    # -I: as in a program of the user's, with nothing of this process's environment (its coverage included).
    command = [sys.executable, "-I", "-c", PROBE.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, env={})
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def imported():
    return probe("import sparkle_mesh")


def test_import_loads_nothing_heavy(imported):
    assert HEAVY.isdisjoint(imported["loaded"])


def test_import_is_quick(imported):
    assert imported["cpu_s"] < CPU_MAX_S


def test_import_starts_nothing(imported):
    assert imported["threads"] == 1
    assert imported["sockets"] == 0


def test_unknown_name_loads_nothing_heavy():
    found = probe(
        "import sparkle_mesh\nassert not hasattr(sparkle_mesh, 'no_such_name')\nsparkle_mesh.errors.UsageError"
    )
    assert HEAVY.isdisjoint(found["loaded"])


def test_probe_sees_what_is_loaded():
    found = probe(
        "import socket, threading, trio\nkept = socket.socket()\nthreading.Thread(target=kept.fileno).start()"
    )
    assert "trio" in found["loaded"]
    assert found["sockets"] == 1
