"""Measure many ``sparkle-node`` processes on one machine: how soon they are one mesh, and what they cost when idle.

    sudo python benchmarks/nodes.py --nodes 30 --kill 10 --json nodes.json

The nodes are started one after the other, each with the address of one random other. Then it is measured

- how long after the last one said that it listens all are one mesh (from each a way leads to each other one, over
  however many others), and every one finds every other's devices;
- what each costs when nothing happens: CPU time, memory, and bytes sent a minute (what passes over the loopback
  interface, headers included; told only with root, in a network namespace of its own);
- after some are killed, how long a search for devices takes, and when the killed are gone from its answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

#: What is aimed at, for each node.
GOALS = {
    "one_mesh_s": 20.0,
    "cpu_s_per_min": 0.5,
    "kb_per_min": 50.0,
    "memory_mb": 120.0,
    "search_s": 1.0,
    "gone_s": 60,
}
START_TIMEOUT_S = 60.0
POLL_S = 0.05


class NodesError(Exception):
    """The nodes did not do what is to be measured."""


class Nodes:
    """Running nodes, each with a data folder of its own."""

    def __init__(self, folder: Path, program: str, seed: int) -> None:
        self.folder, self._program = folder, program
        self._random = random.Random(seed)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.peer_ids: list[str] = []
        self._addresses: list[str] = []

    def start(self) -> None:
        """Start one more, and wait until it says that it listens."""
        directory = self.folder / str(len(self.processes))
        directory.mkdir()
        log = directory / "log"
        join = ["--join", self._random.choice(self._addresses)] if self._addresses else []
        command = [self._program, "--mesh", "nodes", "--data-dir", str(directory), "--no-lan", "--log-format", "json"]
        with log.open("wb") as output:
            self.processes.append(
                subprocess.Popen(
                    [*command, "--listen", "/ip4/127.0.0.1/tcp/0", *join],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while (started := _event(log, "started")) is None:
            if self.processes[-1].poll() is not None or time.monotonic() > deadline:
                raise NodesError(f"a node did not start; it said:\n{log.read_text()}")
            time.sleep(POLL_S)
        self.peer_ids.append(started["peer_id"])
        self._addresses.append(f"{started['addresses'][0]}/p2p/{started['peer_id']}")

    def ask(self, number: int, *command: str) -> Any:
        """Return what a command of the node's owner prints, as JSON."""
        asked = subprocess.run(
            [self._program, *command, "--json", "--data-dir", str(self.folder / str(number))],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode:
            raise NodesError(asked.stderr.strip())
        return json.loads(asked.stdout)

    def found_by(self, number: int) -> set[str]:
        """Return whose devices a node finds."""
        return {one["peer_id"] for one in self.ask(number, "devices", "--kind", "cpu")}

    def is_one_mesh(self) -> bool:
        """Whether from each node a way leads to each other one."""
        return _hangs_together(
            {one: {p["peer_id"] for p in self.ask(n, "peers")} for n, one in enumerate(self.peer_ids)}
        )

    def kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()

    def end(self) -> None:
        """Kill those that are left."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def _hangs_together(graph: dict[str, set[str]]) -> bool:
    """Whether all of a graph can be reached from one of it; given who is connected to whom, from both ends."""
    left, edge = dict(graph), [next(iter(graph))]
    while edge:
        edge.extend(left.pop(edge.pop(), ()))
    return not left


def _event(log: Path, name: str) -> dict[str, Any] | None:
    for line in log.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            event: dict[str, Any] = json.loads(line)
            if event.get("event") == name:
                return event
    return None


@contextlib.contextmanager
def _running(options: argparse.Namespace) -> Iterator[Nodes]:
    program = shutil.which("sparkle-node", path=sysconfig.get_path("scripts"))
    if program is None:
        raise NodesError("sparkle-node is not installed for this Python; run `make setup`")
    with tempfile.TemporaryDirectory(prefix="sparkle-nodes-") as folder:
        nodes = Nodes(Path(folder), program, options.seed)
        try:
            yield nodes
        finally:
            nodes.end()


def _until(what: str, holds: Any, timeout_s: float) -> float:
    """Return how many seconds it took until ``holds()``. Raises NodesError after ``timeout_s``."""
    started = time.monotonic()
    while not holds():
        if time.monotonic() > started + timeout_s:
            raise NodesError(f"{what} took over {timeout_s:g} s")
        time.sleep(POLL_S)
    return time.monotonic() - started


def _costs(nodes: Nodes) -> list[tuple[float, int]]:
    """Return of each node its CPU time in seconds, and the memory that is its own in bytes."""
    processes = [psutil.Process(process.pid) for process in nodes.processes]
    return [(sum(one.cpu_times()[:2]), one.memory_info().rss) for one in processes]


def _sent_bytes() -> int:
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def measure(options: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Run it all; return the figures."""
    count = options.nodes
    with _running(options) as nodes:
        for number in range(count):
            say(f"starting node {number + 1} of {count}")
            nodes.start()
        say("waiting until they are one mesh")
        everyone = set(nodes.peer_ids)
        figures: dict[str, Any] = {"nodes": count}
        figures["one_mesh_s"] = _until("forming one mesh", nodes.is_one_mesh, options.timeout)
        figures["all_found_s"] = figures["one_mesh_s"] + _until(
            "finding every device", lambda: all(nodes.found_by(n) == everyone for n in range(count)), options.timeout
        )
        say(f"idle for {options.idle:g} s")
        before, sent, started = _costs(nodes), _sent_bytes(), time.monotonic()
        time.sleep(options.idle)
        minutes = (time.monotonic() - started) / 60
        after = _costs(nodes)
        degrees = [nodes.ask(number, "status")["peer_count"] for number in range(count)]
        figures["connections"], figures["connections_worst"] = statistics.median(degrees), max(degrees)
        pairs = zip(after, before, strict=True)
        figures["cpu_s_per_min"] = statistics.median((later[0] - earlier[0]) / minutes for later, earlier in pairs)
        figures["memory_mb"] = statistics.median(memory / 1e6 for _, memory in after)
        if options.in_namespace:
            figures["kb_per_min"] = (_sent_bytes() - sent) / 1e3 / minutes / count
        figures |= _kill_some(nodes, options, say)
    return figures


def _kill_some(nodes: Nodes, options: argparse.Namespace, say: Any) -> dict[str, Any]:
    if not options.kill:
        return {}
    killed = random.Random(options.seed).sample(range(1, options.nodes), options.kill)
    for number in killed:
        nodes.kill(number)
    left = {peer_id for number, peer_id in enumerate(nodes.peer_ids) if number not in killed}
    say(f"{options.kill} are killed; searching")
    started, times = time.monotonic(), []
    while True:
        at = time.monotonic()
        found = nodes.found_by(0)
        times.append(time.monotonic() - at)
        if left - found:
            raise NodesError(f"{len(left - found)} of the living are missing from an answer")
        if found == left:
            return {"gone_s": at - started, "search_s": statistics.median(times)}
        if at > started + options.timeout + GOALS["gone_s"]:
            raise NodesError(f"{len(found - left)} of the killed are found after {at - started:.0f} s")
        time.sleep(0.5)


def _in_namespace(arguments: Sequence[str]) -> int | None:
    """Run this again in a network namespace of its own, and return its exit code; None where that cannot be."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        return None
    enter = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    # In some containers root may not.
    if subprocess.run([*enter, "true"], check=False, capture_output=True).returncode:
        return None
    inner = [sys.executable, os.fspath(Path(__file__).resolve()), "--in-namespace", *arguments]
    return subprocess.run([*enter, *inner], check=False).returncode


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=30, help="how many (default: %(default)s)")
    parser.add_argument("--idle", type=float, default=60.0, metavar="S", help="how long to look (default: %(default)s)")
    parser.add_argument("--kill", type=int, default=10, help="how many are killed in the end (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="for each step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="who knows whom, and who dies (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, for programs")
    parser.add_argument("--in-namespace", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.nodes < 2 or not 0 <= options.kill < options.nodes:
        parser.error(f"--nodes {options.nodes} must be at least 2, and --kill {options.kill} fewer than those")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print each figure beside its goal; exit code 1 if it could not be measured."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_options(given)
    if not options.in_namespace:
        code = _in_namespace(given)
        if code is not None:
            return code
    interactive = sys.stderr.isatty()

    def say(text: str) -> None:
        if interactive:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    try:
        figures = measure(options, say)
    except NodesError as error:
        print(f"\nnodes.py: {error}", file=sys.stderr)
        return 1
    say("")
    for name, value in figures.items():
        goal = f"   (goal: under {GOALS[name]:g})" if name in GOALS else ""
        print(f"{name:15} {value:8.4g}{goal}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
