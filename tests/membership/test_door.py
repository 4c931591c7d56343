"""Who may come in, and who may not any more."""

from __future__ import annotations

import pytest

from sparkle_mesh import limits
from sparkle_mesh.errors import UsageError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.membership.bans import Bans
from sparkle_mesh.membership.certificates import sign_certificate
from sparkle_mesh.membership.door import Door, checked_allow
from sparkle_mesh.membership.messages import Introduction, Refused, Role
from sparkle_mesh.membership.revocations import RevocationList
from sparkle_mesh.membership.view import Member

TAG = b"t" * 32
NODE = Identity(bytes(range(32)))
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
    door = Door(keyed=False, public=False, tag=TAG)
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
    door = Door(keyed=keyed, public=True, tag=TAG)
    crowd = [f"/ip4/8.8.4.{number}/tcp/1" for number in range(limits.MESH_PEERS_PER_NETWORK_MAX_COUNT)]
    assert door.refusal("a", FAR, crowd[1:], 0.0) is None
    refusal = door.refusal("a", FAR, crowd, 0.0)
    assert (refusal is None) == keyed
    if refusal is not None:
        assert "64 peers of the network 8.8.4.0/24 are connected already" in refusal.reason
    assert door.refusal("a", "/ip4/9.9.9.9/tcp/1", crowd, 0.0) is None
    assert door.refusal("a", NEAR, crowd, 0.0) is None


def introduction(name: str, certificate: bytes | None = None, role: Role = "trainer") -> Introduction:
    member = Member(peer_id=name, incarnation=bytes(16))
    return Introduction(role=role, member=member, host_id=bytes(16), min_peers=1, addresses=(), certificate=certificate)


def test_whose_machine_a_peer_is_of():
    door = Door(keyed=True, public=False, tag=TAG)
    certificate = sign_certificate(NODE, "a", TAG, lifetime_s=100)
    assert door.introduced("a", introduction("a", certificate), 0.0) == NODE.peer_id
    assert door.introduced("a", introduction("a"), 0.0) is None
    assert door.introduced("n", introduction("n", role="node"), 0.0) == "n"
    # One that has lapsed is not believed, and that is all.
    for _ in range(limits.OFFENCES_MAX_COUNT):
        assert door.introduced("a", introduction("a", certificate), 101.0) is None
    assert door.ban("a", 101.0) is None


def test_whoever_shows_what_is_not_its_own_is_refused_and_banned_for_it():
    door = Door(keyed=True, public=False, tag=TAG)
    shown = [
        (introduction("b"), "introduced itself as b"),
        (introduction("a", sign_certificate(NODE, "b", TAG)), "is that of 'b'"),
        (introduction("a", sign_certificate(NODE, "a", bytes(32))), "for another mesh"),
    ]
    for told, reason in shown:
        assert door.ban("a", 0.0) is None
        refused = door.introduced("a", told, 0.0)
        assert isinstance(refused, Refused)
        assert reason in refused.reason
    assert "too often" in door.ban("a", 0.0).reason


def test_only_those_on_the_list_come_in_and_whom_they_certify():
    listed, other = Identity.generate(), Identity.generate()
    door = Door(keyed=True, public=False, tag=TAG, allow=(listed.peer_id, "t"))
    assert door.introduced(listed.peer_id, introduction(listed.peer_id, role="node"), 0.0) == listed.peer_id
    assert door.introduced("a", introduction("a", sign_certificate(listed, "a", TAG)), 0.0) == listed.peer_id
    assert door.introduced("t", introduction("t"), 0.0) is None
    lapsed = sign_certificate(listed, "l", TAG, lifetime_s=1)
    assert door.introduced("l", introduction("l", lapsed), 0.0) == listed.peer_id
    for name, told, shown in (
        ("b", introduction("b"), "it has shown no certificate"),
        ("n", introduction("n", role="node"), "it is of machine n"),
        ("b", introduction("b", sign_certificate(other, "b", TAG)), f"it is of machine {other.peer_id}"),
        ("l", introduction("l", lapsed), "its certificate came 9 s ago and was good for 1 s"),
    ):
        refused = door.introduced(name, told, 9.0)
        assert isinstance(refused, Refused)
        assert f"{name} is not on the list of peers that are allowed here" in refused.reason
        assert shown in refused.reason
        # That is no offence: it may have been put on the list of others.
        assert door.ban(name, 9.0) is None
    # What is forged is one, on a list or not.
    forged = door.introduced("b", introduction("b", sign_certificate(listed, "a", TAG)), 0.0)
    assert isinstance(forged, Refused)
    assert "is that of 'a'" in forged.reason


def test_ones_own_machine_need_not_be_on_the_list():
    door = Door(keyed=True, public=False, tag=TAG, allow=("somebody",))
    certificate = sign_certificate(NODE, "a", TAG)
    assert isinstance(door.introduced("a", introduction("a", certificate), 0.0), Refused)
    assert door.introduced("a", introduction("a", certificate), 0.0, own=NODE.peer_id) == NODE.peer_id
    # Where this process has no machine, those without a certificate are not of the same one.
    assert isinstance(door.introduced("b", introduction("b"), 0.0, own=None), Refused)


def test_what_is_no_peer_id_is_not_put_on_the_list():
    assert checked_allow("--allow", [NODE.peer_id, NODE.peer_id]) == (NODE.peer_id,)
    for wrong in ("", "12D3KooW", NODE.peer_id[:-1] + "0", "x" * 1000):
        with pytest.raises(UsageError, match=r"--allow: .* is not an Ed25519 peer id; .* `sparkle-node id` prints"):
            checked_allow("--allow", [NODE.peer_id, wrong])


def test_who_is_revoked_is_refused_before_and_after_the_proof():
    founder = Identity.generate()
    revocations = RevocationList(TAG, founder.peer_id)
    door = Door(keyed=True, public=False, tag=TAG, allow=(NODE.peer_id,), revocations=revocations)
    certified = introduction("a", sign_certificate(NODE, "a", TAG))
    assert door.introduced("a", certified, 0.0) == NODE.peer_id
    assert door.refusal(NODE.peer_id, NEAR, [], 0.0) is None
    revocations.take(revocations.revoking(founder, NODE.peer_id))
    for refused in (
        door.refusal(NODE.peer_id, NEAR, [], 0.0),
        door.ban(NODE.peer_id, 0.0),
        door.introduced(NODE.peer_id, introduction(NODE.peer_id, role="node"), 0.0),
    ):
        assert isinstance(refused, Refused)
        assert refused.reason == f"{NODE.peer_id} was revoked by the mesh's founder"
    refused = door.introduced("a", certified, 0.0, own=NODE.peer_id)
    assert isinstance(refused, Refused)
    assert refused.reason == f"{NODE.peer_id}, the machine that a is of, was revoked by the mesh's founder"
