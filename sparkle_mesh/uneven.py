"""What a rank whose data are used up does so that the others can go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sparkle_mesh.errors import UsageError

_OPS = ("mean", "sum")


class UnevenSteps:
    """The reductions of the last step of a rank, to be made again without data."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, str, dict[str, Any]]] = []

    def begin(self) -> None:
        """A step begins: forget those of the one before."""
        self._calls = []

    def note(self, data: object, op: str, weight: float | None, **options: Any) -> float | None:
        """Note a reduction; return the weight that it is to have. Raises UsageError for an op that has none."""
        if op not in _OPS:
            raise UsageError(f"op {op!r} within uneven(): a rank without data can stand in for {_OPS} alone")
        self._calls.append((_like(data), op, options))
        return 1.0 if op == "mean" and weight is None else weight

    def stand_ins(self) -> Iterator[tuple[Any, str, dict[str, Any]]]:
        """Return the reductions of the last step again, of zeros without weight: data, op and other arguments.

        Raises
        ------
        UsageError
            If there was no step, so that nobody knows what they are.
        """
        if not self._calls:
            raise UsageError(
                "this rank has no batch at all, so it cannot know what the others reduce; give every rank at least one"
            )
        for like, op, options in self._calls:
            yield _zeros(like), op, {"weight": 0.0 if op == "mean" else None, **options}


def _like(data: object) -> Any:
    """Shapes and dtypes, in the form of ``data``."""
    if isinstance(data, np.ndarray):
        return (data.shape, data.dtype)
    if isinstance(data, Mapping):
        return {key: _like(value) for key, value in data.items()}
    return [_like(value) for value in data] if isinstance(data, list | tuple) else data


def _zeros(like: Any) -> Any:
    if isinstance(like, tuple):
        return np.zeros(*like)
    if isinstance(like, dict):
        return {key: _zeros(value) for key, value in like.items()}
    return [_zeros(value) for value in like] if isinstance(like, list) else like
