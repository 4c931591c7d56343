"""What a relay promises and carries: the machine."""

from __future__ import annotations

import pytest

from sparkle_mesh import limits
from sparkle_mesh.fabric.relay_book import RelayBook, RelayLimits, Throttle

BOUNDS = RelayLimits(
    reservations_max_count=2,
    circuits_max_count=3,
    circuits_per_peer_max_count=2,
    circuit_max_s=60.0,
    circuit_max_bytes=100,
    bytes_per_s=1000.0,
)


@pytest.fixture
def book() -> RelayBook:
    return RelayBook(BOUNDS, 0.0)


def test_places_are_few_renewed_and_end(book: RelayBook) -> None:
    assert book.reserve("a", None, 0.0) == limits.RELAY_RESERVATION_S
    assert book.reserve("b", None, 1.0) == limits.RELAY_RESERVATION_S
    assert book.reserve("c", None, 2.0) is None
    assert book.reserve("a", None, 3.0) is not None
    assert book.reservation_count(4.0) == 2
    assert book.has_reservation("a", limits.RELAY_RESERVATION_S + 2)
    assert not book.has_reservation("b", limits.RELAY_RESERVATION_S + 2)
    assert book.reserve("c", None, limits.RELAY_RESERVATION_S + 2) is not None
    book.gone("a")
    assert not book.has_reservation("a", 5.0)
    assert book.reserve("d", None, limits.RELAY_RESERVATION_S + 2) is not None


def test_one_network_gets_its_share_of_the_places() -> None:
    book = RelayBook(RelayLimits(), 0.0)
    share = limits.RELAY_RESERVATIONS_PER_NETWORK_MAX_COUNT
    assert all(book.reserve(f"a{number}", "44.0.0.0/24", 0.0) for number in range(share))
    assert book.reserve("one more", "44.0.0.0/24", 0.0) is None
    assert book.reserve("a0", "44.0.0.0/24", 0.0) is not None
    assert book.reserve("other", "44.0.1.0/24", 0.0) is not None
    # Those of local networks are there by permission.
    assert all(book.reserve(f"b{number}", None, 0.0) for number in range(share + 1))


def test_circuits_are_few_in_all_and_for_one_peer(book: RelayBook) -> None:
    first, second = book.open_circuit("a", "b", 0.0), book.open_circuit("c", "b", 0.0)
    assert first is not None
    assert second is not None
    assert book.open_circuit("d", "b", 0.0) is None
    third = book.open_circuit("a", "d", 0.0)
    assert third is not None
    assert book.open_circuit("e", "f", 0.0) is None
    assert book.circuit_count == 3
    book.close_circuit(first)
    assert book.open_circuit("e", "b", 0.0) is not None
    assert first.ends_at == 60.0


def test_a_circuit_carries_so_much_in_each_direction(book: RelayBook) -> None:
    circuit = book.open_circuit("a", "b", 0.0)
    assert circuit is not None
    assert circuit.take("a", 100)
    assert circuit.take("b", 99)
    assert not circuit.take("a", 1)
    assert circuit.take("b", 1)


def test_what_is_over_the_rate_waits() -> None:
    throttle = Throttle(1000.0, 0.0)
    assert throttle.wait_s(1000, 0.0) == 0.0
    assert throttle.wait_s(500, 0.0) == pytest.approx(0.5)
    assert throttle.wait_s(500, 0.5) == pytest.approx(0.5)
    # What was not used for long is not saved up.
    assert throttle.wait_s(1000, 100.0) == 0.0
    assert throttle.wait_s(1000, 100.0) == pytest.approx(1.0)
