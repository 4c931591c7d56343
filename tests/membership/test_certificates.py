"""Certificates that machines give to their training processes: who may hold which, for how long, and golden bytes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits, wire
from sparkle_mesh.errors import AuthenticationError, ProtocolError
from sparkle_mesh.fabric.identity import Identity, load_or_create_identity
from sparkle_mesh.membership.certificates import (
    Certificate,
    CertificateJudge,
    Certifier,
    Judgement,
    open_certificate,
    sign_certificate,
)
from sparkle_mesh.membership.messages import Introduction
from sparkle_mesh.membership.view import Member
from tests.entropies import FixedEntropy

GOLDEN = Path(__file__).parent / "golden"
NODE, OTHER_NODE = Identity(bytes(range(32))), Identity(b"o" * 32)
TRAINER = Identity(b"t" * 32).peer_id
MESH = b"m" * 32


def signed(**changes: Any) -> bytes:
    """Return a certificate that is good for 100 s, changed after it was signed."""
    encoded = sign_certificate(NODE, TRAINER, MESH, lifetime_s=100, entropy=FixedEntropy())
    return wire.encode(msgspec.structs.replace(wire.decode(encoded, Certificate), **changes))


def test_a_certificate_names_its_machine() -> None:
    encoded = sign_certificate(NODE, TRAINER, MESH)
    assert len(encoded) < limits.CERTIFICATE_MAX_BYTES
    certificate = open_certificate(encoded, trainer=TRAINER, mesh=MESH)
    assert certificate is not None
    assert (certificate.node, certificate.lifetime_s) == (NODE.peer_id, limits.CERTIFICATE_LIFETIME_S)
    assert sign_certificate(NODE, TRAINER, MESH) != encoded


def test_golden_certificate() -> None:
    golden = (GOLDEN / "certificate.1.msgpack").read_bytes()
    assert signed() == golden
    assert open_certificate(golden, trainer=TRAINER, mesh=MESH) == wire.decode(golden, Certificate)


@pytest.mark.parametrize("name", ["introduction.1", "introduction.2", "introduction.3"])
def test_golden_introductions(name: str) -> None:
    """The first is of a process that knows nothing of certificates, the second of one that knows no revocations."""
    golden = (GOLDEN / f"{name}.msgpack").read_bytes()
    introduction = Introduction(
        role="trainer",
        member=Member(peer_id=TRAINER, incarnation=b"i" * 16),
        host_id=b"h" * 16,
        min_peers=2,
        addresses=("/ip4/10.0.0.1/tcp/4",),
        software="sparkle-mesh 0.1.0",
        certificate=None if name == "introduction.1" else signed(),
        revocations=b"revocations" if name == "introduction.3" else None,
    )
    assert wire.decode(golden, Introduction) == introduction
    newest = msgspec.structs.replace(introduction, certificate=signed(), revocations=b"revocations")
    assert wire.encode(newest) == (GOLDEN / "introduction.3.msgpack").read_bytes()


FORGED = {
    "the signature": {"signature": bytes(64)},
    "its machine": {"node": OTHER_NODE.peer_id},
    "a machine that is none": {"node": "12D3KooWnobody"},
    "its number": {"serial": bytes(16)},
    "how long it is good for": {"lifetime_s": 101},
}


@pytest.mark.parametrize("changes", FORGED.values(), ids=FORGED)
def test_whatever_is_changed_is_noticed(changes: dict[str, Any]) -> None:
    with pytest.raises(AuthenticationError, match="is not signed by"):
        open_certificate(signed(**changes), trainer=TRAINER, mesh=MESH)


def test_a_certificate_is_of_no_use_to_others_nor_elsewhere() -> None:
    with pytest.raises(AuthenticationError, match=f"the certificate that {NODE.peer_id} sent is that of '{TRAINER}'"):
        open_certificate(signed(), trainer=NODE.peer_id, mesh=MESH)
    with pytest.raises(AuthenticationError, match="for another mesh"):
        open_certificate(signed(), trainer=TRAINER, mesh=bytes(32))
    # Nor does it help to write one's own name, or mesh, over it.
    with pytest.raises(AuthenticationError, match="is not signed by"):
        open_certificate(signed(trainer=NODE.peer_id), trainer=NODE.peer_id, mesh=MESH)
    with pytest.raises(AuthenticationError, match="is not signed by"):
        open_certificate(signed(mesh=bytes(32)), trainer=TRAINER, mesh=bytes(32))


def test_a_signature_over_something_else_makes_none() -> None:
    """What the same key signs for other purposes begins otherwise; so does this without its context."""
    certificate = wire.decode(signed(), Certificate)
    parts = (TRAINER.encode(), NODE.peer_id.encode(), MESH, certificate.serial, (100).to_bytes(8, "big"))
    told = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    with pytest.raises(AuthenticationError):
        open_certificate(signed(signature=NODE.sign(told)), trainer=TRAINER, mesh=MESH)
    right = NODE.sign(b"sparkle trainer certificate 1\0" + told)
    assert open_certificate(signed(signature=right), trainer=TRAINER, mesh=MESH) == certificate


@pytest.mark.parametrize("changes", [{"lifetime_s": 0}, {"lifetime_s": 2**40}, {"serial": b""}, {"signature": b""}])
def test_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="not a valid Certificate"):
        open_certificate(signed(**changes), trainer=TRAINER, mesh=MESH)


def test_one_that_is_too_long_is_not_looked_at() -> None:
    with pytest.raises(ProtocolError, match="over the limit of 512"):
        open_certificate(signed(node="x" * 500), trainer=TRAINER, mesh=MESH)
    long = Introduction(
        role="trainer",
        member=Member(peer_id=TRAINER, incarnation=bytes(16)),
        host_id=bytes(16),
        min_peers=1,
        addresses=(),
        certificate=bytes(limits.CERTIFICATE_MAX_BYTES + 1),
    )
    with pytest.raises(ProtocolError, match="certificate"):
        wire.decode(wire.encode(long), Introduction)


def test_of_a_later_version_nothing_is_believed_nor_held_against_anybody() -> None:
    later = msgspec.msgpack.encode({"version": 2, "whatever": "it holds"})
    assert open_certificate(later, trainer=TRAINER, mesh=MESH) is None
    judgement = CertificateJudge(MESH).judge(later, TRAINER, 0.0)
    assert judgement == Judgement(None, "its certificate is of a version that is not 1")


@given(st.data())
def test_any_bytes_are_a_certificate_or_refused(data: st.DataObject) -> None:
    encoded = bytearray(signed())
    start = data.draw(st.integers(0, len(encoded)))
    encoded[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    for given_bytes in (bytes(encoded), data.draw(st.binary(max_size=600))):
        try:
            certificate = open_certificate(given_bytes, trainer=TRAINER, mesh=MESH)
        except ProtocolError:
            continue
        if certificate is not None:
            assert certificate == wire.decode(signed(), Certificate)


# --- For how long ---------------------------------------------------------------------------------


def test_it_is_believed_from_when_it_first_came_and_no_longer() -> None:
    judge = CertificateJudge(MESH)
    for now in (1000.0, 1050.0, 1100.0):
        assert judge.judge(signed(), TRAINER, now) == Judgement(NODE.peer_id)
    late = judge.judge(signed(), TRAINER, 1101.0)
    assert late == Judgement(None, "its certificate came 101 s ago and was good for 100 s")
    fresh = sign_certificate(NODE, TRAINER, MESH, lifetime_s=100)
    assert judge.judge(fresh, TRAINER, 1101.0) == Judgement(NODE.peer_id)
    with pytest.raises(AuthenticationError):
        judge.judge(signed(signature=bytes(64)), TRAINER, 1000.0)


def test_what_is_remembered_is_bounded_and_forged_ones_displace_nothing() -> None:
    judge = CertificateJudge(MESH, max_count=2)
    judge.judge(signed(), TRAINER, 0.0)
    for number in range(10):
        with pytest.raises(AuthenticationError):
            judge.judge(signed(serial=bytes([number]) * 16, signature=bytes(64)), TRAINER, 0.0)
    assert judge.judge(signed(), TRAINER, 200.0).machine is None
    for _ in range(2):
        judge.judge(sign_certificate(NODE, TRAINER, MESH), TRAINER, 200.0)
    assert judge.judge(signed(), TRAINER, 200.0).machine == NODE.peer_id


# --- The machine's file ---------------------------------------------------------------------------


def certifier(path: Path) -> Certifier:
    return Certifier(path, TRAINER, MESH)


def test_without_an_identity_there_is_no_certificate_and_none_is_made(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    signer = certifier(path)
    assert signer.certificate(0.0) is None
    assert signer.machine is None
    assert list(tmp_path.iterdir()) == []
    # A node is started for the first time while this process trains.
    machine = load_or_create_identity(path).peer_id
    encoded = signer.certificate(1.0)
    assert encoded is not None
    assert signer.machine == machine
    assert CertificateJudge(MESH).judge(encoded, TRAINER, 0.0).machine == machine


def test_another_is_signed_when_half_of_its_time_is_over(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    load_or_create_identity(path)
    signer = certifier(path)
    first = signer.certificate(0.0)
    half_s = limits.CERTIFICATE_LIFETIME_S / 2
    assert signer.certificate(half_s - 1) == first
    second = signer.certificate(half_s + 1)
    assert second != first
    path.unlink()
    assert signer.certificate(3 * half_s) == second


def test_an_identity_that_cannot_be_used_is_told_once_and_hinders_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "identity.key"
    load_or_create_identity(path)
    content = path.read_bytes()
    path.chmod(0o644)
    signer = certifier(path)
    with caplog.at_level(logging.DEBUG):
        assert signer.certificate(0.0) is None
        assert signer.certificate(1.0) is None
    (record,) = caplog.records
    assert "mode 0644" in record.getMessage()
    path.chmod(0o600)
    with caplog.at_level(logging.DEBUG):
        assert signer.certificate(2.0) is not None
    assert len(caplog.records) == 1
    assert path.read_bytes() == content
