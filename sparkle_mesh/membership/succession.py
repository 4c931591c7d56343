"""Runs the machine of :mod:`.view_change` in one process: who its peers are, its time, and what it tells.

It sends and hears through the service's channels, which know peers by their ids; the machine knows members.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import trio

from sparkle_mesh.fabric.interface import PeerId
from sparkle_mesh.membership.instructions import Entered, Excluded, Frozen, Instruction, QuorumMissing, SendTo
from sparkle_mesh.membership.messages import Agreement, Chosen
from sparkle_mesh.membership.operations import OpenOperations
from sparkle_mesh.membership.view import Member, View
from sparkle_mesh.membership.view_change import ViewChange, is_quorum

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Merged:
    """The lineage of ``view`` has met another one, and dissolves."""

    view: View


Change: TypeAlias = Entered | Excluded | QuorumMissing | Merged


class Succession:
    """The views of this process, from its first one on.

    Parameters
    ----------
    member
        This process.
    first
        The view with which it begins, as it was entered.
    operations
        What is open in it.
    send
        Sends to a peer, if it is connected.
    tell
        Called with every change.
    """

    def __init__(
        self,
        member: Member,
        first: Entered,
        operations: OpenOperations,
        *,
        send: Callable[[PeerId, Agreement], None],
        tell: Callable[[Change], None],
    ) -> None:
        self._member = member
        self._send, self._tell = send, tell
        chosen = Chosen(first.view, first.outcomes, first.streams)
        self._machine = ViewChange(first.view, member, operations, now=trio.current_time(), chosen=chosen)
        self._machine.admits = False
        self.ended = False
        #: Set, and replaced, with every change of what :attr:`can_leave` depends on.
        self.changed = trio.Event()
        tell(first)

    @property
    def view(self) -> View:
        """The view that was entered last."""
        return self._machine.view

    @property
    def next_wakeup(self) -> float | None:
        """When to :meth:`tick`."""
        return self._machine.next_wakeup(now=trio.current_time())

    @property
    def can_leave(self) -> bool:
        """Whether nobody is left who would need to be told that this process leaves."""
        staying = [member for member in self._machine.trusted if member != self._member]
        return self.ended or self._machine.leaving.issuperset(staying)

    # --- Events ----------------------------------------------------------------------------------

    def tick(self) -> None:
        """Time has passed."""
        self._carry_out(self._machine.tick(now=trio.current_time()))

    def came(self, member: Member) -> None:
        """A process that wants to compute is connected, and has proven that it may."""
        now = trio.current_time()
        for other in self.view.members:
            if other.peer_id == member.peer_id and other != member:
                # An earlier life of the same peer.
                self._carry_out(self._machine.suspect(other, now=now))
        self._carry_out(self._machine.trust(member, now=now))
        self._carry_out(self._machine.candidate_came(member, now=now))

    def suspect(self, member: Member, reason: str) -> None:
        """``member`` is believed to be gone."""
        if member in self.view.members and member != self._member:
            logger.info("member %s is believed to be gone: %s", member.peer_id, reason)
        self._carry_out(self._machine.suspect(member, now=trio.current_time()))
        self._notify()

    def trust(self, member: Member) -> None:
        """``member`` has shown that it is there."""
        self._carry_out(self._machine.trust(member, now=trio.current_time()))

    def leaves(self, member: Member) -> None:
        """``member``, or this process, wants to be in no further view."""
        self._carry_out(self._machine.wants_to_leave(member, now=trio.current_time()))
        self._notify()

    def renew(self) -> None:
        """Another view is needed, because two members have lost their link."""
        self._carry_out(self._machine.renew(now=trio.current_time()))

    @property
    def leads(self) -> bool:
        """Whether this process speaks for its lineage: it is the first of those that it trusts, and they can decide."""
        trusted = self._machine.trusted
        return not self.ended and trusted[:1] == [self._member] and is_quorum(self.view, trusted)

    def dissolve(self) -> None:
        """This lineage has met another, and gives way: this process is a member no more."""
        if self.ended:
            return
        logger.info("this mesh has met another of its name, which goes on; view %d is its last", self.view.epoch)
        self._machine.excluded = self.ended = True
        self._notify()
        self._tell(Merged(self.view))

    def stop(self) -> None:
        """Nothing is said or heard any more: whoever waits for another view waits in vain."""
        self.ended = True
        self._notify()

    def admit(self, admits: bool) -> None:
        """Take those who wait in with the next view, or no longer."""
        self._machine.admits = admits

    @property
    def candidates(self) -> int:
        """How many processes wait to be taken in, and were not left out just now."""
        return self._machine.candidate_count(now=trio.current_time())

    def receive(self, sender: Member, message: Agreement) -> None:
        """``sender`` has said ``message``."""
        now = trio.current_time()
        if isinstance(message, Chosen) and message.view.lineage != self.view.lineage:
            self._carry_out(self._machine.settled_elsewhere(sender, now=now))
        self._carry_out(self._machine.receive(sender, message, now=now))

    # --- What follows ----------------------------------------------------------------------------

    def _carry_out(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case SendTo(member, message):
                    self._send(member.peer_id, message)
                case Frozen(view, _):
                    logger.info("view %d ends", view.epoch)
                case Entered(view, _, _):
                    logger.info("view %d of %d members was chosen", view.epoch, view.size)
                    self._machine.admits = False
                    self._notify()
                    self._tell(instruction)
                case Excluded():
                    self.ended = True
                    self._notify()
                    self._tell(instruction)
                case QuorumMissing():
                    self._tell(instruction)

    def _notify(self) -> None:
        changed, self.changed = self.changed, trio.Event()
        changed.set()


def joins(message: Agreement, me: Member, mesh_id: bytes) -> Entered | None:
    """Return the view that ``message`` takes this process into, which is in none yet; None if it does not.

    That the view was chosen rests on the word of who says so, which has proven the key like all others. It need not be
    in the view: it may have proposed it, and left with it.
    """
    if not isinstance(message, Chosen) or message.view.epoch == 0:
        return None
    view = message.view
    if view.mesh_id != mesh_id or not view.is_sound() or me not in view.members:
        return None
    return Entered(view, message.outcomes, message.streams)
