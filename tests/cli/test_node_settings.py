"""What options come to, and which are refused in one line that names the option."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.cli.settings import (
    DEFAULT_LISTEN,
    DEFAULT_MESH,
    NodeSettings,
    ReachOptions,
    check_join_address,
    check_listen_address,
    resolve_settings,
)
from sparkle_mesh.discovery.bootstrap import PUBLIC_BOOTSTRAP
from sparkle_mesh.discovery.reach import ReachConfig
from sparkle_mesh.errors import UsageError
from sparkle_mesh.fabric.relay_book import RelayLimits
from sparkle_mesh.membership.invite import Invite
from sparkle_mesh.membership.keys import MeshKey

PEER = "12D3KooWAYucWkX6d52XG8B5M93hDKmYChBEgEZSxufKqmB2ZvpY"
ADDRESS = f"/ip4/10.0.0.1/tcp/45654/p2p/{PEER}"
KEY = MeshKey(bytes(range(32)))
OTHER_KEY = MeshKey(bytes(32))


def resolve(**changes: Any) -> NodeSettings:
    options: dict[str, Any] = {"mesh": None, "key_file": None, "join": (), "listen": (), "public": False, "lan": True}
    return resolve_settings(**{**options, "data_dir": Path("/data"), **changes})


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    KEY.save(tmp_path / "mesh.key")
    return tmp_path / "mesh.key"


def test_nothing_chosen() -> None:
    settings = resolve()
    assert (settings.mesh, settings.key, settings.listen, settings.listen_chosen) == (
        DEFAULT_MESH,
        None,
        (DEFAULT_LISTEN,),
        False,
    )


def test_everything_chosen(key_file: Path) -> None:
    listen = ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/45654")
    chosen: dict[str, Any] = {"join": (ADDRESS,), "listen": listen, "public": True, "lan": False, "allow": (PEER,)}
    settings = resolve(mesh="m", key_file=key_file, **chosen)
    assert settings.reach is not None
    assert settings.reach.bootstrap == ()
    assert replace(settings, reach=None) == NodeSettings(
        mesh="m",
        key=KEY,
        join=(ADDRESS,),
        listen=listen,
        listen_chosen=True,
        public=True,
        allow=(PEER,),
        lan=False,
        data_dir=Path("/data"),
    )


def reach_of(public: bool = False, **options: Any) -> ReachConfig:
    return ReachOptions(**options).resolve(mesh="m", keyed=False, public=public)


def test_nobody_beyond_the_local_network_is_looked_for_unless_the_mesh_is_open_to_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SPARKLE_BOOTSTRAP")
    assert reach_of().bootstrap == ()
    assert not reach_of().port_mapping
    assert reach_of(public=True).bootstrap == PUBLIC_BOOTSTRAP
    assert reach_of(public=True).port_mapping
    assert reach_of(public=True, internet=False).bootstrap == ()
    assert ReachOptions().resolve(mesh="m", keyed=True, public=False).bootstrap == PUBLIC_BOOTSTRAP
    by_name = ReachOptions().resolve(mesh="global.example.org", keyed=False, public=True)
    assert by_name.bootstrap == (*PUBLIC_BOOTSTRAP, "/dnsaddr/global.example.org")
    # DNS is not told the name of a mesh with a key.
    assert ReachOptions().resolve(mesh="a.example.org", keyed=True, public=False).bootstrap == PUBLIC_BOOTSTRAP
    assert reach_of(public=True, bootstrap=("none",)).bootstrap == ()
    monkeypatch.setenv("SPARKLE_BOOTSTRAP", "junk")
    with pytest.raises(UsageError, match="SPARKLE_BOOTSTRAP: bootstrap peer 'junk' is neither"):
        reach_of()
    monkeypatch.setenv("SPARKLE_BOOTSTRAP", f"{ADDRESS}, none ,")
    assert reach_of(public=True).bootstrap == (ADDRESS,)
    assert reach_of(public=True, bootstrap=("/dnsaddr/example.org",)).bootstrap == ("/dnsaddr/example.org",)


def test_what_is_lent_as_a_relay_and_said_of_reachability() -> None:
    assert reach_of().relay == RelayLimits(bytes_per_s=limits.RELAY_BYTES_PER_S)
    assert reach_of(relay_bandwidth="500kB").relay == RelayLimits(bytes_per_s=500e3)
    assert reach_of(relay_bandwidth="0").relay is None
    assert reach_of().reachability is None
    assert reach_of(reachability="private").reachability == "private"
    for options, complaint in (
        ({"bootstrap": (ADDRESS,), "internet": False}, "contradict"),
        ({"bootstrap": ("/ip4/10.0.0.1/tcp/1",)}, "ends in a peer id"),
        ({"bootstrap": (f"/ip4/10.0.0.1/udp/1/p2p/{PEER}",)}, "no TCP address"),
        ({"bootstrap": ("/dnsaddr/",)}, "is no domain's"),
        ({"relay_bandwidth": "much"}, "no amount of memory"),
    ):
        with pytest.raises(UsageError, match=complaint):
            reach_of(**options)


def test_any_port_keeps_the_rest() -> None:
    settings = resolve(mesh="m", listen=("/ip4/127.0.0.1/tcp/45654", "/ip6/::/tcp/1"))
    assert settings.on_any_port().listen == ("/ip4/127.0.0.1/tcp/0", "/ip6/::/tcp/0")
    assert settings.on_any_port().mesh == "m"


def test_an_invite_brings_name_and_key(key_file: Path) -> None:
    invite = Invite("ours", KEY, (ADDRESS,)).encode()
    for options in ({}, {"mesh": "ours"}, {"key_file": key_file}, {"mesh": "ours", "key_file": key_file}):
        settings = resolve(join=(invite, ADDRESS, invite), **options)
        assert (settings.mesh, settings.key, settings.join) == ("ours", KEY, (invite, ADDRESS, invite))


def test_an_invite_to_a_mesh_without_a_key() -> None:
    settings = resolve(join=(Invite("open", None, ()).encode(),))
    assert (settings.mesh, settings.key) == ("open", None)


def test_invites_that_contradict_are_refused(key_file: Path) -> None:
    ours, other_name = Invite("ours", KEY, ()).encode(), Invite("theirs", KEY, ()).encode()
    other_key, no_key = Invite("ours", OTHER_KEY, ()).encode(), Invite("ours", None, ()).encode()
    with pytest.raises(UsageError, match="'ours', not to 'mine'"):
        resolve(mesh="mine", join=(ours,))
    with pytest.raises(UsageError, match="one mesh at a time"):
        resolve(join=(ours, other_name))
    for first, second in ((ours, other_key), (ours, no_key), (no_key, ours)):
        with pytest.raises(UsageError, match="holds another key"):
            resolve(join=(first, second))
    for invite in (other_key, no_key):
        with pytest.raises(UsageError, match="holds another key"):
            resolve(key_file=key_file, join=(invite,))


def test_the_founder_is_named_by_one(key_file: Path) -> None:
    assert resolve(key_file=key_file, founder=PEER).founder == PEER
    ours = Invite("ours", KEY, (), founder=PEER).encode()
    assert resolve(join=(ours,), founder=PEER).founder == PEER
    other = Invite("ours", KEY, (), founder="12D3KooWOther").encode()
    with pytest.raises(UsageError, match="names 12D3KooWOther as the mesh's founder"):
        resolve(join=(other,), founder=PEER)
    with pytest.raises(UsageError, match="mesh without a key"):
        resolve(founder=PEER)


def test_a_damaged_invite_is_refused() -> None:
    with pytest.raises(UsageError, match="cut or mistyped"):
        resolve(join=(Invite("ours", KEY, ()).encode()[:-3],))


def test_a_missing_key_file_and_a_bad_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        resolve(key_file=tmp_path / "absent")
    for name in ("", "x" * 256, "a\nb"):
        with pytest.raises(UsageError, match="mesh name"):
            resolve(mesh=name)


@pytest.mark.parametrize("address", ["/ip4/0.0.0.0/tcp/0", "/ip4/127.0.0.1/tcp/65535", "/ip6/::/tcp/1"])
def test_addresses_to_listen_on(address: str) -> None:
    check_listen_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "45654",
        "0.0.0.0:45654",
        "/ip4/0.0.0.0",
        "/ip4/0.0.0.0/udp/1",
        "/ip4/0.0.0.0/tcp/",
        "/ip4/0.0.0.0/tcp/65536",
        "/ip4/0.0.0.0/tcp/-1",
        "/ip4/0.0.0.0/tcp/000000000001",
        "/ip4/0.0.0.0/tcp/٣",
        "/ip4/256.0.0.1/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip6/0.0.0.0/tcp/1",
        "/dns4/localhost/tcp/1",
        "/ip4/0.0.0.0/tcp/1/",
        "x/ip4/0.0.0.0/tcp/1",
    ],
)
def test_what_cannot_be_listened_on(address: str) -> None:
    with pytest.raises(UsageError, match=r"--listen .* is not an address to listen on"):
        resolve(listen=(address,))


@pytest.mark.parametrize("host", ["ip4/10.0.0.1", "ip6/fe80::1", "dns/a.example", "dns4/a.example", "dns6/a.example"])
def test_addresses_to_join(host: str) -> None:
    check_join_address(f"/{host}/tcp/45654/p2p/{PEER}")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "10.0.0.1:45654",
        "/ip4/10.0.0.1/tcp/45654",
        "/ip4/10.0.0.1/tcp/45654/p2p/",
        f"/ip4/10.0.0.1/tcp/0/p2p/{PEER}",
        f"/ip4/10.0.0/tcp/1/p2p/{PEER}",
        f"/ip4/10.0.0.1/udp/1/p2p/{PEER}",
        f"/dns4//tcp/1/p2p/{PEER}",
        f"/nope/10.0.0.1/tcp/1/p2p/{PEER}",
        "/ip4/10.0.0.1/tcp/1/p2p/not a peer",
    ],
)
def test_what_cannot_be_joined(address: str) -> None:
    with pytest.raises(UsageError, match=r"--join .* is neither an invite nor an address"):
        resolve(join=(address,))


@given(st.text())
def test_any_text_is_an_address_or_refused(text: str) -> None:
    for check in (check_listen_address, check_join_address):
        with contextlib.suppress(UsageError):
            check(text)
