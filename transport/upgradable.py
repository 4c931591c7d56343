"""A link that moves to a better one in the middle of its life, and loses, repeats and reorders nothing.

Both ends get the new link and confirm it to each other over it. From then on each direction moves by itself: the
sender finishes its message, says on the former link that it has moved, and goes on over the new one; the receiver
reads the former link up to there, and then the new one. Once both directions have moved, the former link is closed.

A new link that fails before it was confirmed is forgotten, and all goes on as before. After that it is the link.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError, UnreachableError, UsageError
from sparkle_mesh.transport.framed import FramedLink, PeerMoved
from sparkle_mesh.transport.link import Buffer, Link, LinkStats
from sparkle_mesh.transport.turns import Turns

_READY: Final = b"ready"


class UpgradableLink(Link):
    """A link over ``first`` until both ends call :meth:`move_to`. ``kind`` is that of the link that carries it now.

    Parameters
    ----------
    first
        One whose peer may move; it is taken over.
    link_id
        By which both ends know it.
    """

    def __init__(self, first: FramedLink, link_id: bytes) -> None:
        self.link_id = link_id
        self.kind = first.kind
        self.peer_id = first.peer_id
        self._stats = first.stats
        self._first = first
        self._outgoing: Link = first
        self._incoming: Link = first
        self._turns = Turns()
        # A link that is moved to once it is confirmed, and whether that is still being found out.
        self._next: Link | None = None
        self._confirmed = trio.Event()
        self._peer_moved = False
        # The peer has moved, or the link is closed.
        self._settled = trio.Event()
        self._closed_because: str | None = None

    def __repr__(self) -> str:
        return f"<UpgradableLink ({self.kind}) to {self.peer_id}{' closed' if self.closed else ''}>"

    @property
    def stats(self) -> LinkStats:
        """As for every link; what is known of the way there is known of the one that is used."""
        return self._outgoing.stats

    @property
    def parts(self) -> set[Link]:
        """The links that this one is made of now."""
        return {self._first, self._outgoing, self._incoming, *([] if self._next is None else [self._next])}

    # --- Moving ----------------------------------------------------------------------------------

    async def move_to(self, link: Link) -> None:
        """Move to ``link``, whose other end the peer moves to; it is taken over, and closed if it fails.

        Returns once both directions have moved, or this link is closed. Whoever uses the link must be receiving.

        Raises
        ------
        UsageError
            If it moves, or has moved, already.
        UnreachableError, LinkClosedError, ProtocolError
            If ``link`` failed and all goes on as before, or this link failed.
        """
        if self._next is not None:
            raise UsageError(f"the link to peer {self.peer_id} has moved already; close the link that is too many")
        self._next, self._confirmed = link, trio.Event()
        try:
            self._check_open()
            await self._confirm(link)
        except BaseException:
            self._next = None
            self._confirmed.set()
            with trio.CancelScope(shield=True):
                await link.aclose()
            raise
        self._confirmed.set()
        await self._turns.take()
        try:
            await self._first.send_moved()
            self._outgoing = link
            self._tell_kind()
        finally:
            self._turns.release()
        await self._settled.wait()
        if self._closed_because is None:
            await self._finish_first()

    async def _confirm(self, link: Link) -> None:
        """Make sure that the peer has the new link too, and both can send over it."""
        with trio.move_on_after(limits.LINK_HANDSHAKE_TIMEOUT_S):
            await link.send(_READY)
            header, payload_bytes = await link.receive_header()
            if bytes(header) != _READY or payload_bytes:
                raise ProtocolError(
                    f"peer {self.peer_id} said {bytes(header[:20])!r} on a new link, not that it is ready"
                )
            # One account for both.
            link._stats = self._stats
            return
        raise UnreachableError(
            f"peer {self.peer_id} did not confirm a new link within {limits.LINK_HANDSHAKE_TIMEOUT_S:g} s"
        )

    async def _follow(self) -> None:
        """Receive over the link to which the peer has moved. Cancelling loses nothing."""
        if self._next is not None:
            await self._confirmed.wait()
        if self._next is None:
            if self._confirmed.is_set():
                raise LinkClosedError(await self._fail(f"the new link to peer {self.peer_id} was lost as it was taken"))
            raise ProtocolError(
                await self._fail(f"peer {self.peer_id} broke the protocol: it moved to a link that does not stand")
            )
        self._incoming = self._next
        self._tell_kind()
        self._settled.set()

    def _tell_kind(self) -> None:
        if self._incoming is self._outgoing:
            self.kind = self._incoming.kind

    async def _finish_first(self) -> None:
        """Close the former link; nothing but its end may come over it."""
        try:
            with trio.move_on_after(limits.LINK_LINGER_S):
                await self._first.receive_header()
        except LinkClosedError:
            # As it should be; or it is this link that was closed.
            pass
        except ProtocolError as error:
            await self._fail(str(error))
            raise
        finally:
            with trio.CancelScope(shield=True):
                await self._first.aclose()

    # --- Messages --------------------------------------------------------------------------------

    async def send(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        await self._turns.take()
        try:
            self._check_open()
            await self._outgoing.send(header, buffers)
        finally:
            self._turns.release()

    async def receive_header(self) -> tuple[memoryview, int]:
        self._check_open()
        if not self._peer_moved:
            try:
                return await self._incoming.receive_header()
            except PeerMoved:
                self._peer_moved = True
        if self._incoming is self._first:
            await self._follow()
        return await self._incoming.receive_header()

    async def receive_into(self, buffers: Sequence[Buffer]) -> None:
        self._check_open()
        await self._incoming.receive_into(buffers)

    async def discard_payload(self) -> None:
        self._check_open()
        await self._incoming.discard_payload()

    def _check_open(self) -> None:
        if self._closed_because is not None:
            raise LinkClosedError(self._closed_because)

    # --- Closing ---------------------------------------------------------------------------------

    async def aclose(self) -> None:
        await self._close("this end of the link was closed")

    async def _fail(self, reason: str) -> str:
        await self._close(reason)
        return reason

    async def _close(self, reason: str) -> None:
        if self._closed_because is None:
            self._closed_because = reason
        self._settled.set()
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for link in self.parts:
                    nursery.start_soon(link.aclose)

    @property
    def closed(self) -> bool:
        return self._closed_because is not None or self._outgoing.closed or self._incoming.closed

    def pace(self, bytes_per_s: float | None) -> None:
        self._outgoing.pace(bytes_per_s)

    def close_in_child(self) -> None:
        self._closed_because = "the link belongs to the parent process"
        for link in self.parts:
            link.close_in_child()
