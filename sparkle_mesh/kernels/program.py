"""What executors run: steps over dense blocks of memory, with all elementwise work between two of them in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from sparkle_mesh.kernels.ops import Scalar, Shape, TensorType, element_strides


@dataclass(frozen=True, slots=True)
class View:
    """Elements of a dense block, as an array of some shape.

    Attributes
    ----------
    block
        The block's number in :attr:`Program.blocks`.
    offset, strides
        Where its first element is, and how far one step along each axis goes on: in elements; 0 repeats, and negative
        strides go back.
    """

    block: int
    shape: Shape
    offset: int
    strides: tuple[int, ...]

    @property
    def is_dense(self) -> bool:
        """Whether elements follow each other in C order, from the block's first."""
        dense = element_strides(self.shape)
        pairs = zip(self.strides, dense, self.shape, strict=True)
        return self.offset == 0 and all(stride == wanted or length == 1 for stride, wanted, length in pairs)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One elementwise operation of a body, ``copy`` (its operand as it is) among them.

    Attributes
    ----------
    op
        As in :data:`.ops.OPS`, of kind ``"elementwise"``, ``"constant"`` or ``"iota"``.
    operands
        Slots: first the reads of the body, then its instructions, in order.
    dtype
        Of the result.
    operand_dtype
        Of the operands (the last one's for ``where``, whose first is a bool); empty for sources.
    value, axis
        Of a constant (``value_key`` makes 0.0 and -0.0 two); of an iota.
    """

    op: str
    operands: tuple[int, ...]
    dtype: str
    operand_dtype: str = ""
    value: Scalar | None = None
    value_key: str = ""
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Body:
    """Elementwise work: what is read at each place of ``shape``, and what is computed from it."""

    shape: Shape
    reads: tuple[View, ...]
    read_dtypes: tuple[str, ...]
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class ElementwiseStep:
    """Computes a body at each place, and stores some of its slots densely.

    Attributes
    ----------
    results
        Pairs of a slot and the block that it goes to.
    """

    body: Body
    results: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ReduceStep:
    """Reduces one slot of a body over axes of its shape, into a dense block."""

    body: Body
    slot: int
    op: str
    axes: tuple[int, ...]
    dtype: str
    result: int


@dataclass(frozen=True, slots=True)
class MatmulStep:
    """``result = a @ b``, of dense blocks; those transposed lie with their last two axes exchanged.

    Attributes
    ----------
    batch, rows, inner, columns
        ``result`` is ``(*batch, rows, columns)``.
    """

    a: int
    b: int
    transpose_a: bool
    transpose_b: bool
    batch: Shape
    rows: int
    inner: int
    columns: int
    dtype: str
    result: int


@dataclass(frozen=True, slots=True)
class WriteStep:
    """Copies views into places of a block.

    Attributes
    ----------
    parts
        Pairs of what is read and where it goes: views of one shape, the second of the result's block.
    fill
        Whether the block is filled with zeros before.
    """

    parts: tuple[tuple[View, View], ...]
    fill: bool
    dtype: str
    result: int


Step: TypeAlias = ElementwiseStep | ReduceStep | MatmulStep | WriteStep


@dataclass(frozen=True)
class Program:
    """A graph made ready to run.

    Attributes
    ----------
    blocks
        The types of all blocks of memory: the inputs first. Block ``i`` is dense.
    input_count
        How many are inputs; these are only read.
    outputs
        The block of each output: different ones, none of them an input.
    steps
        In order.
    frees
        For each step, the blocks that are needed no more after it.
    """

    blocks: tuple[TensorType, ...]
    input_count: int
    outputs: tuple[int, ...]
    steps: tuple[Step, ...]
    frees: tuple[tuple[int, ...], ...]


def dense_view(block: int, shape: Shape) -> View:
    """Return the whole of a block in its own order."""
    return View(block, shape, 0, element_strides(shape))


def blocks_read(step: Step) -> set[int]:
    """Return the blocks that ``step`` reads."""
    match step:
        case ElementwiseStep(body=body) | ReduceStep(body=body):
            return {view.block for view in body.reads}
        case MatmulStep(a=a, b=b):
            return {a, b}
        case WriteStep(parts=parts):
            return {source.block for source, _ in parts}


def blocks_written(step: Step) -> set[int]:
    """Return the blocks that ``step`` writes."""
    if isinstance(step, ElementwiseStep):
        return {block for _, block in step.results}
    return {step.result}


def collapse(shape: Shape, strides: Sequence[tuple[int, ...]]) -> tuple[Shape, tuple[tuple[int, ...], ...]]:
    """Return the same places with as few axes as possible, and the strides of each array along them.

    Parameters
    ----------
    strides
        Of all arrays that are gone through together; give ``element_strides(shape)`` for dense results.
    """
    lengths: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for axis, length in enumerate(shape):
        if length == 1:
            continue
        steps = [one[axis] for one in strides]
        if lengths and all(before[-1] == step * length for before, step in zip(kept, steps, strict=True)):
            lengths[-1] *= length
            for before, step in zip(kept, steps, strict=True):
                before[-1] = step
        else:
            lengths.append(length)
            for before, step in zip(kept, steps, strict=True):
                before.append(step)
    return tuple(lengths), tuple(map(tuple, kept))
