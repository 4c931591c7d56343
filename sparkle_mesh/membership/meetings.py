"""Which of two meshes of one name that meet goes on: a sans-IO machine, one in every member.

Two lineages come about when processes form a mesh in two places that do not know each other, or when those that are cut
off from the others go on by themselves. Once a member of one is connected to members of the other, the lineage that has
trained for fewer steps dissolves (if they are alike: that which has begun fewer operations, that with fewer members,
that with the smaller id): its members are members no more, and may join the other as newcomers.

Such numbers change while they are compared, and both must not dissolve. So only one process compares: of the
two lineages that with the smaller id asks, by its lead (the first of a quorum of members that trust each other), and
the lead of the other answers. It keeps its verdict for whoever asks after that, and each side's lead tells its own
members. Whoever has dissolved goes on to say so to members of its lineage that come later.

Nobody is harmed where that fails, because both leads die at the wrong moment: whoever dissolves keeps its state, and
the newcomers of both lineages form a third.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sparkle_mesh import limits
from sparkle_mesh.fabric.interface import PeerId
from sparkle_mesh.membership.messages import Meeting, Merger


class Weight(NamedTuple):
    """What a lineage has to show; the greater one goes on."""

    step: int
    operations: int
    size: int
    lineage: bytes


class Meetings:
    """The machine of one member.

    Attributes
    ----------
    verdict
        That its lineage dissolves, once it does.
    """

    def __init__(self) -> None:
        self.verdict: Merger | None = None
        #: What it has answered, by the lineage that had asked.
        self._answers: dict[bytes, Merger] = {}
        self._not_before = 0.0

    def next_wakeup(self, mine: Weight, others: Mapping[PeerId, bytes], *, leads: bool) -> float | None:
        """When :meth:`tick` has something to do."""
        asks = leads and self.verdict is None and any(lineage > mine.lineage for lineage in others.values())
        return self._not_before if asks else None

    def tick(
        self, mine: Weight, others: Mapping[PeerId, bytes], *, leads: bool, now: float
    ) -> list[tuple[PeerId, Meeting | Merger]]:
        """Ask the other lineages, if that is this process's turn.

        Parameters
        ----------
        mine
            What this lineage has to show now.
        others
            The connected peers that are in other lineages, and in which.
        leads
            Whether this process speaks for its lineage.
        """
        due = self.next_wakeup(mine, others, leads=leads)
        if due is None or now < due:
            return []
        self._not_before = now + limits.MEETING_INTERVAL_S
        question = Meeting(lineage=mine.lineage, step=mine.step, operations=mine.operations, size=mine.size)
        return [(peer_id, question) for peer_id, lineage in others.items() if lineage > mine.lineage]

    def asked(self, meeting: Meeting, mine: Weight, *, leads: bool) -> Merger | None:
        """Another lineage asks; return the answer if it is this process's to give."""
        if self.verdict is not None or not leads or meeting.lineage >= mine.lineage:
            return None
        answer = self._answers.get(meeting.lineage)
        if answer is None:
            theirs = Weight(meeting.step, meeting.operations, meeting.size, meeting.lineage)
            dissolves, goes_on = sorted((mine, theirs))
            answer = Merger(dissolves=dissolves.lineage, into=goes_on.lineage)
            self._answers[meeting.lineage] = answer
            while len(self._answers) > limits.VIEWS_ELSEWHERE_MAX_COUNT:
                del self._answers[next(iter(self._answers))]
        self.told(answer, mine.lineage)
        return answer

    def told(self, merger: Merger, mine: bytes) -> bool:
        """A verdict: of another lineage's lead, or of a member of this one. Returns whether this lineage dissolves."""
        if self.verdict is None and merger.dissolves == mine != merger.into:
            self.verdict = merger
            return True
        return False
