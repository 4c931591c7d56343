"""Two meshes of one name that meet: which of them goes on, and who says so."""

from __future__ import annotations

import itertools

import pytest

from sparkle_mesh import limits
from sparkle_mesh.membership.meetings import Meetings, Weight
from sparkle_mesh.membership.messages import Meeting, Merger

LOW, HIGH, THIRD = b"a" * 32, b"b" * 32, b"c" * 32


def meet(low: Weight, high: Weight) -> tuple[Meetings, Meetings]:
    """Let the leads of both meet; return them."""
    asks, answers = Meetings(), Meetings()
    ((peer_id, question),) = asks.tick(low, {"other": high.lineage}, leads=True, now=5.0)
    assert (peer_id, question) == (
        "other",
        Meeting(lineage=LOW, step=low.step, operations=low.operations, size=low.size),
    )
    answer = answers.asked(question, high, leads=True)
    assert answer is not None
    asks.told(answer, low.lineage)
    return asks, answers


@pytest.mark.parametrize(
    ("low", "high", "low_goes_on"),
    [
        ((7, 1, 1), (6, 9, 9), True),
        ((6, 10, 2), (6, 9, 5), True),
        ((6, 9, 5), (6, 10, 2), False),
        ((0, 10, 3), (0, 10, 2), True),
        ((0, 10, 2), (0, 10, 3), False),
        ((0, 0, 1), (0, 0, 1), False),
    ],
)
def test_the_one_that_has_done_less_dissolves(
    low: tuple[int, int, int], high: tuple[int, int, int], low_goes_on: bool
) -> None:
    asks, answers = meet(Weight(*low, LOW), Weight(*high, HIGH))
    dissolves, goes_on = (answers, asks) if low_goes_on else (asks, answers)
    assert goes_on.verdict is None
    assert dissolves.verdict is not None
    assert dissolves.verdict.into == (LOW if low_goes_on else HIGH)


def test_what_was_answered_once_stands_whatever_the_numbers_are_then() -> None:
    _, answers = meet(Weight(0, 10, 2, LOW), Weight(0, 20, 2, HIGH))
    grown = Meeting(lineage=LOW, step=0, operations=1_000, size=2)
    assert answers.asked(grown, Weight(0, 21, 2, HIGH), leads=True) == Merger(dissolves=LOW, into=HIGH)
    assert answers.verdict is None


def test_only_leads_ask_and_answer_and_only_one_side_does_either() -> None:
    mine, others = Weight(0, 1, 1, HIGH), {"low": LOW, "third": THIRD}
    asks = Meetings()
    assert asks.tick(mine, others, leads=False, now=0.0) == []
    assert [peer for peer, _ in asks.tick(mine, others, leads=True, now=0.0)] == ["third"]
    assert asks.next_wakeup(mine, {"low": LOW}, leads=True) is None
    # It asks again, but not at once.
    assert asks.tick(mine, others, leads=True, now=limits.MEETING_INTERVAL_S / 2) == []
    assert asks.next_wakeup(mine, others, leads=True) == limits.MEETING_INTERVAL_S
    assert asks.tick(mine, others, leads=True, now=limits.MEETING_INTERVAL_S) != []
    assert Meetings().asked(Meeting(lineage=LOW, step=9, operations=9, size=9), mine, leads=False) is None
    for lineage in (HIGH, THIRD):
        assert Meetings().asked(Meeting(lineage=lineage, step=9, operations=9, size=9), mine, leads=True) is None


def test_a_verdict_is_one_about_this_lineage() -> None:
    machine = Meetings()
    for merger in (Merger(dissolves=LOW, into=HIGH), Merger(dissolves=HIGH, into=HIGH)):
        assert not machine.told(merger, HIGH)
    assert machine.told(Merger(dissolves=HIGH, into=LOW), HIGH)
    assert not machine.told(Merger(dissolves=HIGH, into=THIRD), HIGH)
    assert machine.verdict == Merger(dissolves=HIGH, into=LOW)
    # It speaks for nobody any more.
    assert machine.tick(Weight(0, 1, 1, HIGH), {"third": THIRD}, leads=True, now=0.0) == []
    assert machine.asked(Meeting(lineage=LOW, step=0, operations=0, size=1), Weight(9, 9, 9, HIGH), leads=True) is None


def test_answers_are_bounded() -> None:
    machine, mine = Meetings(), Weight(9, 9, 9, b"\xff" * 32)
    for number in range(2 * limits.VIEWS_ELSEWHERE_MAX_COUNT):
        machine.asked(Meeting(lineage=number.to_bytes(32, "big"), step=0, operations=0, size=1), mine, leads=True)
    assert len(machine._answers) == limits.VIEWS_ELSEWHERE_MAX_COUNT


def test_weights_are_in_one_order() -> None:
    weights = [Weight(*one) for one in itertools.product((0, 1), (0, 1), (1, 2), (LOW, HIGH))]
    assert all((a < b) != (b < a) for a, b in itertools.combinations(weights, 2))
