"""Steps of a program, made ready for processors: elementwise work, copies, and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.devices.c_compiler import CCompiler
from sparkle_mesh.kernels.cpu_body import Frame, compile_body, uniform_values
from sparkle_mesh.kernels.cpu_memory import BlockPool
from sparkle_mesh.kernels.cpu_native import NativeElementwise, in_c
from sparkle_mesh.kernels.cpu_threads import Portions, WorkerThreads
from sparkle_mesh.kernels.cpu_tiles import Access, Array, Blocks, Tiles, tile_of
from sparkle_mesh.kernels.ops import element_strides
from sparkle_mesh.kernels.program import Body, ElementwiseStep, Instruction, MatmulStep, View, WriteStep


@dataclass(frozen=True, slots=True)
class Workplace:
    """What a step is run with."""

    workers: WorkerThreads
    pool: BlockPool
    should_stop: Callable[[], object] | None = None


class PreparedStep(Protocol):
    """A step that can be run any number of times, by several threads at once."""

    def run(self, blocks: Blocks, place: Workplace) -> None:
        """Read and write ``blocks``.

        Raises
        ------
        KernelStoppedError
            If ``place.should_stop`` said so.
        """
        ...


class PreparedElementwise:
    """An :class:`.program.ElementwiseStep`, or anything else that goes from elements to elements."""

    def __init__(
        self, body: Body, results: list[tuple[int, Access]], threads: int, compiler: CCompiler | None = None
    ) -> None:
        self._is_empty = not prod(body.shape)
        if self._is_empty:
            return
        self._body = compile_body(body, results)
        lengths = self._body.lengths
        size = prod(lengths)
        self._alone = size * self._body.weight < limits.CPU_SHARED_MIN_COUNT
        count = self._body.tile_max_count(threads)
        if not self._alone:
            # Enough pieces for all threads, even if they are small.
            count = min(count, max(limits.CPU_TILE_MIN_COUNT, -(-size // threads)))
        strides = [access.strides for _, access in (*self._body.reads, *self._body.targets)]
        self._tiles = Tiles(lengths, tile_of(lengths, strides, count))
        self._scratch_bytes = self._body.scratch_bytes(prod(self._tiles.tile))
        portions = threads * limits.CPU_PORTIONS_PER_THREAD_COUNT
        self._portion = 1 if self._alone else max(1, self._tiles.count // portions)
        self._native: NativeElementwise | None = None
        if compiler is not None and size >= limits.C_RUN_MIN_COUNT and (native := in_c(body, results)) is not None:
            self._native = NativeElementwise(native, compiler, threads, alone=self._alone)

    def run(self, blocks: Blocks, place: Workplace) -> None:
        """See :class:`PreparedStep`."""
        if self._is_empty:
            return
        native = self._native
        if native is not None and native.is_ready() and native.run(blocks, place.workers, place.should_stop):
            return
        body, tiles, portion = self._body, self._tiles, self._portion
        uniform = uniform_values(body, blocks)
        count = tiles.count

        def work(portions: Portions) -> None:
            scratch = place.pool.take(self._scratch_bytes)
            try:
                frame = Frame(body, blocks, uniform, scratch)
                for number in portions:
                    for piece in range(number * portion, min((number + 1) * portion, count)):
                        frame.run(tiles.piece(piece))
            finally:
                place.pool.give_back(scratch)

        place.workers.share(-(-count // portion), work, alone=self._alone, should_stop=place.should_stop)


def prepare_elementwise(step: ElementwiseStep, threads: int, compiler: CCompiler) -> PreparedElementwise:
    """Return ``step`` made ready: for NumPy, and for C once that is compiled and where it is faster."""
    strides = element_strides(step.body.shape)
    dtypes = (*step.body.read_dtypes, *(one.dtype for one in step.body.instructions))
    results = [(slot, Access(block, dtypes[slot], 0, strides)) for slot, block in step.results]
    return PreparedElementwise(step.body, results, threads, compiler)


class PreparedWrite:
    """A :class:`.program.WriteStep`."""

    def __init__(self, step: WriteStep, result_size: int, threads: int) -> None:
        self._copies = [_copy(source, target, step.dtype, threads) for source, target in step.parts]
        covered = sum(prod(target.shape) for _, target in step.parts)
        if step.fill and covered < result_size:
            zero = Instruction("constant", (), step.dtype, value=np.zeros((), step.dtype).item())
            body = Body((result_size,), (), (), (zero,))
            self._copies.insert(0, PreparedElementwise(body, [(0, Access(step.result, step.dtype, 0, (1,)))], threads))

    def run(self, blocks: Blocks, place: Workplace) -> None:
        """See :class:`PreparedStep`."""
        for copy in self._copies:
            copy.run(blocks, place)


def _copy(source: View, target: View, dtype: str, threads: int) -> PreparedElementwise:
    body = Body(source.shape, (source,), (dtype,), ())
    return PreparedElementwise(body, [(0, Access(target.block, dtype, target.offset, target.strides))], threads)


class PreparedMatmul:
    """A :class:`.program.MatmulStep`: by NumPy's, which lets a BLAS do it; float16 through float32."""

    def __init__(self, step: MatmulStep) -> None:
        self._step = step
        self._batch = prod(step.batch)
        # What is small is not worth several threads of the BLAS.
        small = step.rows * step.inner * step.columns < limits.CPU_SMALL_PRODUCT_MAX_COUNT
        self._portion = 1
        if small:
            one = max(1, step.rows * step.inner * step.columns)
            self._portion = -(-limits.CPU_SMALL_PRODUCT_MAX_COUNT // one)
        self._alone = not small or self._batch <= self._portion

    def run(self, blocks: Blocks, place: Workplace) -> None:
        """See :class:`PreparedStep`."""
        step = self._step
        if not self._batch * step.rows * step.columns:
            return
        a = self._operand(blocks[step.a], step.rows, step.inner, exchanged=step.transpose_a)
        b = self._operand(blocks[step.b], step.inner, step.columns, exchanged=step.transpose_b)
        result = self._operand(blocks[step.result], step.rows, step.columns, exchanged=False)
        if step.dtype == "float16":
            self._run_half(a, b, result, place)
            return
        portion = self._batch if self._batch <= self._portion else self._portion

        def work(portions: Portions) -> None:
            for number in portions:
                part = slice(number * portion, (number + 1) * portion)
                np.matmul(a[part], b[part], out=result[part])

        count = -(-self._batch // portion)
        place.workers.share(count, work, alone=self._alone, should_stop=place.should_stop)

    def _operand(self, block: Array | None, rows: int, columns: int, *, exchanged: bool) -> Array:
        assert block is not None
        if exchanged:
            return block.reshape(self._batch, columns, rows).swapaxes(1, 2)
        return block.reshape(self._batch, rows, columns)

    def _run_half(self, a: Array, b: Array, result: Array, place: Workplace) -> None:
        step = self._step
        side = limits.CPU_HALF_TILE_SIDE_COUNT
        # Pieces of a, b and the result have side * side elements at most; of small matrices several at once.
        sides = [min(side, max(1, length)) for length in (step.rows, step.inner, step.columns)]
        together = max(1, side * side // max(sides[0] * sides[1], sides[1] * sides[2], sides[0] * sides[2]))
        tiles = Tiles((self._batch, step.rows, step.columns), (min(together, self._batch), sides[0], sides[2]))

        def work(portions: Portions) -> None:
            for number in portions:
                batch, rows, columns = tiles.piece(number).key
                total = np.zeros(result[batch, rows, columns].shape, np.float32)
                for start in range(0, step.inner, sides[1]):
                    portions.check()
                    inner = slice(start, start + sides[1])
                    one, other = (x.astype(np.float32) for x in (a[batch, rows, inner], b[batch, inner, columns]))
                    np.add(total, np.matmul(one, other), out=total)
                np.copyto(result[batch, rows, columns], total, casting="unsafe")

        place.workers.share(tiles.count, work, alone=True, should_stop=place.should_stop)
