"""One process's presence in a mesh: fabric, discovery, membership and capabilities run together.

``sparkle-node`` is this with the role ``node``; a training process is this with the role ``trainer`` plus
links and collectives (:mod:`sparkle_mesh.mesh`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import trio

from sparkle_mesh import limits
from sparkle_mesh.capabilities.search import DeviceQuery, FoundDevice
from sparkle_mesh.capabilities.service import CapabilityService
from sparkle_mesh.clock import SYSTEM_CLOCK, SYSTEM_ENTROPY, Clock, Entropy
from sparkle_mesh.devices.detect import DeviceInfo, detect_devices
from sparkle_mesh.devices.kept_profiles import with_gflops
from sparkle_mesh.discovery.public_peers import PublicPeers
from sparkle_mesh.discovery.reach import ReachConfig, ReachService
from sparkle_mesh.discovery.service import DiscoveryService
from sparkle_mesh.environment import IDENTITY_NAME, host_id
from sparkle_mesh.errors import UsageError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import Fabric, PeerId
from sparkle_mesh.fabric.libp2p_fabric import Libp2pFabric, open_libp2p_fabric
from sparkle_mesh.membership.certificates import Certifier
from sparkle_mesh.membership.channel import PeerChannel
from sparkle_mesh.membership.events import MembershipEvent, PeerAdmitted, PeerGone, PeerRefused, ViewChanged
from sparkle_mesh.membership.invite import Invite, is_invite
from sparkle_mesh.membership.keys import MeshKey, MeshSecrets
from sparkle_mesh.membership.messages import PROTOCOL, Role
from sparkle_mesh.membership.presence import PresenceService
from sparkle_mesh.membership.revocation_file import RevocationFile
from sparkle_mesh.membership.service import MembershipService
from sparkle_mesh.membership.view import View
from sparkle_mesh.nurseries import bare_errors
from sparkle_mesh.status import NodeStatus, PeerStatus, RevocationStatus, ViewStatus
from sparkle_mesh.version import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerJoined:
    """A peer proved that it is of this mesh."""

    peer: PeerStatus


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """A peer left, died or fell silent."""

    peer_id: PeerId
    reason: str


NodeEvent: TypeAlias = PeerJoined | PeerLeft | PeerRefused | ViewChanged


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeConfig:
    """How a process takes part in a mesh.

    Attributes
    ----------
    mesh, key
        The mesh's name, and its key if it has one.
    public
        Whether a mesh without a key is open beyond this host and its local networks.
    allow
        If there are any, only these peers are admitted, and those that they have certified as of their machine; this
        machine's own always are.
    founder
        The peer id of the node that may revoke peers; None if the data directory is to say, or an invite in ``join``.
    role
        ``"node"`` watches and helps others to meet; ``"trainer"`` becomes a member of views.
    listen
        Multiaddrs to listen on.
    join
        Addresses with ``/p2p/…`` tails, or invites to this same mesh.
    known
        Addresses likewise, of peers that were there lately: tried, and not missed.
    data_dir
        Where things are kept; see :func:`sparkle_mesh.environment.resolve_data_dir`.
    lan
        Whether to look for peers by multicast on the local networks.
    min_peers
        How large a first view must be for this process, itself included (trainers only).
    max_silence_s
        For how long a member may be silent at most before this process suspects it.
    settle_s
        How long those who want to form a mesh must have been the same before this process proposes it.
    reach
        What it does beyond the local network.
    """

    mesh: str
    key: MeshKey | None = None
    public: bool = False
    allow: tuple[PeerId, ...] = ()
    founder: PeerId | None = None
    role: Role = "node"
    identity: Identity
    listen: tuple[str, ...]
    join: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    data_dir: Path
    lan: bool = True
    min_peers: int = 1
    max_silence_s: float = limits.SUSPICION_CEILING_S
    settle_s: float = limits.VIEW_SETTLE_S
    reach: ReachConfig = field(default_factory=ReachConfig)
    entropy: Entropy = field(default=SYSTEM_ENTROPY, repr=False)
    clock: Clock = field(default=SYSTEM_CLOCK, repr=False)


def founder_of(founder: PeerId | None, join: tuple[str, ...]) -> PeerId | None:
    """Return the founder that is named, or that an invite names; None if none does.

    Raises
    ------
    UsageError
        If two are named.
    """
    invites = [Invite.decode(item) for item in join if is_invite(item)]
    named = {founder, *(invite.founder for invite in invites)} - {None}
    if len(named) > 1:
        raise UsageError(f"{len(named)} founders are named, and a mesh has one: {', '.join(sorted(map(str, named)))}")
    return next(iter(named), None)


def join_addresses(join: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``join`` with each invite replaced by the addresses it holds."""
    addresses: list[str] = []
    for item in join:
        addresses.extend(Invite.decode(item).addresses if is_invite(item) else (item,))
    return tuple(addresses)


class MeshNode:
    """A running node; made by :func:`open_node`. All methods are for its own trio run."""

    def __init__(self, config: NodeConfig, fabric: Fabric) -> None:
        self.config = config
        self.fabric = fabric
        self.secrets = MeshSecrets(config.mesh, config.key)
        self._host_id = host_id()
        incarnation = config.entropy.token(16)
        public_peers = PublicPeers()
        self.discovery = DiscoveryService(
            fabric,
            mesh_tag=self.secrets.tag,
            name_tag=self.secrets.name_tag,
            role=config.role,
            data_dir=config.data_dir,
            join=join_addresses(config.join),
            known=config.known,
            lan=config.lan,
            public_peers=public_peers,
            is_needed=self._needs,
            let_go=self._spare,
            entropy=config.entropy,
        )
        self._revocation_file = RevocationFile(config.data_dir, self.secrets.tag, entropy=config.entropy)
        self.revocations = self._revocation_file.load(founder_of(config.founder, config.join))
        certifier = (
            Certifier(config.data_dir / IDENTITY_NAME, fabric.peer_id, self.secrets.tag, entropy=config.entropy)
            if config.role == "trainer"
            else None
        )
        self.membership = MembershipService(
            fabric,
            self.secrets,
            role=config.role,
            host_id=self._host_id,
            incarnation=incarnation,
            min_peers=config.min_peers,
            public=config.public,
            max_silence_s=config.max_silence_s,
            settle_s=config.settle_s,
            software=f"sparkle-mesh {__version__}",
            allow=config.allow,
            revocations=self.revocations,
            revocations_changed=self._pass_revocations_on,
            certifier=certifier,
            heard=self.discovery.heard,
            is_there=lambda peer_id: self.capabilities.is_there(peer_id),
            public_peers=public_peers,
            entropy=config.entropy,
        )
        self.capabilities = CapabilityService(
            fabric,
            config.identity,
            self.secrets,
            host_id=self._host_id,
            role=config.role,
            software=f"sparkle-mesh {__version__}",
            heard=self.discovery.heard,
            used=self.discovery.used,
            offended=self.membership.offended,
            welcome=self.membership.is_welcome,
            entropy=config.entropy,
            clock=config.clock,
        )
        self._presence = PresenceService(
            fabric,
            self.secrets,
            role=config.role,
            incarnation=incarnation,
            heard=self.discovery.heard,
            revoked=self._take_revocations,
            entropy=config.entropy,
        )
        self._reach = self._make_reach(fabric, public_peers) if isinstance(fabric, Libp2pFabric) else None
        self._started_at = config.clock.now()
        self._devices: tuple[DeviceInfo, ...] = ()

    def _make_reach(self, fabric: Libp2pFabric, public_peers: PublicPeers) -> ReachService:
        return ReachService(
            fabric,
            self.config.reach,
            public_peers=public_peers,
            meeting_key=self.secrets.meeting_key,
            mesh_protocol=PROTOCOL,
            is_of_mesh=self.membership.is_admitted,
            introduce=self.membership.introduce,
            heard=self.discovery.heard,
            moved=self._moved,
            entropy=self.config.entropy,
        )

    @property
    def peer_id(self) -> PeerId:
        """This process's peer id."""
        return self.fabric.peer_id

    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        """The machine's devices; none before they are known, a moment after the start."""
        return self._devices

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled."""
        self._keep_revocations()
        if self.config.role == "node":
            await self._offer_devices()
        with self.membership.events() as events:
            async with trio.open_nursery() as nursery:
                if self.config.role != "node":
                    # Its user waits for the mesh, not for a driver to answer.
                    nursery.start_soon(self._offer_devices)
                if self.revocations.founder == self.config.identity.peer_id:
                    nursery.start_soon(self._repeat_revocations)
                await nursery.start(self.capabilities.run)
                await nursery.start(self.membership.run)
                await nursery.start(self._presence.run)
                await nursery.start(self.discovery.run)
                if self._reach is not None:
                    await nursery.start(self._reach.run)
                if self.config.role == "trainer":
                    nursery.start_soon(self._look_for_trainers)
                task_status.started()
                async for event in events:
                    self._follow(event)
                nursery.cancel_scope.cancel()

    def _follow(self, event: MembershipEvent) -> None:
        """Tell the other services what membership tells."""
        match event:
            case PeerRefused(peer_id, reason):
                self.discovery.refused(peer_id, reason)
            case PeerAdmitted(peer_id, introduction):
                role, addresses = introduction.role, introduction.addresses
                self.discovery.admitted(peer_id, role, same_host=introduction.host_id == self._host_id)
                self.capabilities.admitted(peer_id, addresses, role)
                self._presence.met(peer_id, addresses, role)
                if self._reach is not None:
                    self._reach.admitted(peer_id)
            case PeerGone(peer_id, stays=True):
                self.discovery.spared(peer_id)
            case PeerGone(peer_id, _, graceful):
                self.capabilities.gone(peer_id, for_good=graceful)
                self._presence.gone(peer_id)

    def _moved(self) -> None:
        self._presence.moved()
        self.membership.moved()

    def _needs(self, peer_id: PeerId) -> bool:
        return self._reach is not None and self._reach.needs(peer_id)

    def _spare(self, peer_id: PeerId) -> None:
        self.membership.spare(peer_id)

    async def _look_for_trainers(self) -> None:
        """Find the trainers that no news tell of, in the DHT: soon at first, then now and then."""
        pause_s = limits.TRAINERS_LOOK_MIN_S
        while True:
            await trio.sleep(pause_s * self.config.entropy.uniform(0.75, 1.25))
            pause_s = min(2 * pause_s, limits.TRAINERS_LOOK_MAX_S)
            for trainer in await self.capabilities.find_trainers():
                self.discovery.heard(trainer.peer_id, trainer.addresses, "exchange", "trainer")

    async def _offer_devices(self) -> None:
        self._devices = await trio.to_thread.run_sync(lambda: with_gflops(detect_devices(), self.config.data_dir))
        self.capabilities.offer(self._devices)

    def revoke(self, peer_id: PeerId) -> RevocationStatus:
        """Throw ``peer_id`` out of the mesh for good, and what it certifies; only the founder's node may.

        Raises
        ------
        UsageError
            If this is not the founder's node, ``peer_id`` is none or the founder's, or it could not be written down.
        """
        encoded = self.revocations.revoking(self.config.identity, peer_id)
        self.membership.take_revocations(encoded)
        self._presence.revoke(encoded)
        # The next list must have a higher number than this one, after a restart as well.
        self._revocation_file.save(self.revocations)
        return RevocationStatus(sequence=self.revocations.sequence, revoked=tuple(sorted(self.revocations.revoked)))

    def _take_revocations(self, encoded: bytes) -> None:
        if self.membership.take_revocations(encoded):
            self._keep_revocations()

    def _pass_revocations_on(self) -> None:
        """A list that came with an introduction may be news to those that were not connected to its teller."""
        assert self.revocations.encoded is not None
        self._presence.revoke(self.revocations.encoded)
        self._keep_revocations()

    async def _repeat_revocations(self) -> None:
        """News over gossip may get lost, and members that stay connected do not introduce themselves again."""
        while True:
            await trio.sleep(limits.REVOCATIONS_RENEW_S)
            if self.revocations.encoded is not None:
                self._presence.revoke(self.revocations.encoded)

    def _keep_revocations(self) -> None:
        try:
            self._revocation_file.save(self.revocations)
        except UsageError as error:
            logger.warning("revoked peers are not kept for the next start: %s", error)

    async def leave(self) -> None:
        """Tell the others that this process leaves, and wait until they know."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.capabilities.leave)
            nursery.start_soon(self.membership.leave)

    async def find_devices(
        self, query: DeviceQuery, *, timeout_s: float = limits.LOOKUP_TIMEOUT_S
    ) -> list[FoundDevice]:
        """Return the devices of the mesh that fit; see :meth:`.service.CapabilityService.find_devices`."""
        return await self.capabilities.find_devices(query, timeout_s=timeout_s)

    def status(self) -> NodeStatus:
        """Return what this node is and knows, for people and programs."""
        view = self.membership.view
        return NodeStatus(
            peer_id=self.peer_id,
            addresses=tuple(self.fabric.addresses),
            mesh=self.config.mesh,
            keyed=self.secrets.keyed,
            public=self.config.public,
            allowed_count=len(self.config.allow),
            founder=self.revocations.founder,
            revoked_count=len(self.revocations.revoked),
            role=self.config.role,
            version=__version__,
            pid=os.getpid(),
            uptime_s=self.config.clock.now() - self._started_at,
            devices=self._devices,
            peer_count=len(self.membership.channels),
            view=_view_status(view) if view is not None else None,
            discovery=(*self.discovery.status(), *(self._reach.status() if self._reach is not None else ())),
        )

    def peers(self) -> list[PeerStatus]:
        """Return the admitted peers, by peer id."""
        channels = self.membership.channels
        return [self._peer_status(channels[peer_id]) for peer_id in sorted(channels)]

    def invite(self) -> str:
        """Return one line of text with which others can join this mesh."""
        tail = f"/p2p/{self.peer_id}"
        addresses = tuple(address + tail for address in self.fabric.addresses)
        return Invite(
            name=self.config.mesh,
            key=self.config.key,
            addresses=addresses[: limits.INVITE_ADDRESSES_MAX_COUNT],
            founder=self.revocations.founder,
        ).encode()

    @contextmanager
    def events(self) -> Iterator[AsyncIterator[NodeEvent]]:
        """Subscribe to peers coming and going, refusals and views."""
        with self.membership.events() as events:
            yield _NodeEvents(self, events)

    def _peer_status(self, channel: PeerChannel) -> PeerStatus:
        view = self.membership.view
        return PeerStatus(
            peer_id=channel.peer_id,
            role=channel.introduction.role,
            machine=channel.machine,
            addresses=channel.introduction.addresses,
            connected_at=self.fabric.remote_address(channel.peer_id),
            connected_s=trio.current_time() - channel.admitted_at,
            latency_ms=None if channel.latency_s is None else channel.latency_s * 1e3,
            rank=view.rank_of(channel.introduction.member) if view is not None else None,
            admitted=True,
        )


class _NodeEvents:
    """Membership's events in the words of :data:`NodeEvent`."""

    def __init__(self, node: MeshNode, events: trio.MemoryReceiveChannel[MembershipEvent]) -> None:
        self._node, self._events = node, events

    def __aiter__(self) -> _NodeEvents:
        return self

    async def __anext__(self) -> NodeEvent:
        while True:
            try:
                event = await self._events.receive()
            except trio.EndOfChannel:
                raise StopAsyncIteration from None
            match event:
                case PeerAdmitted(peer_id, _):
                    channel = self._node.membership.channels.get(peer_id)
                    if channel is not None:
                        return PeerJoined(self._node._peer_status(channel))
                case PeerGone(peer_id, reason, _):
                    return PeerLeft(peer_id, reason)
                case PeerRefused() | ViewChanged():
                    return event


def _view_status(view: View) -> ViewStatus:
    return ViewStatus(
        epoch=view.epoch,
        lineage_hex=view.lineage.hex(),
        size=view.size,
        members=tuple(member.peer_id for member in view.members),
    )


@asynccontextmanager
async def open_node(config: NodeConfig) -> AsyncIterator[MeshNode]:
    """Run a node until the block ends; it leaves the mesh gracefully then.

    Raises
    ------
    UsageError
        If an address to listen on or to join cannot be used; the message says which and why.
    """
    with bare_errors():
        async with open_libp2p_fabric(config.identity, listen=config.listen) as fabric:
            node = MeshNode(config, fabric)
            async with trio.open_nursery() as nursery:
                await nursery.start(node.run)
                try:
                    yield node
                finally:
                    await node.leave()
                    nursery.cancel_scope.cancel()
