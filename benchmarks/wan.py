"""Measure ``all_reduce`` over emulated networks, beside a peer on the same network, in one run.

    python benchmarks/wan.py --scenario lan wan --mtu 1500 --against gloo --json wan.json

Every rank runs on an emulated host of its own (see wan_emulator.py): a TCP stack of its own, and links with a rate, a
delay, a queue and losses. All groups live on one network and take turns, as in all_reduce.py; of every iteration the
slowest rank counts, and results are verified.

Scenarios:
  lan     4 hosts at 1 Gbit/s, 0.2 ms round trip, 64 MiB
  wan     4 hosts at 100 Mbit/s, 50 ms round trip, 16 MiB
  lossy   as wan, and 0.1% of the segments are lost
  uneven  3 hosts at 1 Gbit/s and one at 100 Mbit/s, 0.2 ms round trip, 16 MiB

The wire is the time in which the slowest link carries what a ring sends, in full segments, headers included, and one
round trip; of wire is that over the median. raw moves the bytes of a ring over one plain TCP stream per neighbour and
reduces nothing: what a program without streams in parallel can reach, and whether the emulator is what it says.
raw (bbr) is the same with another congestion control. ratio is a peer's median over Sparkle's.

Needs Linux and root.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _backends import ALGORITHMS, BACKENDS, COMPRESSIONS
from _figures import format_seconds, format_size, make_table, parse_size, ratio_per_round, spread
from _group import Group, GroupError, Measurement
from _wan_scenarios import SCENARIOS, Scenario
from all_reduce import WrongResultError, describe_machine, measure_rounds, show_progress
from wan_emulator import (
    Emulator,
    EmulatorError,
    describe_effort,
    parse_delay,
    parse_list,
    parse_loss,
    parse_rate,
    per_host,
)

OURS = "sparkle"
RAW = "wire"
RAW_BBR = "wire-bbr"
NAMES = {RAW: "raw", RAW_BBR: "raw (bbr)"}
TABLE_HEADER = ("scenario", "MTU", "size", "what", "median", "p10 - p90", "of wire", "goal", "ratio", "by round")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, nargs="+", default=list(SCENARIOS), help="default: all")
    parser.add_argument("--mtu", type=int, nargs="+", default=[9000, 1500], help="default: 9000 1500")
    parser.add_argument("--against", choices=("gloo",), nargs="*", default=["gloo"], help="peers (default: gloo)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each takes (default: %(default)s)")
    parser.add_argument("--iterations", type=int, help="reductions per turn (default: by scenario)")
    parser.add_argument("--warmup", type=int, default=1, help="reductions before each turn (default: %(default)s)")
    parser.add_argument("--algorithm", default="auto", choices=ALGORITHMS, help="ours (default: auto)")
    parser.add_argument("--compression", choices=COMPRESSIONS, help="ours (default: none); its error is printed")
    parser.add_argument(
        "--in-flight", type=int, default=1, metavar="N", help="reduce N parts of the array at the same time"
    )
    changes = parser.add_argument_group("instead of the scenario's")
    changes.add_argument("--hosts", "--ranks", type=int, help="how many, one rank on each")
    changes.add_argument("--bytes", type=parse_size, nargs="+", help="of every rank's array: 16MiB …")
    changes.add_argument("--rate", type=parse_list(parse_rate), help="100mbit; one for all, or 1gbit,100mbit,…")
    changes.add_argument("--delay", type=parse_delay, help="half a round trip: 25ms")
    changes.add_argument("--loss", type=parse_loss, help="of segments: 0.1%%")
    changes.add_argument("--queue", type=int, metavar="BYTES", help="of each link")
    changes.add_argument("--uplink", choices=("router", "card"), help="see wan_emulator.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the machine, for programs")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.warmup < 0 or (options.iterations is not None and options.iterations < 1):
        parser.error("--rounds and --iterations must be at least 1, --warmup at least 0")
    return options


def change(scenario: Scenario, options: argparse.Namespace) -> Scenario:
    """Return ``scenario`` with what the command line says instead."""
    hosts = options.hosts or (len(options.rate) if options.rate and len(options.rate) > 1 else scenario.hosts)
    rates = options.rate or [scenario.rates[number % scenario.hosts] for number in range(hosts)]
    changes: dict[str, Any] = {"rates": tuple(per_host("--rate", rates, hosts))}
    for name, value in (("delay_s", options.delay), ("loss", options.loss), ("queue_bytes", options.queue)):
        if value is not None:
            changes[name] = value
    if options.uplink is not None:
        changes["card"] = options.uplink == "card"
    if changes.keys() - {"queue_bytes", "card"} != {"rates"} or changes["rates"] != scenario.rates:
        changes["goal"] = None  # it was for a network of that speed
    return dataclasses.replace(scenario, **changes)


def make_rows(
    scenario: Scenario, mtu: int, nbytes: int, results: dict[str, list[Measurement]], effort: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return one row per peer, and one for ours if there are none."""
    wire_s = scenario.wire_seconds(nbytes, mtu)

    def samples(name: str) -> list[float]:
        return list(itertools.chain.from_iterable(measured.seconds for measured in results[name]))

    ours = spread(samples(OURS))
    rows = []
    for peer in results.keys() - {OURS}:
        peers = spread(samples(peer))
        by_round = ratio_per_round([one.seconds for one in results[OURS]], [one.seconds for one in results[peer]])
        rows.append(
            {
                "what": "all_reduce",
                "link": f"{scenario.name}: {scenario.describe()}, MTU {mtu}",
                "ranks": scenario.hosts,
                "bytes": nbytes,
                "ours_s": ours["median"],
                "peer": NAMES.get(peer, peer),
                "peer_s": peers["median"],
                "ratio": peers["median"] / ours["median"],
                "scenario": scenario.name,
                "mtu": mtu,
                "wire_s": wire_s,
                "of_wire": wire_s / ours["median"],
                "peer_of_wire": wire_s / peers["median"],
                "goal": scenario.goal,
                "iterations": len(samples(OURS)),
                "ours_spread": ours,
                "peer_spread": peers,
                "ratio_per_round": by_round,
                "emulator": effort,
                "error": max(one.error for one in results[OURS]),
            }
        )
    order = list(results)
    return sorted(
        rows, key=lambda row: order.index(next(name for name in order if NAMES.get(name, name) == row["peer"]))
    )


def describe(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the lines of the table for the rows of one measurement: ours, then each peer's."""
    first = rows[0]
    where = [first["scenario"], str(first["mtu"]), format_size(first["bytes"])]
    goal = "-" if first["goal"] is None else f"{first['goal']:.0%} "
    if first["goal"] is not None:
        goal += "reached" if first["of_wire"] >= first["goal"] else "missed"

    def line(what: str, figures: dict[str, float], of_wire: float, *rest: str) -> list[str]:
        low_high = f"{format_seconds(figures['p10'])} - {format_seconds(figures['p90'])}"
        return [*where, what, format_seconds(figures["median"]), low_high, f"{of_wire:.1%}", *rest]

    lines = [line(OURS, first["ours_spread"], first["of_wire"], goal, "", "")]
    for row in rows:
        by_round = f"{min(row['ratio_per_round']):.2f} - {max(row['ratio_per_round']):.2f}"
        lines.append(line(row["peer"], row["peer_spread"], row["peer_of_wire"], "", f"{row['ratio']:.2f}", by_round))
    return lines


def measure(scenario: Scenario, mtu: int, options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Measure on one network; return the rows of each size."""
    names = [OURS, *options.against, RAW, *([RAW_BBR] if scenario.loss else [])]
    measured = []
    with contextlib.ExitStack() as stack:
        show_progress(f"{scenario.name}, MTU {mtu}: starting")
        wan = stack.enter_context(Emulator(scenario.settings(), mtu=mtu))
        groups = {name: stack.enter_context(Group(name, scenario.hosts, wan.start)) for name in names}
        turns = argparse.Namespace(**vars(options))
        turns.iterations = options.iterations or scenario.iterations
        for nbytes in options.bytes or [scenario.nbytes]:
            wan.reset_stats()
            results = measure_rounds(groups, nbytes, turns, show_progress)
            stats = wan.stats()
            measured.append(make_rows(scenario, mtu, nbytes, results, stats["router"]))
            if options.compression:
                error = max(one.error for one in results[OURS])
                print(f"  {options.compression}: largest error {error:.2%} of the largest sum")
            drops = {key: sum(host[key] for host in stats["hosts"]) for key in ("queue_drops", "lost")}
            show_progress("")
            print(make_table(TABLE_HEADER, describe(measured[-1])))
            print(f"{scenario.name}, MTU {mtu}, {format_size(nbytes)}: {describe_effort(stats['router'])}")
            print(
                f"  segments dropped from full queues: {drops['queue_drops']}, lost on the way: {drops['lost']}\n",
                flush=True,
            )
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code: 1 if a group fails or is wrong, 2 if it cannot be measured here."""
    options = parse_options(arguments)
    for name in options.against:
        if missing := BACKENDS[name].how_to_install():
            print(f"wan.py: {name} cannot be measured: {missing}", file=sys.stderr)
            return 2
    measured: list[list[dict[str, Any]]] = []
    try:
        for name, mtu in itertools.product(options.scenario, options.mtu):
            measured += measure(change(SCENARIOS[name], options), mtu, options)
            if options.json:  # each time: a run may be stopped when enough is known
                rows = list(itertools.chain.from_iterable(measured))
                options.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2) + "\n")
    except EmulatorError as error:
        show_progress("")
        print(f"wan.py: {error}", file=sys.stderr)
        return 2
    except (GroupError, WrongResultError) as error:
        show_progress("")
        print(f"wan.py: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
