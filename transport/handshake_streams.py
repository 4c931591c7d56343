"""The handshake's messages over a control-plane stream: what both sides of a link say before there is one."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import msgspec
import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError
from sparkle_mesh.fabric.framing import receive_message, send_message
from sparkle_mesh.fabric.interface import FabricStream
from sparkle_mesh.transport.handshake import LINK_VERSION, LinkRefusal

LINK_PROTOCOL: Final = "/sparkle/link/1"


async def receive_raw(stream: FabricStream) -> memoryview:
    """Return the next message, for the decoders of :mod:`.handshake`. Raises LinkClosedError, ProtocolError."""
    return memoryview(await receive_message(stream, msgspec.Raw, max_bytes=limits.LINK_HANDSHAKE_MAX_BYTES))


async def refuse(stream: FabricStream, reason: str) -> None:
    """Tell the peer why there will be no link; if it has gone, it need not know."""
    with suppress(LinkClosedError):
        await send_message(stream, LinkRefusal(version=LINK_VERSION, reason=reason[: limits.REASON_MAX_CHARS]))


async def end_stream(stream: FabricStream, done: bool) -> None:
    """Close ``stream``; reset it if the two are not done."""
    with trio.move_on_after(limits.CLOSE_TIMEOUT_S, shield=True):
        await (stream.aclose() if done else stream.reset())


async def until_ended(stream: FabricStream, scope: trio.CancelScope) -> None:
    """Cancel ``scope`` once the peer ends ``stream``, or says something out of turn."""
    with suppress(LinkClosedError):
        await stream.read(1)
    scope.cancel()
