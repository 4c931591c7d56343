"""Who is asked when, and how long silence may last."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.membership.channel import PeerChannel
from sparkle_mesh.membership.heartbeat import Heartbeat, patience_s
from sparkle_mesh.membership.messages import Introduction, Role
from sparkle_mesh.membership.view import Member

STEADY = cast(Entropy, SimpleNamespace(uniform=lambda low, high: 1.0))


class Peers:
    """Channels to peers that answer pings, or do not; and what is said of them."""

    def __init__(self, count: int, *, role: Role = "trainer") -> None:
        self.role = role
        self.asked: Counter[str] = Counter()
        self.silent: set[str] = set()
        self.suspected: dict[str, float] = {}
        self.trusted: list[str] = []
        self.channels = {name: self._channel(name) for name in (f"peer-{number:03}" for number in range(count))}
        self.heartbeat: Heartbeat

    def _channel(self, name: str) -> PeerChannel:
        introduction = Introduction(
            role=self.role, member=Member(name, bytes(16)), host_id=bytes(16), min_peers=1, addresses=()
        )
        stream: Any = SimpleNamespace(peer_id=name)
        channel = PeerChannel(stream, introduction, now=trio.current_time())

        def ping(probe: int, *, now: float) -> None:
            channel.pinged_at = now
            self.asked[name] += 1
            if name not in self.silent:
                self.heartbeat.heard(channel)

        channel.ping = ping  # type: ignore[method-assign]
        return channel

    async def watch(self, seconds: float, **options: Any) -> None:
        """Run a heartbeat for so long."""
        self.heartbeat = Heartbeat(
            self.channels,
            STEADY,
            suspected=lambda member, reason: self.suspected.setdefault(member.peer_id, trio.current_time()),
            trusted=lambda member: self.trusted.append(member.peer_id),
            **options,
        )
        with trio.move_on_after(seconds):
            await self.heartbeat.run()


async def test_few_are_all_asked_and_many_in_turns(autojump_clock: trio.testing.MockClock) -> None:
    for count in (3, limits.PINGS_AT_ONCE_MAX_COUNT, 3 * limits.PINGS_AT_ONCE_MAX_COUNT):
        peers = Peers(count)
        await peers.watch(60)
        times = set(peers.asked.values())
        assert len(peers.asked) == count
        assert max(times) - min(times) <= 1
        rounds = 60 / limits.PING_INTERVAL_S
        assert sum(peers.asked.values()) <= (rounds + 1) * limits.PINGS_AT_ONCE_MAX_COUNT
        # Whose turn comes seldom is not suspected for that.
        assert peers.suspected == {}


async def test_who_comes_and_goes_is_asked_and_is_not(autojump_clock: trio.testing.MockClock) -> None:
    peers = Peers(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peers.watch, 30)
        await trio.sleep(10)
        gone, before = peers.channels.pop("peer-001"), peers.asked["peer-001"]
        peers.channels["new"] = peers._channel("new")
    assert gone.peer_id == "peer-001"
    assert peers.asked["peer-001"] == before
    assert peers.asked["new"] > 5


@pytest.mark.parametrize(("ceiling_s", "least_s", "most_s"), [(None, 12.0, 12.6), (3.0, 3.0, 3.5), (1.0, 1.0, 1.5)])
async def test_the_users_ceiling_holds(
    autojump_clock: trio.testing.MockClock, ceiling_s: float | None, least_s: float, most_s: float
) -> None:
    peers = Peers(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: peers.watch(60, **({} if ceiling_s is None else {"max_silence_s": ceiling_s})))
        await trio.sleep(20)
        assert peers.suspected == {}
        last = peers.channels["peer-000"].last_heard
        peers.silent.add("peer-000")
        await trio.sleep(15)
        peers.silent.clear()
        await trio.sleep(5)
    assert list(peers.suspected) == ["peer-000"]
    assert least_s <= peers.suspected["peer-000"] - last <= most_s
    assert peers.trusted == ["peer-000"]


def test_patience_is_learned_between_floor_and_ceiling() -> None:
    floor, ceiling = limits.SUSPICION_FLOOR_S, limits.SUSPICION_CEILING_S
    assert patience_s([]) == patience_s([0.1, 2.0]) == floor
    assert patience_s([0.1, floor]) == 2 * floor
    assert patience_s([100.0]) == ceiling
    assert patience_s([0.1, 2.0], 3.0) == patience_s([floor], 3.0) == 3.0


@pytest.mark.parametrize("is_node", [False, True])
async def test_nodes_are_asked_seldom_and_may_be_silent_for_longer(
    autojump_clock: trio.testing.MockClock, is_node: bool
) -> None:
    peers = Peers(3, role="trainer" if is_node else "node")
    peers.silent.add("peer-001")
    await peers.watch(limits.NODE_SILENCE_TIMEOUT_S - 1.0, is_node=is_node)
    rounds = limits.NODE_SILENCE_TIMEOUT_S / limits.NODE_PING_INTERVAL_S
    assert all(1 < count <= rounds + 1 for count in peers.asked.values())
    assert not any(channel.gone_reason for channel in peers.channels.values())
    await peers.watch(1.0 + 2 * limits.NODE_LOOK_INTERVAL_S, is_node=is_node)
    # Nobody waits for it: it is let go, not suspected.
    assert peers.suspected == {}
    assert [name for name, channel in peers.channels.items() if channel.gone_reason] == ["peer-001"]
