"""Keeps places at relays while nobody can dial this process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.interface import Address, Fabric, PeerId

logger = logging.getLogger(__name__)


class Place(Protocol):
    """What this needs of :class:`sparkle_mesh.fabric.relay_client.Reservation`."""

    @property
    def expires_at(self) -> float: ...
    @property
    def address(self) -> Address: ...
    @property
    def carries_bytes(self) -> int | None: ...


class Relays(Protocol):
    """What this needs of :class:`sparkle_mesh.fabric.relay_client.RelayClient`."""

    async def reserve(self, relay_id: PeerId) -> Place: ...
    def forget(self, relay_id: PeerId) -> None: ...


class RelayKeeper:
    """Places at relays.

    Parameters
    ----------
    is_wanted
        Whether this process needs relays now.
    changed
        Called with the addresses at which this process can be reached through relays, when those are others.
    """

    def __init__(
        self,
        fabric: Fabric,
        relays: Relays,
        *,
        is_wanted: Callable[[], bool],
        changed: Callable[[tuple[Address, ...]], object],
    ) -> None:
        self._fabric, self._relays, self._is_wanted, self._changed = fabric, relays, is_wanted, changed
        #: Whether it is of the mesh, by relay.
        self._candidates: dict[PeerId, bool] = {}
        self._refused_at: dict[PeerId, float] = {}
        self._places: dict[PeerId, tuple[Place, float]] = {}
        self._told: tuple[Address, ...] = ()
        self._wake = trio.Event()

    def found(self, peer_id: PeerId, *, of_mesh: bool) -> None:
        """The connected ``peer_id`` says that it is a relay."""
        if len(self._candidates) < limits.MESH_PEERS_MAX_COUNT:
            self._candidates[peer_id] = of_mesh
        self.look()

    def has_place_at(self, peer_id: PeerId) -> bool:
        """Whether others reach this process through ``peer_id``."""
        return peer_id in self._places

    def are_missing(self) -> bool:
        """Whether there are fewer places than are wanted."""
        return self._is_wanted() and len(self._useful()) < limits.REACH_RELAYS_COUNT

    def look(self) -> None:
        """Look now whether relays are needed: something has changed."""
        self._wake.set()

    def status(self) -> str:
        """Say for people through whom this process can be reached."""
        if not self._is_wanted():
            return "not needed"
        return f"reached through {len(self._places)} of {len(self._candidates)} relays that are known"

    async def run(self) -> None:
        """Keep places while they are wanted, until cancelled."""
        while True:
            self._wake = trio.Event()
            await self._look()
            with trio.move_on_at(self._next_at(trio.current_time())):
                await self._wake.wait()

    def _next_at(self, now: float) -> float:
        times = [renew_at for _, renew_at in self._places.values()]
        if self._is_wanted() and len(self._places) < limits.REACH_RELAYS_COUNT:
            times += [at + limits.REACH_RELAY_RETRY_S for at in self._refused_at.values()]
        return max(min(times, default=float("inf")), now + limits.REACH_SETTLE_S)

    async def _look(self) -> None:
        present, now = self._fabric.connected_peers(), trio.current_time()
        for peer_id in [p for p in self._candidates if p not in present]:
            del self._candidates[peer_id]
        for peer_id in [p for p in self._places if p not in self._candidates or not self._is_wanted()]:
            self._lose(peer_id)
        if self._is_wanted():
            for peer_id in [p for p, (_, renew_at) in self._places.items() if renew_at <= now]:
                await self._reserve(peer_id)
            for peer_id in self._promising(now):
                if len(self._useful()) >= limits.REACH_RELAYS_COUNT:
                    break
                await self._reserve(peer_id)
        self._tell()

    def _useful(self) -> list[PeerId]:
        return [peer_id for peer_id, (place, _) in self._places.items() if place.carries_bytes is None]

    def _promising(self, now: float) -> list[PeerId]:
        """Return relays at which there is no place yet, those of the mesh first."""
        due = [
            peer_id
            for peer_id in self._candidates
            if peer_id not in self._places
            and now - self._refused_at.get(peer_id, float("-inf")) >= limits.REACH_RELAY_RETRY_S
        ]
        room = limits.REACH_PLACES_MAX_COUNT - len(self._places)
        return sorted(due, key=lambda peer_id: not self._candidates[peer_id])[:room]

    async def _reserve(self, relay_id: PeerId) -> None:
        now = trio.current_time()
        try:
            place = await self._relays.reserve(relay_id)
        except SparkleError as error:
            logger.info("no place at a relay: %s", error)
            self._refused_at[relay_id] = now
            self._lose(relay_id)
        else:
            self._refused_at.pop(relay_id, None)
            lasts_s = place.expires_at - now
            self._places[relay_id] = place, now + max(lasts_s * limits.RELAY_RENEW_RATIO, limits.RELAY_RENEW_MIN_S / 2)

    def _lose(self, relay_id: PeerId) -> None:
        self._places.pop(relay_id, None)
        self._relays.forget(relay_id)

    def _tell(self) -> None:
        useful_first = sorted(self._places.values(), key=lambda entry: entry[0].carries_bytes is not None)
        addresses = tuple(place.address for place, _ in useful_first)
        if addresses != self._told:
            self._told = addresses
            self._changed(addresses)
