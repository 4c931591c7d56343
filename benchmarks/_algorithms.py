"""Compares the algorithms of Sparkle's all_reduce with each other, with what was predicted, and with what auto does."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any

from _backends import ALGORITHMS
from _figures import format_seconds, format_size, make_table, spread
from _group import Group, Measurement

HEADER = ("ranks", "size", "algorithm", "median", "p10 - p90", "predicted", "measured / predicted", "", "of best")
# Everything to everybody is for little, or for two: what one rank sends in all.
DIRECT_MAX_BYTES = 64 << 20
SHORT_MAX_BYTES, SHORT_ROUNDS_RATIO = 1 << 20, 4


def compare(
    options: argparse.Namespace,
    iterations_for: Callable[[int], int],
    iteration_timeout_s: float,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure every algorithm asked for on groups over encrypted TCP, in turns; return a row for each."""
    asked = ALGORITHMS if "all" in options.algorithms else ("auto", *options.algorithms)
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        progress(f"{ranks} ranks: starting")
        with Group("sparkle", ranks) as group:
            for nbytes in options.sizes:
                names = [name for name in asked if name != "direct" or (ranks - 1) * nbytes <= DIRECT_MAX_BYTES]
                iterations = options.iterations or iterations_for(nbytes)
                timeout_s = iteration_timeout_s * (options.warmup + iterations)
                results: dict[str, list[Measurement]] = {name: [] for name in names}
                rounds = options.rounds
                if nbytes <= SHORT_MAX_BYTES:
                    # A disturbance takes up more of a short turn: more turns, of fewer reductions each.
                    rounds, iterations = rounds * SHORT_ROUNDS_RATIO, max(iterations // SHORT_ROUNDS_RATIO, 1)
                for number in range(rounds):
                    for name in names[number % len(names) :] + names[: number % len(names)]:
                        progress(f"{ranks} ranks, {format_size(nbytes)}, round {number + 1}/{rounds}: {name}")
                        results[name].append(group.measure(nbytes, iterations, options.warmup, name, timeout_s))
                rows += make_rows(ranks, nbytes, results)
    progress("")
    return rows


def make_rows(ranks: int, nbytes: int, results: dict[str, list[Measurement]]) -> list[dict[str, Any]]:
    """Return a row per algorithm."""
    figures = {
        name: spread(list(itertools.chain.from_iterable(one.seconds for one in measured)))
        for name, measured in results.items()
    }
    best = min(figure["median"] for name, figure in figures.items() if name != "auto")
    told = results["auto"][0].told
    return [
        {
            "what": "all_reduce",
            "link": "tcp, encrypted",
            "ranks": ranks,
            "bytes": nbytes,
            "algorithm": name,
            "ours_s": figure["median"],
            "ours_spread": figure,
            "peer": "best of ours",
            "peer_s": best,
            "ratio": best / figure["median"],
            "chosen": told["chosen"],
            "predicted_s": told["predicted_s"].get(told["chosen"] if name == "auto" else name),
            "verified": all(one.verified for one in results[name]),
        }
        for name, figure in figures.items()
    ]


def describe(rows: list[dict[str, Any]]) -> str:
    """Return the table, and how near to the best auto came."""
    lines = []
    for row in rows:
        figure, predicted = row["ours_spread"], row["predicted_s"]
        picked = f"picked {row['chosen']}" if row["algorithm"] == "auto" else ""
        lines.append(
            [
                str(row["ranks"]),
                format_size(row["bytes"]),
                row["algorithm"],
                format_seconds(figure["median"]),
                f"{format_seconds(figure['p10'])} - {format_seconds(figure['p90'])}",
                "-" if predicted is None else format_seconds(predicted),
                "-" if predicted is None else f"{figure['median'] / predicted:.2f}",
                picked,
                f"{row['ours_s'] / row['peer_s']:.2f}",
            ]
        )
    auto = [row["ours_s"] / row["peer_s"] for row in rows if row["algorithm"] == "auto"]
    off = [
        max(row["ours_s"] / row["predicted_s"], row["predicted_s"] / row["ours_s"])
        for row in rows
        if row["predicted_s"] and row["algorithm"] != "auto"
    ]
    summary = f"auto over the best of them: median {statistics.median(auto):.2f}, worst {max(auto):.2f}"
    summary += f"; predictions are off by a factor of {statistics.median(off):.2f} (median), {max(off):.2f} (worst)"
    return f"{make_table(HEADER, lines)}\n{summary}"
