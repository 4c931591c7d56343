"""The views of one process: from the first one on, and what its connections mean for them.

This gives the machines of :mod:`.formation` and :mod:`.view_change` what peers say and what happens to their
connections, and carries out what they answer. :class:`.service.MembershipService` adds the connections themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from sparkle_mesh import limits
from sparkle_mesh.broadcast import Broadcast
from sparkle_mesh.errors import MeshClosedError
from sparkle_mesh.fabric.interface import PeerId
from sparkle_mesh.membership import formation
from sparkle_mesh.membership.channel import PeerChannel
from sparkle_mesh.membership.events import MembershipEvent, ViewChanged
from sparkle_mesh.membership.formation import Candidate, Formation
from sparkle_mesh.membership.instructions import Entered
from sparkle_mesh.membership.meetings import Meetings, Weight
from sparkle_mesh.membership.messages import Accept, Agreement, Chosen, Leaving, Meeting, Merger, Role
from sparkle_mesh.membership.operations import OpenOperations, is_routed
from sparkle_mesh.membership.succession import Change, Succession, joins
from sparkle_mesh.membership.view import Member, View

logger = logging.getLogger(__name__)


async def _never(member: Member) -> None:
    await trio.sleep_forever()


class MembershipViews:
    """What one process knows of views.

    Parameters
    ----------
    mesh_id
        32 bytes.
    member
        This process.
    candidate
        What it is to others if it wants to compute; None if it only watches.
    settle_s
        How long those who want to form a mesh must have been the same before this process proposes it.

    Attributes
    ----------
    operations
        Where this process stands with collectives; frozen and read when its view ends.
    step
        Of training, at which all members were when they were synchronised last.
    has_link, until_link_lost
        Whether a data link to a member stands, and what waits until none does; the mesh knows.
    """

    def __init__(
        self, mesh_id: bytes, member: Member, candidate: Candidate | None, settle_s: float = limits.VIEW_SETTLE_S
    ) -> None:
        self._mesh_id, self._member = mesh_id, member
        self._role: Role = "node" if candidate is None else "trainer"
        self._channels: dict[PeerId, PeerChannel] = {}
        self._events: Broadcast[MembershipEvent] = Broadcast(limits.NODE_EVENTS_MAX_COUNT)
        self._wake = trio.Event()
        self._lost_before: dict[Member, str] = {}
        self._nursery: trio.Nursery | None = None
        self._formation = Formation(mesh_id, candidate, now=trio.current_time(), settle_s=settle_s)
        self._succession: Succession | None = None
        self._meetings = Meetings()
        self._tell_change, self._changes = trio.open_memory_channel[Change](limits.VIEW_CHANGES_MAX_COUNT)
        self.operations = OpenOperations()
        self.step = 0
        self.has_link: Callable[[Member], bool] = lambda member: False
        self.until_link_lost: Callable[[Member], Awaitable[None]] = _never

    @property
    def verdict(self) -> Merger | None:
        """That this process's mesh dissolves, because it has met another of its name."""
        return self._meetings.verdict

    @property
    def changes(self) -> trio.MemoryReceiveChannel[Change]:
        """The views of this process in their order, beginning with the first; for one reader."""
        return self._changes

    @property
    def succession(self) -> Succession:
        """How the views of this process follow each other. Raises MeshClosedError if it is in none yet."""
        if self._succession is None:
            raise MeshClosedError("this process is in no view yet")
        return self._succession

    @property
    def member(self) -> Member:
        """This process as a member."""
        return self._member

    @property
    def view_elsewhere(self) -> View | None:
        """A view of other processes that this one is not in, if it has heard of one."""
        return next(iter(self._formation.views_elsewhere.values()), None)

    def state_of_play(self) -> str:
        """Say in a few words what the first view waits for."""
        return self._formation.state_of_play()

    @property
    def channels(self) -> dict[PeerId, PeerChannel]:
        """The admitted peers."""
        return self._channels

    def is_admitted(self, peer_id: PeerId) -> bool:
        """Whether ``peer_id`` has proven the key and is connected."""
        return peer_id in self._channels

    def events(self) -> Any:
        """Subscribe to :data:`MembershipEvent`; a context manager yielding a receive channel."""
        return self._events.subscribe()

    def member_of(self, peer_id: PeerId) -> Member | None:
        """Return the member or candidate that ``peer_id`` is, if it is connected and computes."""
        channel = self._channels.get(peer_id)
        return channel.introduction.member if channel is not None and channel.introduction.role == "trainer" else None

    async def probe(self, peer_id: PeerId, timeout_s: float) -> bool:
        """Ask ``peer_id`` whether it is there; return whether it has answered within ``timeout_s``."""
        channel = self._channels.get(peer_id)
        return channel is not None and await channel.answers(timeout_s) and self._channels.get(peer_id) is channel

    def trust(self, member: Member) -> None:
        """``member`` has shown that it is there."""
        if self._succession is not None:
            self._succession.trust(member)
            self._wake.set()

    def renew(self) -> None:
        """Another view is needed, because two members have lost their link."""
        if self._succession is not None:
            self._succession.renew()
            self._wake.set()

    def admit(self, admits: bool) -> None:
        """Take those who wait in with the next view, or no longer."""
        if self._succession is not None:
            self._succession.admit(admits)
            self._wake.set()

    def suspect(self, member: Member, reason: str) -> None:
        """``member`` is of no more use to this process, whatever its connection looks like."""
        if self._succession is not None:
            self._succession.suspect(member, reason)
            self._wake.set()

    async def _leave_view(self, succession: Succession) -> None:
        for channel in self._channels.values():
            channel.send(Leaving())
        succession.leaves(self._member)
        self._wake.set()
        with trio.move_on_after(limits.LEAVE_TIMEOUT_S):
            while not succession.can_leave:
                await succession.changed.wait()

    async def _miss(self, member: Member, reason: str, graceful: bool) -> None:
        """The connection to ``member`` is gone; it counts as gone, too, unless it shows that it is there."""
        if self._succession is None:
            # It may be in a view that this process is about to enter.
            self._lost_before[member] = reason
        elif graceful or not self.has_link(member):
            self.suspect(member, reason)
        else:
            with trio.move_on_after(limits.RECONNECT_GRACE_S):
                await self.until_link_lost(member)
            if self.member_of(member.peer_id) != member:
                self.suspect(member, reason)

    # --- Meshes that meet ------------------------------------------------------------------------

    def _meeting_due(self) -> float | None:
        """When to :meth:`_look_for_others`."""
        succession = self._succession
        if succession is None or succession.ended or not (others := self._elsewhere()):
            return None
        return self._meetings.next_wakeup(self._weight(succession), others, leads=succession.leads)

    def _look_for_others(self) -> None:
        """Ask the other meshes of this name that were met which of them goes on, if that is due."""
        succession = self._succession
        if succession is None or succession.ended or not (others := self._elsewhere()):
            return
        mine, leads = self._weight(succession), succession.leads
        for peer_id, message in self._meetings.tick(mine, others, leads=leads, now=trio.current_time()):
            self._channels[peer_id].send(message)

    def _elsewhere(self) -> dict[PeerId, bytes]:
        """The connected peers that are in another lineage, and in which."""
        assert self._succession is not None
        mine = self._succession.view.lineage
        return {
            peer_id: channel.lineage
            for peer_id, channel in self._channels.items()
            if channel.lineage is not None and channel.lineage != mine
        }

    def _weight(self, succession: Succession) -> Weight:
        begun = sum(count for stream, count in self.operations.standing().streams if not is_routed(stream))
        return Weight(self.step, begun, succession.view.size, succession.view.lineage)

    def _meet(self, channel: PeerChannel, message: Meeting | Merger) -> None:
        """Another mesh of this name asks, or it is known which one goes on."""
        succession = self._succession
        if succession is None or succession.ended:
            return
        if isinstance(message, Meeting):
            spoken_for = channel.lineage == message.lineage
            answer = self._meetings.asked(message, self._weight(succession), leads=succession.leads and spoken_for)
            if answer is not None:
                channel.send(answer)
        elif channel.lineage == message.into or channel.introduction.member in succession.view.members:
            self._meetings.told(message, succession.view.lineage)
        if self._meetings.verdict is not None:
            for member in succession.view.members:
                self._tell_of_merger(member)
            succession.dissolve()

    def _tell_of_merger(self, member: Member) -> None:
        """If this lineage has dissolved, ``member`` of it has to know."""
        channel = self._channels.get(member.peer_id)
        if channel is not None and self._meetings.verdict is not None:
            channel.send(self._meetings.verdict)

    def _agree(self, channel: PeerChannel, message: Agreement) -> None:
        """Give ``message`` to the machine that it is for: of first views, or of those that follow."""
        member = channel.introduction.member
        if isinstance(message, Chosen) and member in message.view.members and message.view.mesh_id == self._mesh_id:
            channel.lineage = message.view.lineage
        if _epoch(message) == 0:
            if self._succession is not None and isinstance(message, Chosen):
                # It may be of another mesh of this name.
                self._succession.receive(member, message)
            self._carry_out(self._formation.receive(channel.peer_id, message, now=channel.last_heard))
        elif self._succession is not None:
            self._succession.receive(member, message)
            self._wake.set()
        elif self._role == "trainer" and (entered := joins(message, self._member, self._mesh_id)):
            self._formation.follow(entered.view)
            self.operations.join(entered.streams, entered.outcomes)
            self._begin(entered)
        elif isinstance(message, Chosen):
            self._carry_out(self._formation.receive(channel.peer_id, message, now=channel.last_heard))

    def _begin(self, first: Entered) -> None:
        """This process is in a view."""
        self._succession = Succession(
            self._member, first, self.operations, send=self._send_to, tell=self._tell_of_change
        )
        for channel in list(self._channels.values()):
            if channel.introduction.role == "trainer":
                self._succession.came(channel.introduction.member)
        for member in first.view.members:
            if member != self._member and self.member_of(member.peer_id) != member:
                self._start_soon(self._await_or_suspect, member)

    def _start_soon(self, function: Callable[..., Awaitable[None]], *arguments: object) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(function, *arguments)

    async def _await_or_suspect(self, member: Member) -> None:
        """A member of this process's first view is not connected (yet)."""
        if member not in self._lost_before:
            await trio.sleep(limits.RECONNECT_GRACE_S)
        if self.member_of(member.peer_id) != member:
            self.suspect(member, self._lost_before.get(member, "it was never connected"))

    def _send_to(self, peer_id: PeerId, message: Agreement) -> None:
        channel = self._channels.get(peer_id)
        if channel is not None:
            channel.send(message)

    def _tell_of_change(self, change: Change) -> None:
        if isinstance(change, Entered):
            self._formation.follow(change.view)
            members = {member.peer_id for member in change.view.members}
            for channel in self._channels.values():
                if channel.peer_id not in members:
                    channel.send(Chosen(view=change.view))
            self._events.send(ViewChanged(change.view, mine=True))
        self._tell_change.send_nowait(change)

    def _carry_out(self, instructions: list[formation.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case formation.SendTo(peer_id, message):
                    self._send_to(peer_id, message)
                case formation.ViewAgreed(view):
                    logger.info("view of %d members agreed", view.size)
                    self._begin(Entered(view, ()))
                case formation.ViewElsewhere(view):
                    self._events.send(ViewChanged(view, mine=False))
        self._wake.set()


def _epoch(message: Agreement) -> int:
    return message.view.epoch if isinstance(message, Accept | Chosen) else message.epoch
