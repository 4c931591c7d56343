"""What a relay has promised to whom, and what it carries: a machine without I/O.

The relay is that of libp2p's circuit relay v2 (libp2p specification, "Circuit Relay v2"): a peer that nobody can dial
*reserves* a place at a relay that it is connected to; others ask the relay to *connect* them to it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sparkle_mesh import limits
from sparkle_mesh.fabric.interface import PeerId


@dataclass(frozen=True, kw_only=True, slots=True)
class RelayLimits:
    """What the owner of a machine lends to others as a relay.

    Attributes
    ----------
    reservations_max_count, circuits_max_count, circuits_per_peer_max_count
        Peers that others may reach through this one; what it carries at a time, in all and for one peer.
    circuit_max_s, circuit_max_bytes
        For how long a circuit may last, and what it may carry in each direction.
    bytes_per_s
        What all of them together may carry, both directions added up.
    """

    reservations_max_count: int = limits.RELAY_RESERVATIONS_MAX_COUNT
    circuits_max_count: int = limits.RELAY_CIRCUITS_MAX_COUNT
    circuits_per_peer_max_count: int = limits.RELAY_CIRCUITS_PER_PEER_MAX_COUNT
    circuit_max_s: float = limits.RELAY_CIRCUIT_MAX_S
    circuit_max_bytes: int = limits.RELAY_CIRCUIT_MAX_BYTES
    bytes_per_s: float = limits.RELAY_BYTES_PER_S


class Throttle:
    """A token bucket of a second's worth: whoever takes more than there is waits."""

    def __init__(self, bytes_per_s: float, now: float) -> None:
        self._rate = bytes_per_s
        self._left = bytes_per_s
        self._at = now

    def wait_s(self, count: int, now: float) -> float:
        """Take ``count`` bytes out; return how long to wait until they may go."""
        self._left = min(self._left + (now - self._at) * self._rate, self._rate) - count
        self._at = now
        return max(-self._left / self._rate, 0.0)


@dataclass(eq=False, slots=True)
class OpenCircuit:
    """One circuit, from its opening to its end."""

    source: PeerId
    target: PeerId
    ends_at: float
    left_bytes: dict[PeerId, int] = field(default_factory=dict)

    def take(self, sender: PeerId, count: int) -> bool:
        """Count what ``sender`` sends; return whether it may still be carried."""
        self.left_bytes[sender] -= count
        return self.left_bytes[sender] >= 0


class RelayBook:
    """Reservations and circuits within :class:`RelayLimits`.

    Attributes
    ----------
    carried_bytes
        Since the start, both directions.
    """

    def __init__(self, bounds: RelayLimits, now: float) -> None:
        self.bounds = bounds
        self.throttle = Throttle(bounds.bytes_per_s, now)
        self.carried_bytes = 0
        self._expires_at: dict[PeerId, float] = {}
        self._networks: dict[PeerId, str | None] = {}
        self._circuits: set[OpenCircuit] = set()

    @property
    def circuit_count(self) -> int:
        """Circuits that are open."""
        return len(self._circuits)

    def reservation_count(self, now: float) -> int:
        """Peers that have a place."""
        self._forget(now)
        return len(self._expires_at)

    def reserve(self, peer_id: PeerId, network: str | None, now: float) -> float | None:
        """Give ``peer_id``, which is connected from ``network``, a place; return for how long, or None if none is free.

        A place that it has is renewed.
        """
        self._forget(now)
        if peer_id not in self._expires_at:
            if len(self._expires_at) >= self.bounds.reservations_max_count:
                return None
            of_network = sum(other == network for other in self._networks.values())
            if network is not None and of_network >= limits.RELAY_RESERVATIONS_PER_NETWORK_MAX_COUNT:
                return None
        self._expires_at[peer_id] = now + limits.RELAY_RESERVATION_S
        self._networks[peer_id] = network
        return limits.RELAY_RESERVATION_S

    def has_reservation(self, peer_id: PeerId, now: float) -> bool:
        """Whether ``peer_id`` has a place."""
        return self._expires_at.get(peer_id, now) > now

    def gone(self, peer_id: PeerId) -> None:
        """``peer_id`` is connected no more: its place is free."""
        self._expires_at.pop(peer_id, None)
        self._networks.pop(peer_id, None)

    def open_circuit(self, source: PeerId, target: PeerId, now: float) -> OpenCircuit | None:
        """Return a new circuit; None if there are too many. Tell :meth:`close_circuit` when it ends."""
        of_each = Counter(peer for circuit in self._circuits for peer in (circuit.source, circuit.target))
        per_peer = self.bounds.circuits_per_peer_max_count
        if len(self._circuits) >= self.bounds.circuits_max_count:
            return None
        if of_each[source] >= per_peer or of_each[target] >= per_peer:
            return None
        allowed = self.bounds.circuit_max_bytes
        circuit = OpenCircuit(source, target, now + self.bounds.circuit_max_s, {source: allowed, target: allowed})
        self._circuits.add(circuit)
        return circuit

    def close_circuit(self, circuit: OpenCircuit) -> None:
        """``circuit`` has ended."""
        self._circuits.discard(circuit)

    def _forget(self, now: float) -> None:
        for peer_id in [peer_id for peer_id, expires_at in self._expires_at.items() if expires_at <= now]:
            self.gone(peer_id)
