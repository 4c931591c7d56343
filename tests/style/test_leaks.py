"""That a test which leaves something behind fails, and says what."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"

LEAVES_NOTHING = """
import subprocess, sys, threading, socket
def test_it():
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    subprocess.run([sys.executable, "-c", ""], check=True)
    with socket.socket():
        pass
"""
LEAVES_A_THREAD = """
import threading
def test_it():
    threading.Thread(target=threading.Event().wait, name="the leaver", daemon=True).start()
"""
LEAVES_A_CHILD = """
import subprocess, sys
kept = []
def test_it():
    kept.append(subprocess.Popen([sys.executable, "-c", "input()  # the leaver"], stdin=subprocess.PIPE))
def teardown_module():
    for process in kept:
        process.communicate()
"""
LEAVES_AN_ENDED_CHILD = """
import os
kept = []
def test_it():
    kept.append(os.fork())
    if not kept[-1]:
        os._exit(0)
    os.waitid(os.P_PID, kept[-1], os.WEXITED | os.WNOWAIT)
def teardown_module():
    os.waitpid(kept[0], 0)
"""
LEAVES_A_SOCKET = """
import socket
kept = []
def test_it():
    kept.append(socket.socket())
def teardown_module():
    kept[0].close()
"""
LEAVES_AN_IDLE_TRIO_WORKER = """
import trio
async def test_it():
    await trio.to_thread.run_sync(lambda: None)
"""
LEAVES_A_BUSY_TRIO_WORKER = """
import threading, trio
release = threading.Event()
async def test_it():
    with trio.move_on_after(0.01):
        await trio.to_thread.run_sync(release.wait, abandon_on_cancel=True)
def teardown_module():
    release.set()
"""
MULTIPROCESSING_HELPER = """
from multiprocessing import shared_memory
def test_it():
    segment = shared_memory.SharedMemory(create=True, size=1)
    segment.close()
    segment.unlink()
"""


TIDY = {
    "nothing": LEAVES_NOTHING,
    "idle_trio_worker": LEAVES_AN_IDLE_TRIO_WORKER,
    "multiprocessing_helper": MULTIPROCESSING_HELPER,
}
LEAVING = {
    "thread": (LEAVES_A_THREAD, r"thread the leaver"),
    "child": (LEAVES_A_CHILD, r"child \d+ \(.*input\(\)  # the leaver\)"),
    "ended_child": (LEAVES_AN_ENDED_CHILD, r"child \d+ \(ended, not waited for\)"),
    "socket": (LEAVES_A_SOCKET, r"socket socket:\[\d+\]"),
    "busy_trio_worker": (LEAVES_A_BUSY_TRIO_WORKER, r"thread wait from .*"),
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what pytest printed when all these tests ran beside a copy of the suite's conftest.py."""
    folder = tmp_path_factory.mktemp("leaks")
    shutil.copy(CONFTEST, folder)
    (folder / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    for name, source in (TIDY | {name: source for name, (source, _) in LEAVING.items()}).items():
        (folder / f"test_{name}.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", str(folder)]
    wide = os.environ | {"COLUMNS": "1000"}
    done = subprocess.run(command, cwd=folder, env=wide, capture_output=True, text=True, timeout=50, check=False)
    return done.stdout + done.stderr


@pytest.mark.xdist_group("leaks")
@pytest.mark.parametrize("name", TIDY)
def test_tidy_test_passes(printed, name):
    assert f"test_{name}.py::test_it PASSED" in printed
    assert f"ERROR test_{name}.py" not in printed


@pytest.mark.xdist_group("leaks")
@pytest.mark.parametrize("name", LEAVING)
def test_leaving_test_fails_and_says_what(printed, name):
    what = LEAVING[name][1]
    assert re.search(rf"(?m)^ERROR test_{name}\.py::test_it - Failed: the test left behind: {what}$", printed), printed
