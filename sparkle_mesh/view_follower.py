"""Takes the collectives of a process from one view to the next: its links, and how what was open ends.

Membership tells of each view in its order. Settling what was open in the old one is done for every view; connecting to
its members and meeting them is given up as soon as another one follows.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives.calibration import describe_ways, make_topology, measure_lines
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.environment import network_host_id
from sparkle_mesh.errors import (
    ExcludedError,
    LinkClosedError,
    MeshMergedError,
    ProtocolError,
    QuorumLostError,
    SparkleError,
    UnreachableError,
)
from sparkle_mesh.membership.events import PeerAdmitted
from sparkle_mesh.membership.instructions import Entered, Excluded, QuorumMissing
from sparkle_mesh.membership.service import MembershipService
from sparkle_mesh.membership.succession import Merged
from sparkle_mesh.membership.view import Member, View
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.shared_memory import SharedMemory

logger = logging.getLogger(__name__)

Connect = Callable[[str], Awaitable[Link]]
Array = np.ndarray[Any, np.dtype[Any]]


class ViewFollower:
    """The group of this process, in whatever view it is.

    Parameters
    ----------
    membership
        Tells of the views.
    connect
        Returns a new link to a peer, which wants one to this process as well.
    memory
        This process's memory that others on this host can read.

    Attributes
    ----------
    group
        Made with the first view.
    entered
        Set once a view was entered and calls can be made, or there will be none.
    views
        The last ones, by epoch.
    failure, failed
        Why this process is a member no more; and what is called with it then.
    """

    def __init__(self, membership: MembershipService, connect: Connect, memory: SharedMemory | None) -> None:
        self._membership = membership
        self._connect, self._memory = connect, memory
        self.group: CollectiveGroup | None = None
        self.entered = trio.Event()
        self.views: dict[int, View] = {}
        self.links: dict[Member, Link] = {}
        self.failure: SparkleError | None = None
        self.failed: Callable[[SparkleError], None] = lambda error: None
        #: The epoch in which calls were made possible last.
        self.opened_epoch = -1
        #: Set, and replaced, whenever a link ends, or a view is entered.
        self._changed = trio.Event()
        self._measured: dict[Member, tuple[float, float]] = {}
        self._nursery: trio.Nursery | None = None
        membership.operations.on_freeze = self._freeze
        membership.has_link = self.has_link
        membership.until_link_lost = self._until_link_lost

    # --- Links -----------------------------------------------------------------------------------

    def has_link(self, member: Member) -> bool:
        """Whether a link to ``member`` stands."""
        link = self.links.get(member)
        return link is not None and not link.closed

    def _drop(self, link: Link) -> None:
        """Close ``link``, which is of no more use."""
        self.links = {member: other for member, other in self.links.items() if other is not link}
        if self._nursery is not None:
            self._nursery.start_soon(link.aclose)

    async def _until_link_lost(self, member: Member) -> None:
        while self.has_link(member):
            await self._changed.wait()

    async def until_changed(self) -> None:
        """Wait until a view is entered, or a link ends."""
        await self._changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def _link_lost(self, rank: int, reason: str) -> None:
        """The group can use its link to ``rank`` no more. A member that is there all the same needs another one."""
        assert self.group is not None
        member = self.group.members[rank]
        assert isinstance(member, Member)
        self.links.pop(member, None)
        self._notify()
        if self._nursery is not None and member in self._membership.succession.view.members:
            self._nursery.start_soon(self._look_after, member, reason)

    async def _look_after(self, member: Member, reason: str) -> None:
        epoch = self._membership.succession.view.epoch
        if self._membership.member_of(member.peer_id) != member:
            self._membership.suspect(member, reason)
        elif await self._membership.probe(member.peer_id, limits.LINK_PROBE_S):
            if self._membership.succession.view.epoch != epoch:
                # In the next view it gets another link in any case.
                return
            logger.info(
                "the link to %s has ended (%s), and it is there: another view is needed", member.peer_id, reason
            )
            self._membership.renew()
        else:
            self._membership.suspect(member, f"{reason}, and it does not answer")

    async def _link_to(self, member: Member) -> None:
        """Make sure that a link to ``member`` stands; if none comes about, it is of no use as a member."""
        if self.has_link(member):
            return
        problem = f"no link to it within {limits.VIEW_ENTRY_TIMEOUT_S:g} s"
        with trio.move_on_after(limits.VIEW_ENTRY_TIMEOUT_S):
            try:
                with self._membership.events() as events:
                    while self._membership.member_of(member.peer_id) != member:
                        while not isinstance(await events.receive(), PeerAdmitted):
                            pass
                self.links[member] = await self._connect(member.peer_id)
                return
            except (UnreachableError, LinkClosedError, ProtocolError) as error:
                problem = str(error)
        self._membership.suspect(member, problem)
        await trio.sleep_forever()

    # --- Views -----------------------------------------------------------------------------------

    def _freeze(self) -> None:
        if self.group is not None:
            self.group.freeze()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the views until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            entering, left = trio.CancelScope(), trio.Event()
            left.set()
            async for change in self._membership.changes:
                entering.cancel()
                # It may hold links that the next view would use.
                await left.wait()
                match change:
                    case Entered(view, _, _):
                        await self._settle(change)
                        self._remember(view)
                        entering, left = trio.CancelScope(), trio.Event()
                        nursery.start_soon(self._enter, view, entering, left)
                    case Excluded(view, outcomes):
                        await self._leave_behind(view, outcomes)
                    case QuorumMissing(view, missing):
                        self._quorum_missing(view, missing)
                    case Merged(view):
                        self._merged(view)

    def _remember(self, view: View) -> None:
        self.views[view.epoch] = view
        shown = view.epoch if self.group is None else self.group.shown[0]
        oldest = view.epoch - limits.VIEWS_REMEMBERED_MAX_COUNT
        for epoch in [old for old in self.views if old < oldest and old != shown]:
            del self.views[epoch]

    def _quorum_missing(self, view: View, missing: tuple[Member, ...]) -> None:
        names = ", ".join(member.peer_id for member in missing)
        self._fail(
            QuorumLostError(
                f"{len(missing)} of the {view.size} members of this mesh are lost ({names}): too few are left to decide"
                " for it, and others may go on without this process; join again"
            )
        )

    def _merged(self, view: View) -> None:
        self._fail(
            MeshMergedError(
                f"this mesh of {view.size} members has met another one of its name, which has done more and goes on;"
                " call synchronize, which brings this process into it"
            )
        )

    def _fail(self, error: SparkleError) -> None:
        self.failure = error
        if self.group is not None:
            self.group.end(error)
        self.entered.set()
        self._notify()
        self.failed(error)
        if self._nursery is not None:
            self._nursery.start_soon(self._depart)

    async def _depart(self) -> None:
        """Others do not wait for this process, nor hear from it of a view that it is in no more."""
        await self._membership.leave("it is a member no more", hurry=True)

    async def _settle(self, change: Entered) -> None:
        """End what was open in the view before."""
        outcomes = {one.number: one.state for one in change.outcomes}
        if self.group is None:
            self.group = CollectiveGroup(
                rank=0,
                size=1,
                links={},
                lineage=change.view.lineage,
                epoch=0,
                describe_rank=self._describe_rank,
                describe_member=_describe_member,
                memory=self._memory,
                ledger=self._membership.operations,
                link_lost=self._link_lost,
            )
            if self._nursery is not None:
                await self._nursery.start(self.group.run)
            self.group.join_at(change.streams, outcomes)
            return
        gone = [rank for rank, member in enumerate(self.group.members) if member not in change.view.members]
        await self.group.settle(outcomes, gone)
        for member in [member for member in self.links if member not in change.view.members]:
            self._drop(self.links[member])

    async def _leave_behind(self, view: View, outcomes: Any) -> None:
        """The others have gone on without this process."""
        if self.group is not None and outcomes is not None:
            await self.group.settle({one.number: one.state for one in outcomes}, (), excluded=True)
        if self.group is not None:
            self.group.leave_in_doubt()
        self._fail(
            ExcludedError(
                f"the other members went on without this process, as view {view.epoch} of {view.size} members: "
                "it was silent, or could not be reached; join again"
            )
        )

    async def _enter(self, view: View, scope: trio.CancelScope, left: trio.Event) -> None:
        try:
            with scope:
                await self._connect_and_meet(view)
        finally:
            left.set()

    async def _connect_and_meet(self, view: View) -> None:
        me = view.rank_of(self._membership.member)
        group = self.group
        assert me is not None
        assert group is not None
        others = {rank: member for rank, member in enumerate(view.members) if rank != me}
        first = not self.links and view.epoch == 0
        async with trio.open_nursery() as connecting:
            for member in others.values():
                connecting.start_soon(self._link_to, member)
        links = {rank: self.links[member] for rank, member in others.items() if self.has_link(member)}
        if first and len(links) == len(others):
            await self._measure(me, view, links)
        lost = [member for member in others.values() if not self.has_link(member)]
        if lost:
            # While others were made. Nobody reads these links yet, so that nobody else would notice.
            async with trio.open_nursery() as nursery:
                for member in lost:
                    nursery.start_soon(self._look_after, member, "its link ended before the view was entered")
            return
        group.enter(me, view.epoch, view.members, links)
        try:
            rows = await group.meet(self._row(view, links))
        except SparkleError as error:
            # Another view follows, or this process has come to its end, which its calls are told.
            logger.debug("view %d was not entered: %s", view.epoch, error)
            return
        group.open(make_topology(rows))
        self.opened_epoch = view.epoch
        self.entered.set()
        self._notify()

    # --- What is known of the ways ----------------------------------------------------------------

    async def _measure(self, me: int, view: View, links: dict[int, Link]) -> None:
        try:
            measured = await measure_lines(me, view.size, links)
        except trio.Cancelled:
            # Halfway, what comes over these links is not what a group expects.
            for link in links.values():
                self._drop(link)
            raise
        for rank, member in enumerate(view.members):
            self._measured[member] = (float(measured[0, rank]), float(measured[1, rank]))

    def _row(self, view: View, links: dict[int, Link]) -> Array:
        """What this process tells the others: of those that came later it knows how far they are."""
        ways = np.stack([np.zeros(view.size), np.full(view.size, np.nan)])
        for rank, member in enumerate(view.members):
            if member in self._measured:
                ways[:, rank] = self._measured[member]
            elif rank in links and links[rank].stats.latency_s is not None:
                ways[1, rank] = links[rank].stats.latency_s
        return describe_ways(ways, network_host_id())

    # --- Words -----------------------------------------------------------------------------------

    def _describe_rank(self, rank: int) -> str:
        assert self.group is not None
        member = self.group.members[rank]
        return f"rank {rank} ({_describe_member(member)})"


def _describe_member(member: object) -> str:
    return f"peer {member.peer_id}" if isinstance(member, Member) else f"{member}"
