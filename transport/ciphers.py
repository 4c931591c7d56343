"""The ciphers of records, all with one face: :class:`Cipher`.

AES-256-GCM and ChaCha20-Poly1305 come from the cryptography package (OpenSSL). AEGIS-256 comes from libsodium: it is
built from the same AES instructions, and needs fewer of them per byte than AES-GCM does. Measured with 1 MiB records
on one core of an AES-NI/VAES machine without AVX-512, where OpenSSL has no wide code for GCM: AES-256-GCM 4.0 GB/s,
ChaCha20-Poly1305 2.1, AEGIS-256 9.0. Where OpenSSL has such code (AVX-512), AES-256-GCM is the fastest; a link is
only as fast as its slower end, and AEGIS is fast on both kinds.

Sources: AEGIS-256: H. Wu and B. Preneel, "AEGIS: A Fast Authenticated Encryption Algorithm", SAC 2013, and
draft-irtf-cfrg-aegis-aead; AES-GCM: NIST SP 800-38D; ChaCha20-Poly1305: RFC 8439.
"""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

AEGIS_256: Final = "aegis-256"
AES_256_GCM: Final = "aes-256-gcm"
CHACHA20_POLY1305: Final = "chacha20-poly1305"

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12

_AEGIS_NONCE_BYTES: Final = 32
_AEGIS_TAG_BYTES: Final = 32
_CPUINFO: Final = Path("/proc/cpuinfo")


class Cipher(Protocol):
    """Authenticated encryption under one key."""

    def encrypt_into(self, nonce: bytes, data: Any, associated_data: Any, buf: Any) -> int:
        """Write ciphertext and tag of ``data`` to ``buf``, which is exactly as long; return how long.

        ``nonce`` has ``NONCE_BYTES`` bytes and is never used twice under one key.
        """
        ...

    def decrypt_into(self, nonce: bytes, data: Any, associated_data: Any, buf: Any) -> int:
        """Write the plaintext of ``data`` (ciphertext and tag) to ``buf``, which is exactly as long.

        Raises
        ------
        InvalidTag
            If it does not verify; ``buf`` may have been written to all the same.
        """
        ...

    @property
    def tag_bytes(self) -> int:
        """How much longer the ciphertext is than the plaintext."""
        ...


class _OpenSsl:
    """A cipher of the cryptography package."""

    tag_bytes = 16

    def __init__(self, aead: AESGCM | ChaCha20Poly1305) -> None:
        self.encrypt_into = aead.encrypt_into
        self.decrypt_into = aead.decrypt_into


class _Aegis256:
    """AEGIS-256 of libsodium, on the caller's buffers: PyNaCl's own functions copy every byte once more."""

    tag_bytes = _AEGIS_TAG_BYTES

    def __init__(self, key: bytes) -> None:
        from nacl import _sodium

        self._lib: Any = _sodium.lib
        self._ffi: Any = _sodium.ffi
        if self._lib.sodium_init() < 0:
            raise OSError("libsodium cannot be initialised: the system has no source of random bytes")
        self._key = key

    def encrypt_into(self, nonce: bytes, data: Any, associated_data: Any, buf: Any) -> int:
        view = self._ffi.from_buffer
        if len(buf) != len(data) + _AEGIS_TAG_BYTES:
            raise ValueError(f"buffer must be {len(data) + _AEGIS_TAG_BYTES} bytes, not {len(buf)}")
        self._lib.crypto_aead_aegis256_encrypt(
            self._ffi.from_buffer(buf, require_writable=True),
            self._ffi.NULL,
            view(data),
            len(data),
            view(associated_data),
            len(associated_data),
            self._ffi.NULL,
            nonce.rjust(_AEGIS_NONCE_BYTES, b"\0"),
            self._key,
        )
        return len(buf)

    def decrypt_into(self, nonce: bytes, data: Any, associated_data: Any, buf: Any) -> int:
        view = self._ffi.from_buffer
        if len(data) < _AEGIS_TAG_BYTES or len(buf) != len(data) - _AEGIS_TAG_BYTES:
            raise InvalidTag
        failed = self._lib.crypto_aead_aegis256_decrypt(
            self._ffi.from_buffer(buf, require_writable=True),
            self._ffi.NULL,
            self._ffi.NULL,
            view(data),
            len(data),
            view(associated_data),
            len(associated_data),
            nonce.rjust(_AEGIS_NONCE_BYTES, b"\0"),
            self._key,
        )
        if failed:
            raise InvalidTag
        return len(buf)


#: Every cipher that a link can have, the fastest (where there are AES instructions) first.
CIPHERS: Final = (AEGIS_256, AES_256_GCM, CHACHA20_POLY1305)


def make_cipher(name: str, key: bytes) -> Cipher:
    """Return the cipher ``name`` under the 32-byte ``key``."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a record key has {KEY_BYTES} bytes, not {len(key)}")
    if name == AEGIS_256:
        return _Aegis256(key)
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

    return hasattr(_sodium.lib, "crypto_aead_aegis256_encrypt")
