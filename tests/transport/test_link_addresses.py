"""Which addresses are dialed for a direct link, and in what order."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.transport.addresses import dial_order, host_id, parse_address

ADDRESSES = [
    "/ip4/127.0.0.1/tcp/1",
    "/ip4/10.9.0.1/tcp/2",
    "/ip4/192.168.7.9/tcp/3",
    "/ip4/8.8.8.8/tcp/4",
    "/ip6/2606:4700::1/tcp/5",
    "/ip6/fd00::9/tcp/6",
    "/ip6/::1/tcp/7",
]
MINE = ["/ip4/192.168.1.2/tcp/1", "/ip6/fd00::1/tcp/1", "/dns/me/tcp/1"]


def ports(*, same_host: bool = False, proven: str | None = None, mine: list[str] = MINE) -> list[int]:
    return [port for _, port in dial_order(ADDRESSES, same_host=same_host, proven=proven, mine=mine)]


def test_the_same_network_goes_before_the_internet_and_loopback_last() -> None:
    assert ports() == [3, 6, 4, 5, 2, 1, 7]


def test_loopback_goes_first_on_the_same_host() -> None:
    assert ports(same_host=True)[:2] == [1, 7]


def test_an_address_that_the_control_plane_uses_goes_before_others() -> None:
    assert ports(proven="/ip4/8.8.8.8/tcp/999")[0] == 4
    assert ports(proven="/p2p-circuit/x") == ports()


def test_without_own_addresses_public_ones_go_first() -> None:
    assert ports(mine=[])[:2] == [4, 5]


def test_what_cannot_be_dialed_is_left_out() -> None:
    bad = ["/dns/example.org/tcp/1", "/ip4/0.0.0.0/tcp/1", "/ip4/1.2.3.4/udp/1", "nonsense", "/ip4/1.2.3.4/tcp/1"]
    assert [str(ip) for ip, _ in dial_order([*bad, bad[-1]], same_host=False, proven=None, mine=[])] == ["1.2.3.4"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3/tcp/1",
        "/ip6/1.2.3.4/tcp/1",
        "/ip6/fe80::1%eth0/tcp/1",
        "/ip6/fe80::1%\0/tcp/1",
        f"/ip6/fe80::1%{'x' * 100}/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip4/1.2.3.4/tcp/0",
        "/ip4/1.2.3.4/tcp/65536",
        "/ip4/1.2.3.4/tcp/x",
        "/ip4/1.2.3.4/tcp/\u0661",
        "x/ip4/1.2.3.4/tcp/1",
    ],
)
def test_what_is_no_tcp_address(text: str) -> None:
    assert parse_address(text) is None


def test_an_address_may_name_its_peer() -> None:
    parsed = parse_address("/ip4/1.2.3.4/tcp/5/p2p/12D3KooW")
    assert parsed is not None
    assert (str(parsed[0]), parsed[1]) == ("1.2.3.4", 5)


def test_host_ids_are_equal_on_one_host_and_within_one_mesh_only(tmp_path: Path) -> None:
    assert host_id(b"m" * 32, SYSTEM_ENTROPY) == host_id(b"m" * 32, SYSTEM_ENTROPY)
    assert host_id(b"m" * 32, SYSTEM_ENTROPY) != host_id(b"n" * 32, SYSTEM_ENTROPY)
    unknown = [host_id(b"m" * 32, SYSTEM_ENTROPY, boot_id=tmp_path / "none") for _ in range(2)]
    assert unknown[0] != unknown[1]
    assert {len(made) for made in unknown} == {16}
