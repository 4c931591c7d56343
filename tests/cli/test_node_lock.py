"""One node per data directory, whatever happened to the one before."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparkle_mesh.cli.lock import LOCK_NAME, hold_data_dir, running_pid
from sparkle_mesh.errors import NodeRunningError, UsageError


def test_the_second_is_refused_and_told_who_is_first(data_dir: Path) -> None:
    with hold_data_dir(data_dir):
        assert running_pid(data_dir) == os.getpid()
        with pytest.raises(NodeRunningError, match=rf"pid {os.getpid()}\b.*--data-dir"), hold_data_dir(data_dir):
            pytest.fail("two nodes hold one data directory")
        assert running_pid(data_dir) == os.getpid()
    assert list(data_dir.iterdir()) == []
    with hold_data_dir(data_dir):
        assert running_pid(data_dir) == os.getpid()


def test_a_killed_nodes_lock_is_free(data_dir: Path) -> None:
    program = (
        "import os, sys, signal, pathlib; from sparkle_mesh.cli.lock import hold_data_dir\n"
        "with hold_data_dir(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(data_dir)], timeout=60, check=False)
    assert done.returncode == -9
    assert (data_dir / LOCK_NAME).exists()
    assert running_pid(data_dir) is None
    with hold_data_dir(data_dir):
        assert running_pid(data_dir) == os.getpid()


def test_a_node_that_has_not_written_its_pid_yet(data_dir: Path) -> None:
    with (data_dir / LOCK_NAME).open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(NodeRunningError, match="just starting"), hold_data_dir(data_dir):
            pytest.fail("two nodes hold one data directory")


@pytest.mark.parametrize("text", ["", "nonsense", "-1", "0", "9" * 31, "99999999"])
def test_a_lock_file_that_names_no_process(data_dir: Path, text: str) -> None:
    (data_dir / LOCK_NAME).write_text(text)
    assert running_pid(data_dir) is None


def test_a_process_of_another_user_is_a_process(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_pid: int, _signal: int) -> None:
        raise PermissionError

    (data_dir / LOCK_NAME).write_text("1")
    monkeypatch.setattr(os, "kill", forbidden)
    assert running_pid(data_dir) == 1


def test_a_lock_file_that_was_removed_is_not_removed_again(data_dir: Path) -> None:
    with hold_data_dir(data_dir):
        (data_dir / LOCK_NAME).unlink()
        (data_dir / LOCK_NAME).write_text("another's")
    assert (data_dir / LOCK_NAME).read_text() == "another's"


def test_a_link_is_not_followed(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (data_dir / LOCK_NAME).symlink_to(tmp_path / "target")
    with pytest.raises(UsageError, match="cannot be opened"), hold_data_dir(data_dir):
        pytest.fail("a link was followed")
    assert (tmp_path / "target").read_text() == "precious"


def test_a_file_system_without_locks_is_named(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(_descriptor: int, _operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.raises(UsageError, match="No locks available; choose a data directory on a local disk"),
        hold_data_dir(data_dir),
    ):
        pytest.fail("held without a lock")


def test_never_two_at_once(data_dir: Path) -> None:
    holders, most, turns = [0], [0], [0]

    def contend() -> None:
        for _ in range(200):
            try:
                with hold_data_dir(data_dir):
                    holders[0] += 1
                    most[0] = max(most[0], holders[0])
                    turns[0] += 1
                    holders[0] -= 1
            except NodeRunningError:
                continue

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert turns[0] > 0
