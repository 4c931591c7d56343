"""Arguments that are no arrays, as keys of a table: what kernels of methods are kept by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparkle_mesh.kernels.structure import static_key


@dataclass(frozen=True, slots=True)
class Operand:
    """Stands for an array among arguments."""

    place: int


@dataclass(frozen=True, slots=True)
class Known:
    """A value; 1, 1.0 and True are three, as are numbers of different dtypes, 0.0 and -0.0."""

    key: Any
    value: Any = field(compare=False)


@dataclass(frozen=True, slots=True)
class Frozen:
    """A list, tuple or slice of such."""

    kind: str
    parts: tuple[object, ...]


def freeze(
    value: object, is_array: Callable[[object], bool] = lambda value: False, operands: list[Any] | None = None
) -> Any:
    """Return ``value`` frozen.

    Parameters
    ----------
    is_array, operands
        What is an array is appended to ``operands``.

    Raises
    ------
    KernelError
        If something in it has no hash.
    """
    if operands is not None and is_array(value):
        operands.append(value)
        return Operand(len(operands) - 1)
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return Frozen(kind, tuple(freeze(part, is_array, operands) for part in value))
    if isinstance(value, slice):
        return Frozen("slice", tuple(freeze(part) for part in (value.start, value.stop, value.step)))
    return Known(static_key(value, f"the argument {value!r}"), value)


def thaw(value: Any, operands: Sequence[Any] = ()) -> Any:
    """Return what was frozen, with ``operands`` in their places."""
    if isinstance(value, Operand):
        return operands[value.place]
    if isinstance(value, Known):
        return value.value
    parts = [thaw(part, operands) for part in value.parts]
    if value.kind == "slice":
        return slice(*parts)
    return parts if value.kind == "list" else tuple(parts)
