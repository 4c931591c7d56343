"""One process of a group under measurement: reads commands from stdin, writes one JSON reply a line to stdout.

Started by ``_group.py`` as ``_worker.py BACKEND NUMBER SIZE FOLDER``. First reply: ``{"rank": …}`` once the group has
met. A command is ``{"bytes", "iterations", "warmup", "algorithm", "compression", "in_flight"}``; its reply holds the
seconds of each iteration, CPU seconds of all of them, whether the sums were right, the largest error (of the largest
sum), and what is told of such a reduction. End of input ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from _backends import BACKENDS, Backend

PERIOD = 1021  # of the pattern; a prime, so that shifted or swapped shards are noticed
SAMPLES = 4096
COMPRESSED_ERROR_MAX = 0.25


def pattern(count: int) -> np.ndarray:
    """Return ``count`` float32 small whole numbers, whose sums over ranks are exact."""
    return np.resize(np.arange(PERIOD, dtype=np.float32), count)


def measure(backend: Backend, command: dict[str, Any]) -> dict[str, Any]:
    """Run the iterations that ``command`` asks for.

    Every iteration begins with fresh input and a barrier; neither is timed. The result of the first and the last one is
    verified in full, of the others in samples spread over the array.
    """
    base = pattern(command["bytes"] // 4)
    mine = base * np.float32(backend.rank + 1)
    expected = base * np.float32(backend.size * (backend.size + 1) // 2)
    stride = max(1, len(base) // SAMPLES)
    work = backend.allocate(len(base))
    compression = command.get("compression")
    in_flight = command.get("in_flight") or 1
    packing = {} if compression is None else {"compression": compression}
    seconds: list[float] = []
    cpu_seconds = error = 0.0
    verified = True
    total = command["warmup"] + command["iterations"]
    for iteration in range(total):
        work[:] = mine
        backend.barrier()
        cpu_before, started = time.process_time(), time.perf_counter()
        if in_flight > 1:
            backend.all_reduce_parts(np.array_split(work, in_flight))
        else:
            backend.all_reduce(work, command["algorithm"], **packing)
        ended, cpu_after = time.perf_counter(), time.process_time()
        if iteration >= command["warmup"]:
            seconds.append(ended - started)
            cpu_seconds += cpu_after - cpu_before
        if backend.reduces:
            every = 1 if iteration in (0, total - 1) else stride
            if compression is None:
                verified = verified and bool(np.array_equal(work[::every], expected[::every]))
            else:
                off = np.abs(work[::every] - expected[::every]).max(initial=0)
                error = max(error, float(off / expected.max(initial=1)))
                verified = verified and error <= COMPRESSED_ERROR_MAX
    told = backend.explain(command["bytes"])
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "verified": verified, "error": error, "told": told}


def main() -> None:
    """Meet the group, then measure until the input ends."""
    name, number, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    if BACKENDS[name].launcher(size) is not None:
        # The launcher has stdin and stdout for itself, and gives the ranks: pipes in the folder are named after them.
        backend = BACKENDS[name](number, size, folder)
        commands: TextIO = (folder / f"commands-{backend.rank}").open()
        replies: TextIO = (folder / f"replies-{backend.rank}").open("w")
    else:
        # Replies go to the real stdout; what a library prints goes to the log, where it cannot be taken for one.
        commands, replies = sys.stdin, os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        backend = BACKENDS[name](number, size, folder)

    def reply(**fields: Any) -> None:
        print(json.dumps(fields), file=replies, flush=True)

    reply(rank=backend.rank)
    for line in iter(commands.readline, ""):
        if not line.strip():
            break
        reply(**measure(backend, json.loads(line)))
    backend.barrier()  # nobody leaves while another is still in its last reduction
    backend.close()


if __name__ == "__main__":
    main()
