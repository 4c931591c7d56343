"""Run simulated worlds: ``python -m simulations --seeds 1000``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from typing import Any

from simulations import formation, nodes, succession
from simulations.network import InvariantBroken

WORLDS: dict[str, Any] = {"formation": formation, "succession": succession, "nodes": nodes}


def run_seed(name: str, seed: int) -> tuple[int, str | None, Any]:
    """Run one seed of the world called ``name``; return it, what broke if anything, and what it exercised."""
    world = WORLDS[name].World(seed)
    return seed, _failure_of(world), world.exercised


def _failure_of(world: Any) -> str | None:
    """Run ``world``; return what broke, or None."""
    try:
        world.run()
    except InvariantBroken as error:
        return str(error)
    except Exception:
        # Any error of the code under test, whatever its type, is a finding: the other seeds run, and this one's line
        # to replay it is printed.
        return f"seed {world.seed}: a node failed\n{traceback.format_exc()}"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Parse ``arguments``, run the seeds, print a summary; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m simulations", description=__doc__)
    parser.add_argument(
        "--world",
        choices=WORLDS,
        default="succession",
        help="what is simulated: first views, views that follow, or nodes as a whole (default %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds to run (default %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default %(default)s)")
    parser.add_argument("--workers", type=int, help="how many processes run them (default: one for each processor)")
    parser.add_argument("--seed", type=int, help="run this one seed alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every event")
    parser.add_argument("--digest", action="store_true", help="with --seed: print the SHA-256 of its trace alone")
    parser.add_argument(
        "--repeat", type=int, metavar="N", help="with --seed: run it in N processes, and fail if their traces differ"
    )
    options = parser.parse_args(arguments)
    if options.seed is None and (options.trace or options.digest or options.repeat):
        parser.error("--trace, --digest and --repeat are about one seed: say which with --seed")
    if options.repeat:
        return _repeat(options.world, options.seed, options.repeat)
    if options.digest:
        print(_digest(options.world, options.seed))
        return 0
    if options.seed is not None:
        return _run_one(options.world, options.seed, trace=options.trace)
    total, failures = WORLDS[options.world].Exercised(), []
    with ExitStack() as stack:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        run = partial(run_seed, options.world)
        ran: Iterable[tuple[int, str | None, Any]] = map(run, seeds)
        if options.workers != 1:
            ran = stack.enter_context(ProcessPoolExecutor(options.workers)).map(run, seeds, chunksize=16)
        for done, (_, failure, exercised) in enumerate(ran, start=1):
            total.add(exercised)
            if failure is not None:
                failures.append(failure)
            if sys.stderr.isatty():
                print(f"\r{done}/{options.seeds} seeds, {len(failures)} failed", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    for failure in failures[:10]:
        seed = failure.split()[1].rstrip(":")
        print(f"{failure}\n  replay: python -m simulations --world {options.world} --seed {seed} --trace")
    print(f"{options.seeds} seeds from {options.first_seed}: {len(failures)} failed; exercised {total}")
    return 1 if failures else 0


def _run_one(name: str, seed: int, *, trace: bool) -> int:
    world = WORLDS[name].World(seed)
    failure = _failure_of(world)
    if trace:
        print("\n".join(world.trace))
    print(failure or f"seed {seed}: passed; exercised {world.exercised}")
    return 1 if failure else 0


def _digest(name: str, seed: int) -> str:
    world = WORLDS[name].World(seed)
    failure = _failure_of(world)
    return sha256("\n".join([*world.trace, failure or ""]).encode()).hexdigest()


def _repeat(name: str, seed: int, count: int) -> int:
    """Run a seed in processes that hash differently, and so iterate over sets in different orders."""
    command = [sys.executable, "-m", "simulations", "--world", name, "--seed", str(seed), "--digest"]

    def digest(process: int) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": str(process)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = Counter(pool.map(digest, range(count)))
    print(f"seed {seed} of {name} in {count} processes: how often its trace had which SHA-256")
    for value, times in digests.most_common():
        print(f"{times:5} {value}")
    return 0 if len(digests) == 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
