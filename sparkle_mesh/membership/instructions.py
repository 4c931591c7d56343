"""What the machine of :mod:`.view_change` tells whoever runs it to do, or to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from sparkle_mesh.membership.messages import Agreement, OperationList, StreamCounts
from sparkle_mesh.membership.view import Member, View


@dataclass(frozen=True, slots=True)
class SendTo:
    """Send ``message`` to ``member``."""

    member: Member
    message: Agreement


@dataclass(frozen=True, slots=True)
class Frozen:
    """The epoch of ``view`` ends: nothing is prepared or committed in it any more, and so ``operations`` stand."""

    view: View
    operations: OperationList


@dataclass(frozen=True, slots=True)
class Entered:
    """``view`` was chosen, with this process in it, and so were the ``outcomes`` of what was open in the one before.

    Members that come in begin after ``streams``.
    """

    view: View
    outcomes: OperationList
    streams: StreamCounts = ()


@dataclass(frozen=True, slots=True)
class Excluded:
    """``view`` was chosen without this process: it is a member no more.

    What was open ends as for the others, by ``outcomes``; None if views were missed, so that nobody can tell any more.
    """

    view: View
    outcomes: OperationList | None


@dataclass(frozen=True, slots=True)
class QuorumMissing:
    """Too few members of ``view`` are left, or none of them can be reached: these are the ``missing`` ones."""

    view: View
    missing: tuple[Member, ...]


Instruction: TypeAlias = SendTo | Frozen | Entered | Excluded | QuorumMissing
