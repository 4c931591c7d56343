"""``demo.py``: that it shows what it says, and that it fails, and ends, as it should."""

from __future__ import annotations

import json
import os
import signal
import sys

import psutil
import pytest

DEMO = "examples/demo.py"


def report(rank: int, size: int = 2, **changes):
    """Return a trainer's report, ``changes`` applied."""
    fields = {
        "rank": rank,
        "size": size,
        "steps": 20,
        "seconds": 1.5 + rank,
        "first_step": 0,
        "longest_step_s": 0.1,
        "losses": [2.0 / (1 + step) for step in range(20)],
        "accuracies": [(10, 0.9), (20, 0.97)],
        "accuracy": 0.97,
        "weights_sha256": "ab" * 32,
        "algorithm": "shared",
        "bytes_reduced": 1000,
        "bytes_sent": 1000,
        "bytes_received": 1000,
    }
    return fields | changes


def processes_of(folder) -> list[psutil.Process]:
    """Return the running processes whose data folder is under ``folder``."""
    found = []
    for process in psutil.process_iter():
        try:
            data_dir = process.environ().get("SPARKLE_DATA_DIR", "")
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if data_dir.startswith(f"{folder}/"):
            found.append(process)
    return found


def test_short_demo_leaves_picture_and_summary(processes, tmp_path):
    ended = processes.run(DEMO, "--short", "--ranks", "3", "--out", tmp_path)
    assert ended.code == 0, ended.err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ranks"] == 3
    assert summary["accuracy"] >= 0.95
    assert set(summary["weights_sha256"]) == {"0", "1", "2"}
    assert len(set(summary["weights_sha256"].values())) == 1
    assert summary["steps"] == 150
    # Two were there all the time, and the third has come when one of them was killed.
    first_steps = sorted(rank["first_step"] for rank in summary["per_rank"])
    assert first_steps[:2] == [0, 0]
    assert 50 < first_steps[2] < 150
    assert summary["bytes"] == (3 * 150 - first_steps[2]) * 4 * 7210
    assert "trainer 2 is killed" in ended.out
    assert "trainer 4 is in" in ended.out
    assert summary["longest_step_seconds"] < 3.0
    assert {rank["algorithm"] for rank in summary["per_rank"]} <= {"shared", "direct", "ring", "tree"}
    assert 0 < summary["training_seconds"] < summary["seconds"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {tmp_path / 'loss.png'} and {tmp_path / 'summary.json'}" in ended.out.splitlines()[-1]
    assert "rank 2  step 150/150" in ended.out
    # All saw each other and the node.
    assert "peers 3" in ended.out


def test_failing_trainer_fails_the_demo_and_shows_its_log(processes, tmp_path):
    stale = tmp_path / "summary.json"
    stale.write_text("{}")
    ended = processes.run(DEMO, "--steps", "-5", "--ranks", "2", "--out", tmp_path)
    assert ended.code == 1
    assert "ended with exit code 2" in ended.err
    assert "-5 is not a positive number" in ended.err
    assert not stale.exists()


def test_deadline_ends_everything(processes, short_folder, tmp_path):
    process = processes.start(DEMO, "--timeout", "0.1", "--out", tmp_path, TMPDIR=str(short_folder))
    out, err = process.communicate(timeout=processes.TIMEOUT_S)
    assert process.returncode == 1, out
    assert "did not finish in time" in err
    assert processes_of(short_folder) == []
    assert list(short_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "in_background"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)]
)
def test_interrupted_demo_ends_its_processes(processes, short_folder, tmp_path, number, in_background):
    # A shell has what it starts in the background ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    try:
        process = processes.start(
            DEMO, "--steps", "1000000", "--ranks", "2", "--out", tmp_path, TMPDIR=str(short_folder)
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("sparkle demo:")
    children = processes_of(short_folder)
    assert len(children) == 3
    process.send_signal(number)
    _, err = process.communicate(timeout=processes.TIMEOUT_S)
    assert process.returncode == 130
    assert "interrupted" in err
    assert not any(child.is_running() for child in children)
    assert list(short_folder.iterdir()) == []


def test_child_that_ignores_the_polite_signal_is_killed(load_example, tmp_path, monkeypatch):
    demo = load_example("demo")
    monkeypatch.setattr(demo, "STOP_TIMEOUT_S", 0.1)
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); print('{}', flush=True); signal.pause()"
    child = demo.Child("deaf", [sys.executable, "-c", deaf], tmp_path / "deaf.log", dict(os.environ))
    while child.latest is None:  # until it has said that it does not listen
        child.reader.join(timeout=0.01)
    demo.end([child])
    assert child.process.returncode == -signal.SIGKILL
    assert child.log_tail() == "{}"


def test_different_weights_are_noticed(load_example):
    demo = load_example("demo")
    demo.check([report(0), report(1)], ranks=2)
    with pytest.raises(demo.DemoError, match="different weights"):
        demo.check([report(0), report(1, weights_sha256="cd" * 32)], ranks=2)


def test_bad_model_is_noticed(load_example):
    demo = load_example("demo")
    with pytest.raises(demo.DemoError, match=r"accuracy is 94\.9%"):
        demo.check([report(0), report(1, accuracy=0.949)], ranks=2)


def test_missing_rank_is_noticed(load_example):
    demo = load_example("demo")
    with pytest.raises(demo.DemoError, match="the ranks were"):
        demo.check([report(0)], ranks=2)
    with pytest.raises(demo.DemoError, match="the ranks were"):
        demo.check([report(0, size=1), report(0, size=1)], ranks=2)


def test_summary_adds_up(load_example):
    summary = load_example("demo").summarise([report(0), report(1, accuracy=0.96)], seconds=9.0)
    assert summary["accuracy"] == 0.96
    assert summary["training_seconds"] == 2.5
    assert summary["bytes"] == 2000


def test_picture_is_drawn_for_one_rank_too(load_example, tmp_path):
    load_example("demo").draw([report(0, size=1)], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000
