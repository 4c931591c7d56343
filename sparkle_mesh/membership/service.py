"""The runner of membership: streams to the peers of a mesh, the proof on each, and the formation machine.

Of two connected peers the one with the smaller id opens the stream ``/sparkle/mesh/1``; it lives as long as
both do. Its end is immediate evidence that the peer is gone, and so is a silence longer than
``limits.SUSPICION_FLOOR_S``, or what is usual for it (every ``limits.PING_INTERVAL_S`` each side pings). Nothing here
decides: the machines of :mod:`.proof`, :mod:`.formation` and :mod:`.view_change` do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_ENTROPY, Entropy
from sparkle_mesh.errors import (
    ClosedError,
    ProtocolError,
    SparkleError,
    UnreachableError,
    VersionError,
    WrongKeyError,
)
from sparkle_mesh.fabric.framing import receive_message, send_message
from sparkle_mesh.fabric.interface import Address, Fabric, FabricStream, PeerConnected, PeerId
from sparkle_mesh.membership.channel import PeerChannel
from sparkle_mesh.membership.door import Door
from sparkle_mesh.membership.events import PeerAdmitted, PeerGone, PeerRefused, ViewChanged
from sparkle_mesh.membership.formation import Candidate
from sparkle_mesh.membership.heartbeat import Heartbeat
from sparkle_mesh.membership.keys import MeshSecrets
from sparkle_mesh.membership.messages import (
    PROTOCOL,
    Accept,
    Accepted,
    Chosen,
    Declined,
    Greeting,
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
from sparkle_mesh.membership.proof import AnswererProof, Fail, Instruction, OpenerProof, Proven, Say
from sparkle_mesh.membership.view import Member, View
from sparkle_mesh.membership.views import MembershipViews
from sparkle_mesh.wire import PeerAddress

logger = logging.getLogger(__name__)

__all__ = ["MembershipService", "PeerAdmitted", "PeerGone", "PeerRefused", "ViewChanged"]


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
    heard
        Called with ``(peer id, addresses, source, role)`` for peers that others tell of.
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
        heard: Callable[[PeerId, Sequence[Address], str, str], None],
        entropy: Entropy = SYSTEM_ENTROPY,
    ) -> None:
        member = Member(peer_id=fabric.peer_id, incarnation=incarnation)
        candidate = Candidate(member, host_id, min_peers) if role == "trainer" else None
        super().__init__(secrets.mesh_id, member, candidate, settle_s)
        self._fabric = fabric
        self._secrets = secrets
        self._host_id, self._min_peers, self._software = host_id, min_peers, software
        self._door = Door(keyed=secrets.keyed, public=public)
        self._heard = heard
        self._entropy = entropy
        self._opening: set[PeerId] = set()
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
    def member(self) -> Member:
        """This process as a member."""
        return self._member

    @property
    def view(self) -> View | None:
        """The view this process is in; for a node, one it watches."""
        if self._formation.view is None and self._role == "node":
            return self.view_elsewhere
        return self._formation.view

    @property
    def view_elsewhere(self) -> View | None:
        """A view of other processes that this one is not in, if it has heard of one."""
        return next(iter(self._formation.views_elsewhere.values()), None)

    @property
    def channels(self) -> dict[PeerId, PeerChannel]:
        """The admitted peers."""
        return self._channels

    def is_admitted(self, peer_id: PeerId) -> bool:
        """Whether ``peer_id`` has proven the key and is connected."""
        return peer_id in self._channels

    def state_of_play(self) -> str:
        """Say in a few words what the first view waits for."""
        return self._formation.state_of_play()

    def events(self) -> Any:
        """Subscribe to :data:`MembershipEvent`; a context manager yielding a receive channel."""
        return self._events.subscribe()

    # --- Running --------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        try:
            async with self._fabric.events() as connections, trio.open_nursery() as nursery:
                self._nursery = nursery
                self._fabric.handle(PROTOCOL, self._serve)
                nursery.start_soon(self._keep_time)
                nursery.start_soon(self._heartbeat.run)
                task_status.started()
                try:
                    async for event in connections:
                        if isinstance(event, PeerConnected) and self._fabric.peer_id < event.peer_id:
                            nursery.start_soon(self._open, event.peer_id)
                finally:
                    # It takes no more tasks.
                    self._nursery = None
                    if self._succession is not None:
                        self._succession.stop()
                raise ClosedError("the fabric closed, or its events came faster than membership took them")
        finally:
            self._events.close()

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
        """Let ``peer_id`` go, because there are enough others: they are named to it, so that it finds them."""
        channel = self._channels.get(peer_id)
        if channel is not None and not channel.stays and not self._leaving:
            channel.stays = channel.graceful = True
            channel.gone_reason = "there are enough others"
            self._name_others(channel)
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
            self._events.send(PeerRefused(peer_id, banned.reason, wrong_key=False))
            return
        self._opening.add(peer_id)
        try:
            stream = await self._open_stream(peer_id)
        finally:
            self._opening.discard(peer_id)
        if stream is None:
            return
        nonce = self._entropy.token(32)
        proof = OpenerProof(self._secrets, me=self._fabric.peer_id, peer=peer_id, nonce=nonce)
        await self._greet_and_follow(stream, proof, proof.start())

    async def _open_stream(self, peer_id: PeerId) -> FabricStream | None:
        """Open the mesh's stream; a peer that is only just starting may not serve it yet, so try more than once."""
        for attempt in range(limits.MESH_STREAM_ATTEMPTS_COUNT):
            try:
                return await self._fabric.open_stream(peer_id, PROTOCOL, timeout_s=limits.OPEN_STREAM_TIMEOUT_S)
            except UnreachableError as error:
                reason = str(error)
            await trio.sleep(limits.MESH_STREAM_RETRY_S * 2**attempt)
            if peer_id not in self._fabric.connected_peers():
                return None
        self._events.send(PeerRefused(peer_id, reason, wrong_key=False))
        return None

    async def _serve(self, stream: FabricStream) -> None:
        nonce = self._entropy.token(32)
        proof = AnswererProof(self._secrets, me=self._fabric.peer_id, peer=stream.peer_id, nonce=nonce)
        first: list[Instruction] = []
        problem = self._reason_to_refuse(stream.peer_id)
        if problem is not None:
            first = [Say(problem), Fail(ProtocolError(f"peer {stream.peer_id}: {problem.reason}"))]
        await self._greet_and_follow(stream, proof, first)

    def _reason_to_refuse(self, peer_id: PeerId) -> Refused | None:
        if self._leaving:
            return Refused(code="left", reason="this process has left the mesh")
        present = (self._fabric.remote_address(other) for other in self._channels if other != peer_id)
        return self._door.refusal(peer_id, self._fabric.remote_address(peer_id), present, trio.current_time())

    def offended(self, peer_id: PeerId) -> None:
        """``peer_id`` has broken a protocol of the mesh: who does so often is banned for a time."""
        self._door.offended(peer_id, trio.current_time())

    async def _greet_and_follow(
        self, stream: FabricStream, proof: OpenerProof | AnswererProof, first: list[Instruction]
    ) -> None:
        """Prove, introduce, and follow the peer to the end; all that goes wrong with it ends here."""
        peer_id = stream.peer_id
        try:
            with trio.fail_after(limits.MESH_PROOF_TIMEOUT_S):
                introduction = await self._greet(stream, proof, first)
        except (SparkleError, trio.TooSlowError) as error:
            wrong_key = isinstance(error, WrongKeyError)
            reason = str(error) or f"peer {peer_id} did not finish the proof in {limits.MESH_PROOF_TIMEOUT_S} s"
            level = logging.WARNING if isinstance(error, (WrongKeyError, VersionError)) else logging.INFO
            logger.log(level, "not admitted: %s", reason)
            self._events.send(PeerRefused(peer_id, reason, wrong_key=wrong_key))
            await stream.aclose()
            return
        await self._follow(PeerChannel(stream, introduction, now=trio.current_time()))

    async def _greet(
        self, stream: FabricStream, proof: OpenerProof | AnswererProof, instructions: list[Instruction]
    ) -> Introduction:
        proven = False
        while True:
            for instruction in instructions:
                match instruction:
                    case Say(message):
                        await send_message(stream, message)
                    case Fail(error):
                        raise error
                    case Proven():
                        proven = True
            if proven:
                break
            instructions = proof.receive(await receive_message(stream, Greeting))
        await send_message(stream, self._introduction())
        answer = await receive_message(stream, Introduction | Refused)
        if isinstance(answer, Refused):
            error_type = WrongKeyError if answer.code == "key" else ProtocolError
            raise error_type(f"peer {stream.peer_id} refused: {answer.reason}")
        if answer.member.peer_id != stream.peer_id:
            raise ProtocolError(f"peer {stream.peer_id} introduced itself as {answer.member.peer_id}")
        return answer  # type: ignore[no-any-return]

    def _introduction(self) -> Introduction:
        return Introduction(
            role=self._role,
            member=self._member,
            host_id=self._host_id,
            min_peers=self._min_peers,
            addresses=tuple(self._fabric.addresses)[: limits.ADDRESSES_PER_PEER_MAX_COUNT],
            software=self._software,
        )

    async def _follow(self, channel: PeerChannel) -> None:
        """Hold the channel until its end, whatever that is."""
        peer_id = channel.peer_id
        previous = self._channels.get(peer_id)
        if previous is not None:
            previous.drop("it came again on a new stream")
            self._let_go(previous)
        self._channels[peer_id] = channel
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
        self._name_others(channel)
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

    def _name_others(self, channel: PeerChannel) -> None:
        """Tell the peer of others: to a trainer all trainers, which it needs, and some of the rest, drawn by lot."""
        others = [other for other in self._channels.values() if other is not channel and other.introduction.addresses]
        is_to_trainer = channel.introduction.role == "trainer"
        needed = [other for other in others if is_to_trainer and other.introduction.role == "trainer"]
        rest = [other for other in others if other not in needed]
        if len(rest) > limits.PEER_EXCHANGE_SAMPLE_COUNT:
            rest.sort(key=lambda other: self._entropy.uniform(0.0, 1.0))
        named = [
            PeerAddress(other.peer_id, other.introduction.addresses, other.introduction.role)
            for other in (*needed, *rest[: limits.PEER_EXCHANGE_SAMPLE_COUNT])
        ]
        for start in range(0, len(named), limits.PEER_EXCHANGE_MAX_COUNT):
            channel.send(PeerExchange(peers=tuple(named[start : start + limits.PEER_EXCHANGE_MAX_COUNT])))

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
            match message:
                case Leave(reason=reason, stays=stays):
                    channel.graceful, channel.stays = True, stays
                    what = "it let this connection go" if stays else "it left the mesh"
                    channel.gone_reason = what + (f": {reason}" if reason else "")
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
                        self._heard(peer.peer_id, peer.addresses, "exchange", peer.role)
                case Prepare() | Promise() | Accept() | Accepted() | Declined() | Chosen():
                    self._agree(channel, message)
                case Meeting() | Merger():
                    self._meet(channel, message)
                case _:
                    self.offended(channel.peer_id)
                    channel.gone_reason = f"it broke the protocol: {type(message).__name__} out of place"
                    return
