"""What a mesh's name and key give: identifiers that do not tell the name, proofs, and sealed gossip.

A mesh is a name, or a name with a 32-byte key. Every identifier that leaves the process is derived by
HKDF-SHA256 (RFC 5869) from the key with the name in ``info``; without a key the name alone takes its place,
so an open mesh's identifiers can be guessed by anyone who guesses its name, and are no secret.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import stat
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_ENTROPY, Entropy
from sparkle_mesh.errors import AuthenticationError, UsageError

KEY_BYTES = 32
_NONCE_BYTES = 12
_KEY_TEXT_PREFIX = "sparkle-key-1:"
_HOW_TO_MAKE_ONE = "make one with `sparkle-node new-key FILE`"

KeyLike: TypeAlias = "MeshKey | bytes | str | None"


@dataclass(frozen=True, slots=True)
class MeshKey:
    """The 32 random bytes that admit to a keyed mesh. Never shown by ``repr``."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise UsageError(
                f"a mesh key is {KEY_BYTES} random bytes, not {len(self.secret)}; passphrases are refused: "
                f"{_HOW_TO_MAKE_ONE}"
            )

    @classmethod
    def generate(cls, entropy: Entropy = SYSTEM_ENTROPY) -> MeshKey:
        """Return a fresh random key."""
        return cls(entropy.token(KEY_BYTES))

    @classmethod
    def coerce(cls, key: KeyLike) -> MeshKey | None:
        """Return ``key`` (a MeshKey, its 32 bytes, or its text form) as a MeshKey; None stays None.

        Raises
        ------
        UsageError
            If it is something else, a passphrase for example.
        """
        if key is None or isinstance(key, MeshKey):
            return key
        if isinstance(key, str):
            return cls.parse(key)
        if isinstance(key, (bytes, bytearray)):
            return cls(bytes(key))
        raise UsageError(f"key is a {type(key).__name__}; give 32 bytes, the text of a key file, or a MeshKey")

    @classmethod
    def parse(cls, text: str) -> MeshKey:
        """Read the text form that :meth:`to_text` writes (64 hexadecimal digits are read too)."""
        stripped = text.strip()
        try:
            if stripped.startswith(_KEY_TEXT_PREFIX):
                encoded = stripped.removeprefix(_KEY_TEXT_PREFIX)
                return cls(base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True))
            if len(stripped) == 2 * KEY_BYTES:
                return cls(bytes.fromhex(stripped))
        except (binascii.Error, ValueError) as error:
            if isinstance(error, UsageError):
                raise
        raise UsageError(
            f"the text given ({len(stripped)} characters) is not a mesh key: keys are 32 random bytes written as "
            f"`{_KEY_TEXT_PREFIX}…`; passphrases are refused: {_HOW_TO_MAKE_ONE}"
        )

    def to_text(self) -> str:
        """Return the one-line text form, which :meth:`parse` reads."""
        return _KEY_TEXT_PREFIX + base64.urlsafe_b64encode(self.secret).decode().rstrip("=")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MeshKey:
        """Read a key file.

        Raises
        ------
        UsageError
            If it is missing, readable by others than its owner, or does not hold a key.
        """
        file = Path(path)
        try:
            mode = file.stat().st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or file.stat().st_size > limits.KEY_FILE_MAX_BYTES:
                raise UsageError(
                    f"key file {file} is not a key file: no regular file, or too large; {_HOW_TO_MAKE_ONE}"
                )
            text = file.read_text(encoding="ascii")
        except FileNotFoundError as error:
            raise UsageError(f"key file {file} does not exist; {_HOW_TO_MAKE_ONE}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"key file {file} does not hold a key in text form; {_HOW_TO_MAKE_ONE}") from error
        except OSError as error:
            raise UsageError(f"key file {file} cannot be read: {error.strerror}") from error
        if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError(f"key file {file} can be read by others (mode {mode & 0o777:o}); run `chmod 600 {file}`")
        try:
            return cls.parse(text)
        except UsageError as error:
            raise UsageError(f"key file {file}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a new key file, readable by its owner only; an existing file is never overwritten.

        Raises
        ------
        UsageError
            If the file exists or cannot be written.
        """
        file = Path(path)
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise UsageError(f"{file} exists and is left as it is; choose another name") from error
        except OSError as error:
            raise UsageError(f"key file {file} cannot be written: {error.strerror}") from error
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(self.to_text() + "\n")


class MeshSecrets:
    """Everything derived from one mesh's name and key.

    Attributes
    ----------
    name
        The mesh's name; it never leaves the process as such.
    keyed
        Whether a key guards the mesh.
    mesh_id, tag
        32 bytes each: the mesh in link handshakes and views; the mesh in discovery.
    name_tag
        32 bytes that stand for the name alone; never to leave this host.
    topic
        Its GossipSub topic.
    meeting_key
        32 bytes under which its peers meet in the public DHT.
    """

    def __init__(self, name: str, key: MeshKey | None) -> None:
        if not name or len(name) > limits.NAME_MAX_CHARS or not name.isprintable():
            raise UsageError(f"mesh name {name!r} must be 1 to {limits.NAME_MAX_CHARS} printable characters")
        self.name = name
        self.keyed = key is not None
        self._root = key.secret if key is not None else sha256(b"sparkle open mesh\0" + name.encode()).digest()
        self.mesh_id = self._derive("mesh id")
        self.tag = self._derive("discovery tag")
        self.name_tag = MeshSecrets(name, None).tag if key is not None else self.tag
        self.topic = "/sparkle/mesh/1/" + self._derive("topic").hex()
        self._proof_key = self._derive("proof")
        self._seal = AESGCM(self._derive("gossip seal"))
        self._place_key = self._derive("places in the DHT")
        self.meeting_key = self._derive("meeting in the public DHT")

    def __repr__(self) -> str:
        return f"MeshSecrets(name={self.name!r}, keyed={self.keyed})"

    def _derive(self, purpose: str) -> bytes:
        info = f"sparkle mesh 1\0{purpose}\0{self.name}".encode()
        return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(self._root)

    def proof(self, transcript: bytes) -> bytes:
        """Return the 32-byte MAC that shows knowledge of the key over ``transcript``."""
        return hmac.digest(self._proof_key, transcript, "sha256")

    def proof_holds(self, transcript: bytes, proof: bytes) -> bool:
        """Whether ``proof`` is the MAC of ``transcript``; compared in constant time."""
        return hmac.compare_digest(self.proof(transcript), proof)

    def locate(self, label: str) -> bytes:
        """Return the 32-byte key under which what ``label`` names is kept in the mesh's DHT."""
        return hmac.digest(self._place_key, label.encode(), "sha256")

    def seal(self, payload: bytes, entropy: Entropy = SYSTEM_ENTROPY, *, context: bytes = b"gossip") -> bytes:
        """Encrypt ``payload`` for the holders of the key (AES-256-GCM, random nonce); it opens in ``context`` only."""
        nonce = entropy.token(_NONCE_BYTES)
        return nonce + self._seal.encrypt(nonce, payload, context)

    def unseal(self, sealed: bytes, *, context: bytes = b"gossip") -> bytes:
        """Undo :meth:`seal`.

        Raises
        ------
        AuthenticationError
            If it was not sealed under this mesh's key, in this context.
        """
        try:
            return self._seal.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
        except (InvalidTag, ValueError) as error:
            raise AuthenticationError("a payload is not sealed under this mesh's key") from error
