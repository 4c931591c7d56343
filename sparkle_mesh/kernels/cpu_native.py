"""Elementwise work as one loop in C, where each operation gives the bits that NumPy gives.

NumPy reads and writes memory, or a cache, once for each operation; a loop that a compiler made keeps what is between
them in registers. That is worth it for arithmetic. It is not for ``exp``, ``tanh`` and the like: NumPy computes several
elements at a time, which a compiler's library does not, and with other bits.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from sparkle_mesh import limits
from sparkle_mesh.devices.c_compiler import CCompiler, Function
from sparkle_mesh.kernels import codegen, codegen_access
from sparkle_mesh.kernels.codegen import Code, KernelSource
from sparkle_mesh.kernels.cpu_threads import Portions, WorkerThreads
from sparkle_mesh.kernels.cpu_tiles import Access, Blocks, crossing_axis
from sparkle_mesh.kernels.ops import FLOATS, Shape
from sparkle_mesh.kernels.program import Body, Instruction, collapse

# Rounded by themselves, or exact; none that shows the sign of a NaN, which compilers do not keep.
_ANY = frozenset({"copy", "cast", "constant", "iota", "where", "add", "subtract", "multiply", "negative", "absolute"})
_ANY |= {"square", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and", "logical_or"}
_ANY |= {"logical_xor", "logical_not", "bitwise_and", "bitwise_or", "bitwise_xor", "invert", "isnan", "isinf"}
_ANY |= {"isfinite"}
_OF_FLOATS = frozenset({"divide", "reciprocal", "sqrt"})
# Of zeros with different signs NumPy chooses as the processor does, and of processors only these do it as C is written.
_CHOOSING = frozenset({"maximum", "minimum"})
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


@dataclass(frozen=True, slots=True)
class NativeBody:
    """A loop in C, over ``rows`` rows of ``columns`` elements.

    Attributes
    ----------
    source
        A function of pointers, the first row, the one after the last, and the same of columns.
    blocks
        Of which block each pointer is.
    """

    source: KernelSource
    blocks: tuple[int, ...]
    rows: int
    columns: int


def in_c(body: Body, results: Sequence[tuple[int, Access]]) -> NativeBody | None:
    """Return what stores slots of ``body``; None if C would give other bits, or be slower.

    Parameters
    ----------
    results
        Slots, and where each goes.
    """
    dtypes = [*body.read_dtypes, *(one.dtype for one in body.instructions)]
    if not body.instructions or not all(_is_exact(one, dtypes) for one in body.instructions):
        return None
    if "float16" in dtypes:
        return None
    reads = codegen_access.accesses_of(body)
    targets = [
        codegen_access.Access(f"q{number}", target.dtype, target.offset, target.strides, is_result=True)
        for number, (_, target) in enumerate(results)
    ]
    lengths, strides = collapse(body.shape, [one.strides for one in (*reads, *targets)])
    if not lengths:
        lengths, strides = (1,), ((0,),) * len(strides)
    row_bytes = lengths[-1] * min(codegen.itemsize(dtype) for dtype in dtypes)
    if (len(lengths) > 1 and row_bytes < limits.C_ROW_MIN_BYTES) or crossing_axis(lengths, strides) is not None:
        return None
    together = codegen_access.restrided([*reads, *targets], strides)
    result_bytes = prod(lengths) * sum(codegen.itemsize(target.dtype) for target in targets)
    streams = result_bytes >= limits.C_STREAMED_MIN_BYTES and all(one[-1] == 1 for one in strides[len(reads) :])
    source = _source(body, [slot for slot, _ in results], lengths, together, streams=streams)
    blocks = (*codegen_access.blocks_of(body), *(target.block for _, target in results))
    return NativeBody(source, blocks, prod(lengths[:-1]), lengths[-1])


def _is_exact(one: Instruction, dtypes: Sequence[str]) -> bool:
    if one.op == "cast":
        # Floats that an integer cannot hold have no defined result.
        return one.dtype in FLOATS or dtypes[one.operands[0]] not in FLOATS
    if one.op in _CHOOSING:
        return _IS_X86 or one.operand_dtype not in FLOATS
    return one.op in _ANY or (one.op in _OF_FLOATS and one.operand_dtype in FLOATS)


def _source(
    body: Body, slots: Sequence[int], lengths: Shape, accesses: Sequence[codegen_access.Access], *, streams: bool
) -> KernelSource:
    code = Code("c")
    codegen_access.compute_function(code, body, slots, wide=True, stores=True)
    pointers = dict.fromkeys((one.pointer, one.is_result, one.dtype) for one in accesses if one.pointer)
    lines = []
    for number, (pointer, is_result, dtype) in enumerate(pointers):
        kind = f"{'' if is_result else 'const '}{codegen.memory_type(dtype)}"
        lines.append(f"{kind} *RESTRICT {pointer} = pointers[{number}];")
    lines.append("for (ix row = row_first; row < row_stop; ++row) {")
    outer = range(len(lengths) - 1)
    places, terms = codegen_access.offsets("row", outer, lengths, accesses, "c")
    lines += places
    lines += [f"const ix at{n} = {codegen_access.place(one, terms[n])};" for n, one in enumerate(accesses)]
    lines.append("ix i = first;")
    if streams:
        lines += _streamed(accesses)
    lines += [f"INDEPENDENT for (; i < stop; ++i) compute({_elements(accesses, 'i', {})});", "}"]
    if streams:
        lines.append("STREAMED();")
    takes = "void *const *pointers, ix row_first, ix row_stop, ix first, ix stop"
    text = f"void @name@({takes}) {{\n  " + "\n  ".join(lines) + "\n}\n"
    return code.finish("loop", text, wide=True)


def _streamed(accesses: Sequence[codegen_access.Access]) -> list[str]:
    """Return what goes through whole blocks of a row: their results go past the caches, which they would not fit in."""
    block = limits.C_STREAMED_COUNT
    results = [(number, one) for number, one in enumerate(accesses) if one.is_result]
    number, first = results[0]
    buffers = {number: f"b{number}[k]" for number, _ in results}
    kinds = {number: codegen.memory_type(one.dtype) for number, one in results}
    return [
        # Lines of the cache that are written in part would be read first all the same.
        f"for (; i < stop && ((intptr_t)({first.pointer} + (at{number} + i)) & 63); ++i)",
        f"  compute({_elements(accesses, 'i', {})});",
        f"for (; i + {block} <= stop; i += {block}) {{",
        *(f"{kinds[number]} b{number}[{block}] __attribute__((aligned(64)));" for number in buffers),
        f"INDEPENDENT for (ix k = 0; k < {block}; ++k) compute({_elements(accesses, 'i + k', buffers)});",
        *(f"stream({one.pointer} + (at{number} + i), b{number}, sizeof b{number});" for number, one in results),
        "}",
    ]


def _elements(accesses: Sequence[codegen_access.Access], place: str, buffers: Mapping[int, str]) -> str:
    """Return what ``compute`` is called with at ``place`` of a row; some results go to ``buffers``."""
    found = []
    for number, one in enumerate(accesses):
        at = f"at{number} + ({place}) * ({one.strides[-1]})"
        element = buffers.get(number, f"{one.pointer}[{at}]") if one.pointer else at
        found.append(f"&{element}" if one.is_result else element)
    return ", ".join(found)


class NativeElementwise:
    """A loop that is run in C once it is compiled, which it is when it has run for some time.

    Parameters
    ----------
    threads
        How many share it.
    alone
        Whether it is too small to be shared.
    """

    def __init__(self, native: NativeBody, compiler: CCompiler, threads: int, *, alone: bool) -> None:
        self._native, self._compiler, self._alone = native, compiler, alone
        self._function: Function | None = None
        self._is_open = True
        self._runs, self._size = 0, native.rows * native.columns
        portions = threads * limits.CPU_PORTIONS_PER_THREAD_COUNT
        piece = -(-self._size // portions)
        piece = min(max(piece, limits.C_PIECE_MIN_COUNT), limits.C_PIECE_MAX_COUNT)
        self._columns = min(native.columns, piece)
        self._rows = max(1, piece // self._columns)
        self._across = -(-native.columns // self._columns)
        self._count = -(-native.rows // self._rows) * self._across

    def is_ready(self) -> bool:
        """Whether it can be run; if it cannot, it may be later."""
        if self._function is None and self._is_open:
            source = self._native.source
            self._runs += 1
            is_wanted = self._runs > 1 and self._runs * self._size >= limits.C_COMPILED_MIN_COUNT
            self._function = self._compiler.function(source.name, source.text, is_wanted=is_wanted)
            self._is_open = self._function is None and not self._compiler.is_settled(source.name)
        return self._function is not None

    def run(self, blocks: Blocks, workers: WorkerThreads, should_stop: Callable[[], object] | None) -> bool:
        """Read and write ``blocks``, if it is ready; return whether it did: it does not if memory is not aligned.

        Raises
        ------
        KernelStoppedError
            If ``should_stop`` said so.
        """
        function, native = self._function, self._native
        arrays = [blocks[number] for number in native.blocks]
        if function is None or not all(array is not None and array.flags.aligned for array in arrays):
            return False
        pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays if array is not None))

        def work(portions: Portions) -> None:
            for number in portions:
                down, across = divmod(number, self._across)
                row, column = down * self._rows, across * self._columns
                rows, columns = min(row + self._rows, native.rows), min(column + self._columns, native.columns)
                # Other threads run meanwhile.
                function(pointers, row, rows, column, columns)

        workers.share(self._count, work, alone=self._alone, should_stop=should_stop)
        return True
