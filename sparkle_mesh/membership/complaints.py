"""Who is left out where members cannot reach each other, though others reach them all. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sparkle_mesh.membership.view import Member


def without_the_cut_off(members: Sequence[Member], suspects: Mapping[Member, Collection[Member]]) -> list[Member]:
    """Return the members, in their order, of which no two suspect each other.

    Whoever has most such complaints is left out first, and of those that have as many, the last. A complaint of one
    side alone does not count: it is about somebody who was silent for a while, and is heard by now.

    Parameters
    ----------
    suspects
        By member: whom it suspects.
    """
    left = list(members)
    while True:
        complaints = [
            sum(other in suspects.get(member, ()) and member in suspects.get(other, ()) for other in left)
            for member in left
        ]
        most = max(complaints, default=0)
        if not most:
            return left
        del left[len(left) - 1 - complaints[::-1].index(most)]
