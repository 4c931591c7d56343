"""One kernel shared by unequal devices, beside the better of them alone: ``python benchmarks/devices_shared.py``.

On a machine without a GPU the second device is PoCL on one core, and the CPU's device has one thread: two devices of
about a core each. Every kernel is run alone on each device and shared, in turns; what the model expected is printed
beside what it took, and how far it was off at the median. Operands are in the host's memory. Results are where they
are computed: on the device, or, of shared work, in the host's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before PoCL is loaded: it takes one core, not those of the CPU's device.
os.environ.setdefault("POCL_CPU_MAX_CU_COUNT", "1")
os.environ.setdefault("POCL_MAX_PTHREAD_COUNT", "1")

import numpy as np

import sparkle_mesh as sparkle


@sparkle.kernel
def polynomial(x: Any, y: Any) -> Any:
    """Many operations for each element, none of them transcendental."""
    for _ in range(8):
        x = x * y + 0.5
        y = y * x - 0.25
    return x + y


@sparkle.kernel
def curve(x: Any, y: Any) -> Any:
    """What a user might write."""
    return np.tanh(2 * x + y * y) * x


@sparkle.kernel
def norms(x: Any, y: Any) -> Any:
    """A sum for each row."""
    return (x * x + y * y).sum(axis=1)


@sparkle.kernel
def waves(x: Any, y: Any) -> Any:
    """What neither NumPy nor PoCL has vector instructions for, in float64."""
    return np.sin(x) * np.cos(y)


@sparkle.kernel
def lengths(x: Any, y: Any) -> Any:
    """The same, with a square root."""
    return np.hypot(x, y)


@sparkle.kernel
def product(x: Any, y: Any) -> Any:
    """A matrix product."""
    return x @ y.T


def cases(is_quick: bool, product_sizes: Sequence[int]) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """Return kernels with operands: small and large."""
    draw = np.random.default_rng(0).standard_normal
    found: list[tuple[str, Any, tuple[Any, ...]]] = []
    for rows in (20_000,) if is_quick else (20_000, 100_000, 500_000):
        x, y = (draw((rows, 100)).astype("float32") * 0.1 for _ in range(2))
        found += [(f"{k.name} {rows}x100", k, (x, y)) for k in (polynomial, curve, norms)]
        if rows <= 100_000:
            x, y = x.astype("float64"), y.astype("float64")
            found += [(f"{k.name} {rows}x100", k, (x, y)) for k in (waves, lengths)]
    for size in product_sizes:
        a, b = (draw((size, size)).astype("float32") for _ in range(2))
        found.append((f"product {size}", product, (a, b)))
    return found


def seconds_of(work: Callable[[], object]) -> float:
    """Return what ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Case:
    """One kernel in turns on each device, and as the context chooses."""

    def __init__(self, context: sparkle.Context, name: str, kernel: Any, operands: tuple[Any, ...]) -> None:
        self.context, self.name, self.kernel, self.operands = context, name, kernel, operands

    def run(self, device: str | list[str]) -> None:
        """Run it, to the end of the work."""
        self.context.run(self.kernel, *self.operands, device=device)
        self.context.synchronize()

    def measure(self, rounds: int) -> dict[str, Any]:
        """Return one row."""
        devices = [str(device) for device in self.context.devices]
        ways: dict[str, str | list[str]] = {**{device: device for device in devices}, "auto": "auto", "told": devices}
        # The first runs make kernels ready and tell the model what they take.
        for _ in range(9):
            for way in ways.values():
                self.run(way)
        chosen = self.context.explain(self.kernel, *self.operands).chosen
        expected = {str(choice.name): choice.seconds for choice in self._choices()}
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, times in took.items():
                times.append(seconds_of(lambda way=ways[name]: self.run(way)))  # type: ignore[misc]
        medians = {device: statistics.median(times) for device, times in took.items()}
        best = min(devices, key=lambda device: medians[device])
        return {
            "what": self.name,
            "link": chosen.name,
            "ranks": len(chosen.devices),
            "bytes": sum(operand.nbytes for operand in self.operands),
            "ours_s": medians["auto"],
            "peer": f"{best} alone",
            "peer_s": medians[best],
            "ratio": medians[best] / medians["auto"],
            "alone_s": {device: medians[device] for device in devices},
            "told_s": medians["told"],
            "told_ratio": medians[best] / medians["told"],
            "expected_s": chosen.seconds,
            "model_error": abs(chosen.seconds - medians["auto"]) / medians["auto"],
            "alone_errors": [abs(expected[device] - medians[device]) / medians[device] for device in devices],
        }

    def _choices(self) -> Sequence[Any]:
        return self.context.explain(self.kernel, *self.operands).choices


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; exit code 1 if sharing that was chosen is slower than the better device alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of which medians are taken (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--device", help="the second device (default: cuda if there is one, else opencl)")
    parser.add_argument("--threads", type=int, help="of the CPU's device (default: 1 beside PoCL, else all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, for programs")
    options = parser.parse_args(arguments)
    with sparkle.Context() as context:
        kinds = [device.kind for device in context.devices]
    second = options.device or ("cuda" if "cuda" in kinds else "opencl")
    threads = options.threads or (1 if second == "opencl" else None)
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        sparkle.Context([second], data_dir=folder, threads=threads) as context,
    ):
        names = [str(device) for device in context.devices]
        head = "".join(f"{name:>11}" for name in names)
        print(f"{'what':22}{head}{'both, told':>14}   left to itself, on{'':15}{'took':>8}{'expected':>11}  faster")
        # PoCL takes a hundred times as long for a product as NumPy's BLAS.
        product_sizes = (512,) if options.quick else (1024,) if second == "opencl" else (1024, 2048, 4096)
        for name, kernel, operands in cases(options.quick, product_sizes):
            row = Case(context, name, kernel, operands).measure(options.rounds)
            rows.append(row)
            print(
                f"{row['what']:22}"
                + "".join(f"{row['alone_s'][name] * 1e3:8.2f} ms" for name in names)
                + f"{row['told_s'] * 1e3:11.2f} ms   {row['link']:30}{row['ours_s'] * 1e3:8.2f} ms"
                f"{row['expected_s'] * 1e3:8.2f} ms   {row['ratio']:.2f}"
            )
    errors = [row["model_error"] for row in rows] + [error for row in rows for error in row["alone_errors"]]
    print(f"the model is off by {statistics.median(errors):.0%} at the median (goal: under 25%)")
    shared = [row for row in rows if row["ranks"] > 1]
    slower = [row["what"] for row in shared if row["ratio"] < 1]
    print(
        f"{len(shared)} of {len(rows)} are shared; slower than the better device alone: {', '.join(slower) or 'none'}"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
