"""Bytes that peers should not send, and what must come of them: the raw material of ``fuzz_links.py``.

All of it follows from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec

from sparkle_mesh import limits
from sparkle_mesh.transport.records import PLACE, RecordSealer
from sparkle_mesh.transport.strand import STRAND_GOODBYE, STRIPE
from sparkle_mesh.transport.tcp import GOODBYE, HEAD, MESSAGE, PAYLOAD

# MessagePack that announces far more than comes, nests deeply, or is next to a bound.
LOADED = [
    *(bytes([kind]) + b"\xff" * size for kind, size in ((0xDD, 4), (0xDF, 4), (0xDB, 4), (0xC6, 4), (0xC9, 5))),
    *(bytes([kind, 0x7F, 0xFF]) for kind in (0xDC, 0xDE, 0xDA, 0xC5)),
    b"\x91" * 2000,
    b"\x81\xa0" * 1000,
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xcb\x7f\xf8" + bytes(6),
    b"\xa1\xff",
    b"\xa3\xed\xa0\x80",
    b"\xc1",
    b"\xc0",
]
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(0.5, float("nan"), float("inf"), "", "x", "tcp", "\0", "\U0010ffff", "x" * 300, "x" * 5000),
    *(b"", bytes(15), bytes(16), bytes(17), bytes(31), bytes(32), bytes(33), bytes(5000)),
    *(["/ip6/::1%eth0/tcp/1"], ["/ip6/::1%\0/tcp/1", "/ip4/1.2.3.4/tcp/0"], ["/ip6/::ffff:1.2.3.4/tcp/1/p2p/"]),
    *([], ["tcp"], [""], ["x"] * 100, [[]], {}, {"type": "offer"}, ["tcp"] * 8, [b"tcp"], ["x" * 33]),
]


def mutated(rng: Random, data: bytes, spare: bytes) -> bytes:
    """Return ``data`` after one change or a few; ``spare`` is what other bytes are taken from."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        start = rng.randint(0, len(data))
        end = min(len(data), start + rng.choice((1, 1, 2, 4, 8, 40)))
        cut = data[start:end]
        change = rng.randrange(9)
        if change == 0 and cut:
            new = bytes([cut[0] ^ 1 << rng.randrange(8)]) + cut[1:]
        elif change == 1:
            new = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))]) * len(cut)
        elif change == 2:
            data, new, end = data[:start], b"", start  # truncated
        elif change == 3:
            new = rng.randbytes(rng.choice((1, 2, 4, 16, 64))) + cut
        elif change == 4:
            new = b""
        elif change == 5:
            new = cut + cut
        elif change == 6:
            at = rng.randint(0, len(spare))
            new = spare[at : at + rng.choice((4, 16, 64, len(spare)))]
        elif change == 7:
            new = rng.choice(LOADED)
        else:
            data, new, end = data[end:] + cut + data[:start], b"", 0  # turned around
            start = 0
        data = data[:start] + new + data[end:]
    return data


def message_bytes(rng: Random, examples: Sequence[bytes]) -> bytes:
    """Return bytes that are a message like ``examples``, nearly one, or nothing of the kind."""
    example = rng.choice(examples)
    kind = rng.random()
    if kind < 0.1:
        return rng.randbytes(rng.choice((0, 1, 10, 100, 1000)))
    if kind < 0.15:
        return example
    if kind < 0.6:
        return mutated(rng, example, rng.choice(examples))
    fields = msgspec.msgpack.decode(example)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice([*fields, "unheard-of"])
        if rng.random() < 0.1:
            fields.pop(name, None)
        else:
            fields[name] = rng.choice(VALUES)
    return msgspec.msgpack.encode(fields)


# --- Streams of records ----------------------------------------------------------------------------

#: Kinds and plaintexts of records; with their places, where prefixes are extended.
Plan = list[tuple[int, bytes] | tuple[int, bytes, bytes]]


def message_plan(rng: Random) -> Plan:
    """Return kinds and plaintexts of the records of a few messages, as a well-behaved peer would send them."""
    plan: Plan = []
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        header = rng.randbytes(rng.choice((0, 1, 20, 20, 64)))
        if rng.random() < 0.005:
            header = rng.randbytes(limits.LINK_HEADER_MAX_BYTES)
        nbytes = rng.choice((0, 0, 1, 16, 100, 400))
        if rng.random() < 0.02:
            nbytes = rng.choice((limits.LINK_INLINE_PAYLOAD_MAX_BYTES, 70_000, 200_000))
        payload = rng.randbytes(nbytes)
        head = HEAD.pack(len(header), nbytes) + header
        if nbytes <= limits.LINK_INLINE_PAYLOAD_MAX_BYTES and rng.random() < 0.5:
            plan.append((MESSAGE, head + payload))
            continue
        plan.append((MESSAGE, head))
        while payload:
            count = rng.randint(1, len(payload))
            plan.append((PAYLOAD, payload[:count]))
            payload = payload[count:]
    if rng.random() < 0.8:
        plan.append((GOODBYE, b""))
    return plan


def hostile_plan(rng: Random, plan: Plan) -> Plan:
    """Return ``plan`` as a member that breaks the protocol might seal it."""
    plan = list(plan)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(plan))
        kind, plaintext = plan[at]
        change = rng.randrange(6)
        if change == 0:
            plan[at] = (rng.choice((0, MESSAGE, PAYLOAD, GOODBYE, 4, 255)), plaintext)
        elif change == 1:
            sizes = (0, 1, 5, 400, limits.LINK_HEADER_MAX_BYTES + 1, 2**16 - 1)
            totals = (0, 1, 400, limits.LINK_PAYLOAD_MAX_BYTES, limits.LINK_PAYLOAD_MAX_BYTES + 1, 2**64 - 1)
            plan[at] = (kind, HEAD.pack(rng.choice(sizes), rng.choice(totals)) + plaintext[HEAD.size :])
        elif change == 2:
            plan[at] = (kind, mutated(rng, plaintext, b""))
        elif change == 3:
            plan[at] = (kind, b"")
        elif change == 4:
            plan.insert(at, rng.choice(plan))
        else:
            other = rng.randrange(len(plan))
            plan[at], plan[other] = plan[other], plan[at]
    return plan


def sealed(sealer: RecordSealer, plan: Plan) -> list[bytes]:
    """Return the records of ``plan``."""
    records = []
    for kind, plaintext, *place in plan:
        out = bytearray(len(plaintext) + sealer.overhead_bytes)
        sealer.seal_into(kind, plaintext, memoryview(out), *place)
        records.append(bytes(out))
    return records


def disturbed(rng: Random, records: list[bytes], strange: list[bytes]) -> bytes:
    """Return ``records`` as a hostile network might deliver them; ``strange`` are of other keys and directions."""
    records = list(records)
    change = rng.randrange(8)
    at, other = rng.randrange(len(records)), rng.randrange(len(records))
    if change == 0:
        records[at], records[other] = records[other], records[at]
    elif change == 1:
        records.insert(at, records[other])
    elif change == 2:
        del records[at]
    elif change == 3:
        records.insert(at, rng.choice(strange))
    elif change == 4:
        records[at] = rng.choice(strange)
    stream = b"".join(records)
    if change == 5:
        return stream[: rng.randint(0, len(stream))]
    return mutated(rng, stream, strange[0]) if change > 5 or rng.random() < 0.2 else stream


# --- Links of several connections ------------------------------------------------------------------

STRIPE_BYTES = 64


def small_messages(rng: Random) -> list[Received]:
    """Return a few messages."""
    sizes = (0, 1, STRIPE_BYTES, STRIPE_BYTES + 1, 300, rng.randint(0, 1000))
    payloads = [bytearray(rng.randbytes(rng.choice(sizes))) for _ in range(rng.randint(1, 3))]
    return [Received(rng.randbytes(rng.choice((0, 20))), len(payload), payload) for payload in payloads]


def striped_plans(rng: Random, messages: list[Received], strands: int) -> list[Plan]:
    """Return what a well-behaved peer would send over the first connection and over each of the others."""
    first: Plan = []
    others: list[Plan] = [[] for _ in range(strands)]
    number = 0
    for message in messages:
        assert message.payload is not None
        head = HEAD.pack(len(message.header), message.announced) + message.header
        if rng.random() < 0.2:
            first.append((MESSAGE, head + message.payload))
            continue
        first.append((MESSAGE, head))
        for offset in range(0, message.announced, STRIPE_BYTES):
            stripe = bytes(message.payload[offset : offset + STRIPE_BYTES])
            rng.choice(others).append((STRIPE, stripe, PLACE.pack(number, offset)))
        number += bool(message.announced)
    for plan in others:
        plan.append((STRAND_GOODBYE, b"", PLACE.pack(number, 0)))
    return [[*first, (GOODBYE, b"")], *others]


def spoil_places(rng: Random, plans: list[Plan]) -> None:
    """Change a record of one of the strands as a member that breaks the protocol might seal it."""
    plan = rng.choice(plans[1:])
    at = rng.randrange(len(plan))
    kind, plaintext, place = plan[at]
    number, offset = PLACE.unpack(place)
    change = rng.randrange(5)
    if change == 0:
        number = rng.choice((0, number + 1, 2**64 - 1))
    elif change == 1:
        offset = rng.choice((0, 1, offset + STRIPE_BYTES, 2**40, 2**64 - STRIPE_BYTES))
    elif change == 2:
        plaintext = plaintext[: rng.randint(0, len(plaintext))]
    elif change == 3:
        kind = rng.choice((0, MESSAGE, PAYLOAD, STRIPE, STRAND_GOODBYE, 255))
    else:
        plan.insert(at, rng.choice(plan))
        return
    plan[at] = (kind, plaintext, PLACE.pack(number, offset))


# --- What must come of it --------------------------------------------------------------------------

#: How a link must end: as closed by the peer, as lost, with an error of protocol, or with either of the last two.
FAREWELL, LOST, BROKEN, UNKNOWN = "farewell", "lost", "broken", "lost or broken"


@dataclass
class Received:
    """One message as far as it came: ``payload`` is None if it was discarded whole."""

    header: bytes
    announced: int
    payload: bytearray | None = field(default_factory=bytearray)


def intact(records: list[bytes], stream: bytes) -> int:
    """Return how many of ``records`` begin ``stream``."""
    at = 0
    for count, record in enumerate(records):
        if not stream.startswith(record, at):
            return count
        at += len(record)
    return len(records)


def must_come_of_records(plan: Plan) -> tuple[list[Received], str]:
    """Return what a link must deliver of these records, and how it must end if nothing follows them."""
    messages: list[Received] = []
    left = 0
    for kind, plaintext in plan:
        if left:
            if kind != PAYLOAD or not 1 <= len(plaintext) <= min(left, limits.RECORD_MAX_BYTES):
                return messages, BROKEN
            assert messages[-1].payload is not None
            messages[-1].payload += plaintext
            left -= len(plaintext)
            continue
        if kind == GOODBYE and not plaintext:
            return messages, FAREWELL
        if kind != MESSAGE or len(plaintext) < HEAD.size:
            return messages, BROKEN
        header_bytes, left = HEAD.unpack_from(plaintext)
        inline = plaintext[HEAD.size + header_bytes :]
        if (
            header_bytes > min(len(plaintext) - HEAD.size, limits.LINK_HEADER_MAX_BYTES)
            or left > limits.LINK_PAYLOAD_MAX_BYTES
            or (inline and len(inline) != left)
            or len(inline) > limits.LINK_INLINE_PAYLOAD_MAX_BYTES + limits.LINK_HEADER_MAX_BYTES - header_bytes
        ):
            return messages, BROKEN
        messages.append(Received(plaintext[HEAD.size : HEAD.size + header_bytes], left, bytearray(inline)))
        left -= len(inline)
    return messages, LOST


def must_come_of_frames(stream: bytes) -> tuple[list[Received], str]:
    """Return what a framed link must deliver of ``stream``, and how it must end."""
    messages: list[Received] = []
    while len(stream) >= HEAD.size:
        header_bytes, announced = HEAD.unpack_from(stream)
        if (header_bytes, announced) == (2**16 - 1, 0):
            return messages, FAREWELL
        if header_bytes > limits.LINK_HEADER_MAX_BYTES or announced > limits.LINK_PAYLOAD_MAX_BYTES:
            return messages, BROKEN
        payload_at = HEAD.size + header_bytes
        if len(stream) < payload_at:
            break
        payload = bytearray(stream[payload_at : payload_at + announced])
        messages.append(Received(stream[HEAD.size : payload_at], announced, payload))
        stream = stream[payload_at + announced :]
    return messages, LOST


class Arrivals:
    """A stream that comes in pieces of ``size()`` bytes; ``waits()`` says whether the next one is not there yet."""

    def __init__(self, stream: bytes, size: Callable[[], int], waits: Callable[[], bool]) -> None:
        self._stream = memoryview(stream)
        self._at = 0
        self._size = size
        self.waits = waits

    def take(self, view: memoryview) -> int:
        """Put what comes next into ``view``; return how much, 0 at the end."""
        piece = self._stream[self._at : self._at + min(len(view), self._size())]
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def arrivals(rng: Random, stream: bytes) -> Arrivals:
    """Let ``stream`` come whole, byte by byte, or in pieces of any size, at once or with pauses."""
    whole = len(stream) + 1
    largest = rng.choice((whole, whole, whole, 1, rng.randint(1, whole))) if len(stream) < 5000 else whole
    patience = rng.choice((0.0, 0.0, 0.0, 0.0, 0.3))
    waits = (lambda: rng.random() < patience) if patience else _never
    return Arrivals(stream, lambda: largest, waits)


def _never() -> bool:
    return False
