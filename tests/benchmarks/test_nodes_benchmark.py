"""``nodes.py``: a small run tells every figure, and what cannot be measured is told in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "nodes.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False, timeout=110
    )


@pytest.mark.timeout(120)
def test_a_small_run_tells_all(tmp_path):
    ended = run("--nodes", "3", "--idle", "1", "--kill", "0", "--json", str(tmp_path / "nodes.json"))
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "nodes.json").read_text())
    names = {"nodes", "one_mesh_s", "all_found_s", "cpu_s_per_min", "memory_mb", "connections", "connections_worst"}
    assert set(figures) - {"kb_per_min"} == names
    assert figures["connections"] == figures["connections_worst"] == 2
    assert figures.get("kb_per_min", 0.0) >= 0
    assert 0 < figures["one_mesh_s"] <= figures["all_found_s"] < 60
    assert "(goal: under 20)" in ended.stdout


@pytest.mark.parametrize("arguments", [("--nodes", "1"), ("--nodes", "3", "--kill", "3")])
def test_wrong_use_is_told(arguments):
    ended = run(*arguments)
    assert ended.returncode == 2
    assert "--nodes" in ended.stderr
