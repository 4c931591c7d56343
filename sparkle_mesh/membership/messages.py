"""What peers of a mesh say to each other on ``/sparkle/mesh/1``.

First the proof (:class:`Hello`, :class:`Challenge`, :class:`Proof`, or :class:`Refused`), then
:class:`Introduction` from both sides, then any of the rest. To an introduction that it does not
like a process says :class:`Refused`.

A change of view is one single-decree Paxos instance (Lamport, "Paxos Made Simple", 2001, section 2) per
lineage and epoch: ``Prepare``/``Promise`` are its phase 1, ``Accept``/``Accepted`` its phase 2, ``Chosen``
tells the outcome. The fields for open operations travel already in the first version.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.membership.revocations import EncodedRevocations
from sparkle_mesh.membership.view import Member, MemberList, View

PROTOCOL = "/sparkle/mesh/1"
VERSION = 1

Role: TypeAlias = Literal["node", "trainer"]


class Ballot(wire.Message, array_like=True, order=True, frozen=True):
    """A proposal's number: ordered by round, then by proposer, so that no two proposers share one."""

    round: wire.Count
    proposer: wire.PeerIdText


#: How far one member is with a collective; and how it ends for all: ``committed``, ``aborted`` by a member, ``lost``
#: with one, or to ``repeat``.
Stage: TypeAlias = Literal["begun", "prepared", "committed", "aborted", "lost", "repeat"]
_Rank = Annotated[int, msgspec.Meta(ge=0, lt=limits.MESH_MEMBERS_MAX_COUNT)]
#: The ranks of the two that an operation is between; empty if all take part.
Route = Annotated[tuple[_Rank, ...], msgspec.Meta(max_length=2)]
RankList = Annotated[tuple[_Rank, ...], msgspec.Meta(max_length=limits.MESH_MEMBERS_MAX_COUNT)]
#: The number of a stream of operations, and how many of it were begun.
StreamCount: TypeAlias = tuple[wire.Count, wire.Count]
StreamCounts = Annotated[tuple[StreamCount, ...], msgspec.Meta(max_length=limits.COLLECTIVE_STREAMS_MAX_COUNT)]


class OperationState(wire.Message, array_like=True, frozen=True):
    """Where one member stands with one collective that is not yet ended everywhere; how it ends, in an outcome.

    ``once`` is that it is not repeated: its callers must see the next view before.
    """

    number: wire.Count
    tag: wire.NameText
    state: Stage
    digest: Annotated[bytes, msgspec.Meta(max_length=64)]
    route: Route = ()
    once: bool = False


OperationList = Annotated[tuple[OperationState, ...], msgspec.Meta(max_length=limits.OPERATIONS_PER_PROMISE_MAX_COUNT)]

# --- Proof -----------------------------------------------------------------------------------------


class Hello(wire.Message, tag="hello", frozen=True):
    """From the opener: the versions it speaks (lowest, highest) and a fresh nonce."""

    version_min: wire.Count
    version_max: wire.Count
    nonce: wire.Bytes32


class Challenge(wire.Message, tag="challenge", frozen=True):
    """The answer: the version chosen, a fresh nonce, and the answerer's proof over both."""

    version: wire.Count
    nonce: wire.Bytes32
    proof: wire.Bytes32


class Proof(wire.Message, tag="proof", frozen=True):
    """The opener's proof."""

    proof: wire.Bytes32


class Refused(wire.Message, tag="refused", frozen=True):
    """The end of it, with a reason that both sides report."""

    code: Literal["version", "key", "not_local", "full", "duplicate", "left"]
    reason: wire.ReasonText


# --- Introduction ----------------------------------------------------------------------------------


class Introduction(wire.Message, tag="introduction", frozen=True):
    """Who this is: from the opener right after its proof, from the answerer as the answer to that.

    ``certificate`` says which machine a training process is of (:mod:`.certificates`). It is opened apart from the
    rest, so that one of a later version does no harm. ``revocations`` is the list that holds where the sender is.
    """

    role: Role
    member: Member
    host_id: wire.Bytes16
    min_peers: wire.Count
    addresses: wire.AddressList
    software: wire.NameText = ""
    certificate: Annotated[bytes, msgspec.Meta(max_length=limits.CERTIFICATE_MAX_BYTES)] | None = None
    revocations: EncodedRevocations | None = None


class PeerExchange(wire.Message, tag="peers", frozen=True):
    """Peers of this mesh the sender is connected to: some, if they are many."""

    peers: Annotated[tuple[wire.PeerAddress, ...], msgspec.Meta(max_length=limits.PEER_EXCHANGE_MAX_COUNT)]


class Met(wire.Message, tag="met", frozen=True):
    """Gossiped by whoever meets peers that nobody has told of yet: others may reach them there. Sealed."""

    peers: Annotated[tuple[wire.PeerAddress, ...], msgspec.Meta(max_length=limits.PEER_EXCHANGE_MAX_COUNT)]


class Revoked(wire.Message, tag="revoked", frozen=True):
    """Gossiped when a newer list of revoked peers has come. Sealed; those who do not know it drop it."""

    revocations: EncodedRevocations


class Presence(wire.Message, tag="presence", frozen=True):
    """Gossiped when the publisher's addresses have changed. Sealed."""

    role: Role
    incarnation: wire.Bytes16
    addresses: wire.AddressList


# --- Agreement -------------------------------------------------------------------------------------


class Prepare(wire.Message, tag="prepare", frozen=True):
    """Phase 1a. ``lineage`` is empty for a first view."""

    lineage: Annotated[bytes, msgspec.Meta(max_length=32)]
    epoch: wire.Count
    ballot: Ballot


class Promise(wire.Message, tag="promise", frozen=True):
    """Phase 1b: no lower ballot will be accepted; the highest accepted value, and where operations stand here.

    ``streams`` says how many operations of each stream it has begun; what it has begun and does not name among
    ``operations`` it has committed. ``suspects`` are the ranks that it believes to be gone, and ``candidates`` those
    that it is connected to and that want to be taken in.
    """

    lineage: Annotated[bytes, msgspec.Meta(max_length=32)]
    epoch: wire.Count
    ballot: Ballot
    accepted_ballot: Ballot | None = None
    accepted_view: View | None = None
    accepted_outcomes: OperationList = ()
    accepted_streams: StreamCounts = ()
    operations: OperationList = ()
    streams: StreamCounts = ()
    suspects: RankList = ()
    candidates: MemberList = ()


class Accept(wire.Message, tag="accept", frozen=True):
    """Phase 2a: the proposed next view, the outcome of each operation open in the old one, and where joiners begin."""

    ballot: Ballot
    view: View
    outcomes: OperationList = ()
    streams: StreamCounts = ()


class Accepted(wire.Message, tag="accepted", frozen=True):
    """Phase 2b."""

    epoch: wire.Count
    ballot: Ballot


class Declined(wire.Message, tag="declined", frozen=True):
    """A promise or acceptance refused: the ballot that stands in the way, or why the view cannot be."""

    epoch: wire.Count
    ballot: Ballot
    promised: Ballot | None
    reason: wire.ReasonText


class Chosen(wire.Message, tag="chosen", frozen=True):
    """A view that was chosen; the answer, too, to proposals that come late."""

    view: View
    outcomes: OperationList = ()
    streams: StreamCounts = ()


# --- Meshes that meet ------------------------------------------------------------------------------


class Meeting(wire.Message, tag="meeting", frozen=True):
    """To members of another lineage of this mesh: what the sender's has to show; one of the two must dissolve."""

    lineage: wire.Bytes32
    step: wire.Count
    operations: wire.Count
    size: wire.Count


class Merger(wire.Message, tag="merger", frozen=True):
    """The lineage ``dissolves`` dissolves, since it has met the lineage ``into``, which its members may join."""

    dissolves: wire.Bytes32
    into: wire.Bytes32


# --- Life ------------------------------------------------------------------------------------------


class Ping(wire.Message, tag="ping", frozen=True):
    """Are you there? ``probe`` comes back in the :class:`Pong`."""

    probe: wire.Count


class Pong(wire.Message, tag="pong", frozen=True):
    """Yes."""

    probe: wire.Count


class Leaving(wire.Message, tag="leaving", frozen=True):
    """The sender wants to be left out of the next view, and takes part in agreeing on it until then."""


class Leave(wire.Message, tag="leave", frozen=True):
    """The sender leaves of its own will; nothing follows.

    With ``stays`` it leaves this connection alone: it is of the mesh still, and has peers enough. It has named others
    just before.
    """

    reason: wire.ReasonText = ""
    stays: bool = False


Greeting: TypeAlias = Hello | Challenge | Proof | Refused
Agreement: TypeAlias = Prepare | Promise | Accept | Accepted | Declined | Chosen
MeshMessage: TypeAlias = (
    Introduction | PeerExchange | Agreement | Meeting | Merger | Ping | Pong | Leaving | Leave | Refused
)
