"""What ranks say to each other over their links.

Every message names the epoch and the operation. Control messages are MessagePack and come as a link message's
header with no payload; data has a fixed 20-byte header, because there is one per segment. The first byte tells them
apart: a control message is a MessagePack map, whose first byte is never 1.

One operation, seen from one rank: it sends :class:`Begin` to all that take part; data follows as its schedule says;
once it holds the whole result it sends :class:`Prepared` with its digest to all; once all have prepared with the same
digest the result stands. :class:`Abort` at any time before that ends the operation on every rank.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, Any, Final, NamedTuple, TypeAlias, cast
from zlib import crc32

import msgspec

from sparkle_mesh import limits, wire

_Rank = Annotated[int, msgspec.Meta(ge=0, lt=limits.MESH_MEMBERS_MAX_COUNT)]
_Operation = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
_Epoch = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
_Word = Annotated[str, msgspec.Meta(max_length=32)]
_Lineage = Annotated[bytes, msgspec.Meta(max_length=32)]
_Tag = Annotated[str, msgspec.Meta(max_length=limits.NAME_MAX_CHARS)]
_Description = Annotated[str, msgspec.Meta(max_length=limits.COLLECTIVE_DESCRIPTION_MAX_CHARS)]


class Begin(wire.Message, frozen=True, kw_only=True, tag="begin"):
    """A rank has called a collective.

    Attributes
    ----------
    epoch, lineage
        The view it runs over.
    operation
        Its number: counted from 1 by every rank's calls of the same :class:`Stream`, and the stream's own number above
        that.
    tag
        Keeps concurrent streams of operations apart; may be empty.
    incarnation
        The sender's, where the link alone does not tell; may be empty.
    kind
        ``all_reduce``, ``broadcast``, ``barrier`` and so on.
    digest
        Of everything all ranks must have in common: equal digests, equal calls.
    description
        The same for people: ``all_reduce(float32[3, 4], op='sum')``. May be shortened.
    """

    epoch: _Epoch
    lineage: _Lineage
    operation: _Operation
    tag: _Tag = ""
    incarnation: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    kind: _Word
    digest: wire.Bytes32
    description: _Description


class Prepared(wire.Message, frozen=True, kw_only=True, tag="prepared"):
    """A rank holds the whole result, with this digest, and awaits that the others do."""

    epoch: _Epoch
    operation: _Operation
    digest: wire.Bytes16


class Abort(wire.Message, frozen=True, kw_only=True, tag="abort"):
    """An operation has failed; passed on by every rank that learns of it.

    Attributes
    ----------
    cause
        ``cancelled``, ``timeout``, ``lost`` (see ``lost``) or another word for what ended it.
    origin
        The rank that ended it.
    lost
        The rank whose loss ended it.
    reason
        For people.
    """

    epoch: _Epoch
    operation: _Operation
    cause: _Word
    origin: _Rank
    lost: _Rank | None = None
    reason: wire.ReasonText = ""


Control: TypeAlias = Begin | Prepared | Abort

# kind, lane (which vector of the operation), round, segment, epoch, operation. The lane's higher bits are those of the
# segment's field.
_DATA = struct.Struct("<BBHIIQ")
_SEGMENT_BITS = 24
DATA_KIND = 1
DATA_HEADER_BYTES = _DATA.size


_SEQUENCE_BITS = 32
#: Of an operation's number: which of its tag it is.
SEQUENCE_MASK: Final[int] = 2**_SEQUENCE_BITS - 1


class Stream(NamedTuple):
    """Calls that are matched with each other by their order alone.

    Attributes
    ----------
    tag
        What their callers gave; empty if nothing.
    route
        From which rank to which, where they are between two; None if among all.
    """

    tag: str = ""
    route: tuple[int, int] | None = None

    @property
    def number(self) -> int:
        """0 without tag and route, else of their checksum; where there is a route, above all that have none."""
        count = limits.COLLECTIVE_STREAM_NUMBERS_COUNT
        if self.route is None:
            return crc32(self.tag.encode()) % count or 1 if self.tag else 0
        return crc32(f"{self.route[0]}>{self.route[1]} {self.tag}".encode()) % count + count

    def ranks(self, size: int) -> Sequence[int]:
        """Return who of ``size`` ranks takes part."""
        return range(size) if self.route is None else sorted(self.route)

    def operation(self, sequence: int) -> int:
        """Return the number of its ``sequence``-th operation."""
        return self.number << _SEQUENCE_BITS | sequence

    def __str__(self) -> str:
        route = "" if self.route is None else f"from rank {self.route[0]} to rank {self.route[1]}"
        return " ".join(part for part in (f"with tag {self.tag!r}" if self.tag else "", route) if part)


def encode_data(lane: int, turn: int, segment: int, epoch: int, operation: int) -> bytes:
    """Return the header of one segment's message."""
    return _DATA.pack(DATA_KIND, lane & 0xFF, turn, (lane >> 8) << _SEGMENT_BITS | segment, epoch, operation)


def is_data(header: memoryview) -> bool:
    """Whether ``header`` is that of a data message."""
    return len(header) == DATA_HEADER_BYTES and header[0] == DATA_KIND


def data_operation(header: memoryview) -> tuple[int, int]:
    """Return ``(epoch, operation)`` of a data header."""
    fields = _DATA.unpack(header)
    return fields[4], fields[5]


def decode_control(header: memoryview) -> Control:
    """Decode a control message. Raises ProtocolError."""
    message: Control = wire.decode(header, cast(Any, Control), max_bytes=limits.LINK_HEADER_MAX_BYTES)
    return message


def call_digest(parts: tuple[object, ...]) -> bytes:
    """Return the digest that equal calls share, over anything made of text, numbers and tuples."""
    return sha256(msgspec.msgpack.encode(parts)).digest()
