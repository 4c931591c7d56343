"""The runner of membership: streams to the peers of a mesh, the proof on each, and the formation machine.

Of two connected peers the one with the smaller id opens the stream ``/sparkle/mesh/1``; it lives as long as
both do. Its end is immediate evidence that the peer is gone, and so is a silence longer than
``limits.SUSPICION_FLOOR_S``, or what is usual for it (every ``limits.PING_INTERVAL_S`` each side pings). Nothing here
decides: the machines of :mod:`.proof`, :mod:`.formation` and :mod:`.view_change` do.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Container, Sequence

import msgspec
import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_ENTROPY, Entropy
from sparkle_mesh.errors import ClosedError, ProtocolError, SparkleError, UnreachableError, VersionError, WrongKeyError
from sparkle_mesh.fabric.interface import Address, Fabric, FabricStream, PeerConnected, PeerId
from sparkle_mesh.membership.certificates import Certifier
from sparkle_mesh.membership.channel import PeerChannel
from sparkle_mesh.membership.door import Door
from sparkle_mesh.membership.events import PeerAdmitted, PeerGone, PeerRefused
from sparkle_mesh.membership.exchange import name_others
from sparkle_mesh.membership.formation import Candidate
from sparkle_mesh.membership.greeting import introduce, open_mesh_stream, prove
from sparkle_mesh.membership.heartbeat import Heartbeat
from sparkle_mesh.membership.keys import MeshSecrets
from sparkle_mesh.membership.messages import (
    PROTOCOL,
    Accept,
    Accepted,
    Chosen,
    Declined,
    Introduction,
    Leave,
    Leaving,
    Meeting,
    Merger,
    PeerExchange,
    Ping,
    Pong,
    Prepare,
    Promise,
    Refused,
    Role,
)
from sparkle_mesh.membership.proof import AnswererProof, Fail, Instruction, OpenerProof, Say
from sparkle_mesh.membership.revocations import RevocationList
from sparkle_mesh.membership.stranger_watch import StrangerWatch
from sparkle_mesh.membership.strangers import Strangers
from sparkle_mesh.membership.view import Member, View
from sparkle_mesh.membership.views import MembershipViews
from sparkle_mesh.wire import PeerAddress

logger = logging.getLogger(__name__)


class MembershipService(MembershipViews):
    """Knows who is in the mesh.

    Parameters
    ----------
    fabric
        The control plane; this serves ``/sparkle/mesh/1`` on it.
    role, min_peers, host_id, incarnation
        What this process tells of itself. ``min_peers`` counts this process.
    public
        Whether a mesh without a key admits peers from beyond this host and its local networks.
    max_silence_s
        For how long a member may be silent at most before it is suspected.
    settle_s
        How long those who want to form a mesh must have been the same before this process proposes it.
    allow
        If there are any, only these peers are admitted, and those that they have certified.
    revocations
        Whom the mesh's founder has thrown out.
    revocations_changed
        Called when a newer list has come from a peer.
    certifier
        Says which machine this process is of; None for a node, which is its machine's own.
    heard
        Called with ``(peer id, addresses, source, role)`` for peers that others tell of.
    public_peers
        Peers that are connected for what they serve to everybody: they are not asked for the mesh's proof, unless
        :meth:`introduce` says so.
    """

    def __init__(
        self,
        fabric: Fabric,
        secrets: MeshSecrets,
        *,
        role: Role,
        host_id: bytes,
        incarnation: bytes,
        min_peers: int = 1,
        public: bool = False,
        max_silence_s: float = limits.SUSPICION_CEILING_S,
        settle_s: float = limits.VIEW_SETTLE_S,
        software: str = "",
        allow: Collection[PeerId] = (),
        revocations: RevocationList | None = None,
        revocations_changed: Callable[[], object] = lambda: None,
        certifier: Certifier | None = None,
        heard: Callable[[PeerId, Sequence[Address], str, str], None],
        is_there: Callable[[PeerId], object] = lambda peer_id: None,
        public_peers: Container[PeerId] = (),
        entropy: Entropy = SYSTEM_ENTROPY,
    ) -> None:
        member = Member(peer_id=fabric.peer_id, incarnation=incarnation)
        candidate = Candidate(member, host_id, min_peers) if role == "trainer" else None
        super().__init__(secrets.mesh_id, member, candidate, settle_s)
        self._fabric = fabric
        self._secrets = secrets
        self._host_id, self._min_peers, self._software = host_id, min_peers, software
        self._revocations = RevocationList(secrets.tag) if revocations is None else revocations
        self._revocations_changed = revocations_changed
        self._door = Door(
            keyed=secrets.keyed, public=public, tag=secrets.tag, allow=allow, revocations=self._revocations
        )
        self._certifier = certifier
        self._strangers = StrangerWatch(
            fabric, is_admitted=self.is_admitted, refused=self._refuse_stranger, start_soon=self._start_soon
        )
        self._heard, self._is_there = heard, is_there
        self._public_peers = public_peers
        self._entropy = entropy
        self._opening: set[PeerId] = set()
        #: Streams on which the proof goes on.
        self._greeting: Counter[PeerId] = Counter()
        self._leaving = False
        self._heartbeat = Heartbeat(
            self._channels,
            entropy,
            is_node=role == "node",
            max_silence_s=max_silence_s,
            suspected=self.suspect,
            trusted=self.trust,
        )

    # --- What it knows --------------------------------------------------------------------------

    @property
    def view(self) -> View | None:
        """The view this process is in; for a node, one it watches."""
        if self._formation.view is None and self._role == "node":
            return self.view_elsewhere
        return self._formation.view

    @property
    def strangers(self) -> Strangers:
        """The connected peers that are not admitted; to be read only."""
        return self._strangers.strangers

    def is_welcome(self, peer_id: PeerId) -> bool:
        """Whether ``peer_id``, which is connected, is admitted or would be if it proved the key."""
        return peer_id in self._channels or self._reason_to_refuse(peer_id) is None

    # --- Running --------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        try:
            async with self._fabric.events() as connections, trio.open_nursery() as nursery:
                self._nursery = nursery
                self._fabric.handle(PROTOCOL, self._serve)
                nursery.start_soon(self._keep_time)
                nursery.start_soon(self._heartbeat.run)
                nursery.start_soon(self._strangers.run)
                task_status.started()
                try:
                    async for event in connections:
                        if event.peer_id in self._public_peers:
                            continue
                        self._strangers.note(event)
                        if isinstance(event, PeerConnected):
                            self.introduce(event.peer_id)
                finally:
                    # It takes no more tasks.
                    self._nursery = None
                    if self._succession is not None:
                        self._succession.stop()
                raise ClosedError("the fabric closed, or its events came faster than membership took them")
        finally:
            self._events.close()

    def introduce(self, peer_id: PeerId) -> None:
        """``peer_id``, which is connected, may be of the mesh: see to the proof, if it is this side's turn."""
        if self._nursery is not None and self._fabric.peer_id < peer_id:
            self._nursery.start_soon(self._open, peer_id)

    def moved(self) -> None:
        """Tell all peers where this process can be reached now."""
        addresses = tuple(self._fabric.addresses)[: limits.ADDRESSES_PER_PEER_MAX_COUNT]
        news = PeerExchange(peers=(PeerAddress(self._fabric.peer_id, addresses, self._role),))
        for channel in self._channels.values():
            channel.send(news)

    async def leave(self, reason: str = "", *, hurry: bool = False) -> None:
        """Say farewell to all peers and close their streams.

        The other members agree on a view without this process before, unless it is in a ``hurry``.
        """
        if self._leaving:
            return
        self._leaving = True
        with trio.CancelScope(shield=True):
            if self._succession is not None and not hurry:
                await self._leave_view(self._succession)
            async with trio.open_nursery() as nursery:
                for channel in list(self._channels.values()):
                    nursery.start_soon(self._farewell, channel, reason)

    def spare(self, peer_id: PeerId) -> None:
        """Let ``peer_id`` go, because there are enough others, of whom it is told if it was not of late."""
        channel = self._channels.get(peer_id)
        if channel is not None and not channel.stays and not self._leaving:
            channel.stays = channel.graceful = True
            channel.gone_reason = "there are enough others"
            name_others(channel, self._channels.values(), self._entropy, unless_told_s=limits.PEER_EXCHANGE_STALE_S)
            self._start_soon(self._farewell, channel, "it has enough peers", True)

    async def _farewell(self, channel: PeerChannel, reason: str, stays: bool = False) -> None:
        channel.send(Leave(reason=reason, stays=stays))
        await channel.finish()
        channel.drop("this process left")

    async def _keep_time(self) -> None:
        while True:
            times = [self._formation.next_wakeup()]
            if self._succession is not None:
                times += [self._succession.next_wakeup, self._meeting_due()]
            self._wake = trio.Event()
            with trio.move_on_at(min((time for time in times if time is not None), default=float("inf"))):
                await self._wake.wait()
            self._carry_out(self._formation.tick(now=trio.current_time()))
            if self._succession is not None:
                self._succession.tick()
                self._look_for_others()

    # --- Streams --------------------------------------------------------------------------------

    async def _open(self, peer_id: PeerId) -> None:
        if peer_id in self._opening or peer_id in self._channels or self._leaving:
            return
        banned = self._door.ban(peer_id, trio.current_time())
        if banned is not None:
            self._refuse_stranger(peer_id, banned.reason)
            return
        self._opening.add(peer_id)
        try:
            stream = await open_mesh_stream(self._fabric, peer_id)
        except UnreachableError as error:
            self._refuse_stranger(peer_id, str(error))
            return
        finally:
            self._opening.discard(peer_id)
        if stream is None:
            return
        nonce = self._entropy.token(32)
        proof = OpenerProof(self._secrets, me=self._fabric.peer_id, peer=peer_id, nonce=nonce)
        await self._greet_and_follow(stream, proof, self._refusal(peer_id) or proof.start())

    async def _serve(self, stream: FabricStream) -> None:
        nonce = self._entropy.token(32)
        proof = AnswererProof(self._secrets, me=self._fabric.peer_id, peer=stream.peer_id, nonce=nonce)
        await self._greet_and_follow(stream, proof, self._refusal(stream.peer_id))

    def _refusal(self, peer_id: PeerId) -> list[Instruction]:
        """Return how to refuse ``peer_id``; nothing if it may come in."""
        problem = self._reason_to_refuse(peer_id)
        return [] if problem is None else [Say(problem), Fail(ProtocolError(f"peer {peer_id}: {problem.reason}"))]

    def _reason_to_refuse(self, peer_id: PeerId) -> Refused | None:
        if self._leaving:
            return Refused(code="left", reason="this process has left the mesh")
        present = (self._fabric.remote_address(other) for other in self._channels if other != peer_id)
        return self._door.refusal(peer_id, self._fabric.remote_address(peer_id), present, trio.current_time())

    def offended(self, peer_id: PeerId) -> None:
        """``peer_id`` has broken a protocol of the mesh: who does so often is banned for a time, and let go."""
        banned = self._door.offended(peer_id, trio.current_time())
        if banned and peer_id in self._channels:
            self._channels[peer_id].drop("it broke the protocol too often")

    def take_revocations(self, encoded: bytes) -> bool:
        """Take a list of revoked peers that somebody tells: whoever it names is let go. Return whether it was news.

        Raises
        ------
        AuthenticationError, ProtocolError
            If no process that keeps to the protocol tells it.
        """
        if not self._revocations.take(encoded):
            return False
        logger.warning("revoked by the mesh's founder: %s", ", ".join(sorted(self._revocations.revoked)) or "nobody")
        own = self._fabric.peer_id if self._certifier is None else self._certifier.machine
        if own in self._revocations.revoked or self._fabric.peer_id in self._revocations.revoked:
            logger.error("this machine is revoked by the mesh's founder: nobody of the mesh lets it in any more")
        for channel in list(self._channels.values()):
            refused = self._door.revoked(channel.peer_id, channel.machine)
            if refused is not None:
                # It is not to come back: the others need not wait for that.
                channel.graceful, channel.gone_reason = True, refused.reason
                self._let_go(channel)
                self._start_soon(self._turn_out, channel, refused)
        return True

    async def _turn_out(self, channel: PeerChannel, refused: Refused) -> None:
        channel.send(refused)
        await channel.finish()
        channel.drop(refused.reason)
        self._refuse_stranger(channel.peer_id, refused.reason)

    async def _greet_and_follow(
        self, stream: FabricStream, proof: OpenerProof | AnswererProof, first: list[Instruction]
    ) -> None:
        """Prove, introduce, and follow the peer to the end; all that goes wrong with it ends here."""
        peer_id = stream.peer_id
        if self._greeting[peer_id] >= limits.MESH_STREAMS_PER_STRANGER_MAX_COUNT:
            # Nothing is told of it: whoever opens thousands shall not be told of thousands of times.
            logger.info("%s has %d streams of %s open and proves nothing", peer_id, self._greeting[peer_id], PROTOCOL)
            await stream.reset()
            return
        self._greeting[peer_id] += 1
        try:
            with trio.fail_after(limits.MESH_PROOF_TIMEOUT_S):
                channel = await self._greet(stream, proof, first)
            # Others may have come in since it was asked first: of those who prove it together, not all may fit.
            problem = self._reason_to_refuse(peer_id)
            if problem is not None:
                raise ProtocolError(f"peer {peer_id}: {problem.reason}")
        except (SparkleError, trio.TooSlowError) as error:
            wrong_key = isinstance(error, WrongKeyError)
            reason = str(error) or f"peer {peer_id} did not finish the proof in {limits.MESH_PROOF_TIMEOUT_S} s"
            level = logging.WARNING if isinstance(error, (WrongKeyError, VersionError)) else logging.INFO
            logger.log(level, "not admitted: %s", reason)
            self._events.send(PeerRefused(peer_id, reason, wrong_key=wrong_key))
            await stream.aclose()
            return
        finally:
            self._greeting[peer_id] -= 1
            if not self._greeting[peer_id]:
                del self._greeting[peer_id]
        await self._follow(channel)

    async def _greet(
        self, stream: FabricStream, proof: OpenerProof | AnswererProof, first: list[Instruction]
    ) -> PeerChannel:
        await prove(stream, proof, first)
        is_opener = isinstance(proof, OpenerProof)
        answer, machine = await introduce(stream, self._introduction(), is_opener=is_opener, judge=self._judge)
        return PeerChannel(stream, answer, now=trio.current_time(), machine=machine)

    def _judge(self, peer_id: PeerId, introduction: Introduction) -> PeerId | Refused | None:
        """Return of which machine ``peer_id`` shows to be, if it does; or why it may not come in."""
        try:
            if introduction.revocations is not None and self.take_revocations(introduction.revocations):
                self._revocations_changed()
        except ProtocolError as error:
            self.offended(peer_id)
            return Refused(code="duplicate", reason=str(error)[: limits.REASON_MAX_CHARS])
        own = self._fabric.peer_id if self._certifier is None else self._certifier.machine
        return self._door.introduced(peer_id, introduction, trio.current_time(), own=own)

    def _refuse_stranger(self, peer_id: PeerId, reason: str) -> None:
        self._events.send(PeerRefused(peer_id, reason, wrong_key=False))

    def _introduction(self) -> Introduction:
        return Introduction(
            role=self._role,
            member=self._member,
            host_id=self._host_id,
            min_peers=self._min_peers,
            addresses=tuple(self._fabric.addresses)[: limits.ADDRESSES_PER_PEER_MAX_COUNT],
            software=self._software,
            certificate=None if self._certifier is None else self._certifier.certificate(trio.current_time()),
            revocations=self._revocations.encoded,
        )

    async def _follow(self, channel: PeerChannel) -> None:
        """Hold the channel until its end, whatever that is."""
        peer_id = channel.peer_id
        previous = self._channels.get(peer_id)
        if previous is not None:
            previous.drop("it came again on a new stream")
            self._let_go(previous)
        self._channels[peer_id] = channel
        self._strangers.strangers.went(peer_id)
        try:
            with channel.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, channel)
                    self._welcome(channel)
                    await self._read(channel)
                    nursery.cancel_scope.cancel()
        finally:
            self._let_go(channel)
            await channel.finish()
            if self._channels.get(peer_id) is None:
                if peer_id in self._fabric.connected_peers():
                    # Should it be connected once more before this connection is gone, nobody would tell.
                    self._strangers.came(peer_id, self._fabric.remote_address(peer_id))
                with trio.move_on_after(limits.CLOSE_TIMEOUT_S) as scope:
                    scope.shield = True
                    await self._fabric.disconnect(peer_id)

    def _let_go(self, channel: PeerChannel) -> None:
        if self._channels.get(channel.peer_id) is not channel:
            return
        del self._channels[channel.peer_id]
        reason = channel.gone_reason or "its connection ended"
        logger.info("peer %s is gone: %s", channel.peer_id, reason)
        now = trio.current_time()
        self._carry_out(self._formation.candidate_went(channel.peer_id, now=now))
        if not self._leaving:
            self._start_soon(self._miss, channel.introduction.member, reason, channel.graceful)
        self._events.send(PeerGone(channel.peer_id, reason, channel.graceful, channel.stays))

    def _welcome(self, channel: PeerChannel) -> None:
        introduction, now = channel.introduction, trio.current_time()
        name_others(channel, self._channels.values(), self._entropy)
        self._heard(channel.peer_id, introduction.addresses, "introduction", introduction.role)
        self._events.send(PeerAdmitted(channel.peer_id, introduction))
        if introduction.role == "trainer":
            candidate = Candidate(introduction.member, introduction.host_id, introduction.min_peers)
            self._carry_out(self._formation.candidate_came(candidate, now=now))
            self._lost_before.pop(introduction.member, None)
            if self._succession is not None:
                self._succession.came(introduction.member)
                self._tell_of_merger(introduction.member)
        else:
            self._carry_out(self._formation.watcher_came(channel.peer_id, now=now))

    def _told_of(self, channel: PeerChannel, peer: PeerAddress) -> None:
        source = "exchange"
        if peer.peer_id == channel.peer_id:
            # It tells where it can be reached now.
            source = "introduction"
            channel.introduction = msgspec.structs.replace(channel.introduction, addresses=peer.addresses)
        self._heard(peer.peer_id, peer.addresses, source, peer.role)

    async def _write(self, channel: PeerChannel) -> None:
        try:
            await channel.write_all()
        except ClosedError as error:
            # What the peer said last, its farewell perhaps, is still to be read; the reader finds the end.
            logger.debug("cannot write to %s any more: %s", channel.peer_id, error)

    async def _read(self, channel: PeerChannel) -> None:
        while True:
            try:
                message = await channel.read()
            except ClosedError:
                return
            except ProtocolError as error:
                logger.warning("peer %s broke the protocol: %s", channel.peer_id, error)
                self.offended(channel.peer_id)
                channel.gone_reason = f"it broke the protocol: {error}"
                return
            self._heartbeat.heard(channel)
            self._is_there(channel.peer_id)
            match message:
                case Leave(reason=reason, stays=stays):
                    channel.graceful, channel.stays = True, stays
                    what = "it let this connection go" if stays else "it left the mesh"
                    channel.gone_reason = what + (f": {reason}" if reason else "")
                    return
                case Refused(reason=reason):
                    # The answerer has admitted the opener by the time that this one has seen its introduction.
                    channel.gone_reason = f"peer {channel.peer_id} refused: {reason}"
                    self._events.send(PeerRefused(channel.peer_id, channel.gone_reason, wrong_key=False))
                    return
                case Leaving():
                    if self._succession is not None:
                        self._succession.leaves(channel.introduction.member)
                        self._wake.set()
                case Ping(probe=probe):
                    channel.send(Pong(probe=probe))
                case Pong(probe=probe):
                    channel.ponged(probe, now=channel.last_heard)
                case PeerExchange(peers=peers):
                    for peer in peers:
                        self._told_of(channel, peer)
                case Prepare() | Promise() | Accept() | Accepted() | Declined() | Chosen():
                    self._agree(channel, message)
                case Meeting() | Merger():
                    self._meet(channel, message)
                case _:
                    self.offended(channel.peer_id)
                    channel.gone_reason = f"it broke the protocol: {type(message).__name__} out of place"
                    return
