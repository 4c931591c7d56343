"""Links over a stream of the control plane: slower than a direct connection, and there whenever the peers can talk.

The control plane has authenticated both ends and keeps its streams secret, through relays too, so nothing is
encrypted once more. What the peer may send ahead of what is read here is bounded by the stream's window: a reader that
is slow slows its sender, and the two share the connection with everything else that the control plane says. The
window is a compromise between the two: it caps what one round trip can carry, and a full one is what a message of
membership may have to wait behind.
"""

from __future__ import annotations

from collections.abc import Callable

from sparkle_mesh import limits
from sparkle_mesh.fabric.interface import FabricStream
from sparkle_mesh.transport.framed import FramedLink
from sparkle_mesh.transport.handshake import LIBP2P_STREAM
from sparkle_mesh.transport.link import Link


class FabricStreamBytes:
    """A :class:`~sparkle_mesh.fabric.interface.FabricStream` as a :class:`~.framed.ByteStream`."""

    def __init__(self, stream: FabricStream) -> None:
        self._stream = stream

    async def send_all(self, buffers: list[memoryview]) -> None:
        # Each write is at least one frame and one encryption, so small buffers go together.
        gathered: list[memoryview] = []
        size = 0
        for buffer in buffers:
            if gathered and size + len(buffer) > limits.LINK_GATHER_MAX_BYTES:
                await self._stream.write(gathered[0] if len(gathered) == 1 else b"".join(gathered))
                gathered, size = [], 0
            gathered.append(buffer)
            size += len(buffer)
        await self._stream.write(gathered[0] if len(gathered) == 1 else b"".join(gathered))

    async def receive_some_into(self, view: memoryview) -> int:
        data = await self._stream.read(min(len(view), limits.LINK_STREAM_READ_MAX_BYTES))
        view[: len(data)] = data
        return len(data)

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        self._stream.abort()

    def close_in_child(self) -> None:
        """The connection is the fabric's, which lets go of it."""


async def open_stream_link(
    stream: FabricStream, *, latency_s: float | None = None, on_released: Callable[[Link], None] | None = None
) -> FramedLink:
    """Return a link over ``stream``, which it takes over, to the peer at whose end this is called too.

    Raises
    ------
    LinkClosedError
        If the stream is gone.
    """
    await stream.widen(limits.LINK_STREAM_WINDOW_BYTES)
    return FramedLink(
        FabricStreamBytes(stream),
        stream.peer_id,
        kind=LIBP2P_STREAM,
        may_move=True,
        latency_s=latency_s,
        on_released=on_released,
    )
