"""Capability records: what a machine offers, signed by who offers it and sealed for the mesh.

A record is true of its publisher, whose peer id is the key that signs it; of two of one publisher the one with the
higher sequence number holds. It is stored under one key for each kind of device and range of memory that it has, and
one more if its publisher is a trainer (:func:`.labels.index_labels`), so that a search asks for those keys and no
others. How fresh it is goes by its age since it was received, never by its publisher's clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Annotated, Protocol

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.capabilities.labels import bits_of, index_labels, label_below
from sparkle_mesh.clock import SYSTEM_ENTROPY, Entropy
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import AuthenticationError, ProtocolError, UsageError
from sparkle_mesh.fabric.identity import Identity, verify_signature
from sparkle_mesh.fabric.interface import PeerId

_SEAL_CONTEXT = b"capability record"


class Secrets(Protocol):
    """What records need of a mesh's name and key; ``membership.keys.MeshSecrets`` has it."""

    @property
    def tag(self) -> bytes: ...

    def locate(self, label: str) -> bytes: ...
    def seal(self, payload: bytes, entropy: Entropy = ..., *, context: bytes = ...) -> bytes: ...
    def unseal(self, sealed: bytes, *, context: bytes = ...) -> bytes: ...


class CapabilityRecord(wire.Message, frozen=True, kw_only=True):
    """What one process tells of its machine.

    Attributes
    ----------
    host_id
        Stands for the machine: several processes of it tell the same of its devices.
    role
        ``"node"`` or ``"trainer"``.
    software
        ``"sparkle-mesh 0.1.0"``.
    addresses
        Where it listens.
    devices
        All that it offers.
    """

    host_id: wire.Bytes16
    role: wire.NameText
    software: wire.NameText
    addresses: wire.AddressList
    devices: Annotated[tuple[DeviceInfo, ...], msgspec.Meta(max_length=limits.DEVICES_PER_RECORD_MAX_COUNT)]


class SignedRecord(wire.Message, frozen=True, kw_only=True):
    """A sealed record as it is stored and handed out.

    Attributes
    ----------
    sequence
        Higher than that of any record its publisher has signed before.
    lifetime_s
        For how long a holder keeps it after it was stored or renewed.
    sealed
        The :class:`CapabilityRecord`, readable with the mesh's key.
    signature
        The publisher's, over all of this and the mesh's tag.
    """

    publisher: wire.PeerIdText
    sequence: wire.Count
    lifetime_s: Annotated[float, msgspec.Meta(gt=0, le=limits.CAPABILITY_LIFETIME_MAX_S)]
    sealed: Annotated[bytes, msgspec.Meta(max_length=limits.CAPABILITY_RECORD_MAX_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]

    @property
    def nbytes(self) -> int:
        """What it counts for where bytes are bounded."""
        return len(self.sealed) + limits.PEER_ID_MAX_CHARS + len(self.signature)


def _signed_bytes(tag: bytes, publisher: PeerId, sequence: int, lifetime_s: float, sealed: bytes) -> bytes:
    head = f"sparkle capability record 1\0{publisher}\0{sequence}\0{lifetime_s!r}\0".encode()
    return head + tag + sha256(sealed).digest()


def sign_record(
    record: CapabilityRecord,
    identity: Identity,
    secrets: Secrets,
    *,
    sequence: int,
    lifetime_s: float = limits.CAPABILITY_LIFETIME_S,
    entropy: Entropy = SYSTEM_ENTROPY,
) -> SignedRecord:
    """Seal ``record`` for the mesh and sign it.

    Raises
    ------
    UsageError
        If it takes more than ``limits.CAPABILITY_RECORD_MAX_BYTES`` bytes.
    """
    sealed = secrets.seal(wire.encode(record), entropy, context=_SEAL_CONTEXT)
    if len(sealed) > limits.CAPABILITY_RECORD_MAX_BYTES:
        raise UsageError(
            f"the capability record takes {len(sealed)} bytes, over the limit of {limits.CAPABILITY_RECORD_MAX_BYTES}; "
            f"it has {len(record.devices)} devices and {len(record.addresses)} addresses"
        )
    signature = identity.sign(_signed_bytes(secrets.tag, identity.peer_id, sequence, lifetime_s, sealed))
    return SignedRecord(
        publisher=identity.peer_id, sequence=sequence, lifetime_s=lifetime_s, sealed=sealed, signature=signature
    )


def open_record(signed: SignedRecord, secrets: Secrets) -> CapabilityRecord:
    """Verify and decode what a publisher has signed.

    Raises
    ------
    AuthenticationError
        If the signature is not its publisher's for this mesh, or it is not sealed under the mesh's key.
    ProtocolError
        If what was sealed is no capability record.
    """
    told = _signed_bytes(secrets.tag, signed.publisher, signed.sequence, signed.lifetime_s, signed.sealed)
    if not verify_signature(signed.publisher, told, signed.signature):
        raise AuthenticationError(f"a capability record in the name of {signed.publisher!r} is not signed by it")
    payload = secrets.unseal(signed.sealed, context=_SEAL_CONTEXT)
    return wire.decode(payload, CapabilityRecord, max_bytes=limits.CAPABILITY_RECORD_MAX_BYTES)


def index_keys(publisher: PeerId, record: CapabilityRecord, secrets: Secrets) -> frozenset[bytes]:
    """Return the keys (32 bytes each) of :func:`.labels.index_labels`, and of those below them."""
    labels = index_labels(record.role, record.devices)
    depths = range(limits.CAPABILITY_DEPTH_MAX_COUNT + 1)
    return frozenset(secrets.locate(label_below(label, bits_of(publisher, d))) for label in labels for d in depths)


def open_filed(signed: SignedRecord, keys: Iterable[bytes], secrets: Secrets) -> CapabilityRecord:
    """As :func:`open_record`, for a record that is stored or was found under ``keys``.

    Raises
    ------
    ProtocolError
        Also if it does not belong under one of them.
    """
    record = open_record(signed, secrets)
    misfiled = set(keys) - index_keys(signed.publisher, record, secrets)
    if misfiled:
        raise ProtocolError(
            f"a capability record of {signed.publisher} is filed under {len(misfiled)} keys that are not its own"
        )
    return record
