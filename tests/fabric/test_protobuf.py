"""Protocol buffers over streams, whole, cut, oversized and made up."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
from google.protobuf.wrappers_pb2 import BytesValue
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError, SparkleError
from sparkle_mesh.fabric.protobuf import encode_varint, receive_protobuf, send_protobuf


@pytest.mark.parametrize(("number", "encoded"), [(0, b"\0"), (127, b"\x7f"), (128, b"\x80\x01"), (300, b"\xac\x02")])
def test_varints(number: int, encoded: bytes) -> None:
    assert encode_varint(number) == encoded


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
async def test_what_is_sent_is_received(scripted_stream, piece: int) -> None:
    sent = scripted_stream()
    for size in (0, 1, 127, 128, 60_000):
        await send_protobuf(sent, BytesValue(value=bytes(size)))
    stream = scripted_stream(sent.written, piece)
    for size in (0, 1, 127, 128, 60_000):
        assert (await receive_protobuf(stream, BytesValue)).value == bytes(size)
    with pytest.raises(LinkClosedError, match="closed the stream"):
        await receive_protobuf(stream, BytesValue)


async def test_what_is_refused(scripted_stream) -> None:
    for data, error, complaint in (
        (encode_varint(limits.PROTOBUF_MESSAGE_MAX_BYTES + 1), ProtocolError, "announced a message of 65537 bytes"),
        (b"\xff" * 20, ProtocolError, "length of over 9 bytes"),
        (b"\x05\x0a\x09abc", ProtocolError, "sent no BytesValue"),
        (b"\x05\x0a", LinkClosedError, "in the middle of a message"),
        (b"\x80", LinkClosedError, "closed the stream"),
    ):
        with pytest.raises(error, match=complaint):
            await receive_protobuf(scripted_stream(data), BytesValue)


async def test_who_sends_nothing_is_not_waited_for(autojump_clock) -> None:
    class Silent:
        peer_id = "silent"

        async def read(self, max_bytes: int) -> bytes:
            await trio.sleep_forever()
            raise AssertionError

    with pytest.raises(LinkClosedError, match="sent no BytesValue within 5 s"):
        await receive_protobuf(Silent(), BytesValue)  # type: ignore[arg-type]


@given(st.binary(max_size=40))
def test_any_bytes(data: bytes) -> None:
    from tests.fabric.conftest import ScriptedStream

    async def receive() -> None:
        with suppress(SparkleError):
            await receive_protobuf(ScriptedStream(data), BytesValue)  # type: ignore[arg-type]

    trio.run(receive)
