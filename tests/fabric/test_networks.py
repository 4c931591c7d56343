"""Where addresses are."""

from __future__ import annotations

import pytest

from sparkle_mesh.fabric.networks import ip_of, is_local_address, network_of


@pytest.mark.parametrize(
    ("address", "local", "network"),
    [
        ("/ip4/127.0.0.1/tcp/1", True, None),
        ("/ip4/192.168.3.4/tcp/1", True, None),
        ("/ip4/10.0.0.1/tcp/1", True, None),
        ("/ip6/::1/tcp/1", True, None),
        ("/ip6/fe80::1%eth0/tcp/1", True, None),
        ("/ip4/8.8.4.4/tcp/1", False, "8.8.4.0/24"),
        ("/ip6/2607:f8b0:4005:805::1/tcp/1", False, "2607:f8b0:4005::/48"),
        ("/dns4/example.org/tcp/1", False, None),
        ("/ip4/300.1.1.1/tcp/1", False, None),
        ("/memory/7", True, None),
        ("", False, None),
        (None, False, None),
    ],
)
def test_places(address, local, network):
    assert is_local_address(address) is local
    assert network_of(address) == network
    assert (ip_of(address) is None) == (address is None or "/ip" not in address or "300" in address)
