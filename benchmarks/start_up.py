"""Measure how long processes take from their start to the first result, beside a peer, in one run.

    python benchmarks/start_up.py --processes 10 --rounds 10 --against gloo --json start_up.json

Every round starts ten fresh processes at once, which meet, agree on who is there and all-reduce 4 KiB (verified). The
time runs from the first process's start to the last one's result, imports included. Ours find each other by the
mesh's name alone and make an encrypted link between every two; gloo's are told their ranks and a file to meet at.

ratio is the peer's median over ours: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _backends import BACKENDS
from _figures import make_table, spread
from _group import Group, GroupError

FIRST_RESULT_BYTES = 4096
DEADLINE_S = 60.0


def start_once(backend: str, processes: int) -> float:
    """Start a group, reduce once, end it; return the seconds to the last process's result."""
    started = time.perf_counter()
    with Group(backend, processes) as group:
        measurement = group.measure(FIRST_RESULT_BYTES, 1, 0, "auto", DEADLINE_S)
        seconds = time.perf_counter() - started
    if not measurement.verified:
        raise GroupError(f"{backend}: the first result is wrong")
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse ``arguments``, measure, print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=10, help="how many to start at once (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="how often (default %(default)s)")
    parser.add_argument("--against", choices=["gloo"], default="gloo", help="the peer (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    options = parser.parse_args(arguments)
    missing = BACKENDS[options.against].how_to_install()
    if missing is not None:
        print(f"start_up.py: {missing}", file=sys.stderr)
        return 2
    seconds: dict[str, list[float]] = {"sparkle": [], options.against: []}
    try:
        for number in range(options.rounds):
            for backend, taken in seconds.items():
                taken.append(start_once(backend, options.processes))
            latest = ", ".join(f"{backend} {taken[-1]:.2f} s" for backend, taken in seconds.items())
            print(f"round {number + 1} of {options.rounds}: {latest}", file=sys.stderr)
    except GroupError as error:
        print(f"start_up.py: {error}", file=sys.stderr)
        return 1
    ours, peers = seconds["sparkle"], seconds[options.against]
    row = {
        "what": "start to first result",
        "link": BACKENDS["sparkle"].link,
        "ranks": options.processes,
        "bytes": FIRST_RESULT_BYTES,
        "ours_s": statistics.median(ours),
        "ours_spread": spread(ours),
        "peer": options.against,
        "peer_s": statistics.median(peers),
        "peer_spread": spread(peers),
        "ratio": statistics.median(peers) / statistics.median(ours),
    }
    cells = [
        [name, *(f"{spread(taken)[key]:.2f} s" for key in ("min", "median", "max"))] for name, taken in seconds.items()
    ]
    print(make_table(("what", "min", "median", "max"), cells))
    print(f"ratio {row['ratio']:.2f}; {len(ours)} of {options.rounds} rounds right")
    if options.json is not None:
        options.json.write_text(json.dumps([row], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
