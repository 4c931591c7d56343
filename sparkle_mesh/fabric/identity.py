"""Who a process is: an Ed25519 key, the peer id derived from it, and the file that keeps it.

The peer id is libp2p's: the base58 of an identity multihash over the protobuf of the public key
(libp2p specification, "Peer Ids and Keys"). It is computed here in a few lines, so that commands which
only show an id need not load the network stack.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.errors import IdentityError, ProtocolError
from sparkle_mesh.fabric.interface import PeerId

_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
# Identity multihash (code 0, 36 bytes) of protobuf PublicKey{type: Ed25519, data: 32 bytes}.
_PEER_ID_PREFIX: Final = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
# Multihash of SHA-256 (code 18, 32 bytes), over keys that are too large for the former: RSA.
_SHA256_PREFIX: Final = bytes([0x12, 0x20])
_KEY_BYTES: Final = 32
_FILE_MAGIC: Final = b"sparkle identity 1\n"
_FILE_MAGIC_ANY_VERSION: Final = b"sparkle identity "


def _base58_encode(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58[digit] + digits
    return _BASE58[0] * (len(data) - len(data.lstrip(b"\0"))) + digits


def _base58_decode(text: str) -> bytes:
    """Return the bytes that ``text`` stands for; ValueError for other characters."""
    number = 0
    for character in text:
        number = number * 58 + _BASE58.index(character)
    zeros = len(text) - len(text.lstrip(_BASE58[0]))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


def peer_id_of_public_key(public_key: bytes) -> PeerId:
    """Return the peer id of a raw 32-byte Ed25519 public key."""
    return _base58_encode(_PEER_ID_PREFIX + public_key)


def public_key_of_peer_id(peer_id: PeerId) -> bytes:
    """Return the raw 32-byte Ed25519 public key that ``peer_id`` embeds.

    Raises
    ------
    ProtocolError
        If ``peer_id`` is not the base58 text of an Ed25519 peer id.
    """
    if len(peer_id) <= limits.PEER_ID_MAX_CHARS:
        with suppress(ValueError):
            data = _base58_decode(peer_id)
            if data.startswith(_PEER_ID_PREFIX) and len(data) == len(_PEER_ID_PREFIX) + _KEY_BYTES:
                return data[len(_PEER_ID_PREFIX) :]
    raise ProtocolError(
        f"{peer_id[: limits.PEER_ID_MAX_CHARS]!r} is not an Ed25519 peer id; one looks like 12D3KooW… (52 characters)"
    )


def check_peer_id(peer_id: PeerId) -> None:
    """Make sure that ``peer_id`` is one: of an Ed25519 key, as ours are, or the hash of another, as many public ones.

    Raises
    ------
    ProtocolError
        If it is neither.
    """
    if len(peer_id) <= limits.PEER_ID_MAX_CHARS:
        with suppress(ValueError):
            data = _base58_decode(peer_id)
            if data.startswith(_SHA256_PREFIX) and len(data) == len(_SHA256_PREFIX) + 32:
                return
    public_key_of_peer_id(peer_id)


def verify_signature(peer_id: PeerId, data: bytes, signature: bytes) -> bool:
    """Whether ``signature`` over ``data`` is that of ``peer_id``; False too for what is not a peer id."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key_of_peer_id(peer_id)).verify(signature, data)
    except (ProtocolError, InvalidSignature):
        return False
    return True


@final
class Identity:
    """An Ed25519 key pair and its peer id. The private key shows in no ``repr`` and no log."""

    __slots__ = ("_key", "_peer_id")

    def __init__(self, private_key: bytes) -> None:
        """Take the raw 32-byte private key."""
        if len(private_key) != _KEY_BYTES:
            raise IdentityError(f"an Ed25519 private key has {_KEY_BYTES} bytes, not {len(private_key)}")
        self._key = Ed25519PrivateKey.from_private_bytes(private_key)
        self._peer_id = peer_id_of_public_key(self._key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Identity:
        """Return a new identity from the operating system's randomness."""
        return cls(SYSTEM_ENTROPY.token(_KEY_BYTES))

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    def sign(self, data: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature over ``data``."""
        return self._key.sign(data)

    def private_key_bytes(self) -> bytes:
        """Return the raw 32-byte private key, for the fabric and the key file alone."""
        return self._key.private_bytes_raw()

    def __repr__(self) -> str:
        return f"<Identity {self._peer_id}>"


class _IdentityFile(wire.Message, frozen=True):
    private_key: wire.Bytes32
    # Kept beside the private key, so that a flipped bit is seen instead of becoming another identity.
    peer_id: wire.PeerIdText


def load_or_create_identity(path: Path) -> Identity:
    """Return the identity kept in ``path``; make one, readable by its owner only, if there is no such file.

    Of two processes that start at once, both get the identity that one of them made.

    Raises
    ------
    IdentityError
        If the file is damaged, not the owner's own, readable by others, a symbolic link, or of a newer
        version, or cannot be read or made. It is left as it was.
    """
    identity = load_identity(path)
    if identity is None:
        _create(path)
        identity = load_identity(path)
    if identity is None:
        raise IdentityError(f"identity file {path} vanished while it was made; start again")
    return identity


def load_identity(path: Path) -> Identity | None:
    """Return the identity kept in ``path``; None if there is no such file, and none is made.

    Raises
    ------
    IdentityError
        If the file cannot be used, as :func:`load_or_create_identity` says.
    """
    # O_NONBLOCK: a FIFO laid in the file's place must not make the start hang.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.is_symlink():
        raise IdentityError(f"identity file {path} is a symbolic link; put the file itself there, or remove the link")
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IdentityError(f"identity file {path} cannot be opened: {error.strerror or error}") from error
    try:
        _refuse_unsafe(path, os.fstat(descriptor))
        content = os.read(descriptor, limits.IDENTITY_FILE_MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    return _parse(path, content)


def _refuse_unsafe(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise IdentityError(f"identity file {path} is not a regular file; move it away")
    if not hasattr(os, "geteuid"):  # pragma: no cover - Windows: the profile directory's access list guards the file
        return
    if status.st_uid != os.geteuid():
        raise IdentityError(
            f"identity file {path} belongs to user {status.st_uid}, not to {os.geteuid()} who runs this; "
            "take another data directory, or chown the file if it is yours"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise IdentityError(
            f"identity file {path} has mode {mode:04o}, so others may have read the key; "
            "remove it for a new identity, or run chmod 600 on it if nobody has"
        )


def _parse(path: Path, content: bytes) -> Identity:
    if not content.startswith(_FILE_MAGIC):
        if content.startswith(_FILE_MAGIC_ANY_VERSION):
            version = content[len(_FILE_MAGIC_ANY_VERSION) : 32].split(b"\n")[0].decode("ascii", "replace")
            raise IdentityError(f"identity file {path} has version {version!r} and this program reads 1; upgrade it")
        raise IdentityError(f"identity file {path} is damaged or not an identity; restore it, or move it away")
    try:
        stored = wire.decode(content[len(_FILE_MAGIC) :], _IdentityFile, max_bytes=limits.IDENTITY_FILE_MAX_BYTES)
    except ProtocolError as error:
        raise IdentityError(f"identity file {path} is damaged ({error}); restore it, or move it away") from error
    identity = Identity(stored.private_key)
    if identity.peer_id != stored.peer_id:
        raise IdentityError(
            f"identity file {path} is damaged: its key makes {identity.peer_id}, it says {stored.peer_id!r}; "
            "restore it, or move it away"
        )
    return identity


def _create(path: Path) -> None:
    """Make the file with a new identity, unless somebody else's appears first."""
    identity = Identity.generate()
    stored = _IdentityFile(private_key=identity.private_key_bytes(), peer_id=identity.peer_id)
    temporary = path.with_name(f".{path.name}.{SYSTEM_ENTROPY.token(8).hex()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(temporary, flags, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_FILE_MAGIC + wire.encode(stored))
                file.flush()
                os.fsync(descriptor)
            # Unlike a rename, a link never replaces the file of a process that was faster.
            with suppress(FileExistsError):
                path.hardlink_to(temporary)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise IdentityError(f"identity file {path} cannot be made: {error}; choose another data directory") from error
