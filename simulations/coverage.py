"""Measure which branches of the machine that agrees on views are run by simulation alone.

``python -m simulations.coverage --seeds 3000`` runs the world of views that follow views, and fails if a line or a
branch of the machine, or of how operations are decided, is never taken.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MACHINE = ("ballots", "complaints", "operations", "view_change")


def main(arguments: list[str] | None = None) -> int:
    """Run the seeds under coverage, in as many processes as there are processors; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m simulations.coverage", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3000, help="how many seeds to run (default %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default %(default)s)")
    options = parser.parse_args(arguments)
    count = os.cpu_count() or 1
    include = ",".join(f"*/membership/{name}.py" for name in MACHINE)
    with tempfile.TemporaryDirectory() as folder:
        data = f"--data-file={Path(folder) / 'coverage'}"
        coverage = [sys.executable, "-m", "coverage"]
        shares = [len(range(part, options.seeds, count)) for part in range(count)]
        firsts = [options.first_seed + sum(shares[:part]) for part in range(count)]
        runs = [
            subprocess.Popen(
                [
                    *(*coverage, "run", "--rcfile=", "--branch", "--parallel-mode", data, f"--include={include}"),
                    *("-m", "simulations", "--workers=1", f"--seeds={share}", f"--first-seed={first}"),
                ]
            )
            for share, first in zip(shares, firsts, strict=True)
            if share
        ]
        failed = [run for run in runs if run.wait()]
        if failed:
            return 1
        subprocess.run([*coverage, "combine", "--rcfile=", "--quiet", data], check=True)
        report = ["report", "--rcfile=", "--show-missing", "--fail-under=100", "--precision=2", data]
        return subprocess.run([*coverage, *report], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
