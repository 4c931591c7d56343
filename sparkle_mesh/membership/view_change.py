"""How the view that follows a view is agreed: a sans-IO machine, one in every member.

Every epoch's successor is one single-decree Paxos instance (Lamport, "Paxos Made Simple", 2001, section 2) whose
acceptors are the members of the old view. Its value is the next view together with the outcome of every collective that
was open in the old one. Ballots are ``(round, proposer)``. The proposer is normally the lowest-ranked member that
nobody suspects; if it is silent the next one steps in, and ballots alone keep that safe.

A promise *freezes* the old epoch in its member: nothing is prepared or committed there any more (see
:class:`.operations.OpenOperations`), and the promise tells where each open operation stands. That is why an outcome can
be decided at all:

- An operation commits anywhere only when *every* member of the view has prepared it. So if one survivor has not, none
  has committed it, and, being frozen, none will: it is aborted.
- If all survivors have prepared it, one that cannot be asked may have committed it: it is committed. All of them hold
  the result, so they can.

A proposer therefore asks all members that it does not suspect before it decides, and proposes no member that it has not
heard, no two that suspect each other, and no newcomer that one of them is not connected to: a view is of those that can
all reach each other. A value is chosen when a quorum of the old view has accepted it, and every member of both views
that the proposer does not suspect. Quorums meet, so a successor finds what may have been chosen among its promises and
proposes that.

A quorum is a majority of the old view, or half of it with its first member: any two have a member in common.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from sparkle_mesh import limits
from sparkle_mesh.membership.ballots import BallotMachine
from sparkle_mesh.membership.complaints import without_the_cut_off
from sparkle_mesh.membership.instructions import (
    Entered,
    Excluded,
    Frozen,
    Instruction,
    QuorumMissing,
    SendTo,
)
from sparkle_mesh.membership.messages import (
    Accept,
    Accepted,
    Agreement,
    Ballot,
    Chosen,
    Declined,
    OperationList,
    Prepare,
    Promise,
    StreamCounts,
)
from sparkle_mesh.membership.operations import OpenOperations, Standing, decide
from sparkle_mesh.membership.view import Member, View


def is_quorum(view: View, members: Iterable[Member]) -> bool:
    """Whether ``members`` of ``view`` can decide for it: more than half, or half of them with its first."""
    count = len(set(members).intersection(view.members))
    return 2 * count > view.size or (2 * count == view.size and view.members[0] in members)


@dataclass(slots=True)
class _Proposal:
    ballot: Ballot
    deadline: float
    promises: dict[Member, Promise] = field(default_factory=dict)
    accepted: set[Member] = field(default_factory=set)
    value: _Value | None = None


class _Value(NamedTuple):
    """What is proposed and chosen."""

    view: View
    outcomes: OperationList
    streams: StreamCounts


class ViewChange(BallotMachine[Member, Instruction]):
    """The machine of one member of ``view``.

    Call a method for each event; each returns instructions to carry out in order.

    Parameters
    ----------
    view
        The first view, agreed by :class:`.formation.Formation`, or one that was chosen with this process as a joiner.
    me
        This process.
    operations
        What is open in the view; frozen and read by this machine, written by whoever runs collectives.
    chosen
        What was said of the view, if others agreed on it.
    """

    def __init__(
        self, view: View, me: Member, operations: OpenOperations, *, now: float, chosen: Chosen | None = None
    ) -> None:
        super().__init__()
        self.view = view
        self.operations = operations
        #: Whether it is a member no more.
        self.excluded = False
        #: Whether candidates are taken in now.
        self.admits = True
        self._me = me
        #: And whether it waited to be taken in when suspicion began.
        self._suspected: dict[Member, bool] = {}
        #: Who wants to be in no further view.
        self.leaving: set[Member] = set()
        #: Who wants to be taken in; and from when on that is a reason for another view.
        self._joiners: dict[Member, float] = {}
        self._chosen = deque([] if chosen is None else [chosen], maxlen=limits.VIEWS_REMEMBERED_MAX_COUNT)
        self._begin_epoch(now)

    def _begin_epoch(self, now: float) -> None:
        self._promised = None
        self._accepted: tuple[Ballot, _Value] | None = None
        self._proposal: _Proposal | None = None
        self._round = 0
        self._failures = 0
        self._not_before = now
        self._wanted_since: float | None = None
        self._quorum_missing_since: float | None = None
        self._told_quorum_missing = False
        self._renewal_wanted = False

    # --- Events ---------------------------------------------------------------------------------

    def suspect(self, member: Member, *, now: float) -> list[Instruction]:
        """``member`` is believed to be gone; it may be one of a view that this process has not come to."""
        waited = self._joiners.pop(member, None) is not None
        if member in self._suspected:
            self._suspected[member] |= waited
        if member == self._me or member in self._suspected:
            return []
        self._note(now, f"suspects {member.peer_id}")
        self._suspected[member] = waited
        while len(self._suspected) > limits.MEMBERS_SUSPECTED_MAX_COUNT:
            self._suspected.pop(next(old for old in self._suspected if old not in self.view.members))
        # A proposal may have waited for this one alone.
        return self._advance(now)

    def trust(self, member: Member, *, now: float) -> list[Instruction]:
        """``member`` has shown that it is there."""
        if member in self._suspected:
            self._note(now, f"trusts {member.peer_id}")
            if self._suspected.pop(member) and member not in self.view.members:
                # It waits still.
                self._joiners[member] = now
        # It may have missed what was chosen meanwhile.
        return [SendTo(member, chosen) for chosen in self._chosen]

    def renew(self, *, now: float) -> list[Instruction]:
        """Another view is needed though all members are there: two of them have lost what was on the way."""
        self._note(now, "wants another view")
        self._renewal_wanted = True
        return []

    def candidate_came(self, member: Member, *, now: float) -> list[Instruction]:
        """A process that is in no view wants to be a member; told twice, it changes nothing."""
        if member not in self.view.members and len(self._joiners) < limits.MESH_MEMBERS_MAX_COUNT:
            self._note(now, f"candidate {member.peer_id}")
            self._joiners.setdefault(member, now)
        return []

    def settled_elsewhere(self, member: Member, *, now: float) -> list[Instruction]:
        """A process that wanted to be a member is one of another mesh of this name."""
        if member in self._suspected:
            self._suspected[member] = False
        if self._joiners.pop(member, None) is not None:
            self._note(now, f"{member.peer_id} is in another lineage")
        return []

    def wants_to_leave(self, member: Member, *, now: float) -> list[Instruction]:
        """``member`` leaves of its own will; until the next view it still takes part."""
        if member in self.view.members:
            self._note(now, f"{member.peer_id} leaves")
            self.leaving.add(member)
        return []

    def receive(self, sender: Member, message: Agreement, *, now: float) -> list[Instruction]:
        """Take a message of a peer that has proven who it is; what makes no sense is ignored."""
        self._note(now, f"{sender.peer_id}: {type(message).__name__}")
        if self.excluded:
            return []
        return self._dispatch(sender, message, now)

    def tick(self, *, now: float) -> list[Instruction]:
        """Time has passed; call at :meth:`next_wakeup`."""
        if self.excluded:
            return []
        if self._proposal is not None and now >= self._proposal.deadline:
            self._drop_proposal(now, "no answer in time")
        due = self._propose_at(now)
        out = self._propose(now) if due is not None and now >= due else []
        return out + self._look_for_quorum(now)

    def next_wakeup(self, *, now: float) -> float | None:
        """When :meth:`tick` has something to do, if nothing else happens."""
        if self.excluded:
            return None
        times = [
            self._proposal.deadline if self._proposal is not None else self._propose_at(now),
            None
            if self._quorum_missing_since is None or self._told_quorum_missing
            else self._quorum_missing_since + limits.QUORUM_MISSING_S,
        ]
        return min((time for time in times if time is not None), default=None)

    def candidate_count(self, *, now: float) -> int:
        """How many processes wait to be taken in, and were not left out just now."""
        return sum(not_before <= now for not_before in self._joiners.values())

    @property
    def is_accepting(self) -> bool:
        """Whether a value that this process proposed may be chosen any moment."""
        return self._proposal is not None and self._proposal.value is not None

    # --- Proposing ------------------------------------------------------------------------------

    @property
    def trusted(self) -> list[Member]:
        """The members of the view that are not suspected, in their order."""
        return [member for member in self.view.members if member not in self._suspected]

    def _change_is_wanted_at(self, now: float) -> float | None:
        """From when on there is a reason for another view, or for one that was begun to be brought to its end."""
        trusted = self.trusted
        # Where all leave, nobody need be told.
        leaving = self.leaving and any(member not in self.leaving for member in trusted)
        renewing = self._renewal_wanted or self.operations.is_full
        begun = self._promised is not None
        if len(trusted) < self.view.size or leaving or renewing or begun:
            return now
        return max(now, min(self._joiners.values())) if self.admits and self._joiners else None

    def _propose_at(self, now: float) -> float | None:
        wanted_at = self._change_is_wanted_at(now)
        if self._proposal is not None or wanted_at is None or not is_quorum(self.view, self.trusted):
            self._wanted_since = None if self._proposal is None else self._wanted_since
            return None
        if self._wanted_since is None or wanted_at < self._wanted_since:
            self._wanted_since = wanted_at
        turn = self.trusted.index(self._me) if self._me in self.trusted else len(self.trusted)
        ready = max(self._wanted_since + limits.VIEW_CHANGE_SETTLE_S, self._not_before)
        return ready + turn * limits.VIEW_CHANGE_STAGGER_S

    def _propose(self, now: float) -> list[Instruction]:
        ballot = self._next_ballot(self._me.peer_id)
        self._note(now, f"proposes with {ballot.round}")
        self._proposal = _Proposal(ballot, now + self._patience_s)
        prepare = Prepare(lineage=self.view.lineage, epoch=self.view.epoch + 1, ballot=ballot)
        return self._to_all(prepare, now)

    def _to_all(self, message: Agreement, now: float) -> list[Instruction]:
        """Send to all members of the view; this process answers itself at once."""
        out: list[Instruction] = [SendTo(member, message) for member in self.view.members if member != self._me]
        for instruction in self.receive(self._me, message, now=now):
            if isinstance(instruction, SendTo) and instruction.member == self._me:
                out += self.receive(self._me, instruction.message, now=now)
            else:
                out.append(instruction)
        return out

    @property
    def _patience_s(self) -> float:
        """How long a proposal may take: the longer, the more of them have failed, since ways may be long."""
        return min(limits.VIEW_CHANGE_TIMEOUT_S * 2.0**self._failures, limits.VIEW_CHANGE_TIMEOUT_MAX_S)

    def _drop_proposal(self, now: float, why: str) -> None:
        self._note(now, f"proposal dropped: {why}")
        self._proposal = None
        self._failures += 1
        self._not_before = now + limits.VIEW_CHANGE_RETRY_S

    def _on_promise(self, sender: Member, promise: Promise, now: float) -> list[Instruction]:
        proposal = self._proposal
        # Ballots begin anew in every epoch: one of the epoch before may look the same.
        if proposal is None or promise.ballot != proposal.ballot or promise.epoch != self.view.epoch + 1:
            return []
        if promise.lineage != self.view.lineage:
            return []
        if proposal.value is not None or sender not in self.view.members:
            return []
        proposal.promises[sender] = promise
        return self._advance(now)

    def _advance(self, now: float) -> list[Instruction]:
        """Go on with the proposal if all have answered that it waits for."""
        proposal = self._proposal
        if proposal is None:
            return []
        if proposal.value is None:
            heard = proposal.promises.keys()
            if not is_quorum(self.view, heard) or any(member not in heard for member in self.trusted):
                return []
            proposal.value = self._value(proposal.promises)
            return self._to_all(Accept(ballot=proposal.ballot, **proposal.value._asdict()), now)
        view = proposal.value.view
        awaited = [member for member in self.trusted if member in view.members]
        if not is_quorum(self.view, proposal.accepted) or any(member not in proposal.accepted for member in awaited):
            return []
        self._note(now, f"chosen: epoch {view.epoch} of {view.size}")
        return self._enter(Chosen(**proposal.value._asdict()), now, tell=True)

    def _value(self, promises: dict[Member, Promise]) -> _Value:
        """Return what may have been chosen already, or else the view of all that have promised, and of joiners."""
        accepted = [
            (
                promise.accepted_ballot,
                _Value(promise.accepted_view, promise.accepted_outcomes, promise.accepted_streams),
            )
            for promise in promises.values()
            if promise.accepted_ballot is not None and promise.accepted_view is not None
        ]
        if accepted:
            return max(accepted, key=lambda pair: pair[0])[1]
        heard = [member for member in self.view.members if member in promises and member not in self._suspected]
        suspects = {
            member: {other for rank, other in enumerate(self.view.members) if rank in promises[member].suspects}
            for member in heard
        }
        staying = without_the_cut_off([member for member in heard if member not in self.leaving] or heard, suspects)
        peers = {member.peer_id for member in staying}
        joining = [
            joiner
            for joiner in (self._joiners if self.admits else ())
            if joiner.peer_id not in peers and all(joiner in promises[member].candidates for member in staying)
        ]
        members = (*staying, *sorted(joining))[: limits.MESH_MEMBERS_MAX_COUNT]
        view = View(mesh_id=self.view.mesh_id, lineage=self.view.lineage, epoch=self.view.epoch + 1, members=members)
        standings = {
            self.view.members.index(member): Standing(promise.operations, promise.streams)
            for member, promise in promises.items()
        }
        return _Value(view, *decide(standings))

    def _on_accepted(self, sender: Member, accepted: Accepted, now: float) -> list[Instruction]:
        proposal = self._proposal
        if proposal is None or proposal.value is None or accepted.ballot != proposal.ballot:
            return []
        if sender not in self.view.members or accepted.epoch != self.view.epoch + 1:
            return []
        proposal.accepted.add(sender)
        return self._advance(now)

    def _on_declined(self, sender: Member, declined: Declined, now: float) -> list[Instruction]:
        if declined.epoch <= self.view.epoch:
            # It waits for a view that was chosen already.
            return [SendTo(sender, chosen) for chosen in self._chosen if chosen.view.epoch == declined.epoch]
        if declined.epoch > self.view.epoch + 1:
            return []
        if declined.promised is not None:
            self._round = max(self._round, declined.promised.round)
        if self._proposal is not None and declined.ballot == self._proposal.ballot:
            self._drop_proposal(now, f"{sender.peer_id} declined: {declined.reason}")
        return []

    # --- Accepting ------------------------------------------------------------------------------

    def _on_prepare(self, sender: Member, prepare: Prepare, now: float) -> list[Instruction]:
        answer = self._refusal(sender, prepare.epoch, prepare.lineage, prepare.ballot)
        if answer is not None:
            return [SendTo(sender, answer)]
        if self._promised is not None and prepare.ballot < self._promised:
            return [SendTo(sender, self._decline(prepare.ballot, "a higher ballot was promised"))]
        self._yield_to(prepare.ballot, now)
        self.operations.freeze()
        standing = self.operations.standing()
        out: list[Instruction] = [] if self._promised is not None else [Frozen(self.view, standing.operations)]
        self._promised = prepare.ballot
        self._wanted_since = now
        ballot, (view, outcomes, streams) = self._accepted or (None, (None, (), ()))
        promise = Promise(
            lineage=prepare.lineage,
            epoch=prepare.epoch,
            ballot=prepare.ballot,
            accepted_ballot=ballot,
            accepted_view=view,
            accepted_outcomes=outcomes,
            accepted_streams=streams,
            operations=standing.operations,
            streams=standing.streams,
            suspects=tuple(rank for rank, member in enumerate(self.view.members) if member in self._suspected),
            candidates=tuple(self._joiners),
        )
        return [*out, SendTo(sender, promise)]

    def _on_accept(self, sender: Member, accept: Accept, now: float) -> list[Instruction]:
        view = accept.view
        answer = self._refusal(sender, view.epoch, view.lineage, accept.ballot)
        if answer is not None:
            return [SendTo(sender, answer)]
        if accept.ballot != self._promised:
            reason = "this ballot was not promised, or a higher one was"
            return [SendTo(sender, self._decline(accept.ballot, reason))]
        if not view.is_sound() or view.mesh_id != self.view.mesh_id:
            return [SendTo(sender, self._decline(accept.ballot, "the view is not sound"))]
        self._accepted = (accept.ballot, _Value(view, accept.outcomes, accept.streams))
        self._wanted_since = now
        return [SendTo(sender, Accepted(epoch=view.epoch, ballot=accept.ballot))]

    def _refusal(self, sender: Member, epoch: int, lineage: bytes, ballot: Ballot) -> Agreement | None:
        """Return why nothing is said to a proposal: it comes too late, or too early for this member."""
        if lineage != self.view.lineage:
            return self._decline(ballot, "another lineage")
        if epoch <= self.view.epoch:
            known = [chosen for chosen in self._chosen if chosen.view.epoch == epoch]
            return known[0] if known else self._decline(ballot, "that view was chosen long ago")
        if epoch > self.view.epoch + 1 or sender not in self.view.members or ballot.proposer != sender.peer_id:
            return self._decline(ballot, f"this member is in epoch {self.view.epoch}")
        return None

    def _decline(self, ballot: Ballot, reason: str) -> Declined:
        return Declined(epoch=self.view.epoch + 1, ballot=ballot, promised=self._promised, reason=reason)

    def _yield_to(self, ballot: Ballot, now: float) -> None:
        if self._proposal is not None and ballot > self._proposal.ballot:
            self._drop_proposal(now, f"a higher ballot of {ballot.proposer} is about")
        if ballot.proposer != self._me.peer_id:
            self._not_before = now + self._patience_s

    # --- Learning -------------------------------------------------------------------------------

    def _on_chosen(self, sender: Member, chosen: Chosen, now: float) -> list[Instruction]:
        view = chosen.view
        if view.lineage != self.view.lineage or view.epoch <= self.view.epoch or not view.is_sound():
            return []
        if view.epoch > self.view.epoch + 1:
            # Whoever is in a view has promised in the one before it, or begins with it: so this process is not in it.
            self._note(now, f"is out, and missed the views up to {view.epoch}")
            self.excluded = True
            self.view = view
            return [Excluded(view, None)]
        return self._enter(chosen, now, tell=False)

    def _enter(self, chosen: Chosen, now: float, *, tell: bool) -> list[Instruction]:
        old, self.view = self.view, chosen.view
        self._chosen.append(chosen)
        self._note(now, f"enters epoch {chosen.view.epoch}")
        out: list[Instruction] = []
        if tell:
            everyone = dict.fromkeys((*old.members, *chosen.view.members))
            out += [SendTo(member, chosen) for member in everyone if member != self._me]
        if self._me not in chosen.view.members:
            self.excluded = True
            return [*out, Excluded(chosen.view, chosen.outcomes)]
        self.leaving &= set(chosen.view.members)
        for member in chosen.view.members:
            self._joiners.pop(member, None)
        # The others wait for a member that is not connected to them yet.
        self._joiners = dict.fromkeys(self._joiners, now + limits.JOINER_RETRY_S)
        self._begin_epoch(now)
        self.operations.begin_epoch(chosen.outcomes)
        return [*out, Entered(chosen.view, chosen.outcomes, chosen.streams)]

    # --- Quorum ---------------------------------------------------------------------------------

    def _look_for_quorum(self, now: float) -> list[Instruction]:
        if is_quorum(self.view, self.trusted):
            self._quorum_missing_since, self._told_quorum_missing = None, False
            return []
        if self._quorum_missing_since is None:
            self._quorum_missing_since = now
        if self._told_quorum_missing or now < self._quorum_missing_since + limits.QUORUM_MISSING_S:
            return []
        self._told_quorum_missing = True
        return [QuorumMissing(self.view, tuple(member for member in self.view.members if member in self._suspected))]
