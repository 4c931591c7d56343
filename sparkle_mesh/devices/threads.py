"""Work that NumPy does without the interpreter's lock, shared among threads that live as long as the call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sparkle_mesh import limits
from sparkle_mesh.devices.detect import usable_logical_cores


def in_threads(count: int, work: Callable[[range], object], *, workers: int | None = None) -> None:
    """Call ``work`` with parts of ``range(count)`` that make up the whole, in threads, and wait.

    Parameters
    ----------
    workers
        How many threads at most; by default one for each core. With one, or one item, the caller does it itself.

    Raises
    ------
    BaseException
        What ``work`` raised first, when all have ended.
    """
    most = min(usable_logical_cores(), limits.DEVICE_THREADS_MAX_COUNT) if workers is None else workers
    used = min(most, count)
    if used <= 1:
        work(range(count))
        return
    with ThreadPoolExecutor(used, thread_name_prefix="sparkle device") as pool:
        parts = [pool.submit(work, range(start, count, used)) for start in range(used)]
    for part in parts:
        part.result()
