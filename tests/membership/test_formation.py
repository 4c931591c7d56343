"""The formation machine: single steps here, whole worlds in ``simulations.formation``."""

from __future__ import annotations

import pytest

from sparkle_mesh import limits
from sparkle_mesh.membership.formation import Candidate, Formation, Instruction, SendTo, ViewAgreed, ViewElsewhere
from sparkle_mesh.membership.messages import Accept, Accepted, Ballot, Chosen, Declined, Prepare, Promise
from sparkle_mesh.membership.view import Member, View, first_view

MESH = b"m" * 32
SOON = limits.VIEW_SETTLE_S + 0.01


def candidate(name: str, min_peers: int = 2, host: bytes = b"h" * 16) -> Candidate:
    return Candidate(Member(peer_id=name, incarnation=name.encode()[:1] * 16), host, min_peers)


A, B, C = candidate("a"), candidate("b"), candidate("c")


def machine(me: Candidate | None, *others: Candidate, now: float = 0.0) -> Formation:
    formation = Formation(MESH, me, now=now)
    for other in others:
        formation.candidate_came(other, now=now)
    return formation


def view_of(*candidates: Candidate) -> View:
    return first_view(MESH, ((c.host_id, c.member) for c in candidates))


def sent(instructions: list[Instruction], kind: type) -> list[SendTo]:
    return [i for i in instructions if isinstance(i, SendTo) and isinstance(i.message, kind)]


def test_nobody_proposes_below_min_peers() -> None:
    formation = machine(A)
    assert formation.next_wakeup() is None
    assert formation.tick(now=99) == []
    assert "1 of 2" in formation.state_of_play()


def test_one_alone_forms_its_own_view_when_that_is_enough() -> None:
    me = candidate("a", min_peers=1)
    instructions = machine(me).tick(now=SOON)
    assert instructions == [ViewAgreed(view_of(me))]


def test_the_lowest_peer_id_proposes_and_both_enter_one_view() -> None:
    a, b = machine(A, B), machine(B, A)
    assert b.tick(now=SOON) == []
    (prepare,) = sent(a.tick(now=SOON), Prepare)
    (promise,) = sent(b.receive("a", prepare.message, now=1), Promise)
    (accept,) = sent(a.receive("b", promise.message, now=1), Accept)
    (accepted,) = sent(b.receive("a", accept.message, now=1), Accepted)
    learned = a.receive("b", accepted.message, now=1)
    view = view_of(A, B)
    assert ViewAgreed(view) in learned
    (chosen,) = sent(learned, Chosen)
    assert ViewAgreed(view) in b.receive("a", chosen.message, now=1)
    assert a.view == b.view == view
    assert a.next_wakeup() is None
    # Told again, nothing changes.
    assert b.receive("a", chosen.message, now=1) == []


def test_the_next_in_turn_steps_in_for_a_silent_proposer() -> None:
    b = machine(B, A)
    assert sent(b.tick(now=SOON + limits.PROPOSER_STAGGER_S), Prepare)
    assert b.is_proposing


def test_ring_order_is_by_host_then_peer_id() -> None:
    hosts = [candidate("a", host=b"2" * 16), candidate("b", host=b"1" * 16), candidate("c", host=b"2" * 16)]
    assert [m.peer_id for m in view_of(*hosts).members] == ["b", "a", "c"]


def test_the_largest_set_all_find_large_enough_is_proposed() -> None:
    demanding = candidate("c", min_peers=4)
    (prepare,) = sent(machine(A, B, demanding).tick(now=SOON), Prepare)
    assert prepare.peer_id == "b"
    assert machine(demanding, A, B).tick(now=99) == []


def promised(formation: Formation, ballot: Ballot) -> None:
    assert sent(formation.receive(ballot.proposer, Prepare(lineage=b"", epoch=0, ballot=ballot), now=0), Promise), (
        "the ballot should have been promised"
    )


@pytest.mark.parametrize(
    ("view", "reason"),
    [
        (view_of(A, C), "not in it"),
        (view_of(A, B, C), "not connected to c"),
        (view_of(B), "fewer than min_peers"),
        (View(mesh_id=b"x" * 32, lineage=view_of(A, B).lineage, epoch=0, members=view_of(A, B).members), "not sound"),
        (View(mesh_id=MESH, lineage=b"x" * 32, epoch=0, members=view_of(A, B).members), "not sound"),
        (View(mesh_id=MESH, lineage=b"x" * 32, epoch=1, members=view_of(A, B).members), "first view"),
    ],
)
def test_an_acceptor_declines_what_cannot_be(view: View, reason: str) -> None:
    b = machine(B, A)
    ballot = Ballot(round=1, proposer="a")
    promised(b, ballot)
    (declined,) = sent(b.receive("a", Accept(ballot=ballot, view=view), now=0), Declined)
    assert isinstance(declined.message, Declined)
    assert reason in declined.message.reason


def test_lower_and_unpromised_ballots_are_declined() -> None:
    b = machine(B, A, C)
    promised(b, Ballot(round=5, proposer="c"))
    low = Ballot(round=4, proposer="a")
    (declined,) = sent(b.receive("a", Prepare(lineage=b"", epoch=0, ballot=low), now=0), Declined)
    assert isinstance(declined.message, Declined)
    assert declined.message.promised == Ballot(round=5, proposer="c")
    assert sent(b.receive("a", Accept(ballot=low, view=view_of(A, B, C)), now=0), Declined)
    # A ballot that speaks for somebody else.
    assert sent(b.receive("a", Prepare(lineage=b"", epoch=0, ballot=Ballot(round=9, proposer="c")), now=0), Declined)


def test_a_declined_proposer_comes_back_with_a_higher_ballot() -> None:
    a = machine(A, B)
    a.tick(now=SOON)
    higher = Ballot(round=7, proposer="b")
    ballot = Ballot(round=1, proposer="a")
    a.receive("b", Declined(epoch=0, ballot=ballot, promised=higher, reason="no"), now=SOON)
    assert not a.is_proposing
    (prepare,) = sent(a.tick(now=SOON + limits.PROPOSAL_RETRY_S + 0.01), Prepare)
    assert isinstance(prepare.message, Prepare)
    assert prepare.message.ballot.round == 8


def test_a_value_found_in_a_promise_is_proposed_again_and_missing_members_are_asked() -> None:
    a = machine(A, B, C)
    wanted = view_of(A, B, C)
    a.candidate_went("c", now=0)
    (prepare,) = sent(a.tick(now=SOON), Prepare)  # to b alone
    assert isinstance(prepare.message, Prepare)
    a.candidate_came(C, now=SOON)
    report = Promise(
        lineage=b"",
        epoch=0,
        ballot=prepare.message.ballot,
        accepted_ballot=Ballot(round=0, proposer="c"),
        accepted_view=wanted,
    )
    (second,) = sent(a.receive("b", report, now=1), Prepare)
    assert second.peer_id == "c"
    promise = Promise(lineage=b"", epoch=0, ballot=prepare.message.ballot)
    accepts = sent(a.receive("c", promise, now=1), Accept)
    assert {s.peer_id for s in accepts} == {"b", "c"}
    assert all(isinstance(s.message, Accept) and s.message.view == wanted for s in accepts)


def test_a_proposer_that_cannot_be_in_the_value_found_leaves_the_field() -> None:
    a = machine(A, B)
    (prepare,) = sent(a.tick(now=SOON), Prepare)
    assert isinstance(prepare.message, Prepare)
    report = Promise(
        lineage=b"",
        epoch=0,
        ballot=prepare.message.ballot,
        accepted_ballot=Ballot(round=0, proposer="c"),
        accepted_view=view_of(B, C),
    )
    assert a.receive("b", report, now=1) == []
    assert not a.is_proposing


def test_a_member_that_goes_takes_the_proposal_with_it() -> None:
    a = machine(A, B, C)
    a.tick(now=SOON)
    assert a.is_proposing
    assert a.candidate_went("c", now=1) == []
    assert not a.is_proposing
    assert a.candidate_went("nobody", now=1) == []


def test_a_proposal_without_answers_is_dropped_at_its_deadline() -> None:
    a = machine(A, B)
    a.tick(now=SOON)
    deadline = a.next_wakeup()
    assert deadline is not None
    a.tick(now=deadline)
    assert not a.is_proposing


def test_a_latecomer_is_told_and_excluded_peers_are_not_proposed_to() -> None:
    late = machine(C, A, B)
    view = view_of(A, B)
    assert late.receive("a", Chosen(view=view), now=0) == [ViewElsewhere(view)]
    assert late.receive("b", Chosen(view=view), now=0) == []
    assert late.next_wakeup() is None
    assert "formed without" in late.state_of_play()
    late.candidate_went("a", now=1)
    late.candidate_went("b", now=1)
    assert late.views_elsewhere == {}


def test_those_who_come_after_the_view_are_told_of_it() -> None:
    me = candidate("a", min_peers=1)
    formation = machine(me)
    formation.tick(now=SOON)
    assert [i.message for i in formation.candidate_came(B, now=1) if isinstance(i, SendTo)] == [
        Chosen(view=view_of(me))
    ]
    assert sent(formation.watcher_came("node", now=1), Chosen)
    prepare = Prepare(lineage=b"", epoch=0, ballot=Ballot(round=1, proposer="b"))
    assert sent(formation.receive("b", prepare, now=1), Chosen)
    accept = Accept(ballot=prepare.ballot, view=view_of(me, B))
    assert sent(formation.receive("b", accept, now=1), Chosen)


def test_forged_news_of_a_view_is_ignored() -> None:
    b = machine(B, A)
    assert b.receive("a", Chosen(view=view_of(A, B)), now=0) == [], "this process never accepted it"
    assert b.receive("c", Chosen(view=view_of(A)), now=0) == [], "the sender is not in it"
    unsound = View(mesh_id=MESH, lineage=b"x" * 32, epoch=0, members=view_of(A).members)
    assert b.receive("a", Chosen(view=unsound), now=0) == []


def test_a_watcher_learns_but_never_takes_part() -> None:
    watcher = machine(None, A, B)
    assert watcher.next_wakeup() is None
    assert sent(
        watcher.receive("a", Prepare(lineage=b"", epoch=0, ballot=Ballot(round=1, proposer="a")), now=0), Declined
    )
    view = view_of(A, B)
    assert watcher.receive("a", Chosen(view=view), now=0) == [ViewElsewhere(view)]
    assert watcher.watcher_came("other", now=0) == []


def test_strays_are_ignored() -> None:
    a = machine(A, B)
    ballot = Ballot(round=3, proposer="a")
    for stray in (Promise(lineage=b"", epoch=0, ballot=ballot), Accepted(epoch=0, ballot=ballot)):
        assert a.receive("b", stray, now=0) == []
    a.tick(now=SOON)
    own = Ballot(round=1, proposer="a")
    assert a.receive("c", Promise(lineage=b"", epoch=0, ballot=own), now=0) == [], "not one of those asked"
    (accept,) = sent(a.receive("b", Promise(lineage=b"", epoch=0, ballot=own), now=0), Accept)
    assert a.receive("c", Accepted(epoch=0, ballot=own), now=0) == []
    assert accept.peer_id == "b"


def test_views_that_are_no_views() -> None:
    twice = View(mesh_id=MESH, lineage=b"x" * 32, epoch=1, members=(A.member, A.member))
    assert not twice.is_sound()
    assert not View(mesh_id=MESH, lineage=b"x" * 32, epoch=1, members=()).is_sound()
    assert View(mesh_id=MESH, lineage=b"x" * 32, epoch=1, members=(A.member,)).is_sound()
    assert view_of(A).rank_of(B.member) is None
