"""Copies between blocks of any two devices, by the shortest way there is."""

from __future__ import annotations

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.devices.device import Memory


def copy(source: Memory, target: Memory, nbytes: int | None = None) -> None:
    """Copy the first ``nbytes`` (by default, all of ``source``) to ``target``.

    Directly where the hardware can (on one device, or from GPU to GPU), in one step where one of them is the host's
    memory, and else through the host's memory in pieces.

    Raises
    ------
    UsageError
        If they do not hold ``nbytes``.
    """
    count = source.nbytes if nbytes is None else nbytes
    if target.device.copy_between(source, target, count) or count == 0:
        return
    if source.device.capabilities.memory_is_host:
        target.device.copy_from_host(target, source.native[:count])
    elif target.device.capabilities.memory_is_host:
        source.device.copy_to_host(source, target.native[:count])
    else:
        piece = np.empty(min(count, limits.HOST_STEP_BYTES), dtype=np.uint8)
        for start in range(0, count, piece.size):
            part = piece[: count - start]
            source.device.copy_to_host(source, part, start)
            target.device.copy_from_host(target, part, start)
