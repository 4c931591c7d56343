"""Revocations: which peers the founder of a mesh has thrown out, in a numbered list that it signs.

Who the founder is stands in invites, or is told to a process by its owner; nobody else's list is believed. Of two of
its lists the one with the higher number holds. A list is handed over in introductions and told by gossip, so it
reaches whoever was away, and is kept in the data directory (:mod:`.revocation_file`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Annotated

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.errors import AuthenticationError, ProtocolError, UsageError
from sparkle_mesh.fabric.identity import Identity, public_key_of_peer_id, verify_signature
from sparkle_mesh.fabric.interface import PeerId

logger = logging.getLogger(__name__)

VERSION = 1
# No other signature of an identity is over bytes that begin so.
_CONTEXT = b"sparkle revocations 1\0"

#: A list as it is sent and stored.
EncodedRevocations = Annotated[bytes, msgspec.Meta(max_length=limits.REVOCATIONS_MAX_BYTES)]


class Revocations(wire.Message, frozen=True, kw_only=True):
    """What a founder has signed.

    Attributes
    ----------
    founder
        Who signed.
    mesh
        The tag of the mesh that it counts in.
    sequence
        Higher than that of any list that the founder has signed for it before.
    revoked
        All that are revoked; a later list replaces this one as a whole.
    """

    version: wire.Count
    founder: wire.PeerIdText
    mesh: wire.Bytes32
    sequence: wire.Count
    revoked: Annotated[tuple[wire.PeerIdText, ...], msgspec.Meta(max_length=limits.REVOKED_PEERS_MAX_COUNT)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


def _signed_bytes(founder: PeerId, mesh: bytes, sequence: int, revoked: Iterable[PeerId]) -> bytes:
    parts = (founder.encode(), mesh, sequence.to_bytes(8, "big"), *(peer_id.encode() for peer_id in revoked))
    return _CONTEXT + wire.length_prefixed(*parts)


def sign_revocations(founder: Identity, mesh: bytes, *, sequence: int, revoked: Iterable[PeerId]) -> bytes:
    """Return a list by ``founder``, as it is sent.

    Raises
    ------
    UsageError
        If it names more than ``limits.REVOKED_PEERS_MAX_COUNT`` peers.
    """
    names = tuple(sorted(set(revoked)))
    if len(names) > limits.REVOKED_PEERS_MAX_COUNT:
        raise UsageError(
            f"{len(names)} peers would be revoked, and a list holds {limits.REVOKED_PEERS_MAX_COUNT}: give those that"
            " are to stay a new key (`sparkle-node new-key`), and begin a new list"
        )
    signature = founder.sign(_signed_bytes(founder.peer_id, mesh, sequence, names))
    return wire.encode(
        Revocations(
            version=VERSION,
            founder=founder.peer_id,
            mesh=mesh,
            sequence=sequence,
            revoked=names,
            signature=signature,
        )
    )


def open_revocations(encoded: bytes, *, mesh: bytes) -> Revocations | None:
    """Verify and decode a list, whoever its founder is; None if it is of a version not known here.

    Raises
    ------
    AuthenticationError
        If it is another mesh's, or not signed by whom it names.
    ProtocolError
        If it is no list, or takes more than ``limits.REVOCATIONS_MAX_BYTES`` bytes.
    """
    version = wire.decode(encoded, wire.Versioned, max_bytes=limits.REVOCATIONS_MAX_BYTES).version
    if version != VERSION:
        return None
    told = wire.decode(encoded, Revocations, max_bytes=limits.REVOCATIONS_MAX_BYTES)
    if told.mesh != mesh:
        raise AuthenticationError("a list of revoked peers is for another mesh than this one")
    signed = _signed_bytes(told.founder, mesh, told.sequence, told.revoked)
    if not verify_signature(told.founder, signed, told.signature):
        raise AuthenticationError(f"a list of revoked peers in the name of {told.founder!r} is not signed by it")
    return told


class RevocationList:
    """What is revoked in one mesh: a machine without I/O.

    Parameters
    ----------
    mesh
        The mesh's tag.
    founder
        Whose lists are believed; nobody's if None.

    Attributes
    ----------
    encoded
        The list that holds, to be handed on; None before there was one.
    sequence, revoked
        Its number, 0 before there was one, and whom it names.
    """

    def __init__(self, mesh: bytes, founder: PeerId | None = None) -> None:
        self._mesh = mesh
        self.founder = founder
        self.encoded: bytes | None = None
        self.sequence = 0
        self.revoked: frozenset[PeerId] = frozenset()

    def take(self, encoded: bytes) -> bool:
        """Take a list that somebody tells; return whether it holds from now on.

        One of another founder, of a later version or with a number that is not higher changes nothing.

        Raises
        ------
        AuthenticationError, ProtocolError
            If no process that keeps to the protocol tells it; see :func:`open_revocations`.
        """
        if self.founder is None or encoded == self.encoded:
            return False
        told = open_revocations(encoded, mesh=self._mesh)
        if told is None or told.founder != self.founder:
            who = "of a later version" if told is None else f"by {told.founder}, not by the founder {self.founder}"
            logger.info("a list of revoked peers is not believed: it is %s", who)
            return False
        if told.sequence <= self.sequence:
            return False
        self.encoded, self.sequence, self.revoked = encoded, told.sequence, frozenset(told.revoked)
        return True

    def is_revoked(self, peer_id: PeerId, machine: PeerId | None = None) -> PeerId | None:
        """Return which of the two is revoked, a peer or its machine; None if neither is."""
        return next((name for name in (peer_id, machine) if name in self.revoked), None)

    def revoking(self, identity: Identity, peer_id: PeerId) -> bytes:
        """Return the list that holds once ``peer_id`` is revoked as well; this one does not change.

        Raises
        ------
        UsageError
            If ``identity`` is not the founder's, or ``peer_id`` is none or the founder, or too many are revoked.
        """
        if identity.peer_id != self.founder:
            who = "this mesh has none here (run its node with --founder)" if self.founder is None else self.founder
            raise UsageError(f"only the founder of a mesh revokes peers, which is not {identity.peer_id}: {who}")
        if peer_id == self.founder:
            raise UsageError(f"{peer_id} is the founder, who cannot be revoked; make a new key for a mesh without it")
        try:
            public_key_of_peer_id(peer_id)
        except ProtocolError as error:
            raise UsageError(f"nobody is revoked: {error}") from error
        return sign_revocations(identity, self._mesh, sequence=self.sequence + 1, revoked={*self.revoked, peer_id})
