"""Messages over a stream: a 4-byte big-endian length, then that many bytes of MessagePack."""

from __future__ import annotations

from typing import Any, TypeVar, overload

from sparkle_mesh import limits, wire
from sparkle_mesh.errors import LinkClosedError, ProtocolError, UsageError
from sparkle_mesh.fabric.interface import FabricStream

M = TypeVar("M")

_LENGTH_BYTES = 4


def encode_frame(message: wire.Message, *, max_bytes: int = limits.CONTROL_MESSAGE_MAX_BYTES) -> bytes:
    """Return ``message`` as it is put on a stream.

    Raises
    ------
    UsageError
        If the message takes more than ``max_bytes`` bytes: the peer would refuse it.
    """
    body = wire.encode(message)
    if len(body) > max_bytes:
        raise UsageError(f"{type(message).__name__} takes {len(body)} bytes; at most {max_bytes} may be sent")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


async def send_message(
    stream: FabricStream, message: wire.Message, *, max_bytes: int = limits.CONTROL_MESSAGE_MAX_BYTES
) -> None:
    """Send one message. A cancelled call may have sent part of it: reset the stream then.

    Raises
    ------
    UsageError
        If the message takes more than ``max_bytes`` bytes.
    LinkClosedError
        If the stream is closed.
    """
    await stream.write(encode_frame(message, max_bytes=max_bytes))


@overload
async def receive_message(stream: FabricStream, message_type: type[M], *, max_bytes: int = ...) -> M: ...


@overload
async def receive_message(stream: FabricStream, message_type: object, *, max_bytes: int = ...) -> Any: ...


async def receive_message(
    stream: FabricStream, message_type: object, *, max_bytes: int = limits.CONTROL_MESSAGE_MAX_BYTES
) -> Any:
    """Receive one message. A cancelled call may have taken part of it: reset the stream then.

    Parameters
    ----------
    message_type
        A :class:`~sparkle_mesh.wire.Message` subclass, or a union of tagged ones.
    max_bytes
        What the peer may send at most, checked before anything is allocated for it.

    Raises
    ------
    LinkClosedError
        At the end of the stream, between two messages or inside one; the text says which.
    ProtocolError
        If the announced length is over ``max_bytes`` or the bytes do not fit ``message_type``.
    """
    length = int.from_bytes(await _receive_exactly(stream, _LENGTH_BYTES, between=True), "big")
    if length > max_bytes:
        raise ProtocolError(f"peer {stream.peer_id} announced a message of {length} bytes; the limit is {max_bytes}")
    return wire.decode(await _receive_exactly(stream, length, between=False), message_type, max_bytes=max_bytes)


async def _receive_exactly(stream: FabricStream, count: int, *, between: bool) -> bytearray:
    received = bytearray()
    while len(received) < count:
        # In pieces: what is allocated follows what has come, not what was announced.
        piece = await stream.read(min(count - len(received), limits.STREAM_READ_MAX_BYTES))
        if not piece:
            if between and not received:
                raise LinkClosedError(f"peer {stream.peer_id} closed the stream")
            raise LinkClosedError(f"peer {stream.peer_id} closed the stream in the middle of a message")
        received += piece
    return received
