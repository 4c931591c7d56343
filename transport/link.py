"""What a link is: an ordered, reliable, authenticated pipe of messages between two peers.

A message is a small header and a payload of any size. The receiver reads the header, then says where the
payload goes, so that bytes land where they belong without a copy.

Nomenclature: a *message* is header + payload; the payload is scattered from and gathered into *buffers*;
on encrypted links it travels as *records*.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

# Any C-contiguous object of the buffer protocol: memoryview, bytearray, numpy.ndarray.
Buffer: TypeAlias = Any


@dataclass(slots=True)
class LinkStats:
    """Counters of one link since it opened, and what is known of the way that its bytes take.

    Attributes
    ----------
    latency_s
        Half a round trip, in seconds; None until one was measured.
    bandwidth_bytes_per_s
        What the way to the peer carried of late when there was enough to send; None until there was.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    latency_s: float | None = None
    bandwidth_bytes_per_s: float | None = None


class Link(ABC):
    """One end of a link. One task may send while another receives; two senders take turns (FIFO)."""

    #: ``"tcp"``, ``"memory"``, …
    kind: str
    #: The authenticated identity of the other end.
    peer_id: str
    _stats: LinkStats

    @property
    def stats(self) -> LinkStats:
        """What passed so far, and what is known now of the way there; measured without load of its own."""
        return self._stats

    @abstractmethod
    async def send(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Send one message; returns once every byte was handed to the operating system (or the peer).

        The buffers must not change until it returns. A cancelled send leaves the link closed, because a
        message may have been cut in half.

        Parameters
        ----------
        header
            At most ``limits.LINK_HEADER_MAX_BYTES`` bytes.
        buffers
            C-contiguous buffers; their bytes, concatenated, are the payload.

        Raises
        ------
        UsageError
            If the header is too long.
        LinkClosedError
            If the link is closed, here or there.
        """

    async def send_all(self, messages: Sequence[tuple[bytes, Sequence[Buffer]]]) -> None:
        """Send several messages, one after the other: small ones together, which costs about as much as one.

        Parameters
        ----------
        messages
            Headers and buffers, as for :meth:`send`; so are the errors.
        """
        for header, buffers in messages:
            await self.send(header, buffers)

    @abstractmethod
    async def receive_header(self) -> tuple[memoryview, int]:
        """Wait for the next message; return its header (valid until the next receive) and payload bytes.

        Cancelling this call loses nothing. A payload that was not received is an error of the caller.

        Raises
        ------
        LinkClosedError
            At the end of the link.
        ProtocolError
            If the peer's bytes break the protocol; the link is closed then.
        """

    @abstractmethod
    async def receive_into(self, buffers: Sequence[Buffer]) -> None:
        """Receive the announced payload, or the next part of it, into writable C-contiguous buffers; fills them all.

        Parts of ``limits.RECORD_MAX_BYTES`` (the last one shorter) are how large payloads are sent, and are
        received with no copy.

        What the buffers hold when this raises is undefined (forged bytes may have been decrypted into
        them): never pass a user's array. A cancelled call leaves the link closed.

        Raises
        ------
        UsageError
            If the buffers are larger than what is left of the announced payload.
        LinkClosedError, ProtocolError
            As for :meth:`receive_header`.
        """

    @abstractmethod
    async def discard_payload(self) -> None:
        """Read the announced payload and drop it, in bounded memory."""

    def pace(self, bytes_per_s: float | None) -> None:
        """Send no faster than this from now on, as fast as can be if None; a link that cannot do so does as before.

        What comes in bursts overflows queues on the way, and what is lost at the end of a burst costs a timeout.
        """
        return

    @abstractmethod
    async def aclose(self) -> None:
        """Close; the peer reads what was sent and then gets LinkClosedError. Idempotent, never raises."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether this end is closed (by either side, as far as this end knows)."""

    @abstractmethod
    def close_in_child(self) -> None:
        """Called in a forked child: release inherited descriptors with no bytes sent. Never raises."""
