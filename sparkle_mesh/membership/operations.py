"""Where a member stands with each collective that is not ended everywhere, and how an epoch's end decides it. Pure.

A member *prepares* an operation when it holds its whole result, and *commits* it once all members of the view have
prepared it with the same digest. Before it has prepared it may *abort* it by itself: then nobody can commit it.
"""

from __future__ import annotations

from collections.abc import Iterable

from sparkle_mesh import limits
from sparkle_mesh.membership.messages import OperationList, OperationState, Stage

Key = tuple[str, int]


class OpenOperations:
    """The operations of one member in the epoch that it is in.

    Attributes
    ----------
    frozen
        Whether the epoch ends: nothing changes any more until :meth:`begin_epoch`.
    """

    def __init__(self) -> None:
        self.frozen = False
        self._states: dict[Key, OperationState] = {}

    def begin(self, tag: str, number: int) -> bool:
        """Begin operation ``number`` of ``tag``; False if the epoch ends: then it belongs to the next."""
        return self._set(tag, number, "begun", b"")

    def prepare(self, tag: str, number: int, digest: bytes) -> bool:
        """This member holds the result; False if it must not say so any more."""
        return self._set(tag, number, "prepared", digest)

    def commit(self, tag: str, number: int) -> bool:
        """All have prepared; False if this member must not commit by itself any more."""
        return self._set(tag, number, "committed", self._states[tag, number].digest)

    def abort(self, tag: str, number: int, *, told: bool = False) -> bool:
        """Give up; False if it is not this member's to give up any more: it has prepared, or the epoch ends.

        ``told`` is that another member has given up, without having prepared: then nobody can have committed.
        """
        state = self._states.get((tag, number))
        if state is not None and (state.state in ("committed", "aborted") or (state.state == "prepared" and not told)):
            return False
        return self._set(tag, number, "aborted", b"")

    def state(self, tag: str, number: int) -> OperationState | None:
        """Return where this member stands with one of them; None if it knows nothing of it."""
        return self._states.get((tag, number))

    def forget(self, tag: str, number: int) -> None:
        """All members have ended it."""
        if not self.frozen:
            self._states.pop((tag, number), None)

    def _set(self, tag: str, number: int, state: Stage, digest: bytes) -> bool:
        if self.frozen:
            return False
        known = (tag, number) in self._states
        if not known and len(self._states) >= limits.OPERATIONS_PER_PROMISE_MAX_COUNT:
            return False
        self._states[tag, number] = OperationState(number=number, tag=tag, state=state, digest=digest)
        return True

    def freeze(self) -> None:
        """The epoch ends."""
        self.frozen = True

    def begin_epoch(self) -> None:
        """Another epoch begins, with nothing open in it."""
        self.frozen = False
        self._states = {}

    def snapshot(self) -> OperationList:
        """Return where each stands."""
        return tuple(self._states.values())


def decide(promised: Iterable[OperationList]) -> OperationList:
    """Return the outcome, ``committed`` or ``aborted``, of every operation that any of these members has open.

    ``promised`` are the open operations of every member that goes on, as it promised them, and perhaps of others.
    """
    tables = [{(state.tag, state.number): state for state in operations} for operations in promised]
    outcomes = []
    for tag, number in sorted({key for table in tables for key in table}):
        states = [table.get((tag, number)) for table in tables]
        digests = {state.digest for state in states if state is not None and state.state in ("prepared", "committed")}
        committed = any(state is not None and state.state == "committed" for state in states)
        prepared = all(state is not None and state.state in ("prepared", "committed") for state in states)
        # Whoever has committed has found all digests equal; where they differ, nobody has.
        stands = committed or (prepared and len(digests) == 1)
        outcomes.append(
            OperationState(
                number=number,
                tag=tag,
                state="committed" if stands else "aborted",
                digest=min(digests) if stands else b"",
            )
        )
    return tuple(outcomes)
