"""The collectives of a mesh, for ordinary threads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sparkle_mesh.portal import Portal

if TYPE_CHECKING:
    from sparkle_mesh.async_mesh import AsyncMesh
    from sparkle_mesh.collectives.compression import Compression
    from sparkle_mesh.collectives.explanation import Explanation
    from sparkle_mesh.collectives.quick import QuickCall

D = TypeVar("D")
T = TypeVar("T")


class Collectives:
    """What all ranks of a mesh call together: every one the same, in the same order."""

    _mesh: AsyncMesh
    _portal: Portal

    def all_reduce(
        self,
        data: D,
        op: str = "sum",
        *,
        algorithm: str = "auto",
        compression: str | Compression | None = None,
        timeout_s: float | None = None,
    ) -> D:
        """Reduce arrays over all ranks in place and return them; see :meth:`AsyncMesh.all_reduce`."""
        self._mesh._check_process()
        if compression is None:
            quick = self._mesh._group.quick_all_reduce(data, op, algorithm, timeout_s)
            if quick is not None:
                self._run_quickly(quick)
                return data

        async def all_reduce() -> D:
            return await self._mesh.all_reduce(
                data, op, algorithm=algorithm, compression=compression, timeout_s=timeout_s
            )

        return self._call(all_reduce)

    def explain(self, nbytes: int) -> Explanation:
        """Return how ``all_reduce`` of ``nbytes`` would be done, for printing; see :meth:`AsyncMesh.explain`."""
        return self._mesh.explain(nbytes)

    def broadcast(self, data: D, root: int = 0, *, timeout_s: float | None = None) -> D:
        """Copy ``data`` of rank ``root`` to every rank in place; see :meth:`AsyncMesh.broadcast`."""

        async def broadcast() -> D:
            return await self._mesh.broadcast(data, root, timeout_s=timeout_s)

        return self._call(broadcast)

    def reduce(self, data: D, op: str = "sum", root: int = 0, *, timeout_s: float | None = None) -> D:
        """Combine the arrays of all ranks into those of ``root``; see :meth:`AsyncMesh.reduce`."""
        return self._call(lambda: self._mesh.reduce(data, op, root, timeout_s=timeout_s))

    def reduce_scatter(self, data: Any, op: str = "sum", *, timeout_s: float | None = None) -> Any:
        """Return this rank's part of the arrays of all ranks combined; see :meth:`AsyncMesh.reduce_scatter`."""
        return self._call(lambda: self._mesh.reduce_scatter(data, op, timeout_s=timeout_s))

    def all_gather(self, data: Any, *, timeout_s: float | None = None) -> Any:
        """Return the arrays of all ranks; see :meth:`AsyncMesh.all_gather`."""
        return self._call(lambda: self._mesh.all_gather(data, timeout_s=timeout_s))

    def gather(self, data: Any, root: int = 0, *, timeout_s: float | None = None) -> Any:
        """Return the arrays of all ranks at ``root``; see :meth:`AsyncMesh.gather`."""
        return self._call(lambda: self._mesh.gather(data, root, timeout_s=timeout_s))

    def scatter(self, data: Any, root: int = 0, *, timeout_s: float | None = None) -> Any:
        """Hand out rows of the arrays of ``root``; see :meth:`AsyncMesh.scatter`."""
        return self._call(lambda: self._mesh.scatter(data, root, timeout_s=timeout_s))

    def all_to_all(self, data: Any, *, timeout_s: float | None = None) -> Any:
        """Give each rank its row of these arrays, and return theirs; see :meth:`AsyncMesh.all_to_all`."""
        return self._call(lambda: self._mesh.all_to_all(data, timeout_s=timeout_s))

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Wait until every rank has called it; see :meth:`AsyncMesh.barrier`."""

        self._mesh._check_process()
        quick = self._mesh._group.quick_barrier(timeout_s)
        if quick is not None:
            self._run_quickly(quick)
            return

        async def barrier() -> None:
            await self._mesh.barrier(timeout_s=timeout_s)

        self._call(barrier)

    def _run_quickly(self, call: QuickCall) -> None:
        done = False
        try:
            done = call.run()
        finally:
            if not done:
                self._portal.call(call.finish)

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        self._mesh._check_process()
        return self._portal.call(function)
