"""Measure what a call costs beside its bytes: many small arrays, operations in flight, and memory.

    python benchmarks/calls.py --ranks 2 4 --json calls.json

  arrays    a thousand arrays of 1 KiB in one call, beside one array of as many bytes
  flight    eight reductions in flight, beside one of as many bytes
  memory    what one reduction allocates at most, beside the bytes of its array, by algorithm

Each side is this project; a ratio above 1 means that the first is ahead. All ranks run on this machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import secrets
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _figures import format_seconds, format_size, make_table

ARRAYS, ARRAY_ELEMENTS = 1000, 256
IN_FLIGHT, FLIGHT_BYTES = 8, 4 << 20
MEMORY_BYTES = 64 << 20
ALGORITHMS = ("ring", "tree", "halving_doubling", "butterfly")
TIMEOUT_S = 120.0


def measure(folder: str, ranks: int, links: list[str], iterations: int, results: Any) -> None:
    """One rank: run everything; rank 0 hands on its figures."""
    import sparkle_mesh as sparkle

    name = f"calls-{Path(folder).name}"
    with sparkle.join(name, min_peers=ranks, timeout_s=TIMEOUT_S, data_dir=folder, lan=False, links=links) as mesh:

        def timed(call: Callable[[], object]) -> float:
            mesh.barrier()
            started = time.perf_counter()
            call()
            return time.perf_counter() - started

        many = [np.ones(ARRAY_ELEMENTS, np.float32) for _ in range(ARRAYS)]
        one = np.ones(ARRAYS * ARRAY_ELEMENTS, np.float32)
        parts = [np.ones(FLIGHT_BYTES // 4, np.float32) for _ in range(IN_FLIGHT)]
        whole = np.ones(IN_FLIGHT * FLIGHT_BYTES // 4, np.float32)

        def in_flight() -> None:
            for pending in [mesh.all_reduce_async(part) for part in parts]:
                pending.wait()

        figures: dict[str, list[float]] = {"many": [], "one": [], "flight": [], "whole": []}
        for turn in range(iterations + 2):
            for key, call in (
                ("many", lambda: mesh.all_reduce(many)),
                ("one", lambda: mesh.all_reduce(one)),
                ("flight", in_flight),
                ("whole", lambda: mesh.all_reduce(whole)),
            ):
                seconds = timed(call)
                if turn >= 2:
                    figures[key].append(seconds)
            for array in (*many, one, *parts, whole):
                array[:] = 1
        memory = {}
        for algorithm in ALGORITHMS if "shared_memory" not in links else ("shared",):
            array = np.ones(MEMORY_BYTES // 4, np.float32)
            tracemalloc.start()
            mesh.all_reduce(array, algorithm=algorithm)
            first = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            mesh.all_reduce(array, algorithm=algorithm)
            again = tracemalloc.get_traced_memory()[1] - before
            tracemalloc.stop()
            memory[algorithm] = (first, again)
        if mesh.rank == 0:
            results.put({"figures": figures, "memory": memory})
        mesh.barrier()


def run(ranks: int, links: list[str], iterations: int) -> dict[str, Any]:
    """Return the figures of a group of ``ranks``. Raises RuntimeError if a rank fails."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix=f"sparkle-calls-{secrets.token_hex(3)}-", ignore_cleanup_errors=True) as at:
        processes = [
            context.Process(target=measure, args=(at, ranks, links, iterations, results)) for _ in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            figures: dict[str, Any] = results.get(timeout=TIMEOUT_S * 2)
        finally:
            for process in processes:
                process.join(30)
                if process.is_alive():
                    process.kill()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a rank ended with {[process.exitcode for process in processes]}")
    return figures


def make_rows(ranks: int, link: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of one group."""
    medians = {key: statistics.median(values) for key, values in found["figures"].items()}
    nbytes = ARRAYS * ARRAY_ELEMENTS * 4
    common = {"link": link, "ranks": ranks}
    rows = [
        common
        | {"what": what, "bytes": size, "ours_s": medians[ours], "peer": peer, "peer_s": medians[other]}
        | {"ratio": medians[other] / medians[ours], "samples": found["figures"][ours]}
        for what, ours, peer, other, size in (
            (f"{ARRAYS} arrays of 1 KiB", "many", "one array", "one", nbytes),
            (f"{IN_FLIGHT} in flight", "flight", "one of their sum", "whole", IN_FLIGHT * FLIGHT_BYTES),
        )
    ]
    for algorithm, (first, again) in found["memory"].items():
        rows.append(
            common
            | {"what": f"memory, {algorithm}", "bytes": MEMORY_BYTES, "allocated_bytes": first}
            | {"allocated_again_bytes": again, "of_bytes": first / MEMORY_BYTES}
        )
    return rows


def describe(row: dict[str, Any]) -> list[str]:
    """Return a line of the table."""
    where = [str(row["ranks"]), row["link"], row["what"], format_size(row["bytes"])]
    if "allocated_bytes" in row:
        first, again = row["allocated_bytes"], row["allocated_again_bytes"]
        return [*where, f"{first / MEMORY_BYTES:.2f} x its bytes", f"again {again / 2**20:.1f} MiB", ""]
    return [
        *where,
        format_seconds(row["ours_s"]),
        f"{row['peer']} {format_seconds(row['peer_s'])}",
        f"{row['ratio']:.2f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="group sizes (default: 2 4)")
    parser.add_argument(
        "--links", choices=("tcp", "shared"), nargs="+", default=["tcp", "shared"], help="default: both"
    )
    parser.add_argument("--iterations", type=int, default=20, help="of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, for programs")
    options = parser.parse_args(arguments)
    if min(options.ranks) < 2 or options.iterations < 1:
        parser.error("--ranks must be at least 2, --iterations at least 1")
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        for link in options.links:
            kinds = ["tcp"] if link == "tcp" else ["shared_memory", "tcp"]
            rows += make_rows(ranks, link, run(ranks, kinds, options.iterations))
    print(make_table(("ranks", "link", "what", "size", "ours", "beside", "ratio"), [describe(row) for row in rows]))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
