"""Generated kernels: elementwise work, and copies into places.

One kernel computes a body at each place: every work item loads its words of all arrays, several of them before the
first is used, then computes, then stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from sparkle_mesh import limits
from sparkle_mesh.kernels import codegen_access as access
from sparkle_mesh.kernels.codegen import Code, KernelSource, Language
from sparkle_mesh.kernels.program import Body, Instruction, View, collapse, dense_view


@dataclass(frozen=True, slots=True)
class ElementwiseKernel:
    """A kernel for elementwise work, and how it is launched.

    Attributes
    ----------
    source
        Its parameters are the reads' blocks, the results' blocks, and ``count``.
    count
        Of places.
    is_wide
        Whether ``count`` is passed in 64 bits, rather than 32.
    groups
        Of ``threads`` work items each.
    """

    source: KernelSource
    count: int
    is_wide: bool
    groups: int
    threads: int


def elementwise(language: Language, body: Body, slots: Sequence[int], threads: int) -> ElementwiseKernel:
    """Return what stores ``slots`` of ``body`` densely.

    Parameters
    ----------
    threads
        Work items of a group.
    """
    return _kernel(language, body, slots, [dense_view(0, body.shape)] * len(slots), threads, "elementwise")


def copy(language: Language, source: View, target: View, size: int, threads: int) -> ElementwiseKernel:
    """Return what copies ``source`` to ``target``, elements of ``size`` bytes."""
    dtype = f"uint{8 * size}"
    body = Body(source.shape, (source,), (dtype,), ())
    return _kernel(language, body, [0], [target], threads, "copy")


def filled(shape: tuple[int, ...], value: int, dtype: str) -> Body:
    """Return a body of one slot, a number."""
    number = bool(value) if dtype == "bool" else float(value) if dtype.startswith("float") else value
    return Body(shape, (), (), (Instruction("constant", (), dtype, "", number),))


def _kernel(
    language: Language, body: Body, slots: Sequence[int], targets: Sequence[View], threads: int, kind: str
) -> ElementwiseKernel:
    dtypes = [*body.read_dtypes, *(one.dtype for one in body.instructions)]
    reads = access.accesses_of(body)
    results = [
        access.result_access(n, dtypes[slot], view) for n, (slot, view) in enumerate(zip(slots, targets, strict=True))
    ]
    lengths, strides = collapse(body.shape, [one.strides for one in (*reads, *results)])
    together = access.restrided([*reads, *results], strides)
    reads, results = together[: len(reads)], together[len(reads) :]
    width = access.lane_count(lengths, together)
    unroll = access.unroll_count(body, width, sum(1 for one in together if one.pointer))
    count = prod(body.shape)
    reach = max([count + threads * unroll * width, *(one.reach(lengths) for one in together)])
    is_wide = reach >= limits.GENERATED_NARROW_MAX_COUNT

    code = Code(language)
    access.compute_function(code, body, slots, wide=is_wide, stores=True)
    writer = _Writer(lengths, reads, results)
    lines = [f"const ix vectors = count / {width};"] if width > 1 else ["const ix vectors = count;"]
    lines.append(f"const ix first = GROUP_X() * {threads * unroll} + LOCAL_ID();")
    if unroll > 1:
        lines.append(f"if (first + {threads * (unroll - 1)} < vectors) {{")
        lines += writer.words(width, unroll, f"(first + u * {threads}) * {width}")
        lines.append(f"}} else for (ix v = first; v < vectors; v += {threads}) {{")
        lines += writer.words(width, 1, f"v * {width}")
    else:
        lines.append("if (first < vectors) {")
        lines += writer.words(width, 1, f"first * {width}")
    lines.append("}")
    if width > 1 and len(lengths) == 1:
        lines.append(f"if (GROUP_X() == 0 && LOCAL_ID() < count - vectors * {width}) {{")
        lines += writer.words(1, 1, f"vectors * {width} + LOCAL_ID()")
        lines.append("}")
    takes = ", ".join([*access.parameters(together), "ix count"])
    text = f"KERNEL({threads}) @name@({takes}) {{\n  " + "\n  ".join(lines) + "\n}\n"
    groups = max(-(-count // (threads * unroll * width)), 1)
    return ElementwiseKernel(code.finish(kind, text, wide=is_wide), count, is_wide, groups, threads)


class _Writer:
    def __init__(
        self, lengths: tuple[int, ...], reads: Sequence[access.Access], results: Sequence[access.Access]
    ) -> None:
        self._lengths, self._reads, self._results = lengths, reads, results

    def words(self, width: int, unroll: int, first: str) -> list[str]:
        """Return what computes ``unroll`` words, whose first lanes are at places ``first`` (an expression with u)."""
        reads = access.Lanes(self._reads, width, unroll)
        results = access.Lanes(self._results, width, unroll)
        call = ", ".join([*reads.elements(), *(f"&{element}" for element in results.elements())])
        repeat = ["#pragma unroll", f"for (i32 u = 0; u < {unroll}; ++u) {{"]
        return [
            *reads.declarations(),
            *results.declarations(),
            *repeat,
            *self._moved(first, reads.loads, self._reads),
            "}",
            *repeat,
            "#pragma unroll",
            f"for (i32 k = 0; k < {width}; ++k) compute({call});",
            "}",
            *repeat,
            *self._moved(first, results.stores, self._results),
            "}",
        ]

    def _moved(self, first: str, move: access.Move, accesses: Sequence[access.Access]) -> list[str]:
        lines, terms = access.offsets("i", range(len(self._lengths)), self._lengths, accesses, "c")
        if lines or any(term != "0" for term in terms):
            lines.insert(0, f"const ix i = {first};")
        return lines + move([access.place(one, term) for one, term in zip(accesses, terms, strict=True)])
