"""Certificates: a machine's identity says that a training process is one of its own.

Each training process has a key of its own, made when it joins and kept in its memory. The machine's key lies in the
data directory, readable by its owner only; who runs training processes there may sign for them, without a node that
runs. A certificate names the process and the mesh, so it is of no use to another process (which cannot connect in the
other's name) nor in another mesh.

It is believed for a time that it bounds itself, from when it first came here: its age is told by this process's own
clock, as that of all that others tell. What was let in by it before stays in.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import SYSTEM_ENTROPY, Entropy
from sparkle_mesh.errors import AuthenticationError, IdentityError
from sparkle_mesh.fabric.identity import Identity, load_identity, verify_signature
from sparkle_mesh.fabric.interface import PeerId

logger = logging.getLogger(__name__)

VERSION = 1
# No other signature of an identity is over bytes that begin so: neither libp2p's, nor those of capability records.
_CONTEXT = b"sparkle trainer certificate 1\0"
_Lifetime = Annotated[int, msgspec.Meta(gt=0, le=limits.CERTIFICATE_LIFETIME_MAX_S)]


class Certificate(wire.Message, frozen=True, kw_only=True):
    """What a machine's identity has signed.

    Attributes
    ----------
    trainer
        The training process.
    node
        The machine's identity, which signed: the peer id of its node.
    mesh
        The tag of the mesh that it counts in.
    serial
        Random; tells a certificate from the one before.
    lifetime_s
        For how long whoever receives it believes it.
    signature
        That of ``node``, over all of this.
    """

    version: wire.Count
    trainer: wire.PeerIdText
    node: wire.PeerIdText
    mesh: wire.Bytes32
    serial: wire.Bytes16
    lifetime_s: _Lifetime
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


def _signed_bytes(trainer: PeerId, node: PeerId, mesh: bytes, serial: bytes, lifetime_s: int) -> bytes:
    parts = (trainer.encode(), node.encode(), mesh, serial, lifetime_s.to_bytes(8, "big"))
    return _CONTEXT + wire.length_prefixed(*parts)


def sign_certificate(
    node: Identity,
    trainer: PeerId,
    mesh: bytes,
    *,
    lifetime_s: int = limits.CERTIFICATE_LIFETIME_S,
    entropy: Entropy = SYSTEM_ENTROPY,
) -> bytes:
    """Return a certificate by ``node`` that ``trainer`` is of its machine, as it is sent."""
    serial = entropy.token(16)
    certificate = Certificate(
        version=VERSION,
        trainer=trainer,
        node=node.peer_id,
        mesh=mesh,
        serial=serial,
        lifetime_s=lifetime_s,
        signature=node.sign(_signed_bytes(trainer, node.peer_id, mesh, serial, lifetime_s)),
    )
    return wire.encode(certificate)


def open_certificate(encoded: bytes, *, trainer: PeerId, mesh: bytes) -> Certificate | None:
    """Verify and decode a certificate that ``trainer`` has sent; None if it is of a version not known here.

    Raises
    ------
    AuthenticationError
        If it is another process's, of another mesh, or not signed by whom it names.
    ProtocolError
        If it is no certificate, or takes more than ``limits.CERTIFICATE_MAX_BYTES`` bytes.
    """
    version = wire.decode(encoded, wire.Versioned, max_bytes=limits.CERTIFICATE_MAX_BYTES).version
    if version != VERSION:
        return None
    certificate = wire.decode(encoded, Certificate, max_bytes=limits.CERTIFICATE_MAX_BYTES)
    if certificate.trainer != trainer:
        raise AuthenticationError(f"the certificate that {trainer} sent is that of {certificate.trainer!r}")
    if certificate.mesh != mesh:
        raise AuthenticationError(f"the certificate of {trainer} is for another mesh than this one")
    told = _signed_bytes(trainer, certificate.node, mesh, certificate.serial, certificate.lifetime_s)
    if not verify_signature(certificate.node, told, certificate.signature):
        raise AuthenticationError(f"the certificate of {trainer} is not signed by {certificate.node!r}, whom it names")
    return certificate


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a certificate is worth: the machine that it proves, or else why it proves none."""

    machine: PeerId | None
    doubt: str = ""


class CertificateJudge:
    """Says what certificates are worth in one mesh: a machine without I/O.

    It remembers when each came first, so that sending it again does not make it younger; of very many it forgets
    those that came first.
    """

    def __init__(self, mesh: bytes, *, max_count: int = limits.CERTIFICATES_REMEMBERED_MAX_COUNT) -> None:
        self._mesh, self._max_count = mesh, max_count
        self._first_came_at: OrderedDict[tuple[PeerId, bytes], float] = OrderedDict()

    def judge(self, encoded: bytes, trainer: PeerId, now: float) -> Judgement:
        """Return what the certificate that ``trainer`` has sent is worth.

        Raises
        ------
        AuthenticationError, ProtocolError
            If no process that keeps to the protocol sends it; see :func:`open_certificate`.
        """
        certificate = open_certificate(encoded, trainer=trainer, mesh=self._mesh)
        if certificate is None:
            return Judgement(None, f"its certificate is of a version that is not {VERSION}")
        came_at = self._first_came_at.setdefault((certificate.node, certificate.serial), now)
        if len(self._first_came_at) > self._max_count:
            self._first_came_at.popitem(last=False)
        age_s = now - came_at
        if age_s > certificate.lifetime_s:
            return Judgement(
                None, f"its certificate came {age_s:.0f} s ago and was good for {certificate.lifetime_s} s"
            )
        return Judgement(certificate.node)


class Certifier:
    """Signs for one training process with the identity of its machine, where there is one.

    Parameters
    ----------
    identity_file
        Where the machine's identity lies. It is read when a certificate is made and not kept, and never made.
    trainer
        Whom it certifies.
    mesh
        The mesh's tag.
    """

    def __init__(self, identity_file: Path, trainer: PeerId, mesh: bytes, *, entropy: Entropy = SYSTEM_ENTROPY) -> None:
        self._identity_file, self._trainer, self._mesh, self._entropy = identity_file, trainer, mesh, entropy
        self._certificate: bytes | None = None
        self._signed_at = float("-inf")
        self._complained = False
        #: The machine's identity, once it has signed.
        self.machine: PeerId | None = None

    def certificate(self, now: float) -> bytes | None:
        """Return a certificate to send; None if this machine has no identity, or one that cannot be used."""
        if self._certificate is not None and now - self._signed_at < limits.CERTIFICATE_LIFETIME_S / 2:
            return self._certificate
        try:
            identity = load_identity(self._identity_file)
        except IdentityError as error:
            if not self._complained:
                logger.warning("this process has no certificate of its machine: %s", error)
            self._complained = True
            return self._certificate
        if identity is not None:
            self._certificate = sign_certificate(identity, self._trainer, self._mesh, entropy=self._entropy)
            self._signed_at, self.machine = now, identity.peer_id
        return self._certificate
