"""Train a small neural network on handwritten digits, together with whoever else runs this program.

Start it on as many machines (or in as many terminals) as you like, each with the same ``--mesh`` and the
same ``--min-peers``; nobody needs to be told an address on one LAN:

    python examples/train_digits.py --mesh my-digits --min-peers 2

Machines that no multicast reaches are given a key and an invite: ``--key-file FILE --join INVITE`` (see the README).

All that is distributed about it are the lines marked ``# mesh``. Every rank holds a share of the data and the same
weights; at each step it computes gradients on its share, averages them with everyone's, and so takes the same step as
everyone else. The hash printed at the end is the same on every rank.

Kill one of them at any time: the others go on. Start one more: it gets their weights, and a share of the data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from digits import initial_weights, load_data

import sparkle_mesh as sparkle
from sparkle_mesh.errors import SparkleError

LEARNING_RATE = 0.08
MOMENTUM = 0.9
LOOK_FOR_MISSING_S = 0.05

Weights = dict[str, np.ndarray]  # every array float32


def loss_and_gradients(weights: Weights, images: np.ndarray, labels: np.ndarray) -> tuple[float, Weights]:
    """Return the mean cross-entropy over a batch and its gradient with respect to every weight."""
    hidden = np.maximum(images @ weights["w1"] + weights["b1"], 0.0)
    logits = hidden @ weights["w2"] + weights["b2"]
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = float(-np.log(probabilities[rows, labels] + 1e-12).mean())

    d_logits = probabilities
    d_logits[rows, labels] -= 1.0
    d_logits /= len(labels)
    d_hidden = d_logits @ weights["w2"].T
    d_hidden[hidden == 0.0] = 0.0
    gradients = {
        "w1": images.T @ d_hidden,
        "b1": d_hidden.sum(axis=0),
        "w2": hidden.T @ d_logits,
        "b2": d_logits.sum(axis=0),
    }
    return loss, gradients


def accuracy(weights: Weights, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images whose digit the network names correctly."""
    hidden = np.maximum(images @ weights["w1"] + weights["b1"], 0.0)
    return float(((hidden @ weights["w2"] + weights["b2"]).argmax(axis=1) == labels).mean())


def hash_weights(weights: Weights) -> str:
    """Return the SHA-256 of all weights, bit for bit."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].tobytes())
    return digest.hexdigest()


class Progress:
    """Tells how training goes: one live line on a terminal, plain lines or JSON objects elsewhere."""

    def __init__(self, mesh: Any, steps: int, as_json: bool) -> None:
        self.mesh, self.steps, self.as_json = mesh, steps, as_json
        self.last_step, self.last_time = 0, time.perf_counter()
        #: Of gradients, over all steps so far.
        self.reduced_bytes = 0

    def show(self, step: int, loss: float, test_accuracy: float) -> None:
        """Show the state after ``step`` steps; the step time is the mean since the last call."""
        now = time.perf_counter()
        state = {
            "rank": self.mesh.rank,
            "step": step,
            "steps": self.steps,
            "loss": loss,
            "accuracy": test_accuracy,
            "step_ms": (now - self.last_time) * 1000 / (step - self.last_step),
            "bytes": self.reduced_bytes,
            "peers": len(self.mesh.peers()),
        }
        self.last_step, self.last_time = step, now
        line = (
            f"rank {state['rank']}/{self.mesh.size}  step {step}/{self.steps}  loss {loss:.4f}  "
            f"accuracy {test_accuracy:.1%}  {state['step_ms']:.1f} ms/step  {state['bytes'] / 1e6:.1f} MB reduced  "
            f"peers {state['peers']}"
        )
        if self.as_json:
            print(json.dumps(state), flush=True)
        elif sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="\n" if step == self.steps else "", flush=True)
        else:
            print(line, flush=True)


def train(mesh: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Train over ``mesh`` for the steps asked for; return what the report holds."""
    train_images, train_labels, test_images, test_labels = load_data(options.seed)
    steps = options.steps or options.epochs * -(-len(train_labels) // (options.batch * options.min_peers))
    random = np.random.default_rng([options.seed, mesh.rank])

    weights = initial_weights(random)
    velocity = {name: np.zeros_like(value) for name, value in weights.items()}
    state = weights | {f"velocity of {name}": value for name, value in velocity.items()}

    algorithm = ""
    losses: list[float] = []
    accuracies: list[tuple[int, float]] = []
    progress = Progress(mesh, steps, options.json)
    started = last = time.perf_counter()
    pauses: list[float] = []
    step, first = 0, None
    while step < steps:
        step = mesh.synchronize(state, step).step  # mesh: whoever is new gets the weights of the others
        if step == steps:
            break
        if options.end_together and step == steps - 1 and mesh.size < options.min_peers:
            time.sleep(LOOK_FOR_MISSING_S)
            last = time.perf_counter()  # what was waited for others is no part of a step
            continue
        images, labels = train_images[mesh.rank :: mesh.size], train_labels[mesh.rank :: mesh.size]  # mesh: my share
        first, step = step if first is None else first, step + 1
        batch = random.choice(len(labels), size=min(options.batch, len(labels)), replace=False)
        loss, gradients = loss_and_gradients(weights, images[batch], labels[batch])
        mesh.all_reduce(gradients, op="mean")  # mesh: my gradients become everyone's mean
        progress.reduced_bytes += mesh.last_outcome.bytes
        algorithm = mesh.last_outcome.algorithm
        for name, gradient in gradients.items():
            # In place: these very arrays are the state that a newcomer gets.
            velocity[name] *= MOMENTUM
            velocity[name] -= LEARNING_RATE * gradient
            weights[name] += velocity[name]
        losses.append(loss)
        time.sleep(max(options.step_ms / 1000 - (time.perf_counter() - last), 0.0))
        pauses.append(time.perf_counter() - last)
        last += pauses[-1]
        if step % options.show_every == 0 or step == steps:
            accuracies.append((step, accuracy(weights, test_images, test_labels)))
            progress.show(step, loss, accuracies[-1][1])
    return {
        "rank": mesh.rank,
        "size": mesh.size,
        "steps": steps,
        "first_step": first or 0,
        "longest_step_s": max(pauses[1:], default=0.0),
        "seconds": time.perf_counter() - started,
        "losses": losses,
        "accuracies": accuracies,
        "accuracy": accuracy(weights, test_images, test_labels),
        "weights_sha256": hash_weights(weights),
        "algorithm": algorithm,
        "bytes_reduced": progress.reduced_bytes,
        "bytes_sent": mesh.stats.bytes_sent,
        "bytes_received": mesh.stats.bytes_received,
    }


def positive(text: str) -> int:
    """Parse a count of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train on handwritten digits with everyone in the mesh.")
    parser.add_argument("--mesh", default="digits", help="name of the mesh; the same on every machine (%(default)s)")
    parser.add_argument("--min-peers", type=positive, default=2, help="start once this many are here (%(default)s)")
    parser.add_argument("--key-file", type=Path, help="key of the mesh, from `sparkle-node new-key FILE`")
    parser.add_argument("--join", action="append", default=[], help="address or invite of a peer (repeatable)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for peers (%(default)s)")
    parser.add_argument("--steps", type=positive, help="steps to train; default: what --epochs asks for")
    parser.add_argument("--epochs", type=positive, default=30, help="passes over the data (%(default)s)")
    parser.add_argument("--batch", type=positive, default=32, help="images per rank and step (%(default)s)")
    parser.add_argument("--step-ms", type=float, default=0.0, help="let a step take as long, as of a larger model")
    parser.add_argument("--end-together", action="store_true", help="last step only once --min-peers are here again")
    parser.add_argument("--seed", type=int, default=0, help="split, initial weights and batches (%(default)s)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write this rank's results as JSON")
    parser.add_argument("--show-every", type=positive, default=10, help="steps between progress lines (%(default)s)")
    parser.add_argument("--json", action="store_true", help="progress as one JSON object a line, for programs")
    return parser.parse_args()


def main() -> None:
    """Join, train, report."""
    options = parse_options()
    print(f"waiting for {options.min_peers} ranks in the mesh {options.mesh!r} ...", file=sys.stderr, flush=True)
    try:
        key = sparkle.MeshKey.load(options.key_file) if options.key_file else None
        with sparkle.join(  # mesh: find the others
            options.mesh, key=key, min_peers=options.min_peers, timeout_s=options.timeout, join=options.join
        ) as mesh:
            report = train(mesh, options)
    except (SparkleError, OSError) as error:
        sys.exit(f"train_digits.py: {error}")
    if options.report:
        options.report.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"rank {report['rank']}: accuracy {report['accuracy']:.1%} after {report['steps']} steps "
        f"in {report['seconds']:.1f} s, weights {report['weights_sha256'][:16]}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
