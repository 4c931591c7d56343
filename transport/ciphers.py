"""The ciphers of records, all with one face: :class:`Cipher`.

AES-256-GCM and ChaCha20-Poly1305 come from the cryptography package (OpenSSL). AEGIS-128L comes from libsodium: it is
built from the same AES instructions, and needs fewer of them per byte than AES-GCM does. Measured with 1 MiB records
on one core of an AES-NI/VAES machine without AVX-512, where OpenSSL has no wide code for GCM: AES-256-GCM 4.0 GB/s,
ChaCha20-Poly1305 2.2, AEGIS-256 9.0, AEGIS-128L 14.9. Where OpenSSL has such code (AVX-512), AES-256-GCM is about as
fast; a link is only as fast as its slower end, and AEGIS is fast on both kinds. Its 128-bit keys take nothing from a
link's strength: they are agreed on with X25519, which is of that strength itself.

Sources: AEGIS-128L: H. Wu and B. Preneel, "AEGIS: A Fast Authenticated Encryption Algorithm", SAC 2013, and
draft-irtf-cfrg-aegis-aead; AES-GCM: NIST SP 800-38D; ChaCha20-Poly1305: RFC 8439.
"""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

AEGIS_128L: Final = "aegis-128l"
AES_256_GCM: Final = "aes-256-gcm"
CHACHA20_POLY1305: Final = "chacha20-poly1305"

KEY_BYTES: Final = 32

_NONCE_BYTES: Final = 12
_AEGIS_KEY_BYTES: Final = 16
_AEGIS_NONCE_BYTES: Final = 16
_AEGIS_TAG_BYTES: Final = 32
_CPUINFO: Final = Path("/proc/cpuinfo")


class Cipher(Protocol):
    """Authenticated encryption under one key, of messages that are numbered.

    Buffers are contiguous and of bytes: ``bytes``, ``bytearray`` or such a ``memoryview``.
    """

    tag_bytes: int
    """How much longer the ciphertext is than the plaintext."""

    def encrypt_into(self, number: int, data: Any, associated_data: bytes, buf: Any) -> None:
        """Write ciphertext and tag of ``data`` to ``buf``, which is exactly as long.

        ``number`` makes the nonce: none is ever used twice under one key.
        """
        ...

    def decrypt_into(self, number: int, data: Any, associated_data: bytes, buf: Any) -> None:
        """Write the plaintext of ``data`` (ciphertext and tag) to ``buf``, which is exactly as long.

        Raises
        ------
        InvalidTag
            If it does not verify; ``buf`` may have been written to all the same.
        """
        ...


class _OpenSsl:
    """A cipher of the cryptography package."""

    tag_bytes = 16

    def __init__(self, aead: AESGCM | ChaCha20Poly1305) -> None:
        self._aead = aead

    def encrypt_into(self, number: int, data: Any, associated_data: bytes, buf: Any) -> None:
        self._aead.encrypt_into(number.to_bytes(_NONCE_BYTES, "big"), data, associated_data, buf)

    def decrypt_into(self, number: int, data: Any, associated_data: bytes, buf: Any) -> None:
        self._aead.decrypt_into(number.to_bytes(_NONCE_BYTES, "big"), data, associated_data, buf)


class _Aegis128L:
    """AEGIS-128L of libsodium, on the caller's buffers: PyNaCl's own functions copy every byte once more."""

    tag_bytes = _AEGIS_TAG_BYTES

    def __init__(self, key: bytes) -> None:
        from nacl import _sodium

        lib: Any = _sodium.lib
        if lib.sodium_init() < 0:
            raise OSError("libsodium cannot be initialised: the system has no source of random bytes")
        # Bound once: these are called for every record.
        self._view: Any = _sodium.ffi.from_buffer
        self._null: Any = _sodium.ffi.NULL
        self._encrypt: Any = lib.crypto_aead_aegis128l_encrypt
        self._decrypt: Any = lib.crypto_aead_aegis128l_decrypt
        self._key = key[:_AEGIS_KEY_BYTES]

    def encrypt_into(self, number: int, data: Any, associated_data: bytes, buf: Any) -> None:
        length = len(data)
        if len(buf) != length + _AEGIS_TAG_BYTES:
            raise ValueError(f"buffer must be {length + _AEGIS_TAG_BYTES} bytes, not {len(buf)}")
        view, null = self._view, self._null
        nonce = number.to_bytes(_AEGIS_NONCE_BYTES, "big")
        out = view(buf, require_writable=True)
        self._encrypt(out, null, view(data), length, associated_data, len(associated_data), null, nonce, self._key)

    def decrypt_into(self, number: int, data: Any, associated_data: bytes, buf: Any) -> None:
        length = len(data)
        if length < _AEGIS_TAG_BYTES or len(buf) != length - _AEGIS_TAG_BYTES:
            raise InvalidTag
        view, null = self._view, self._null
        nonce = number.to_bytes(_AEGIS_NONCE_BYTES, "big")
        out = view(buf, require_writable=True)
        ad_length = len(associated_data)
        forged = self._decrypt(out, null, null, view(data), length, associated_data, ad_length, nonce, self._key)
        # The error's traceback keeps what is local here. In a cycle with it, the collector would clear a memoryview
        # that is still exported, and CPython would crash.
        del out
        if forged:
            raise InvalidTag


#: Every cipher that a link can have, the fastest (where there are AES instructions) first.
CIPHERS: Final = (AEGIS_128L, AES_256_GCM, CHACHA20_POLY1305)


def make_cipher(name: str, key: bytes) -> Cipher:
    """Return the cipher ``name`` under the 32-byte ``key``."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a record key has {KEY_BYTES} bytes, not {len(key)}")
    if name == AEGIS_128L:
        return _Aegis128L(key)
    return _OpenSsl(AESGCM(key) if name == AES_256_GCM else ChaCha20Poly1305(key))


def preferred_ciphers() -> tuple[str, ...]:
    """Return the ciphers of this machine, the fastest first."""
    if not _has_aes():
        return (CHACHA20_POLY1305, AES_256_GCM)
    return CIPHERS if _has_aegis() else (AES_256_GCM, CHACHA20_POLY1305)


def choose_cipher(mine: tuple[str, ...], theirs: tuple[str, ...]) -> str | None:
    """Return the cipher for a link: the fastest of both, or what is bearable for one that has no AES instructions.

    Which side is asked makes no difference. None if there is none in common.
    """
    common = [name for name in CIPHERS if name in mine and name in theirs]
    if CHACHA20_POLY1305 in common and CHACHA20_POLY1305 in (mine[0], theirs[0]):
        return CHACHA20_POLY1305
    return common[0] if common else None


def _has_aes() -> bool:
    try:
        text = _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        # No Linux. Every 64-bit x86 and Arm machine that macOS and Windows run on today has them.
        return platform.machine().lower() in ("x86_64", "amd64", "arm64", "aarch64")
    lines = (line.partition(":") for line in text.splitlines())
    return any("aes" in value.split() for name, _, value in lines if name.strip().lower() in ("flags", "features"))


def _has_aegis() -> bool:
    """Whether PyNaCl is there with a libsodium that knows AEGIS (1.0.19 and later)."""
    if find_spec("nacl") is None:
        return False
    from nacl import _sodium

    return hasattr(_sodium.lib, "crypto_aead_aegis128l_encrypt")
