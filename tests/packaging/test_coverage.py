"""That the coverage settings see code in threads, subprocesses, forks, and processes that are ended by a signal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

PARTS = {
    "sparkle_mesh/__init__.py": "",
    "sparkle_mesh/in_thread.py": "def run():\n    return 1\n",
    "sparkle_mesh/in_subprocess.py": "def run():\n    return 1\n",
    "sparkle_mesh/in_fork.py": "def run():\n    return 1\n",
    # On one line, so that the signal, which comes once it is ready, cannot come before the last line.
    "sparkle_mesh/until_sigterm.py": "import time\ndef run():\n    print('ready', flush=True), time.sleep(40)\n",
    "sparkle_mesh/never_imported.py": "x = 1\n",
    "transport/__init__.py": "",
    "transport/link.py": "def run():\n    return 1\n",
    "collectives/__init__.py": "",
}
MAIN = """
import importlib.util, os, subprocess, sys, threading
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

# As an editable install does it.
spec = importlib.util.spec_from_file_location("sparkle_mesh.transport.link", "transport/link.py")
link = importlib.util.module_from_spec(spec)
spec.loader.exec_module(link)
link.run()

from sparkle_mesh import in_fork, in_thread
thread = threading.Thread(target=in_thread.run)
thread.start()
thread.join()

child = os.fork()
if not child:
    in_fork.run()
    os._exit(0)
os.waitpid(child, 0)

root = {"env": os.environ | {"PYTHONPATH": os.getcwd()}, "cwd": "/"}
subprocess.run([sys.executable, "-c", "from sparkle_mesh import in_subprocess as m; m.run()"], check=True, **root)

code = "from sparkle_mesh import until_sigterm as m; m.run()"
ended = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, **root)
ended.stdout.readline()
ended.terminate()
ended.communicate()
assert ended.returncode == -15, ended.returncode
"""


@pytest.fixture
def measured(root, tmp_path):
    """Return lines that were measured and missed, by file, in a small clone with this project's settings."""
    shutil.copy(root / "pyproject.toml", tmp_path)
    for name, text in PARTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "main.py").write_text(MAIN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    for arguments in (
        ["run", "main.py"],
        ["combine", "--quiet"],
        ["json", "--quiet", "--fail-under=0", "-o", "coverage.json"],
    ):
        command = [sys.executable, "-m", "coverage", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "coverage.json").read_text())["files"]


def test_all_code_that_runs_is_seen(measured):
    for name in ("in_thread", "in_subprocess", "in_fork"):
        assert measured[f"sparkle_mesh/{name}.py"]["missing_lines"] == [], name
    assert measured["sparkle_mesh/until_sigterm.py"]["missing_lines"] == []
    assert measured["transport/link.py"]["missing_lines"] == []


def test_what_does_not_run_is_missed(measured):
    assert measured["sparkle_mesh/never_imported.py"]["missing_lines"] == [1]


def test_every_file_counts_once(measured):
    assert {name for name in measured if PARTS.get(name)} == {name for name, text in PARTS.items() if text}
    assert set(measured) <= set(PARTS)
