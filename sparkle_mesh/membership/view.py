"""Views: who is in the mesh, in ring order, agreed by all of them."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Annotated

import msgspec

from sparkle_mesh import limits, wire


class Member(wire.Message, array_like=True, order=True, frozen=True):
    """One life of one process: a restart is a new member, with the same peer id or not."""

    peer_id: wire.PeerIdText
    incarnation: wire.Bytes16


class LinkMetric(wire.Message, array_like=True, frozen=True):
    """What the link between the members at two ranks was measured to give when the view was made."""

    rank_a: wire.Count
    rank_b: wire.Count
    latency_us: wire.Count
    bandwidth_bytes_per_s: wire.Count


MemberList = Annotated[tuple[Member, ...], msgspec.Meta(max_length=limits.MESH_MEMBERS_MAX_COUNT)]
WeightList = Annotated[tuple[float, ...], msgspec.Meta(max_length=limits.MESH_MEMBERS_MAX_COUNT)]
MetricList = Annotated[tuple[LinkMetric, ...], msgspec.Meta(max_length=limits.LINK_METRICS_MAX_COUNT)]


class View(wire.Message, frozen=True):
    """One agreed membership.

    Attributes
    ----------
    mesh_id
        32 bytes, the same for all views of a mesh name and key.
    lineage
        32 bytes, the hash of the first view of this line of views.
    epoch
        0 for the first view, one more for each that follows.
    members
        In ring order; a rank is a position in it.
    weights, metrics
        Per-member weights for shard sizes and the link figures plans are made from; empty means all equal.
    """

    mesh_id: wire.Bytes32
    lineage: wire.Bytes32
    epoch: wire.Count
    members: MemberList
    weights: WeightList = ()
    metrics: MetricList = ()

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.members)

    def rank_of(self, member: Member) -> int | None:
        """Return the rank of ``member`` (peer id and incarnation), or None if it is not in the view."""
        try:
            return self.members.index(member)
        except ValueError:
            return None

    def is_sound(self) -> bool:
        """Whether it is a view at all: members differ, and a first view's lineage is its own hash."""
        if not self.members or len({member.peer_id for member in self.members}) != self.size:
            return False
        return self.epoch > 0 or self.lineage == _first_lineage(self.mesh_id, self.members)


def first_view(mesh_id: bytes, candidates: Iterable[tuple[bytes, Member]]) -> View:
    """Make the first view of a lineage from ``(host id, member)`` pairs.

    The ring order is by host, then by peer id, so that members of one host are neighbours and a ring
    crosses the network once per host.
    """
    members = tuple(member for _, member in sorted(candidates, key=lambda pair: (pair[0], pair[1])))
    return View(mesh_id=mesh_id, lineage=_first_lineage(mesh_id, members), epoch=0, members=members)


def _first_lineage(mesh_id: bytes, members: tuple[Member, ...]) -> bytes:
    digest = sha256(b"sparkle lineage 1\0" + mesh_id)
    for member in members:
        digest.update(wire.encode(member))
    return digest.digest()
