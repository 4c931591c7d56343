"""Feeds what links read from peers with bytes that no peer should send, by the million.

    python tests/transport/fuzz_links.py --inputs 1000000 --seed 1

Every input follows from its target, the seed and its number alone. What comes out is compared with what must: only
the errors that peers' bytes may cause, nothing delivered that was not sent, everything delivered that was. A failure
prints what reproduces it, and the exit code is 1. Memory is limited, so that bytes that ask for much of it fail.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import signal
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from types import FrameType, SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock

import fuzz_inputs
import trio
from fuzz_inputs import BROKEN, FAREWELL, LOST, UNKNOWN, Arrivals, Received

from sparkle_mesh import limits, wire
from sparkle_mesh.collectives.messages import Abort, Begin, Prepared, decode_control
from sparkle_mesh.errors import AuthenticationError, LinkClosedError, LinkRefusedError, ProtocolError
from sparkle_mesh.transport import strand, tcp
from sparkle_mesh.transport.addresses import dial_order
from sparkle_mesh.transport.ciphers import AES_256_GCM, CHACHA20_POLY1305, CIPHERS
from sparkle_mesh.transport.framed import FramedLink
from sparkle_mesh.transport.handshake import (
    LINK_KINDS,
    MAGIC,
    LinkAnswer,
    LinkKeys,
    LinkOffer,
    LinkOverStream,
    LinkParty,
    LinkRefusal,
    PendingLinks,
    StreamKeys,
    decode_last_word,
    decode_offer,
    decode_reply,
)
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.records import PREFIX_BYTES, RecordOpener, RecordSealer, parse_prefix
from sparkle_mesh.transport.striped import StripedTcpLink

#: Told the bytes of an input before they are used.
Note: TypeAlias = Callable[[bytes], None]
Target: TypeAlias = Callable[[Random, Note], Awaitable[None]]

MEMORY_LIMIT_BYTES = 512 * limits.MIB
GROWTH_LIMIT_BYTES = 64 * limits.MIB
# Inputs between two looks at the clock, and what they may take on a machine that is busy with other things.
BATCH_COUNT = 256
BATCH_LIMIT_S = 60

# --- Messages --------------------------------------------------------------------------------------

OFFER = LinkOffer(
    version=1,
    mesh_id=b"m" * 32,
    link_id=b"l" * 16,
    secret=b"s" * 32,
    ciphers=(AES_256_GCM, CHACHA20_POLY1305),
    streams=2,
    host_id=b"h" * 16,
    addresses=("/ip4/192.168.1.4/tcp/45654", "/ip6/::1/tcp/1"),
    kinds=LINK_KINDS,
)
ANSWER = LinkAnswer(
    version=1,
    secret=b"S" * 32,
    cipher=AES_256_GCM,
    streams=2,
    host_id=b"h" * 16,
    addresses=("/ip4/10.0.0.1/tcp/9",),
    kinds=LINK_KINDS,
    local_address="@sparkle-0",
)
REFUSAL = LinkRefusal(version=1, reason="the peer is closing")
HANDSHAKE = [wire.encode(message) for message in (OFFER, ANSWER, REFUSAL)]
CONTROL = [
    wire.encode(message)
    for message in (
        Begin(epoch=1, lineage=b"v", operation=3, kind="all_reduce", digest=bytes(32), description="float32[3, 4]"),
        Prepared(epoch=1, operation=3, digest=bytes(16)),
        Abort(epoch=1, operation=3, cause="lost", origin=2, lost=1, reason="rank 1 is gone"),
    )
]
PARTY = LinkParty("A", OFFER.mesh_id, OFFER.host_id, OFFER.ciphers, LINK_KINDS, "@sparkle-1")
ENTROPY = SimpleNamespace(token=lambda nbytes: bytes(nbytes), uniform=lambda low, high: low)


async def offers(rng: Random, note: Note) -> None:
    """An offer is refused or understood; what is understood can be answered."""
    data = fuzz_inputs.message_bytes(rng, HANDSHAKE)
    note(data)
    try:
        offer = decode_offer(memoryview(data))
        assert decode_offer(wire.encode(offer)) == offer
        answer, keys = PARTY.answer(offer, "B", (), ENTROPY)
    except (ProtocolError, LinkRefusedError):
        return
    assert answer.cipher in offer.ciphers
    assert set(answer.kinds) <= set(offer.kinds)
    assert keys.link_id == offer.link_id


async def replies(rng: Random, note: Note) -> None:
    """A reply is refused or understood; what is understood can be accepted, and its addresses put in order."""
    data = fuzz_inputs.message_bytes(rng, HANDSHAKE)
    note(data)
    try:
        answer = decode_reply(memoryview(data))
        assert decode_reply(wire.encode(answer)) == answer
        for ip, port in dial_order(answer.addresses, same_host=True, proven=None, mine=OFFER.addresses):
            # Anything but figures would be looked up as a name.
            socket.inet_pton(socket.AF_INET if ip.version == 4 else socket.AF_INET6, str(ip))
            assert 0 < port < 2**16
        keys = PARTY.accept(OFFER, answer, "B")
    except (ProtocolError, LinkRefusedError):
        return
    assert keys.cipher in OFFER.ciphers
    assert len(keys.streams) <= OFFER.streams


async def refusals(rng: Random, note: Note) -> None:
    """What is said after an answer is refused or understood."""
    data = fuzz_inputs.message_bytes(rng, HANDSHAKE)
    note(data)
    try:
        word = decode_last_word(memoryview(data))
    except ProtocolError:
        return
    assert isinstance(word, LinkOverStream) or len(word.reason) <= limits.REASON_MAX_CHARS
    assert decode_last_word(wire.encode(word)) == word


async def controls(rng: Random, note: Note) -> None:
    """A control message of a collective is refused or understood."""
    data = fuzz_inputs.message_bytes(rng, CONTROL)
    note(data)
    try:
        control = decode_control(memoryview(data))
    except ProtocolError:
        return
    assert decode_control(memoryview(wire.encode(control))) == control


# --- Openings and welcomes -------------------------------------------------------------------------


def some_keys(rng: Random, streams: int = 1) -> LinkKeys:
    """Return keys of a link."""
    stream_keys = tuple(StreamKeys(rng.randbytes(32), rng.randbytes(32)) for _ in range(streams))
    return LinkKeys(rng.randbytes(16), AES_256_GCM, stream_keys, rng.randbytes(32), rng.randbytes(32))


async def openings(rng: Random, note: Note) -> None:
    """A stream opens by its own opening alone, once, in time."""
    expected, unexpected = some_keys(rng, 2), some_keys(rng)
    table = PendingLinks()
    table.add(expected, "B", 0.0)
    # By how many streams the link will have: it is the first opening that tells.
    closed = {expected.opening(number, count): (number, count) for number, count in ((0, 1), (0, 2), (1, 2))}
    known = [*closed, expected.opening(2, 3), unexpected.opening(0), MAGIC + bytes(56)]
    for _ in range(4):
        opening = rng.choice(known)
        if rng.random() < 0.7:
            opening = fuzz_inputs.mutated(rng, opening, rng.choice(known))
        note(opening)
        if rng.random() < 0.1:
            table.expire(limits.LINK_HANDSHAKE_TIMEOUT_S)
            closed.clear()
        try:
            keys, number, count = table.open(bytearray(opening), 1.0)
        except ProtocolError:
            assert opening not in closed, "a right opening was refused"
        else:
            assert (keys, (number, count)) == (expected, closed.pop(opening))
            closed = {other: which for other, which in closed.items() if which[1] == count}
        assert len(table) == bool(closed)


async def welcomes(rng: Random, note: Note) -> None:
    """A welcome is right if it is the very one."""
    keys, others = some_keys(rng, 2), some_keys(rng)
    right = keys.welcome(1)
    welcome = rng.choice((right, keys.welcome(0), others.welcome(1)))
    if rng.random() < 0.8:
        welcome = fuzz_inputs.mutated(rng, welcome, right)
    note(welcome)
    try:
        keys.check_welcome(1, bytearray(welcome))
    except AuthenticationError:
        assert welcome != right
    else:
        assert welcome == right


# --- Records ---------------------------------------------------------------------------------------


def disturbed_records(rng: Random, cipher: str) -> tuple[fuzz_inputs.Plan, list[bytes], bytes, bytes]:
    """Return what was sealed, the records, the stream that a hostile network or member made of them, and the key."""
    key, another = rng.randbytes(32), rng.randbytes(32)
    plan = fuzz_inputs.message_plan(rng)
    who = rng.random()
    if who < 0.3:
        plan = fuzz_inputs.hostile_plan(rng, plan)
    records = fuzz_inputs.sealed(RecordSealer(cipher, key), plan)
    stream = b"".join(records)
    if who > 0.2:
        reflected = fuzz_inputs.sealed(RecordSealer(cipher, another), plan[:2])
        announcing = [b"\1\xff\xff\xff", b"\2\x10\0\0", b"\2\x0f\xff\xff" + bytes(100)]
        stream = fuzz_inputs.disturbed(rng, records, reflected + announcing)
    return plan, records, stream, key


def records_of(cipher: str) -> Target:
    """Return the target that opens records of ``cipher``."""

    async def records(rng: Random, note: Note) -> None:
        """Records open as long as they are the ones that were sealed, and none does after that."""
        plan, whole, stream, key = disturbed_records(rng, cipher)
        note(stream)
        opener = RecordOpener(cipher, key)
        opened: fuzz_inputs.Plan = []
        rest = memoryview(stream)
        try:
            while len(rest) >= PREFIX_BYTES:
                kind, length = parse_prefix(rest[:PREFIX_BYTES])
                record = rest[: length + opener.overhead_bytes]
                out = bytearray(min(length, max(0, len(record) - opener.overhead_bytes)))
                opener.open_into(record, memoryview(out))
                opened.append((kind, bytes(out)))
                rest = rest[len(record) :]
        except ProtocolError:
            assert len(opened) < len(whole) or rest, "the last record was refused"
        assert opened == plan[: fuzz_inputs.intact(whole, stream)]

    return records


# --- Links -----------------------------------------------------------------------------------------


# Connections of a link beside the first, at most.
STRANDS = 3


class Socket:
    """What a TCP link needs of a socket, in memory."""

    def __init__(self, arrivals: Arrivals, readable: socket.socket) -> None:
        self._arrivals = arrivals
        self._readable = readable
        self._waited = True
        self.closed = False

    def recv_into(self, view: memoryview) -> int:
        """Receive, or say that nothing is there yet; then something is."""
        assert not self.closed
        self._waited = not self._waited and self._arrivals.waits()
        if self._waited:
            raise BlockingIOError
        return self._arrivals.take(view)

    def fileno(self) -> int:
        """Return a descriptor that is always readable."""
        return self._readable.fileno()

    def setsockopt(self, *_: Any) -> None:
        """Low-water marks change nothing here."""

    def close(self) -> None:
        """Note it."""
        self.closed = True


class Stream:
    """What a framed link needs of a stream, in memory."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self.closed = False

    async def receive_some_into(self, view: memoryview) -> int:
        """Receive."""
        assert not self.closed
        return self._arrivals.take(view)

    def abort(self) -> None:
        """Note it."""
        self.closed = True


@contextmanager
def sockets_in_memory() -> Iterator[Callable[[Arrivals], Socket]]:
    """Let TCP links take a :class:`Socket` for one of the system's; yield what makes one.

    Keys change often, and stripes are short, so that small inputs have many of either.
    """
    pairs = [socket.socketpair() for _ in range(1 + STRANDS)]
    readable = itertools.cycle([pair[0] for pair in pairs])
    names = {"take_socket": lambda sock: sock}
    with (
        ExitStack() as stack,
        mock.patch.multiple(tcp, **names),
        mock.patch.multiple(strand, limit_unsent=lambda _: None, **names),
        mock.patch.multiple(limits, REKEY_INTERVAL_RECORDS=4, LINK_STRIPE_BYTES=fuzz_inputs.STRIPE_BYTES),
    ):
        for sock in itertools.chain(*pairs):
            stack.enter_context(sock)
            sock.send(b"x")
        yield lambda arrivals: Socket(arrivals, next(readable))


def tcp_link(sock: Any, cipher: str, key: bytes) -> tcp.TcpLink:
    """Return a link that receives from ``sock``."""
    return tcp.TcpLink(sock, "mallory", RecordSealer(cipher, bytes(32)), RecordOpener(cipher, key))


def striped_link(socks: list[Any], cipher: str, keys: list[bytes]) -> StripedTcpLink:
    """Return a link that receives from all of ``socks``."""
    streams = []
    for number, (sock, key) in enumerate(zip(socks, keys, strict=True)):
        placed = number > 0
        sealer = RecordSealer(cipher, bytes(32), placed=placed)
        streams.append((sock, sealer, RecordOpener(cipher, key, placed=placed)))
    return StripedTcpLink(streams, "mallory")


async def everything(rng: Random, link: Link) -> tuple[list[Received], ProtocolError | LinkClosedError]:
    """Receive all that comes over ``link``, in one way or another; return it, and how it ended."""
    messages: list[Received] = []
    try:
        while True:
            header, left = await link.receive_header()
            messages.append(Received(bytes(header), left))
            if rng.random() < 0.15:
                await link.discard_payload()
                messages[-1].payload = None
                continue
            largest = rng.choice((2**17, 2**17, 300, rng.randint(1, 100))) if left < 5000 else 2**16
            while left:
                nbytes = min(left, largest)
                half = rng.randint(0, nbytes)
                parts = (bytearray(half), bytearray(nbytes - half))
                await link.receive_into(parts)
                left -= nbytes
                messages[-1].payload += parts[0] + parts[1]
    except (ProtocolError, LinkClosedError) as error:
        return messages, error


def check_delivery(got: list[Received], error: Exception, must: list[Received], ending: str) -> None:
    """Compare what a link delivered, and how it ended, with what must have come of it."""
    assert [(each.header, each.announced) for each in got] == [(each.header, each.announced) for each in must]
    for number, (mine, right) in enumerate(zip(got, must, strict=True)):
        assert right.payload is not None
        whole = len(right.payload) == right.announced
        assert whole or number == len(must) - 1
        if mine.payload is None:
            assert whole, "what did not all come was discarded"
        elif whole:
            assert mine.payload == right.payload
        else:
            assert right.payload.startswith(mine.payload), "something was delivered that was not sent"
    farewell = "closed the link" in str(error)
    assert farewell == (ending == FAREWELL), f"{error} at an end that was {ending}"
    assert "mallory" in str(error)
    if ending == BROKEN:
        assert isinstance(error, ProtocolError), error
    elif ending != UNKNOWN:
        assert isinstance(error, LinkClosedError), error


def tcp_links(make_socket: Callable[[Arrivals], Socket], cipher: str) -> Target:
    """Return the target that receives over TCP links."""

    async def receive(rng: Random, note: Note) -> None:
        """A link delivers what came before the first byte that is wrong, and ends there."""
        plan, records, stream, key = disturbed_records(rng, cipher)
        note(stream)
        sock = make_socket(fuzz_inputs.arrivals(rng, stream))
        link = tcp_link(sock, cipher, key)
        got, error = await everything(rng, link)
        count = fuzz_inputs.intact(records, stream)
        must, ending = fuzz_inputs.must_come_of_records(plan[:count])
        if ending == LOST and len(stream) > sum(map(len, records[:count])):
            ending = UNKNOWN
        check_delivery(got, error, must, ending)
        assert link.closed
        assert sock.closed
        assert len(link._rx) <= limits.RECORD_MAX_BYTES + limits.RECORD_TAG_MAX_BYTES + 2 * limits.LINK_READ_AHEAD_BYTES

    return receive


def striped_links(make_socket: Callable[[Arrivals], Socket], cipher: str) -> Target:
    """Return the target that receives over links of several connections."""

    async def receive(rng: Random, note: Note) -> None:
        """Payloads are as they were sent or do not arrive, whatever happens to any of the connections."""
        messages = fuzz_inputs.small_messages(rng)
        plans = fuzz_inputs.striped_plans(rng, messages, strands=rng.randint(1, STRANDS))
        honest = rng.random() < 0.7
        if not honest:
            fuzz_inputs.spoil_places(rng, plans)
        keys = [rng.randbytes(32) for _ in plans]
        streams = []
        for number, (plan, key) in enumerate(zip(plans, keys, strict=True)):
            records = fuzz_inputs.sealed(RecordSealer(cipher, key, placed=number > 0), plan)
            streams.append((records, b"".join(records)))
        spoiled = rng.randrange(len(streams)) if rng.random() < 0.7 else None
        if spoiled is not None:
            records, whole = streams[spoiled]
            others = streams[spoiled - 1][0]
            streams[spoiled] = records, fuzz_inputs.disturbed(rng, records, others)
            if streams[spoiled][1] == whole:
                spoiled = None
        note(b"".join(stream for _, stream in streams))
        socks = [make_socket(fuzz_inputs.arrivals(rng, stream)) for _, stream in streams]
        link = striped_link(socks, cipher, keys)
        got, error = await everything(rng, link)
        assert link.closed
        assert all(sock.closed for sock in socks)
        assert "mallory" in str(error)
        if not honest:
            return
        assert [(each.header, each.announced) for each in got] == [
            (each.header, each.announced) for each in messages[: len(got)]
        ]
        for mine, right in zip(got, messages, strict=False):
            assert right.payload is not None
            assert mine.payload is None or right.payload.startswith(mine.payload), "what was not sent was delivered"
        if spoiled is None:
            check_delivery(got, error, messages, FAREWELL)

    return receive


async def framed_links(rng: Random, note: Note) -> None:
    """A link without encryption of its own delivers what the bytes say, and ends where they say nothing."""
    plan = fuzz_inputs.message_plan(rng)
    data = b"".join(plaintext for _, plaintext in plan) + tcp.HEAD.pack(2**16 - 1, 0) * rng.randrange(2)
    for _ in range(rng.choice((0, 1, 1, 2))):
        data = fuzz_inputs.mutated(rng, data, data)
    if rng.random() < 0.2:
        at = rng.randint(0, len(data))
        sizes, totals = (0, 400, limits.LINK_HEADER_MAX_BYTES + 1), (0, 1, limits.LINK_PAYLOAD_MAX_BYTES, 2**64 - 1)
        data = data[:at] + tcp.HEAD.pack(rng.choice(sizes), rng.choice(totals)) + data[at:]
    note(data)
    stream: Any = Stream(fuzz_inputs.arrivals(rng, data))
    link = FramedLink(stream, "mallory", kind="test")
    got, error = await everything(rng, link)
    check_delivery(got, error, *fuzz_inputs.must_come_of_frames(data))
    assert link.closed
    assert stream.closed


# --- Running ---------------------------------------------------------------------------------------


@contextmanager
def all_targets() -> Iterator[dict[str, Target]]:
    """Yield the targets by name, ready to be fed."""
    with sockets_in_memory() as make_socket:
        yield {
            **{each.__name__: each for each in (offers, replies, refusals, controls, openings, welcomes)},
            **{f"records-{cipher}": records_of(cipher) for cipher in CIPHERS},
            **{f"tcp-{cipher}": tcp_links(make_socket, cipher) for cipher in CIPHERS},
            **{f"striped-{cipher}": striped_links(make_socket, cipher) for cipher in CIPHERS},
            "framed": framed_links,
        }


def input_generator(name: str, seed: int, number: int) -> Random:
    """Return the generator that an input is made of."""
    return Random((zlib.crc32(name.encode()) << 64 | seed) << 64 | number)


#: Target, seed and number of the input that is being fed.
UNDER_WAY: list[Any] = []


class Failure(Exception):
    """An input that a target did not take well; the text reproduces it."""


async def feed(target: Target, name: str, seed: int, numbers: range) -> None:
    """Feed the inputs of these numbers to a target.

    Raises
    ------
    Failure
    """
    last = b""

    def note(data: bytes) -> None:
        nonlocal last
        last = data

    for number in numbers:
        UNDER_WAY[:] = [name, seed, number]
        try:
            await target(input_generator(name, seed, number), note)
        # Whatever it is, it should not have happened.
        except Exception as error:
            raise Failure(
                f"{type(error).__name__}: {error}\n"
                f"target {name}, seed {seed}, input {number} of {len(last)} bytes: {last[:4096].hex()}\n"
                f"again: python tests/transport/fuzz_links.py --target {name} --seed {seed} --first {number} --inputs 1"
            ) from error


def limit_memory() -> None:
    """Let this process take little more memory than it has."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        taken = int(statistics.read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_LIMIT_BYTES, most))


def peak_bytes() -> int:
    """Return the most memory that this process has ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


async def run(names: list[str], inputs: int, first: int, seed: int) -> None:
    """Feed every target its share of the inputs, and print how many it took."""
    share = -(-inputs // len(names))
    with all_targets() as targets:
        for name in names:
            started, before = time.monotonic(), 0
            for start in range(first, first + share, BATCH_COUNT):
                signal.alarm(BATCH_LIMIT_S)
                numbers = range(start, min(start + BATCH_COUNT, first + share))
                await feed(targets[name], name, seed, numbers)
                done = numbers.stop - first
                before = before or peak_bytes()
                if peak_bytes() - before > GROWTH_LIMIT_BYTES:
                    raise Failure(f"target {name}, seed {seed}: memory has grown by input {numbers.stop}")
                if sys.stderr.isatty():
                    print(f"\r{name}: {done} of {share}", end="", file=sys.stderr, flush=True)
            signal.alarm(0)
            spent = time.monotonic() - started
            print(f"{name}: {share} inputs in {spent:.1f} s, {share / spent:.0f} per second", flush=True)
    print(f"{share * len(names)} inputs; at most {peak_bytes() / limits.MIB:.0f} MiB of memory")


def too_slow(_signal: int, _frame: FrameType | None) -> None:
    """End a run in which something does not end."""
    name, seed, number = UNDER_WAY
    raise Failure(f"target {name}, seed {seed}: input {number} or those before it take longer than {BATCH_LIMIT_S} s")


def main() -> int:
    """Run the program."""
    with all_targets() as targets:
        names = list(targets)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="in total; every target gets its share of them")
    parser.add_argument("--seed", type=int, default=0, help="other inputs for another seed")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input of every target")
    parser.add_argument("--target", action="append", choices=names, help="this one alone; may be given several times")
    chosen = parser.parse_args()
    signal.signal(signal.SIGALRM, too_slow)
    limit_memory()
    try:
        trio.run(run, chosen.target or names, chosen.inputs, chosen.first, chosen.seed)
    except Failure as failure:
        traceback.print_exception(failure)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
