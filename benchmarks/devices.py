"""Measure kernels on this machine's devices: beside what a user would write, and beside what the device allows.

    python benchmarks/devices.py --json devices.json
    python benchmarks/devices.py --quick

All contenders of one computation take turns in rounds, in one process. A ratio above 1 means that Sparkle is ahead.
"of limit" is the share of the device's own speed that is reached: of copying as many bytes, or of the operations alone
on data in its cache, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _cpu_kernels import cpu_rows
from _figures import format_seconds, format_size, make_table
from _gpu_kernels import gpu_rows, has_gpu

ELEMENTS, QUICK_ELEMENTS = 1 << 24, 1 << 20
ROUNDS, QUICK_ROUNDS = 15, 3
HEADER = (
    "device",
    "what",
    "size",
    "into",
    "ours",
    "p10 - p90",
    "peer",
    "median",
    "ratio",
    "by round",
    "limit",
    "of limit",
)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of all devices that were asked for."""
    elements = options.elements or (QUICK_ELEMENTS if options.quick else ELEMENTS)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "cuda": lambda: gpu_rows(rounds=rounds, quick=options.quick),
        "cpu": lambda: cpu_rows(elements=elements, rounds=rounds, threads=options.threads, quick=options.quick),
    }
    return [row for device in options.devices for row in parts[device]()]


def describe(row: dict[str, Any]) -> list[str]:
    """Return a line of the table."""
    ours = row["ours_spread"]
    return [
        row["device"],
        row["what"],
        format_size(row["bytes"]),
        row["into"],
        format_seconds(row["ours_s"]),
        f"{format_seconds(ours['p10'])} - {format_seconds(ours['p90'])}",
        row["peer"],
        format_seconds(row["peer_s"]),
        f"{row['ratio']:.2f}",
        f"{min(row['ratio_per_round']):.2f} - {max(row['ratio_per_round']):.2f}",
        row["limit"],
        f"{row['of_limit']:.0%}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["cpu", "cuda"] if has_gpu() else ["cpu"]
    parser.add_argument("--devices", choices=("cpu", "cuda"), nargs="+", default=every, help="default: all")
    parser.add_argument("--elements", type=int, help=f"float32 numbers of each array (default: {ELEMENTS})")
    parser.add_argument("--rounds", type=int, help=f"in which all contenders take turns (default: {ROUNDS})")
    parser.add_argument("--threads", type=int, help="ours on processors (default: one for each core)")
    parser.add_argument("--quick", action="store_true", help="small arrays and few rounds: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, for programs")
    options = parser.parse_args(arguments)
    if min(options.elements or 1 << 16, 1 << 16) < 1 << 16 or (options.rounds or 1) < 1:
        parser.error("--elements must be at least 65536, --rounds at least 1")
    rows = measure(options)
    print(make_table(HEADER, [describe(row) for row in rows]))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
