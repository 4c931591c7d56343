"""DCUtR, both sides, over made-up streams: who dials when and as what, and who is not believed. (NATs: tests/reach.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.relay.circuit_v2.pb import dcutr_pb2 as pb

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError, UnreachableError
from sparkle_mesh.fabric.hole_punching import HolePuncher
from sparkle_mesh.fabric.multiaddrs import address_to_bytes
from sparkle_mesh.fabric.protobuf import receive_protobuf, send_protobuf


class Pipe:
    """A fabric's stream over a pair of trio's in memory; ``delay_s`` each way."""

    def __init__(self, peer_id: str, stream: Any, delay_s: float) -> None:
        self.peer_id, self._stream, self._delay_s = peer_id, stream, delay_s

    async def read(self, max_bytes: int) -> bytes:
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except trio.ClosedResourceError as error:
            raise LinkClosedError("closed") from error

    async def write(self, data: bytes) -> None:
        await trio.sleep(self._delay_s)
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LinkClosedError("closed") from error

    def abort(self) -> None:
        self._stream.send_stream.close()
        self._stream.receive_stream.close()


@dataclass
class Side:
    """One side: where it is seen, what it dials, and who it reaches."""

    seen_at: list[str]
    reaches: Callable[[str, bool, bool], bool] = lambda address, from_port, client: False
    dials: list[tuple[float, str, bool, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.puncher = HolePuncher(seen_at=lambda: self.seen_at, dial=self._dial)

    async def _dial(self, peer_id: str, address: str, from_port: bool, client: bool) -> None:
        self.dials.append((trio.current_time(), address, from_port, client))
        if not self.reaches(address, from_port, client):
            await trio.sleep(limits.HOLE_PUNCH_DIAL_S / 4)
            raise UnreachableError("refused")


def pair(delay_s: float = 0.1) -> tuple[Any, Any]:
    one, other = trio.testing.memory_stream_pair()
    return Pipe("dialer", one, delay_s), Pipe("listener", other, delay_s)


async def punch(listener: Side, dialer: Side) -> bool:
    """Let both sides try; return what the listener, who invites, comes to."""
    to_dialer, to_listener = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dialer.puncher.await_invitation, "listener")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(dialer.puncher.serve, to_listener)
        return await listener.puncher.invite(to_dialer)


A, B = "/ip4/44.0.0.1/tcp/45654", "/ip4/44.0.0.2/tcp/45654"


async def test_both_dial_at_the_same_time_each_from_its_port(autojump_clock) -> None:
    listener = Side([A], lambda address, from_port, client: from_port)
    dialer = Side([B], lambda address, from_port, client: from_port)
    assert await punch(listener, dialer)
    # First as anybody, for one that no NAT hides.
    (_, *first), (at, *second) = listener.dials
    assert first == [B, False, True]
    assert second == [B, True, False]
    ((dialed_at, *dial),) = dialer.dials
    # Whoever dialed through the relay is the client.
    assert dial == [A, True, True]
    # The messages of these streams take no time on the way, but a tenth of a second to be sent.
    assert dialed_at == pytest.approx(at, abs=0.11)
    assert (listener.puncher.succeeded_count, dialer.puncher.succeeded_count) == (1, 1)
    assert "listener" in dialer.puncher.tried


async def test_one_that_no_nat_hides_is_just_dialed(autojump_clock) -> None:
    listener = Side([A], lambda address, from_port, client: not from_port)
    dialer = Side([B])
    assert await punch(listener, dialer)
    assert dialer.dials == []


async def test_it_is_tried_a_few_times_and_both_know_when_it_is_over(autojump_clock) -> None:
    listener, dialer = Side([A]), Side([B])
    started_at = trio.current_time()
    assert not await punch(listener, dialer)
    assert trio.current_time() - started_at < limits.HOLE_PUNCH_TIMEOUT_S
    assert len(dialer.dials) == limits.HOLE_PUNCH_ATTEMPTS_COUNT
    assert listener.puncher.failed_count == 1


async def test_two_circuits_to_one_peer_wait_for_the_same(autojump_clock) -> None:
    dialer = Side([B])
    to_dialer, to_listener = pair()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(dialer.puncher.await_invitation, "listener")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(dialer.puncher.serve, to_listener)
        to_dialer.abort()
        with trio.fail_after(1):
            while dialer.puncher._awaited:
                await trio.testing.wait_all_tasks_blocked(0.01)


async def test_without_addresses_there_is_nothing_to_try(autojump_clock) -> None:
    listener, dialer = Side([]), Side([])
    assert not await punch(listener, dialer)
    assert listener.dials == dialer.dials == []


async def test_nobody_is_sent_to_local_networks_or_has_others_dial_for_it(autojump_clock) -> None:
    dialer = Side([B])
    wanted = ["/ip4/192.168.1.1/tcp/80", "/ip4/127.0.0.1/tcp/22", "/ip4/44.0.0.9/udp/1", A]
    to_dialer, to_listener = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dialer.puncher.await_invitation, "listener")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(dialer.puncher.serve, to_listener)
        await send_protobuf(to_dialer, pb.HolePunch(type=pb.HolePunch.CONNECT, ObsAddrs=map(address_to_bytes, wanted)))
        await receive_protobuf(to_dialer, pb.HolePunch)
        await send_protobuf(to_dialer, pb.HolePunch(type=pb.HolePunch.SYNC))
        await trio.sleep(limits.HOLE_PUNCH_DIAL_S)
        to_dialer.abort()
    assert [address for _, address, _, _ in dialer.dials] == [A]
    # Who was not dialed through a relay asks for nothing.
    to_dialer, to_listener = pair()
    await send_protobuf(to_dialer, pb.HolePunch(type=pb.HolePunch.CONNECT))
    with pytest.raises(ProtocolError, match="was not dialed through a relay"):
        await dialer.puncher.serve(to_listener)


async def test_who_talks_nonsense_or_nothing_is_not_waited_for_long(autojump_clock) -> None:
    listener = Side([A])
    to_dialer, to_listener = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_protobuf, to_listener, pb.HolePunch(type=pb.HolePunch.SYNC))
        assert not await listener.puncher.invite(to_dialer)
    silent, _other_end = pair()
    with trio.fail_after(2 * limits.PROTOBUF_ANSWER_TIMEOUT_S):
        assert not await listener.puncher.invite(silent)
    with trio.fail_after(limits.HOLE_PUNCH_TIMEOUT_S + 1):
        await listener.puncher.await_invitation("nobody")
