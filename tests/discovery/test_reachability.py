"""What follows from what others say of this process: the machine."""

from __future__ import annotations

import pytest

from sparkle_mesh import limits
from sparkle_mesh.discovery.reachability import Reachability

HOME, OUTSIDE, LISTEN = "/ip4/192.168.1.2/tcp/45654", "/ip4/44.0.0.7/tcp/45654", "/ip4/44.0.0.1/tcp/45654"


@pytest.fixture
def at_home() -> Reachability:
    reachability = Reachability()
    reachability.listens([HOME, "/ip4/127.0.0.1/tcp/45654"])
    return reachability


def test_nothing_is_known_before_anybody_tells(at_home: Reachability) -> None:
    assert at_home.verdict() == "unknown"
    assert at_home.candidates() == at_home.seen_at() == at_home.advertised() == ()


def test_who_is_seen_where_it_is_not_is_behind_a_nat(at_home: Reachability) -> None:
    at_home.seen("a", OUTSIDE, 0.0)
    assert at_home.verdict() == "private"
    assert at_home.candidates() == at_home.seen_at() == (OUTSIDE,)
    assert at_home.advertised() == ()


def test_who_is_seen_where_it_listens_may_still_be_behind_a_firewall() -> None:
    reachability = Reachability()
    reachability.listens([LISTEN])
    reachability.seen("a", LISTEN, 0.0)
    assert reachability.verdict() == "unknown"
    reachability.dialed_back("a", False, 1.0)
    assert reachability.verdict() == "private"
    reachability.dialed_back("a", True, 2.0)
    assert reachability.verdict() == "public"
    assert reachability.advertised() == ()


def test_a_port_that_is_passed_on_is_advertised_once_somebody_has_dialed_it(at_home: Reachability) -> None:
    at_home.seen("a", OUTSIDE, 0.0)
    at_home.dialed_back("a", False, 0.0)
    at_home.mapped("/ip4/44.0.0.7/tcp/1234")
    assert at_home.candidates() == ("/ip4/44.0.0.7/tcp/1234", OUTSIDE)
    assert at_home.advertised() == ()
    at_home.dialed_back("a", True, 1.0)
    assert at_home.advertised() == ("/ip4/44.0.0.7/tcp/1234", OUTSIDE)


def test_one_liar_among_several_is_not_believed(at_home: Reachability) -> None:
    for name in ("a", "b"):
        at_home.seen(name, OUTSIDE, 0.0)
        at_home.dialed_back(name, False, 0.0)
    at_home.seen("liar", "/ip4/8.8.8.8/tcp/53", 0.0)
    at_home.dialed_back("liar", True, 0.0)
    assert at_home.verdict() == "private"
    assert at_home.seen_at()[0] == OUTSIDE
    for name in ("a", "b"):
        at_home.dialed_back(name, True, 0.0)
    # Others are not sent to the address of somebody else.
    assert at_home.advertised() == (OUTSIDE,)


def test_what_was_said_long_ago_does_not_count_and_few_are_listened_to(at_home: Reachability) -> None:
    for number in range(3 * limits.REACH_OBSERVERS_MAX_COUNT):
        at_home.seen(f"p{number}", f"/ip4/44.0.0.{number}/tcp/1", float(number))
    assert len(at_home.seen_at()) <= limits.HOLE_PUNCH_ADDRESSES_MAX_COUNT
    at_home.seen("last", OUTSIDE, limits.REACH_REPORT_MAX_AGE_S + 1000.0)
    assert at_home.seen_at() == (OUTSIDE,)


def test_the_owners_word_counts(at_home: Reachability) -> None:
    forced = Reachability("public")
    forced.listens([HOME])
    forced.dialed_back("a", False, 0.0)
    assert forced.verdict() == "public"
