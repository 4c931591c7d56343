"""The collectives of a mesh, for ordinary threads."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK
from sparkle_mesh.collectives.foreign import Lent, lend_for
from sparkle_mesh.collectives.group import CollectiveGroup, Root
from sparkle_mesh.errors import CollectiveTimeoutError, MeshClosedError, SparkleError, UsageError
from sparkle_mesh.portal import Portal
from sparkle_mesh.uneven import NO_BATCH, UnevenSteps

if TYPE_CHECKING:
    from sparkle_mesh.async_mesh import AsyncMesh
    from sparkle_mesh.collectives.compression import Compression
    from sparkle_mesh.collectives.explanation import Explanation
    from sparkle_mesh.collectives.operation import Outcome
    from sparkle_mesh.collectives.pending import AsyncPendingReduction
    from sparkle_mesh.collectives.quick import QuickCall
    from sparkle_mesh.membership.view import View

B = TypeVar("B")
D = TypeVar("D")
T = TypeVar("T")


class PendingReduction(Generic[D]):
    """A reduction in flight; made by :meth:`Mesh.all_reduce_async`. Leave its arrays alone until it has ended."""

    def __init__(
        self, pending: AsyncPendingReduction[Any], lent: Lent[D], portal: Portal, ended: Callable[[], None]
    ) -> None:
        self._pending, self._lent, self._portal, self._ended = pending, lent, portal, ended

    def __repr__(self) -> str:
        return repr(self._pending)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._pending.done()

    @property
    def progress(self) -> float:
        """How much of what this rank sends and receives is done, from 0 to 1."""
        return self._pending.progress

    @property
    def contributors(self) -> tuple[int, ...]:
        """The ranks whose data is in the result; empty until it has succeeded."""
        return self._pending.contributors

    @property
    def outcome(self) -> Outcome | None:
        """How it went; None until it has succeeded."""
        return self._pending.outcome

    def cancel(self) -> None:
        """Give the reduction up, on all ranks or on none; see :meth:`.AsyncPendingReduction.cancel`."""

        async def cancel() -> None:
            self._pending.cancel()

        if not self.done():
            self._portal.call(cancel)

    def wait(self, timeout_s: float | None = None, *, on_progress: Callable[[float], object] | None = None) -> D:
        """Return the data, which hold the result then; raise what ended it otherwise.

        Parameters
        ----------
        timeout_s
            How long to wait; until it ends if None. CollectiveTimeoutError if it has not ended by then: it goes on.
        on_progress
            Called in this thread now and then, with how much is done, from 0 to 1.
        """
        deadline = None if timeout_s is None else SYSTEM_CLOCK.now() + timeout_s
        while on_progress is not None and not self.done():
            left = math.inf if deadline is None else deadline - SYSTEM_CLOCK.now()
            if left <= 0:
                break
            with suppress(CollectiveTimeoutError):
                self._portal.call(partial(self._pending.wait, min(left, limits.PROGRESS_INTERVAL_S)))
            on_progress(self.progress)
        left_s = None if deadline is None else max(deadline - SYSTEM_CLOCK.now(), 0.0)
        try:
            # What has ended can be had after the mesh was closed, too.
            if self.done():
                self._pending.result()
            else:
                self._portal.call(partial(self._pending.wait, left_s))
            return self._lent.settle()
        except MeshClosedError:
            self._pending.given_up_by_waiter()
            raise
        finally:
            self._ended()


class Collectives:
    """What all ranks of a mesh call together: every one the same, in the same order."""

    _mesh: AsyncMesh
    _portal: Portal
    _uneven: UnevenSteps | None = None
    _view_callbacks: list[Callable[[View], object]]
    _told_epoch: tuple[int, int]

    def uneven(self, batches: Iterable[B]) -> Iterator[B]:
        """Give ``batches`` one after the other, and go on for as long as any rank has some.

        For data that do not divide evenly: when a rank's own batches are used up, it makes the reductions of its last
        step again on behalf of the others, with a weight of 0, until nobody has a batch. So within the loop every rank
        calls ``all_reduce`` alike in every step, with ``op="mean"`` (a mean over those who have a batch; ``weight`` may
        say how much each counts) or ``"sum"`` (to which others add zeros). Each step costs one more small message, and
        must reduce the same as every other: nothing in every second step only, and nothing but by ``all_reduce``. What
        other threads call meanwhile is no part of it.

        Raises
        ------
        UsageError
            If another op is reduced within the loop, or a rank has no batch at all and so cannot know what to reduce.

        Examples
        --------
        >>> import numpy as np, sparkle_mesh as sparkle
        >>> with sparkle.join("my-run", min_peers=1, lan=False) as mesh:
        ...     for batch in mesh.uneven([np.ones(2), np.ones(2)]):
        ...         gradient = mesh.all_reduce(batch.copy(), op="mean", weight=len(batch))
        """
        if self._uneven is not None:
            raise UsageError("uneven() within uneven(); one loop at a time")
        left, steps = iter(batches), UnevenSteps(get_ident())
        none = object()
        while True:
            batch: Any = next(left, none)
            having = np.array([batch is not none], np.int64)
            self.all_reduce(having)
            if not having[0]:
                return
            if batch is none:
                if not steps.begun:
                    self._call(lambda: self._mesh._group.refuse("step of uneven()", NO_BATCH))
                for data, op, options in steps.stand_ins():
                    self.all_reduce(data, op, **options)
                continue
            steps.begin()
            self._uneven = steps
            try:
                yield batch
            finally:
                self._uneven = None

    def all_reduce(
        self,
        data: D,
        op: str = "sum",
        *,
        algorithm: str = "auto",
        compression: str | Compression | None = None,
        weight: float | None = None,
        timeout_s: float | None = None,
        tag: str | None = None,
        on_failure: str = "retry",
        min_contributors: int | None = None,
        on_progress: Callable[[float], object] | None = None,
    ) -> D:
        """Reduce arrays over all ranks in place and return them; see :meth:`AsyncMesh.all_reduce`.

        ``on_progress`` is called in this thread now and then, with how much is done, from 0 to 1.
        """
        lent = self._lend("all_reduce", data)
        weight = self._note(lent, op, weight, algorithm=algorithm, compression=compression, tag=tag)
        options: dict[str, Any] = {
            "algorithm": algorithm,
            "compression": compression,
            "weight": weight,
            "timeout_s": timeout_s,
            "tag": tag,
            "on_failure": on_failure,
            "min_contributors": min_contributors,
        }
        if on_progress is not None:
            return self._begin(lent, op, **options).wait(on_progress=on_progress)
        as_usual = on_failure == "retry" and min_contributors is None
        if compression is None and weight is None and tag is None and as_usual:
            quick = self._mesh._group.quick_all_reduce(lent.arrays, op, algorithm, timeout_s)
            if quick is not None:
                self._run_quickly(quick, lent)
                return lent.settle()

        def all_reduce(arrays: Any) -> Awaitable[Any]:
            return self._mesh._group.all_reduce(arrays, op, **options)

        self._call(lambda: lent.run(all_reduce))
        return lent.settle()

    def _note(self, lent: Lent[Any], op: str, weight: float | None, **how: Any) -> float | None:
        """Note a reduction of a loop over :meth:`uneven`; return the weight that it is to have."""
        if self._uneven is None or self._uneven.owner != get_ident():
            return weight
        try:
            return self._uneven.note(lent.arrays, op, weight, **how)
        except UsageError:
            lent.release()
            raise

    def all_reduce_async(
        self,
        data: D,
        op: str = "sum",
        *,
        algorithm: str = "auto",
        compression: str | Compression | None = None,
        weight: float | None = None,
        timeout_s: float | None = None,
        tag: str | None = None,
        on_failure: str = "retry",
        min_contributors: int | None = None,
    ) -> PendingReduction[D]:
        """Begin an :meth:`all_reduce` and return at once; see :meth:`AsyncMesh.all_reduce_async`.

        Examples
        --------
        >>> import numpy as np, sparkle_mesh as sparkle
        >>> with sparkle.join("my-run", min_peers=1, lan=False) as mesh:
        ...     pending = mesh.all_reduce_async(np.ones(3))
        ...     pending.wait()  # after some other work
        array([1., 1., 1.])
        """

        lent = self._lend("all_reduce", data)
        weight = self._note(lent, op, weight, algorithm=algorithm, compression=compression, tag=tag)
        return self._begin(
            lent,
            op,
            algorithm=algorithm,
            compression=compression,
            weight=weight,
            timeout_s=timeout_s,
            tag=tag,
            on_failure=on_failure,
            min_contributors=min_contributors,
        )

    def _begin(self, lent: Lent[D], op: str, **options: Any) -> PendingReduction[D]:
        async def begin() -> AsyncPendingReduction[Any]:
            try:
                pending = self._mesh._group.all_reduce_async(lent.arrays, op, **options)
            except SparkleError:
                lent.release()
                raise
            pending.releases(lent.release)
            return pending

        return PendingReduction(self._call(begin), lent, self._portal, self._call_ended)

    def _lend(self, kind: str, data: D, *, at_root: bool = False) -> Lent[D]:
        """Return NumPy arrays in the form of ``data``; in this thread, whose streams count on a GPU."""
        self._mesh._check_process()
        return lend_for(kind, data, at_root=at_root)

    def _call_with(
        self, kind: str, data: Any, function: Callable[[CollectiveGroup, Any, Any], Awaitable[Any]], root: object = None
    ) -> Any:
        """Await ``function`` with NumPy arrays in the form of ``data`` and the root, if the collective has one.

        Returns what the caller gets for its result.
        """
        # Meant now: between here and where the call begins, ranks may change.
        root = None if root is None else self._mesh._group.root(root)
        lent = self._lend(kind, data, at_root=isinstance(root, Root) and root.is_here)
        return lent.returned(self._call(lambda: lent.run(lambda arrays: function(self._mesh._group, arrays, root))))

    def explain(self, nbytes: int) -> Explanation:
        """Return how ``all_reduce`` of ``nbytes`` would be done, for printing; see :meth:`AsyncMesh.explain`."""
        return self._mesh.explain(nbytes)

    def broadcast(self, data: D, root: int = 0, *, timeout_s: float | None = None) -> D:
        """Copy ``data`` of rank ``root`` to every rank in place; see :meth:`AsyncMesh.broadcast`."""

        def broadcast(group: CollectiveGroup, arrays: Any, root: Any) -> Awaitable[Any]:
            return group.broadcast(arrays, root, timeout_s=timeout_s)

        return cast(D, self._call_with("broadcast", data, broadcast, root))

    def reduce(self, data: D, op: str = "sum", root: int = 0, *, timeout_s: float | None = None) -> D:
        """Combine the arrays of all ranks into those of ``root``; see :meth:`AsyncMesh.reduce`."""

        def reduce(group: CollectiveGroup, arrays: Any, root: Any) -> Awaitable[Any]:
            return group.reduce(arrays, op, root, timeout_s=timeout_s)

        return cast(D, self._call_with("reduce", data, reduce, root))

    def reduce_scatter(self, data: Any, op: str = "sum", *, timeout_s: float | None = None) -> Any:
        """Return this rank's part of the arrays of all ranks combined; see :meth:`AsyncMesh.reduce_scatter`."""

        def reduce_scatter(group: CollectiveGroup, arrays: Any, _: None) -> Awaitable[Any]:
            return group.reduce_scatter(arrays, op, timeout_s=timeout_s)

        return self._call_with("reduce_scatter", data, reduce_scatter)

    def all_gather(self, data: Any, *, timeout_s: float | None = None) -> Any:
        """Return the arrays of all ranks; see :meth:`AsyncMesh.all_gather`."""

        def all_gather(group: CollectiveGroup, arrays: Any, _: None) -> Awaitable[Any]:
            return group.all_gather(arrays, timeout_s=timeout_s)

        return self._call_with("all_gather", data, all_gather)

    def gather(self, data: Any, root: int = 0, *, timeout_s: float | None = None) -> Any:
        """Return the arrays of all ranks at ``root``; see :meth:`AsyncMesh.gather`."""

        def gather(group: CollectiveGroup, arrays: Any, root: Any) -> Awaitable[Any]:
            return group.gather(arrays, root, timeout_s=timeout_s)

        return self._call_with("gather", data, gather, root)

    def scatter(self, data: Any, root: int = 0, *, timeout_s: float | None = None) -> Any:
        """Hand out rows of the arrays of ``root``; see :meth:`AsyncMesh.scatter`."""

        def scatter(group: CollectiveGroup, arrays: Any, root: Any) -> Awaitable[Any]:
            return group.scatter(arrays, root, timeout_s=timeout_s)

        return self._call_with("scatter", data, scatter, root)

    def all_to_all(self, data: Any, *, timeout_s: float | None = None) -> Any:
        """Give each rank its row of these arrays, and return theirs; see :meth:`AsyncMesh.all_to_all`."""

        def all_to_all(group: CollectiveGroup, arrays: Any, _: None) -> Awaitable[Any]:
            return group.all_to_all(arrays, timeout_s=timeout_s)

        return self._call_with("all_to_all", data, all_to_all)

    def send(self, data: D, to: int, *, timeout_s: float | None = None, tag: str | None = None) -> D:
        """Give arrays to rank ``to``, which must :meth:`receive` them; see :meth:`AsyncMesh.send`."""

        def send(group: CollectiveGroup, arrays: Any, _: None) -> Awaitable[Any]:
            return group.send(arrays, to, timeout_s=timeout_s, tag=tag)

        return cast(D, self._call_with("send", data, send))

    def receive(self, data: D, source: int, *, timeout_s: float | None = None, tag: str | None = None) -> D:
        """Fill arrays with what rank ``source`` sends; see :meth:`AsyncMesh.receive`."""

        def receive(group: CollectiveGroup, arrays: Any, _: None) -> Awaitable[Any]:
            return group.receive(arrays, source, timeout_s=timeout_s, tag=tag)

        return cast(D, self._call_with("receive", data, receive))

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

    def on_view_change(self, callback: Callable[[View], object]) -> None:
        """Call ``callback`` with the view whenever that has changed: in the thread of a call, just before it returns.

        ``rank``, ``size``, ``members`` and ``view`` change at the end of a call, and never between two calls.
        """
        self._view_callbacks.append(callback)

    def _call_ended(self) -> None:
        """Tell of a view that the calling thread does not know yet."""
        epoch = (self._mesh._lives.count, self._mesh._group.shown[0])
        if epoch != self._told_epoch:
            self._told_epoch = epoch
            for callback in self._view_callbacks:
                callback(self._mesh.view)

    def _run_quickly(self, call: QuickCall, lent: Lent[Any] | None = None) -> None:
        done = False
        try:
            done = call.run()
        finally:
            if not done:
                try:
                    self._portal.call(call.finish if lent is None else lambda: lent.run(lambda _: call.finish()))
                finally:
                    self._call_ended()

    def _call(
        self,
        function: Callable[[], Awaitable[T]],
        on_progress: Callable[[float], object] | None = None,
        progress: Callable[[], float] = lambda: 1.0,
    ) -> T:
        self._mesh._check_process()
        try:
            return self._portal.call(function, on_look=None if on_progress is None else lambda: on_progress(progress()))
        finally:
            self._call_ended()
