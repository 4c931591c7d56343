"""How a kernel's arguments and results are taken apart into arrays, and put together again.

Lists, tuples (named ones, too) and dicts with strings as keys are structure; so are None, strings, types, dtypes and
members of enumerations, which stay what they are. All else is an array or a number. The order is that of lists, and of
the sorted keys of dicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.errors import KernelError


@dataclass(frozen=True, slots=True)
class Structure:
    """One level of a structure.

    Attributes
    ----------
    kind
        ``list``, ``dict``, ``tuple`` or a named tuple's class; None for one array; ``Static`` for what is no array.
    keys
        Of a dict.
    parts
        The levels within.
    static
        What is no array.
    """

    kind: type | None
    keys: tuple[str, ...] = ()
    parts: tuple[Structure, ...] = ()
    static: Any = field(default=None, compare=False)
    # Makes 1, 1.0 and True three values, and 0.0 and -0.0 two.
    _static_key: Any = None

    @property
    def count(self) -> int:
        """How many arrays there are."""
        return 1 if self.kind is None else sum(part.count for part in self.parts)

    def build(self, leaves: Iterator[Any]) -> Any:
        """Return the structure around ``leaves``, from which as many are taken as it has."""
        if self.kind is None:
            return next(leaves)
        if self.kind is Static:
            return self.static
        built = [part.build(leaves) for part in self.parts]
        if self.kind is dict:
            return dict(zip(self.keys, built, strict=True))
        return self.kind(*built) if hasattr(self.kind, "_fields") else self.kind(built)


class Static:
    """The kind of what is no array."""


LEAF = Structure(None)


def static_key(value: Any, path: str) -> Any:
    """Return what tells ``value`` from others: numbers of different types are different, as are 0.0 and -0.0."""
    if isinstance(value, (tuple, frozenset)):
        return type(value), tuple(static_key(part, path) for part in value)
    if isinstance(value, (float, np.floating)):
        return type(value), float(value).hex()
    try:
        hash(value)
    except TypeError as error:
        raise KernelError(
            f"{path} is static and of type {type(value).__name__}, which has no hash; pass a number or a tuple"
        ) from error
    return type(value), value


def static_structure(value: Any, path: str) -> Structure:
    """Return the structure of ``value``, which is known when a kernel is traced."""
    return Structure(Static, static=value, _static_key=static_key(value, path))


def is_structure(value: object) -> bool:
    """Whether ``value`` is no array and no number."""
    return value is None or isinstance(value, (list, tuple, dict, str, type, np.dtype, Enum))


def flatten(
    value: Any, path: str, leaves: list[tuple[str, Any]], *, sort_keys: bool = True, depth: int = 0
) -> Structure:
    """Return the structure of ``value``, and append its arrays with their paths to ``leaves``.

    Raises
    ------
    KernelError
        If dicts have other keys than strings, or lists are too deep.
    """
    if not is_structure(value):
        leaves.append((path, value))
        return LEAF
    if depth > limits.KERNEL_STRUCTURE_MAX_DEPTH:
        raise KernelError(f"{path} is deeper than {limits.KERNEL_STRUCTURE_MAX_DEPTH} levels of lists and dicts")

    def inner(part: Any, where: str) -> Structure:
        return flatten(part, where, leaves, sort_keys=sort_keys, depth=depth + 1)

    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise KernelError(f"{path} is a dict with keys that are not strings: {list(value)}")
        keys = tuple(sorted(value) if sort_keys else value)
        parts = tuple(inner(value[key], f"{path}[{key!r}]") for key in keys)
        return Structure(dict, keys, parts)
    if isinstance(value, (list, tuple)):
        named: Sequence[str] = getattr(value, "_fields", ())
        paths = [f"{path}.{name}" for name in named] if named else [f"{path}[{place}]" for place in range(len(value))]
        parts = tuple(inner(part, where) for part, where in zip(value, paths, strict=True))
        kind: type = type(value) if named else list if isinstance(value, list) else tuple
        return Structure(kind, (), parts)
    return static_structure(value, path)
