"""The options of data sockets, and why."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from math import ceil
from typing import Any, Final, Protocol

import trio

from sparkle_mesh import limits
from sparkle_mesh.tcp_info import HasOptions, read_tcp_info

#: Writing to a connection that is gone is an error, not a signal.
NO_SIGNAL: Final = getattr(socket, "MSG_NOSIGNAL", 0)
BBR: Final = b"bbr"
_LINGER_POLL_S: Final = 0.01
# The longest name of a congestion control, with its end.
_NAME_BYTES: Final = 16


class TunableSocket(HasOptions, Protocol):
    """A connected socket, of the standard library or of trio."""

    def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None: ...

    def getsockname(self) -> Any: ...

    def getpeername(self) -> Any: ...


def take_socket(stream: trio.SocketStream) -> socket.socket:
    """Return the plain socket beneath ``stream``, which is of no more use; tuned, and it does not block."""
    # First, because it fails if the peer is gone already; the stream is its owner's to close then.
    tune_socket(stream.socket)
    sock = socket.socket(fileno=stream.socket.detach())
    sock.setblocking(False)
    return sock


def tune_socket(sock: TunableSocket) -> None:
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
    if sys.platform == "linux":
        _choose_congestion_control(sock)


if sys.platform == "linux":

    def _choose_congestion_control(sock: TunableSocket) -> None:
        """Choose how fast the connection sends, where the system's choice is known to be a bad one.

        *Within this host*, Reno. Many hosts default to BBR, which paces by timers: within a host that is a wake-up for
        every few segments, and took 20 to 40% longer (64 MiB all_reduce of 2 ranks: 130 ms, with Reno 90 to 110).
        Nothing is lost there, so the plainest will do; it is the one that every kernel lets everybody choose.

        *Over a long way*, BBR, where this process may choose it (``net.ipv4.tcp_allowed_congestion_control``, or
        root) and the system has it. Reno and CUBIC take every loss for a sign of congestion, and need many round
        trips to recover from one; BBR goes by the rate and the round trip that it measures. It does not fall back
        to slow start after a pause either, and collectives pause. 16 MiB all_reduce of 4 hosts, 100 Mbit/s, 50 ms
        round trip, 0.1% of the packets lost: 26 s with one CUBIC stream, 5 s with 15, 3 s with one of BBR.

        *Between*, what the administrator has chosen: all of them fill a short way.
        """
        info = read_tcp_info(sock)
        wanted = None
        if _is_within_this_host(sock):
            wanted = b"reno"
        elif info is not None and (info.round_trip_s or 0.0) >= limits.LINK_NEAR_ROUND_TRIP_S:
            wanted = BBR
        if wanted is not None:
            with suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, wanted)

    def congestion_control(sock: HasOptions) -> bytes:
        """Return the name of what governs how fast the connection sends."""
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _NAME_BYTES).partition(b"\0")[0]

else:  # pragma: no cover - others let nobody choose

    def _choose_congestion_control(sock: TunableSocket) -> None:
        pass

    def congestion_control(sock: HasOptions) -> bytes:
        """Return the name of what governs how fast the connection sends: nobody can tell."""
        return b""


def _is_within_this_host(sock: TunableSocket) -> bool:
    here, there = sock.getsockname()[0], sock.getpeername()[0]
    return bool(here == there)


def stream_count(round_trip_s: float, control: bytes, most: int) -> int:
    """Return how many streams a link gets, the first, which carries no large payloads, included.

    Over a short way one fills the wire, and more would only cost. Over a long way what limits a stream of Reno's kin is
    loss: by Mathis's formula (M. Mathis, J. Semke, J. Mahdavi, T. Ott, "The macroscopic behavior of the TCP congestion
    avoidance algorithm", 1997) its rate is ``1.22 / sqrt(loss)`` segments per round trip; so the longer the way, the
    more of them. BBR does not slow down for a few losses, and several such streams only compete with each other: 16 MiB
    over 4 hosts, 100 Mbit/s, 50 ms round trip, 0.1% loss (medians, packets of 9000 bytes, a busy machine): one stream
    for all 2.6 s, one beside that for heads 2.2 s, two 2.6 s, three 2.9 s; seven of CUBIC 2.7 s.

    Parameters
    ----------
    round_trip_s
        To the peer.
    control
        The name of the congestion control of this end.
    most
        That were agreed on.
    """
    if round_trip_s < limits.LINK_NEAR_ROUND_TRIP_S:
        return 1
    wanted = ceil(limits.LINK_LOSSY_RATE_BYTES_PER_S * round_trip_s / limits.LINK_LOSSY_STREAM_BYTES)
    if control == BBR:
        wanted = min(wanted, limits.LINK_STREAMS_BBR_COUNT)
    return min(1 + wanted, most)


def limit_unsent(sock: socket.socket) -> None:
    """Let the kernel take little more than it can send now, so that it tells which of several connections can go on.

    Without, it buffers megabytes for a connection that has just stalled, while others would have carried them.
    """
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, limits.LINK_STREAM_UNSENT_MAX_BYTES)


# Linux's SO_MAX_PACING_RATE, which the module does not name.
_PACING_RATE_OPTION = 47
_UNLIMITED_BYTES_PER_S = 2**32 - 1


def pace_socket(sock: TunableSocket, bytes_per_s: float | None) -> None:
    """Let the kernel send no faster than this; as fast as it will if None."""
    if sys.platform == "linux":
        rate = _UNLIMITED_BYTES_PER_S if bytes_per_s is None else min(max(int(bytes_per_s), 1), _UNLIMITED_BYTES_PER_S)
        sock.setsockopt(socket.SOL_SOCKET, _PACING_RATE_OPTION, rate.to_bytes(4, sys.byteorder))


async def linger(sock: socket.socket, scratch: memoryview) -> None:
    """Wait until the peer has all that was sent. Whoever calls this has a deadline.

    Raises
    ------
    OSError
        If the connection is gone.
    """
    # The mark that large records were awaited with would keep the peer's end from waking us.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    while not all_acknowledged(sock):
        try:
            # What comes meanwhile is nobody's any more. Room for it lets the peer's end come through.
            if not sock.recv_into(scratch):
                return
        except BlockingIOError:
            with trio.move_on_after(_LINGER_POLL_S):
                await trio.lowlevel.wait_readable(sock)


if sys.platform == "linux":
    import fcntl
    import termios

    def all_acknowledged(sock: socket.socket) -> bool:
        """Whether the peer's kernel has everything that was sent, the end of the stream included."""
        return not int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

else:  # pragma: no cover - elsewhere the peer's end of the stream is what tells

    def all_acknowledged(sock: socket.socket) -> bool:
        """Whether the peer's kernel has everything that was sent: nobody can tell."""
        return False
