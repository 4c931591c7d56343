from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh.errors import IdentityError, ProtocolError
from sparkle_mesh.fabric import identity as identity_module
from sparkle_mesh.fabric.identity import (
    Identity,
    load_identity,
    load_or_create_identity,
    peer_id_of_public_key,
    public_key_of_peer_id,
    verify_signature,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "identity.key"


@pytest.fixture
def stored(path: Path) -> Path:
    load_or_create_identity(path)
    return path


def refuse(path: Path, match: str) -> None:
    """The file is refused with ``match`` and not touched."""
    before = path.read_bytes()
    with pytest.raises(IdentityError, match=match) as caught:
        load_or_create_identity(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_peer_ids_are_those_of_libp2p():
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    for seed in (bytes(32), bytes(range(32)), b"\xff" * 32):
        identity = Identity(seed)
        pair = create_new_key_pair(seed)
        assert identity.peer_id == ID.from_pubkey(pair.public_key).to_base58()
        assert public_key_of_peer_id(identity.peer_id) == pair.public_key.to_bytes()
        assert pair.public_key.verify(b"data", identity.sign(b"data"))


def test_loading_makes_nothing(path: Path):
    assert load_identity(path) is None
    assert not path.parent.exists()
    made = load_or_create_identity(path)
    loaded = load_identity(path)
    assert loaded is not None
    assert loaded.peer_id == made.peer_id


def test_importing_it_loads_no_libp2p():
    code = "import sys, sparkle_mesh.fabric.identity; sys.exit('libp2p' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_signatures():
    one, other = Identity.generate(), Identity.generate()
    signature = one.sign(b"data")
    assert verify_signature(one.peer_id, b"data", signature)
    assert not verify_signature(one.peer_id, b"other data", signature)
    assert not verify_signature(other.peer_id, b"data", signature)
    assert not verify_signature(one.peer_id, b"data", signature[:-1])
    assert not verify_signature("", b"data", signature)


@given(st.text(max_size=200))
def test_what_is_no_peer_id_verifies_nothing(text):
    assert not verify_signature(text, b"", bytes(64))


@given(st.binary(min_size=32, max_size=32))
def test_public_keys_come_back_from_peer_ids(key):
    assert public_key_of_peer_id(peer_id_of_public_key(key)) == key


@pytest.mark.parametrize(
    "text", ["", "1", "0OIl", "é", "12D3KooW", "1" * 52, "z" * 129, "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"]
)
def test_other_texts_are_not_peer_ids(text):
    with pytest.raises(ProtocolError, match="not an Ed25519 peer id"):
        public_key_of_peer_id(text)


def test_the_private_key_does_not_show():
    identity = Identity(b"secret secret secret secret 1234")
    for text in (repr(identity), str(identity), f"{identity}"):
        assert "secret" not in text
        assert identity.private_key_bytes().hex() not in text
        assert identity.peer_id in text
    with pytest.raises(TypeError):
        pickle.dumps(identity)


def test_a_private_key_has_32_bytes():
    with pytest.raises(IdentityError, match="32 bytes, not 31"):
        Identity(bytes(31))


def test_it_is_made_once_and_read_again(path):
    first = load_or_create_identity(path)
    assert load_or_create_identity(path).peer_id == first.peer_id
    assert load_or_create_identity(path).sign(b"x") == first.sign(b"x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_its_mode_does_not_follow_the_umask(path):
    before = os.umask(0)
    try:
        load_or_create_identity(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_processes_that_start_at_once_agree(path):
    code = (
        "import sys; from pathlib import Path; from sparkle_mesh.fabric.identity import load_or_create_identity;"
        "sys.stdin.read(1); print(load_or_create_identity(Path(sys.argv[1])).peer_id)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.write("x")
        process.stdin.flush()
    assert len({process.communicate()[0] for process in processes}) == 1
    assert all(process.returncode == 0 for process in processes)
    assert list(path.parent.iterdir()) == [path]


def test_a_loser_of_the_race_takes_the_winners(path, monkeypatch):
    load = identity_module.load_identity
    winner = []

    def load_while_another_makes_it(at: Path) -> Identity | None:
        found = load(at)
        if found is None:
            identity_module._create(at)
            winner.append(load(at))
        return found

    monkeypatch.setattr(identity_module, "load_identity", load_while_another_makes_it)
    assert load_or_create_identity(path).peer_id == winner[0].peer_id


def test_a_file_that_vanishes_is_said_to(path, monkeypatch):
    monkeypatch.setattr(identity_module, "_create", lambda path: None)
    with pytest.raises(IdentityError, match="vanished"):
        load_or_create_identity(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_a_file_that_others_can_use_is_refused(stored, mode):
    stored.chmod(mode)
    refuse(stored, f"mode {mode:04o}")


def test_a_file_of_somebody_else_is_refused(stored, monkeypatch):
    owner = stored.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    refuse(stored, f"belongs to user {owner}, not to {owner + 1}")


def test_a_symbolic_link_is_refused(stored, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    stored.rename(elsewhere)
    stored.symlink_to(elsewhere)
    refuse(stored, "symbolic link")
    stored.unlink()
    stored.symlink_to(tmp_path / "nowhere")
    with pytest.raises(IdentityError, match="symbolic link"):
        load_or_create_identity(stored)
    assert not (tmp_path / "nowhere").exists()


def test_a_directory_and_a_fifo_are_refused(path):
    path.mkdir(parents=True)
    with pytest.raises(IdentityError, match=r"not a regular file|cannot be opened"):
        load_or_create_identity(path)
    path.rmdir()
    os.mkfifo(path, 0o600)
    with pytest.raises(IdentityError, match="not a regular file"):
        load_or_create_identity(path)


def test_a_file_that_cannot_be_opened_is_refused(stored, monkeypatch):
    def refuse_open(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse_open)
        with pytest.raises(IdentityError, match="Permission denied"):
            load_or_create_identity(stored)


def test_a_file_that_cannot_be_made_is_said_to(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(IdentityError, match=r"cannot be (made|opened)"):
        load_or_create_identity(tmp_path / "file" / "identity.key")


def test_a_write_that_fails_leaves_nothing(path, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(IdentityError, match=r"cannot be made: .*No space left"):
        load_or_create_identity(path)
    assert list(path.parent.iterdir()) == []


def test_every_cut_of_the_file_is_refused(stored):
    content = stored.read_bytes()
    for length in range(len(content)):
        stored.write_bytes(content[:length])
        refuse(stored, "damaged|version")


def test_every_changed_byte_of_the_file_is_refused(stored):
    content = stored.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        stored.write_bytes(changed)
        refuse(stored, "damaged|version")


@pytest.mark.parametrize("content", [b"", b"{}", b"-----BEGIN PRIVATE KEY-----\n", b"\0" * 100_000])
def test_other_content_is_refused(stored, content):
    stored.write_bytes(content)
    refuse(stored, "damaged")


def test_a_newer_version_is_named(stored):
    stored.write_bytes(b"sparkle identity 12\nwhatever")
    refuse(stored, "version '12' and this program reads 1")
