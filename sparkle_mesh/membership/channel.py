"""One admitted peer: its stream, what waits to be sent to it, and when it was last heard."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import trio

from sparkle_mesh import limits
from sparkle_mesh.fabric.framing import receive_message, send_message
from sparkle_mesh.fabric.interface import FabricStream, PeerId
from sparkle_mesh.membership.messages import Introduction, MeshMessage, Ping

logger = logging.getLogger(__name__)


class PeerChannel:
    """An admitted peer: its stream, what waits to be sent, and when it was last heard."""

    def __init__(
        self, stream: FabricStream, introduction: Introduction, *, now: float, machine: PeerId | None = None
    ) -> None:
        self.peer_id = stream.peer_id
        self.introduction = introduction
        #: The peer id of the node of its machine, proven by a certificate; its own if it is a node.
        self.machine = machine
        self.admitted_at = now
        self.last_heard = now
        self.latency_s: float | None = None
        #: Whether it has been silent for longer than it usually is.
        self.suspected = False
        #: For how long it was silent of late, between what it said.
        self.silences: deque[float] = deque(maxlen=limits.SILENCES_REMEMBERED_MAX_COUNT)
        #: Of the last view that it has said it is in.
        self.lineage: bytes | None = None
        #: When it last was told of other peers.
        self.told_others_at = float("-inf")
        self.gone_reason: str | None = None
        self.graceful = False
        #: Whether it is of the mesh still, though not connected any more.
        self.stays = False
        self.scope = trio.CancelScope()
        self._stream = stream
        self._outbox, self._to_send = trio.open_memory_channel[MeshMessage](limits.MESH_OUTBOX_MAX_COUNT)
        self._written = trio.Event()
        self.pinged_at = float("-inf")
        self._pings: dict[int, float] = {}
        #: Those that somebody here waits for; their numbers are above those of pings.
        self._asked: dict[int, trio.Event] = {}
        self._question = 2**32

    def send(self, message: MeshMessage) -> None:
        """Queue ``message``; a peer that lets the queue run full is let go."""
        try:
            self._outbox.send_nowait(message)
        except trio.WouldBlock:
            self.drop(f"it does not read: {limits.MESH_OUTBOX_MAX_COUNT} messages wait")
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            logger.debug("%s is going; %s not sent", self.peer_id, type(message).__name__)

    def drop(self, reason: str) -> None:
        """End the channel."""
        self.gone_reason = self.gone_reason or reason
        self.scope.cancel()

    def hear(self, *, now: float) -> None:
        """It has said something."""
        self.silences.append(now - self.last_heard)
        self.last_heard = now

    async def answers(self, timeout_s: float) -> bool:
        """Ask whether it is there, and wait for the answer for as long as that; return whether it came."""
        self._question = question = self._question + 1
        answered = self._asked[question] = trio.Event()
        self.send(Ping(probe=question))
        try:
            with trio.move_on_after(timeout_s):
                await answered.wait()
                return True
            return False
        finally:
            del self._asked[question]

    def ping(self, probe: int, *, now: float) -> None:
        """Send a ping and remember when."""
        self._pings = {old: sent for old, sent in self._pings.items() if now - sent < limits.SILENCE_TIMEOUT_S}
        self._pings[probe] = self.pinged_at = now
        self.send(Ping(probe=probe))

    def ponged(self, probe: int, *, now: float) -> None:
        """Take the answer to a ping."""
        if probe in self._asked:
            self._asked[probe].set()
        sent = self._pings.pop(probe, None)
        if sent is not None:
            self.latency_s = (now - sent) / 2

    async def write_all(self) -> None:
        """Send what is queued until the queue is closed."""
        try:
            async for message in self._to_send:
                await send_message(self._stream, message)
        finally:
            self._written.set()

    async def read(self) -> Any:
        """Return the next message of the peer (a ``MeshMessage``)."""
        return await receive_message(self._stream, MeshMessage)

    async def finish(self) -> None:
        """Write what is still queued and close the stream, within ``limits.CLOSE_TIMEOUT_S``."""
        self._outbox.close()
        with trio.move_on_after(limits.CLOSE_TIMEOUT_S) as scope:
            scope.shield = True
            await self._written.wait()
            await self._stream.aclose()
