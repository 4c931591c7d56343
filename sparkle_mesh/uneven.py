"""What a rank whose data are used up does so that the others can go on."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import trio

from sparkle_mesh.errors import UsageError

if TYPE_CHECKING:
    from sparkle_mesh.async_collectives import AsyncCollectives

B = TypeVar("B")
_OPS = ("mean", "sum")


#: What a rank says, and the others are told, that cannot stand in because it has had no step.
NO_BATCH = "this rank has no batch at all, so it cannot know what the others reduce; give every rank at least one"


class UnevenSteps:
    """The reductions of the last step of a rank, to be made again without data.

    ``owner`` is the thread or task whose loop it is: what others call meanwhile is no part of it.
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self._calls: list[tuple[Any, str, dict[str, Any]]] = []
        #: Whether there was any step.
        self.begun = False

    def begin(self) -> None:
        """A step begins: forget those of the one before."""
        self._calls = []
        self.begun = True

    def note(self, data: object, op: str, weight: float | None, **options: Any) -> float | None:
        """Note a reduction; return the weight that it is to have. Raises UsageError for an op that has none."""
        if op not in _OPS:
            raise UsageError(f"op {op!r} within uneven(): a rank without data can stand in for {_OPS} alone")
        self._calls.append((_like(data), op, options))
        return 1.0 if op == "mean" and weight is None else weight

    def stand_ins(self) -> Iterator[tuple[Any, str, dict[str, Any]]]:
        """Return the reductions of the last step again, of zeros without weight: data, op and other arguments."""
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


class AsyncUneven(AsyncIterator[B]):
    """The loop of a trio program over its batches, for as long as any rank has some; see :meth:`Mesh.uneven`.

    No generator: that would learn of the loop's end only some time after it.
    """

    def __init__(self, mesh: AsyncCollectives, batches: Iterable[B] | AsyncIterable[B]) -> None:
        self._mesh, self._steps = mesh, UnevenSteps(None)
        self._left = aiter(batches) if isinstance(batches, AsyncIterable) else iter(batches)

    def __aiter__(self) -> AsyncUneven[B]:
        return self

    def __del__(self) -> None:
        self._end_step()

    def _end_step(self) -> None:
        if self._mesh._uneven is self._steps:
            self._mesh._uneven = None

    async def __anext__(self) -> B:
        self._end_step()
        if self._mesh._uneven is not None:
            raise UsageError("uneven() within uneven(); one loop at a time")
        none = object()
        while True:
            if isinstance(self._left, AsyncIterator):
                batch: Any = await anext(self._left, none)
            else:
                batch = next(self._left, none)
            having = np.array([batch is not none], np.int64)
            await self._mesh.all_reduce(having)
            if not having[0]:
                raise StopAsyncIteration
            if batch is not none:
                self._steps.begin()
                self._steps.owner = trio.lowlevel.current_task()
                self._mesh._uneven = self._steps
                return cast(B, batch)
            if not self._steps.begun:
                await self._mesh._group.refuse("step of uneven()", NO_BATCH)
            for data, op, options in self._steps.stand_ins():
                await self._mesh.all_reduce(data, op, **options)
