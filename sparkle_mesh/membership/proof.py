"""Mutual proof of a mesh's key, before anything else is said: a sans-IO machine for each side.

Three messages: ``Hello(nonce)``, ``Challenge(nonce, MAC)``, ``Proof(MAC)``. Each MAC is taken under a key
derived from the mesh's name and key, over role, version, both peer ids (which the stream has authenticated)
and both nonces, so a proof is good for one exchange between one pair in one direction. It is the scheme of
ISO/IEC 9798-4 section 5.2.2 (three-pass mutual authentication by a keyed check). Neither side says which mesh
it means: who does not hold the key learns nothing but that it does not, and both sides are told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from sparkle_mesh import wire
from sparkle_mesh.errors import ProtocolError, SparkleError, VersionError, WrongKeyError
from sparkle_mesh.membership.keys import MeshSecrets
from sparkle_mesh.membership.messages import VERSION, Challenge, Greeting, Hello, Proof, Refused

_WRONG_KEY = "no mesh with this name and this key here: the key is wrong, or the name is"


@dataclass(frozen=True, slots=True)
class Say:
    """Send this message."""

    message: Greeting


@dataclass(frozen=True, slots=True)
class Proven:
    """The other side holds the key (and, for the answerer, has said all it has to)."""


@dataclass(frozen=True, slots=True)
class Fail:
    """Give up with this error, after sending whatever :class:`Say` came before it."""

    error: SparkleError


Instruction: TypeAlias = Say | Proven | Fail


def _transcript(side: bytes, version: int, opener: str, answerer: str, nonces: tuple[bytes, bytes]) -> bytes:
    parts = (side, str(version).encode(), opener.encode(), answerer.encode(), *nonces)
    return wire.length_prefixed(*parts)


class OpenerProof:
    """The side that opened the stream."""

    def __init__(self, secrets: MeshSecrets, *, me: str, peer: str, nonce: bytes) -> None:
        self._secrets, self._me, self._peer, self._nonce = secrets, me, peer, nonce

    def start(self) -> list[Instruction]:
        """Return what to send first."""
        return [Say(Hello(version_min=VERSION, version_max=VERSION, nonce=self._nonce))]

    def receive(self, message: Greeting) -> list[Instruction]:
        """Take the answer."""
        if isinstance(message, Refused):
            return [Fail(_refusal_error(message, self._peer))]
        if not isinstance(message, Challenge):
            return [Fail(ProtocolError(f"peer {self._peer} answered Hello with {type(message).__name__}"))]
        if message.version != VERSION:
            return [Fail(VersionError(f"peer {self._peer} chose version {message.version}; this one speaks {VERSION}"))]
        nonces = (self._nonce, message.nonce)
        theirs = _transcript(b"answerer", VERSION, self._me, self._peer, nonces)
        if not self._secrets.proof_holds(theirs, message.proof):
            return [
                Say(Refused(code="key", reason=_WRONG_KEY)),
                Fail(WrongKeyError(f"peer {self._peer}: {_WRONG_KEY}")),
            ]
        mine = _transcript(b"opener", VERSION, self._me, self._peer, nonces)
        return [Say(Proof(proof=self._secrets.proof(mine))), Proven()]


class AnswererProof:
    """The side that the stream was opened to."""

    def __init__(self, secrets: MeshSecrets, *, me: str, peer: str, nonce: bytes) -> None:
        self._secrets, self._me, self._peer, self._nonce = secrets, me, peer, nonce
        self._opener_nonce: bytes | None = None

    def receive(self, message: Greeting) -> list[Instruction]:
        """Take the next message of the opener."""
        if isinstance(message, Refused):
            return [Fail(_refusal_error(message, self._peer))]
        if self._opener_nonce is None:
            return self._on_hello(message)
        if not isinstance(message, Proof):
            return [Fail(ProtocolError(f"peer {self._peer} answered a challenge with {type(message).__name__}"))]
        theirs = _transcript(b"opener", VERSION, self._peer, self._me, (self._opener_nonce, self._nonce))
        if not self._secrets.proof_holds(theirs, message.proof):
            return [
                Say(Refused(code="key", reason=_WRONG_KEY)),
                Fail(WrongKeyError(f"peer {self._peer}: {_WRONG_KEY}")),
            ]
        return [Proven()]

    def _on_hello(self, message: Greeting) -> list[Instruction]:
        if not isinstance(message, Hello):
            return [Fail(ProtocolError(f"peer {self._peer} began with {type(message).__name__}, not Hello"))]
        if not message.version_min <= VERSION <= message.version_max:
            reason = f"versions {message.version_min} to {message.version_max} are not spoken here, only {VERSION}"
            return [Say(Refused(code="version", reason=reason)), Fail(VersionError(f"peer {self._peer}: {reason}"))]
        self._opener_nonce = message.nonce
        mine = _transcript(b"answerer", VERSION, self._peer, self._me, (message.nonce, self._nonce))
        return [Say(Challenge(version=VERSION, nonce=self._nonce, proof=self._secrets.proof(mine)))]


def _refusal_error(refused: Refused, peer: str) -> SparkleError:
    text = f"peer {peer} refused: {refused.reason}"
    if refused.code == "key":
        return WrongKeyError(text)
    if refused.code == "version":
        return VersionError(text)
    return ProtocolError(text)
