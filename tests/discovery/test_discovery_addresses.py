from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.discovery import addresses
from sparkle_mesh.discovery.addresses import (
    EXAMPLE,
    Endpoint,
    dialable,
    is_loopback,
    is_peer_id_text,
    parse_endpoint,
    parse_join_address,
)
from sparkle_mesh.errors import UsageError


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        ("/ip4/10.0.0.1/tcp/4001", Endpoint("ip4", "10.0.0.1", 4001)),
        ("/ip6/::1/tcp/1", Endpoint("ip6", "::1", 1)),
        ("/dns/my-host.example.org/tcp/65535", Endpoint("dns", "my-host.example.org", 65535)),
        ("/dns4/a/tcp/2", Endpoint("dns4", "a", 2)),
        ("/dns6/a.b./tcp/2", Endpoint("dns6", "a.b.", 2)),
    ],
)
def test_endpoints_that_can_be_dialed(address, endpoint):
    assert parse_endpoint(address) == endpoint


@pytest.mark.parametrize(
    "address",
    [
        "",
        "10.0.0.1:4001",
        "/ip4/10.0.0.1/udp/4001",
        "/ip4/10.0.0.1/udp/4001/quic-v1",
        "/ip4/10.0.0.1/tcp/4001/ws",
        "/ip4/10.0.0.1/tcp/0",
        "/ip4/10.0.0.1/tcp/65536",
        "/ip4/10.0.0.1/tcp/999999999999",
        "/ip4/10.0.0.1/tcp/-1",
        "/ip4/10.0.0.1/tcp/4²",
        "/ip4/10.0.0.1/tcp/",
        "/ip4/0.0.0.0/tcp/4001",
        "/ip6/::/tcp/4001",
        "/ip4/239.1.2.3/tcp/4001",
        "/ip4/::1/tcp/4001",
        "/ip6/10.0.0.1/tcp/4001",
        "/ip6/fe80::1%eth0/tcp/4001",
        "/ip4/nowhere/tcp/4001",
        "/dns4/-bad/tcp/4001",
        "/dns4/bad host/tcp/4001",
        "/dns4//tcp/4001",
        "/dnsaddr/bootstrap.example/tcp/4001",
        "x/ip4/10.0.0.1/tcp/4001",
        "/dns4/" + "a" * limits.ADDRESS_MAX_CHARS + "/tcp/4001",
    ],
)
def test_what_cannot_be_dialed(address):
    assert parse_endpoint(address) is None
    assert not is_loopback(address)


@given(st.text(max_size=80) | st.lists(st.sampled_from(["ip4", "ip6", "tcp", "1", "::", "a", ""])).map("/".join))
def test_any_text_is_parsed_or_refused(text):
    assert parse_endpoint(text) is None or text.startswith("/")
    assert isinstance(is_loopback(text), bool)
    assert isinstance(is_peer_id_text(text), bool)
    with pytest.raises(UsageError):
        parse_join_address(text)


@pytest.mark.parametrize(
    ("address", "answer"),
    [
        ("/ip4/127.0.0.1/tcp/1", True),
        ("/ip4/127.8.9.1/tcp/1", True),
        ("/ip6/::1/tcp/1", True),
        ("/dns4/localhost/tcp/1", True),
        ("/dns/LOCALHOST./tcp/1", True),
        ("/ip4/10.0.0.1/tcp/1", False),
        ("/dns/example.org/tcp/1", False),
    ],
)
def test_loopback(address, answer):
    assert is_loopback(address) is answer


def test_dialable_keeps_order_drops_doubles_tails_and_the_unusable():
    found = dialable(
        "abc", ["/ip4/1.2.3.4/tcp/5", "/ip4/1.2.3.4/tcp/5/p2p/abc", "nonsense", "/ip4/1.2.3.5/tcp/5/p2p/xyz"]
    )
    assert found == ("/ip4/1.2.3.4/tcp/5",)
    many = [f"/ip4/1.2.3.{i}/tcp/5" for i in range(100)]
    assert dialable("abc", many) == tuple(many[: limits.ADDRESSES_PER_PEER_MAX_COUNT])


@pytest.mark.parametrize("text", ["", "a b", "a\nb", "ä", "a/b", "x" * (limits.PEER_ID_MAX_CHARS + 1)])
def test_no_peer_ids(text):
    assert not is_peer_id_text(text)


def test_join_address(peer_ids):
    assert parse_join_address(f" /ip4/1.2.3.4/tcp/5/p2p/{peer_ids[0]}\n") == (peer_ids[0], "/ip4/1.2.3.4/tcp/5")
    peer_id, address = parse_join_address(EXAMPLE)
    assert address == "/ip4/192.168.1.4/tcp/45654"
    assert EXAMPLE.endswith(peer_id)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("/ip4/1.2.3.4/tcp/5", "lacks the peer id"),
        ("1.2.3.4:5", "neither an address nor an invite"),
        ("/ip4/1.2.3.4/tcp/5/p2p/abc", "no peer id"),
        ("/ip4/1.2.3.4/tcp/5/p2p/", "no peer id"),
        (EXAMPLE.replace("/tcp/", "/udp/"), "does not start with an address"),
        (EXAMPLE[:-1] + "0", "no peer id"),
        ("x" * 10_000, "10000 characters. is neither"),
    ],
)
def test_wrong_join_address_is_told_with_an_example(text, complaint):
    with pytest.raises(UsageError, match=complaint) as caught:
        parse_join_address(text)
    assert addresses.EXAMPLE in str(caught.value)
    assert len(str(caught.value)) < 1000
