"""The node that the command runs: the real one, and what the command needs of any."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from typing import Any, Protocol, TypeAlias

from sparkle_mesh.cli.control_server import ControlHandler
from sparkle_mesh.cli.settings import NodeSettings
from sparkle_mesh.environment import IDENTITY_NAME


class RunningNode(ControlHandler, Protocol):
    """A node as :class:`sparkle_mesh.node.MeshNode` is one."""

    def events(self) -> AbstractContextManager[AsyncIterator[Any]]:
        """Subscribe to what :data:`sparkle_mesh.node.NodeEvent` names."""
        ...


Launch: TypeAlias = Callable[[NodeSettings], AbstractAsyncContextManager[RunningNode]]


@asynccontextmanager
async def open_real_node(settings: NodeSettings) -> AsyncIterator[RunningNode]:
    """Run a :class:`sparkle_mesh.node.MeshNode` with this data directory's identity until the block ends."""
    # This loads libp2p, which takes most of a second: nobody but a running node should wait for it.
    from sparkle_mesh.discovery.reach import ReachConfig
    from sparkle_mesh.fabric.identity import load_or_create_identity
    from sparkle_mesh.node import NodeConfig, open_node

    config = NodeConfig(
        mesh=settings.mesh,
        key=settings.key,
        public=settings.public,
        allow=settings.allow,
        founder=settings.founder,
        role="node",
        identity=load_or_create_identity(settings.data_dir / IDENTITY_NAME),
        listen=settings.listen,
        join=settings.join,
        data_dir=settings.data_dir,
        lan=settings.lan,
        reach=settings.reach or ReachConfig(),
    )
    async with open_node(config) as node:
        yield node
