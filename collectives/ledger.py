"""What a group asks before an operation goes a step further, because the view that it runs over may be about to end."""

from __future__ import annotations

from typing import Protocol


class Ledger(Protocol):
    """Where operations stand; every step is entered here before it is taken, and one that is refused is not taken.

    Numbers are those of :class:`.messages.Stream`. Steps are refused while the epoch ends: then another view decides
    about what is open, and tells the group.
    """

    @property
    def frozen(self) -> bool:
        """Whether the epoch ends."""
        ...

    @property
    def is_full(self) -> bool:
        """Whether nothing can begin until there is another view, which follows then."""
        ...

    def begin(self, number: int, *, tag: str = "", route: tuple[int, ...] = (), once: bool = False) -> bool:
        """This rank begins it; among all ranks, or the two of ``route``.

        ``once`` is that it fails, and is not made again, if the view ends before it does.
        """
        ...

    def prepare(self, number: int, digest: bytes) -> bool:
        """This rank holds the result, and tells others so."""
        ...

    def commit(self, number: int) -> bool:
        """All ranks hold it."""
        ...

    def abort(self, number: int, *, told: bool = False) -> bool:
        """It fails; ``told`` is that no rank can have committed it."""
        ...


class OneView:
    """The ledger of a group whose view is the only one: when a rank is lost, so is the group."""

    frozen = False
    is_full = False

    def begin(self, number: int, *, tag: str = "", route: tuple[int, ...] = (), once: bool = False) -> bool:
        return True

    def prepare(self, number: int, digest: bytes) -> bool:
        return True

    def commit(self, number: int) -> bool:
        return True

    def abort(self, number: int, *, told: bool = False) -> bool:
        return True
