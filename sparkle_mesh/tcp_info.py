"""What the kernel has measured on a TCP connection, by itself, while it carried other things. Linux only.

Source: ``struct tcp_info`` of ``include/uapi/linux/tcp.h``. It only ever grows at its end; a kernel that knows less of
it returns less.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Final, NamedTuple, Protocol

# Offsets in the struct, and the units of the fields there.
_FLAGS: Final = 7
_APP_LIMITED: Final = 1
_ROUND_TRIP_US: Final = (68, struct.Struct("=I"))
_LEAST_ROUND_TRIP_US: Final = (148, struct.Struct("=I"))
_DELIVERY_RATE: Final = (160, struct.Struct("=Q"))
_BYTES: Final = 168
# In the place of a round trip where none was measured yet.
_UNKNOWN: Final = (0, 2**32 - 1)


class TcpInfo(NamedTuple):
    """What is known of the way that a connection's bytes take.

    Attributes
    ----------
    round_trip_s
        The shortest of the last minutes, which waited in no queue, nor for a busy processor; None until the kernel has
        measured one.
    bytes_per_s
        At which rate the peer's kernel received of late; None until there was enough to send.
    limited_by_sender
        Whether the rate is only what there was to send, so that the way may carry more.
    """

    round_trip_s: float | None
    bytes_per_s: float | None
    limited_by_sender: bool


class HasOptions(Protocol):
    """A socket, of the standard library or of trio."""

    def getsockopt(self, level: int, option: int, buflen: int, /) -> bytes:
        """Return an option as bytes."""
        ...


def read_tcp_info(sock: HasOptions) -> TcpInfo | None:
    """Return what the kernel knows of ``sock``; None if it tells nothing, or the socket is closed."""
    if sys.platform != "linux":  # pragma: no cover - others have no such option, or another layout
        return None
    try:
        data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES)
    except OSError:
        return None
    return parse_tcp_info(data)


def parse_tcp_info(data: bytes) -> TcpInfo | None:
    """Return what ``data``, a ``struct tcp_info`` of this machine's byte order, tells; None if it is too short."""
    if len(data) < _BYTES:
        return None
    round_trips_us = [kind.unpack_from(data, at)[0] for at, kind in (_ROUND_TRIP_US, _LEAST_ROUND_TRIP_US)]
    known_us = [round_trip_us for round_trip_us in round_trips_us if round_trip_us not in _UNKNOWN]
    (rate,) = _DELIVERY_RATE[1].unpack_from(data, _DELIVERY_RATE[0])
    return TcpInfo(
        min(known_us) / 1e6 if known_us else None,
        float(rate) or None,
        bool(data[_FLAGS] & _APP_LIMITED),
    )
