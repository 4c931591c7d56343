"""Four processes train one model together on this machine; one is killed, and nobody has to be told.

Starts one ``sparkle-node`` and four ``train_digits.py`` that are given no address, and shows how they get on. A third
of the way in it kills one of them and starts another: the rest go on, and the newcomer gets their weights and a share
of the data. It checks that the model is good and the same on every rank, and leaves ``build/demo/loss.png`` and
``build/demo/summary.json``:

    python examples/demo.py

Everything they keep goes to a folder of the demo's own, and the mesh gets a random name, so that a node that
runs on this machine already is neither disturbed nor disturbs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REQUIRED_ACCURACY = 0.95
PER_RANK = ("rank", "accuracy", "first_step", "steps", "seconds", "algorithm", "bytes_sent", "bytes_received")
STEPS, STEPS_SHORT = 400, 150
# The model is so small that it would be trained before anybody could join: each step takes as long as one of a larger.
STEP_MS, STEP_MS_SHORT = 40.0, 60.0
STOP_TIMEOUT_S = 10.0
REFRESH_S = 0.2
LOG_TAIL_LINES = 25


class DemoError(Exception):
    """Something that the demo shows off did not work."""


class Child:
    """One process of the demo: what it prints goes to ``log``, and its JSON lines to ``latest`` as well."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.name, self.log, self.killed = name, log, False
        self.latest: dict[str, Any] | None = None
        # A session of its own: Ctrl-C reaches the demo alone, which then ends its children one by one.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, name=f"reader of {name}", daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines, self.log.open("w") as log:
            for line in lines:
                log.write(line)
                log.flush()
                if line.startswith("{"):
                    with contextlib.suppress(json.JSONDecodeError):  # a line that only looks like ours
                        self.latest = json.loads(line)

    def log_tail(self) -> str:
        """Return the last lines of what the process printed."""
        self.reader.join(timeout=1.0)
        with self.log.open() as log:
            return "".join(deque(log, maxlen=LOG_TAIL_LINES)).rstrip() or "(it printed nothing)"


def end(children: Sequence[Child]) -> None:
    """End every process: politely all at once, then surely. A second Ctrl-C skips the polite part."""
    try:
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()
            child.reader.join(timeout=1.0)


def node_command() -> list[str]:
    """Return how to start ``sparkle-node`` as it is installed beside this interpreter."""
    script = shutil.which("sparkle-node", path=sysconfig.get_path("scripts")) or shutil.which("sparkle-node")
    if script is None:
        raise DemoError("sparkle-node is not installed for this Python; run `make setup` or `pip install -e '.[demo]'`")
    return [script]


@contextlib.contextmanager
def running_children(options: argparse.Namespace, steps: int, reports: Path) -> Iterator[Company]:
    """Start the node and the trainers; end them whatever happens."""
    mesh = f"demo-{secrets.token_hex(4)}"
    # A temporary folder rather than build/: it holds a Unix socket, whose path has to be short.
    with tempfile.TemporaryDirectory(prefix="sparkle-demo-", ignore_cleanup_errors=True) as data_dir:
        # One thread each for NumPy: the matrices are small, and four processes share the cores.
        environment = os.environ | {"SPARKLE_DATA_DIR": data_dir, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        trainer = [sys.executable, str(HERE / "train_digits.py"), "--mesh", mesh, "--min-peers", str(options.ranks)]
        step_ms = STEP_MS_SHORT if options.short else STEP_MS
        trainer += ["--steps", str(steps), "--seed", str(options.seed), "--json", "--timeout", "60"]
        # However long a newcomer takes to start on this machine, the others have not ended before it is in.
        trainer += ["--step-ms", str(step_ms), "--end-together"]
        trainers: list[Child] = []
        node = Child(
            "node",
            [*node_command(), "--mesh", mesh, "--listen", "/ip4/0.0.0.0/tcp/0", "--no-public"],
            options.out / "node.log",
            environment,
        )

        def start() -> None:
            number = len(trainers) + 1
            command = [*trainer, "--report", str(reports / f"{number}.json")]
            trainers.append(Child(f"trainer {number}", command, options.out / f"trainer-{number}.log", environment))

        try:
            for _ in range(options.ranks):
                start()
            yield Company(node, trainers, start, steps)
        finally:
            end([node, *trainers])


class Company:
    """The processes of a demo, and what befalls them."""

    def __init__(self, node: Child, trainers: list[Child], start: Callable[[], None], steps: int) -> None:
        self.node, self.trainers, self._start, self._steps = node, trainers, start, steps
        self.news: list[str] = []
        self._told: set[str] = set()

    @property
    def victim(self) -> Child | None:
        """Who was killed."""
        return next((trainer for trainer in self.trainers if trainer.killed), None)

    def act(self, number: int | None) -> None:
        """A third of the way in, kill trainer ``number`` and start another; tell what is new."""
        steps = [trainer.latest["step"] for trainer in self.trainers if trainer.latest]
        first = len(self.trainers)
        if number is not None and self.victim is None and len(steps) == first and min(steps) * 3 >= self._steps:
            victim = self.trainers[number - 1]
            victim.killed = True
            victim.process.kill()
            self.news.append(f"step {max(steps)}: {victim.name} is killed (SIGKILL) ... and another one is started")
            self._start()
        elif self.victim is not None:
            newcomer = self.trainers[-1]
            at = max(steps)
            if newcomer.latest and newcomer.name not in self._told:
                self._told.add(newcomer.name)
                self.news.append(f"step {at}: {newcomer.name} is in, with the weights of the others")


def describe(child: Child) -> tuple[str, ...]:
    """Return a row about ``child``: process, rank, step, loss, accuracy, step time, bytes, peers."""
    state = child.latest
    if state is None or child.killed:
        return (child.name, "-", "killed" if child.killed else "starting", "-", "-", "-", "-", "-")
    return (
        child.name,
        str(state["rank"]),
        f"{state['step']}/{state['steps']}",
        f"{state['loss']:.4f}",
        f"{state['accuracy']:.1%}",
        f"{state['step_ms']:.1f} ms",
        f"{state['bytes'] / 1e6:.1f} MB",
        str(state["peers"]),
    )


COLUMNS = ("process", "rank", "step", "loss", "accuracy", "step time", "bytes", "peers")


@contextlib.contextmanager
def live_display(title: str) -> Iterator[Any]:
    """Yield a function that shows the trainers: a live table on a terminal, else a line now and then."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.live import Live
        from rich.table import Table

        def table(company: Company) -> Table:
            drawn = Table(*COLUMNS, title=title, title_justify="left", caption_justify="left")
            for trainer in company.trainers:
                drawn.add_row(*describe(trainer), style="red" if trainer.killed else None)
            drawn.caption = "\n".join(company.news)
            return drawn

        with Live(refresh_per_second=1 / REFRESH_S, redirect_stdout=False) as live:
            yield lambda company: live.update(table(company))
        return

    print(title, flush=True)
    shown: dict[str, Any] = {"at": 0.0, "rows": (), "news": 0}

    def lines(company: Company) -> None:
        trainers = [trainer for trainer in company.trainers if not trainer.killed]
        for text in company.news[shown["news"] :]:
            print(text, flush=True)
        shown["news"] = len(company.news)
        now = time.monotonic()
        rows = tuple(sorted((describe(trainer) for trainer in trainers if trainer.latest), key=lambda row: row[1]))
        finished = bool(rows) and all(t.latest and t.latest["step"] == t.latest["steps"] for t in trainers)
        if rows != shown["rows"] and (now - shown["at"] > 2.0 or finished):
            shown.update(at=now, rows=rows)
            for row in rows:
                print("  " + "  ".join(f"{name} {value}" for name, value in zip(COLUMNS[1:], row[1:], strict=True)))
            sys.stdout.flush()

    yield lines


def wait_for_trainers(company: Company, kill: int | None, deadline: float, show: Any) -> None:
    """Wait until every trainer has ended well, showing progress; trainer number ``kill`` does not live to see it.

    Raises
    ------
    DemoError
        If any process fails, the node ends early, or the deadline passes; the message ends with its log.
    """
    node = company.node
    while True:
        company.act(kill)
        show(company)
        trainers = [child for child in company.trainers if not child.killed]
        for child in trainers:
            if child.process.poll():
                raise DemoError(f"{child.name} ended with exit code {child.process.returncode}:\n{child.log_tail()}")
        if node.process.poll() is not None:
            raise DemoError(f"sparkle-node ended early (exit code {node.process.returncode}):\n{node.log_tail()}")
        running = [child for child in trainers if child.process.poll() is None]
        if not running:
            for child in trainers:
                child.reader.join(timeout=1.0)
            show(company)
            return
        if time.monotonic() > deadline:
            names = ", ".join(child.name for child in running)
            raise DemoError(f"{names} did not finish in time:\n{running[0].log_tail()}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].process.wait(REFRESH_S)


def draw(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss of every rank and the test accuracy over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    colors = pyplot.get_cmap("viridis")
    window = 10
    for report in reports:
        losses = report["losses"]
        smooth = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        color = colors(0.85 * report["rank"] / max(1, len(reports) - 1))
        first = report["first_step"]
        label = f"loss, rank {report['rank']}" + (f", since step {first}" if first else "")
        axes.plot(range(first + 1, first + len(losses) + 1), smooth, color=color, linewidth=1.4, label=label)
    axes.set(xlabel="step", ylabel=f"training loss (mean of {window} steps)", yscale="log")
    axes.set_xlim(1, reports[0]["steps"])
    axes.grid(alpha=0.25)

    right = axes.twinx()
    steps, accuracies = zip(*reports[0]["accuracies"], strict=True)
    right.plot(steps, [100 * value for value in accuracies], color="crimson", linewidth=2, label="test accuracy")
    right.axhline(100 * REQUIRED_ACCURACY, color="crimson", linewidth=0.8, linestyle=":")
    right.set_ylabel("test accuracy (%)", color="crimson")
    right.set_ylim(0, 102)
    right.tick_params(axis="y", colors="crimson")
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    right.legend(handles=handles, loc="center right", bbox_to_anchor=(1.0, 0.7), framealpha=0.9)
    axes.set_title(
        f"{len(reports)} ranks, one model: accuracy {reports[0]['accuracy']:.1%}, "
        f"weights {reports[0]['weights_sha256'][:12]} on every rank",
        loc="left",
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def summarise(reports: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return what ``summary.json`` holds."""
    return {
        "ranks": len(reports),
        "accuracy": min(report["accuracy"] for report in reports),
        "weights_sha256": {str(report["rank"]): report["weights_sha256"] for report in reports},
        "steps": reports[0]["steps"],
        "seconds": round(seconds, 3),
        "training_seconds": round(max(report["seconds"] for report in reports), 3),
        "longest_step_seconds": round(max(report["longest_step_s"] for report in reports), 3),
        "bytes": sum(report["bytes_reduced"] for report in reports),
        "per_rank": [{key: report[key] for key in PER_RANK} for report in reports],
    }


def check(reports: Sequence[dict[str, Any]], ranks: int) -> None:
    """Raise DemoError unless all ranks took part, ended with the same weights, and the model is good."""
    if [(report["rank"], report["size"]) for report in reports] != [(rank, ranks) for rank in range(ranks)]:
        raise DemoError(f"the ranks were {[(r['rank'], r['size']) for r in reports]}, not 0 to {ranks - 1} of {ranks}")
    hashes = {report["rank"]: report["weights_sha256"] for report in reports}
    if len(set(hashes.values())) != 1:
        raise DemoError(f"the ranks ended with different weights: {hashes}")
    worst = min(report["accuracy"] for report in reports)
    if worst < REQUIRED_ACCURACY:
        raise DemoError(f"test accuracy is {worst:.1%}, below {REQUIRED_ACCURACY:.0%}; train longer with --steps")


def run(options: argparse.Namespace) -> None:
    """Run the demo."""
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"{' and '.join(missing)} not installed; run `make setup` or `pip install -e '.[demo]'`")
    options.out.mkdir(parents=True, exist_ok=True)
    steps = options.steps or (STEPS_SHORT if options.short else STEPS)
    picture, summary_file = options.out / "loss.png", options.out / "summary.json"
    for stale in (picture, summary_file):
        stale.unlink(missing_ok=True)
    started = time.monotonic()
    title = f"sparkle demo: one node and {options.ranks} trainers find each other and train {steps} steps"
    with tempfile.TemporaryDirectory(prefix="sparkle-demo-reports-") as reports_dir:
        with running_children(options, steps, Path(reports_dir)) as company, live_display(title) as show:
            kill = 2 if options.ranks > 2 and not options.no_kill else None
            wait_for_trainers(company, kill, started + options.timeout, show)
        written = [json.loads(path.read_text()) for path in Path(reports_dir).glob("*.json")]
    reports = sorted(written, key=lambda report: report["rank"])
    check(reports, options.ranks)
    summary = summarise(reports, time.monotonic() - started)
    summary_file.write_text(json.dumps(summary, indent=2) + "\n")
    draw(reports, picture)
    victim = company.victim
    if victim is not None:
        print(
            f"\n{victim.name} was killed, and the others went on: no step of theirs took longer than "
            f"{summary['longest_step_seconds'] * 1000:.0f} ms"
        )
    print(
        f"\n{summary['ranks']} ranks trained {summary['steps']} steps in {summary['training_seconds']:.1f} s "
        f"({summary['seconds']:.1f} s with starting and finding each other), {summary['bytes'] / 1e6:.0f} MB reduced\n"
        f"test accuracy {summary['accuracy']:.1%}; weights {reports[0]['weights_sha256'][:16]} on every rank\n"
        f"wrote {picture} and {summary_file}"
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Trainers find each other, train one model, and lose one of them.")
    parser.add_argument("--short", action="store_true", help=f"{STEPS_SHORT} steps instead of {STEPS}")
    parser.add_argument("--no-kill", action="store_true", help="let all of them live")
    parser.add_argument("--ranks", type=int, default=4, help="training processes (%(default)s)")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (%(default)s)")
    parser.add_argument("--timeout", type=float, default=110.0, help="seconds for all of it (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where results go (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the demo; exit code 1 and the reason if something does not work."""
    options = parse_options()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # All as if by Ctrl-C, so that the children are ended on the way out; also where a shell that starts this in the
    # background ignores that one. What is ignored under nohup stays ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        run(options)
    except DemoError as error:
        sys.exit(f"demo failed: {error}\nlogs are in {options.out}")
    except KeyboardInterrupt:
        print("\ninterrupted; every process of the demo was ended", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
