"""The networks that ``wan.py`` measures on, and how fast a ring could be on each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from _wan_link import Settings

IPV4_TCP_HEADERS = 40
TIMESTAMPS = 12
# Of IPv4 and TCP with timestamps, as Linux sends by default.
HEADERS = IPV4_TCP_HEADERS + TIMESTAMPS


@dataclass(frozen=True)
class Scenario:
    """One network, what is reduced on it, and what share of its wire Sparkle is to reach."""

    name: str
    rates: tuple[float, ...]  # bits per second, of every host
    delay_s: float
    loss: float
    nbytes: int
    goal: float | None
    iterations: int
    queue_bytes: int | None = None
    card: bool = False  # whether a host's rate is that of its own network card, and not of a router behind it

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return len(self.rates)

    def settings(self) -> list[Settings]:
        """Return what every host's links are like."""
        return [Settings(rate, rate, self.delay_s, self.loss, self.queue_bytes, self.card) for rate in self.rates]

    def wire_seconds(self, nbytes: int, mtu: int) -> float:
        """Return the time in which the slowest host's link carries what a ring sends, and one round trip.

        A ring sends ``2 (n - 1) / n`` of the array, in segments that are full, over the rate of the slowest.
        """
        payload = 2 * (self.hosts - 1) / self.hosts * nbytes
        goodput = min(self.rates) / 8 * (mtu - HEADERS) / mtu
        return payload / goodput + 2 * self.delay_s

    def describe(self) -> str:
        """Return the network in a few words."""
        rates = sorted({rate / 1e6 for rate in self.rates}, reverse=True)
        text = f"{self.hosts} hosts, {' and '.join(f'{rate:g}' for rate in rates)} Mbit/s"
        return f"{text}, {2e3 * self.delay_s:g} ms round trip" + (f", {self.loss:.2%} loss" if self.loss else "")


_WAN = Scenario("wan", rates=(100e6,) * 4, delay_s=25e-3, loss=0.0, nbytes=16 << 20, goal=0.92, iterations=3)
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "lan", rates=(1e9,) * 4, delay_s=100e-6, loss=0.0, nbytes=64 << 20, goal=0.97, iterations=4, card=True
        ),
        _WAN,
        dataclasses.replace(_WAN, name="lossy", loss=0.001, goal=0.85, iterations=2),
        Scenario(
            "uneven",
            rates=(1e9, 1e9, 1e9, 100e6),
            delay_s=100e-6,
            loss=0.0,
            nbytes=16 << 20,
            goal=None,
            iterations=3,
            card=True,
        ),
    )
}
