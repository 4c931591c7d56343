"""Real trainers under real faults: ``python -m simulations.chaos --minutes 10``.

Processes of this host train one model together while a random one is killed or stopped every second or two, and new
ones join. Every trainer checks every sum against what its contributors put in; at the end all must hold the same
weights, and the loss must be that of a training without faults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TRAINER = Path(__file__).with_name("chaos_trainer.py")
#: How long a stop may last that is to be noticed, and one that is not.
LONG_STOP_S, SHORT_STOP_S = 16.0, 2.0
END_TIMEOUT_S = 120.0
#: Recoveries that take longer than this are listed.
SLOW_S = 1.0
#: What a process is told that was stopped for so long that the others went on without it.
EXCUSED = ("ExcludedError", "OutcomeUnknownError", "QuorumLostError")
#: The mean of squares that noise of the last steps leaves.
LOSS_MAX = 1e-3


@dataclass(slots=True)
class Trainer:
    """One process, and what it has said."""

    process: subprocess.Popen[str]
    peer: str = ""
    steps: list[tuple[float, int, frozenset[str]]] = field(default_factory=list)
    end: tuple[str, ...] = ()
    problem: str = ""
    stopped: bool = False
    killed: bool = False

    @property
    def works(self) -> bool:
        """Whether it is a member that makes steps."""
        return bool(self.steps) and not self.killed and not self.stopped and self.process.poll() is None


@dataclass(slots=True)
class Fault:
    """What was done to whom, and when, in seconds of the clock that all share."""

    kind: str
    victim: Trainer
    at: float
    until: float = 0.0


class Chaos:
    """One run."""

    def __init__(self, count: int, seed: int, folder: Path) -> None:
        self.count, self.random = count, random.Random(seed)
        self.trainers: list[Trainer] = []
        self.faults: list[Fault] = []
        self._stop = folder / "stop"
        self._mesh = f"chaos-{secrets.token_hex(4)}"
        self._environment = {**os.environ, "SPARKLE_DATA_DIR": str(folder), "OMP_NUM_THREADS": "1"}

    def start(self, min_peers: int) -> None:
        """Start one more trainer."""
        process = subprocess.Popen(
            [sys.executable, str(TRAINER), self._mesh, str(min_peers), str(self._stop)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        trainer = Trainer(process)
        self.trainers.append(trainer)
        threading.Thread(target=self._read, args=(trainer,), daemon=True).start()

    def _read(self, trainer: Trainer) -> None:
        assert trainer.process.stdout is not None
        assert trainer.process.stderr is not None
        for line in trainer.process.stdout:
            at, word, *rest = line.split()
            match word:
                case "joined":
                    trainer.peer = rest[0]
                case "step":
                    trainer.steps.append((float(at), int(rest[0]), frozenset(rest[4].split(","))))
                case "end":
                    trainer.end = tuple(rest)
                case "wrong" | "error":
                    trainer.problem = " ".join([word, *rest])
        said = trainer.process.stderr.read()
        if trainer.process.wait() not in (0, 4, -signal.SIGKILL) and not trainer.problem:
            trainer.problem = said.strip().splitlines()[-1] if said.strip() else f"exit {trainer.process.returncode}"

    # --- Faults ----------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Start, do damage for so long, and let the rest come to an end."""
        for _ in range(self.count):
            self.start(self.count)
        self._until(lambda: sum(trainer.works for trainer in self.trainers) == self.count, 90, "the first view")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(self.random.uniform(1, 2))
            self._replace()
            working = [trainer for trainer in self.trainers if trainer.works]
            if len(working) > self.count // 2 + 1:
                self._do_damage(self.random.choice(working))
            self._show(deadline - time.monotonic())
        for trainer in self.trainers:
            if trainer.stopped:
                self._go_on(trainer)
        # Those that are on their way only now would find nobody.
        for trainer in self.trainers:
            if not trainer.steps and trainer.process.poll() is None:
                trainer.killed = True
                trainer.process.kill()
        self._stop.touch()
        self._until(lambda: all(t.process.poll() is not None for t in self.trainers), END_TIMEOUT_S, "the end")

    def _do_damage(self, victim: Trainer) -> None:
        if self.random.random() < 0.7:
            victim.killed = True
            victim.process.send_signal(signal.SIGKILL)
            self.faults.append(Fault("kill", victim, time.monotonic()))
            return
        long = self.random.random() < 0.15
        fault = Fault("long stop" if long else "stop", victim, time.monotonic())
        victim.stopped = True
        victim.process.send_signal(signal.SIGSTOP)
        self.faults.append(fault)
        time.sleep(LONG_STOP_S if long else self.random.uniform(0.2, SHORT_STOP_S))
        fault.until = time.monotonic()
        self._go_on(victim)

    def _go_on(self, trainer: Trainer) -> None:
        trainer.stopped = False
        trainer.process.send_signal(signal.SIGCONT)

    def _replace(self) -> None:
        """Who is gone is replaced, as long as all of them together are not too many for this host."""
        alive = sum(trainer.process.poll() is None for trainer in self.trainers)
        if alive < self.count:
            self.start(2)

    def _until(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                raise SystemExit(f"{what} did not come in {timeout_s:g} s: {self.problems() or 'no error was told'}")
            time.sleep(0.05)

    def _show(self, left_s: float) -> None:
        if sys.stderr.isatty():
            working = sum(trainer.works for trainer in self.trainers)
            steps = max((trainer.steps[-1][1] for trainer in self.trainers if trainer.steps), default=0)
            text = f"{left_s:4.0f} s left, {working} working, {len(self.faults)} faults, step {steps}"
            print(f"\r{text:60}", end="", file=sys.stderr, flush=True)

    # --- What came of it -------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """Return what should not have been: all errors, but of the stopped that the others went on without them."""
        excused = {id(fault.victim) for fault in self.faults if fault.kind != "kill"}
        return [
            f"{trainer.peer}: {trainer.problem}"
            for trainer in self.trainers
            if trainer.problem and not (id(trainer) in excused and any(name in trainer.problem for name in EXCUSED))
        ]

    def recovery_s(self, fault: Fault) -> float | None:
        """Return how long after ``fault`` the last of the others had its next result; None if nobody had one.

        After a death, that is a result of a view without the dead; after a stop, any result.
        """
        times = []
        for trainer in self.trainers:
            if trainer is fault.victim or not any(at < fault.at for at, _, _ in trainer.steps):
                continue
            if (trainer.killed or trainer.problem) and trainer.steps[-1][0] < fault.at + 20:
                continue
            later = (
                at
                for at, _, members in trainer.steps
                if at > fault.at and (fault.kind != "kill" or fault.victim.peer not in members)
            )
            first = next(later, None)
            if first is not None:
                times.append(first - fault.at)
        return max(times, default=None)

    def report(self) -> dict[str, object]:
        """Return the figures."""
        steps = [step for trainer in self.trainers for _, step, _ in trainer.steps]
        ends = [trainer.end for trainer in self.trainers if trainer.end]
        figures: dict[str, object] = {
            "trainers": len(self.trainers),
            "steps": max(steps, default=0),
            # Of every step: one to synchronise, and two reductions.
            "collectives_checked": len(steps),
            "problems": self.problems(),
            "ends": len(ends),
            "losses": sorted({float(end[1]) for end in ends}),
            "weights": sorted({end[2] for end in ends}),
        }
        for kind in ("kill", "stop", "long stop"):
            faults = [fault for fault in self.faults if fault.kind == kind]
            times = [time_s for fault in faults if (time_s := self.recovery_s(fault)) is not None]
            if kind != "kill":
                # What is waited for is there again when the process is.
                times = [
                    time_s - (fault.until - fault.at if kind == "stop" else 0.0)
                    for fault, time_s in zip(faults, map(self.recovery_s, faults), strict=True)
                    if time_s is not None
                ]
            figures[kind] = {
                "count": len(faults),
                "median_s": round(statistics.median(times), 3) if times else None,
                "worst_s": round(max(times), 3) if times else None,
                "slow": [
                    f"{fault.victim.peer} at {fault.at:.3f}: {time_s:.3f} s"
                    for fault in faults
                    if kind == "kill" and (time_s := self.recovery_s(fault) or 0.0) > SLOW_S
                ],
            }
        return figures

    def close(self) -> None:
        """End what is left."""
        for trainer in self.trainers:
            if trainer.process.poll() is None:
                trainer.process.kill()
            trainer.process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Run it; return the exit code: 0 if every sum was right, nobody hung, and training ended where it should."""
    parser = argparse.ArgumentParser(prog="python -m simulations.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default %(default)s)")
    parser.add_argument("--trainers", type=int, default=8, help="how many processes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of who is hit and when (default: a new one, printed)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="sparkle-chaos-") as folder:
        chaos = Chaos(options.trainers, seed, Path(folder))
        try:
            chaos.run(options.minutes * 60)
        finally:
            figures = chaos.report()
            print()
            print(json.dumps(figures, indent=2))
            chaos.close()
    if options.json is not None:
        options.json.write_text(json.dumps({"seed": seed, **figures}))
    losses = figures["losses"]
    assert isinstance(losses, list)
    right = len(losses) == 1 and losses[0] < LOSS_MAX
    return 0 if not figures["problems"] and right else 1


if __name__ == "__main__":
    raise SystemExit(main())
