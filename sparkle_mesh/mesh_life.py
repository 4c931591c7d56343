"""One life of a process in a mesh: its node, its links, its views and its group of collectives.

A restart is a new member, and so is a process that joins again: it begins another life.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.errors import JoinTimeoutError
from sparkle_mesh.membership.service import PeerRefused
from sparkle_mesh.node import MeshNode, NodeConfig, open_node
from sparkle_mesh.nurseries import bare_errors
from sparkle_mesh.transport.connector import LinkConnector
from sparkle_mesh.view_follower import ViewFollower


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


async def _await_view(node: MeshNode, follower: ViewFollower, deadline: float, timeout_s: float) -> None:
    """Wait until this process has entered a view. Raises JoinTimeoutError, or what has ended the first one."""
    refusals: dict[str, str] = {}

    async def note_refusals() -> None:
        with node.membership.events() as events:
            async for event in events:
                if isinstance(event, PeerRefused) and event.wrong_key:
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
            f" connected in {timeout_s:g} s; raise timeout_s"
        )
    lines = [
        f"mesh {node.config.mesh!r} did not form in {timeout_s:g} s: {node.membership.state_of_play()}",
        "start more processes, lower min_peers, or raise timeout_s",
        *list(refusals.values())[:3],
        *node.discovery.status(),
    ]
    raise JoinTimeoutError("; ".join(lines))
