"""How a mesh's first view is agreed: a sans-IO machine, one in every process.

Each process keeps the *candidates*: the peers it is connected to, that proved the key, and that want to
compute. Once enough of them are known and the set has been still for a moment, the one with the lowest
peer id proposes; if it is silent, the next one steps in. Nobody's turn is a privilege: safety rests on
ballots alone.

The proposal is single-decree Paxos (Lamport, "Paxos Made Simple", 2001, section 2) with one difference: a
first view has no old view whose majority could accept it, so its acceptors are the proposed members
themselves, and it is chosen when *all* of them have accepted it. Two views that share a member therefore
never both come to life, and a chosen view is one that every member knows to be complete: an acceptor declines
unless it is connected to every member itself. A promise reports what was accepted as long as the acceptor sees
all its members; a proposer proposes the highest value reported, or, if it cannot be a member of that, leaves
the field to those who can. Once a member of an accepted view is gone the view is of no use even if it was
chosen (no collective ends without all members), and gives way.

Processes that hear of a chosen view without them (``Chosen``) are latecomers: they remember it, and the
caller is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from sparkle_mesh import limits
from sparkle_mesh.membership.ballots import BallotMachine
from sparkle_mesh.membership.messages import (
    Accept,
    Accepted,
    Agreement,
    Ballot,
    Chosen,
    Declined,
    Prepare,
    Promise,
)
from sparkle_mesh.membership.view import Member, View, first_view

_FIRST_EPOCH = 0
_NO_LINEAGE = b""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A process that wants to be a member, as its Introduction tells."""

    member: Member
    host_id: bytes
    min_peers: int

    @property
    def peer_id(self) -> str:
        """The candidate's peer id."""
        return self.member.peer_id


@dataclass(frozen=True, slots=True)
class SendTo:
    """Send ``message`` to ``peer_id``."""

    peer_id: str
    message: Agreement


@dataclass(frozen=True, slots=True)
class ViewAgreed:
    """This process is a member of ``view``, which was chosen."""

    view: View


@dataclass(frozen=True, slots=True)
class ViewElsewhere:
    """A view stands that this process is not in."""

    view: View


Instruction: TypeAlias = SendTo | ViewAgreed | ViewElsewhere


@dataclass(slots=True)
class _Proposal:
    ballot: Ballot
    view: View
    deadline: float
    asked: set[str] = field(default_factory=set)
    promises: dict[str, Promise] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)
    accepting: bool = False


class Formation(BallotMachine[str, Instruction]):
    """The machine of one process.

    Call a method for each event; each returns instructions to carry out in order. ``history`` holds the
    last events, for error messages and bug reports.

    Parameters
    ----------
    mesh_id
        32 bytes.
    me
        This process, or None for one that only watches (a node that lends no compute).
    settle_s
        How long the set of candidates must stay as it is before this process proposes a view.
    """

    def __init__(
        self, mesh_id: bytes, me: Candidate | None, *, now: float, settle_s: float = limits.VIEW_SETTLE_S
    ) -> None:
        super().__init__()
        self.view: View | None = None
        self.views_elsewhere: dict[bytes, View] = {}
        self._mesh_id = mesh_id
        self._me = me
        self._candidates: dict[str, Candidate] = {}
        self._watchers: set[str] = set()
        # Peer id to the lineage of the view that the peer said it is in, where that is not this process's.
        self._settled: dict[str, bytes] = {}
        self._accepted: tuple[Ballot, View] | None = None
        self._accepted_lineages: deque[bytes] = deque(maxlen=limits.MACHINE_HISTORY_MAX_COUNT)
        self._proposal: _Proposal | None = None
        self._settle_s = settle_s
        self._still_since = now
        self._not_before = now

    # --- Events ---------------------------------------------------------------------------------

    def candidate_came(self, candidate: Candidate, *, now: float) -> list[Instruction]:
        """A peer was admitted that wants to be a member."""
        self._note(now, f"came {candidate.peer_id}")
        if len(self._candidates) >= limits.MESH_MEMBERS_MAX_COUNT:
            return []
        self._settled.pop(candidate.peer_id, None)
        self._candidates[candidate.peer_id] = candidate
        self._still_since = now
        if self.view is not None:
            return [SendTo(candidate.peer_id, Chosen(view=self.view))]
        return []

    def watcher_came(self, peer_id: str, *, now: float) -> list[Instruction]:
        """A peer was admitted that only watches: it is told of the view."""
        self._note(now, f"watcher {peer_id}")
        self._watchers.add(peer_id)
        return [SendTo(peer_id, Chosen(view=self.view))] if self.view is not None else []

    def candidate_went(self, peer_id: str, *, now: float) -> list[Instruction]:
        """The peer died, left, or cannot be reached any more."""
        self._watchers.discard(peer_id)
        self._settled.pop(peer_id, None)
        if self._candidates.pop(peer_id, None) is None:
            return []
        self._note(now, f"went {peer_id}")
        self._still_since = now
        for lineage in [key for key in self.views_elsewhere if key not in self._settled.values()]:
            del self.views_elsewhere[lineage]
        if self._proposal is not None and any(m.peer_id == peer_id for m in self._proposal.view.members):
            self._drop_proposal(now, f"member {peer_id} went")
        return []

    def follow(self, view: View) -> None:
        """``view`` follows the one that this process was in, or takes it in."""
        self.view = view
        self._proposal = None

    def receive(self, sender: str, message: Agreement, *, now: float) -> list[Instruction]:
        """Take an agreement message of an admitted peer; what makes no sense is ignored."""
        self._note(now, f"{sender}: {type(message).__name__}")
        return self._dispatch(sender, message, now)

    def tick(self, *, now: float) -> list[Instruction]:
        """Time has passed; call at :meth:`next_wakeup`."""
        if self._proposal is not None and now >= self._proposal.deadline:
            self._drop_proposal(now, "no answer from all members in time")
        due = self._propose_at()
        if due is None or now < due:
            return []
        return self._propose(now)

    def next_wakeup(self) -> float | None:
        """When :meth:`tick` has something to do, if nothing else happens."""
        if self._proposal is not None:
            return self._proposal.deadline
        return self._propose_at()

    def state_of_play(self) -> str:
        """Say in a few words what this process waits for."""
        count = len(self._free_candidates()) + 1
        need = self._me.min_peers if self._me is not None else 0
        text = f"{count} of {need} peers are here" if count < need else f"{count} peers are here, as many as it takes"
        if self.views_elsewhere:
            view = next(iter(self.views_elsewhere.values()))
            text += f"; a view of {view.size} members formed without this process"
        return text

    @property
    def is_proposing(self) -> bool:
        """Whether a proposal of this process is under way."""
        return self._proposal is not None

    # --- Proposing ------------------------------------------------------------------------------

    def _eligible(self) -> list[Candidate]:
        """Return the largest set of candidates, this one included, that all find large enough."""
        if self._me is None or self.view is not None or self.views_elsewhere:
            # Where there is a mesh already, it takes newcomers in.
            return []
        modest = sorted([self._me, *self._free_candidates()], key=lambda c: (c.min_peers, c.peer_id))
        size = max((k for k in range(1, len(modest) + 1) if modest[k - 1].min_peers <= k), default=0)
        chosen = modest[:size]
        return chosen if self._me in chosen else []

    def _free_candidates(self) -> list[Candidate]:
        taken = self._taken()
        return [c for c in self._candidates.values() if c.member not in taken]

    def _taken(self) -> set[Member]:
        """Return the candidates that said themselves that they entered a view without this process."""
        return {self._candidates[peer_id].member for peer_id in self._settled if peer_id in self._candidates}

    def _propose_at(self) -> float | None:
        if self._proposal is not None or self._me is None:
            return None
        eligible = self._eligible()
        if not eligible:
            return None
        turn = sorted(c.peer_id for c in eligible).index(self._me.peer_id)
        # The stagger counts from the last failure too, or proposers that outran each other would do so for ever.
        ready = max(self._still_since + self._settle_s, self._not_before)
        return ready + turn * limits.PROPOSER_STAGGER_S

    def _propose(self, now: float) -> list[Instruction]:
        assert self._me is not None
        ballot = self._next_ballot(self._me.peer_id)
        view = first_view(self._mesh_id, ((c.host_id, c.member) for c in self._eligible()))
        self._proposal = _Proposal(ballot, view, now + limits.PROPOSAL_TIMEOUT_S)
        self._proposal.asked.update(member.peer_id for member in view.members)
        prepare = Prepare(lineage=_NO_LINEAGE, epoch=_FIRST_EPOCH, ballot=ballot)
        return self._to_members(view, prepare, now)

    def _to_members(self, view: View, message: Agreement, now: float) -> list[Instruction]:
        """Send to all members, and let this process answer itself at once."""
        assert self._me is not None
        instructions: list[Instruction] = [
            SendTo(m.peer_id, message) for m in view.members if m.peer_id != self._me.peer_id
        ]
        return self._loop_back(instructions, self.receive(self._me.peer_id, message, now=now), now)

    def _loop_back(self, out: list[Instruction], mine: Iterable[Instruction], now: float) -> list[Instruction]:
        assert self._me is not None
        for instruction in mine:
            if isinstance(instruction, SendTo) and instruction.peer_id == self._me.peer_id:
                out.extend(self.receive(self._me.peer_id, instruction.message, now=now))
            else:
                out.append(instruction)
        return out

    def _drop_proposal(self, now: float, why: str) -> None:
        self._note(now, f"proposal dropped: {why}")
        self._proposal = None
        self._not_before = now + limits.PROPOSAL_RETRY_S

    def _on_promise(self, sender: str, promise: Promise, now: float) -> list[Instruction]:
        proposal = self._proposal
        if proposal is None or proposal.accepting or promise.ballot != proposal.ballot:
            return []
        if not _has_peer(proposal.view, sender):
            return []
        proposal.promises[sender] = promise
        value = self._value_to_propose(proposal)
        if value is None:
            self._drop_proposal(now, "another view, without this process, may have been chosen")
            self._not_before = now + limits.PROPOSAL_TIMEOUT_S
            return []
        proposal.view = value
        missing = [m.peer_id for m in proposal.view.members if m.peer_id not in proposal.promises]
        if missing:
            # The value of somebody's promise may hold members that were not asked yet.
            unasked = [peer_id for peer_id in missing if peer_id not in proposal.asked]
            proposal.asked.update(unasked)
            prepare = Prepare(lineage=_NO_LINEAGE, epoch=_FIRST_EPOCH, ballot=proposal.ballot)
            return [SendTo(peer_id, prepare) for peer_id in unasked]
        proposal.accepting = True
        return self._to_members(proposal.view, Accept(ballot=proposal.ballot, view=proposal.view), now)

    def _value_to_propose(self, proposal: _Proposal) -> View | None:
        """Return the highest value reported, the proposer's own if there is none, None if it must not propose."""
        found: Mapping[Ballot, View] = {
            p.accepted_ballot: p.accepted_view
            for p in proposal.promises.values()
            if p.accepted_ballot is not None and p.accepted_view is not None
        }
        if not found:
            return proposal.view
        view = found[max(found)]
        sound = view.is_sound() and view.mesh_id == self._mesh_id
        return view if sound and self._can_be_member_of(view) is None else None

    def _on_accepted(self, sender: str, accepted: Accepted, now: float) -> list[Instruction]:
        proposal = self._proposal
        if proposal is None or not proposal.accepting or accepted.ballot != proposal.ballot:
            return []
        if not _has_peer(proposal.view, sender):
            return []
        proposal.accepted.add(sender)
        if len(proposal.accepted) < proposal.view.size:
            return []
        self._proposal = None
        return self._enter(proposal.view)

    def _on_declined(self, sender: str, declined: Declined, now: float) -> list[Instruction]:
        if declined.promised is not None:
            self._round = max(self._round, declined.promised.round)
        if self._proposal is not None and declined.ballot == self._proposal.ballot:
            self._drop_proposal(now, f"{sender} declined: {declined.reason}")
        return []

    # --- Accepting ------------------------------------------------------------------------------

    def _on_prepare(self, sender: str, prepare: Prepare, now: float) -> list[Instruction]:
        if self.view is not None:
            return [SendTo(sender, Chosen(view=self.view))]
        if prepare.ballot.proposer != sender or prepare.epoch != _FIRST_EPOCH or self._me is None:
            return [SendTo(sender, self._decline(prepare.epoch, prepare.ballot, "not a proposal for a first view"))]
        if self._promised is not None and prepare.ballot < self._promised:
            return [SendTo(sender, self._decline(prepare.epoch, prepare.ballot, "a higher ballot was promised"))]
        self._yield_to(prepare.ballot, now)
        self._promised = prepare.ballot
        ballot, view = self._accepted if self._accepted is not None else (None, None)
        if view is not None and self._can_be_member_of(view) is not None:
            ballot, view = None, None
        promise = Promise(
            lineage=prepare.lineage,
            epoch=prepare.epoch,
            ballot=prepare.ballot,
            accepted_ballot=ballot,
            accepted_view=view,
        )
        return [SendTo(sender, promise)]

    def _on_accept(self, sender: str, accept: Accept, now: float) -> list[Instruction]:
        if self.view is not None:
            return [SendTo(sender, Chosen(view=self.view))]
        view = accept.view
        problem: str | None
        if accept.ballot.proposer != sender or view.epoch != _FIRST_EPOCH:
            problem = "not a proposal for a first view"
        elif accept.ballot != self._promised:
            problem = "this ballot was not promised, or a higher one was"
        elif not view.is_sound() or view.mesh_id != self._mesh_id:
            problem = "the view is not sound"
        else:
            problem = self._can_be_member_of(view)
        if problem is not None:
            return [SendTo(sender, self._decline(view.epoch, accept.ballot, problem))]
        self._accepted = (accept.ballot, view)
        self._accepted_lineages.append(view.lineage)
        return [SendTo(sender, Accepted(epoch=view.epoch, ballot=accept.ballot))]

    def _can_be_member_of(self, view: View) -> str | None:
        """Return why this process cannot be a member of ``view``, or None."""
        if self._me is None:
            return "this process only watches"
        if view.rank_of(self._me.member) is None:
            return "this process is not in it"
        if view.size < self._me.min_peers:
            return f"its {view.size} members are fewer than min_peers={self._me.min_peers} here"
        taken = self._taken()
        for member in view.members:
            known = self._candidates.get(member.peer_id)
            if member in taken:
                return f"{member.peer_id} is in another view"
            if member != self._me.member and (known is None or known.member != member):
                return f"this process is not connected to {member.peer_id}"
        return None

    def _yield_to(self, ballot: Ballot, now: float) -> None:
        if self._proposal is not None and ballot > self._proposal.ballot:
            self._drop_proposal(now, f"a higher ballot of {ballot.proposer} is about")
            self._not_before = now + limits.PROPOSAL_TIMEOUT_S

    def _decline(self, epoch: int, ballot: Ballot, reason: str) -> Declined:
        return Declined(epoch=epoch, ballot=ballot, promised=self._promised, reason=reason)

    # --- Learning -------------------------------------------------------------------------------

    def _on_chosen(self, sender: str, chosen: Chosen, now: float) -> list[Instruction]:
        view = chosen.view
        if self.view is not None or not view.is_sound() or view.mesh_id != self._mesh_id:
            return []
        if not _has_peer(view, sender):
            return []
        if self._me is not None and view.rank_of(self._me.member) is not None:
            # A view with this process cannot have been chosen unless this process accepted it.
            if view.lineage not in self._accepted_lineages:
                return []
            if self._can_be_member_of(view) is None:
                return self._enter(view)
        self._settled[sender] = view.lineage
        known = self.views_elsewhere.get(view.lineage)
        if known is not None and known.epoch < view.epoch:
            self.views_elsewhere[view.lineage] = view
            return [ViewElsewhere(view)]
        if known is not None or len(self.views_elsewhere) >= limits.VIEWS_ELSEWHERE_MAX_COUNT:
            return []
        self.views_elsewhere[view.lineage] = view
        self._still_since = now
        if self._proposal is not None:
            self._drop_proposal(now, "a view formed without this process")
        return [ViewElsewhere(view)]

    def _enter(self, view: View) -> list[Instruction]:
        self.view = view
        self._proposal = None
        everyone = [*self._candidates, *self._watchers]
        return [*(SendTo(peer_id, Chosen(view=view)) for peer_id in everyone), ViewAgreed(view)]


def _has_peer(view: View, peer_id: str) -> bool:
    return any(member.peer_id == peer_id for member in view.members)
