"""Peers that break the protocol: their link is closed and counted, and the operation names them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkle_mesh import wire
from sparkle_mesh.collectives.arrays import check_arrays
from sparkle_mesh.collectives.calls import Call
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.collectives.messages import Abort, Begin, Control, Prepared, encode_data
from sparkle_mesh.errors import CollectiveAbortedError, LinkClosedError, PeerLostError

EPOCH = 3
LINEAGE = b"L" * 32


def begin(operation: int = 1, count: int = 64, **changes: Any) -> Begin:
    """What a rank of two says that calls ``all_reduce`` of ``count`` ones by ring."""
    call = Call("all_reduce", "ring", check_arrays(np.ones(count), lambda *_: None))
    fields: dict[str, Any] = {
        "epoch": EPOCH,
        "lineage": LINEAGE,
        "operation": operation,
        "kind": "all_reduce",
        "digest": call.identity.digest,
        "description": call.describe(),
    }
    return Begin(**(fields | changes))


def prepared(operation: int = 1) -> Prepared:
    return Prepared(epoch=EPOCH, operation=operation, digest=b"x" * 16)


def data(operation: int = 1, *, turn: int = 0, segment: int = 0, nbytes: int = 256, epoch: int = EPOCH) -> Any:
    return encode_data(0, turn, segment, epoch, operation), bytes(nbytes)


# What a peer says after the group has called; each breaks the protocol at its last message.
Message = Control | tuple[bytes, bytes]
CRIMES: dict[str, tuple[list[Message], str]] = {
    "garbage": ([(b"\xff\xfe", b"")], "bytes are not a valid"),
    "empty header": ([(b"", b"")], "bytes are not a valid"),
    "control with payload": ([(wire.encode(begin()), b"abc")], "a control message came with a payload of 3 bytes"),
    "another epoch": ([begin(epoch=9)], "message of epoch 9 in epoch 3"),
    "another lineage": ([begin(lineage=b"M" * 32)], "in another lineage"),
    "begins twice": ([begin(), begin()], "a second Begin of operation 1"),
    "prepared before begin": ([prepared()], "Prepared out of order"),
    "prepared twice": ([begin(), prepared(), prepared()], "Prepared out of order"),
    "prepared ahead": ([begin(), prepared(2)], "Prepared for operation 2, which this rank has not begun"),
    "begins twice ahead": ([begin(2), begin(2)], "a second Begin of operation 2"),
    "data out of order": ([begin(), data(turn=1)], "data out of order in operation 1"),
    "data of another segment": ([begin(), data(segment=1)], "data out of order"),
    "data of another epoch": ([begin(), data(epoch=4)], "message of epoch 4 in epoch 3"),
    "data of the wrong length": ([begin(), data(nbytes=8)], "8 bytes came in operation 1 where 256 belong"),
    "data ahead without begin": ([begin(), data(2)], "data of operation 2, which the peer has not begun"),
    "too much data ahead": ([begin(2), data(2, nbytes=100_000)], "100000 bytes of operation 2, ahead"),
    "data ahead after abort": (
        [begin(2), Abort(epoch=EPOCH, operation=2, cause="cancelled", origin=1), data(2)],
        "data of operation 2, which the peer has not begun",
    ),
    "data twice": ([begin(), data(), data()], "data out of order"),
}


async def say(link: Any, message: Message) -> None:
    header, payload = message if isinstance(message, tuple) else (wire.encode(message), b"")
    await link.send(header, (payload,) if payload else ())


async def listen(link: Any) -> None:
    """Take everything until the link ends."""
    while True:
        try:
            await link.receive_header()
        except LinkClosedError:
            return
        await link.discard_payload()


async def confront(make_pair: Any, talk: Callable[[Any, CollectiveGroup], Awaitable[None]]) -> CollectiveGroup:
    """Run a group of two whose other end is in the hands of ``talk``."""
    ours, theirs = make_pair(0, 1, slots=8)
    group = CollectiveGroup(rank=0, size=2, links={1: ours}, lineage=LINEAGE, epoch=EPOCH)
    async with trio.open_nursery() as nursery:
        await nursery.start(group.run)
        nursery.start_soon(listen, theirs)
        await talk(theirs, group)
        nursery.cancel_scope.cancel()
    return group


@pytest.mark.parametrize("name", list(CRIMES))
async def test_breaking_the_protocol_closes_the_link(
    name: str, make_pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    messages, complaint = CRIMES[name]

    async def talk(link: Any, group: CollectiveGroup) -> None:
        async def call() -> None:
            with pytest.raises(PeerLostError, match="rank 1: it broke the protocol") as caught:
                await group.all_reduce(np.ones(64), algorithm="ring", timeout_s=5)
            assert complaint in str(caught.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            for message in messages:
                await say(link, message)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(LinkClosedError):
            await link.send(b"x")

    group = await confront(make_pair, talk)
    assert group.protocol_errors == 1
    assert complaint in caplog.text


@pytest.mark.parametrize("held", [[data(turn=1)], [data(nbytes=8)], [data(), data()]])
async def test_data_that_was_held_is_checked_when_its_operation_begins(held: list[Any], make_pair: Any) -> None:
    async def talk(link: Any, group: CollectiveGroup) -> None:
        await say(link, begin())
        for message in held:
            await say(link, message)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(PeerLostError, match="broke the protocol"):
            await group.all_reduce(np.ones(64), algorithm="ring", timeout_s=5)

    assert (await confront(make_pair, talk)).protocol_errors == 1


async def test_late_words_about_what_is_over_are_ignored(make_pair: Any) -> None:
    async def talk(link: Any, group: CollectiveGroup) -> None:
        abort = Abort(epoch=EPOCH, operation=1, cause="cancelled", origin=1, reason="its call was cancelled")
        await say(link, begin())
        await say(link, data(nbytes=256))
        await say(link, abort)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(CollectiveAbortedError, match="given up by rank 1"):
            await group.all_reduce(np.ones(64), algorithm="ring", timeout_s=5)
        for message in (begin(), data(turn=1), prepared(), abort, data(segment=5)):
            await say(link, message)
        await trio.testing.wait_all_tasks_blocked()
        # And while the next one is in flight.
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(CollectiveAbortedError):
                    await group.barrier(timeout_s=5)

            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            for message in (begin(), data(turn=1), prepared(), abort):
                await say(link, message)
            await trio.testing.wait_all_tasks_blocked()
            await say(link, Abort(epoch=EPOCH, operation=2, cause="cancelled", origin=1))
        assert group.protocol_errors == 0

    await confront(make_pair, talk)


class SlowPayload:
    """Lets a payload take its time, so that other things happen while it comes in."""

    def __init__(self, link: Any) -> None:
        self.started = trio.Event()
        self.go_on = trio.Event()
        self._receive_into = link.receive_into
        link.receive_into = self.receive_into

    async def receive_into(self, buffers: Any) -> None:
        self.started.set()
        await self.go_on.wait()
        await self._receive_into(buffers)


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("ending", ["none", "abort"])
async def test_an_operation_may_begin_while_its_data_is_coming_in(earlier: int, ending: str, make_pair: Any) -> None:
    ours, theirs = make_pair(0, 1, slots=8)
    group = CollectiveGroup(rank=0, size=2, links={1: ours}, lineage=LINEAGE, epoch=EPOCH)
    async with trio.open_nursery() as nursery:
        await nursery.start(group.run)
        nursery.start_soon(listen, theirs)
        count = 10_000  # two shards of 40000 bytes, three segments each
        segment = 16 * 1024
        await say(theirs, begin(count=count))
        for number in range(earlier):
            await say(theirs, data(segment=number, nbytes=segment))
        await trio.testing.wait_all_tasks_blocked()
        slow = SlowPayload(ours)
        await say(theirs, data(segment=earlier, nbytes=segment))
        await slow.started.wait()

        async def call() -> None:
            with pytest.raises(CollectiveAbortedError):
                await group.all_reduce(np.ones(count), algorithm="ring", timeout_s=5)

        async with trio.open_nursery() as calling:
            with trio.CancelScope() as scope:
                calling.start_soon(call)
                await trio.testing.wait_all_tasks_blocked()
                if ending == "abort":
                    assert 1 in group.operations
                    group.heard(1, Abort(epoch=EPOCH, operation=1, cause="cancelled", origin=1))
                    await trio.testing.wait_all_tasks_blocked()
                slow.go_on.set()
                await trio.testing.wait_all_tasks_blocked()
                if ending == "none":
                    assert 1 in group.operations
                    expected = group.operations[1].execution.next_receive(1)
                    assert expected is not None
                    assert expected.step.segment == earlier + 1
                    await say(theirs, Abort(epoch=EPOCH, operation=1, cause="cancelled", origin=1))
            assert not scope.cancelled_caught
        assert group.protocol_errors == 0
        nursery.cancel_scope.cancel()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    headers=st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.builds(
                encode_data,
                st.integers(0, 2),
                st.integers(0, 3),
                st.integers(0, 3),
                st.integers(EPOCH - 1, EPOCH + 1),
                st.integers(0, 4),
            ),
            st.builds(lambda n: wire.encode(begin(n)), st.integers(1, 4)),
            st.builds(lambda n: wire.encode(prepared(n)), st.integers(1, 4)),
            st.builds(
                lambda n, cause, lost: wire.encode(
                    Abort(epoch=EPOCH, operation=n, cause=cause, origin=1, lost=lost, reason="r")
                ),
                st.integers(1, 4),
                st.sampled_from(["lost", "cancelled", "x"]),
                st.sampled_from([None, 0, 1, 7]),
            ),
        ),
        max_size=8,
    ),
    nbytes=st.sampled_from([0, 8, 256]),
)
def test_any_words_from_a_peer_end_in_a_named_error(make_pair: Any, headers: list[bytes], nbytes: int) -> None:
    async def main() -> None:
        async def talk(link: Any, group: CollectiveGroup) -> None:
            async def call() -> None:
                with trio.fail_after(20), pytest.raises((PeerLostError, CollectiveAbortedError)):
                    await group.all_reduce(np.ones(64), algorithm="ring", timeout_s=5)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await trio.testing.wait_all_tasks_blocked()
                for header in headers:
                    payload = bytes(nbytes) if len(header) == 20 else b""
                    try:
                        await link.send(header, (payload,) if payload else ())
                    except LinkClosedError:
                        break
                await link.aclose()

        await confront(make_pair, talk)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
