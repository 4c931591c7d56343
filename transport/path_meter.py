"""What is known of the way that a link's bytes take: latency and bandwidth, without load of its own."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK, Clock
from sparkle_mesh.tcp_info import HasOptions, TcpInfo, read_tcp_info


class PathMeter:
    """Reads what the kernel has measured on a link's connections, and smooths it.

    Attributes
    ----------
    latency_s
        Half a round trip; None if none was measured.
    bandwidth_bytes_per_s
        What all connections together delivered when there was enough to send; None until there was.
    """

    def __init__(self, latency_s: float | None, clock: Clock = SYSTEM_CLOCK) -> None:
        self.latency_s = latency_s
        self.bandwidth_bytes_per_s: float | None = None
        self._clock = clock
        self._measured_at = clock.now()

    def measure(self, connections: Sequence[HasOptions]) -> None:
        """Take in what is known of ``connections`` now; those that are closed tell nothing."""
        self.take([info for sock in connections if (info := read_tcp_info(sock)) is not None], self._clock.now())

    def take(self, infos: Sequence[TcpInfo], now: float) -> None:
        """Take in what is known of each connection."""
        round_trips = [info.round_trip_s for info in infos if info.round_trip_s is not None]
        if round_trips:
            self.latency_s = min(round_trips) / 2
        rates = [info.bytes_per_s for info in infos if info.bytes_per_s is not None]
        if not rates:
            return
        rate = sum(rates)
        known = self.bandwidth_bytes_per_s
        # However often somebody asks, what was measured before fades at one pace.
        weight = 1 - exp((self._measured_at - now) / limits.LINK_BANDWIDTH_SMOOTHING_S)
        if all(info.limited_by_sender for info in infos if info.bytes_per_s is not None):
            # As much as there was to send: the way carries at least that, and counts only if more than was known.
            if known is not None and rate > known:
                self.bandwidth_bytes_per_s = rate
                self._measured_at = now
        else:
            self.bandwidth_bytes_per_s = rate if known is None else known + weight * (rate - known)
            self._measured_at = now
