"""Keeps some bootstrap peers connected: the way into the public DHT, observers of this process, relays perhaps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.discovery.bootstrap import ResolveTxt, resolve_bootstrap
from sparkle_mesh.discovery.public_peers import PublicPeers
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.interface import Address, Fabric, PeerId
from sparkle_mesh.wire import PeerAddress

logger = logging.getLogger(__name__)


class PortFabric(Fabric, Protocol):
    """A fabric that can dial from the port on which it listens."""

    async def connect(
        self, peer_id: PeerId, addresses: Sequence[Address], *, timeout_s: float = ..., from_port: bool = ...
    ) -> None: ...


@dataclass(slots=True)
class _Try:
    """How it went with one of them: since when it is connected, and when to try it again."""

    connected_at: float | None = None
    due_at: float = float("-inf")
    pause_s: float = limits.BOOTSTRAP_LOOK_S


class Infrastructure:
    """The bootstrap peers.

    Parameters
    ----------
    bootstrap
        Addresses and names; see :mod:`.bootstrap`.
    connected
        Told of each that was connected to.
    """

    def __init__(
        self,
        fabric: PortFabric,
        bootstrap: Sequence[str],
        *,
        public_peers: PublicPeers,
        connected: Callable[[PeerId], object],
        resolve: ResolveTxt,
        entropy: Entropy,
    ) -> None:
        self._fabric, self._bootstrap, self._public_peers = fabric, tuple(bootstrap), public_peers
        self._connected, self._resolve, self._entropy = connected, resolve, entropy
        self._peers: dict[PeerId, PeerAddress] = {}
        self._tries: dict[PeerId, _Try] = {}
        self._resolved = False
        self._last_error: str | None = None

    def connected(self) -> list[PeerAddress]:
        """Return those that are connected."""
        present = self._fabric.connected_peers()
        return [peer for peer_id, peer in self._peers.items() if peer_id in present]

    def status(self) -> str:
        """Say for people how that goes."""
        if not self._bootstrap:
            return "off"
        if not self._peers:
            return "no addresses known (is this machine online?)" if self._resolved else "no addresses known yet"
        error = f"; last error: {self._last_error}" if self._last_error and not self.connected() else ""
        return f"{len(self.connected())} of {len(self._peers)} connected{error}"

    async def run(self) -> None:
        """Keep ``limits.BOOTSTRAP_CONNECTED_COUNT`` of them connected, until cancelled."""
        while self._bootstrap:
            self._note_lost(trio.current_time())
            count = len(self.connected())
            if count < min(limits.BOOTSTRAP_CONNECTED_COUNT, len(self._peers) or 1):
                if not count:
                    await self._look_up()
                await self._connect_some(limits.BOOTSTRAP_CONNECTED_COUNT - count)
            await trio.sleep(self._pause_s() * self._entropy.uniform(0.75, 1.25))

    def _pause_s(self) -> float:
        """Return when to look again: DNS is not asked all the time by a machine that is not online."""
        pauses = [one.pause_s for one in self._tries.values()]
        return (
            limits.BOOTSTRAP_LOOK_S
            if self.connected() or not self._resolved
            else min(pauses, default=limits.BOOTSTRAP_OFFLINE_S)
        )

    async def _look_up(self) -> None:
        for peer in await resolve_bootstrap(self._bootstrap, self._resolve):
            if peer.peer_id != self._fabric.peer_id:
                if peer.peer_id not in self._peers:
                    self._public_peers.hold(peer.peer_id)
                self._peers[peer.peer_id] = peer
        self._resolved = True

    def _note_lost(self, now: float) -> None:
        """Leave those alone that let this process go soon: they serve others, or nobody."""
        present = self._fabric.connected_peers()
        for peer_id, one in self._tries.items():
            if one.connected_at is not None and peer_id not in present:
                if now - one.connected_at >= limits.BOOTSTRAP_STABLE_S:
                    one.pause_s = limits.BOOTSTRAP_LOOK_S
                self._back_off(one, now)

    def _back_off(self, one: _Try, now: float) -> None:
        one.connected_at, one.due_at = None, now + one.pause_s
        one.pause_s = min(2 * one.pause_s, limits.BOOTSTRAP_BACKOFF_MAX_S)

    async def _connect_some(self, count: int) -> None:
        present, now = self._fabric.connected_peers(), trio.current_time()
        due = [
            peer
            for peer_id, peer in self._peers.items()
            if peer_id not in present and self._tries.setdefault(peer_id, _Try()).due_at <= now
        ]
        due.sort(key=lambda _: self._entropy.uniform(0.0, 1.0))
        async with trio.open_nursery() as nursery:
            for peer in due[:count]:
                nursery.start_soon(self._connect, peer, self._tries[peer.peer_id])

    async def _connect(self, peer: PeerAddress, one: _Try) -> None:
        try:
            await self._fabric.connect(peer.peer_id, peer.addresses, from_port=True)
        except SparkleError as error:
            self._last_error = str(error)[: limits.REASON_MAX_CHARS]
            logger.info("a bootstrap peer cannot be reached: %s; trying on", error)
            self._back_off(one, trio.current_time())
        else:
            one.connected_at = trio.current_time()
            self._connected(peer.peer_id)
