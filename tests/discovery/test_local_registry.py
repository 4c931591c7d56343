from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys

import msgspec
import psutil
import pytest

from sparkle_mesh import limits, wire
from sparkle_mesh.discovery.local import (
    SUFFIX,
    LocalRegistry,
    RegistryEntry,
    file_name,
    is_running,
    process_scope,
)

LAN = "/ip4/192.168.1.4/tcp/7"
HERE = "/ip4/127.0.0.1/tcp/7"

ANNOUNCE = """
import sys
from pathlib import Path
from sparkle_mesh.discovery.local import LocalRegistry
LocalRegistry(Path(sys.argv[1])).announce(sys.argv[2], addresses=(), mesh_tags=(b"t" * 32,), role="trainer")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def registry(tmp_path, entropy):
    return LocalRegistry(tmp_path, entropy=entropy)


@pytest.fixture
def announce(tag):
    def announce(registry, peer_id, *, addresses=(LAN, HERE), role="trainer"):
        registry.announce(peer_id, addresses=addresses, mesh_tags=(tag,), role=role)

    return announce


@pytest.fixture
def start_process(tmp_path):
    """Return a function that starts a process which announces itself and waits."""
    processes = []

    def start(peer_id):
        process = subprocess.Popen(
            [sys.executable, "-c", ANNOUNCE, str(tmp_path), peer_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        processes.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait(timeout=10)
        process.stdin.close()
        process.stdout.close()


def test_processes_see_each_other_and_not_themselves(tmp_path, registry, announce, tag):
    other = LocalRegistry(tmp_path)
    announce(registry, "A", role="node")
    announce(other, "B")
    (entry,) = other.read_all()
    assert (entry.peer_id, entry.role, entry.mesh_tags, entry.pid) == ("A", "node", (tag,), os.getpid())
    assert entry.addresses == (HERE, LAN)
    assert [entry.peer_id for entry in registry.read_all()] == ["B"]
    registry.withdraw("A")
    registry.withdraw("A")
    assert other.read_all() == ()
    assert [path.name for path in registry.folder.iterdir()] == [file_name("B", os.getpid())]


def test_only_the_owner_can_read(registry, announce):
    registry.folder.mkdir(mode=0o755, parents=True)
    registry.folder.chmod(0o755)
    announce(registry, "A")
    assert stat.S_IMODE(registry.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(registry.path_of("A").stat().st_mode) == 0o600


def test_announcing_again_replaces(tmp_path, registry, announce):
    other = LocalRegistry(tmp_path)
    announce(registry, "A")
    assert other.read_all()[0].addresses == (HERE, LAN)
    announce(registry, "A", addresses=(LAN,))
    assert other.read_all()[0].addresses == (LAN,)
    assert len(list(registry.folder.iterdir())) == 1


def test_no_folder_means_nobody(registry):
    assert registry.read_all() == ()
    assert registry.changed_at() is None
    assert registry.needs_renewal("A")


def test_the_folder_tells_of_changes(registry, announce):
    announce(registry, "A")
    before = registry.changed_at()
    os.utime(registry.folder, ns=(0, 0))
    assert registry.changed_at() != before


def test_a_killed_process_is_recognised_and_its_file_removed(registry, start_process):
    process, other = start_process("killed"), start_process("living")
    assert {entry.peer_id for entry in registry.read_all()} == {"killed", "living"}
    process.send_signal(signal.SIGKILL)
    # Not yet waited for, it is a zombie: that is dead as well.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert [entry.peer_id for entry in registry.read_all()] == ["living"]
    assert [path.name for path in registry.folder.iterdir()] == [file_name("living", other.pid)]


def test_a_process_id_given_to_another_process_is_recognised(registry, announce):
    announce(registry, "A")
    path = registry.path_of("A")
    entry = wire.decode(path.read_bytes(), RegistryEntry)
    path.write_bytes(wire.encode(msgspec.structs.replace(entry, started_at=entry.started_at - 1000)))
    assert LocalRegistry(registry.folder.parent).read_all() == ()
    assert not path.exists()
    assert registry.needs_renewal("A")


def test_is_running():
    process = psutil.Process()
    assert is_running(process.pid, process.create_time())
    assert not is_running(process.pid, process.create_time() + 100)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(timeout=60)
    assert not is_running(ended.pid, psutil.Process().create_time())


def test_a_process_that_tells_nothing_counts_as_running(monkeypatch):
    def forbidden(self):
        raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(psutil.Process, "create_time", forbidden)
    assert is_running(os.getpid(), 0.0)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00garbage", b"x" * (limits.REGISTRY_ENTRY_MAX_BYTES + 1), b"\x81\xa7version\x01"]
)
def test_a_damaged_file_of_a_living_process_is_skipped_and_told_once(registry, announce, caplog, content):
    announce(registry, "A")
    path = registry.folder / file_name("B", os.getpid())
    path.write_bytes(content)
    other = LocalRegistry(registry.folder.parent)
    for _ in range(3):
        assert [entry.peer_id for entry in other.read_all()] == ["A"]
    assert path.exists()
    assert caplog.text.count(f"{path.name} is skipped") == 1


def test_a_damaged_file_of_a_dead_process_is_removed(registry, announce):
    announce(registry, "A")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(timeout=60)
    path = registry.folder / file_name("B", ended.pid)
    path.write_bytes(b"garbage")
    assert registry.read_all() == ()
    assert not path.exists()


@pytest.mark.parametrize("change", [{"version": 2}, {"peer_id": "B"}])
def test_another_version_and_another_name_are_skipped(registry, announce, caplog, change):
    announce(registry, "A")
    path = registry.path_of("A")
    entry = wire.decode(path.read_bytes(), RegistryEntry)
    path.write_bytes(wire.encode(msgspec.structs.replace(entry, **change)))
    assert LocalRegistry(registry.folder.parent).read_all() == ()
    assert "is skipped" in caplog.text


def test_a_link_and_a_pipe_are_not_followed(registry, announce, tmp_path, caplog):
    announce(registry, "A")
    secret = tmp_path / "secret"
    secret.write_bytes(registry.path_of("A").read_bytes())
    registry.path_of("A").unlink()
    registry.path_of("A").symlink_to(secret)
    os.mkfifo(registry.folder / file_name("B", os.getpid()))
    assert LocalRegistry(tmp_path).read_all() == ()
    assert caplog.text.count("is skipped") == 2


def test_what_cannot_be_told_of_is_left_until_it_is_old(registry, announce, tmp_path, wall_clock):
    elsewhere = LocalRegistry(tmp_path, scope=b"e" * 16)
    announce(elsewhere, "A")
    (registry.folder / f"noprocess{SUFFIX}").write_bytes(b"garbage")
    (registry.folder / f".half-written{SUFFIX}.tmp").write_bytes(b"")
    (registry.folder / "control.sock").write_bytes(b"somebody else's")
    here = LocalRegistry(tmp_path, clock=wall_clock)
    now = elsewhere.path_of("A").stat().st_mtime
    wall_clock.time = now + limits.REGISTRY_FOREIGN_MAX_AGE_S - 60
    assert here.read_all() == ()
    assert len(list(here.folder.iterdir())) == 4
    wall_clock.time = now + limits.REGISTRY_FOREIGN_MAX_AGE_S + 60
    assert here.read_all() == ()
    assert [path.name for path in here.folder.iterdir()] == ["control.sock"]


def test_an_entry_is_renewed_before_others_take_it_for_old(registry, announce, wall_clock, tmp_path):
    registry = LocalRegistry(tmp_path, clock=wall_clock)
    announce(registry, "A")
    now = registry.path_of("A").stat().st_mtime
    wall_clock.time = now + 1
    assert not registry.needs_renewal("A")
    wall_clock.time = now + limits.REGISTRY_RENEW_S + 1
    assert registry.needs_renewal("A")
    registry.path_of("A").unlink()
    assert registry.needs_renewal("A")


def test_files_known_are_not_read_again(registry, announce, tmp_path, monkeypatch):
    announce(registry, "A")
    other = LocalRegistry(tmp_path)
    other.read_all()
    monkeypatch.setattr(other, "_read", None)
    assert [entry.peer_id for entry in other.read_all()] == ["A"]


def test_entries_read_are_bounded(registry, announce, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "REGISTRY_ENTRIES_MAX_COUNT", 3)
    for number in range(6):
        announce(registry, f"P{number}")
    assert len(LocalRegistry(tmp_path).read_all()) == 3


def test_a_folder_that_is_none_is_told(tmp_path, caplog, announce):
    (tmp_path / "run").write_text("in the way")
    registry = LocalRegistry(tmp_path)
    assert registry.read_all() == ()
    assert "cannot be listed" in caplog.text
    with pytest.raises(OSError, match="run"):
        announce(registry, "A")


def test_a_file_that_vanishes_while_it_is_read_is_nobody(registry, announce, tmp_path, caplog):
    announce(registry, "A")
    other = LocalRegistry(tmp_path)
    names = other._scan()
    registry.withdraw("A")
    (name,) = names
    assert other._read(name) is None
    assert caplog.records == []


def test_a_file_that_cannot_be_removed_is_told(registry, announce, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (registry.folder / f"folder{SUFFIX}" / "full").mkdir(parents=True)
    registry._remove(f"folder{SUFFIX}")
    assert "cannot be removed" in caplog.text


def test_a_write_that_fails_leaves_nothing(registry, announce, tmp_path):
    registry.path_of("A").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        announce(registry, "A")
    assert [path.name for path in registry.folder.iterdir()] == [registry.path_of("A").name]


def test_scope_is_shared_by_processes_of_this_host():
    code = "from sparkle_mesh.discovery.local import process_scope; print(process_scope().hex())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert other.stdout.strip() == process_scope().hex()


def test_scope_without_process_spaces(monkeypatch):
    with_space = process_scope()
    monkeypatch.setattr("sparkle_mesh.discovery.local.Path.readlink", raise_os_error)
    assert len(process_scope()) == 16
    assert process_scope() != with_space


def raise_os_error(self):
    raise OSError("no such file")
