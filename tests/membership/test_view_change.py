"""The machine that agrees on the view after a view, message by message; see the simulated world for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from sparkle_mesh import limits
from sparkle_mesh.membership.complaints import without_the_cut_off
from sparkle_mesh.membership.instructions import Entered, Excluded, Frozen, QuorumMissing, SendTo
from sparkle_mesh.membership.messages import Accept, Accepted, Ballot, Chosen, Declined, Prepare, Promise
from sparkle_mesh.membership.operations import OpenOperations, decide
from sparkle_mesh.membership.view import Member, View, first_view
from sparkle_mesh.membership.view_change import ViewChange, is_quorum

BETWEEN_TWO = (limits.COLLECTIVE_STREAM_NUMBERS_COUNT + 9) << 32
MEMBERS = [Member(peer_id=f"peer-{number}", incarnation=bytes([number]) * 16) for number in range(6)]


def first(size: int) -> View:
    return first_view(bytes(32), [(bytes(16), member) for member in MEMBERS[:size]])


def machine(rank: int, size: int = 3) -> ViewChange:
    return ViewChange(first(size), MEMBERS[rank], OpenOperations(), now=0.0)


def sent(instructions: Iterable[Any], kind: type) -> list[tuple[Member, Any]]:
    return [
        (one.member, one.message) for one in instructions if isinstance(one, SendTo) and isinstance(one.message, kind)
    ]


def prepare(view: View, round_: int, proposer: Member, epoch: int = 1) -> Prepare:
    return Prepare(lineage=view.lineage, epoch=epoch, ballot=Ballot(round=round_, proposer=proposer.peer_id))


def following(view: View, *ranks: int) -> View:
    return msgspec.structs.replace(view, epoch=view.epoch + 1, members=tuple(MEMBERS[rank] for rank in ranks))


@pytest.mark.parametrize(
    ("size", "ranks", "enough"),
    [
        (1, [0], True),
        (2, [0], True),
        (2, [1], False),
        (3, [1, 2], True),
        (3, [0], False),
        (4, [0, 3], True),
        (4, [1, 3], False),
        (5, [2, 3, 4], True),
        (5, [0, 1], False),
        (2, [4, 5], False),
    ],
)
def test_a_quorum_is_more_than_half_or_half_with_the_first(size: int, ranks: list[int], enough: bool) -> None:
    assert is_quorum(first(size), [MEMBERS[rank] for rank in ranks]) is enough


def test_a_member_that_is_gone_is_left_out_by_the_others() -> None:
    one, other = machine(0), machine(1)
    other.operations.begin(1)
    other.operations.prepare(1, b"d" * 16)
    one.operations.begin(1)
    assert one.next_wakeup(now=0.0) is None
    for each in (one, other):
        assert each.suspect(MEMBERS[2], now=1.0) == []
    due = one.next_wakeup(now=1.0)
    assert due == 1.0 + limits.VIEW_CHANGE_SETTLE_S
    assert other.next_wakeup(now=1.0) == due + limits.VIEW_CHANGE_STAGGER_S

    out = one.tick(now=due)
    assert [one for one in out if isinstance(one, Frozen)]
    assert not one.operations.prepare(1, b"d" * 16)
    ((_, asked),) = [pair for pair in sent(out, Prepare) if pair[0] == MEMBERS[1]]
    ((_, promise),) = sent(other.receive(MEMBERS[0], asked, now=due), Promise)
    assert [state.state for state in promise.operations] == ["prepared"]
    accepts = sent(one.receive(MEMBERS[1], promise, now=due), Accept)
    accept = dict(accepts)[MEMBERS[1]]
    assert accept.view.members == tuple(MEMBERS[:2])
    # One has not prepared it, so nobody has committed it.
    assert [outcome.state for outcome in accept.outcomes] == ["repeat"]
    assert accept.streams == ((0, 0),)
    ((_, accepted),) = sent(other.receive(MEMBERS[0], accept, now=due), Accepted)
    out = one.receive(MEMBERS[1], accepted, now=due)
    entered = Entered(accept.view, accept.outcomes, accept.streams)
    assert entered in out
    chosen = dict(sent(out, Chosen))
    assert other.receive(MEMBERS[0], chosen[MEMBERS[1]], now=due) == [entered]
    # It comes again, and is told that it is out.
    late = machine(2)
    assert late.receive(MEMBERS[0], chosen[MEMBERS[2]], now=due) == [Excluded(accept.view, accept.outcomes)]
    assert late.tick(now=99.0) == []
    assert late.next_wakeup(now=99.0) is None
    assert late.receive(MEMBERS[0], asked, now=99.0) == []


def test_a_lower_ballot_is_neither_promised_nor_accepted() -> None:
    each = machine(2)
    view = each.view
    ((_, promise),) = sent(each.receive(MEMBERS[1], prepare(view, 5, MEMBERS[1]), now=1.0), Promise)
    assert promise.ballot.round == 5
    ((_, declined),) = sent(each.receive(MEMBERS[0], prepare(view, 4, MEMBERS[0]), now=1.0), Declined)
    assert declined.promised == promise.ballot
    lower = Ballot(round=4, proposer=MEMBERS[0].peer_id)
    ((_, declined),) = sent(
        each.receive(MEMBERS[0], Accept(ballot=lower, view=following(view, 0, 2)), now=1.0), Declined
    )
    assert "not promised" in declined.reason
    higher = Ballot(round=5, proposer=MEMBERS[1].peer_id)
    assert sent(each.receive(MEMBERS[1], Accept(ballot=higher, view=following(view, 1, 2)), now=1.0), Accepted)


def test_what_was_accepted_is_proposed_again_with_its_outcomes() -> None:
    each = machine(1)
    view = each.view
    ballot = Ballot(round=1, proposer=MEMBERS[0].peer_id)
    each.receive(MEMBERS[0], prepare(view, 1, MEMBERS[0]), now=1.0)
    outcomes, _ = decide({0: OpenOperations().standing()})
    each.receive(MEMBERS[0], Accept(ballot=ballot, view=following(view, 0, 1), outcomes=outcomes), now=1.0)
    # The proposer dies; the next one finds the value in its own promise.
    each.suspect(MEMBERS[0], now=2.0)
    due = each.next_wakeup(now=2.0)
    assert due is not None
    out = each.tick(now=due)
    asked = dict(sent(out, Prepare))[MEMBERS[2]]
    assert asked.ballot.round == 2
    promise = Promise(lineage=view.lineage, epoch=1, ballot=asked.ballot)
    accepts = dict(sent(each.receive(MEMBERS[2], promise, now=due), Accept))
    assert accepts[MEMBERS[2]].view == following(view, 0, 1)


@pytest.mark.parametrize(
    "message",
    [
        lambda view: prepare(view, 1, MEMBERS[0], epoch=3),
        lambda view: prepare(view, 1, MEMBERS[1]),
        lambda view: msgspec.structs.replace(prepare(view, 1, MEMBERS[0]), lineage=bytes(32)),
        lambda view: Accept(ballot=Ballot(round=1, proposer=MEMBERS[0].peer_id), view=following(view)),
    ],
)
def test_what_makes_no_sense_is_declined(message: Any) -> None:
    each = machine(2)
    ((to, _),) = sent(each.receive(MEMBERS[0], message(each.view), now=1.0), Declined)
    assert to == MEMBERS[0]
    stranger = Member(peer_id="stranger", incarnation=bytes(16))
    ((to, _),) = sent(each.receive(stranger, prepare(each.view, 9, stranger), now=1.0), Declined)
    assert to == stranger
    assert not each.operations.frozen


def test_a_promise_of_the_epoch_before_does_not_count() -> None:
    """Its ballot may be the same: ballots begin anew in every epoch."""
    each = machine(0)
    each.suspect(MEMBERS[2], now=1.0)
    due = each.next_wakeup(now=1.0)
    assert due is not None
    asked = dict(sent(each.tick(now=due), Prepare))[MEMBERS[1]]
    old = Promise(lineage=each.view.lineage, epoch=0, ballot=asked.ballot)
    assert each.receive(MEMBERS[1], old, now=due) == []
    assert sent(each.receive(MEMBERS[1], msgspec.structs.replace(old, epoch=1), now=due), Accept)


def test_answers_nobody_asked_for_change_nothing() -> None:
    each = machine(0)
    view, ballot = each.view, Ballot(round=1, proposer=MEMBERS[0].peer_id)
    for message in (
        Promise(lineage=view.lineage, epoch=1, ballot=ballot),
        Accepted(epoch=1, ballot=ballot),
        Declined(epoch=1, ballot=ballot, promised=None, reason=""),
        Chosen(view=msgspec.structs.replace(following(view, 0), lineage=bytes(32))),
        Chosen(view=view),
    ):
        assert each.receive(MEMBERS[1], message, now=1.0) == []
    assert each.view == view


def test_who_missed_views_and_is_in_none_is_out() -> None:
    each = machine(2)
    later = following(following(each.view, 0, 1), 0, 1)
    assert each.receive(MEMBERS[0], Chosen(view=later), now=1.0) == [Excluded(later, None)]
    assert each.excluded


def test_joiners_come_in_and_leavers_go() -> None:
    each = machine(0, size=1)
    each.candidate_came(MEMBERS[4], now=1.0)
    each.candidate_came(MEMBERS[4], now=1.0)
    due = each.next_wakeup(now=1.0)
    assert due is not None
    out = each.tick(now=due)
    (entered,) = [one for one in out if isinstance(one, Entered)]
    assert entered.view.members == (MEMBERS[0], MEMBERS[4])
    assert [to for to, _ in sent(out, Chosen)] == [MEMBERS[4]]
    # It is told again what it may have missed, once it is trusted again.
    assert sent(each.trust(MEMBERS[4], now=2.0), Chosen)
    each.wants_to_leave(MEMBERS[5], now=2.0)
    each.wants_to_leave(MEMBERS[0], now=2.0)
    assert each.next_wakeup(now=2.0) is not None
    # Where all leave, there is nobody to tell.
    each.wants_to_leave(MEMBERS[4], now=2.0)
    assert each.next_wakeup(now=2.0) is None


def test_a_minority_says_that_it_is_one() -> None:
    each = machine(1, size=2)
    each.suspect(MEMBERS[0], now=1.0)
    assert each.tick(now=1.0) == []
    due = each.next_wakeup(now=1.0)
    assert due == 1.0 + limits.QUORUM_MISSING_S
    assert each.tick(now=due) == [QuorumMissing(each.view, (MEMBERS[0],))]
    assert each.tick(now=due + 1) == []
    each.trust(MEMBERS[0], now=due + 2)
    each.tick(now=due + 2)
    assert each.next_wakeup(now=due + 2) is None


def test_suspicions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEMBERS_SUSPECTED_MAX_COUNT", 3)
    each = machine(0, size=3)
    each.suspect(MEMBERS[1], now=1.0)
    for number in range(20):
        each.suspect(Member(peer_id=f"other-{number}", incarnation=bytes(16)), now=1.0)
    assert len(each._suspected) == 3
    assert MEMBERS[1] in each._suspected


def test_who_waits_is_taken_in_though_it_was_suspected_meanwhile() -> None:
    one, (waits, elsewhere) = machine(0), MEMBERS[3:5]
    for newcomer in (waits, elsewhere):
        one.candidate_came(newcomer, now=0.0)
        one.suspect(newcomer, now=1.0)
        one.suspect(newcomer, now=1.0)
    assert one.candidate_count(now=2.0) == 0
    one.settled_elsewhere(elsewhere, now=2.0)
    for newcomer in (waits, elsewhere):
        one.trust(newcomer, now=3.0)
    assert one.candidate_count(now=3.0) == 1
    # It comes again while it is suspected, is suspected again, and trusted.
    one.settled_elsewhere(waits, now=4.0)
    one.suspect(waits, now=4.0)
    one.candidate_came(waits, now=5.0)
    one.suspect(waits, now=5.0)
    one.trust(waits, now=6.0)
    assert one.candidate_count(now=6.0) == 1


@pytest.mark.parametrize(
    ("pairs", "left"),
    [
        ([], [0, 1, 2, 3, 4]),
        # Of two alone, the last.
        ([(0, 1)], [0, 2, 3, 4]),
        # Whoever most cannot reach.
        ([(0, 3), (0, 4)], [1, 2, 3, 4]),
        ([(0, 1), (0, 2), (3, 4)], [1, 2, 3]),
        ([(a, b) for a in range(5) for b in range(a)], [0]),
    ],
)
def test_no_two_of_a_view_suspect_each_other(pairs: list[tuple[int, int]], left: list[int]) -> None:
    suspects: dict[Member, set[Member]] = {member: set() for member in MEMBERS[:5]}
    for a, b in pairs:
        suspects[MEMBERS[a]].add(MEMBERS[b])
        suspects[MEMBERS[b]].add(MEMBERS[a])
    assert without_the_cut_off(MEMBERS[:5], suspects) == [MEMBERS[rank] for rank in left]


def test_a_suspicion_of_one_side_alone_leaves_nobody_out() -> None:
    suspects = {MEMBERS[0]: {MEMBERS[1]}, MEMBERS[1]: {MEMBERS[2]}}
    assert without_the_cut_off(MEMBERS[:3], suspects) == MEMBERS[:3]


def propose(machines: list[ViewChange], proposer: int, now: float) -> View:
    """Let one propose and all others answer; return the view that it says was chosen."""
    out = machines[proposer].tick(now=now)
    chosen: list[View] = []
    while out:
        for one in out[:]:
            out.remove(one)
            if isinstance(one, SendTo) and isinstance(one.message, Chosen):
                chosen.append(one.message.view)
            elif isinstance(one, SendTo) and one.member in [machine._me for machine in machines]:
                rank = [machine._me for machine in machines].index(one.member)
                for answer in machines[rank].receive(MEMBERS[proposer], one.message, now=now):
                    if isinstance(answer, SendTo):
                        out += machines[proposer].receive(one.member, answer.message, now=now)
    return chosen[0]


def test_a_proposer_that_reaches_all_leaves_out_who_cannot_be_reached_by_others() -> None:
    machines = [machine(rank, size=4) for rank in range(4)]
    for a, b in ((1, 3), (2, 3)):
        machines[a].suspect(MEMBERS[b], now=0.0)
        machines[b].suspect(MEMBERS[a], now=0.0)
    machines[0].renew(now=0.0)
    machines[0].tick(now=0.0)
    assert propose(machines, 0, 1.0).members == tuple(MEMBERS[:3])


def test_a_newcomer_is_taken_in_once_all_members_are_connected_to_it() -> None:
    machines = [machine(rank) for rank in range(3)]
    for rank in (0, 1):
        machines[rank].candidate_came(MEMBERS[5], now=0.0)
    machines[0].tick(now=0.0)
    view = propose(machines, 0, 1.0)
    assert view.members == tuple(MEMBERS[:3])
    for rank in (1, 2):
        machines[rank].receive(MEMBERS[0], Chosen(view=view), now=1.0)
    # That is no reason for the same view again and again.
    for rank in (0, 1):
        assert machines[rank].candidate_count(now=1.0) == 0
    assert machines[0].next_wakeup(now=1.0) == pytest.approx(1.0 + limits.JOINER_RETRY_S + limits.VIEW_CHANGE_SETTLE_S)
    machines[2].candidate_came(MEMBERS[5], now=1.5)
    assert propose(machines, 0, 3.0).members == (*MEMBERS[:3], MEMBERS[5])


def test_ranks_that_are_none_are_no_suspects() -> None:
    each = machine(0, size=2)
    each.renew(now=0.0)
    each.tick(now=0.0)
    (asked,) = sent(each.tick(now=1.0), Prepare)
    promise = Promise(lineage=each.view.lineage, epoch=1, ballot=asked[1].ballot, suspects=(0, 7, 200))
    accept = sent(each.receive(MEMBERS[1], promise, now=1.0), Accept)
    assert accept[0][1].view.members == tuple(MEMBERS[:2])


def test_operations_go_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = OpenOperations()
    assert operations.begin(1)
    assert operations.abort(1)
    assert not operations.abort(1)
    assert operations.begin(2)
    assert operations.prepare(2, b"x" * 16)
    assert not operations.abort(2)
    assert operations.commit(2)
    assert not operations.commit(2)
    assert not operations.prepare(2, b"x" * 16)
    assert not operations.abort(2, told=True)
    assert operations.state(2) is None
    assert operations.begun(0) == 2
    assert operations.begin(3)
    assert operations.abort(3)
    monkeypatch.setattr(limits, "OPERATIONS_OPEN_MAX_COUNT", 1)
    assert operations.is_full
    assert not operations.begin(4)
    frozen = []
    operations.on_freeze = lambda: frozen.append(operations.frozen)
    operations.freeze()
    operations.freeze()
    assert frozen == [False]
    assert not operations.begin(1)
    assert len(operations.standing().operations) == 1
    operations.begin_epoch()
    assert operations.begin(4)


def test_what_was_aborted_is_named_until_all_know() -> None:
    operations = OpenOperations()
    other = 7 << 32
    for number in (1, 2, 3, other | 1):
        operations.begin(number)
    for number in (2, other | 1):
        operations.abort(number)
    operations.begin(4)
    for number, named in ((3, True), (4, True), (1, True), (5, False)):
        # Who takes part in the third may not have heard yet, but with the fourth all have. Yet the first is open: if it
        # is repeated, who joins begins with it, and comes to the second.
        operations.begin(number)
        operations.prepare(number, b"")
        operations.commit(number)
        assert (operations.state(2) is not None) == named, number
    assert operations.state(other | 1) is not None


def test_what_is_to_be_repeated_is_begun_in_the_next_epoch_by_who_had_begun_it() -> None:
    one, other = OpenOperations(), OpenOperations()
    for number in (1, 2, 3):
        one.begin(number, once=number == 3)
    one.prepare(1, b"x" * 16)
    one.begin(BETWEEN_TWO | 1, route=(0, 1))
    other.begin(1)
    outcomes, streams = decide({0: one.standing(), 1: other.standing()})
    assert [(outcome.number, outcome.state) for outcome in outcomes] == [
        (1, "repeat"),
        (2, "repeat"),
        (3, "lost"),
        (BETWEEN_TWO | 1, "lost"),
    ]
    # Whoever joins begins with the first of them; what is between two begins anew.
    assert streams == ((0, 0),)
    one.begin_epoch(outcomes)
    other.begin_epoch(outcomes)
    # The third is named for those who come later, and for the other, because there is one before it.
    assert [state.state for state in one.standing().operations] == ["begun", "begun", "lost"]
    # What was lost before this one came to it stays named until it does.
    assert [(state.number, state.state) for state in other.standing().operations] == [(1, "begun"), (3, "lost")]
    assert one.standing().streams == ((0, 3),)
    newcomer = OpenOperations()
    newcomer.join(streams)
    assert newcomer.begun(0) == 0


def test_who_joins_does_not_begin_with_what_has_ended_before_the_others_came_to_it() -> None:
    one, other = OpenOperations(), OpenOperations()
    one.begin(1)
    one.abort(1)
    outcomes, streams = decide({0: one.standing(), 1: other.standing()})
    assert ([outcome.state for outcome in outcomes], streams) == (["aborted"], ((0, 1),))
    other.begin_epoch(outcomes)
    # The one that gave it up is gone; a member that joins now begins after it, and so does the next.
    for _ in range(2):
        outcomes, streams = decide({0: other.standing()})
        assert (outcomes, streams) == ((), ((0, 1),))
        newcomer = OpenOperations()
        newcomer.join(streams, outcomes)
        other = newcomer


def test_what_has_ended_after_what_is_repeated_is_named_to_those_who_come_later() -> None:
    one, other = OpenOperations(), OpenOperations()
    for number in (1, 2, 3):
        one.begin(number)
    one.abort(2)
    one.abort(3)
    outcomes, streams = decide({0: one.standing(), 1: other.standing()})
    assert [(outcome.number, outcome.state) for outcome in outcomes] == [(1, "repeat"), (2, "aborted"), (3, "aborted")]
    other.begin_epoch(outcomes)
    # The one that gave them up is gone. The first is repeated by nobody that is left: it is begun as if for the first
    # time, and what is ahead of it is told to whoever joins, and by those in their turn.
    for _ in range(2):
        outcomes, streams = decide({0: other.standing()})
        assert [(outcome.number, outcome.state) for outcome in outcomes] == [(2, "aborted"), (3, "aborted")]
        newcomer = OpenOperations()
        newcomer.join(streams, outcomes)
        assert newcomer.standing().operations == other.standing().operations == outcomes
        other = newcomer
    other.begin(1)
    assert [state.number for state in other.standing().operations] == [2, 3, 1]
    other.begin(4)
    other.prepare(4, b"")
    other.commit(4)
    assert [state.number for state in other.standing().operations] == [2, 3, 1]
    other.prepare(1, b"")
    other.commit(1)
    assert [state.number for state in other.standing().operations] == [2, 3]
    other.begin(5)
    other.prepare(5, b"")
    other.commit(5)
    assert other.standing().operations == ()


def test_who_joins_is_told_what_is_committed_after_what_is_repeated() -> None:
    one = OpenOperations()
    for number in (1, 2, 3):
        one.begin(number)
        one.prepare(number, b"x" * 16)
    one.commit(1)
    one.commit(3)
    late = OpenOperations()
    for number in (1, 2, 3):
        late.begin(number)
    late.prepare(1, b"x" * 16)
    late.commit(1)
    late.prepare(3, b"x" * 16)
    late.commit(3)
    outcomes, streams = decide({0: one.standing(), 1: late.standing()})
    assert [(outcome.number, outcome.state) for outcome in outcomes] == [(2, "repeat"), (3, "committed")]
    assert streams == ((0, 1),)


@pytest.mark.parametrize(
    ("stages", "ends"),
    [
        (("prepared x", "prepared x"), "committed"),
        (("prepared x", "committed x"), "committed"),
        (("prepared x", "begun"), "repeat"),
        (("prepared x", ""), "repeat"),
        (("prepared x", "prepared y"), "aborted"),
        (("aborted", "begun"), "aborted"),
        (("aborted", ""), "aborted"),
        (("begun", "begun"), "repeat"),
    ],
)
def test_the_rule_of_decision(stages: tuple[str, ...], ends: str) -> None:
    standings = {}
    for rank, stage in enumerate(stages):
        operations = OpenOperations()
        if stage:
            operations.begin(1)
        if stage == "aborted":
            operations.abort(1)
        elif stage.startswith(("prepared", "committed")):
            operations.prepare(1, stage[-1].encode() * 16)
            if stage.startswith("committed"):
                operations.commit(1)
        standings[rank] = operations.standing()
    (outcome,), _ = decide(standings)
    assert outcome.state == ends
    assert outcome.digest == (b"x" * 16 if ends == "committed" else b"")


def test_of_an_operation_between_two_only_these_two_count() -> None:
    standings = {rank: OpenOperations() for rank in range(3)}
    for rank in (0, 2):
        standings[rank].begin(BETWEEN_TWO | 1, route=(0, 2))
        standings[rank].prepare(BETWEEN_TWO | 1, b"x" * 16)
    (outcome,), streams = decide({rank: one.standing() for rank, one in standings.items()})
    assert outcome.state == "committed"
    assert streams == ()
