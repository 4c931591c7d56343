"""The lives of a process in a mesh: each has its node, its links, its views and its group of collectives.

A restart is a new member, and so is a process that joins again: it begins another life.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.errors import (
    ExcludedError,
    JoinTimeoutError,
    MeshClosedError,
    MeshMergedError,
    QuorumLostError,
    SparkleError,
)
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.membership.events import PeerRefused
from sparkle_mesh.node import MeshNode, NodeConfig, open_node
from sparkle_mesh.nurseries import bare_errors
from sparkle_mesh.transport.connector import LinkConnector
from sparkle_mesh.view_follower import ViewFollower

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Life:
    """What a process has in a mesh while it is a member."""

    config: NodeConfig
    node: MeshNode
    connector: LinkConnector
    follower: ViewFollower
    _leaves: trio.Event = field(default_factory=trio.Event)
    _ended: trio.Event = field(default_factory=trio.Event)

    @property
    def group(self) -> CollectiveGroup:
        """The collectives of this life, in whatever view it is."""
        assert self.follower.group is not None
        return self.follower.group

    @property
    def is_over(self) -> bool:
        """Whether it is a member no more, or is leaving."""
        return self._leaves.is_set() or self.follower.failure is not None

    async def end(self) -> None:
        """Leave the mesh, and wait until all is closed."""
        self._leaves.set()
        await self._ended.wait()


async def live(
    config: NodeConfig,
    timeout_s: float,
    kinds: Sequence[str] | None,
    *,
    task_status: trio.TaskStatus[Life] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Be a member from the first view, with which this has started, until :meth:`Life.end`.

    Raises
    ------
    JoinTimeoutError
        If there was no view after ``timeout_s``.
    """
    life: Life | None = None
    try:
        with bare_errors():
            async with open_node(config) as node:
                deadline = trio.current_time() + timeout_s
                connector = LinkConnector(
                    node.fabric, mesh_id=node.secrets.mesh_id, authorize=node.membership.is_admitted, kinds=kinds
                )
                async with connector, trio.open_nursery() as nursery:
                    follower = ViewFollower(node.membership, connector.connect, connector.memory)
                    await nursery.start(follower.run)
                    try:
                        await _await_view(node, follower, deadline, timeout_s)
                        life = Life(config, node, connector, follower)
                        task_status.started(life)
                        await life._leaves.wait()
                    finally:
                        if follower.group is not None:
                            follower.group.close()
                        await node.membership.leave()
                        nursery.cancel_scope.cancel()
    finally:
        if life is not None:
            life._ended.set()


class Lives:
    """The lives of one process in a mesh, one after the other.

    Parameters
    ----------
    config
        With what each begins; a later one has another identity, and knows more peers.
    timeout_s
        How long it may take to become a member, if nothing else is said.
    kinds
        Of links that may be used.
    tasks
        Runs them.
    forks
        Whether this process goes on with those that it can reach when quorum is lost.

    Attributes
    ----------
    current
        The one that calls are made in; over, perhaps.
    count
        How many there have been.
    taken_up
        Called with one that takes the place of the current one.
    """

    current: Life

    def __init__(
        self, config: NodeConfig, timeout_s: float, kinds: Sequence[str] | None, tasks: trio.Nursery, *, forks: bool
    ) -> None:
        self.config, self.timeout_s = config, timeout_s
        self.count = 0
        self.taken_up: Callable[[Life], None] = lambda life: None
        self._kinds, self._tasks, self._forks = kinds, tasks, forks
        #: Addresses of those that were known last.
        self._known: list[str] = []
        self._turn = trio.Lock()
        #: ``min_peers`` that somebody has joined again with last.
        self._terms: int | None = None
        #: While this process becomes a member again by itself: set when it has, or has failed. Calls fail until the
        #: next life is taken up, so that ranks do not change between calls.
        self._back: trio.Event | None = None
        self._next: Life | None = None
        self._returning, self._beginning = trio.CancelScope(), trio.CancelScope()

    async def begin(self) -> None:
        """Become a member for the first time. Raises JoinTimeoutError, or what ended the last attempt."""
        self._take_up(await self._live(self.config, self.timeout_s))

    async def begin_anew(self, min_peers: int | None, timeout_s: float | None) -> None:
        """End the current life and take up another, on other terms if they are given.

        Raises as :meth:`begin`, and MeshClosedError if the process leaves meanwhile.
        """
        if min_peers is not None:
            # It may be coming back by itself, on other terms.
            self._returning.cancel()
        count = self.count
        async with self._turn:
            if self.count > count and min_peers in (None, self._terms):
                # Another task has asked for the same, and was first.
                return
            self._terms = min_peers
            life, self._next = self._next, None
            if life is not None and min_peers is not None:
                await life.end()
                life = None
            if life is None:
                with trio.CancelScope() as self._beginning:
                    life = await self._another(min_peers, timeout_s)
            if life is None:
                raise MeshClosedError("this process has left the mesh while it joined again")
            self._back = None
            self._take_up(life)

    @property
    def is_coming_back(self) -> bool:
        """Whether this process becomes a member again by itself, or has and :meth:`until_back` takes that up."""
        return self._back is not None

    async def until_back(self, timeout_s: float) -> None:
        """If this process is coming back by itself, wait until it is a member again, and take that life up."""
        with trio.move_on_after(timeout_s):
            while (back := self._back) is not None:
                await back.wait()
                if self._back is not back:
                    continue
                self._back = None
                life, self._next = self._next, None
                if life is not None:
                    self._take_up(life)

    async def end(self) -> None:
        """Leave the mesh, and wait until all is closed."""
        self._returning.cancel()
        self._beginning.cancel()
        async with self._turn:
            if self._next is not None:
                await self._next.end()
            await self.current.end()

    def _take_up(self, life: Life) -> None:
        self.current = life
        self.count += 1
        life.follower.failed = self._failed
        self.taken_up(life)
        if life.follower.failure is not None:
            self._failed(life.follower.failure)

    async def _another(self, min_peers: int | None, timeout_s: float | None = None) -> Life:
        """End the current life, and begin another."""
        self._note_known()
        await self.current.end()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        config = replace(
            self.config,
            identity=Identity.generate(),
            min_peers=self.config.min_peers if min_peers is None else min_peers,
            known=tuple(self._known),
            settle_s=min(limits.REJOIN_SETTLE_S, timeout_s / 4),
        )
        life = await self._live(config, timeout_s)
        life.node.membership.step = self.current.node.membership.step
        return life

    async def _live(self, config: NodeConfig, timeout_s: float) -> Life:
        """Begin a life; once more if its mesh has ended before it could be used."""
        deadline = trio.current_time() + timeout_s
        while True:
            try:
                life: Life = await self._tasks.start(live, config, timeout_s, self._kinds)
            except (MeshMergedError, QuorumLostError, ExcludedError) as error:
                timeout_s = deadline - trio.current_time()
                if timeout_s <= 0:
                    raise
                logger.info("joining once more: %s", error)
                config = replace(config, identity=Identity.generate())
            else:
                return life

    def _note_known(self) -> None:
        """Who is known now is who can be asked for a way into the mesh later."""
        peers = [f"{address}/p2p/{peer.peer_id}" for peer in self.current.node.peers() for address in peer.addresses]
        self._known = peers[: limits.REJOIN_ADDRESSES_MAX_COUNT] or self._known

    def _failed(self, error: SparkleError) -> None:
        """This process is a member no more. After some ends it becomes one again by itself."""
        self._note_known()
        if isinstance(error, MeshMergedError):
            min_peers = None
        elif isinstance(error, QuorumLostError) and self._forks:
            logger.warning("%s. This process goes on with those that it can reach, in a fork of the mesh", error)
            min_peers = 1
        else:
            return
        self._back = trio.Event()
        self._tasks.start_soon(self._come_back, min_peers, self._back)

    async def _come_back(self, min_peers: int | None, back: trio.Event) -> None:
        try:
            async with self._turn:
                if self._back is back:
                    with trio.CancelScope() as self._returning:
                        self._next = await self._another(min_peers)
        except (SparkleError, OSError) as error:
            logger.error("this process has not become a member again: %s", error)
        finally:
            back.set()


async def _await_view(node: MeshNode, follower: ViewFollower, deadline: float, timeout_s: float) -> None:
    """Wait until this process has entered a view. Raises JoinTimeoutError, or what has ended the first one."""
    refusals: dict[str, str] = {}

    async def note_refusals() -> None:
        with node.membership.events() as events:
            async for event in events:
                if isinstance(event, PeerRefused):
                    refusals[event.peer_id] = event.reason

    async with trio.open_nursery() as nursery:
        nursery.start_soon(note_refusals)
        with trio.move_on_at(deadline):
            await follower.entered.wait()
        nursery.cancel_scope.cancel()
    if follower.failure is not None:
        raise follower.failure
    if follower.entered.is_set():
        return
    if follower.views:
        view = follower.views[max(follower.views)]
        raise JoinTimeoutError(
            f"mesh {node.config.mesh!r} has a view of {view.size} members with this process, but not all of them were"
            f" connected in {timeout_s:.4g} s; raise timeout_s"
        )
    lines = [
        f"mesh {node.config.mesh!r} did not form in {timeout_s:.4g} s: {node.membership.state_of_play()}",
        _advice(node),
        *list(refusals.values())[:3],
        *node.status().discovery,
    ]
    raise JoinTimeoutError("; ".join(lines))


def _advice(node: MeshNode) -> str:
    if node.membership.view_elsewhere is not None:
        return "the members of a mesh take newcomers in when all of them call synchronize; raise timeout_s"
    return "start more processes, lower min_peers, or raise timeout_s"
