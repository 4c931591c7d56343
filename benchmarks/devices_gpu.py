"""Measure generated kernels on a GPU: beside kernels written by hand, and beside what CuPy does.

    python benchmarks/devices_gpu.py --json devices_gpu.json
    python benchmarks/devices_gpu.py --quick

Contenders of one computation take turns in rounds, by the device's own clock; their results are compared first. A ratio
above 1 means that Sparkle is ahead. "of limit" is the share of the speed at which the device copies as many bytes, or,
for products of matrices, of its library. Arrays are larger than the caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _figures import format_seconds, format_size, make_table, ratio_per_round, spread

from sparkle_mesh.devices.device import Device, Memory
from sparkle_mesh.devices.registry import default_registry
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.generated_executor import GeneratedExecutor, PreparedProgram
from sparkle_mesh.kernels.graph import GraphBuilder, WeakScalar
from sparkle_mesh.kernels.ops import TensorType

ELEMENTS, QUICK_ELEMENTS = 1 << 26, 1 << 22
MATRIX_SIDE, QUICK_MATRIX_SIDE = 4096, 512
ROUNDS, QUICK_ROUNDS = 15, 3
# So long each sample takes, in runs that follow each other.
SAMPLE_S = 0.01
LAUNCHES = 2000
# What two contenders' results may differ by.
TOLERANCE = 1e-4

Call = Callable[[], object]
Build = Callable[[GraphBuilder], int]

# Two words of each array in flight for each thread: as good as a kernel for this alone can be written.
_BY_HAND = r"""
extern "C" __global__ void __launch_bounds__(256)
scale_add(const float4* __restrict__ x, const float4* __restrict__ y, float4* __restrict__ out, int words) {
  const int first = blockIdx.x * 512 + threadIdx.x;
  if (first + 256 < words) {
    const float4 a = x[first], b = x[first + 256], c = y[first], d = y[first + 256];
    out[first] = make_float4(a.x * 2 + c.x, a.y * 2 + c.y, a.z * 2 + c.z, a.w * 2 + c.w);
    out[first + 256] = make_float4(b.x * 2 + d.x, b.y * 2 + d.y, b.z * 2 + d.z, b.w * 2 + d.w);
  } else if (first < words) {
    const float4 a = x[first], c = y[first];
    out[first] = make_float4(a.x * 2 + c.x, a.y * 2 + c.y, a.z * 2 + c.z, a.w * 2 + c.w);
  }
}
"""


@dataclass
class Case:
    """One computation: ours, and what returns the same in an array of CuPy's."""

    what: str
    nbytes: int
    traffic_bytes: int
    ours: Call
    result: Any
    peers: Mapping[str, Callable[[], Any]]


def gpu_rows(*, elements: int = ELEMENTS, rounds: int = ROUNDS, quick: bool = False) -> list[dict[str, Any]]:
    """Measure everything on the first GPU that CuPy serves; return a row for each peer.

    Raises
    ------
    RuntimeError
        If there is none.
    """
    registry = default_registry()
    device = next(iter(registry.devices("cuda") + registry.devices("rocm")), None)
    if device is None:
        raise RuntimeError("no GPU: these measurements need an NVIDIA or AMD one, and CuPy")
    copy_bytes_per_s = _copy_speed(device, elements)
    rows: list[dict[str, Any]] = []
    for case in _Cases(device, elements, QUICK_MATRIX_SIDE if quick else MATRIX_SIDE).all():
        rows += _rows(device, case, rounds, copy_bytes_per_s)
    rows.append(_launch_row(device, rounds))
    return rows


def _copy_speed(device: Device, elements: int) -> float:
    source, target = device.allocate(4 * elements), device.allocate(4 * elements)
    device.clear(source)
    device.copy_between(source, target)
    taken = min(device.measure(lambda: [device.copy_between(source, target) for _ in range(20)]) / 20 for _ in range(5))
    device.free(source)
    device.free(target)
    return 2 * 4 * elements / taken


def _rows(device: Device, case: Case, rounds: int, copy_bytes_per_s: float) -> list[dict[str, Any]]:
    contenders: dict[str, Call] = {"ours": case.ours, **case.peers}
    case.ours()
    for name, peer in case.peers.items():
        wanted = peer().reshape(-1)
        worst = float(abs(case.result - wanted).max() / max(float(abs(wanted).max()), 1e-30))
        if not worst < TOLERANCE:
            raise RuntimeError(f"{case.what}: ours and {name} differ by {worst:.1e} of the largest")
    repeats = {name: max(1, int(SAMPLE_S / max(device.measure(call), 1e-7))) for name, call in contenders.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append([_measured(device, contenders[name], repeats[name]) for _ in range(3)])
    limit_s = case.traffic_bytes / copy_bytes_per_s
    return [_row(device, case, samples["ours"], name, samples[name], limit_s) for name in case.peers]


def _measured(device: Device, call: Call, repeats: int) -> float:
    return device.measure(lambda: [call() for _ in range(repeats)]) / repeats


def _row(
    device: Device, case: Case, own: list[list[float]], peer: str, other: list[list[float]], limit_s: float
) -> dict[str, Any]:
    flat, peer_flat = ([one for turn in turns for one in turn] for turns in (own, other))
    ours_s, peer_s = statistics.median(flat), statistics.median(peer_flat)
    return (
        {"device": str(device), "card": device.name, "what": case.what, "bytes": case.nbytes, "into": "given"}
        | {"ours_s": ours_s, "ours_spread": spread(flat), "peer": peer, "peer_s": peer_s}
        | {"peer_spread": spread(peer_flat), "ratio": peer_s / ours_s, "ratio_per_round": ratio_per_round(own, other)}
        | {"bytes_per_s": case.traffic_bytes / ours_s, "limit": "copy", "limit_s": limit_s}
        | {"of_limit": limit_s / ours_s, "iterations": len(flat)}
    )


class _Cases:
    def __init__(self, device: Device, elements: int, side: int) -> None:
        import cupy

        self._cupy, self._device, self._side = cupy, device, side
        self._executor = GeneratedExecutor(device)
        self._rows = max(elements // 8192, 1)
        self._elements = self._rows * 8192
        self._x, self._y = self._drawn(self._elements, 1), self._drawn(self._elements, 2)
        self._line = self._drawn(8192, 3)

    def _drawn(self, count: int, seed: int) -> Memory:
        memory = self._device.allocate(4 * count)
        self._device.copy_from_host(memory, np.random.default_rng(seed).standard_normal(count, dtype=np.float32))
        return memory

    def _view(self, memory: Memory, *shape: int) -> Any:
        return self._device.view(memory, "float32", int(np.prod(shape)), memory).reshape(shape)

    def _ours(self, build: Build, *inputs: tuple[Memory, tuple[int, ...]]) -> tuple[Call, Any]:
        """Return what computes a graph of float32 arrays into given memory, and that memory as an array."""
        builder = GraphBuilder([TensorType(shape, "float32") for _, shape in inputs])
        program = fuse(builder.finish([build(builder)]))
        prepared: PreparedProgram = self._executor.prepare(program)
        blocks: list[Memory | None] = [memory for memory, _ in inputs]
        blocks += [None] * (len(program.blocks) - len(blocks))
        (output,) = program.outputs
        result = blocks[output] = self._device.allocate(program.blocks[output].nbytes)
        return lambda: prepared.run(blocks), self._view(result, program.blocks[output].size)

    def all(self) -> list[Case]:
        """Return all computations."""
        return [self._scale_add(), self._chain(), self._line_add(), *self._sums(), self._softmax(), *self._products()]

    def _scale_add(self) -> Case:
        cupy, count = self._cupy, self._elements
        ours, result = self._ours(
            lambda b: b.elementwise("add", b.elementwise("multiply", 0, WeakScalar(2.0)), 1),
            (self._x, (count,)),
            (self._y, (count,)),
        )
        x, y, out = self._view(self._x, count), self._view(self._y, count), cupy.empty(count, "float32")
        by_hand = cupy.RawKernel(_BY_HAND, "scale_add")
        fused = cupy.ElementwiseKernel("float32 x, float32 y", "float32 z", "z = x * 2 + y", "sparkle_scale_add")

        def hand() -> Any:
            by_hand((-(-count // 2048),), (256,), (x, y, out, np.int32(count // 4)))
            return out

        def plain() -> Any:
            cupy.multiply(x, 2, out=out)
            return cupy.add(out, y, out=out)

        peers = {"by hand, float4": hand, "cupy.ElementwiseKernel": lambda: fused(x, y, out), "cupy": plain}
        return Case("x * 2 + y", 4 * count, 12 * count, ours, result, peers)

    def _chain(self) -> Case:
        cupy, count = self._cupy, self._elements
        half = WeakScalar(0.5)

        def build(b: GraphBuilder) -> int:
            gate = b.elementwise("tanh", b.elementwise("add", b.elementwise("multiply", 0, 1), half))
            return b.elementwise("multiply", b.elementwise("add", gate, half), 0)

        ours, result = self._ours(build, (self._x, (count,)), (self._y, (count,)))
        x, y, out = self._view(self._x, count), self._view(self._y, count), cupy.empty(count, "float32")
        text = "z = (tanhf(x * y + 0.5f) + 0.5f) * x"
        fused = cupy.ElementwiseKernel("float32 x, float32 y", "float32 z", text, "sparkle_chain")
        peers = {
            "cupy.ElementwiseKernel": lambda: fused(x, y, out),
            "cupy": lambda: (cupy.tanh(x * y + 0.5) + 0.5) * x,
        }
        return Case("(tanh(x * y + 0.5) + 0.5) * x", 4 * count, 12 * count, ours, result, peers)

    def _line_add(self) -> Case:
        cupy, shape = self._cupy, (self._rows, 8192)
        ours, result = self._ours(lambda b: b.elementwise("add", 0, 1), (self._x, shape), (self._line, (8192,)))
        x, line, out = self._view(self._x, *shape), self._view(self._line, 8192), cupy.empty(shape, "float32")
        peers = {"cupy": lambda: cupy.add(x, line, out=out)}
        return Case("x + line", 4 * self._elements, 8 * self._elements, ours, result, peers)

    def _sums(self) -> list[Case]:
        cupy, shape = self._cupy, (self._rows, 8192)
        x = self._view(self._x, *shape)
        cases = []
        for name, axes in (("sum(x * x)", None), ("sum(x)", None), ("sum(x, 0)", 0), ("sum(x, 1)", 1)):
            is_square = name == "sum(x * x)"

            def build(b: GraphBuilder, axes: int | None = axes, is_square: bool = is_square) -> int:
                value = b.elementwise("square", 0) if is_square else 0
                return b.reduce("sum", value, None if axes is None else [axes])

            ours, result = self._ours(build, (self._x, shape))

            def by(accelerators: list[str], axes: int | None = axes, is_square: bool = is_square) -> Any:
                cupy._core.set_reduction_accelerators(accelerators)
                if is_square:
                    return cupy.dot(x.reshape(-1), x.reshape(-1)) if accelerators else (x * x).sum()
                return x.sum(axis=axes)

            library = "cupy.dot" if is_square else "cupy with CUB"
            peers = {library: partial(by, ["cub"]), "cupy": partial(by, [])}
            cases.append(Case(name, 4 * self._elements, 4 * self._elements, ours, result, peers))
        return cases

    def _softmax(self) -> Case:
        shape = (self._rows, 8192)

        def build(b: GraphBuilder) -> int:
            top = b.reduce("max", 0, [1], keepdims=True)
            weight = b.elementwise("exp", b.elementwise("subtract", 0, top))
            return b.elementwise("divide", weight, b.reduce("sum", weight, [1], keepdims=True))

        ours, result = self._ours(build, (self._x, shape))
        x, cupy = self._view(self._x, *shape), self._cupy

        def peer() -> Any:
            weight = cupy.exp(x - x.max(axis=1, keepdims=True))
            return weight / weight.sum(axis=1, keepdims=True)

        return Case("softmax(x)", 4 * self._elements, 8 * self._elements, ours, result, {"cupy": peer})

    def _products(self) -> list[Case]:
        side = self._side
        a, b = self._drawn(side * side, 4), self._drawn(side * side, 5)
        one, other = self._view(a, side, side), self._view(b, side, side)
        shape = (side, side)
        cases = []
        for name, exchanged in (("a @ b", False), ("a.T @ b", True)):

            def build(g: GraphBuilder, exchanged: bool = exchanged) -> int:
                return g.matmul(g.transpose(0) if exchanged else 0, 1)

            ours, result = self._ours(build, (a, shape), (b, shape))
            left = one.T if exchanged else one
            peers = {"cupy": partial(self._cupy.matmul, left, other)}
            cases.append(Case(name, 4 * side * side, 12 * side * side, ours, result, peers))
        return cases


def _launch_row(device: Device, rounds: int) -> dict[str, Any]:
    """Measure what the host takes to queue a small kernel, beside CuPy's own launch of one."""
    import cupy

    count = 1024
    builder = GraphBuilder([TensorType((count,), "float32")] * 2)
    total = builder.elementwise("add", builder.elementwise("multiply", 0, WeakScalar(2.0)), 1)
    prepared = GeneratedExecutor(device).prepare(fuse(builder.finish([total])))
    blocks: list[Memory | None] = [device.allocate(4 * count) for _ in range(3)]
    x, y, out = (cupy.ones(count, "float32") for _ in range(3))
    by_hand = cupy.RawKernel(_BY_HAND, "scale_add")
    words = np.int32(count // 4)
    contenders: dict[str, Call] = {
        "ours": lambda: prepared.run(blocks),
        "cupy.RawKernel": lambda: by_hand((1,), (256,), (x, y, out, words)),
    }
    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            device.synchronize()
            started = time.perf_counter()
            for _ in range(LAUNCHES):
                call()
            taken = (time.perf_counter() - started) / LAUNCHES
            if turn:
                samples[name].append([taken])
    case = Case("a launch, on the host", 4 * count, 0, contenders["ours"], out, {})
    limit_s = min(one[0] for one in samples["cupy.RawKernel"])
    row = _row(device, case, samples["ours"], "cupy.RawKernel", samples["cupy.RawKernel"], limit_s)
    return row | {"limit": "cupy.RawKernel"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small arrays and few rounds: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, for programs")
    options = parser.parse_args(arguments)
    elements, rounds = (QUICK_ELEMENTS, QUICK_ROUNDS) if options.quick else (ELEMENTS, ROUNDS)
    try:
        rows = gpu_rows(elements=elements, rounds=rounds, quick=options.quick)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(rows[0]["device"], rows[0]["card"])
    header = ("what", "size", "ours", "GB/s", "peer", "median", "ratio", "by round", "of limit")
    lines = [
        [
            row["what"],
            format_size(row["bytes"]),
            format_seconds(row["ours_s"]),
            f"{row['bytes_per_s'] / 1e9:.0f}",
            row["peer"],
            format_seconds(row["peer_s"]),
            f"{row['ratio']:.3f}",
            f"{min(row['ratio_per_round']):.2f} - {max(row['ratio_per_round']):.2f}",
            f"{row['of_limit']:.0%}",
        ]
        for row in rows
    ]
    print(make_table(header, lines))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
