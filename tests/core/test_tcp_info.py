"""What the kernel tells of a connection."""

from __future__ import annotations

import socket
import struct
import sys

import pytest

from sparkle_mesh.tcp_info import TcpInfo, parse_tcp_info, read_tcp_info


def tcp_info(*, flags: int, round_trip_us: int, bytes_per_s: int, least_us: int = 2**32 - 1) -> bytes:
    data = bytearray(248)
    data[7] = flags
    struct.pack_into("=I", data, 68, round_trip_us)
    struct.pack_into("=I", data, 148, least_us)
    struct.pack_into("=Q", data, 160, bytes_per_s)
    return bytes(data)


def test_what_it_tells() -> None:
    # Of the flags, the lowest alone says that the sender had no more; others stand beside it.
    assert parse_tcp_info(tcp_info(flags=0xAA, round_trip_us=50_000, bytes_per_s=10**7)) == TcpInfo(0.05, 1e7, False)
    assert parse_tcp_info(tcp_info(flags=1, round_trip_us=0, bytes_per_s=0)) == TcpInfo(None, None, True)
    # The least has waited for nothing.
    assert parse_tcp_info(tcp_info(flags=0, round_trip_us=50_000, bytes_per_s=0, least_us=200)) == TcpInfo(
        0.0002, None, False
    )


@pytest.mark.parametrize("length", [0, 8, 104, 167])
def test_older_kernels_tell_less(length: int) -> None:
    assert parse_tcp_info(tcp_info(flags=0, round_trip_us=1, bytes_per_s=1)[:length]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no TCP_INFO of this form")
def test_a_connection_of_this_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as one, listener.accept()[0]:
            told = read_tcp_info(one)
            assert told is not None
            assert told.round_trip_s is not None
            assert 0 < told.round_trip_s < 1
            assert told.bytes_per_s is None
        assert read_tcp_info(one) is None
