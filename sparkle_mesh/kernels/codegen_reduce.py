"""Generated kernels: reductions, with the elementwise work before them.

A group of work items reduces some results. Its work items stand in two dimensions: some beside each other for
different results, some for different parts of what is reduced; the second kind combine what they have by a tree. Where
the innermost axis is reduced, the lanes of a work item (:mod:`.codegen_access`) are parts of one result; where it is
kept they are neighbouring results.

Where the results are too few to fill a device, what is reduced is split over groups, each of which stores its share,
and a second reduction goes over the shares. The split follows from the shape alone, and every tree is fixed: the
results are the same to the bit each time. A work item adds up few elements one after the other, so rounding errors grow
with the logarithm of the length rather than with the length itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sparkle_mesh import limits
from sparkle_mesh.kernels import codegen
from sparkle_mesh.kernels import codegen_access as access
from sparkle_mesh.kernels.codegen import Code, KernelSource, Language
from sparkle_mesh.kernels.codegen_ops import combine
from sparkle_mesh.kernels.ops import Scalar, Shape, element_strides
from sparkle_mesh.kernels.program import Body, collapse, dense_view

_WARP_COUNT = 32


@dataclass(frozen=True, slots=True)
class ReduceKernel:
    """A kernel for a reduction, and how it is launched.

    Attributes
    ----------
    source
        Its parameters are the reads' blocks, the result's, then ``arguments``.
    arguments
        How many results there are (words of them, where lanes are results), how many words or elements are reduced,
        how many of them one group takes, and how many elements are reduced.
    is_wide
        Whether these are passed in 64 bits, rather than 32.
    groups
        Along the results, and along what is reduced; of ``threads`` work items each.
    shares
        How many values are stored for each result, one result after the other within each share: one is the result.
    share_dtype
        Of the values stored.
    """

    source: KernelSource
    arguments: tuple[int, ...]
    is_wide: bool
    groups: tuple[int, int]
    threads: int
    shares: int
    share_dtype: str


def reduction(
    language: Language, body: Body, slot: int, op: str, axes: tuple[int, ...], threads: int, result_dtype: str
) -> ReduceKernel:
    """Return what reduces ``slot`` of ``body``, which has elements and results, over ``axes``.

    If it has more than one share, they are to be reduced by :func:`shares_body`.

    Parameters
    ----------
    threads
        Work items of a group, a power of two.
    result_dtype
        Of the results in memory.
    """
    return _Reduction(language, body, slot, op, axes, threads, result_dtype).kernel()


def shares_body(kernel: ReduceKernel, count: int) -> Body:
    """Return what reads the shares of ``count`` results: its first axis is to be reduced."""
    shape = (kernel.shares, count)
    return Body(shape, (dense_view(0, shape),), (kernel.share_dtype,), ())


def neutral(op: str, dtype: str) -> Scalar:
    """Return what changes nothing."""
    if op in ("sum", "prod"):
        # Only a negative zero leaves a negative zero as it is.
        return int(op == "prod") if codegen.is_integer(dtype) else 1.0 if op == "prod" else -0.0
    if dtype == "bool":
        return op == "min"
    if codegen.is_integer(dtype):
        bits = 8 * codegen.itemsize(dtype)
        least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if codegen.is_signed(dtype) else (0, (1 << bits) - 1)
        return most if op == "min" else least
    return float("inf") if op == "min" else float("-inf")


class _Reduction:
    def __init__(
        self, language: Language, body: Body, slot: int, op: str, axes: tuple[int, ...], threads: int, result_dtype: str
    ) -> None:
        self._body, self._slot, self._op = body, slot, op
        self._threads, self._result_dtype = threads, result_dtype
        self._code = Code(language)
        dtypes = [*body.read_dtypes, *(one.dtype for one in body.instructions)]
        # float16 is summed in float32.
        self._dtype = "float32" if dtypes[slot] == "float16" else dtypes[slot]
        self._axes_of(axes)
        self._sizes()

    def _axes_of(self, axes: tuple[int, ...]) -> None:
        """Find as few axes as possible; those reduced and those kept stay apart."""
        shape = self._body.shape
        reads = access.accesses_of(self._body)
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        lengths, strides = collapse(
            shape, [*(one.strides for one in reads), _apart(shape, kept), _apart(shape, list(axes))]
        )
        self._lengths = lengths
        self._reads = access.restrided(reads, strides[:-2])
        self._kept = [axis for axis, stride in enumerate(strides[-2]) if stride]
        self._reduced = [axis for axis, stride in enumerate(strides[-1]) if stride]
        self._is_inner = not lengths or len(lengths) - 1 in self._reduced
        self._results = prod(lengths[axis] for axis in self._kept)
        self._count = prod(lengths[axis] for axis in self._reduced)

    def _sizes(self) -> None:
        """Choose how many work items and groups do what."""
        width = access.lane_count(self._lengths, self._reads)
        if not self._is_inner:
            # Each lane is a sum of its own, which takes registers and local memory.
            width = min(width, 4)
            while width > 1 and self._lengths[-1] % width:
                width //= 2
        self._width = width
        self._unroll = access.unroll_count(self._body, width, len(self._body.reads))
        threads = self._threads
        # Words along what is reduced, and along the results.
        self._words = self._count // width if self._is_inner else self._count
        self._columns = self._results if self._is_inner else self._results // width
        if self._is_inner:
            # Some words for each work item; yet neighbours fetch what lies together.
            deep = max(self._words // self._unroll, min(self._words, 8))
            self._deep = min(threads, _power_of_two(deep))
        else:
            beside = min(_WARP_COUNT, threads, _power_of_two(self._columns))
            self._deep = min(threads // beside, _power_of_two(max(self._words // self._unroll, 1)))
        self._beside = threads // self._deep
        columns = -(-self._columns // self._beside)
        most = -(-self._words // (self._deep * limits.GENERATED_REDUCE_WORDS_COUNT))
        wanted = -(-limits.GENERATED_REDUCE_GROUPS_COUNT // columns)
        shares = max(min(most, wanted), 1)
        per_share = -(-self._words // shares)
        self._per_share = max(-(-per_share // self._deep) * self._deep, 1)
        self._shares = max(-(-self._words // self._per_share), 1)
        self._groups = (columns, self._shares)
        reach = max(
            self._results * self._count + threads * self._unroll * width,
            self._shares * self._results,
            *(one.reach(self._lengths) for one in self._reads),
            0,
        )
        self._is_wide = reach >= limits.GENERATED_NARROW_MAX_COUNT

    def kernel(self) -> ReduceKernel:
        """Return it."""
        access.compute_function(self._code, self._body, [self._slot], wide=self._is_wide, stores=False)
        share_dtype = self._result_dtype if self._shares == 1 else self._dtype
        pointer = f"GLOBAL {codegen.memory_type(share_dtype)} *RESTRICT out"
        takes = ", ".join(
            [*access.parameters(self._reads), pointer, "ix columns", "ix words", "ix per_share", "ix count"]
        )
        lines = [*self._start(), *self._gone_through(), *self._combined(), *self._written(share_dtype)]
        text = f"KERNEL({self._threads}) @name@({takes}) {{\n  " + "\n  ".join(lines) + "\n}\n"
        source = self._code.finish(f"{self._op}", text, wide=self._is_wide)
        arguments = (self._columns, self._words, self._per_share, self._count)
        return ReduceKernel(source, arguments, self._is_wide, self._groups, self._threads, self._shares, share_dtype)

    # --- The text -------------------------------------------------------------------------------

    @property
    def _sums(self) -> int:
        """How many values a work item reduces on its own."""
        return self._width

    def _start(self) -> list[str]:
        kind = codegen.value_type(self._dtype)
        identity = codegen.literal(neutral(self._op, self._dtype), self._dtype)
        deep, beside = self._deep, self._beside
        # Work items that read neighbours are neighbours.
        at = ("LOCAL_ID() / %d", "LOCAL_ID() %% %d") if self._is_inner else ("LOCAL_ID() %% %d", "LOCAL_ID() / %d")
        by = deep if self._is_inner else beside
        lines = [
            f"const ix column = GROUP_X() * {beside} + {at[0] % by};",
            f"const i32 part = {at[1] % by};",
            f"{kind} sums[{self._sums}];",
            "#pragma unroll",
            f"for (i32 k = 0; k < {self._sums}; ++k) sums[k] = {identity};",
        ]
        if self._deep > 1:
            lines.append(f"LOCAL {kind} shared[{self._threads * (1 if self._is_inner else self._sums)}];")
        return lines

    def _gone_through(self) -> list[str]:
        width, unroll, deep = self._width, self._unroll, self._deep
        scale = 1 if self._is_inner else width
        before, kept = access.offsets("o", self._kept, self._lengths, self._reads, "o")
        lines = [
            "if (column < columns) {",
            *([f"const ix o = column * {scale};"] if before or any(term != "0" for term in kept) else []),
            *before,
            "const ix begin = GROUP_Y() * per_share;",
            "const ix end = begin + per_share < words ? begin + per_share : words;",
            "ix v = begin + part;",
        ]
        inner = width if self._is_inner else 1
        if unroll > 1:
            lines.append(f"for (; v + {deep * (unroll - 1)} < end; v += {deep * unroll}) {{")
            lines += self._words_text(width, unroll, f"(v + u * {deep}) * {inner}", kept)
            lines.append("}")
        lines.append(f"for (; v < end; v += {deep}) {{")
        lines += self._words_text(width, 1, f"v * {inner}", kept)
        lines.append("}")
        if self._is_inner and width > 1 and len(self._lengths) == 1:
            # What fills no word.
            lines.append(f"if (GROUP_Y() == 0) for (ix e = words * {width} + part; e < count; e += {deep}) {{")
            lines += self._words_text(1, 1, "e", kept)
            lines.append("}")
        lines.append("}")
        return lines

    def _words_text(self, width: int, unroll: int, first: str, kept: list[str]) -> list[str]:
        reads = access.Lanes(self._reads, width, unroll)
        lines, reduced = access.offsets("i", self._reduced, self._lengths, self._reads, "c")
        places = [access.place(one, *terms) for one, *terms in zip(self._reads, kept, reduced, strict=True)]
        kind = codegen.value_type(self._dtype)
        call = ", ".join([*reads.elements(), "&value"])
        repeat = ["#pragma unroll", f"for (i32 u = 0; u < {unroll}; ++u) {{"]
        return [
            *reads.declarations(),
            *repeat,
            *([f"const ix i = {first};"] if lines or any(term != "0" for term in reduced) else []),
            *lines,
            *reads.loads(places),
            "}",
            *repeat,
            "#pragma unroll",
            f"for (i32 k = 0; k < {width}; ++k) {{",
            f"{kind} value;",
            f"compute({call});",
            f"sums[k] = {self._both('sums[k]', 'value')};",
            "}",
            "}",
        ]

    def _both(self, a: str, b: str) -> str:
        return combine(self._code, self._op, a, b, self._dtype)

    def _combined(self) -> list[str]:
        """Return the tree: first over a work item's lanes, then over the group."""
        lines = []
        if self._is_inner:
            half = self._sums // 2
            while half:
                lines += [f"sums[{k}] = {self._both(f'sums[{k}]', f'sums[{k + half}]')};" for k in range(half)]
                half //= 2
        if self._deep == 1:
            return lines
        count = 1 if self._is_inner else self._sums
        step = 1 if self._is_inner else self._beside
        lines += [
            "#pragma unroll",
            f"for (i32 k = 0; k < {count}; ++k) shared[LOCAL_ID() * {count} + k] = sums[k];",
            "BARRIER();",
        ]
        shuffles = self._is_inner and self._beside == 1 and self._deep > _WARP_COUNT
        last = _WARP_COUNT if shuffles else 1
        lines += self._tree(self._deep // 2, last, count, step)
        if shuffles:
            # Within a warp values pass from register to register, where the language can; in the same order.
            kind = codegen.value_type(self._dtype)
            small = "(i32)" if kind in ("i8", "u8", "i16", "u16") else ""
            lines += [
                "#ifdef SHUFFLE_DOWN",
                f"if (LOCAL_ID() < {_WARP_COUNT}) {{",
                f"{kind} mine = shared[LOCAL_ID()];",
                "#pragma unroll",
                f"for (i32 by = {_WARP_COUNT // 2}; by > 0; by /= 2) {{",
                f"const {kind} other = ({kind})SHUFFLE_DOWN({small}mine, by);",
                f"mine = {self._both('mine', 'other')};",
                "}",
                "sums[0] = mine;",
                "}",
                "#else",
                *self._tree(_WARP_COUNT // 2, 1, count, step),
                "sums[0] = shared[LOCAL_ID()];",
                "#endif",
            ]
        else:
            lines += [
                "#pragma unroll",
                f"for (i32 k = 0; k < {count}; ++k) sums[k] = shared[LOCAL_ID() * {count} + k];",
            ]
        return lines

    def _tree(self, first: int, last: int, count: int, step: int) -> list[str]:
        """Return the steps in which the work items of parts below ``by`` take in what those ``by`` further have."""
        mine, other = f"shared[LOCAL_ID() * {count} + k]", f"shared[(LOCAL_ID() + by * {step}) * {count} + k]"
        kind = codegen.value_type(self._dtype)
        return [
            f"for (i32 by = {first}; by >= {last}; by /= 2) {{",
            f"if (part < by) for (i32 k = 0; k < {count}; ++k) {{",
            f"const {kind} mine = {mine}, other = {other};",
            f"{mine} = {self._both('mine', 'other')};",
            "}",
            "BARRIER();",
            "}",
        ]

    def _written(self, share_dtype: str) -> list[str]:
        count = 1 if self._is_inner else self._sums
        value = codegen.stored(share_dtype, "sums[k]")
        return [
            f"if (part == 0 && column < columns) for (i32 k = 0; k < {count}; ++k)",
            f"  out[(GROUP_Y() * columns + column) * {count} + k] = {value};",
        ]


def _apart(shape: Shape, axes: list[int]) -> tuple[int, ...]:
    """Return strides of the dense array that has only ``axes``, along all of ``shape``."""
    dense = element_strides(tuple(shape[axis] for axis in axes))
    found = dict(zip(axes, dense, strict=True))
    return tuple(found.get(axis, 0) for axis in range(len(shape)))


def _power_of_two(count: int) -> int:
    """Return the least power of two that is ``count`` or more."""
    return 1 << max(count - 1, 0).bit_length()
