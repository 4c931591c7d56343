"""Lists of revoked peers: who may sign them, which of two holds, how they are kept, and golden bytes."""

from __future__ import annotations

import logging
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits, wire
from sparkle_mesh.errors import AuthenticationError, ProtocolError, UsageError
from sparkle_mesh.fabric.identity import Identity, peer_id_of_public_key
from sparkle_mesh.membership.revocation_file import FOLDER, RevocationFile
from sparkle_mesh.membership.revocations import RevocationList, Revocations, open_revocations, sign_revocations

GOLDEN = Path(__file__).parent / "golden"
FOUNDER, OTHER = Identity(bytes(range(32))), Identity(b"o" * 32)
ONE, TWO = (Identity(bytes([number]) * 32).peer_id for number in (1, 2))
MESH = b"m" * 32


def signed(sequence: int = 1, revoked: tuple[str, ...] = (ONE,), by: Identity = FOUNDER) -> bytes:
    """Return a list."""
    return sign_revocations(by, MESH, sequence=sequence, revoked=revoked)


def forged(**changes: Any) -> bytes:
    """Return the list that :func:`signed` does, changed after it was signed."""
    return wire.encode(msgspec.structs.replace(wire.decode(signed(), Revocations), **changes))


def test_golden_list() -> None:
    golden = (GOLDEN / "revocations.1.msgpack").read_bytes()
    assert signed(3, (ONE, TWO)) == golden
    told = open_revocations(golden, mesh=MESH)
    assert told is not None
    assert (told.founder, told.sequence, set(told.revoked)) == (FOUNDER.peer_id, 3, {ONE, TWO})


@pytest.mark.parametrize(
    "changes",
    [{"sequence": 2}, {"revoked": ()}, {"revoked": (ONE, TWO)}, {"founder": OTHER.peer_id}, {"signature": bytes(64)}],
    ids=str,
)
def test_whatever_is_changed_is_noticed(changes: dict[str, Any]) -> None:
    with pytest.raises(AuthenticationError, match="is not signed by it"):
        open_revocations(forged(**changes), mesh=MESH)


def test_a_list_counts_in_one_mesh() -> None:
    with pytest.raises(AuthenticationError, match="for another mesh"):
        open_revocations(signed(), mesh=bytes(32))
    with pytest.raises(AuthenticationError, match="is not signed by it"):
        open_revocations(forged(mesh=bytes(32)), mesh=bytes(32))


def test_names_are_told_apart() -> None:
    """Two names are not one that is as long as both."""
    two = wire.decode(signed(revoked=(ONE, TWO)), Revocations)
    with pytest.raises(AuthenticationError):
        open_revocations(wire.encode(msgspec.structs.replace(two, revoked=("".join(two.revoked),))), mesh=MESH)


def test_a_list_is_bounded_and_fits_its_bounds() -> None:
    many = [peer_id_of_public_key(number.to_bytes(32, "big")) for number in range(limits.REVOKED_PEERS_MAX_COUNT + 1)]
    full = sign_revocations(FOUNDER, MESH, sequence=2**63 - 1, revoked=many[1:])
    assert open_revocations(full, mesh=MESH) is not None
    with pytest.raises(UsageError, match="a list holds 256: give those that are to stay a new key"):
        sign_revocations(FOUNDER, MESH, sequence=1, revoked=many)
    with pytest.raises(ProtocolError, match="not a valid Revocations"):
        open_revocations(forged(revoked=tuple(many)), mesh=MESH)
    with pytest.raises(ProtocolError, match="over the limit"):
        open_revocations(bytes(limits.REVOCATIONS_MAX_BYTES + 1), mesh=MESH)
    assert open_revocations(msgspec.msgpack.encode({"version": 2}), mesh=MESH) is None


@given(st.data())
def test_any_bytes_are_a_list_or_refused(data: st.DataObject) -> None:
    encoded = bytearray(signed())
    start = data.draw(st.integers(0, len(encoded)))
    encoded[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    for given_bytes in (bytes(encoded), data.draw(st.binary(max_size=600))):
        try:
            told = open_revocations(given_bytes, mesh=MESH)
        except ProtocolError:
            continue
        if told is not None:
            assert told == wire.decode(signed(), Revocations)


# --- Which holds ----------------------------------------------------------------------------------


def test_the_highest_number_of_the_founder_holds() -> None:
    held = RevocationList(MESH, FOUNDER.peer_id)
    assert held.is_revoked(ONE) is None
    assert held.take(signed(2))
    assert not held.take(signed(2))
    assert not held.take(signed(2, (TWO,)))
    assert not held.take(signed(1, (TWO,)))
    assert not held.take(signed(9, (TWO,), by=OTHER))
    assert not held.take(msgspec.msgpack.encode({"version": 2}))
    with pytest.raises(AuthenticationError):
        held.take(forged(sequence=9, signature=bytes(64)))
    assert (held.sequence, held.revoked, held.encoded) == (2, {ONE}, signed(2))
    assert (held.is_revoked(ONE), held.is_revoked(TWO), held.is_revoked(TWO, ONE)) == (ONE, None, ONE)
    # What a later list does not name is revoked no more.
    assert held.take(signed(3, (TWO,)))
    assert (held.is_revoked(ONE), held.is_revoked(TWO)) == (None, TWO)


def test_without_a_founder_nobody_is_believed() -> None:
    held = RevocationList(MESH)
    assert not held.take(signed())
    assert not held.take(b"junk")
    assert held.encoded is None


def test_only_the_founder_revokes() -> None:
    held = RevocationList(MESH, FOUNDER.peer_id)
    assert held.take(held.revoking(FOUNDER, ONE))
    assert held.take(held.revoking(FOUNDER, TWO))
    assert (held.sequence, held.revoked) == (2, {ONE, TWO})
    with pytest.raises(UsageError, match=f"which is not {OTHER.peer_id}: {FOUNDER.peer_id}"):
        held.revoking(OTHER, ONE)
    with pytest.raises(UsageError, match="run its node with --founder"):
        RevocationList(MESH).revoking(OTHER, ONE)
    with pytest.raises(UsageError, match="the founder, who cannot be revoked"):
        held.revoking(FOUNDER, FOUNDER.peer_id)
    with pytest.raises(UsageError, match="nobody is revoked: 'junk' is not an Ed25519 peer id"):
        held.revoking(FOUNDER, "junk")


# --- How it is kept -------------------------------------------------------------------------------


def test_a_list_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    file = RevocationFile(tmp_path, MESH)
    nothing = file.load()
    assert (nothing.founder, nothing.sequence) == (None, 0)
    file.save(nothing)
    assert list(tmp_path.iterdir()) == []
    # Who the founder is is kept as soon as it is known, for processes that are not told.
    file.save(file.load(FOUNDER.peer_id))
    held = file.load()
    assert (held.founder, held.sequence) == (FOUNDER.peer_id, 0)
    held.take(signed(5))
    file.save(held)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    again = RevocationFile(tmp_path, MESH).load()
    assert (again.founder, again.sequence, again.revoked) == (FOUNDER.peer_id, 5, {ONE})
    assert RevocationFile(tmp_path, bytes(32)).load().founder is None


def test_a_process_that_knows_less_does_not_replace_what_is_kept(tmp_path: Path) -> None:
    file = RevocationFile(tmp_path, MESH)
    slow, quick = RevocationList(MESH, FOUNDER.peer_id), RevocationList(MESH, FOUNDER.peer_id)
    slow.take(signed(1))
    quick.take(signed(2, (ONE, TWO)))
    file.save(quick)
    file.save(slow)
    assert file.load().sequence == 2


def test_another_founder_that_the_owner_names_takes_the_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = RevocationFile(tmp_path, MESH)
    held = RevocationList(MESH, FOUNDER.peer_id)
    held.take(signed(7))
    file.save(held)
    with caplog.at_level(logging.WARNING):
        other = file.load(OTHER.peer_id)
    assert FOUNDER.peer_id in caplog.text
    assert (other.founder, other.sequence) == (OTHER.peer_id, 0)
    file.save(other)
    assert (file.load().founder, file.load().sequence) == (OTHER.peer_id, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        msgspec.msgpack.encode({"version": 2, "founder": ONE}),
        msgspec.msgpack.encode({"version": 1, "founder": FOUNDER.peer_id, "revocations": forged(signature=bytes(64))}),
    ],
)
def test_a_damaged_file_is_told_and_hinders_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    file = RevocationFile(tmp_path, MESH)
    file.path.parent.mkdir()
    file.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert file.load(FOUNDER.peer_id).sequence == 0
    assert str(file.path) in caplog.text


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    with pytest.raises(UsageError, match=r"revocations.* cannot be written"):
        RevocationFile(tmp_path, MESH).save(RevocationList(MESH, FOUNDER.peer_id))
