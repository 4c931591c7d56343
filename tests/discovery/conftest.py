"""Peers, randomness and UDP ports for the tests of discovery."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from sparkle_mesh.fabric.identity import Identity
from tests.entropies import SeededEntropy

TAG = b"t" * 32


class TestClock:
    """Wall-clock time that the test sets."""

    __test__ = False

    def __init__(self) -> None:
        self.time = 1_800_000_000.0

    def now(self) -> float:
        return self.time

    def wall_time(self) -> float:
        return self.time


@pytest.fixture
def entropy() -> SeededEntropy:
    return SeededEntropy()


@pytest.fixture
def wall_clock() -> TestClock:
    return TestClock()


@pytest.fixture
def tag() -> bytes:
    return TAG


@pytest.fixture(scope="session")
def peer_ids() -> list[str]:
    """Sixteen real peer ids, smallest first."""
    return sorted(Identity.generate().peer_id for _ in range(16))


@pytest.fixture
def group_port() -> Iterator[int]:
    """A UDP port for beacons of this test alone: held by a socket that shares it with those that reuse addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def shout(group_port: int) -> Iterator[Callable[[bytes], None]]:
    """Send a datagram to the beacons' group on the loopback interface."""
    from sparkle_mesh import limits

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        yield lambda data: sender.sendto(data, (limits.BEACON_GROUP, group_port)) and None
