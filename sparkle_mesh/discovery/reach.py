"""The runner of all that goes beyond the local network: bootstrap peers, the public DHT, relays, tests of itself.

What it finds goes to ``heard``; where this process can be reached, to the fabric, which tells it to everybody who asks
for addresses. Nothing here is needed on a local network, and all of it keeps trying while there is no other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_ENTROPY, Entropy
from sparkle_mesh.discovery.bootstrap import ResolveTxt, resolve_txt
from sparkle_mesh.discovery.infrastructure import Infrastructure
from sparkle_mesh.discovery.port_mapping import PortMapper
from sparkle_mesh.discovery.public_dht import PublicDht
from sparkle_mesh.discovery.public_peers import PublicPeers
from sparkle_mesh.discovery.reachability import Reachability
from sparkle_mesh.discovery.relays import RelayKeeper
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.circuits import is_circuit
from sparkle_mesh.fabric.interface import Address, PeerConnected, PeerId
from sparkle_mesh.fabric.networks import is_local_address
from sparkle_mesh.fabric.relay_book import RelayLimits
from sparkle_mesh.wire import PeerAddress

if TYPE_CHECKING:
    from sparkle_mesh.fabric.libp2p_fabric import Libp2pFabric
    from sparkle_mesh.fabric.relay_service import RelayService

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReachConfig:
    """What a process does beyond its local network.

    Attributes
    ----------
    bootstrap
        Addresses and names of peers to begin with; see :mod:`.bootstrap`.
    relay
        What this process lends as a relay, once others can dial it; None for nothing.
    port_mapping
        Whether to ask the router to pass connections on.
    reachability
        What the owner says of it, ``"public"`` or ``"private"``; None to find out.
    """

    bootstrap: tuple[str, ...] = ()
    relay: RelayLimits | None = None
    port_mapping: bool = False
    reachability: str | None = None


class ReachService:
    """Reaches others beyond the local network, and is reached.

    Parameters
    ----------
    public_peers
        Told of whom this is connected to for what they serve.
    meeting_key
        32 bytes under which the mesh's peers meet in the public DHT.
    is_of_mesh
        Whether a connected peer has proven that it is of the mesh.
    introduce
        Told of a bootstrap peer that speaks ``mesh_protocol``, and so may be of the mesh.
    heard
        Takes a peer, where it is said to listen, and ``"dht"``.
    moved
        Called when this process can be reached elsewhere than before.
    """

    def __init__(
        self,
        fabric: Libp2pFabric,
        config: ReachConfig,
        *,
        public_peers: PublicPeers,
        meeting_key: bytes,
        mesh_protocol: str,
        is_of_mesh: Callable[[PeerId], bool],
        introduce: Callable[[PeerId], object],
        heard: Callable[[PeerId, Sequence[Address], str], object],
        moved: Callable[[], object],
        resolve: ResolveTxt = resolve_txt,
        entropy: Entropy = SYSTEM_ENTROPY,
    ) -> None:
        self._fabric, self._config, self._public_peers, self._entropy = fabric, config, public_peers, entropy
        self._meeting_key = meeting_key
        self._mesh_protocol, self._is_of_mesh, self._introduce = mesh_protocol, is_of_mesh, introduce
        self._heard, self._moved = heard, moved
        self._reachability = Reachability(config.reachability)
        self._infrastructure = Infrastructure(
            fabric,
            config.bootstrap,
            public_peers=public_peers,
            connected=self.look_at,
            resolve=resolve,
            entropy=entropy,
        )
        self._dht = PublicDht(fabric, fabric.reach.kad, roots=self._infrastructure.connected, public_peers=public_peers)
        self._relays = RelayKeeper(
            fabric,
            fabric.reach.relays,
            is_wanted=lambda: self._reachability.verdict() == "private",
            changed=partial(self._advertise, "relays"),
        )
        self._mapper = PortMapper(entropy=entropy)
        self._relaying: RelayService | None = None
        self._nursery: trio.Nursery | None = None
        self._asked_at: dict[PeerId, float] = {}
        # Connected peers that have dialed this process; and where others see its port, by a connection from there.
        self._inbound: set[PeerId] = set()
        self._seen_by: dict[PeerId, Address | None] = {}
        self._test_now, self._meet_now = trio.Event(), trio.Event()
        self._met = "not yet"

    # --- What it knows --------------------------------------------------------------------------

    def needs(self, peer_id: PeerId) -> bool:
        """Whether ``peer_id`` is a relay of this process, or has it as its relay."""
        relaying = self._relaying
        if relaying is not None and relaying.book.has_reservation(peer_id, trio.current_time()):
            return True
        return self._relays.has_place_at(peer_id)

    def status(self) -> tuple[str, ...]:
        """Say for people what it does, one line each."""
        puncher = self._fabric.reach.puncher
        relaying = "off" if self._config.relay is None else "not while nobody can dial this process"
        lines = [
            f"bootstrap peers: {self._infrastructure.status()}",
            f"public DHT: {self._met if self._config.bootstrap else 'off'}",
            f"reachability: {self._reachability.verdict()}; relays: {self._relays.status()}",
            f"relay for others: {self._relaying.status() if self._relaying is not None else relaying}",
        ]
        if puncher.succeeded_count or puncher.failed_count:
            lines.append(f"hole punching: {puncher.succeeded_count} succeeded, {puncher.failed_count} failed")
        if self._config.port_mapping:
            lines.append(f"port mapping: {self._mapper.status()}")
        return tuple(lines)

    # --- Running --------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do all that until cancelled."""
        async with self._fabric.events() as events, trio.open_nursery() as nursery:
            self._nursery = nursery
            self._fabric.reach.serve_dial_backs()
            self._reachability.listens(self._listening())
            self._weigh()
            nursery.start_soon(self._infrastructure.run)
            nursery.start_soon(self._relays.run)
            nursery.start_soon(self._test_forever)
            if self._config.bootstrap:
                nursery.start_soon(self._meet_forever)
            if self._config.port_mapping:
                nursery.start_soon(self._mapper.run, self._port, self._mapped)
            task_status.started()
            try:
                async for event in events:
                    if isinstance(event, PeerConnected):
                        self._came(event)
                    else:
                        self._went(event.peer_id)
                    self._relays.look()
            finally:
                self._nursery = None

    def _came(self, event: PeerConnected) -> None:
        address = event.remote_address
        if not event.outbound:
            self._inbound.add(event.peer_id)
        punched = event.peer_id in self._fabric.reach.puncher.tried
        if address is None or event.outbound or punched or is_circuit(address) or is_local_address(address):
            return
        # Nothing shows better that this process can be dialed.
        self._reachability.dialed_back(event.peer_id, True, trio.current_time())
        self._weigh()

    def _went(self, peer_id: PeerId) -> None:
        self._asked_at.pop(peer_id, None)
        self._inbound.discard(peer_id)
        self._seen_by.pop(peer_id, None)
        if self._relaying is not None:
            self._relaying.book.gone(peer_id)

    def _listening(self) -> list[Address]:
        return [address for address in self._fabric.addresses if address not in self._fabric.reach.advertised()]

    def _port(self) -> int | None:
        """Return the port that a router is to pass on; None if others need no router to reach this process."""
        listening = [address for address in self._listening() if "/ip4/" in address and "/127." not in address]
        has_own = any(not is_local_address(address) for address in listening)
        if not listening or has_own or self._config.reachability is not None:
            return None
        return int(listening[0].rpartition("/")[2])

    def look_at(self, peer_id: PeerId) -> None:
        """Ask ``peer_id``, which is connected, what it serves and what it sees of this process."""
        if self._nursery is not None and peer_id not in self._asked_at:
            self._asked_at[peer_id] = trio.current_time()
            self._nursery.start_soon(self._look_at, peer_id)

    def admitted(self, peer_id: PeerId) -> None:
        """``peer_id`` has proven that it is of the mesh."""
        if not is_local_address(self._fabric.remote_address(peer_id)):
            self.look_at(peer_id)

    async def _test_forever(self) -> None:
        """Ask connected peers beyond the local network, each again after a while."""
        while True:
            self._test_now = trio.Event()
            with trio.move_on_after(limits.REACH_LOOK_S * self._entropy.uniform(0.75, 1.25)):
                await self._test_now.wait()
            self._reachability.listens(self._listening())
            now = trio.current_time()
            # Who becomes a relay does not say so by itself.
            age_s = limits.REACH_LOOK_S if self._relays.are_missing() else limits.REACH_TEST_S
            self._asked_at = {p: at for p, at in self._asked_at.items() if now - at < age_s}
            room = limits.REACH_OBSERVERS_MAX_COUNT - len(self._asked_at)
            observers = [peer_id for peer_id in self._fabric.connected_peers() if self._is_observer(peer_id)]
            for peer_id in [peer_id for peer_id in observers if peer_id not in self._asked_at][: max(room, 0)]:
                self.look_at(peer_id)
            self._weigh()

    def _is_observer(self, peer_id: PeerId) -> bool:
        """Whether ``peer_id`` is beyond the local network, and there to be asked."""
        known = peer_id in self._public_peers or self._is_of_mesh(peer_id)
        return known and not is_local_address(self._fabric.remote_address(peer_id))

    async def _look_at(self, peer_id: PeerId) -> None:
        # They load py-libp2p, as the fabric has by now.
        from sparkle_mesh.fabric.observers import AUTONAT_PROTOCOL, ask_identity, ask_to_dial_back
        from sparkle_mesh.fabric.relay_service import HOP_PROTOCOL

        remote_address = self._fabric.remote_address(peer_id) or ""
        try:
            report = await ask_identity(self._fabric, peer_id)
            if peer_id in self._public_peers and self._mesh_protocol in report.protocols:
                self._introduce(peer_id)
            if HOP_PROTOCOL in report.protocols and not is_circuit(remote_address):
                self._relays.found(peer_id, of_mesh=self._is_of_mesh(peer_id))
            if is_local_address(remote_address) or is_circuit(remote_address):
                return
            await self._note_where_seen(peer_id, remote_address, report.seen_at)
            # A dial back that is swallowed takes long.
            self._weigh()
            candidates = self._reachability.candidates()
            if AUTONAT_PROTOCOL in report.protocols and candidates and self._config.reachability is None:
                reached = await ask_to_dial_back(self._fabric, peer_id, candidates)
                if reached != "unknown":
                    self._reachability.dialed_back(peer_id, reached == "yes", trio.current_time())
        except SparkleError as error:
            logger.debug("peer %s says nothing of this process: %s", peer_id, error)
        self._weigh()

    async def _note_where_seen(self, peer_id: PeerId, remote_address: Address, seen_at: Address | None) -> None:
        """Note where ``peer_id`` sees this process's port, for which a connection from that very port is needed."""
        if peer_id not in self._inbound and not self._fabric.reach.is_from_port(peer_id):
            if peer_id not in self._seen_by:
                # Once: the connection stays.
                self._seen_by[peer_id] = None
                self._seen_by[peer_id] = await self._fabric.reach.ask_where_seen(peer_id, remote_address)
            seen_at = self._seen_by[peer_id]
        if seen_at is not None and not is_local_address(seen_at):
            self._reachability.seen(peer_id, seen_at, trio.current_time())

    # --- What follows from it -------------------------------------------------------------------

    def _weigh(self) -> None:
        """Do what follows from what is known of this process's reachability."""
        reach = self._fabric.reach
        reach.seen_at = self._reachability.seen_at()
        verdict = self._reachability.verdict()
        self._advertise("public", self._reachability.advertised())
        if verdict == "private":
            self._relays.look()
        if verdict == "public" and self._config.relay is not None and self._relaying is None:
            from sparkle_mesh.fabric.relay_service import RelayService

            logger.info("others can dial this process: it is a relay for the mesh's peers now")
            self._relaying = RelayService(self._fabric, self._config.relay, may_use=self._is_of_mesh)
            self._relaying.start()

    def _mapped(self, address: Address | None) -> None:
        self._reachability.mapped(address)
        # Those who could not dial this process before may be able to now.
        self._asked_at.clear()
        self._test_now.set()

    def _advertise(self, source: str, addresses: tuple[Address, ...]) -> None:
        if self._fabric.reach.advertise(source, addresses):
            logger.info("this process can be reached at: %s", ", ".join(addresses) or "nothing but its own addresses")
            self._meet_now.set()
            self._moved()

    # --- The public DHT -------------------------------------------------------------------------

    async def _meet_forever(self) -> None:
        from sparkle_mesh.fabric.kad_client import provider_key

        key = provider_key(self._meeting_key)
        pause_s = limits.PUBLIC_DHT_MEET_MIN_S
        while True:
            self._meet_now = trio.Event()
            if self._infrastructure.connected():
                found: set[PeerId] = set()
                answered, told = await self._dht.meet(key, self._addresses_to_tell(), partial(self._found, found))
                self._met = f"{len(found)} peers found, {answered} peers asked, {told} told"
                pause_s = min(pause_s * 2, limits.PUBLIC_DHT_MEET_MAX_S)
            else:
                pause_s = limits.PUBLIC_DHT_MEET_MIN_S
            with trio.move_on_after(pause_s * self._entropy.uniform(0.75, 1.25)):
                await self._meet_now.wait()
                # Addresses come one after the other.
                await trio.sleep(limits.REACH_SETTLE_S)
                pause_s = limits.PUBLIC_DHT_MEET_MIN_S

    def _found(self, found: set[PeerId], peer: PeerAddress) -> None:
        found.add(peer.peer_id)
        self._heard(peer.peer_id, peer.addresses, "dht")

    def _addresses_to_tell(self) -> list[Address]:
        """Return where others can reach this process: those of its local network only if the DHT is there as well."""
        addresses = self._fabric.addresses[: limits.ADDRESSES_PER_PEER_MAX_COUNT]
        beyond = [address for address in addresses if is_circuit(address) or not is_local_address(address)]
        roots = self._infrastructure.connected()
        local = all(is_local_address(self._fabric.remote_address(root.peer_id)) for root in roots)
        return list(addresses) if local else beyond
