"""How many streams a link gets, and what governs how fast they send."""

from __future__ import annotations

import socket
import sys

import pytest

from sparkle_mesh import limits
from sparkle_mesh.transport.sockets import BBR, congestion_control, stream_count, tune_socket


@pytest.mark.parametrize(
    ("round_trip_s", "control", "count"),
    [
        (0.0, b"cubic", 1),
        (0.0019, b"cubic", 1),
        (0.0019, BBR, 1),
        (0.002, b"cubic", 2),
        (0.01, b"cubic", 3),
        (0.05, b"cubic", 9),
        (0.05, b"", 9),
        (0.05, BBR, 2),
        (3.0, b"cubic", limits.LINK_STREAMS_MAX_COUNT),
        (3.0, BBR, 2),
    ],
)
def test_streams_by_distance(round_trip_s: float, control: bytes, count: int) -> None:
    assert stream_count(round_trip_s, control, limits.LINK_STREAMS_MAX_COUNT) == count
    assert stream_count(round_trip_s, control, 1) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems let nobody choose")
def test_within_a_host_nothing_paces(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as one,
        listener.accept()[0],
    ):
        tune_socket(one)
        assert congestion_control(one) == b"reno"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems let nobody choose")
def test_over_a_long_way_bbr_where_it_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparkle_mesh.transport import sockets

    monkeypatch.setattr(sockets, "_is_within_this_host", lambda _sock: False)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as one,
        listener.accept()[0],
    ):
        before = congestion_control(one)
        tune_socket(one)
        assert congestion_control(one) == before
        monkeypatch.setattr(limits, "LINK_NEAR_ROUND_TRIP_S", 0.0)
        tune_socket(one)
        # A process that may not choose it keeps what the system has.
        assert congestion_control(one) in (BBR, before)
