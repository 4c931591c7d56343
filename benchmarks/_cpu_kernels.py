"""Kernels on processors: what they take, beside what a user would write, and beside what the machine allows."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from _figures import ratio_per_round, spread

import sparkle_mesh as sparkle
from sparkle_mesh.kernels.cpu_executor import CpuExecutor
from sparkle_mesh.kernels.fusion import fuse

Array = np.ndarray[Any, Any]
Call = Callable[[], object]

#: Of matrices that are multiplied, and of arrays that fit into a cache many times over.
GEMM_SIDE, QUICK_GEMM_SIDE, SMALL_COUNT = 2048, 512, 1000
CACHED_COUNT = 16384
# So that what takes microseconds is measured over some milliseconds.
SAMPLE_S = 0.002
WARM_UPS_COUNT = 5


@dataclass
class Case:
    """One computation.

    Attributes
    ----------
    traffic_bytes
        What is read and written at least.
    ours
        By name: into memory that is given, or as ``Context.run`` has it, in memory of the context's own.
    peers
        By name; with the name of that one of ours which does the same.
    cached
        The same by NumPy, on ``CACHED_COUNT`` elements: what its operations take beside the memory. None if unknown.
    """

    what: str
    nbytes: int
    traffic_bytes: int
    ours: dict[str, Call]
    peers: dict[str, tuple[str, Call]]
    cached: Call | None = None
    elements: int = 0
    samples: dict[str, list[list[float]]] = field(default_factory=dict)


def cpu_rows(*, elements: int, rounds: int, threads: int | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """Measure everything in rounds, in which all contenders take turns; return a row for each peer."""
    ours = Ours(threads)
    try:
        copy_bytes_per_s = copy_speed(ours.threads, elements)
        cases = _cases(ours.of, elements, QUICK_GEMM_SIDE if quick else GEMM_SIDE)
        rows: list[dict[str, Any]] = []
        for case in cases:
            _measure(case, rounds)
            rows += _rows_of(case, ours.threads, copy_bytes_per_s)
        return rows
    finally:
        ours.close()


def copy_speed(threads: int, elements: int) -> float:
    """Return how many bytes per second all threads together read and write when they copy; the best of several."""
    source, target = np.ones(elements, np.float32), np.zeros(elements, np.float32)
    cuts = np.linspace(0, elements, threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            wait([pool.submit(np.copyto, target[a:b], source[a:b]) for a, b in pairwise(cuts)])

        return 2 * source.nbytes / min(_seconds(copy) for _ in range(15))


def _measure(case: Case, rounds: int) -> None:
    contenders = {**case.ours, **{name: call for name, (_, call) in case.peers.items()}}
    repeats = {}
    # Compilers work beside the first calls.
    for call in [*contenders.values()] * WARM_UPS_COUNT:
        call()
    for name, call in contenders.items():
        repeats[name] = max(1, int(SAMPLE_S / max(_seconds(call), 1e-9)))
    for turn in range(rounds):
        names = list(contenders)
        # Whoever comes after another finds the caches as that one has left them.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            case.samples.setdefault(name, []).append([_seconds(contenders[name], repeats[name]) for _ in range(3)])


def _seconds(call: Call, repeats: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def _rows_of(case: Case, threads: int, copy_bytes_per_s: float) -> list[dict[str, Any]]:
    memory_s = case.traffic_bytes / copy_bytes_per_s
    limit, limit_s = "copy", memory_s
    if case.cached is not None:
        cached_s = min(_seconds(case.cached, 20) for _ in range(15)) * case.elements / CACHED_COUNT / threads
        if cached_s > memory_s:
            limit, limit_s = "operations", cached_s
    rows = []
    for peer, (ours, _) in case.peers.items():
        own, other = case.samples[ours], case.samples[peer]
        flat, peer_flat = ([one for turn in turns for one in turn] for turns in (own, other))
        ours_s, peer_s = statistics.median(flat), statistics.median(peer_flat)
        rows.append(
            {"device": "cpu", "what": case.what, "link": "memory", "ranks": 1, "bytes": case.nbytes}
            | {"threads": threads, "into": ours, "ours_s": ours_s, "ours_spread": spread(flat)}
            | {"peer": peer, "peer_s": peer_s, "peer_spread": spread(peer_flat), "ratio": peer_s / ours_s}
            | {"ratio_per_round": ratio_per_round(own, other), "bytes_per_s": case.traffic_bytes / ours_s}
            | {"limit": limit, "limit_s": limit_s, "of_limit": limit_s / ours_s, "iterations": len(flat)}
        )
    return rows


# --- What is computed -----------------------------------------------------------------------------


@sparkle.kernel
def _twice_plus(x: Any, y: Any) -> Any:
    return 2 * x + y


@sparkle.kernel
def _tanh(x: Any, y: Any) -> Any:
    return np.tanh(2 * x + y * y) * x


@sparkle.kernel
def _distance(x: Any, y: Any) -> Any:
    return np.square(x - y).sum()


@sparkle.kernel
def _rows(x: Any) -> Any:
    return x.sum(axis=1)


@sparkle.kernel
def _columns(x: Any) -> Any:
    return x.sum(axis=0)


@sparkle.kernel
def _softmax(x: Any) -> Any:
    weight = np.exp(x - x.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


@sparkle.kernel
def _product(a: Any, b: Any) -> Any:
    return a @ b


class Ours:
    """Two ways to run kernels: as users do, and into memory that is given, which no call of theirs has."""

    def __init__(self, threads: int | None) -> None:
        self._context = sparkle.Context(["cpu"], threads=threads)
        self._executor = CpuExecutor(threads)
        self.threads = self._executor.threads

    def close(self) -> None:
        """End their threads."""
        self._executor.close()
        self._context.close()

    def of(self, kernel: Any, *arrays: Array) -> dict[str, Call]:
        """Return both ways to run ``kernel``."""
        graph = kernel.trace(*arrays)
        program = fuse(graph)
        prepared = self._executor.prepare(program)
        blocks: list[Array | None] = [*(array.reshape(-1) for array in arrays)]
        blocks += [None] * (len(program.blocks) - len(blocks))
        (output,) = program.outputs
        blocks[output] = np.zeros(graph.output_types[0].size, np.float32)
        return {"given": lambda: prepared.run(blocks), "run": lambda: self._context.run(kernel, *arrays)}


def _numpy_softmax(x: Array) -> Array:
    weight = np.exp(x - x.max(1, keepdims=True))
    found: Array = weight / weight.sum(1, keepdims=True)
    return found


def _cases(mine: Callable[..., dict[str, Call]], elements: int, gemm_side: int) -> list[Case]:
    source = np.random.default_rng(0)
    side = int(elements**0.5)
    elements = side * side
    x, y = (source.standard_normal(elements, np.float32) for _ in range(2))
    table = x.reshape(side, side)
    out = np.zeros(elements, np.float32)
    few, few_out = x[:SMALL_COUNT].copy(), out[:SMALL_COUNT].copy()
    a, b = (source.standard_normal((gemm_side, gemm_side), np.float32) for _ in range(2))
    product = np.zeros(a.shape, np.float32)
    nbytes = x.nbytes
    cx, cy, ct = x[:CACHED_COUNT].copy(), y[:CACHED_COUNT].copy(), np.zeros(CACHED_COUNT, np.float32)

    def cached_tanh() -> None:
        np.add(np.multiply(cx, np.float32(2), ct), cy * cy, ct)
        np.multiply(np.tanh(ct, ct), cx, ct)

    def numpy_given() -> None:
        np.add(np.multiply(x, np.float32(2), out), y, out)

    cases = [
        Case("2x + y", nbytes, 3 * nbytes, mine(_twice_plus, x, y), {"numpy": ("run", lambda: 2 * x + y)}),
        Case("tanh(2x + yy)x", nbytes, 3 * nbytes, mine(_tanh, x, y), {}, cached_tanh, elements),
        Case("sum((x - y)^2)", nbytes, 2 * nbytes, mine(_distance, x, y), {}),
        Case("sum of rows", nbytes, nbytes, mine(_rows, table), {}),
        Case("sum of columns", nbytes, nbytes, mine(_columns, table), {}),
        Case("softmax of rows", nbytes, 2 * nbytes, mine(_softmax, table), {}),
        Case("a @ b", a.nbytes, 3 * a.nbytes, mine(_product, a, b), {}),
        Case("2x + y, small", few.nbytes, 3 * few.nbytes, mine(_twice_plus, few, few), {}),
    ]
    simple, tanh, distance, rows, columns, softmax, gemm, small = cases
    simple.peers["numpy, given"] = ("given", numpy_given)
    tanh.peers["numpy"] = ("run", lambda: np.tanh(2 * x + y * y) * x)
    distance.peers["numpy"] = ("run", lambda: np.square(x - y).sum())
    rows.peers["numpy"] = ("run", lambda: table.sum(1))
    columns.peers["numpy"] = ("run", lambda: table.sum(0))
    softmax.peers["numpy"] = ("run", lambda: _numpy_softmax(table))
    gemm.peers["numpy, given"] = ("given", lambda: np.matmul(a, b, out=product))
    small.peers["numpy"] = ("run", lambda: 2 * few + few)
    _add_numexpr(simple, tanh, distance, small, {"x": x, "y": y, "few": few, "out": out, "few_out": few_out})
    _add_numba(simple, tanh, distance, x, y, out)
    return cases


def _add_numexpr(simple: Case, tanh: Case, distance: Case, small: Case, arrays: dict[str, Array]) -> None:
    try:
        import numexpr
    except ImportError:
        print("numexpr is not installed, and not measured: pip install -e '.[bench-devices]'", file=sys.stderr)
        return
    out, few_out = arrays["out"], arrays["few_out"]

    def of(text: str, into: Array | None = None) -> Call:
        return lambda: numexpr.evaluate(text, local_dict=arrays, out=into)

    simple.peers["numexpr"] = ("run", of("2*x + y"))
    simple.peers["numexpr, given"] = ("given", of("2*x + y", out))
    tanh.peers["numexpr"] = ("run", of("tanh(2*x + y*y)*x"))
    tanh.peers["numexpr, given"] = ("given", of("tanh(2*x + y*y)*x", out))
    distance.peers["numexpr"] = ("run", of("sum((x - y)**2)"))
    small.peers["numexpr, given"] = ("given", of("2*few + few", few_out))


def _add_numba(simple: Case, tanh: Case, distance: Case, x: Array, y: Array, out: Array) -> None:
    try:
        import numba
    except ImportError:
        print("numba is not installed, and not measured: pip install -e '.[bench-devices]'", file=sys.stderr)
        return
    in_all_cores: Callable[[Callable[..., Any]], Callable[..., Any]] = numba.njit(parallel=True)
    two = np.float32(2)

    @in_all_cores
    def simple_into(x: Array, y: Array, out: Array) -> None:
        for i in numba.prange(x.size):
            out[i] = two * x[i] + y[i]

    @in_all_cores
    def tanh_into(x: Array, y: Array, out: Array) -> None:
        for i in numba.prange(x.size):
            out[i] = np.tanh(two * x[i] + y[i] * y[i]) * x[i]

    @in_all_cores
    def distance_of(x: Array, y: Array) -> Any:
        total = np.float32(0)
        for i in numba.prange(x.size):
            total += (x[i] - y[i]) ** 2
        return total

    simple.peers["numba"] = ("run", lambda: simple_into(x, y, np.empty_like(x)))
    simple.peers["numba, given"] = ("given", lambda: simple_into(x, y, out))
    tanh.peers["numba"] = ("run", lambda: tanh_into(x, y, np.empty_like(x)))
    tanh.peers["numba, given"] = ("given", lambda: tanh_into(x, y, out))
    distance.peers["numba"] = ("run", lambda: distance_of(x, y))
