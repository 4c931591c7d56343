"""Runs a node until a signal: its lock, its control socket, and the lines it prints."""

from __future__ import annotations

import errno
import signal
from contextlib import AsyncExitStack
from functools import partial

import trio

from sparkle_mesh.cli import render
from sparkle_mesh.cli.control import control_supported
from sparkle_mesh.cli.control_server import serve_control
from sparkle_mesh.cli.launch import Launch, RunningNode
from sparkle_mesh.cli.lock import hold_data_dir
from sparkle_mesh.cli.output import Reporter
from sparkle_mesh.cli.settings import NodeSettings
from sparkle_mesh.cli.signals import StopSignals
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.nurseries import bare_errors


class NodeRun:
    """One run of a node.

    Parameters
    ----------
    launch
        Opens the node; tests give their own.
    """

    def __init__(self, settings: NodeSettings, reporter: Reporter, stop: StopSignals, launch: Launch) -> None:
        self._settings, self._reporter, self._stop, self._launch = settings, reporter, stop, launch
        self._token: trio.lowlevel.TrioToken | None = None
        # What a signal cancels: the opening, but of an open node only what is done with it, because its own
        # tasks are needed for the farewell.
        self._scope = trio.CancelScope()
        self._output_broken = False

    def run(self) -> int:
        """Run until a signal; return the exit code.

        Raises
        ------
        SparkleError
            If the node cannot start, or ends by itself.
        """
        with hold_data_dir(self._settings.data_dir):
            trio.run(self._run)
        return 1 if self._output_broken else 0

    def output_broken(self) -> None:
        """Stop, since nobody reads what is printed; for any thread."""
        self._output_broken = True
        if self._token is not None:
            try:
                self._token.run_sync_soon(self._end)
            except trio.RunFinishedError:
                return

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        # Both may have come while Python still imported: then nothing is opened at all.
        if self._stop.received is None and not self._output_broken:
            with bare_errors(), self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._await_signal)
                    await self._be_a_node()
                    nursery.cancel_scope.cancel()
        self._reporter.say(render.stopped())

    async def _await_signal(self) -> None:
        received = await self._stop.wait()
        self._reporter.say(render.stopping(signal.Signals(received).name))
        self._end()

    def _end(self) -> None:
        self._scope.cancel()

    async def _be_a_node(self) -> None:
        async with AsyncExitStack() as stack:
            node = await self._open(stack)
            await trio.lowlevel.checkpoint()  # a signal that came during the start ends it here
            self._scope = trio.CancelScope()
            with self._scope:
                await self._serve(node)

    async def _serve(self, node: RunningNode) -> None:
        async with trio.open_nursery() as nursery:
            if control_supported():
                await nursery.start(partial(serve_control, node, self._settings.data_dir))
            else:  # pragma: no cover (Windows)
                self._reporter.say(render.no_control_socket())
            await self._tell(node)

    async def _open(self, stack: AsyncExitStack) -> RunningNode:
        try:
            with bare_errors():
                return await stack.enter_async_context(self._launch(self._settings))
        except (SparkleError, OSError) as error:
            if self._settings.listen_chosen or not is_port_taken(error):
                raise
        self._reporter.say(render.port_taken(self._settings.listen))
        with bare_errors():
            return await stack.enter_async_context(self._launch(self._settings.on_any_port()))

    async def _tell(self, node: RunningNode) -> None:
        """Print what the node is, then what happens, without end."""
        known: set[str] = set()
        first = True
        while True:
            with node.events() as events:
                if first:
                    self._reporter.say(render.started(node.status(), self._settings.data_dir))
                    first = False
                # Those who came before the subscription, or while too many events came to be kept.
                for peer in node.peers():
                    if peer.peer_id not in known:
                        known.add(peer.peer_id)
                        self._reporter.say(render.peer_joined(peer))
                async for event in events:
                    self._tell_event(event, known)
            await trio.lowlevel.checkpoint()

    def _tell_event(self, event: object, known: set[str]) -> None:
        # The classes are the node's; importing them at the top would load libp2p before the node is opened.
        from sparkle_mesh.membership.events import PeerRefused, ViewChanged
        from sparkle_mesh.node import PeerJoined, PeerLeft

        match event:
            case PeerJoined(peer):
                if peer.peer_id not in known:
                    known.add(peer.peer_id)
                    self._reporter.say(render.peer_joined(peer))
            case PeerLeft(peer_id, reason):
                known.discard(peer_id)
                self._reporter.say(render.peer_left(peer_id, reason))
            case PeerRefused(peer_id, reason):
                self._reporter.say(render.peer_refused(peer_id, reason))
            case ViewChanged(view):
                self._reporter.say(render.view_changed(view))


def is_port_taken(error: BaseException) -> bool:
    """Whether ``error`` came from an address that another process listens on."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
            return True
        cause = cause.__cause__ or cause.__context__
    return False
