"""How much each operand of an operation counts for its result: one rule for every operation that has derivatives.

A rule is given the gradient with respect to the result, and returns that with respect to one operand, as nodes of the
same graph. Where a function has no derivative: at ties ``maximum`` and ``minimum`` share the gradient evenly, as do all
that are greatest or least in ``max`` and ``min``; ``absolute`` has 0 at 0; steps (``floor``, ``sign``) have 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, prod
from typing import TypeAlias

from sparkle_mesh.kernels.graph import GraphBuilder, Node, WeakScalar
from sparkle_mesh.kernels.ops import FLOATS, Shape


@dataclass(frozen=True, slots=True)
class Place:
    """An operand of an operation.

    Attributes
    ----------
    builder
        Builds the graph that both are in.
    node
        The operation, with its shape and attributes; its operands are of another graph.
    operands, result
        The operation's in the graph that is built.
    position
        Which operand it is.
    """

    builder: GraphBuilder
    node: Node
    operands: tuple[int, ...]
    result: int
    position: int

    @property
    def a(self) -> int:
        """The first operand."""
        return self.operands[0]

    @property
    def b(self) -> int:
        """The second operand."""
        return self.operands[1]

    @property
    def y(self) -> int:
        """The result."""
        return self.result

    @property
    def shape(self) -> Shape:
        """The shape of the operand."""
        return self.builder.type_of(self.operands[self.position]).shape

    def do(self, op: str, *operands: int | float) -> int:
        """Apply an operation; floats are plain numbers. What is multiplied by one stays what it is."""
        if op == "multiply":
            one, other = operands
            if isinstance(one, int) and isinstance(other, int):
                for factor, kept in ((one, other), (other, one)):
                    if known_number(self.builder, factor) == 1.0 and self._is_as(kept, factor):
                        return kept
        return self.builder.elementwise(op, *(WeakScalar(x) if isinstance(x, float) else x for x in operands))

    def _is_as(self, number: int, other: int) -> bool:
        return self.builder.type_of(number) == self.builder.type_of(other)

    def choose(self, condition: int, yes: int | float, no: int | float) -> int:
        """Return ``where(condition, yes, no)``."""
        return self.do("where", condition, yes, no)


def known_number(builder: GraphBuilder, number: int) -> float | None:
    """Return the number that all elements of a node are, if it is a constant, repeated perhaps."""
    node = builder.node(number)
    while node.op in ("broadcast", "reshape"):
        node = builder.node(node.operands[0])
    return float(node.value) if node.op == "constant" and node.value is not None else None


Rule: TypeAlias = Callable[[Place, int], int | None]


def _scaled(slope: Callable[[Place], int | float]) -> Rule:
    """Return the rule of a function whose derivative is ``slope``."""
    return lambda p, g: p.do("multiply", g, slope(p))


def _over(divisor: Callable[[Place], int]) -> Rule:
    """Return the rule of a function whose derivative is ``1 / divisor``."""
    return lambda p, g: p.do("divide", g, divisor(p))


def _zero(place: Place, gradient: int) -> None:
    """The derivative is 0, wherever there is one."""
    return


def _one_less_square(p: Place, x: int) -> int:
    return p.do("subtract", 1.0, p.do("square", x))


_UNARY: dict[str, Rule] = {
    "negative": lambda p, g: p.do("negative", g),
    "absolute": _scaled(lambda p: p.do("sign", p.a)),
    "square": _scaled(lambda p: p.do("multiply", p.a, 2.0)),
    "sqrt": _over(lambda p: p.do("multiply", p.y, 2.0)),
    "reciprocal": lambda p, g: p.do("negative", p.do("multiply", g, p.do("square", p.y))),
    "exp": _scaled(lambda p: p.y),
    "exp2": _scaled(lambda p: p.do("multiply", p.y, log(2))),
    "expm1": _scaled(lambda p: p.do("add", p.y, 1.0)),
    "log": _over(lambda p: p.a),
    "log1p": _over(lambda p: p.do("add", p.a, 1.0)),
    "log2": _over(lambda p: p.do("multiply", p.a, log(2))),
    "log10": _over(lambda p: p.do("multiply", p.a, log(10))),
    "sin": _scaled(lambda p: p.do("cos", p.a)),
    "cos": lambda p, g: p.do("negative", p.do("multiply", g, p.do("sin", p.a))),
    "tan": _scaled(lambda p: p.do("add", p.do("square", p.y), 1.0)),
    "arcsin": _over(lambda p: p.do("sqrt", _one_less_square(p, p.a))),
    "arccos": lambda p, g: p.do("negative", p.do("divide", g, p.do("sqrt", _one_less_square(p, p.a)))),
    "arctan": _over(lambda p: p.do("add", p.do("square", p.a), 1.0)),
    "sinh": _scaled(lambda p: p.do("cosh", p.a)),
    "cosh": _scaled(lambda p: p.do("sinh", p.a)),
    "tanh": _scaled(lambda p: _one_less_square(p, p.y)),
    # hypot does not overflow where a square would.
    "arcsinh": _over(lambda p: p.do("hypot", p.a, 1.0)),
    "arccosh": _over(
        lambda p: p.do("multiply", p.do("sqrt", p.do("subtract", p.a, 1.0)), p.do("sqrt", p.do("add", p.a, 1.0)))
    ),
    "arctanh": _over(lambda p: _one_less_square(p, p.a)),
}


def _maximum(p: Place, g: int) -> int:
    """Give all to the operand that is taken, half to each at a tie."""
    mine, other = p.operands[p.position], p.operands[1 - p.position]
    taken = "greater" if p.node.op == "maximum" else "less"
    tied = p.choose(p.do("equal", mine, other), p.do("multiply", g, 0.5), 0.0)
    return p.choose(p.do(taken, mine, other), g, tied)


def _copysign(p: Place, g: int) -> int | None:
    if p.position:
        return None
    same = p.do("equal", p.do("signbit", p.a), p.do("signbit", p.b))
    return p.choose(same, g, p.do("negative", g))


def _divide(p: Place, g: int) -> int:
    part = p.do("divide", g, p.b)
    return p.do("negative", p.do("multiply", part, p.y)) if p.position else part


def _remainder(p: Place, g: int) -> int:
    return p.do("negative", p.do("multiply", g, p.do("floor_divide", p.a, p.b))) if p.position else g


def _hypot(p: Place, g: int) -> int:
    # At the origin it has no derivative: 0 rather than 0 / 0.
    divisor = p.choose(p.do("equal", p.y, 0.0), 1.0, p.y)
    return p.do("multiply", g, p.do("divide", p.operands[p.position], divisor))


def _arctan2(p: Place, g: int) -> int:
    total = p.do("add", p.do("square", p.a), p.do("square", p.b))
    slope = p.do("divide", p.operands[1 - p.position], p.choose(p.do("equal", total, 0.0), 1.0, total))
    part = p.do("multiply", g, slope)
    return p.do("negative", part) if p.position else part


def _power(p: Place, g: int) -> int | None:
    if p.position:
        # 0 ** b does not change with b, but log(0) is infinite.
        base = p.choose(p.do("equal", p.a, 0.0), 1.0, p.a)
        return p.do("multiply", g, p.do("multiply", p.y, p.do("log", base)))
    exponent = known_number(p.builder, p.b)
    if exponent is not None:
        if exponent == 0.0:
            return None
        lower = p.a if exponent == 2.0 else p.do("power", p.a, exponent - 1.0)
        return p.do("multiply", g, p.do("multiply", lower, exponent))
    # a ** 0 does not change with a, but 0 ** -1 is infinite.
    less = p.choose(p.do("equal", p.b, 0.0), 1.0, p.do("subtract", p.b, 1.0))
    return p.do("multiply", g, p.do("multiply", p.b, p.do("power", p.a, less)))


def _where(p: Place, g: int) -> int | None:
    if p.position == 0:
        return None
    return p.choose(p.a, g, 0.0) if p.position == 1 else p.choose(p.a, 0.0, g)


def _cast(p: Place, g: int) -> int | None:
    dtype = p.builder.type_of(p.a).dtype
    return p.builder.cast(g, dtype) if dtype in FLOATS else None


_BINARY: dict[str, Rule] = {
    "add": lambda p, g: g,
    "subtract": lambda p, g: p.do("negative", g) if p.position else g,
    "multiply": lambda p, g: p.do("multiply", g, p.operands[1 - p.position]),
    "divide": _divide,
    "remainder": _remainder,
    "maximum": _maximum,
    "minimum": _maximum,
    "copysign": _copysign,
    "hypot": _hypot,
    "arctan2": _arctan2,
    "power": _power,
    "where": _where,
    "cast": _cast,
}


# --- Reductions -------------------------------------------------------------------------------


def _spread(p: Place, number: int) -> int:
    """Repeat what is of the shape of a reduction's result along the axes that it dropped."""
    kept = tuple(1 if axis in p.node.axes else length for axis, length in enumerate(p.shape))
    return p.builder.broadcast(p.builder.reshape(number, kept), p.shape)


def _extremum(p: Place, g: int) -> int:
    is_taken = p.builder.cast(p.do("equal", p.a, _spread(p, p.y)), p.node.dtype)
    count = p.builder.reduce("sum", is_taken, p.node.axes)
    return p.do("multiply", _spread(p, p.do("divide", g, count)), is_taken)


def _prod(p: Place, g: int) -> int:
    """Multiply by the product of all others, which no division gives where elements are 0."""
    builder = p.builder
    if not p.node.axes:
        return g
    kept = [axis for axis in range(len(p.shape)) if axis not in p.node.axes]
    order = (*kept, *p.node.axes)
    lengths = tuple(p.shape[axis] for axis in kept)
    count = prod(p.shape[axis] for axis in p.node.axes)
    rows = builder.reshape(builder.transpose(p.a, order), (*lengths, count))
    others = p.do("multiply", _running(p, rows, count, 1), _running(p, rows, count, -1))
    moved = builder.reshape(others, tuple(p.shape[axis] for axis in order))
    back = builder.transpose(moved, tuple(order.index(axis) for axis in range(len(order))))
    return p.do("multiply", _spread(p, g), back)


def _running(p: Place, rows: int, count: int, step: int) -> int:
    """Return the product of all that stand before each element of the last axis; after it, if ``step`` is -1."""
    found = _shifted(p, rows, count, step)
    reach = 1
    while reach < count:
        found = p.do("multiply", found, _shifted(p, found, count, step * reach))
        reach *= 2
    return found


def _shifted(p: Place, rows: int, count: int, by: int) -> int:
    """Move elements on along the last axis by ``by``, with ones in their place."""
    builder = p.builder
    shape = builder.type_of(rows).shape
    by = max(-count, min(by, count))
    ones = builder.broadcast(builder.constant(1.0, p.node.dtype), (*shape[:-1], abs(by)))
    rest = _slice(builder, rows, len(shape) - 1, max(-by, 0), count - abs(by))
    parts = (ones, rest) if by > 0 else (rest, ones)
    return builder.add("concatenate", *parts, axes=(len(shape) - 1,))


def _slice(builder: GraphBuilder, number: int, axis: int, start: int, count: int) -> int:
    shape = builder.type_of(number).shape
    starts = tuple(start if one == axis and count else 0 for one in range(len(shape)))
    lengths = tuple(count if one == axis else length for one, length in enumerate(shape))
    return builder.add("slice", number, shape=lengths, starts=starts, steps=(1,) * len(shape))


# --- Products and movements -------------------------------------------------------------------


def _matmul(p: Place, g: int) -> int:
    builder = p.builder
    rank = len(p.shape)
    other = builder.transpose(p.operands[1 - p.position], (*range(rank - 2), rank - 1, rank - 2))
    return builder.matmul(other, g) if p.position else builder.matmul(g, other)


def _transpose(p: Place, g: int) -> int:
    return p.builder.transpose(g, tuple(p.node.axes.index(axis) for axis in range(len(p.node.axes))))


def _broadcast(p: Place, g: int) -> int:
    shape = p.shape
    missing = len(p.node.shape) - len(shape)
    axes = [*range(missing)]
    axes += [missing + axis for axis, length in enumerate(shape) if length != p.node.shape[missing + axis]]
    return p.builder.reshape(p.builder.reduce("sum", g, axes), shape)


def _concatenate(p: Place, g: int) -> int:
    (axis,) = p.node.axes
    lengths = [p.builder.type_of(operand).shape[axis] for operand in p.operands]
    return _slice(p.builder, g, axis, sum(lengths[: p.position]), lengths[p.position])


_MOVING: dict[str, Rule] = {
    "sum": _spread,
    "prod": _prod,
    "max": _extremum,
    "min": _extremum,
    "matmul": _matmul,
    "reshape": lambda p, g: p.builder.reshape(g, p.shape),
    "transpose": _transpose,
    "broadcast": _broadcast,
    "slice": lambda p, g: p.builder.add("place", g, shape=p.shape, starts=p.node.starts, steps=p.node.steps),
    "place": lambda p, g: p.builder.add("slice", g, shape=p.shape, starts=p.node.starts, steps=p.node.steps),
    "concatenate": _concatenate,
}

#: For each operation with floats for a result. ``_zero``: it is made of steps, or has no operands.
RULES: dict[str, Rule] = {
    **_UNARY,
    **_BINARY,
    **_MOVING,
    **dict.fromkeys(("sign", "floor", "ceil", "rint", "trunc", "floor_divide"), _zero),
    **dict.fromkeys(("constant", "iota", "input"), _zero),
}
#: Operations whose results are no floats: no gradient goes through them.
NOT_DIFFERENTIABLE = frozenset(
    {"logical_not", "invert", "isnan", "isinf", "isfinite", "signbit", "equal", "not_equal", "less", "less_equal"}
    | {"greater", "greater_equal", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or"}
    | {"bitwise_xor", "left_shift", "right_shift"}
)
