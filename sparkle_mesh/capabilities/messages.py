"""Questions and answers of the mesh's own DHT, protocol ``/sparkle/kad/1.0.0``.

One question at a time on a stream, each answered before the next. Both are sealed under the mesh's key for exactly
this pair of peers, whose ids the stream has authenticated: so whoever answers is of the mesh, and nobody else learns
what was asked. In a mesh without a key the name takes its place.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.capabilities.records import SignedRecord
from sparkle_mesh.fabric.interface import PeerId

PROTOCOL = "/sparkle/kad/1.0.0"

KeyList = Annotated[tuple[wire.Bytes32, ...], msgspec.Meta(max_length=limits.CAPABILITY_KEYS_MAX_COUNT)]


class Sealed(wire.Message, frozen=True, kw_only=True):
    """What is put on the stream: a sealed question or answer."""

    sealed: Annotated[bytes, msgspec.Meta(max_length=limits.KAD_MESSAGE_MAX_BYTES + 32)]


def seal_context(sender: PeerId, receiver: PeerId) -> bytes:
    """Return the context of what ``sender`` seals for ``receiver``."""
    return f"kad\0{sender}\0{receiver}".encode()


# --- Questions ---------------------------------------------------------------------------------------


class Find(wire.Message, frozen=True, kw_only=True, tag="find"):
    """Who is closest to ``key``, and which records are there under it (if ``records``)?

    ``addresses`` is where the asker listens: whoever asks is worth knowing.
    """

    key: wire.Bytes32
    records: bool = False
    addresses: wire.AddressList = ()


class Store(wire.Message, frozen=True, kw_only=True, tag="store"):
    """Hold my record under these keys."""

    record: SignedRecord
    keys: KeyList


class Renew(wire.Message, frozen=True, kw_only=True, tag="renew"):
    """Keep my record of this number, under these keys alone; which of them is it not held under?"""

    sequence: wire.Count
    keys: KeyList


class Withdraw(wire.Message, frozen=True, kw_only=True, tag="withdraw"):
    """Forget my record: I am leaving."""


class Dropped(wire.Message, frozen=True, kw_only=True, tag="dropped"):
    """Your record, which I held, has made way for others."""


Question: TypeAlias = Find | Store | Renew | Withdraw | Dropped

# --- Answers -----------------------------------------------------------------------------------------


class HeldRecord(wire.Message, frozen=True, kw_only=True):
    """A record, and how long ago its holder heard of its publisher."""

    record: SignedRecord
    age_s: Annotated[float, msgspec.Meta(ge=0)]


class Found(wire.Message, frozen=True, kw_only=True, tag="found"):
    """Answers :class:`Find`; ``overflowed`` if there may be more records under keys below this one."""

    peers: Annotated[tuple[wire.PeerAddress, ...], msgspec.Meta(max_length=limits.LOOKUP_NAMED_MAX_COUNT)]
    records: Annotated[tuple[HeldRecord, ...], msgspec.Meta(max_length=limits.KAD_ANSWER_RECORDS_MAX_COUNT)] = ()
    overflowed: bool = False


class Done(wire.Message, frozen=True, kw_only=True, tag="done"):
    """Answers the others; ``missing`` are keys that a renewed record is not held under, or has no room at."""

    missing: KeyList = ()


class Refused(wire.Message, frozen=True, kw_only=True, tag="refused"):
    """The question was understood and not done; ``held_sequence`` is that of a newer record, if that is why."""

    reason: wire.ReasonText
    held_sequence: wire.Count | None = None


Answer: TypeAlias = Found | Done | Refused
