"""Runs programs on this machine's processors, about as fast as their memory allows, by NumPy and loops in C.

NumPy goes through memory once for each operation. Here each step goes through it once: pieces that fit into a core's
cache pass through all operations of a step before the next pieces come, in all cores at once, since NumPy lets other
threads run while it computes. Each operation is done by the same ufunc as in :mod:`.reference`, so elementwise results
are the same bits; also where a loop in C takes over after some runs (:mod:`.cpu_native`), which only does what gives
the same bits. Reductions and products may differ in their last bits, but not from run to run, nor with the number
of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.devices.c_compiler import CCompiler
from sparkle_mesh.devices.detect import usable_logical_cores
from sparkle_mesh.errors import KernelError
from sparkle_mesh.kernels.cpu_memory import BlockPool
from sparkle_mesh.kernels.cpu_reduce import PreparedReduction
from sparkle_mesh.kernels.cpu_steps import (
    PreparedMatmul,
    PreparedStep,
    PreparedWrite,
    Workplace,
    prepare_elementwise,
)
from sparkle_mesh.kernels.cpu_threads import WorkerThreads, silently
from sparkle_mesh.kernels.cpu_tiles import Array
from sparkle_mesh.kernels.program import (
    ElementwiseStep,
    MatmulStep,
    Program,
    ReduceStep,
    Step,
    WriteStep,
    blocks_written,
)


class CpuExecutor:
    """Prepares programs for processors; all that it has prepared share its threads and its memory.

    Parameters
    ----------
    threads
        How many threads work on one program, the caller's included; by default one for each core that this process may
        use. They are started when they are first needed.
    compiler
        Of loops in C; by default one that looks for the machine's own.

    Raises
    ------
    KernelError
        If there cannot be so many.
    UsageError
        If the environment names a compiler that is not there.
    """

    def __init__(self, threads: int | None = None, *, compiler: CCompiler | None = None) -> None:
        if threads is None:
            threads = min(usable_logical_cores(), limits.CPU_THREADS_MAX_COUNT)
        if not 1 <= threads <= limits.CPU_THREADS_MAX_COUNT:
            raise KernelError(f"threads is {threads}; give 1 to {limits.CPU_THREADS_MAX_COUNT}, or None for all cores")
        self.threads = threads
        self._workers = WorkerThreads(threads)
        self._pool = BlockPool()
        self.compiler = CCompiler() if compiler is None else compiler

    def prepare(self, program: Program) -> PreparedProgram:
        """Return ``program`` made ready to run: keep it, since this takes longer than to run a small one.

        Raises
        ------
        KernelError
            If something in it cannot be computed.
        """
        return PreparedProgram(program, self.threads, self._workers, self._pool, self.compiler)

    def close(self) -> None:
        """End the threads and let go of the memory. A later run starts anew."""
        self.compiler.close()
        self._workers.close()
        self._pool.clear()


class PreparedProgram:
    """A program that can be run any number of times, by several threads at once. Made by :class:`CpuExecutor`."""

    def __init__(
        self, program: Program, threads: int, workers: WorkerThreads, pool: BlockPool, compiler: CCompiler
    ) -> None:
        self.program = program
        self._workers, self._pool = workers, pool
        self._steps = tuple(_prepare(step, program, threads, compiler) for step in program.steps)
        self._given = frozenset(range(program.input_count)) | frozenset(program.outputs)
        # Blocks of our own, where they are first needed.
        self._written = tuple(sorted(blocks_written(step) - self._given) for step in program.steps)
        self._has_integer_powers = any(map(_has_integer_powers, program.steps))
        self._dtypes = tuple(np.dtype(tensor.dtype) for tensor in program.blocks)

    def run(self, blocks: Sequence[Array | None], should_stop: Callable[[], object] | None = None) -> None:
        """Compute the outputs.

        Parameters
        ----------
        blocks
            For each block of the program a flat, dense array of its dtype and size: inputs, which are only read, and
            outputs, which are written, and share no memory with others. None for all else.
        should_stop
            Asked now and then, in the calling thread; the run is given up once it returns something true.

        Raises
        ------
        KernelError
            If the blocks do not fit the program, or NumPy refuses an operation: a whole number to a negative power.
        KernelStoppedError
            If the run was given up. What the outputs hold is undefined.
        """
        self._check(blocks)
        own = list(blocks)
        memory: dict[int, Array] = {}
        place = Workplace(self._workers, self._pool, should_stop)
        try:
            with silently():
                self._run_steps(own, memory, place)
        except ValueError as error:
            if isinstance(error, KernelError) or not self._has_integer_powers:
                raise
            raise KernelError(f"this kernel cannot be computed for these values: {error}") from error
        finally:
            for kept in memory.values():
                self._pool.give_back(kept)

    def _run_steps(self, blocks: list[Array | None], memory: dict[int, Array], place: Workplace) -> None:
        for step, written, freed in zip(self._steps, self._written, self.program.frees, strict=True):
            for number in written:
                tensor = self.program.blocks[number]
                memory[number] = self._pool.take(tensor.nbytes)
                blocks[number] = memory[number][: tensor.nbytes].view(self._dtypes[number])
            step.run(blocks, place)
            for number in freed:
                self._pool.give_back(memory.pop(number))

    def _check(self, blocks: Sequence[Array | None]) -> None:
        if len(blocks) != len(self.program.blocks):
            raise KernelError(f"this program has {len(self.program.blocks)} blocks, not {len(blocks)}")
        for number in self._given:
            block, tensor = blocks[number], self.program.blocks[number]
            if block is None:
                raise KernelError(f"block {number} is an input or an output, and is missing")
            is_flat = block.ndim == 1 and block.flags.c_contiguous
            if not is_flat or block.size != tensor.size or block.dtype != self._dtypes[number]:
                found = f"{block.dtype} of shape {block.shape} and strides {block.strides}"
                raise KernelError(f"block {number} must be {tensor.size} {tensor.dtype}s in a row, not {found}")
            if number >= self.program.input_count and not block.flags.writeable:
                raise KernelError(f"block {number} is an output, and may not be written to")


def _has_integer_powers(step: Step) -> bool:
    """Whether a step raises integers to powers, which NumPy refuses where these are negative."""
    if not isinstance(step, (ElementwiseStep, ReduceStep)):
        return False
    return any(one.op == "power" and np.dtype(one.dtype).kind in "iu" for one in step.body.instructions)


def _prepare(step: Step, program: Program, threads: int, compiler: CCompiler) -> PreparedStep:
    match step:
        case ElementwiseStep():
            return prepare_elementwise(step, threads, compiler)
        case ReduceStep():
            return PreparedReduction(step, threads)
        case MatmulStep():
            return PreparedMatmul(step)
        case WriteStep():
            return PreparedWrite(step, program.blocks[step.result].size, threads)
