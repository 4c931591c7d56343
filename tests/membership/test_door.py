"""Who may come in, and who may not any more."""

from __future__ import annotations

import pytest

from sparkle_mesh import limits
from sparkle_mesh.membership.bans import Bans
from sparkle_mesh.membership.door import Door

NEAR, FAR = "/ip4/192.168.1.4/tcp/1", "/ip4/8.8.4.4/tcp/1"


def test_few_offences_are_accidents_and_many_are_banned_for_ever_longer():
    bans, now = Bans(), 0.0
    for expected in (limits.BAN_MIN_S, 2 * limits.BAN_MIN_S, 4 * limits.BAN_MIN_S):
        for _ in range(limits.OFFENCES_MAX_COUNT - 1):
            assert bans.offended("a", now) == 0.0
        assert bans.offended("a", now) == expected
        assert bans.banned_for("a", now + expected - 1.0) == pytest.approx(1.0)
        assert bans.banned_for("b", now) == 0.0
        now += expected
        assert bans.banned_for("a", now) == 0.0
    for _ in range(100):
        bans.offended("a", now)
    assert bans.banned_for("a", now) == limits.BAN_MAX_S


def test_what_is_long_ago_does_not_count():
    bans = Bans()
    for number in range(20):
        assert bans.offended("a", number * limits.OFFENCES_REMEMBERED_S / (limits.OFFENCES_MAX_COUNT - 1)) == 0.0


def test_a_flood_of_offenders_is_bounded_and_displaces_the_oldest():
    bans = Bans(max_count=10)
    for number in range(100):
        for _ in range(limits.OFFENCES_MAX_COUNT):
            bans.offended(f"peer {number}", 0.0)
    assert len(bans) == 10
    assert bans.banned_for("peer 99", 1.0) > 0
    assert bans.banned_for("peer 3", 1.0) == 0


def test_reasons():
    door = Door(keyed=False, public=False)
    assert door.refusal("a", NEAR, [], 0.0) is None
    assert "LAN only" in door.refusal("a", FAR, [], 0.0).reason
    full = [NEAR] * limits.MESH_PEERS_MAX_COUNT
    assert "peers are connected already" in door.refusal("a", NEAR, full, 0.0).reason
    for _ in range(limits.OFFENCES_MAX_COUNT):
        door.offended("a", 5.0)
    assert "too often: not for another 600 s" in door.refusal("a", NEAR, [], 5.0).reason
    assert door.ban("a", 5.0) is not None
    assert door.refusal("b", NEAR, [], 5.0) is None


@pytest.mark.parametrize("keyed", [True, False])
def test_one_network_brings_so_many_into_an_open_mesh(keyed):
    door = Door(keyed=keyed, public=True)
    crowd = [f"/ip4/8.8.4.{number}/tcp/1" for number in range(limits.MESH_PEERS_PER_NETWORK_MAX_COUNT)]
    assert door.refusal("a", FAR, crowd[1:], 0.0) is None
    refusal = door.refusal("a", FAR, crowd, 0.0)
    assert (refusal is None) == keyed
    if refusal is not None:
        assert "64 peers of the network 8.8.4.0/24 are connected already" in refusal.reason
    assert door.refusal("a", "/ip4/9.9.9.9/tcp/1", crowd, 0.0) is None
    assert door.refusal("a", NEAR, crowd, 0.0) is None
