from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkle_mesh import limits, wire
from sparkle_mesh.errors import LinkClosedError, ProtocolError, UsageError
from sparkle_mesh.fabric.framing import encode_frame, receive_message, send_message


class Note(wire.Message, frozen=True, tag="note"):
    text: Annotated[str, msgspec.Meta(max_length=300_000)]
    number: wire.Count = 0


class Other(wire.Message, frozen=True, tag="other"):
    flag: bool


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 1 << 20])
async def test_messages_arrive_however_they_are_cut(scripted_stream, piece):
    messages = [Note(text="a"), Note(text="", number=7), Note(text="x" * 1000)]
    sender = scripted_stream()
    for message in messages:
        await send_message(sender, message)
    receiver = scripted_stream(sender.written, piece)
    assert [await receive_message(receiver, Note) for _ in messages] == messages
    with pytest.raises(LinkClosedError, match=r"scripted-peer closed the stream$"):
        await receive_message(receiver, Note)


async def test_unions_of_tagged_messages(scripted_stream):
    stream = scripted_stream(encode_frame(Other(flag=True)) + encode_frame(Note(text="n")))
    assert await receive_message(stream, Note | Other) == Other(flag=True)
    assert await receive_message(stream, Note | Other) == Note(text="n")


@pytest.mark.parametrize("cut", range(1, len(encode_frame(Note(text="abc")))))
async def test_an_end_inside_a_message_says_so(scripted_stream, cut):
    stream = scripted_stream(encode_frame(Note(text="abc"))[:cut], 1)
    with pytest.raises(LinkClosedError, match="in the middle of a message"):
        await receive_message(stream, Note)


async def test_an_announced_length_over_the_limit_reads_nothing_more(scripted_stream):
    stream = scripted_stream((limits.CONTROL_MESSAGE_MAX_BYTES + 1).to_bytes(4, "big") + b"rest")
    with pytest.raises(ProtocolError, match=f"{limits.CONTROL_MESSAGE_MAX_BYTES + 1} bytes; the limit is"):
        await receive_message(stream, Note)
    assert stream.data == b"rest"


async def test_a_large_announced_length_is_read_in_bounded_pieces(scripted_stream):
    stream = scripted_stream(b"\xff\xff\xff\xff" + b"abc")
    with pytest.raises(LinkClosedError):
        await receive_message(stream, Note, max_bytes=2**32)
    assert stream.largest_read == limits.STREAM_READ_MAX_BYTES


async def test_a_message_of_exactly_the_limit_passes_and_one_more_byte_does_not(scripted_stream):
    size = len(wire.encode(Note(text="abc")))
    stream = scripted_stream()
    await send_message(stream, Note(text="abc"), max_bytes=size)
    assert await receive_message(scripted_stream(stream.written), Note, max_bytes=size) == Note(text="abc")
    with pytest.raises(UsageError, match=f"Note takes {size} bytes; at most {size - 1}"):
        await send_message(stream, Note(text="abc"), max_bytes=size - 1)
    with pytest.raises(ProtocolError):
        await receive_message(scripted_stream(stream.written), Note, max_bytes=size - 1)


async def test_sending_on_a_closed_stream(scripted_stream):
    stream = scripted_stream()
    await stream.aclose()
    with pytest.raises(LinkClosedError):
        await send_message(stream, Note(text=""))


@given(data=st.binary(max_size=64), piece=st.integers(1, 8))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_parses_or_raises_a_named_error(scripted_stream, data, piece):
    for stream in (scripted_stream(data, piece), scripted_stream(len(data).to_bytes(4, "big") + data, piece)):
        with suppress(ProtocolError, LinkClosedError):
            assert isinstance(trio.run(receive_message, stream, Note), Note)


@given(position=st.integers(0, 200), value=st.integers(0, 255))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_parses_or_raises_a_named_error(scripted_stream, position, value):
    frame = bytearray(encode_frame(Note(text="some text", number=5)))
    frame[position % len(frame)] = value
    with suppress(ProtocolError, LinkClosedError):
        assert isinstance(trio.run(receive_message, scripted_stream(bytes(frame)), Note), Note)
