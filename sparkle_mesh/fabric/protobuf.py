"""Protocol buffers over a stream, each after its length as a varint: how libp2p's own protocols talk.

The messages of our own protocols are MessagePack (:mod:`.framing`); these are for what other libp2p programs speak.
"""

from __future__ import annotations

from typing import TypeVar

import trio
from google.protobuf.message import DecodeError, Message

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError
from sparkle_mesh.fabric.interface import FabricStream

M = TypeVar("M", bound=Message)


def encode_varint(number: int) -> bytes:
    """Return ``number`` (not negative) as libp2p's unsigned varint."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


async def send_protobuf(stream: FabricStream, message: Message) -> None:
    """Send one message. A cancelled call may have sent part of it: reset the stream then.

    Raises
    ------
    LinkClosedError
        If the stream is closed.
    """
    body = message.SerializeToString()
    await stream.write(encode_varint(len(body)) + body)


async def receive_protobuf(
    stream: FabricStream,
    message_type: type[M],
    *,
    max_bytes: int = limits.PROTOBUF_MESSAGE_MAX_BYTES,
    timeout_s: float = limits.PROTOBUF_ANSWER_TIMEOUT_S,
) -> M:
    """Receive one message. A cancelled call may have taken part of it: reset the stream then.

    Raises
    ------
    LinkClosedError
        At the end of the stream, or if nothing whole has come within ``timeout_s``.
    ProtocolError
        If the announced length is over ``max_bytes``, or the bytes are no such message.
    """
    with trio.move_on_after(timeout_s):
        return await _receive(stream, message_type, max_bytes)
    raise LinkClosedError(f"peer {stream.peer_id} sent no {message_type.__name__} within {timeout_s:g} s")


async def _receive(stream: FabricStream, message_type: type[M], max_bytes: int) -> M:
    length = await _receive_varint(stream)
    if length > max_bytes:
        raise ProtocolError(f"peer {stream.peer_id} announced a message of {length} bytes; the limit is {max_bytes}")
    body = bytearray()
    while len(body) < length:
        piece = await stream.read(min(length - len(body), limits.STREAM_READ_MAX_BYTES))
        if not piece:
            raise LinkClosedError(f"peer {stream.peer_id} closed the stream in the middle of a message")
        body += piece
    message = message_type()
    try:
        message.ParseFromString(bytes(body))
    except DecodeError as error:
        raise ProtocolError(f"peer {stream.peer_id} sent no {message_type.__name__}: {error}") from error
    return message


async def _receive_varint(stream: FabricStream) -> int:
    number = 0
    for place in range(limits.VARINT_MAX_BYTES):
        byte = await stream.read(1)
        if not byte:
            raise LinkClosedError(f"peer {stream.peer_id} closed the stream")
        number |= (byte[0] & 0x7F) << (7 * place)
        if byte[0] < 0x80:
            return number
    raise ProtocolError(
        f"peer {stream.peer_id} announced a message with a length of over {limits.VARINT_MAX_BYTES} bytes"
    )
