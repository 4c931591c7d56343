"""Measure ``all_reduce`` beside a peer, in one run, on this machine.

    python benchmarks/all_reduce.py --ranks 2 4 8 --sizes 16KiB 4MiB 64MiB --against gloo openmpi --json all_reduce.json

Ours is what a user gets: real processes that find each other by name. They reduce over encrypted TCP (as between
hosts; told to), over shared memory (as within a host), and over shared memory arrays of mesh.allocate. Peers: gloo over
TCP on the loopback interface, not encrypted; OpenMPI over shared memory. Wire moves the bytes of a ring over plain TCP
and computes nothing: the limit under which any ring over TCP stays on this machine.

All groups live through the whole run and take turns, round after round, in an order that rotates, so that a machine
that drifts (temperature, other load) drifts for all. Of every iteration the slowest rank counts; medians are over all
iterations of all rounds. Every iteration starts with fresh input and a barrier, and its result is verified.

ratio is the peer's median over ours: above 1, ours is faster. CPU s/GB is what one rank spends, in all its threads,
to reduce 10^9 bytes of its array. Of wire is the limit's median over ours.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _algorithms import compare, describe
from _backends import ALGORITHMS, BACKENDS, COMPRESSIONS, OURS, PEERS
from _figures import (
    TABLE_HEADER,
    cpu_seconds_per_gb,
    describe_row,
    format_seconds,
    format_size,
    make_table,
    parse_size,
    ratio_per_round,
    spread,
)
from _group import Group, GroupError, Measurement

ITERATION_TIMEOUT_S = 30.0
LIMIT = "wire"


class WrongResultError(Exception):
    """A group's sums were not what they should be."""


def default_iterations(nbytes: int) -> int:
    """Return how often to reduce ``nbytes`` in one round: large arrays seldom, small ones often."""
    return 8 if nbytes >= 16 << 20 else 25 if nbytes >= 1 << 20 else 200


def measure_rounds(
    groups: dict[str, Group], nbytes: int, options: argparse.Namespace, progress: Any
) -> dict[str, list[Measurement]]:
    """Let every group reduce ``nbytes`` in turns, ``options.rounds`` times; return each one's rounds."""
    iterations = options.iterations or default_iterations(nbytes)
    results: dict[str, list[Measurement]] = {name: [] for name in groups}
    names = list(groups)
    for number in range(options.rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order:
            timeout_s = ITERATION_TIMEOUT_S * (options.warmup + iterations)
            packing: dict[str, Any] = {}
            if name in OURS.values() and options.compression:
                packing["compression"] = options.compression
            if getattr(options, "in_flight", 1) > 1:
                packing["in_flight"] = options.in_flight
            measured = groups[name].measure(nbytes, iterations, options.warmup, options.algorithm, timeout_s, **packing)
            if not measured.verified:
                raise WrongResultError(f"{name}: wrong sums over {groups[name].size} ranks of {format_size(nbytes)}")
            results[name].append(measured)
            ranks = groups[name].size
            median = format_seconds(spread(measured.seconds)["median"])
            progress(f"{ranks} ranks, {format_size(nbytes)}, round {number + 1}/{options.rounds}: {name} {median}")
    return results


def make_row(results: dict[str, list[Measurement]], mine: str, peer: str, ranks: int, nbytes: int) -> dict[str, Any]:
    """Return the row that compares ours, ``mine``, with ``peer``."""

    def samples(name: str) -> list[float]:
        return list(itertools.chain.from_iterable(measured.seconds for measured in results[name]))

    def cpu(name: str) -> float:
        cpu_seconds = sum(measured.cpu_seconds for measured in results[name])
        return cpu_seconds_per_gb(cpu_seconds, ranks, nbytes, len(samples(name)))

    ours, peers, limit = spread(samples(mine)), spread(samples(peer)), spread(samples(LIMIT))
    moved = 2 * (ranks - 1) * nbytes
    return {
        "what": "all_reduce",
        "link": BACKENDS[mine].link,
        "ranks": ranks,
        "bytes": nbytes,
        "ours_s": ours["median"],
        "peer": peer,
        "peer_s": peers["median"],
        "ratio": peers["median"] / ours["median"],
        "dtype": "float32",
        "op": "sum",
        "peer_link": BACKENDS[peer].link,
        "iterations": len(samples(mine)),
        "ours_spread": ours,
        "peer_spread": peers,
        "ratio_per_round": ratio_per_round(
            [measured.seconds for measured in results[mine]], [measured.seconds for measured in results[peer]]
        ),
        "ours_cpu_s_per_gb": cpu(mine),
        "peer_cpu_s_per_gb": cpu(peer),
        "limit_s": limit["median"],
        "limit_spread": limit,
        "limit_bytes_per_s": moved / limit["median"] if limit["median"] else 0.0,
        "of_limit": limit["median"] / ours["median"],
        "peer_of_limit": limit["median"] / peers["median"],
    }


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="group sizes (default: 2 4)")
    parser.add_argument(
        "--sizes", type=parse_size, nargs="+", default=[64 << 20], help="bytes per rank: 16KiB 4MiB … (default: 64MiB)"
    )
    parser.add_argument("--against", choices=PEERS, nargs="+", default=["gloo"], help="peers (default: gloo)")
    parser.add_argument(
        "--links", choices=tuple(OURS), nargs="+", default=list(OURS), help="of ours (default: all that there are)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that each group takes (default: %(default)s)")
    parser.add_argument("--iterations", type=int, help="reductions per turn (default: by size, 8 to 200)")
    parser.add_argument("--warmup", type=int, default=2, help="reductions before each turn (default: %(default)s)")
    parser.add_argument("--algorithm", default="auto", choices=ALGORITHMS, help="ours (default: auto)")
    parser.add_argument("--compression", choices=COMPRESSIONS, help="ours (default: none); its error is printed")
    parser.add_argument(
        "--algorithms",
        choices=("all", *ALGORITHMS[1:]),
        nargs="+",
        help="instead: compare ours with each other over tcp, beside what is predicted and what auto picks",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the machine, for programs")
    options = parser.parse_args(arguments)
    if min(options.ranks) < 2:
        parser.error(f"--ranks {min(options.ranks)}: at least 2 ranks are needed to reduce anything")
    if options.rounds < 1 or options.warmup < 0 or (options.iterations is not None and options.iterations < 1):
        parser.error("--rounds and --iterations must be at least 1, --warmup at least 0")
    return options


def describe_machine() -> dict[str, Any]:
    """Return what figures from this machine should be read with."""
    return {"cores": os.cpu_count(), "machine": platform.machine(), "system": platform.platform(terse=True)}


def show_progress(text: str) -> None:
    """Show ``text`` on a terminal, in place of the last."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure everything asked for; return the rows."""
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        with contextlib.ExitStack() as stack:
            show_progress(f"{ranks} ranks: starting")
            ours = [OURS[links] for links in options.links]
            names = dict.fromkeys((*ours, *options.against, LIMIT))
            groups = {name: stack.enter_context(Group(name, ranks)) for name in names}
            for nbytes in options.sizes:
                results = measure_rounds(groups, nbytes, options, show_progress)
                rows.extend(make_row(results, mine, peer, ranks, nbytes) for mine in ours for peer in options.against)
    show_progress("")
    return rows


def write_json(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write ``rows`` for programs, if that was asked for."""
    if path:
        path.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2) + "\n")
        print(f"wrote {path}")


def compare_algorithms(options: argparse.Namespace) -> int:
    """Compare our algorithms with each other; return the exit code."""
    try:
        rows = compare(options, default_iterations, ITERATION_TIMEOUT_S, show_progress)
    except GroupError as error:
        show_progress("")
        print(f"all_reduce.py: {error}", file=sys.stderr)
        return 1
    print(describe(rows))
    write_json(options.json, rows)
    return 0 if all(row["verified"] for row in rows) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code: 1 if a group fails or is wrong, 2 if a peer is not installed."""
    options = parse_options(arguments)
    if options.algorithms:
        return compare_algorithms(options)
    for name in options.against:
        if missing := BACKENDS[name].how_to_install():
            print(f"all_reduce.py: {name} cannot be measured: {missing}", file=sys.stderr)
            return 2
    try:
        rows = run(options)
    except (GroupError, WrongResultError) as error:
        show_progress("")
        print(f"all_reduce.py: {error}", file=sys.stderr)
        return 1
    print(make_table(TABLE_HEADER, [describe_row(row) for row in rows]))
    for row in {(row["ranks"], row["bytes"]): row for row in rows}.values():
        limit = f"{format_seconds(row['limit_s'])}, {row['limit_bytes_per_s'] / 1e9:.2f} GB/s"
        print(f"wire limit, {row['ranks']} ranks, {format_size(row['bytes'])}: {limit}")
    write_json(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
