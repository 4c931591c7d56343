"""From seconds to what is printed: statistics, rows, sizes with units."""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Sequence
from typing import Any

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Return the bytes that ``text`` names: ``64MiB``, ``16KiB``, ``4096``; a positive multiple of 4."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 16KiB, 4MiB, 64MiB or a number of bytes")
    nbytes = int(float(match[1]) * unit)
    if nbytes <= 0 or nbytes % 4:
        raise argparse.ArgumentTypeError(f"{text!r} is {nbytes} bytes; float32 needs a positive multiple of 4")
    return nbytes


def format_size(nbytes: int) -> str:
    """Return ``nbytes`` for people: 67108864 is ``64 MiB``."""
    for unit, divisor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= divisor:
            return f"{nbytes / divisor:g} {unit}" if nbytes * 100 % divisor == 0 else f"{nbytes / divisor:.2f} {unit}"
    return f"{nbytes} B"


def format_seconds(seconds: float) -> str:
    """Return ``seconds`` for people, in milliseconds with three digits that count."""
    milliseconds = seconds * 1000
    digits = 0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2
    return f"{milliseconds:.{digits}f} ms"


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return minimum, 10th percentile, median, 90th percentile and maximum of ``samples``."""
    ordered = sorted(samples)

    def percentile(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return {
        "min": ordered[0],
        "p10": percentile(0.1),
        "median": statistics.median(ordered),
        "p90": percentile(0.9),
        "max": ordered[-1],
    }


def ratio_per_round(ours: Sequence[Sequence[float]], peers: Sequence[Sequence[float]]) -> list[float]:
    """Return, for every round, how many times faster ours was than the peer, by that round's medians."""
    pairs = zip(ours, peers, strict=True)
    return [statistics.median(peer) / statistics.median(own) for own, peer in pairs]


def cpu_seconds_per_gb(cpu_seconds: float, ranks: int, nbytes: int, iterations: int) -> float:
    """Return the CPU seconds that one rank spends to reduce 10^9 bytes of its array."""
    return cpu_seconds / (ranks * nbytes * iterations / 1e9)


def make_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return ``rows`` under ``header``, columns aligned to the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *rows)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def describe_row(row: dict[str, Any]) -> list[str]:
    """Return the cells that the table shows of one row."""
    ours, peer = row["ours_spread"], row["peer_spread"]
    return [
        str(row["ranks"]),
        format_size(row["bytes"]),
        row["link"],
        format_seconds(row["ours_s"]),
        f"{format_seconds(ours['p10'])} - {format_seconds(ours['p90'])}",
        row["peer"],
        format_seconds(row["peer_s"]),
        f"{format_seconds(peer['p10'])} - {format_seconds(peer['p90'])}",
        f"{row['ratio']:.2f}",
        f"{min(row['ratio_per_round']):.2f} - {max(row['ratio_per_round']):.2f}",
        f"{row['ours_cpu_s_per_gb']:.2f}",
        f"{row['peer_cpu_s_per_gb']:.2f}",
        f"{row['of_limit']:.0%}",
    ]


TABLE_HEADER = (
    "ranks",
    "size",
    "ours over",
    "ours",
    "p10 - p90",
    "peer",
    "median",
    "p10 - p90",
    "ratio",
    "by round",
    "CPU s/GB",
    "peer's",
    "of wire",
)
