"""Kernels on a CUDA GPU, through CuPy: beside hand-written kernels, CuPy's own fusion, CUB and cuBLAS.

Times are of the GPU's clock, over launches that follow each other without a gap; what launches cost the host is
measured apart.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from _figures import ratio_per_round, spread

import sparkle_mesh as sparkle
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.generated_executor import GeneratedExecutor

ELEMENTS, QUICK_ELEMENTS = 1 << 26, 1 << 22
LAUNCHES, WALL_LAUNCHES, SMALL_COUNT = 20, 2000, 1024
SIDES, QUICK_SIDES = (1024, 2048, 4096, 8192), (1024,)
GROUP = 256
HAND_WRITTEN = """
extern "C" __global__ void by_hand(
    const float4* __restrict__ x, const float4* __restrict__ y, float4* __restrict__ out, long long count) {
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < count) {
    const float4 a = x[i], b = y[i];
    float4 c;
    %s
    out[i] = c;
  }
}
"""


def has_gpu() -> bool:
    """Whether CuPy is installed and finds a GPU."""
    if importlib.util.find_spec("cupy") is None:
        return False
    with sparkle.Context() as context:
        return any(device.kind == "cuda" for device in context.devices)


@dataclass
class Race:
    """One computation and who does it.

    Attributes
    ----------
    nbytes, flops
        What is moved, or computed, at least.
    limit_s
        What the device needs for that.
    """

    what: str
    nbytes: int
    limit: str
    limit_s: float
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]

    def rows(self, rounds: int, measure: Callable[[Callable[[], object]], float]) -> list[dict[str, Any]]:
        """Let all take turns; return a row for each peer."""
        contenders = {"ours": self.ours, **self.peers}
        samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
        for call in contenders.values():
            call()
        for _ in range(rounds):
            for name, call in contenders.items():
                samples[name].append([measure(call) for _ in range(3)])
        flat = {name: [one for some in times for one in some] for name, times in samples.items()}
        ours_s = statistics.median(flat["ours"])
        return [
            {
                "device": "cuda",
                "what": self.what,
                "link": "cuda",
                "ranks": 1,
                "bytes": self.nbytes,
                "into": "given",
                "ours_s": ours_s,
                "ours_spread": spread(flat["ours"]),
                "peer": name,
                "peer_s": statistics.median(flat[name]),
                "peer_spread": spread(flat[name]),
                "ratio": statistics.median(flat[name]) / ours_s,
                "ratio_per_round": ratio_per_round(samples["ours"], samples[name]),
                "limit": self.limit,
                "of_limit": self.limit_s / ours_s,
            }
            for name in self.peers
        ]


def gpu_rows(*, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """Return the rows of the first GPU."""
    elements = QUICK_ELEMENTS if quick else ELEMENTS
    with tempfile.TemporaryDirectory() as folder, sparkle.Context(["cuda"], data_dir=folder) as context:
        bench = _Bench(context)
        races = bench.bandwidth(elements)
        rows = [row for race in races for row in race.rows(rounds, bench.gpu_s)]
        for dtype in ("float16", "float32", "float64"):
            for side in QUICK_SIDES if quick else SIDES:
                rows += bench.product(dtype, side).rows(max(rounds // 3, 1), bench.gpu_s)
        rows += bench.launches().rows(rounds, bench.wall_s)
        return rows


class _Bench:
    def __init__(self, context: sparkle.Context) -> None:
        import cupy

        self.cupy, self.context = cupy, context
        self.gpu = context.device("cuda")
        self.executor = GeneratedExecutor(self.gpu)

    def gpu_s(self, call: Callable[[], object]) -> float:
        """Return the seconds of the GPU that one call takes, among others."""
        started, ended = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        started.record()
        for _ in range(LAUNCHES):
            call()
        ended.record()
        ended.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(started, ended)) / 1e3 / LAUNCHES

    def wall_s(self, call: Callable[[], object]) -> float:
        """Return the seconds of the host that one call takes."""
        self.gpu.synchronize()
        started = time.perf_counter()
        for _ in range(WALL_LAUNCHES):
            call()
        seconds = time.perf_counter() - started
        self.gpu.synchronize()
        return seconds / WALL_LAUNCHES

    def drawn(self, count: int, seed: int) -> sparkle.Array:
        """Return random float32 numbers on the GPU."""
        return self.context.array((count,), device=self.gpu).fill_random(seed)

    def prepared(self, function: Callable[..., Any], *operands: sparkle.Array) -> Callable[[], object]:
        """Return what runs ``function`` into memory that is there."""
        graph = sparkle.kernel(function).trace(*operands)
        program = fuse(graph)
        prepared = self.executor.prepare(program)
        outputs = [self.context.allocate(tensor.size, tensor.dtype, self.gpu) for tensor in graph.output_types]
        blocks: list[Any] = [None] * len(program.blocks)
        for number, operand in enumerate(operands):
            blocks[number] = operand.buffer_on(self.gpu).memory
        for number, output in zip(program.outputs, outputs, strict=True):
            blocks[number] = output.memory
        # The buffers live as long as the call.
        return lambda kept=(operands, outputs): prepared.run(blocks)  # type: ignore[misc]

    def by_hand(self, expression: str, x: Any, y: Any, out: Any) -> Callable[[], object]:
        """Return what runs a kernel with four elements to a thread."""
        lanes = (expression.replace("X", f"a.{lane}").replace("Y", f"b.{lane}") for lane in "xyzw")
        body = " ".join(f"c.{lane} = {text};" for lane, text in zip("xyzw", lanes, strict=True))
        kernel = self.cupy.RawModule(code=HAND_WRITTEN % body).get_function("by_hand")
        count = x.size // 4
        arguments = (x, y, out, np.int64(count))
        return lambda: kernel((-(-count // GROUP),), (GROUP,), arguments)

    def bandwidth(self, elements: int) -> list[Race]:
        """Return what is bound by memory."""
        cupy = self.cupy
        one, other = self.drawn(elements, 1), self.drawn(elements, 2)
        x, y = cupy.from_dlpack(one), cupy.from_dlpack(other)
        out = cupy.empty_like(x)
        copy_s = min(self.gpu_s(lambda: cupy.copyto(out, x)) for _ in range(5))
        per_byte_s = copy_s / (2 * x.nbytes)

        @cupy.fuse()  # type: ignore[untyped-decorator]
        def fused_simple(x: Any, y: Any) -> Any:
            return 2 * x + y

        @cupy.fuse()  # type: ignore[untyped-decorator]
        def fused_curve(x: Any, y: Any) -> Any:
            return cupy.tanh(2 * x + y * y) * x

        def cub_sum() -> Any:
            cupy._core.set_reduction_accelerators(["cub"])
            return x.sum()

        def plain_sum() -> Any:
            cupy._core.set_reduction_accelerators([])
            return x.sum()

        moved = 3 * x.nbytes
        return [
            Race(
                "2x + y",
                moved,
                "copy",
                moved * per_byte_s,
                self.prepared(lambda x, y: 2 * x + y, one, other),
                {"hand-written": self.by_hand("2.0f * X + Y", x, y, out), "cupy.fuse": lambda: fused_simple(x, y)},
            ),
            Race(
                "tanh(2x + yy)x",
                moved,
                "copy",
                moved * per_byte_s,
                self.prepared(lambda x, y: np.tanh(2 * x + y * y) * x, one, other),
                {
                    "hand-written": self.by_hand("tanhf(2.0f * X + Y * Y) * X", x, y, out),
                    "cupy.fuse": lambda: fused_curve(x, y),
                },
            ),
            Race(
                "sum",
                x.nbytes,
                "copy",
                x.nbytes * per_byte_s,
                self.prepared(lambda x: x.sum(), one),
                {"cupy, CUB": cub_sum, "cupy": plain_sum},
            ),
        ]

    def product(self, dtype: str, side: int) -> Race:
        """Return a product of square matrices."""
        one = self.context.array((side, side), dtype, device=self.gpu).fill_random(1)
        x = self.cupy.from_dlpack(one)
        out = self.cupy.empty_like(x)
        ours = self.prepared(lambda a: a @ a, one)
        peers = {"cupy.matmul": lambda: self.cupy.matmul(x, x, out=out)}
        return Race(f"a @ b {dtype} {side}", 3 * x.nbytes, "", 0.0, ours, peers)

    def launches(self) -> Race:
        """Return a kernel that is over before the next is launched."""
        one, other = self.drawn(SMALL_COUNT, 1), self.drawn(SMALL_COUNT, 2)
        x, y = self.cupy.from_dlpack(one), self.cupy.from_dlpack(other)
        out = self.cupy.empty_like(x)
        ours = self.prepared(lambda x, y: 2 * x + y, one, other)
        peers = {"cupy, a launch": self.by_hand("2.0f * X + Y", x, y, out), "cupy, 2x + y": lambda: 2 * x + y}
        return Race("launch", 3 * x.nbytes, "", 0.0, ours, peers)
