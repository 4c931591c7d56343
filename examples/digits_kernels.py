"""Train a small neural network on handwritten digits with ``@sparkle.kernel`` alone, on whichever device you like.

    python examples/digits_kernels.py                    # Sparkle chooses for each kernel
    python examples/digits_kernels.py --device opencl    # or cpu, cuda, rocm, cuda:1, what another package brings

The network, its loss and one step of training are Python functions over arrays. Sparkle traces each of them once, takes
the gradient of the loss from what it has seen, and makes of the whole step one program for the device. Nothing in here
knows which device that is; the data is split and shuffled alike everywhere, so that accuracies can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from digits import initial_weights, load_data

import sparkle_mesh as sparkle
from sparkle_mesh.errors import SparkleError

LEARNING_RATE = 0.1
MOMENTUM = 0.9

Weights = dict[str, Any]  # NumPy's arrays at first, then Sparkle's; all float32


@sparkle.kernel
def classify(weights: Weights, images: Any) -> Any:
    """Return logits (n, 10) of images (n, 64)."""
    hidden = np.maximum(images @ weights["w1"] + weights["b1"], 0.0)
    return hidden @ weights["w2"] + weights["b2"]


@sparkle.kernel
def mean_loss(weights: Weights, images: Any, targets: Any) -> Any:
    """Return the mean cross-entropy; ``targets`` (n, 10) are 1 at the digit and 0 elsewhere."""
    logits = classify(weights, images)
    logits = logits - logits.max(axis=1, keepdims=True)
    return (np.log(np.exp(logits).sum(axis=1)) - (logits * targets).sum(axis=1)).mean()


loss_and_gradients = sparkle.value_and_gradient(mean_loss)


@sparkle.kernel
def train_step(weights: Weights, velocity: Weights, images: Any, targets: Any, rate: float) -> tuple[Any, Any, Any]:
    """Return the loss of a batch, and weights and velocity after one step of gradient descent with momentum."""
    loss, gradients = loss_and_gradients(weights, images, targets)
    velocity = {name: MOMENTUM * velocity[name] - rate * gradient for name, gradient in gradients.items()}
    return loss, {name: weights[name] + velocity[name] for name in weights}, velocity


def batches(
    images: np.ndarray, targets: np.ndarray, size: int, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all whole batches, in another order each time."""
    order = random.permutation(len(images))
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield images[chosen], targets[chosen]


def show(line: str, *, is_last: bool) -> None:
    """Print progress: one line that changes on a terminal, a line each elsewhere."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="\n" if is_last else "", flush=True)
    else:
        print(line, flush=True)


def train(context: sparkle.Context, options: argparse.Namespace) -> dict[str, Any]:
    """Train for the epochs asked for; return what the report holds."""
    images, labels, test_images, test_labels = load_data(options.seed)
    size = min(options.batch, len(labels))
    targets = np.eye(10, dtype=np.float32)[labels]
    random = np.random.default_rng(options.seed)
    weights = initial_weights(random)
    velocity = {name: np.zeros_like(value) for name, value in weights.items()}
    losses: list[float] = []
    accuracy, started = 0.0, time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        last: list[Any] = []
        for batch in batches(images, targets, size, random):
            loss, weights, velocity = context.run(
                train_step, weights, velocity, *batch, options.rate, device=options.device
            )
            last.append(loss)  # not read yet: the device need not be waited for
        losses.append(float(np.mean([float(loss) for loss in last])))
        logits = context.run(classify, weights, test_images, device=options.device)
        accuracy = float((np.argmax(logits, axis=1) == test_labels).mean())
        if not options.quiet:
            line = f"epoch {epoch:2}/{options.epochs}  loss {losses[-1]:.4f}  accuracy {accuracy:.1%}"
            show(line, is_last=epoch == options.epochs)
    return {
        "device": weights["w1"].device,
        "accuracy": accuracy,
        "losses": losses,
        "seconds": time.perf_counter() - started,
    }


def positive(text: str) -> int:
    """Parse a count of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train on handwritten digits with kernels, on any device.")
    parser.add_argument("--device", default="auto", help="cpu, opencl, cuda:1, …; default: wherever it is fastest")
    parser.add_argument("--epochs", type=positive, default=12, help="passes over the data (%(default)s)")
    parser.add_argument("--batch", type=positive, default=64, help="images of one step (%(default)s)")
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help="learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="split, initial weights and batches (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="print the last line only")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the results as JSON")
    return parser.parse_args()


def main() -> None:
    """Train, report."""
    options = parse_options()
    try:
        with sparkle.init(None if options.device == "auto" else options.device) as context:
            report = train(context, options)
        if options.report:
            options.report.write_text(json.dumps(report, indent=1) + "\n")
    except (SparkleError, OSError) as error:
        sys.exit(f"digits_kernels.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(
        f"{report['device']}: accuracy {report['accuracy']:.1%} on held-out digits "
        f"after {options.epochs} epochs in {report['seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
