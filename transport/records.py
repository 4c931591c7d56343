"""Authenticated, encrypted records: what an encrypted link puts on the wire.

A record is a *prefix* of 4 bytes, the ciphertext, and a tag (16 or 32 bytes, by cipher). The prefix is the record's
kind (one byte) and the length of its plaintext (three bytes, big-endian), and is authenticated with it (AEAD
associated data). The nonce is the number of the record in its direction, so that a record that is
replayed, reordered or left out does not open.
Each direction of each stream has a key of its own, so that a record sent back to its sender does not open either.

Where a link has several streams, nothing but its place says what a record of one of them belongs to: its prefix is
*extended* by 16 bytes, the number of the message and the offset in its payload, authenticated like the rest.

Every ``limits.REKEY_INTERVAL_RECORDS`` records the key is replaced by HKDF-Expand of itself and the old one dropped:
who takes a key from memory cannot read what was sent before the last change.

Why records of their own and not TLS: TLS 1.3 ends a record every 16 KiB, and the system calls, wake-ups and nonces
of 64 small records cost about as much as encrypting 1 MiB does. The construction otherwise follows TLS 1.3 (RFC 8446
section 5) and RFC 5116.
"""

from __future__ import annotations

import struct
from typing import Final, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from sparkle_mesh import limits
from sparkle_mesh.errors import AuthenticationError, ProtocolError
from sparkle_mesh.transport.ciphers import KEY_BYTES, make_cipher

PREFIX_BYTES: Final = 4
#: How a prefix is extended: the number of a message, and the offset in its payload.
PLACE: Final = struct.Struct(">QQ")
PLACED_PREFIX_BYTES: Final = PREFIX_BYTES + PLACE.size
#: What a record takes beside its plaintext, at most; ``overhead_bytes`` of a sealer or opener is what it takes.
RECORD_OVERHEAD_MAX_BYTES: Final = PLACED_PREFIX_BYTES + limits.RECORD_TAG_MAX_BYTES

_REKEY_INFO: Final = b"sparkle link 1 rekey"
_LENGTH_MASK: Final = 0xFFFFFF


class _Ratchet:
    """A key that numbers its records and replaces itself."""

    __slots__ = ("_cipher_name", "_key", "aead", "number", "rekey_at")

    def __init__(self, cipher_name: str, key: bytes) -> None:
        self._cipher_name = cipher_name
        self._key = key
        self.aead = make_cipher(cipher_name, key)
        self.number = 0
        self.rekey_at = limits.REKEY_INTERVAL_RECORDS

    def rekey(self) -> None:
        # Rebinding drops the last references to the old key and to the cipher's state made of it.
        self._key = HKDFExpand(SHA256(), KEY_BYTES, _REKEY_INFO).derive(self._key)
        self.aead = make_cipher(self._cipher_name, self._key)
        self.rekey_at += limits.REKEY_INTERVAL_RECORDS


@final
class RecordSealer:
    """Makes the records of one direction.

    Parameters
    ----------
    cipher_name
        One of :func:`preferred_ciphers`.
    key
        32 bytes that no other sealer has ever had.
    placed
        Whether the prefixes are extended by a place; all of a stream's are, or none.
    """

    __slots__ = ("_prefix_bytes", "_ratchet", "overhead_bytes")

    def __init__(self, cipher_name: str, key: bytes, *, placed: bool = False) -> None:
        self._ratchet = _Ratchet(cipher_name, key)
        self._prefix_bytes = PLACED_PREFIX_BYTES if placed else PREFIX_BYTES
        self.overhead_bytes = self._prefix_bytes + self._ratchet.aead.tag_bytes

    def seal_into(self, kind: int, plaintext: memoryview | bytes, out: memoryview, place: bytes = b"") -> int:
        """Write the next record to the start of ``out``.

        Parameters
        ----------
        kind
            0 to 255; authenticated, not encrypted.
        plaintext
            At most ``limits.RECORD_MAX_BYTES`` bytes; may lie in ``out``, exactly where its ciphertext goes.
        out
            Writable, at least ``len(plaintext) + overhead_bytes`` bytes.
        place
            What extends the prefix, if it is extended: a :data:`PLACE`.

        Returns
        -------
        int
            Bytes written.
        """
        length = len(plaintext)
        if length > limits.RECORD_MAX_BYTES:
            raise ValueError(f"a record holds at most {limits.RECORD_MAX_BYTES} bytes, not {length}")
        ratchet = self._ratchet
        if ratchet.number == ratchet.rekey_at:
            ratchet.rekey()
        prefix = (kind << 24 | length).to_bytes(PREFIX_BYTES, "big") + place
        end = length + self.overhead_bytes
        out[: self._prefix_bytes] = prefix
        number = ratchet.number
        ratchet.number += 1
        ratchet.aead.encrypt_into(number, plaintext, prefix, out[self._prefix_bytes : end])
        return end


def parse_prefix(prefix: memoryview | bytes) -> tuple[int, int]:
    """Return kind and plaintext length that a record's first 4 bytes tell. They are not authenticated yet.

    Raises
    ------
    ProtocolError
        If the record would be over ``limits.RECORD_MAX_BYTES``.
    """
    word = int.from_bytes(prefix, "big")
    length = word & _LENGTH_MASK
    if length > limits.RECORD_MAX_BYTES:
        raise ProtocolError(f"a record of {length} bytes was announced; the limit is {limits.RECORD_MAX_BYTES}")
    return word >> 24, length


@final
class RecordOpener:
    """Opens the records of one direction, in order. After an error it opens none."""

    __slots__ = ("_prefix_bytes", "_ratchet", "overhead_bytes")

    def __init__(self, cipher_name: str, key: bytes, *, placed: bool = False) -> None:
        ratchet = _Ratchet(cipher_name, key)
        self._ratchet: _Ratchet | None = ratchet
        self._prefix_bytes = PLACED_PREFIX_BYTES if placed else PREFIX_BYTES
        self.overhead_bytes = self._prefix_bytes + ratchet.aead.tag_bytes

    def open_into(self, record: memoryview, out: memoryview) -> None:
        """Authenticate and decrypt the next record.

        Parameters
        ----------
        record
            A whole record, prefix and tag included.
        out
            Writable, exactly as long as the plaintext. Its contents are undefined if this raises: forged bytes
            are decrypted before the tag is known to be wrong.

        Raises
        ------
        AuthenticationError
            If it is not the very record that the peer sealed next: forged, cut, replayed, out of order, reflected,
            or under another key.
        """
        ratchet = self._ratchet
        if ratchet is None:
            raise AuthenticationError("a record did not verify before; nothing after it can be trusted")
        if ratchet.number == ratchet.rekey_at:
            ratchet.rekey()
        try:
            if len(record) != len(out) + self.overhead_bytes:
                raise InvalidTag
            prefix_bytes = self._prefix_bytes
            ratchet.aead.decrypt_into(ratchet.number, record[prefix_bytes:], bytes(record[:prefix_bytes]), out)
        except InvalidTag:
            self._ratchet = None
            raise AuthenticationError(
                f"record {ratchet.number} of {len(record)} bytes did not verify: it was changed, cut, replayed or "
                "reordered on its way, or made with another key"
            ) from None
        ratchet.number += 1
