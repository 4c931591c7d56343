"""How a payload is cut into *stripes*, one record each, that may go over any of a link's streams. Pure.

Stripe ``i`` is the bytes from ``i * limits.LINK_STRIPE_BYTES`` on, and is as long as that, but for the last. So a place
either is that of a stripe or is wrong, and whether two records overlap is whether they are the same stripe.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from sparkle_mesh import limits
from sparkle_mesh.errors import ProtocolError
from sparkle_mesh.transport.buffers import scatter


def stripes(views: Sequence[memoryview]) -> Iterator[tuple[int, memoryview | bytes]]:
    """Yield offset and bytes of every stripe of the payload that ``views`` make up."""
    size = limits.LINK_STRIPE_BYTES
    offset = 0
    pieces: list[memoryview] = []
    missing = size
    for view in views:
        start = 0
        while start < len(view):
            piece = view[start : start + missing]
            start += len(piece)
            missing -= len(piece)
            pieces.append(piece)
            if not missing:
                yield offset, pieces[0] if len(pieces) == 1 else b"".join(pieces)
                offset, pieces, missing = offset + size, [], size
    if pieces:
        yield offset, pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Arrivals:
    """Which stripes of one payload have come.

    Parameters
    ----------
    number
        The message's, in its direction, among those whose payload is striped.
    total_bytes
        The payload's.
    """

    __slots__ = ("_came", "_first_missing", "number", "total_bytes")

    def __init__(self, number: int, total_bytes: int) -> None:
        self.number = number
        self.total_bytes = total_bytes
        # All stripes before this one came; those after it that did are in the set.
        self._first_missing = 0
        self._came: set[int] = set()

    def is_due(self, number: int, offset: int, length: int, end: int) -> bool:
        """Return whether a record belongs before byte ``end`` of this payload; False if it belongs later.

        Raises
        ------
        ProtocolError
            If it belongs nowhere.
        """
        if number > self.number:
            return False
        index, rest = divmod(offset, limits.LINK_STRIPE_BYTES)
        expected = min(limits.LINK_STRIPE_BYTES, self.total_bytes - offset)
        if number < self.number or rest or length != expected or index < self._first_missing or index in self._came:
            raise ProtocolError(
                f"a record of {length} bytes at offset {offset} of message {number} came, which is none of the stripes "
                f"that message {self.number} of {self.total_bytes} bytes still misses"
            )
        return offset < end

    def add(self, offset: int) -> None:
        """Note that the stripe at ``offset`` came, and verified."""
        self._came.add(offset // limits.LINK_STRIPE_BYTES)
        while self._first_missing in self._came:
            self._came.remove(self._first_missing)
            self._first_missing += 1


class Window:
    """The part of a payload that the receiver has brought buffers for.

    Parameters
    ----------
    start
        The offset of its first byte in the payload.
    nbytes
        Its length.
    views
        Where it goes; None if it is to be dropped.
    """

    __slots__ = ("_starts", "_views", "end", "missing_bytes", "start")

    def __init__(self, start: int, nbytes: int, views: list[memoryview] | None) -> None:
        self.start = start
        self.end = start + nbytes
        self.missing_bytes = nbytes
        self._views = views
        self._starts = list(accumulate(map(len, views), initial=start)) if views is not None else []

    def place(self, offset: int, length: int) -> memoryview | None:
        """Return where the ``length`` bytes at ``offset`` go, if that is one piece of memory."""
        if self._views is None:
            return None
        index = bisect_right(self._starts, offset) - 1
        at = offset - self._starts[index]
        view = self._views[index]
        return view[at : at + length] if at + length <= len(view) else None

    def put(self, offset: int, data: memoryview) -> memoryview:
        """Copy ``data``, which is at ``offset``, to where it goes; return what is beyond the window."""
        count = min(len(data), self.end - offset)
        if self._views is not None and count:
            index = bisect_right(self._starts, offset) - 1
            scatter(data[:count], self._views, index, offset - self._starts[index])
        self.missing_bytes -= count
        return data[count:]
