"""The checks of the conformance suite in :mod:`.testing`, each over two connected links."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import trio
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, UsageError
from sparkle_mesh.transport.link import Link

Check: TypeAlias = Callable[[Link, Link], Any]

_KIB: Final = limits.KIB
_MIB: Final = limits.MIB
# How long all tasks must have been waiting before a sender counts as stopped by back-pressure.
_CLOGGED_AFTER_S: Final = 0.02
# More than any link may take from a sender whose peer does not read.
_CLOGGED_MAX_BYTES: Final = 64 * _MIB
_SIZES: Final = (0, 1, 17, 1000, 16 * _KIB, 64 * _KIB + 3, _MIB - 1, _MIB, _MIB + 1, 3 * _MIB + 5)


# --- Helpers -------------------------------------------------------------------------------------


def _pattern(nbytes: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng([nbytes, seed]).integers(0, 256, nbytes, np.uint8)


async def _receive(link: Link) -> tuple[bytes, bytes]:
    view, nbytes = await link.receive_header()
    header = bytes(view)
    payload = bytearray(nbytes)
    await link.receive_into((payload,))
    return header, bytes(payload)


async def _assert_closed(link: Link, call: Callable[[], Any], *, attempts: int = 1) -> None:
    """``call`` raises LinkClosedError, at the latest the ``attempts``-th time."""
    for _ in range(attempts):
        try:
            await call()
        except LinkClosedError:
            assert link.closed, "LinkClosedError was raised by a link that says it is open"
            return
        await trio.lowlevel.checkpoint()
    raise AssertionError(f"no LinkClosedError in {attempts} calls")


async def _assert_misuse(call: Callable[[], Any]) -> None:
    try:
        await call()
    except UsageError:
        return
    raise AssertionError("a UsageError was expected")


async def _send_until_clogged(nursery: trio.Nursery, link: Link, payload: bytes) -> trio.CancelScope:
    """Send ``payload`` again and again in a task until the link takes no more; return the sender's scope."""
    scope = trio.CancelScope()
    sent_bytes = 0

    async def send() -> None:
        nonlocal sent_bytes
        with scope:
            while True:
                await link.send(b"clog", (payload,))
                sent_bytes += len(payload)
                assert sent_bytes <= _CLOGGED_MAX_BYTES, f"{sent_bytes} bytes went to a peer that reads nothing"

    nursery.start_soon(send)
    await wait_all_tasks_blocked(_CLOGGED_AFTER_S)
    return scope


def _split(view: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    """Cut ``view`` into pieces of ``sizes``, in turn, until it is used up."""
    pieces = []
    turn = 0
    while view:
        size = sizes[turn % len(sizes)]
        pieces.append(view[:size])
        view = view[size:]
        turn += 1
    return pieces


# --- Messages ------------------------------------------------------------------------------------


async def messages_arrive_in_order_both_ways(one: Link, other: Link) -> None:
    """Many messages of mixed sizes, in both directions at once."""
    sizes = [0, 5, 700, 20_000, 3, 0, 150_000, 1] * 20

    async def send(link: Link, seed: int) -> None:
        for index, size in enumerate(sizes):
            await link.send(index.to_bytes(4, "big"), (_pattern(size, seed),))

    async def receive(link: Link, seed: int) -> None:
        for index, size in enumerate(sizes):
            header, payload = await _receive(link)
            assert header == index.to_bytes(4, "big"), f"message {index} came with header {header!r}"
            assert payload == _pattern(size, seed).tobytes(), f"payload {index} of {size} bytes is not what was sent"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, one, 1)
        nursery.start_soon(send, other, 2)
        nursery.start_soon(receive, one, 2)
        nursery.start_soon(receive, other, 1)


async def payloads_of_any_size(one: Link, other: Link) -> None:
    """Empty to several records long, with headers from empty to the largest."""
    headers = [b"", b"h", b"x" * 64, b"y" * limits.LINK_HEADER_MAX_BYTES]

    async def send() -> None:
        for header in headers:
            for size in _SIZES:
                await one.send(header, (_pattern(size),))
            await one.send(header)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for header in headers:
            for size in (*_SIZES, 0):
                got, payload = await _receive(other)
                assert got == header, f"header of {len(got)} bytes came, {len(header)} were sent"
                assert payload == _pattern(size).tobytes(), f"a payload of {size} bytes is not what was sent"


async def buffers_may_be_split_anyhow(one: Link, other: Link) -> None:
    """Scatter and gather need not agree on where buffers end."""
    data = _pattern(2 * _MIB + 4321)
    small = [(1,), (1, 2, 3), (700,), (1 << 40,)]
    large = [(4096,), (1000, 1, 70_000), (_MIB,), (300_001, 7), (1 << 40,)]
    plan = [
        *((1000, there, here) for there in small for here in small),
        *((100_000, there, here) for there in large for here in large),
        *((len(data), there, here) for there, here in zip(large, large[2:] + large[:2], strict=True)),
    ]

    async def send() -> None:
        for size, cut, _ in plan:
            await one.send(b"cut", [b"", *_split(data.data[:size], cut), b""])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for size, there, here in plan:
            header, nbytes = await other.receive_header()
            assert (bytes(header), nbytes) == (b"cut", size)
            target = np.zeros(size, np.uint8)
            await other.receive_into([bytearray(), *_split(target.data, here)])
            assert (target == data[:size]).all(), f"{size} bytes cut by {there} did not arrive when cut by {here}"


async def payloads_in_parts(one: Link, other: Link) -> None:
    """A payload can be received by parts of any size, and what is left of it discarded."""
    cases = [(1, 1), (1000, 7), (16_384, 5000), (300_000, 4096), (2 * _MIB + 77, _MIB), (2 * _MIB + 77, 300_001)]

    async def send() -> None:
        for size, part in cases:
            for _ in range(2):
                await one.send(b"parts", _split(_pattern(size).data, [max(part // 2, 1)]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for size, part in cases:
            target = bytearray((await other.receive_header())[1])
            for view in _split(memoryview(target), [part]):
                await other.receive_into((view,))
            assert target == _pattern(size).tobytes(), f"{size} bytes did not arrive in parts of {part}"
            await other.receive_header()
            target = bytearray(part)
            await other.receive_into((target,))
            assert target == _pattern(size)[:part].tobytes()
            await other.discard_payload()


async def buffers_of_any_type(one: Link, other: Link) -> None:
    """Arrays of any dtype and shape, as long as they are contiguous."""
    dtypes: list[Any] = ["f4", "f8", "f2", "i1", "u8", "c16", ">f4", "?", "M8[s]", [("x", "i2"), ("y", "f8")]]
    for dtype in dtypes:
        array = np.frombuffer(_pattern(480).tobytes(), np.dtype(dtype))[:24].reshape(2, 3, 4)
        target = np.empty_like(array)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, b"", (array, np.empty((0, 3), dtype), np.ones((), "f4")))
            await other.receive_header()
            await other.receive_into((np.empty((3, 0), dtype), target, np.empty((), "f4")))
        assert target.tobytes() == array.tobytes(), f"an array of {dtype} is not what was sent"


async def a_payload_can_be_discarded(one: Link, other: Link) -> None:
    """The next message follows a payload that nobody wanted."""

    async def send() -> None:
        for size in _SIZES:
            await one.send(b"unwanted", (_pattern(size),))
            await one.send(b"wanted", (b"yes",))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for size in _SIZES:
            assert (await other.receive_header())[1] == size
            await other.discard_payload()
            assert await _receive(other) == (b"wanted", b"yes")


async def senders_take_turns(one: Link, other: Link) -> None:
    """Messages of several tasks do not mix."""
    counts = dict.fromkeys(range(4), 0)

    async def send(name: int) -> None:
        for index in range(12):
            size = (10, 70_000, 0, _MIB + 9)[index % 4]
            await one.send(bytes([name, index]), (np.full(size, name, np.uint8),))

    async with trio.open_nursery() as nursery:
        for name in counts:
            nursery.start_soon(send, name)
        for _ in range(12 * len(counts)):
            header, payload = await _receive(other)
            assert header[1] == counts[header[0]], "messages of one sender came out of order"
            counts[header[0]] += 1
            assert payload.count(header[0]) == len(payload), "messages of two senders are mixed"


async def stats_count_what_passed(one: Link, other: Link) -> None:
    """Both ends count messages, and at least the bytes that were given."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send, b"head", (_pattern(1000),))
        nursery.start_soon(_receive, other)
    assert one.stats.messages_sent == other.stats.messages_received == 1
    assert one.stats.bytes_sent >= 1004
    assert other.stats.bytes_received == one.stats.bytes_sent, "the two ends count bytes differently"
    assert one.stats.bytes_received == other.stats.bytes_sent == 0


# --- Misuse --------------------------------------------------------------------------------------


async def misuse_is_told_and_harmless(one: Link, other: Link) -> None:
    """Wrong sizes and wrong order are UsageErrors, after which the link works on."""
    await _assert_misuse(lambda: one.send(b"x" * (limits.LINK_HEADER_MAX_BYTES + 1)))
    await _assert_misuse(lambda: one.send(b"", (np.zeros((4, 4))[:, 0],)))
    await _assert_misuse(lambda: one.send(b"", (17,)))
    await _assert_misuse(lambda: other.receive_into((bytearray(1),)))
    for size in (10, 3 * _MIB):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, b"", (_pattern(size),))
            await other.receive_header()
            await _assert_misuse(lambda size=size: other.receive_into((bytearray(size + 1),)))  # type: ignore[misc]
            await other.receive_into(())
            await _assert_misuse(lambda size=size: other.receive_into((bytes(size),)))  # type: ignore[misc]
            await _assert_misuse(other.receive_header)
            payload = bytearray(size)
            await other.receive_into((payload,))
            assert payload == _pattern(size).tobytes()
    assert not one.closed
    assert not other.closed


async def one_receiver_at_a_time(one: Link, other: Link) -> None:
    """A second receiver is refused, the first is not disturbed."""
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            assert await _receive(other) == (b"first", b"")

        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        await _assert_misuse(other.receive_header)
        await one.send(b"first")


# --- Back-pressure -------------------------------------------------------------------------------


async def a_clogged_peer_stops_the_sender(one: Link, other: Link) -> None:
    """A sender waits for a peer that does not read, in bounded memory, and goes on when it does."""
    payload = _pattern(300_000).tobytes()
    async with trio.open_nursery() as nursery:
        scope = await _send_until_clogged(nursery, one, payload)
        # The other direction is not held up.
        await other.send(b"still here")
        assert await _receive(one) == (b"still here", b"")
        for _ in range(int(_CLOGGED_MAX_BYTES / 8 / len(payload))):
            assert await _receive(other) == (b"clog", payload)
        scope.cancel()


# --- Closing -------------------------------------------------------------------------------------


async def closing_is_seen_at_both_ends(one: Link, other: Link) -> None:
    """After aclose, both ends refuse to send and to receive; closing again does nothing."""
    assert not one.closed
    assert not other.closed
    await one.aclose()
    assert one.closed
    await one.aclose()
    await _assert_closed(one, lambda: one.send(b"late"))
    await _assert_closed(one, one.receive_header)
    await _assert_closed(other, other.receive_header)
    await _assert_closed(other, other.receive_header)
    await _assert_closed(other, lambda: other.send(b"late"))
    await other.aclose()


async def a_sender_learns_of_the_end(one: Link, other: Link) -> None:
    """A peer that only sends gets LinkClosedError soon after the other end closed."""
    await one.aclose()
    await _assert_closed(other, lambda: other.send(b"", (bytes(_MIB),)), attempts=64)


async def what_was_sent_arrives_though_sending_back_fails(one: Link, other: Link) -> None:
    """A failed send does not take away what the peer had sent before it closed."""
    await one.send(b"result", (_pattern(1000),))
    await one.aclose()
    await _assert_closed(other, lambda: other.send(b"", (bytes(_MIB),)), attempts=64)
    assert await _receive(other) == (b"result", _pattern(1000).tobytes())
    await _assert_closed(other, other.receive_header)


async def what_was_sent_before_the_end_arrives(one: Link, other: Link) -> None:
    """Messages handed over before aclose are received, also when the closing end had unread ones itself."""
    await other.send(b"nobody will read this", (bytes(1000),))
    for index in range(20):
        await one.send(bytes([index]), (_pattern(500, index),))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.aclose)
        await wait_all_tasks_blocked(_CLOGGED_AFTER_S)
        for index in range(20):
            assert await _receive(other) == (bytes([index]), _pattern(500, index).tobytes())
        await _assert_closed(other, other.receive_header)


async def a_large_message_before_the_end_arrives(one: Link, other: Link) -> None:
    """As above, with more in flight than buffers hold."""

    async def send() -> None:
        await one.send(b"large", (_pattern(8 * _MIB),))
        await one.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert await _receive(other) == (b"large", _pattern(8 * _MIB).tobytes())
        await _assert_closed(other, other.receive_header)


async def closing_wakes_those_who_wait(one: Link, other: Link) -> None:
    """Tasks that receive or send on a link get LinkClosedError when it is closed here or there."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_assert_closed, one, one.receive_header)
        nursery.start_soon(_assert_closed, other, other.receive_header)
        await wait_all_tasks_blocked()
        await one.aclose()


async def closing_wakes_a_clogged_sender(one: Link, other: Link) -> None:
    """A sender that waits for room gets LinkClosedError when its own end is closed."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_assert_closed, one, lambda: one.send(b"", (bytes(_CLOGGED_MAX_BYTES),)))
        await wait_all_tasks_blocked(_CLOGGED_AFTER_S)
        nursery.start_soon(_assert_closed, one, lambda: one.send(b"the next in turn"))
        await wait_all_tasks_blocked(_CLOGGED_AFTER_S)
        nursery.start_soon(one.aclose)
        nursery.start_soon(other.aclose)


async def closing_there_wakes_a_clogged_sender(one: Link, other: Link) -> None:
    """A sender that waits for room gets LinkClosedError when the other end is closed."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_assert_closed, one, lambda: one.send(b"", (bytes(_CLOGGED_MAX_BYTES),)))
        await wait_all_tasks_blocked(_CLOGGED_AFTER_S)
        await other.aclose()


# --- Cancelling ----------------------------------------------------------------------------------


async def a_cancelled_wait_for_a_header_loses_nothing(one: Link, other: Link) -> None:
    """Wait for headers in many short turns while messages trickle in; all arrive whole."""
    sizes = (0, 10, 40_000, 2 * _MIB, 3)

    async def send() -> None:
        for size in sizes * 4:
            await one.send(b"trickle", (_pattern(size),))
            await trio.lowlevel.checkpoint()

    for _ in range(3):
        with trio.CancelScope() as scope:
            scope.cancel()
            await other.receive_header()
            raise AssertionError("a header came out of nowhere")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for size in sizes * 4:
            nbytes = await _receive_header_in_turns(other)
            assert nbytes == size, f"a payload of {nbytes} bytes was announced, {size} were sent"
            payload = bytearray(nbytes)
            await other.receive_into((payload,))
            assert payload == _pattern(size).tobytes(), "a cancelled wait lost bytes"
    assert not other.closed


async def _receive_header_in_turns(link: Link) -> int:
    for turn in range(1_000_000):
        async with trio.open_nursery() as nursery:
            header = None

            async def interrupt(scope: trio.CancelScope = nursery.cancel_scope, turn: int = turn) -> None:
                for _ in range(turn % 4):
                    await trio.lowlevel.checkpoint()
                if turn % 8 == 7:
                    await trio.sleep(0.001)
                scope.cancel()

            nursery.start_soon(interrupt)
            header = await link.receive_header()
            nursery.cancel_scope.cancel()
        if header is not None:
            assert bytes(header[0]) == b"trickle"
            return header[1]
    raise AssertionError("no header came")


async def a_cancelled_send_closes(one: Link, other: Link) -> None:
    """A message may have been cut, so the link ends; what came whole before is still received."""
    await one.send(b"whole")
    async with trio.open_nursery() as nursery:
        scope = await _send_until_clogged(nursery, one, bytes(300_000))
        waiting = trio.CancelScope()

        async def wait_for_a_turn() -> None:
            with waiting:
                await one.send(b"never on its way")

        nursery.start_soon(wait_for_a_turn)
        await wait_all_tasks_blocked(_CLOGGED_AFTER_S)
        waiting.cancel()
        await wait_all_tasks_blocked(_CLOGGED_AFTER_S)
        assert not one.closed, "a send that was cancelled before its turn closed the link"
        scope.cancel()
    assert one.closed, "a send was cancelled halfway and the link is still open"
    await _assert_closed(one, lambda: one.send(b"more"))
    assert await _receive(other) == (b"whole", b"")
    await _assert_closed(other, lambda: _receive(other), attempts=1000)


async def a_cancelled_receive_closes(one: Link, other: Link) -> None:
    """Half a payload was taken, so the link ends; the sender gets LinkClosedError."""

    async def send() -> None:
        await _assert_closed(one, lambda: one.send(b"", (bytes(_CLOGGED_MAX_BYTES),)), attempts=8)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        _, nbytes = await other.receive_header()
        with trio.CancelScope() as scope:
            scope.cancel()
            await other.receive_into((bytearray(nbytes),))
        assert scope.cancelled_caught, "a large payload was received without a chance to cancel"
        assert other.closed, "receiving was cancelled halfway and the link is still open"
        await _assert_closed(other, other.receive_header)


async def busy_links_let_others_run(one: Link, other: Link) -> None:
    """Messages that need not wait must not keep other tasks from running, nor a deadline from passing."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while turns < 20:
            await trio.lowlevel.checkpoint()
            turns += 1

    async def send() -> None:
        for _ in range(2000):
            await one.send(b"x" * 64)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        async with trio.open_nursery() as traffic:
            traffic.start_soon(send)
            for _ in range(2000):
                await other.receive_header()
        nursery.cancel_scope.cancel()
    assert turns == 20, f"another task had {turns} turns while 2000 messages passed"
    with trio.CancelScope() as scope:
        scope.cancel()
        for _ in range(2000):
            async with trio.open_nursery() as traffic:
                traffic.start_soon(one.send, b"x")
                await other.receive_header()
    assert scope.cancelled_caught, "2000 messages passed and cancellation was not noticed"
