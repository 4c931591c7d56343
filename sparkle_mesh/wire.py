"""MessagePack in and out of typed structures: the one decoder for bytes that came from elsewhere.

A message is a frozen :class:`Message` subclass whose annotations (with :class:`msgspec.Meta` bounds) are
its schema. Decoding checks size first, then types and bounds while parsing, and allocates nothing a
declared length asks for before the bytes are there. Unknown fields are ignored, so that fields can be added.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar, overload

import msgspec

from sparkle_mesh import limits
from sparkle_mesh.errors import ProtocolError

M = TypeVar("M")


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything that is put on the wire or on disk as MessagePack."""


PeerIdText = Annotated[str, msgspec.Meta(min_length=1, max_length=limits.PEER_ID_MAX_CHARS)]
AddressText = Annotated[str, msgspec.Meta(min_length=1, max_length=limits.ADDRESS_MAX_CHARS)]
AddressList = Annotated[tuple[AddressText, ...], msgspec.Meta(max_length=limits.ADDRESSES_PER_PEER_MAX_COUNT)]
NameText = Annotated[str, msgspec.Meta(max_length=limits.NAME_MAX_CHARS)]
ReasonText = Annotated[str, msgspec.Meta(max_length=limits.REASON_MAX_CHARS)]
Bytes16 = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class PeerAddress(Message, array_like=True, frozen=True):
    """A peer, where it is said to listen, and what it is, if that is known."""

    peer_id: PeerIdText
    addresses: AddressList
    role: Literal["", "node", "trainer"] = ""


class Versioned(Message, frozen=True):
    """What every version of a versioned message has; the rest of one that is not known here is not looked at."""

    version: Count


def length_prefixed(*parts: bytes) -> bytes:
    """Return ``parts`` in a row, each after its length: what is signed, or proven, so that no two rows are alike."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


_encoder = msgspec.msgpack.Encoder()


@lru_cache(maxsize=256)
def _decoder(message_type: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(message_type)


def encode(message: Message) -> bytes:
    """Return ``message`` as MessagePack."""
    return _encoder.encode(message)


@overload
def decode(data: bytes | bytearray | memoryview, message_type: type[M], *, max_bytes: int = ...) -> M: ...


@overload
def decode(data: bytes | bytearray | memoryview, message_type: object, *, max_bytes: int = ...) -> Any: ...


def decode(
    data: bytes | bytearray | memoryview,
    message_type: object,
    *,
    max_bytes: int = limits.CONTROL_MESSAGE_MAX_BYTES,
) -> Any:
    """Parse ``data`` as one ``message_type`` (a :class:`Message` subclass or a union of tagged ones).

    Raises
    ------
    ProtocolError
        If ``data`` is longer than ``max_bytes``, is not MessagePack, or does not fit the type.
    """
    if len(data) > max_bytes:
        raise ProtocolError(f"message of {len(data)} bytes is over the limit of {max_bytes}")
    try:
        return _decoder(message_type).decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        name = getattr(message_type, "__name__", str(message_type))
        raise ProtocolError(f"bytes are not a valid {name}: {error}") from error
