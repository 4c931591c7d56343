"""Addresses that lead through relays, and what else reads addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh.discovery.addresses import dialable, is_loopback, parse_join_address
from sparkle_mesh.errors import ProtocolError, UsageError
from sparkle_mesh.fabric.circuits import Circuit, circuit_address, is_circuit, named_peer, parse_circuit, without_peer
from sparkle_mesh.fabric.identity import Identity, check_peer_id
from sparkle_mesh.fabric.multiaddrs import address_of_bytes, address_to_bytes, is_tcp, peer_of_bytes, peer_to_bytes
from sparkle_mesh.fabric.networks import is_local_address, network_of
from sparkle_mesh.transport.addresses import parse_address

RELAY, PEER = Identity(bytes(32)).peer_id, Identity(bytes([1]) * 32).peer_id
DIRECT = "/ip4/44.0.0.1/tcp/45654"
THROUGH = f"{DIRECT}/p2p/{RELAY}/p2p-circuit"


def test_what_it_says_and_how_it_is_made() -> None:
    assert circuit_address(RELAY, DIRECT) == THROUGH
    assert parse_circuit(THROUGH) == Circuit(RELAY, DIRECT)
    assert parse_circuit(f"{THROUGH}/p2p/{PEER}") == Circuit(RELAY, DIRECT)
    assert is_circuit(THROUGH)
    assert not is_circuit(DIRECT)


@pytest.mark.parametrize(
    "address",
    [
        DIRECT,
        "/p2p-circuit",
        f"{DIRECT}/p2p-circuit",
        f"{THROUGH}{THROUGH}",
        f"{THROUGH}/tcp/1",
        f"{DIRECT}/p2p//p2p-circuit",
        f"{DIRECT}/p2p/{RELAY}/p2p/{RELAY}/p2p-circuit",
        "",
    ],
)
def test_what_is_none(address: str) -> None:
    assert parse_circuit(address) is None


def test_the_tail_that_names_the_peer() -> None:
    assert without_peer(f"{DIRECT}/p2p/{PEER}") == without_peer(DIRECT) == DIRECT
    assert without_peer(f"{THROUGH}/p2p/{PEER}") == without_peer(THROUGH) == THROUGH
    assert named_peer(f"{DIRECT}/p2p/{PEER}") == named_peer(f"{THROUGH}/p2p/{PEER}") == PEER
    assert named_peer(DIRECT) is None
    assert named_peer(THROUGH) is None


def test_it_is_dialed_but_tells_nothing_of_where_the_peer_is() -> None:
    assert dialable(PEER, [THROUGH, f"{DIRECT}/p2p-circuit", f"{THROUGH}/p2p/{PEER}"]) == (THROUGH,)
    assert parse_join_address(f"{THROUGH}/p2p/{PEER}") == (PEER, THROUGH)
    with pytest.raises(UsageError, match="can be dialed"):
        parse_join_address(f"{DIRECT}/p2p-circuit/p2p/{PEER}")
    # The relay may be on this network, and the peer anywhere.
    assert not is_local_address(THROUGH.replace("44.0.0.1", "192.168.1.1"))
    assert not is_loopback(THROUGH.replace("44.0.0.1", "127.0.0.1"))
    # Limits by network count it as the relay's.
    assert network_of(THROUGH) == network_of(DIRECT) == "44.0.0.0/24"
    # No link is dialed at the relay's own address.
    assert parse_address(THROUGH) is None


@given(st.text(max_size=60))
def test_no_text_is_taken_for_one_that_cannot_be_made_again(text: str) -> None:
    circuit = parse_circuit(text)
    assert circuit is None or without_peer(text) == circuit_address(circuit.relay_id, circuit.relay_address)


def test_addresses_and_peers_as_bytes() -> None:
    for address in (DIRECT, THROUGH, "/ip6/2001:db8::1/tcp/1"):
        assert address_of_bytes(address_to_bytes(f"{address}/p2p/{PEER}")) == address
    assert peer_of_bytes(peer_to_bytes(PEER)) == PEER
    assert is_tcp(DIRECT)
    assert not is_tcp(THROUGH)
    assert not is_tcp("/ip4/1.2.3.4/udp/1")
    assert address_of_bytes(bytes(1000)) is None


@given(st.binary(max_size=80))
def test_any_bytes_for_an_address_or_a_peer(data: bytes) -> None:
    address = address_of_bytes(data)
    assert address is None or address.isprintable()
    assert peer_of_bytes(data).isalnum() or not data


def test_peers_of_other_kinds_of_keys() -> None:
    check_peer_id(PEER)
    check_peer_id("QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN")
    for wrong in ("", "Qm", "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJ", "l" * 46, "1" * 500):
        with pytest.raises(ProtocolError, match="not an Ed25519 peer id"):
            check_peer_id(wrong)
