"""What a connector keeps of links that are wanted and not there yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.transport.link import Link


class Attempt:
    """This process wants a link to a peer. Shared by all calls that do; over once it has a link or an error."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.waiters = 0
        self.link: Link | None = None
        self.taken = False
        self.error: SparkleError | None = None
        #: What went wrong so far and is being tried again.
        self.last_failure = "it has not asked for a link"
        #: Kinds of links that both sides can do, and that did not come about.
        self.failed_kinds: set[str] = set()
        self._scopes: set[trio.CancelScope] = set()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Cancel what is inside once nobody wants the link any more."""
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)

    def give_up(self) -> None:
        """Nobody wants the link any more."""
        for scope in self._scopes:
            scope.cancel()

    def succeed(self, link: Link) -> None:
        """There is a link."""
        self.link = link
        self.done.set()

    def fail(self, error: SparkleError) -> None:
        """There will be none."""
        self.error = error
        self.done.set()


class WaitingOffer:
    """An offer of a peer that waits until this process wants the link too."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope(deadline=trio.current_time() + limits.LINK_OFFER_WAIT_S)
        self.wanted = trio.Event()
