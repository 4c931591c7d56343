"""Wire formats: golden bytes, fuzz, and the two kinds of header kept apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh import limits, wire
from sparkle_mesh.collectives.messages import (
    DATA_HEADER_BYTES,
    Abort,
    Begin,
    Control,
    Prepared,
    call_digest,
    data_operation,
    decode_control,
    encode_data,
    is_data,
)
from sparkle_mesh.errors import ProtocolError

GOLDEN = Path(__file__).parent / "golden"

MESSAGES: dict[str, Control] = {
    "begin-1": Begin(
        epoch=7,
        lineage=bytes(range(32)),
        operation=12,
        tag="gradients",
        incarnation=b"i" * 16,
        kind="all_reduce",
        digest=b"d" * 32,
        description="all_reduce(float32[3, 4], op='sum', algorithm='ring')",
    ),
    "prepared-1": Prepared(epoch=7, operation=12, digest=b"p" * 16),
    "abort-1": Abort(epoch=7, operation=12, cause="lost", origin=3, lost=1, reason="the link has ended"),
}


@pytest.mark.parametrize("name", list(MESSAGES))
def test_golden_bytes(name: str) -> None:
    golden = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    assert wire.encode(MESSAGES[name]) == golden
    assert decode_control(memoryview(golden)) == MESSAGES[name]


def test_golden_data_header() -> None:
    header = encode_data(2, 3, 4, 5, 6)
    assert header == bytes.fromhex((GOLDEN / "data-1.hex").read_text())
    assert is_data(memoryview(header))
    assert data_operation(memoryview(header)) == (5, 6)
    assert len(header) == DATA_HEADER_BYTES


def test_control_messages_are_never_taken_for_data() -> None:
    for message in MESSAGES.values():
        assert not is_data(memoryview(wire.encode(message)))


def test_the_largest_begin_fits_a_link_header() -> None:
    begin = Begin(
        epoch=2**32 - 1,
        lineage=b"l" * 32,
        operation=2**63 - 1,
        tag="t" * limits.NAME_MAX_CHARS,
        incarnation=b"i" * 16,
        kind="k" * 32,
        digest=b"d" * 32,
        description="…" * limits.COLLECTIVE_DESCRIPTION_MAX_CHARS,
    )
    assert len(wire.encode(begin)) <= limits.LINK_HEADER_MAX_BYTES


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_control(memoryview(data))


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(list(MESSAGES)),
    cut=st.integers(0, 400),
    position=st.integers(0, 400),
    byte=st.integers(0, 255),
)
def test_mutated_messages_parse_or_are_protocol_errors(name: str, cut: int, position: int, byte: int) -> None:
    data = bytearray(wire.encode(MESSAGES[name]))
    data[position % len(data)] = byte
    for candidate in (data, data[: cut % len(data)]):
        try:
            message = decode_control(memoryview(candidate))
        except ProtocolError:
            continue
        assert isinstance(message, Begin | Prepared | Abort)
        assert message.operation >= 1


def test_call_digests_tell_types_apart() -> None:
    assert call_digest((1, "a", None)) == call_digest((1, "a", None))
    assert call_digest((1, "a", None)) != call_digest((1, "a", ""))
    assert call_digest((("ab",), "c")) != call_digest((("a",), "bc"))
