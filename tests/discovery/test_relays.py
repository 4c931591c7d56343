"""Keeping places at relays: the runner, with relays that refuse, end, and carry little."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing

from sparkle_mesh import limits
from sparkle_mesh.discovery.relays import RelayKeeper
from sparkle_mesh.errors import UnreachableError


@dataclass
class FakePlace:
    expires_at: float
    address: str
    carries_bytes: int | None = None


class FakeRelays:
    """Relays by name: what they carry, or that they refuse."""

    def __init__(self) -> None:
        self.carries: dict[str, int | None] = {}
        self.asked: list[str] = []
        self.forgotten: list[str] = []

    async def reserve(self, relay_id: str) -> FakePlace:
        self.asked.append(relay_id)
        await trio.lowlevel.checkpoint()
        if relay_id not in self.carries:
            raise UnreachableError(f"{relay_id} gave no place")
        return FakePlace(trio.current_time() + 3600, f"/through/{relay_id}", self.carries[relay_id])

    def forget(self, relay_id: str) -> None:
        self.forgotten.append(relay_id)


class Bench:
    """A keeper, whom it is connected to, and what it tells."""

    def __init__(self) -> None:
        self.present: set[str] = set()
        self.wanted = True
        self.relays = FakeRelays()
        self.told: list[tuple[str, ...]] = []
        fabric: Any = self
        self.keeper = RelayKeeper(fabric, self.relays, is_wanted=lambda: self.wanted, changed=self.told.append)

    def connected_peers(self) -> frozenset[str]:
        return frozenset(self.present)

    async def find(self, name: str, *, carries: int | None = None, of_mesh: bool = True, refuses: bool = False) -> None:
        self.present.add(name)
        if not refuses:
            self.relays.carries[name] = carries
        self.keeper.found(name, of_mesh=of_mesh)
        await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
async def bench(autojump_clock: trio.testing.MockClock) -> AsyncIterator[Bench]:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.keeper.run)
        try:
            yield bench
        finally:
            nursery.cancel_scope.cancel()


async def test_places_at_two_relays_are_enough_and_those_of_the_mesh_come_first(bench: Bench, autojump_clock) -> None:
    bench.wanted = False
    await bench.find("public", of_mesh=False)
    for name in ("a", "b", "c"):
        await bench.find(name)
    assert bench.relays.asked == []
    assert bench.keeper.status() == "not needed"
    bench.wanted = True
    assert bench.keeper.are_missing()
    bench.keeper.look()
    await trio.testing.wait_all_tasks_blocked()
    assert bench.relays.asked == ["a", "b"]
    assert bench.told == [("/through/a", "/through/b")]
    assert not bench.keeper.are_missing()
    assert bench.keeper.status() == "reached through 2 of 4 relays that are known"


async def test_what_carries_little_is_told_last_and_better_ones_are_still_looked_for(
    bench: Bench, autojump_clock
) -> None:
    await bench.find("little", carries=1 << 17, of_mesh=False)
    assert bench.told[-1] == ("/through/little",)
    assert bench.keeper.are_missing()
    await bench.find("much")
    assert bench.told[-1] == ("/through/much", "/through/little")
    for number in range(2 * limits.REACH_PLACES_MAX_COUNT):
        await bench.find(f"little{number}", carries=1 << 17)
    assert len(bench.told[-1]) == limits.REACH_PLACES_MAX_COUNT


async def test_a_relay_that_is_gone_is_replaced(bench: Bench, autojump_clock) -> None:
    for name in ("a", "b", "c"):
        await bench.find(name)
    bench.present.discard("a")
    bench.keeper.look()
    await trio.testing.wait_all_tasks_blocked()
    assert bench.told[-1] == ("/through/b", "/through/c")
    assert "a" in bench.relays.forgotten


async def test_one_that_refuses_is_asked_again_later(bench: Bench, autojump_clock) -> None:
    await bench.find("full", refuses=True)
    bench.keeper.look()
    await trio.sleep(limits.REACH_RELAY_RETRY_S / 2)
    assert bench.relays.asked == ["full"]
    bench.relays.carries["full"] = None
    await trio.sleep(limits.REACH_RELAY_RETRY_S)
    assert bench.relays.asked == ["full", "full"]
    assert bench.told == [("/through/full",)]


async def test_a_place_is_renewed_in_time_and_given_up_when_it_is_not_needed(bench: Bench, autojump_clock) -> None:
    await bench.find("a")
    await trio.sleep(3600 * limits.RELAY_RENEW_RATIO + 10)
    assert bench.relays.asked == ["a", "a"]
    del bench.relays.carries["a"]
    await trio.sleep(3600 * limits.RELAY_RENEW_RATIO + 10)
    assert bench.told[-1] == ()
    bench.relays.carries["a"] = None
    await trio.sleep(limits.REACH_RELAY_RETRY_S + 10)
    assert bench.told[-1] == ("/through/a",)
    bench.wanted = False
    bench.keeper.look()
    await trio.testing.wait_all_tasks_blocked()
    assert bench.told[-1] == ()
