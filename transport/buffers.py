"""Caller's buffers as flat views of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.errors import UsageError
from sparkle_mesh.transport.link import Buffer


def byte_views(buffers: Sequence[Buffer], *, writable: bool = False) -> tuple[list[memoryview], int]:
    """Return a byte view of every buffer that is not empty, and their bytes in total.

    Raises
    ------
    UsageError
        If a buffer is not C-contiguous, is read-only where ``writable`` is asked for, or is no buffer at all.
    """
    views = []
    total = 0
    for buffer in buffers:
        view = _byte_view(buffer)
        if writable and view.readonly:
            raise UsageError(f"cannot receive into a read-only buffer of {view.nbytes} bytes; give a writable one")
        if view.nbytes:
            views.append(view)
            total += view.nbytes
    return views, total


def _byte_view(buffer: Buffer) -> memoryview:
    if isinstance(buffer, np.ndarray):
        # Directly, for the dtypes that the buffer protocol has no word for: dates, bfloat16, foreign byte orders.
        if not buffer.flags.c_contiguous:
            raise UsageError(
                f"an array of shape {buffer.shape} and strides {buffer.strides} is not C-contiguous; copy it first"
            )
        return buffer.reshape(-1).view(np.uint8).data
    try:
        view = memoryview(buffer)
        if not view.nbytes:
            return memoryview(b"" if view.readonly else bytearray())
        return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else view.cast("B")
    except (TypeError, ValueError, BufferError) as error:
        raise UsageError(f"a {type(buffer).__name__} cannot be sent or received into: {error}") from error


def check_header(header: bytes) -> None:
    """Refuse a header that no message may have.

    Raises
    ------
    UsageError
    """
    if len(header) > limits.LINK_HEADER_MAX_BYTES:
        raise UsageError(
            f"header of {len(header)} bytes is over the limit of {limits.LINK_HEADER_MAX_BYTES}; "
            "put large data into the payload"
        )


def check_sizes(total: int, left: int) -> None:
    """Refuse to receive into buffers of ``total`` bytes when ``left`` bytes of payload are still to come.

    Raises
    ------
    UsageError
    """
    if total > left:
        raise UsageError(f"the buffers hold {total} bytes and only {left} bytes of the announced payload are left")


def payload_records(views: list[memoryview]) -> Iterator[memoryview | bytes]:
    """Cut the payload into the plaintexts of records: large buffers as they lie, small ones gathered."""
    small: list[memoryview] = []
    small_bytes = 0
    for view in views:
        if len(view) < limits.LINK_GATHER_MAX_BYTES and len(views) > 1:
            small.append(view)
            small_bytes += len(view)
            if small_bytes >= limits.LINK_GATHER_MAX_BYTES:
                yield b"".join(small)
                small, small_bytes = [], 0
            continue
        if small:
            yield b"".join(small)
            small, small_bytes = [], 0
        for start in range(0, len(view), limits.RECORD_MAX_BYTES):
            yield view[start : start + limits.RECORD_MAX_BYTES]
    if small:
        yield b"".join(small)


def scatter(data: memoryview, views: list[memoryview], index: int, offset: int) -> tuple[int, int]:
    """Copy ``data`` into ``views`` from ``offset`` of ``views[index]`` on; return where the next byte goes."""
    while data:
        view = views[index]
        count = min(len(data), len(view) - offset)
        view[offset : offset + count] = data[:count]
        data = data[count:]
        offset += count
        if offset == len(view):
            index, offset = index + 1, 0
    return index, offset


def grown(buffer: memoryview, nbytes: int, keep: int) -> memoryview:
    """Return a larger buffer that begins with the first ``keep`` bytes of ``buffer``."""
    grown = memoryview(bytearray(nbytes))
    grown[:keep] = buffer[:keep]
    return grown
