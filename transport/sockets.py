"""The options of data sockets, and why."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

from sparkle_mesh import limits


def tune_socket(sock: socket.socket) -> None:
    """Set the options of a data connection.

    Small messages must leave at once (no Nagle). A host that was switched off is noticed by keepalives, though
    nothing is sent to it. ``TCP_USER_TIMEOUT`` ends a connection that takes no data; as Linux counts the time of a
    full window too, it must be longer than any member may be slow, which is the deadline of a collective.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", limits.SOCKET_KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", limits.SOCKET_KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", limits.SOCKET_KEEPALIVE_PROBES_COUNT),
        ("TCP_USER_TIMEOUT", int(limits.COLLECTIVE_TIMEOUT_S * 1000)),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    if sys.platform == "linux" and _is_within_this_host(sock):
        # Many hosts default to BBR, which paces by timers: within a host that is a wake-up for every few segments, and
        # took 20 to 40% longer (64 MiB all_reduce of 2 ranks: 130 ms, with Reno 90 to 110). Nothing is lost there, so
        # the plainest will do; it is the one that every kernel lets everybody choose.
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _is_within_this_host(sock: socket.socket) -> bool:
    here, there = sock.getsockname()[0], sock.getpeername()[0]
    return bool(here == there)
