"""Generated kernels: where the elements of each array lie, and how many of them one access fetches.

A body is gone through along as few axes as possible. Each work item takes *lanes*: as many neighbours along the
innermost axis as fill 16 bytes of the widest array. An array whose lanes follow each other is accessed as one word;
one that is repeated along the axis is read once; of others each lane is accessed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from sparkle_mesh import limits
from sparkle_mesh.errors import KernelError
from sparkle_mesh.kernels import codegen, codegen_ops
from sparkle_mesh.kernels.codegen import Code
from sparkle_mesh.kernels.ops import Shape, element_strides
from sparkle_mesh.kernels.program import Body, View

Mode: TypeAlias = Literal["word", "same", "lanes"]
#: Takes the places of each access, and returns statements.
Move: TypeAlias = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True, slots=True)
class Access:
    """How one array is gone through: ``offset`` plus a stride times each coordinate, in elements.

    Attributes
    ----------
    pointer
        The kernel's parameter; empty for an ``iota``, whose value is what an offset would be.
    is_result
        Whether it is written.
    """

    pointer: str
    dtype: str
    offset: int
    strides: tuple[int, ...]
    is_result: bool = False

    def mode(self, width: int) -> Mode:
        """Return how ``width`` lanes along the last axis are accessed."""
        inner = self.strides[-1] if self.strides else 0
        if inner == 0 and not self.is_result:
            return "same"
        aligned = all(place % width == 0 for place in (self.offset, *self.strides[:-1]))
        return "word" if width > 1 and inner == 1 and aligned else "lanes"

    def reach(self, lengths: Shape) -> int:
        """Return the largest size of an offset on the way."""
        return abs(self.offset) + sum(
            length * abs(stride) for length, stride in zip(lengths, self.strides, strict=True)
        )


def accesses_of(body: Body) -> list[Access]:
    """Return how the body's reads and its counts are gone through, along the body's axes."""
    pointers = {block: f"p{number}" for number, block in enumerate(blocks_of(body))}
    found = [
        Access(pointers[view.block], dtype, view.offset, view.strides)
        for view, dtype in zip(body.reads, body.read_dtypes, strict=True)
    ]
    for one in body.instructions:
        if one.op == "iota":
            found.append(Access("", one.dtype, 0, tuple(int(axis == one.axis) for axis in range(len(body.shape)))))
    return found


def blocks_of(body: Body) -> tuple[int, ...]:
    """Return the blocks that a body's kernel takes pointers to: each once, however often it is read."""
    return tuple(dict.fromkeys(view.block for view in body.reads))


def result_access(number: int, dtype: str, view: View) -> Access:
    """Return how a result (``q0``, …) is gone through."""
    return Access(f"q{number}", dtype, view.offset, view.strides, is_result=True)


def restrided(accesses: Sequence[Access], strides: Sequence[tuple[int, ...]]) -> list[Access]:
    """Return the same with other strides: those along fewer axes."""
    return [replace(access, strides=one) for access, one in zip(accesses, strides, strict=True)]


def lane_count(lengths: Shape, accesses: Iterable[Access]) -> int:
    """Return how many lanes a work item takes along the last axis: a power of two."""
    sizes = [codegen.itemsize(one.dtype) for one in accesses if one.pointer and one.strides and one.strides[-1] == 1]
    if not sizes:
        return 1
    width = limits.GENERATED_ACCESS_BYTES // max(sizes)
    # A single axis may leave a rest, which is gone through one by one.
    while width > 1 and len(lengths) > 1 and lengths[-1] % width:
        width //= 2
    return width


def unroll_count(body: Body, width: int, arrays: int) -> int:
    """Return how many words of each array a work item has in flight."""
    count = 4 if arrays <= 3 else 2 if arrays <= 6 else 1
    while count > 1 and len(body.instructions) * width * count > limits.GENERATED_UNROLLED_MAX_COUNT:
        count //= 2
    return count


def offsets(
    linear: str, axes: Sequence[int], lengths: Shape, accesses: Sequence[Access], prefix: str
) -> tuple[list[str], list[str]]:
    """Return statements, and for each access what the place ``linear`` along ``axes`` adds to its offset.

    Parameters
    ----------
    prefix
        Of the names of variables.
    """
    shape = tuple(lengths[axis] for axis in axes)
    dense = element_strides(shape)
    used: set[int] = set()
    terms = []
    for access in accesses:
        strides = tuple(access.strides[axis] for axis in axes)
        scale = strides[-1] if strides else 0
        if strides == tuple(scale * one for one in dense):
            terms.append("0" if scale == 0 else linear if scale == 1 else f"{linear} * ({scale})")
            continue
        parts = []
        for axis, stride in zip(axes, strides, strict=True):
            if stride:
                used.add(axis)
                parts.append(f"{prefix}{axis} * ({stride})" if stride != 1 else f"{prefix}{axis}")
        terms.append(" + ".join(parts))
    if not used:
        return [], terms
    first = min(used)
    lines = [f"ix {prefix}left = {linear};"]
    for axis in reversed(axes[1:]):
        if axis in used:
            lines.append(f"const ix {prefix}{axis} = {prefix}left % {lengths[axis]};")
        if axis > first:
            lines.append(f"{prefix}left /= {lengths[axis]};")
    if axes[0] in used:
        lines.append(f"const ix {prefix}{axes[0]} = {prefix}left;")
    return lines, terms


def place(access: Access, *terms: str) -> str:
    """Return the offset of an access as an expression."""
    parts = [term for term in terms if term != "0"]
    if access.offset or not parts:
        parts.append(f"({access.offset})")
    return " + ".join(parts)


class Lanes:
    """Variables for ``width`` lanes of each access, in ``unroll`` words: their declarations, loads and stores.

    Statements are for word ``u``; elements are of lane ``k``.
    """

    def __init__(self, accesses: Sequence[Access], width: int, unroll: int) -> None:
        self._accesses = accesses
        self._width = width
        self._unroll = unroll
        self._modes = [access.mode(width) for access in accesses]

    def declarations(self) -> list[str]:
        """Return the variables."""
        lines = []
        for number, (access, mode) in enumerate(zip(self._accesses, self._modes, strict=True)):
            kind = codegen.memory_type(access.dtype)
            name = self._name(number)
            if not access.pointer:
                lines.append(f"ix {name}[{self._unroll}];")
            elif mode == "word":
                word = codegen.WORDS[self._width * codegen.itemsize(access.dtype)]
                lines.append(f"union {{ {word} all; {kind} each[{self._width}]; }} {name}[{self._unroll}];")
            else:
                count = "" if mode == "same" else f"[{self._width}]"
                lines.append(f"{kind} {name}[{self._unroll}]{count};")
        return lines

    def loads(self, places: Sequence[str]) -> list[str]:
        """Return what fetches from ``places``: the offsets of lane 0."""
        lines = []
        for number, (access, mode) in enumerate(zip(self._accesses, self._modes, strict=True)):
            name, at = self._name(number), places[number]
            if not access.pointer:
                lines.append(f"{name}[u] = {at};")
            elif mode == "word":
                word = codegen.WORDS[self._width * codegen.itemsize(access.dtype)]
                lines.append(f"{name}[u].all = *(GLOBAL const {word} *)({access.pointer} + ({at}));")
            elif mode == "same":
                lines.append(f"{name}[u] = {access.pointer}[{at}];")
            else:
                lines += self._each(f"{name}[u][k] = {access.pointer}[{self._lane(access, at)}];")
        return lines

    def stores(self, places: Sequence[str]) -> list[str]:
        """Return what writes to ``places``."""
        lines = []
        for number, (access, mode) in enumerate(zip(self._accesses, self._modes, strict=True)):
            name, at = self._name(number), places[number]
            if mode == "word":
                word = codegen.WORDS[self._width * codegen.itemsize(access.dtype)]
                lines.append(f"*(GLOBAL {word} *)({access.pointer} + ({at})) = {name}[u].all;")
            else:
                lines += self._each(f"{access.pointer}[{self._lane(access, at)}] = {name}[u][k];")
        return lines

    def elements(self) -> list[str]:
        """Return each access's element as what lies in memory; of counts, the count."""
        found = []
        for number, (access, mode) in enumerate(zip(self._accesses, self._modes, strict=True)):
            name = self._name(number)
            if not access.pointer:
                inner = access.strides[-1] if access.strides else 0
                found.append(f"{name}[u] + k * {inner}" if inner else f"{name}[u]")
            else:
                found.append(f"{name}[u].each[k]" if mode == "word" else f"{name}[u]{'' if mode == 'same' else '[k]'}")
        return found

    def _name(self, number: int) -> str:
        return f"{'z' if self._accesses[number].is_result else 'w'}{number}"

    def _each(self, statement: str) -> list[str]:
        return ["#pragma unroll", f"for (i32 k = 0; k < {self._width}; ++k) {statement}"]

    @staticmethod
    def _lane(access: Access, at: str) -> str:
        inner = access.strides[-1] if access.strides else 0
        return at if not inner else f"{at} + k" if inner == 1 else f"{at} + k * ({inner})"


def compute_function(code: Code, body: Body, slots: Sequence[int], *, wide: bool, stores: bool) -> str:
    """Have ``compute`` take the body's elements (see :meth:`Lanes.elements`), and pointers for values of ``slots``.

    Parameters
    ----------
    stores
        Whether the results are as they lie in memory; in registers else.
    """
    parameters, lines, names, dtypes = [], [], [], []
    for number, dtype in enumerate(body.read_dtypes):
        parameters.append(f"{codegen.memory_type(dtype)} m{number}")
        lines.append(f"const {codegen.value_type(dtype)} s{number} = {codegen.loaded(dtype, f'm{number}')};")
        names.append(f"s{number}")
        dtypes.append(dtype)
    for one in body.instructions:
        name = f"s{len(names)}"
        if one.op == "iota":
            parameters.append(f"ix n{len(names)}")
            value = codegen_ops.cast(code, f"n{len(names)}", "int64" if wide else "int32", one.dtype)
        else:
            operands = [names[operand] for operand in one.operands]
            value = codegen_ops.expression(code, one, operands, [dtypes[operand] for operand in one.operands])
        lines.append(f"const {codegen.value_type(one.dtype)} {name} = {value};")
        names.append(name)
        dtypes.append(one.dtype)
    for number, slot in enumerate(slots):
        kind = codegen.memory_type(dtypes[slot]) if stores else codegen.value_type(dtypes[slot])
        parameters.append(f"{kind} *r{number}")
        lines.append(f"*r{number} = {codegen.stored(dtypes[slot], names[slot]) if stores else names[slot]};")
    return code.function("compute", f"void compute({', '.join(parameters)}) {{\n  " + "\n  ".join(lines) + "\n}")


def parameters(accesses: Iterable[Access]) -> list[str]:
    """Return the pointers that a kernel takes.

    Raises
    ------
    KernelError
        If they are too many.
    """
    found = {
        access.pointer: f"GLOBAL {'' if access.is_result else 'const '}{codegen.memory_type(access.dtype)} *RESTRICT"
        for access in accesses
        if access.pointer
    }
    if len(found) > limits.GENERATED_POINTERS_MAX_COUNT:
        raise KernelError(
            f"one step of this kernel reads and writes {len(found)} arrays, and a generated one takes"
            f" {limits.GENERATED_POINTERS_MAX_COUNT}; make it of several"
        )
    return [f"{kind} {pointer}" for pointer, kind in found.items()]
