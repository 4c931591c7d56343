"""From a graph to a program: which values are stored, and what is computed together.

Elementwise operations of one shape that follow from each other are one step, which reads each of its operands once and
stores only what others need. A reduction takes the elementwise work that only it needs into itself. Broadcasts,
transposes and slices are ways to read a block and cost nothing; reshapes are the same block. Copies are made only where
a step needs another order: of an operand of a matrix product, or of an output.

Steps are grouped by stages: a node's stage is above that of everything stored that it reads, so that no group waits for
itself.

Graphs may come from strangers: all of this takes time in proportion to the nodes and operands, whatever they are, and
recurses nowhere. No node is computed more than ``limits.KERNEL_RECOMPUTED_MAX_COUNT`` times for reductions, and once
beside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from sparkle_mesh import limits
from sparkle_mesh.kernels.graph import Graph, Node
from sparkle_mesh.kernels.ops import OPS, Shape, TensorType, element_strides
from sparkle_mesh.kernels.program import (
    Body,
    ElementwiseStep,
    Instruction,
    MatmulStep,
    Program,
    ReduceStep,
    Step,
    View,
    WriteStep,
    blocks_read,
    blocks_written,
    dense_view,
)

_LAZY = frozenset({"transpose", "broadcast", "slice", "reshape"})


@lru_cache(limits.PREPARED_PROGRAMS_MAX_COUNT)
def fused(graph: Graph) -> Program:
    """Return what :func:`fuse` returns, which is kept for the next time."""
    return fuse(graph)


def fuse(graph: Graph) -> Program:
    """Return a program that computes ``graph``."""
    nodes, outputs = _with_copies(graph)
    return _Fusion(nodes, outputs, len(graph.inputs)).program()


def _is_inline(node: Node) -> bool:
    """Whether ``node`` is computed element by element, where it is needed."""
    return node.op in ("constant", "iota", "copy") or OPS[node.op].kind == "elementwise"


def _is_reduction(node: Node) -> bool:
    return node.op in OPS and OPS[node.op].kind == "reduction"


# --- Copies ---------------------------------------------------------------------------------------


def _with_copies(graph: Graph) -> tuple[list[Node], list[int]]:
    """Return the nodes with a ``copy`` wherever one is needed, and the outputs among them."""
    nodes: list[Node] = []
    # What each node can be read as: axes in order, without gaps (``True``), or with the last two exchanged.
    order: list[str] = []
    moved: dict[int, int] = {}

    def add(node: Node) -> int:
        nodes.append(node)
        order.append(_order(node, nodes, order))
        return len(nodes) - 1

    def copied(number: int) -> int:
        return add(Node("copy", (number,), nodes[number].shape, nodes[number].dtype))

    for number, node in enumerate(graph.nodes):
        operands = [moved[operand] for operand in node.operands]
        if node.op == "matmul":
            operands = [one if order[one] in ("dense", "exchanged") else copied(one) for one in operands]
        elif node.op == "reshape":
            operands = [one if order[one] == "dense" else copied(one) for one in operands]
        moved[number] = add(replace(node, operands=tuple(operands)))
    outputs: list[int] = []
    for output in graph.outputs:
        number = moved[output]
        # Another shape of one block is that block.
        while nodes[number].op == "reshape":
            (number,) = nodes[number].operands
        is_stored = nodes[number].op not in _LAZY and nodes[number].op not in ("input", "constant")
        outputs.append(number if is_stored and number not in outputs else copied(moved[output]))
    return nodes, outputs


def _order(node: Node, nodes: Sequence[Node], order: Sequence[str]) -> str:
    if node.op == "constant" or node.op not in _LAZY:
        return "dense"
    source = order[node.operands[0]]
    if node.op == "reshape":
        return source
    if node.op == "transpose" and source in ("dense", "exchanged"):
        rank = len(node.axes)
        if rank >= 2 and node.axes == (*range(rank - 2), rank - 1, rank - 2):
            return "exchanged" if source == "dense" else "dense"
    return "other"


# --- Stages and groups ----------------------------------------------------------------------------


class _Fusion:
    def __init__(self, nodes: list[Node], outputs: list[int], input_count: int) -> None:
        self._nodes, self._outputs, self._input_count = nodes, outputs, input_count
        self._users: dict[int, list[int]] = defaultdict(list)
        for number, node in enumerate(nodes):
            for operand in node.operands:
                self._users[operand].append(number)
        # The node whose block is read where one is needed: itself, unless it is a way to read another.
        self._roots: list[int] = []
        for number, node in enumerate(nodes):
            self._roots.append(self._roots[node.operands[0]] if node.op in _LAZY else number)
        self._fused = self._find_fused()
        self._stages = self._find_stages()
        self._groups = self._find_groups()
        self._constants_in_memory = self._find_constants_in_memory()
        self._views: dict[int, View] = {}
        self._blocks: list[TensorType] = [nodes[number].type for number in range(input_count)]
        self._block_of: dict[int, int] = {number: number for number in range(input_count)}
        for number, node in enumerate(nodes):
            if number >= input_count and self._is_stored(number):
                self._block_of[number] = len(self._blocks)
                self._blocks.append(node.type)

    def _find_fused(self) -> set[int]:
        """Return the reductions that compute what they reduce, because nothing but reductions needs it."""
        fused: set[int] = set()
        outputs = set(self._outputs)
        # Sets of nodes as bits: what each may be computed together with; what is computed by 1, 2, … reductions so far.
        within: list[int] = []
        taken = [0] * limits.KERNEL_RECOMPUTED_MAX_COUNT
        for number, node in enumerate(self._nodes):
            within.append(0)
            if not _is_inline(node) or node.op == "constant":
                continue
            within[number] = 1 << number
            for operand in node.operands:
                if self._nodes[operand].shape == node.shape:
                    within[number] |= within[operand]
            users = self._users[number]
            is_free = number not in outputs and all(_is_reduction(self._nodes[user]) for user in users)
            # Each of them computes it again.
            if is_free and 0 < len(users) <= len(taken) and not within[number] & taken[-len(users)]:
                fused.update(users)
                for _ in users:
                    for times in range(len(taken) - 1, 0, -1):
                        taken[times] |= taken[times - 1] & within[number]
                    taken[0] |= within[number]
        return fused

    def _is_beside(self, number: int, operand: int) -> bool:
        """Whether ``operand`` is computed at the same places as ``number``, which needs it: no memory between them."""
        node, other = self._nodes[number], self._nodes[operand]
        if not _is_inline(other):
            return False
        return number in self._fused or (_is_inline(node) and node.shape == other.shape)

    def _find_stages(self) -> list[int]:
        stages: list[int] = []
        for number, node in enumerate(self._nodes):
            stage = 0
            for operand in node.operands:
                root = self._roots[operand]
                if root < self._input_count or self._is_constant(operand):
                    continue
                beside = self._is_beside(number, operand) or node.op in _LAZY
                stage = max(stage, stages[root] + (not beside))
            stages.append(stage)
        return stages

    def _is_constant(self, number: int) -> bool:
        """Whether ``number`` is one plain number, repeated perhaps."""
        return self._nodes[self._roots[number]].op == "constant"

    def _find_groups(self) -> list[int]:
        """Return for each inline node the least number among those that are computed with it."""
        groups = list(range(len(self._nodes)))

        def find(number: int) -> int:
            while groups[number] != number:
                groups[number] = number = groups[groups[number]]
            return number

        for number, node in enumerate(self._nodes):
            if not _is_inline(node):
                continue
            for operand in node.operands:
                together = self._is_beside(number, operand) and self._stages[operand] == self._stages[number]
                if together and self._nodes[operand].op != "constant":
                    one, other = find(number), find(operand)
                    groups[max(one, other)] = min(one, other)
        return [find(number) for number in range(len(self._nodes))]

    def _find_constants_in_memory(self) -> set[int]:
        """Return the plain numbers, and ways to read them, that are needed in memory: others stand in bodies."""
        found: set[int] = set()
        for number in range(len(self._nodes) - 1, -1, -1):
            if not self._is_constant(number):
                continue
            for user in self._users[number]:
                node = self._nodes[user]
                if user in found if node.op in _LAZY else not (_is_inline(node) or _is_reduction(node)):
                    found.add(number)
        return found

    def _is_stored(self, number: int) -> bool:
        node = self._nodes[number]
        if node.op in _LAZY:
            return False
        if not _is_inline(node) or number in self._outputs:
            return True
        if node.op == "constant":
            return number in self._constants_in_memory
        return any(not self._computes(user, number) for user in self._users[number])

    def _computes(self, user: int, number: int) -> bool:
        """Whether ``user`` computes ``number`` itself, rather than to read it."""
        if user in self._fused:
            return True
        return _is_inline(self._nodes[user]) and self._groups[user] == self._groups[number]

    # --- Steps ------------------------------------------------------------------------------------

    def program(self) -> Program:
        """Return the steps with their blocks."""
        steps: list[tuple[int, int, Step]] = []
        groups: dict[int, list[int]] = defaultdict(list)
        for number, node in enumerate(self._nodes):
            if number not in self._block_of or number < self._input_count:
                continue
            if _is_inline(node):
                groups[self._groups[number]].append(number)
            else:
                steps.append((self._stages[number], number, self._step(number, node)))
        for members in groups.values():
            steps.append((self._stages[members[0]], members[0], self._elementwise(members)))
        steps.sort(key=lambda item: item[:2])
        ordered = tuple(step for _, _, step in steps)
        outputs = tuple(self._block_of[output] for output in self._outputs)
        return Program(tuple(self._blocks), self._input_count, outputs, ordered, self._frees(ordered, outputs))

    def _frees(self, steps: Sequence[Step], outputs: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        last: dict[int, int] = {}
        for number, step in enumerate(steps):
            last.update(dict.fromkeys(blocks_read(step) | blocks_written(step), number))
        kept = {*range(self._input_count), *outputs}
        frees: list[list[int]] = [[] for _ in steps]
        for block, number in sorted(last.items()):
            if block not in kept:
                frees[number].append(block)
        return tuple(map(tuple, frees))

    def _step(self, number: int, node: Node) -> Step:
        result = self._block_of[number]
        operands = node.operands
        if node.op == "matmul":
            return self._matmul(node, result)
        if node.op == "place":
            (part,) = operands
            shape = self._nodes[part].shape
            target = View(result, shape, *_within(shape, element_strides(node.shape), node.starts, node.steps))
            return WriteStep(((self._view(part), target),), True, node.dtype, result)
        if node.op == "concatenate":
            return WriteStep(tuple(self._parts(node, result)), False, node.dtype, result)
        (operand,) = operands
        body, slots = self._body([operand], self._nodes[operand].shape, inline=number in self._fused)
        return ReduceStep(body, slots[operand], node.op, node.axes, node.dtype, result)

    def _parts(self, node: Node, result: int) -> list[tuple[View, View]]:
        (axis,) = node.axes
        strides = element_strides(node.shape)
        parts, start = [], 0
        for operand in node.operands:
            shape = self._nodes[operand].shape
            parts.append((self._view(operand), View(result, shape, start * strides[axis], strides)))
            start += shape[axis]
        return parts

    def _matmul(self, node: Node, result: int) -> MatmulStep:
        a, b = (self._view(operand) for operand in node.operands)
        *batch, rows, columns = node.shape
        inner = a.shape[-1]
        flags = not a.is_dense, not b.is_dense
        return MatmulStep(a.block, b.block, flags[0], flags[1], tuple(batch), rows, inner, columns, node.dtype, result)

    def _elementwise(self, members: list[int]) -> ElementwiseStep:
        body, slots = self._body(members, self._nodes[members[0]].shape, inline=True)
        return ElementwiseStep(body, tuple((slots[number], self._block_of[number]) for number in members))

    def _body(self, wanted: list[int], shape: Shape, *, inline: bool) -> tuple[Body, dict[int, int]]:
        """Return what computes ``wanted``, all of ``shape``, and their slots; ``inline``: they are computed in it."""
        computed: list[int] = []
        reads: dict[View, str] = {}
        sources: dict[int, View] = {}
        seen: set[int] = set()

        def visit(number: int) -> None:
            pending = [(number, False)]
            while pending:
                current, done = pending.pop()
                if done:
                    computed.append(current)
                elif current not in seen:
                    seen.add(current)
                    if self._is_constant(current):
                        computed.append(current)
                    elif self._is_computed_with(current, wanted[0], inline):
                        pending.append((current, True))
                        pending += [(operand, False) for operand in reversed(self._nodes[current].operands)]
                    else:
                        sources[current] = view = self._view(current)
                        reads[view] = self._nodes[current].dtype

        for number in wanted:
            visit(number)
        places = {view: place for place, view in enumerate(reads)}
        slots = {number: places[view] for number, view in sources.items()}
        for place, number in enumerate(computed):
            slots[number] = len(reads) + place
        instructions = tuple(self._instruction(number, slots) for number in computed)
        return Body(shape, tuple(reads), tuple(reads.values()), instructions), slots

    def _is_computed_with(self, number: int, wanted: int, inline: bool) -> bool:
        """Whether ``number`` is computed in the body of ``wanted``, rather than read."""
        if not inline or not _is_inline(self._nodes[number]):
            return False
        return self._groups[number] == self._groups[wanted]

    def _instruction(self, number: int, slots: dict[int, int]) -> Instruction:
        node = self._nodes[number]
        if self._is_constant(number):
            node = self._nodes[self._roots[number]]
            return Instruction("constant", (), node.dtype, "", node.value, node._value_key)
        if node.op == "iota":
            return Instruction("iota", (), node.dtype, axis=node.axes[0])
        operand_dtype = self._nodes[node.operands[-1]].dtype
        return Instruction(node.op, tuple(slots[operand] for operand in node.operands), node.dtype, operand_dtype)

    def _view(self, number: int) -> View:
        """Return how a stored node, or one that is a way to read one, is read."""
        ways: list[int] = []
        while number not in self._block_of and number not in self._views:
            ways.append(number)
            (number,) = self._nodes[number].operands
        view = self._views.get(number)
        if view is None:
            view = dense_view(self._block_of[number], self._nodes[number].shape)
        for way in reversed(ways):
            view = self._views[way] = _seen_through(self._nodes[way], view)
        return view


def _seen_through(node: Node, source: View) -> View:
    """Return how ``node``, a way to read what ``source`` shows, is read."""
    match node.op:
        case "reshape":
            return dense_view(source.block, node.shape)
        case "transpose":
            return View(source.block, node.shape, source.offset, tuple(source.strides[axis] for axis in node.axes))
        case "broadcast":
            missing = len(node.shape) - len(source.shape)
            pairs = zip(source.shape, node.shape[missing:], source.strides, strict=True)
            kept = tuple(stride if old == new else 0 for old, new, stride in pairs)
            return View(source.block, node.shape, source.offset, (0,) * missing + kept)
    offset, strides = _within(node.shape, source.strides, node.starts, node.steps)
    return View(source.block, node.shape, source.offset + offset, strides)


def _within(
    part: Shape, whole: Sequence[int], starts: Sequence[int], steps: Sequence[int]
) -> tuple[int, tuple[int, ...]]:
    """Return the offset and the strides of ``part`` of an array whose strides are ``whole``.

    Starts and steps of what has no element, or one, may be any numbers: they would lead out of the block, and of what
    processors count with.
    """
    if 0 in part:
        return 0, (0,) * len(part)
    offset = sum(start * stride for start, stride in zip(starts, whole, strict=True))
    pairs = zip(part, steps, whole, strict=True)
    return offset, tuple(step * stride if length > 1 else 0 for length, step, stride in pairs)
