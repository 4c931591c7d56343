"""``all_reduce.py``, small: real groups, the rows, and how it fails."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "all_reduce.py"


@pytest.fixture
def worker(load_benchmark):
    return load_benchmark("_worker")


@pytest.fixture
def group(load_benchmark):
    return load_benchmark("_group")


def test_small_run_writes_rows(tmp_path):
    rows_file = tmp_path / "rows.json"
    small = ["--ranks", "2", "--sizes", "64KiB", "1MiB", "--rounds", "2", "--iterations", "3", "--warmup", "1"]
    command = [sys.executable, str(PROGRAM), *small, "--against", "wire", "--json", str(rows_file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(rows_file.read_text())["rows"]
    assert [(row["what"], row["ranks"], row["bytes"]) for row in rows] == [
        ("all_reduce", 2, nbytes) for nbytes in (65536, 65536, 65536, 1 << 20, 1 << 20, 1 << 20)
    ]
    links = ["tcp, encrypted", "shared memory", "shared memory, allocated"]
    assert [row["link"] for row in rows] == [*links, *links]
    for row in rows:
        assert row["iterations"] == 6
        assert row["ratio"] == pytest.approx(row["peer_s"] / row["ours_s"])
        assert row["of_limit"] == pytest.approx(row["limit_s"] / row["ours_s"])
        assert len(row["ratio_per_round"]) == 2
        assert row["ours_spread"]["min"] <= row["ours_s"] <= row["ours_spread"]["max"]
        assert row["ours_cpu_s_per_gb"] > 0
    assert "64 KiB" in ended.stdout
    assert "ratio" in ended.stdout.splitlines()[0]


def test_algorithms_are_compared(tmp_path):
    rows_file = tmp_path / "rows.json"
    small = ["--ranks", "2", "--sizes", "64KiB", "--rounds", "1", "--iterations", "2", "--algorithms", "all"]
    command = [sys.executable, str(PROGRAM), *small, "--json", str(rows_file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(rows_file.read_text())["rows"]
    names = [row["algorithm"] for row in rows]
    assert names == ["auto", "ring", "tree", "direct", "halving_doubling", "butterfly"]
    assert all(row["verified"] and row["predicted_s"] > 0 for row in rows)
    assert max(row["ratio"] for row in rows if row["algorithm"] != "auto") == 1
    assert "picked" in ended.stdout
    assert "auto over the best of them: median" in ended.stdout


def test_calls_are_measured(tmp_path):
    rows_file = tmp_path / "rows.json"
    command = [sys.executable, str(PROGRAM.with_name("calls.py")), "--ranks", "2", "--links", "tcp"]
    ended = subprocess.run(
        [*command, "--iterations", "1", "--json", str(rows_file)],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(rows_file.read_text())["rows"]
    assert [row["what"] for row in rows[:2]] == ["1000 arrays of 1 KiB", "8 in flight"]
    memory = {row["what"]: row for row in rows[2:]}
    # A result that is not the caller's array until it is agreed on, and nothing that grows with the array beside it.
    assert all(row["of_bytes"] < 1.1 for row in memory.values()), memory
    assert all(row["allocated_again_bytes"] < 2**20 for row in memory.values()), memory


def test_absent_peer_is_one_line_and_exit_code_2(load_benchmark, monkeypatch, capsys):
    benchmark, backends = load_benchmark("all_reduce"), load_benchmark("_backends")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["--against", "gloo"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "pip install torch" in message


@pytest.mark.parametrize(
    "arguments", [["--ranks", "1"], ["--sizes", "7"], ["--rounds", "0"], ["--iterations", "0"], ["--against", "nobody"]]
)
def test_wrong_use_is_refused(load_benchmark, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        load_benchmark("all_reduce").main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_failing_worker_is_told_with_its_log(group):
    failing = group.Group("wire", 1, lambda _, __, **options: subprocess.Popen(["sh", "-c", "echo oh >&2"], **options))
    with pytest.raises(group.GroupError, match=r"process 0 ended:\n(.|\n)*oh"):
        failing.__enter__()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="OpenMPI is not installed")
@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")
def test_processes_of_one_launcher_are_a_group(group):
    with group.Group("openmpi", 2) as ranks:
        measured = ranks.measure(1 << 16, iterations=3, warmup=1, algorithm="auto", timeout_s=30)
    assert measured.verified
    assert len(measured.seconds) == 3


def test_silent_worker_is_not_awaited_for_ever(group):
    with group.Group("wire", 2) as wires:
        with pytest.raises(group.GroupError, match="did not answer within 0 s"):
            wires.measure(64 << 20, iterations=1000, warmup=0, algorithm="auto", timeout_s=0.05)
        for process in wires._workers:
            process.kill()


class OneRank:
    """A backend of one rank, whose result is off by ``error`` in its last element from iteration ``wrong_from`` on."""

    rank, size, reduces = 0, 1, True

    def __init__(self, error: float, wrong_from: int) -> None:
        self.error, self.wrong_from, self.iterations, self.barriers = error, wrong_from, 0, 0

    def allocate(self, count: int) -> np.ndarray:
        return np.empty(count, np.float32)

    def barrier(self) -> None:
        self.barriers += 1

    def explain(self, nbytes: int) -> dict[str, object]:
        return {}

    def all_reduce(self, array: np.ndarray, algorithm: str) -> None:
        if self.iterations >= self.wrong_from:
            array[-1] += self.error
        self.iterations += 1


@pytest.mark.parametrize(("error", "wrong_from", "verified"), [(0.0, 0, True), (1.0, 0, False), (1.0, 4, False)])
def test_wrong_sums_are_noticed(worker, error, wrong_from, verified):
    backend = OneRank(error, wrong_from)
    command = {"bytes": 4 * 100_000, "iterations": 3, "warmup": 2, "algorithm": "auto"}
    reply = worker.measure(backend, command)
    assert reply["verified"] is verified
    assert len(reply["seconds"]) == 3
    assert backend.barriers == backend.iterations == 5


def test_pattern_has_exact_sums(worker):
    pattern = worker.pattern(3000)
    assert pattern.dtype == np.float32
    assert len(pattern) == 3000
    assert pattern.max() * 64 * 65 / 2 < 2**24  # whole numbers that float32 holds, up to 64 ranks


def test_wrong_results_end_the_run(load_benchmark, group, monkeypatch, capsys):
    benchmark = load_benchmark("all_reduce")

    def measure(*_: object) -> object:
        return group.Measurement(seconds=[0.1], cpu_seconds=0.1, verified=False)

    monkeypatch.setattr(group.Group, "measure", measure)
    monkeypatch.setattr(group.Group, "__enter__", lambda self: self)
    assert benchmark.main(["--ranks", "2", "--sizes", "4KiB", "--against", "wire"]) == 1
    assert "wrong sums" in capsys.readouterr().err
