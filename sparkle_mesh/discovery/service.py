"""The runner of discovery: gathers hints from everywhere and keeps this process connected to peers of its mesh.

What to dial when is :class:`.directory.Directory`'s to decide, how many to be connected to and whom
:class:`.degree.Degree`'s; here are the sources that feed it (multicast,
this host's registry, configured addresses, the cache, and through :meth:`DiscoveryService.heard` whatever
membership learns) and the dials themselves.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Protocol

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK, SYSTEM_ENTROPY, Clock, Entropy
from sparkle_mesh.discovery.addresses import parse_join_address
from sparkle_mesh.discovery.cache import CachedPeer, PeerCache
from sparkle_mesh.discovery.degree import Degree
from sparkle_mesh.discovery.directory import CACHE, EXCHANGE, HOST, JOIN, Contact, Dial, Directory, Hint
from sparkle_mesh.discovery.lan import LanBeacons
from sparkle_mesh.discovery.local import LocalRegistry, RegistryEntry, Role
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.interface import Address, Fabric, FabricEvent, PeerConnected, PeerId

logger = logging.getLogger(__name__)


class Registry(Protocol):
    """What discovery needs of :class:`.local.LocalRegistry`."""

    @property
    def folder(self) -> Path: ...

    def announce(
        self, peer_id: PeerId, *, addresses: tuple[Address, ...], mesh_tags: tuple[bytes, ...], role: Role
    ) -> None: ...
    def withdraw(self, peer_id: PeerId) -> None: ...
    def needs_renewal(self, peer_id: PeerId) -> bool: ...
    def changed_at(self) -> int | None: ...
    def read_all(self) -> tuple[RegistryEntry, ...]: ...


class DiscoveryService:
    """Keeps this process connected to peers of its mesh: all of a small one, enough of a large one.

    Parameters
    ----------
    mesh_tag
        32 bytes that stand for the mesh; the same in all its processes.
    name_tag
        32 bytes that stand for the mesh's name alone. They are seen in this host's registry and nowhere else: so
        processes of one user that mean the same mesh and hold different keys meet, and are told.
    role
        What this process tells the others on this host.
    data_dir
        Holds the registry of this host's processes (``run/``) and the cache (``peers/``).
    join
        Addresses with ``/p2p/<peer id>`` tails.
    known
        Addresses likewise, of peers that were there lately; nobody is told where they cannot be reached.
    lan
        Whether to use multicast.
    any_node
        Whether to connect to nodes of this host that are of other meshes only. Off: they have nothing to tell
        to this mesh, and would refuse.
    public_peers
        Peers that are connected for what they serve to everybody: they are neither kept connected nor let go here.
    is_needed
        Whether a peer is to stay connected whoever else is: see :class:`.degree.Degree`.
    let_go
        Called with a peer of which this process has enough: it is to be told of others, and disconnected.
    registry, cache, beacons
        Replace the real ones.

    Raises
    ------
    UsageError
        If an address in ``join`` has not that form.
    """

    def __init__(
        self,
        fabric: Fabric,
        *,
        mesh_tag: bytes,
        name_tag: bytes | None = None,
        role: Role,
        data_dir: Path,
        join: Sequence[str] = (),
        known: Sequence[str] = (),
        lan: bool = True,
        any_node: bool = False,
        public_peers: Container[PeerId] = (),
        is_needed: Callable[[PeerId], bool] = lambda peer_id: False,
        let_go: Callable[[PeerId], object] = lambda peer_id: None,
        entropy: Entropy = SYSTEM_ENTROPY,
        clock: Clock = SYSTEM_CLOCK,
        registry: Registry | None = None,
        cache: PeerCache | None = None,
        beacons: LanBeacons | None = None,
    ) -> None:
        self._fabric = fabric
        self._mesh_tag = mesh_tag
        self._host_tags = (mesh_tag,) if name_tag is None or name_tag == mesh_tag else (mesh_tag, name_tag)
        self._role: Role = role
        self._any_node = any_node
        self._public_peers = public_peers
        self._clock = clock
        self._join = [parse_join_address(text) for text in join]
        self._known = [parse_join_address(text) for text in known]
        self._let_go_of = let_go
        self._entropy = entropy
        self._degree = Degree(fabric.peer_id, role, is_needed=is_needed)
        self._directory = Directory(fabric.peer_id, entropy=entropy, degree=self._degree)
        self._registry: Registry = registry or LocalRegistry(data_dir, clock=clock, entropy=entropy)
        self._cache = cache or PeerCache(data_dir, mesh_tag, clock=clock, entropy=entropy)
        self._beacons = beacons
        if beacons is None and lan:
            self._beacons = LanBeacons(
                fabric.peer_id, mesh_tag, addresses=lambda: fabric.addresses, heard=self._take, entropy=entropy
            )
        self._wake = trio.Event()
        self._connected_once = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._announced: tuple[Address, ...] | None = None
        self._registry_problem: str | None = None
        self._on_host: set[PeerId] = set()
        self._warned: set[PeerId] = set()
        self._cached: set[PeerId] = set()
        self._last_error: str | None = None
        self._dial_count = 0
        self._failed_dial_count = 0

    # --- For the other layers -------------------------------------------------------------------

    def heard(self, peer_id: PeerId, addresses: Sequence[Address], source: str, role: str = "") -> None:
        """Take a hint from elsewhere: ``source`` is ``"introduction"``, ``"gossip"``, ``"exchange"`` or ``"dht"``.

        ``role`` is what the peer is said to be, if that is known.
        """
        self._take(Hint(peer_id, tuple(addresses), source, role=role))

    def admitted(self, peer_id: PeerId, role: str, *, same_host: bool) -> None:
        """``peer_id`` has proven that it is of the mesh, and said what it is."""
        self._degree.introduced(peer_id, role, same_host=same_host)

    def used(self, peer_id: PeerId) -> None:
        """The DHT has used the connection to ``peer_id``."""
        self._degree.used(peer_id, trio.current_time())

    def spared(self, peer_id: PeerId) -> None:
        """``peer_id`` is of the mesh, and was let go or lets go, because there are others enough."""
        self._directory.spared(peer_id, trio.current_time())
        self._wake.set()

    def refused(self, peer_id: PeerId, reason: str = "it is not of this mesh") -> None:
        """Take note that ``peer_id`` was connected but is not of this mesh: let it go and leave it alone for long."""
        if peer_id in self._public_peers:
            return
        self._directory.refused(peer_id, trio.current_time(), reason)
        if self._nursery is not None:
            self._nursery.start_soon(self._let_go, peer_id)

    @property
    def degree(self) -> Degree:
        """Whom this process is connected to; to be read only."""
        return self._degree

    @property
    def directory(self) -> Directory:
        """All that is known of peers; to be read only."""
        return self._directory

    def close_in_child(self) -> None:
        """In a forked child: close the inherited descriptors, sending nothing. Never raises."""
        if self._beacons is not None:
            self._beacons.close_in_child()

    def status(self) -> tuple[str, ...]:
        """Say for humans what discovery is doing, one line each (at most ``limits.STATUS_DISCOVERY_MAX_COUNT``)."""
        lines = [f"local network: {self._beacons.status() if self._beacons is not None else 'off'}"]
        if self._registry_problem is not None:
            lines.append(f"this host: {self._registry_problem}")
        else:
            lines.append(f"this host: {len(self._on_host)} other processes of this mesh in {self._registry.folder}")
        for peer_id, address in self._join[: limits.DISCOVERY_STATUS_JOIN_MAX_COUNT]:
            lines.append(f"address given: {address}/p2p/{peer_id}: {self._state_of(self._directory.get(peer_id))}")
        lines.append(self._summary())
        if self._last_error is not None:
            lines.append(f"last error: {self._last_error}"[: limits.NAME_MAX_CHARS])
        return tuple(lines)

    def _summary(self) -> str:
        contacts = list(self._directory.contacts())
        sources = ", ".join(f"{source} {count}" for source, count in Counter(c.source for c in contacts).most_common())
        states = Counter(self._state_of(contact).partition(":")[0] for contact in contacts)
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        line = f"peers heard of: {len(contacts)}"
        line += f" ({sources}); {counts}" if contacts else ""
        return f"{line}; {self._dial_count} dials, {self._failed_dial_count} failed"

    def _state_of(self, contact: Contact | None) -> str:
        if contact is None:
            return "this process itself"
        if contact.connected:
            return "connected"
        if contact.dialing:
            return "dialing"
        if contact.spared:
            return "known and not needed"
        if contact.refusals:
            return f"refused: {contact.last_error}"
        return f"unreachable: {contact.last_error}" if contact.failures else "to be dialed"

    # --- Running --------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Find peers and stay connected to them until cancelled."""
        try:
            async with self._fabric.events() as events, trio.open_nursery() as nursery:
                self._nursery = nursery
                self._announce()
                self._take_known()
                nursery.start_soon(self._follow, events)
                nursery.start_soon(self._dial_forever, nursery)
                nursery.start_soon(self._watch_registry)
                nursery.start_soon(self._keep_cache)
                nursery.start_soon(self._keep_degree)
                if self._beacons is not None:
                    await nursery.start(self._beacons.run)
                task_status.started()
        finally:
            self._nursery = None
            self._withdraw()
            self._save_cache()

    def _take_known(self) -> None:
        """Take what is known before anything is heard."""
        for peer_id, address in self._join:
            if peer_id == self._fabric.peer_id:
                logger.warning("address %s/p2p/%s to join at is this process's own; ignored", address, peer_id)
            self._take(Hint(peer_id, (address,), JOIN))
        for peer_id, address in self._known:
            self._take(Hint(peer_id, (address,), EXCHANGE))
        for peer in self._cache.load():
            self._cached.add(peer.peer_id)
            self._take(Hint(peer.peer_id, peer.addresses, CACHE))

    def _take(self, hint: Hint) -> None:
        if self._directory.heard(hint, trio.current_time()):
            self._wake.set()

    async def _follow(self, events: trio.MemoryReceiveChannel[FabricEvent]) -> None:
        """Follow the connections; after falling behind, begin anew from what stands."""
        await self._follow_until_closed(events)
        while True:
            logger.info("the fabric's events came faster than discovery took them; beginning anew")
            await trio.sleep(limits.DISCOVERY_EVENTS_RETRY_S)
            async with self._fabric.events() as channel:
                present, now = self._fabric.connected_peers(), trio.current_time()
                for contact in [c for c in self._directory.contacts() if c.connected and c.peer_id not in present]:
                    self._directory.disconnected(contact.peer_id, now)
                self._wake.set()
                await self._follow_until_closed(channel)

    async def _follow_until_closed(self, events: trio.MemoryReceiveChannel[FabricEvent]) -> None:
        async for event in events:
            now = trio.current_time()
            if event.peer_id in self._public_peers and self._directory.get(event.peer_id) is None:
                continue
            if isinstance(event, PeerConnected):
                self._directory.connected(
                    event.peer_id, now, remote_address=event.remote_address, outbound=event.outbound
                )
                self._tell_reached(event.peer_id)
                self._connected_once.set()
            else:
                self._directory.disconnected(event.peer_id, now)
                self._wake.set()

    async def _let_go(self, peer_id: PeerId) -> None:
        # The refusal has to arrive before the connection ends.
        await trio.sleep(limits.DISCOVERY_REFUSED_LINGER_S)
        contact = self._directory.get(peer_id)
        if contact is None or contact.refusals:
            await self._fabric.disconnect(peer_id)

    async def _keep_degree(self) -> None:
        while True:
            await trio.sleep(limits.DEGREE_LOOK_S * self._entropy.uniform(0.5, 1.5))
            for peer_id in self._degree.surplus(trio.current_time()):
                self._let_go_of(peer_id)

    # --- Dials ----------------------------------------------------------------------------------

    async def _dial_forever(self, nursery: trio.Nursery) -> None:
        while True:
            self._wake = trio.Event()
            for dial in self._directory.due(trio.current_time()):
                nursery.start_soon(self._dial, dial)
            wakeup = self._directory.next_wakeup(trio.current_time())
            with trio.move_on_at(float("inf") if wakeup is None else wakeup):
                await self._wake.wait()

    async def _dial(self, dial: Dial) -> None:
        peer_id = dial.peer_id
        self._dial_count += 1
        try:
            await self._fabric.connect(peer_id, dial.addresses, timeout_s=limits.DIAL_TIMEOUT_S)
            if peer_id not in self._fabric.connected_peers():
                raise SparkleError(f"peer {peer_id} closed the connection at once")
        except SparkleError as error:
            self._failed_dial_count += 1
            reason = str(error)[: limits.REASON_MAX_CHARS]
            self._last_error = reason
            self._directory.dial_failed(peer_id, trio.current_time(), reason)
            self._tell_unreachable(peer_id, reason)
        else:
            address = self._fabric.remote_address(peer_id)
            self._directory.dial_succeeded(peer_id, trio.current_time(), remote_address=address)
        self._wake.set()

    def _tell_unreachable(self, peer_id: PeerId, reason: str) -> None:
        contact = self._directory.get(peer_id)
        configured = contact is not None and contact.configured and not contact.connected
        if configured and peer_id not in self._warned:
            self._warned.add(peer_id)
            logger.warning("a peer to join at cannot be reached: %s; trying on", reason)
        else:
            logger.debug("dial failed: %s", reason)

    def _tell_reached(self, peer_id: PeerId) -> None:
        if peer_id in self._warned:
            self._warned.discard(peer_id)
            logger.info("peer %s to join at is connected now", peer_id)

    # --- This host's registry -------------------------------------------------------------------

    def _announce(self) -> None:
        addresses = tuple(self._fabric.addresses)
        try:
            self._registry.announce(
                self._fabric.peer_id, addresses=addresses, mesh_tags=self._host_tags, role=self._role
            )
        except OSError as error:
            self._registry_failed(error)
        else:
            self._announced = addresses
            self._registry_problem = None

    def _withdraw(self) -> None:
        try:
            self._registry.withdraw(self._fabric.peer_id)
        except OSError as error:
            self._registry_failed(error)

    def _registry_failed(self, error: OSError) -> None:
        if self._registry_problem is None:
            logger.warning("other processes of this host may not find this one: %s", error)
        self._registry_problem = f"registry {self._registry.folder} cannot be written: {error}"

    async def _watch_registry(self) -> None:
        started_at = trio.current_time()
        checked_at = started_at
        seen: tuple[int | None, int | None] = (-1, -1)
        while True:
            now = trio.current_time()
            changed_at = self._registry.changed_at()
            # Clocks of file systems tick coarsely: only what stood still for two looks is taken as unchanged.
            if now - checked_at >= limits.REGISTRY_CHECK_S:
                checked_at = now
                if self._announced != self._fabric.addresses or self._registry.needs_renewal(self._fabric.peer_id):
                    self._announce()
                self._read_registry()
            elif seen != (changed_at, changed_at):
                self._read_registry()
            seen = (seen[1], changed_at)
            fast = now - started_at < limits.REGISTRY_POLL_FAST_S
            await trio.sleep(limits.REGISTRY_POLL_S if fast else limits.REGISTRY_POLL_SLOW_S)

    def _read_registry(self) -> None:
        present = set()
        for entry in self._registry.read_all():
            ours = self._mesh_tag in entry.mesh_tags
            if ours:
                present.add(entry.peer_id)
            known = any(tag in entry.mesh_tags for tag in self._host_tags)
            if known or (self._any_node and entry.role == "node"):
                fresh = entry.peer_id not in self._on_host
                self._take(Hint(entry.peer_id, entry.addresses, HOST, same_host=True, fresh=fresh, role=entry.role))
        self._on_host = present

    # --- The cache ------------------------------------------------------------------------------

    async def _keep_cache(self) -> None:
        while True:
            await self._connected_once.wait()
            await trio.sleep(limits.PEER_CACHE_WRITE_DELAY_S)
            self._connected_once = trio.Event()
            self._save_cache()

    def _save_cache(self) -> None:
        now, wall_time = trio.current_time(), self._clock.wall_time()
        seen = []
        # What the directory has given up, and then what it is about to.
        unreachable = {peer_id for peer_id in self._cached if self._directory.get(peer_id) is None}
        for contact in self._directory.contacts():
            if contact.refusals or (not contact.ever_connected and contact.failures):
                unreachable.add(contact.peer_id)
            elif contact.ever_connected and contact.places and contact.source != HOST:
                # Those of this host's registry are found there again, if they live.
                age_s = 0.0 if contact.connected else now - contact.last_heard_at
                addresses = contact.dial_addresses()
                seen.append(CachedPeer(peer_id=contact.peer_id, addresses=addresses, seen_at=wall_time - age_s))
        if seen or unreachable:
            self._cache.save(seen, unreachable=frozenset(unreachable))
