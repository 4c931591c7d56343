"""The collectives of a mesh, awaited."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar, cast

import trio

from sparkle_mesh.collectives.compression import Compression
from sparkle_mesh.collectives.explanation import Explanation
from sparkle_mesh.collectives.foreign import Lent, lend_for
from sparkle_mesh.collectives.group import CollectiveGroup, Root
from sparkle_mesh.collectives.pending import AsyncPendingReduction
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.uneven import AsyncUneven, UnevenSteps

B = TypeVar("B")
D = TypeVar("D")


class AsyncCollectives(ABC):
    """What all ranks of a mesh call together: every one the same, in the same order."""

    _group: CollectiveGroup
    _uneven: UnevenSteps | None = None

    @abstractmethod
    def _check_process(self) -> None:
        """Raises ForkedProcessError in another process than that which joined."""

    async def _call_with(
        self, kind: str, data: Any, function: Callable[[Any, Any], Awaitable[Any]], root: object = None
    ) -> Any:
        """Await ``function`` with NumPy arrays in the form of ``data`` and the root, if the collective has one.

        Returns what the caller gets for its result.
        """
        self._check_process()
        # Meant now: between here and where the call begins, ranks may change.
        root = None if root is None else self._group.root(root)
        lent = lend_for(kind, data, at_root=isinstance(root, Root) and root.is_here)
        return lent.returned(await lent.run(lambda arrays: function(arrays, root)))

    async def all_reduce(
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
    ) -> D:
        """Reduce arrays over all ranks, in place; every rank ends with the same bits. Returns ``data``.

        Parameters
        ----------
        data
            An array of any shape, or a list, tuple or dict of arrays; the same shapes, dtypes and keys on every rank.
            Arrays are NumPy's, or any that have DLPack: PyTorch's, CuPy's and JAX's, on the CPU or a GPU (whose
            contents pass through the host, and are copied by CuPy). Different ones may be mixed, and ranks may use
            different libraries. They hold the result when this returns, and are untouched when it raises; only after
            OutcomeUnknownError it is undefined what arrays of :meth:`allocate` hold. In the place of arrays that
            cannot be written to, such as JAX's, new ones of their library and device are returned, in a container of
            the same form. Arrays of GPUs are copied in trio's thread, and block it meanwhile: no other task runs.
        op
            ``"sum"``, ``"mean"`` (not of integers), ``"min"``, ``"max"`` or ``"prod"``. float16 and bfloat16 are added
            up in float32.
        algorithm
            ``"auto"`` to choose; or ``"ring"``, ``"tree"``, ``"direct"``, ``"halving_doubling"``, ``"butterfly"``,
            ``"hierarchical"``, or ``"shared"`` (one-sided, where all ranks share one host's memory).
        compression
            How to send float32, float16 or bfloat16 in fewer bytes: ``"float16"``, ``"bfloat16"``, ``"int8"``,
            ``"int4"``, ``"topk"``, a :class:`~sparkle_mesh.Compression` (with error feedback), or ``"auto"`` to weigh
            what the lines gain against what encoding costs. None, the default, loses nothing.
        weight
            Of this rank's arrays in a mean, such as the size of its batch: ``sum(weight * array) / sum(weight)``. 0 for
            a rank that has no data. Either all ranks give one, or none does.
        timeout_s
            Deadline in seconds, waiting for slow ranks included; ``limits.COLLECTIVE_TIMEOUT_S`` if None.
        tag
            Keeps calls apart that ranks may make in different orders, from several threads for example: those with the
            same tag are matched with each other, in their order.
        on_failure
            What happens when members are lost after the last call and before the result is there. ``"retry"``: those
            left agree on a view and make the call again, from untouched arrays; ``last_outcome.contributors`` says
            whose data are in the result. ``"raise"``: PeerLostError on all of them; the next call is among those left.
        min_contributors
            The least number of ranks whose data must be in the result; with fewer left, PeerLostError on every rank.
            Members that are late are waited for all the same, until ``timeout_s``: slow is not dead.

        Raises
        ------
        UsageError
            If an array cannot be reduced (NumPy's read-only ones, overlapping, a dtype that is not supported). Ranks
            where it can be get a CollectiveAbortedError, so that the next call is the same one everywhere.
        MismatchError
            On every rank, if ranks called different collectives or gave other shapes, dtypes or ops.
        PeerLostError
            If a member died or left and the call is not made again; the next one is among those left.
        QuorumLostError, ExcludedError, MeshMergedError
            If too few are left to decide, the others went on without this process, or another mesh was met: join again.
        CollectiveTimeoutError
            If the deadline passed; the message names the absent ranks.
        OutcomeUnknownError
            If it was given up (deadline, cancellation, Ctrl-C) when others may have returned with the result already;
            this process has left the mesh then.
        DivergenceError, CollectiveAbortedError, MeshClosedError
            If the results differ between ranks, another rank gave up, or the mesh was closed.
        """
        self._check_process()
        how: dict[str, Any] = {"algorithm": algorithm, "compression": compression, "tag": tag}
        terms: dict[str, Any] = {"timeout_s": timeout_s, "on_failure": on_failure, "min_contributors": min_contributors}
        return await self._all_reduce(lend_for("all_reduce", data), op, weight, how, terms)

    async def _all_reduce(
        self, lent: Lent[D], op: str, weight: float | None, how: dict[str, Any], terms: dict[str, Any]
    ) -> D:
        async def all_reduce(arrays: Any) -> None:
            await self._group.all_reduce(arrays, op, weight=self._note(arrays, op, weight, **how), **how, **terms)

        await lent.run(all_reduce)
        return lent.settle()

    def _note(self, arrays: Any, op: str, weight: float | None, **how: Any) -> float | None:
        """Note a reduction of a loop over :meth:`uneven`; return the weight that it is to have."""
        if self._uneven is None or self._uneven.owner is not trio.lowlevel.current_task():
            return weight
        return self._uneven.note(arrays, op, weight, **how)

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
    ) -> AsyncPendingReduction[D]:
        """Begin an :meth:`all_reduce` and return at once; ``await pending.wait()`` for its result, or its error.

        Parameters are as there. The arrays must be left alone until it has ended; those of GPUs hold the result, and
        new ones are made, when it is waited for. Many may be in flight; calls that are awaited directly may come
        between, in the same order on every rank for each tag.
        """
        self._check_process()
        lent = lend_for("all_reduce", data)
        how: dict[str, Any] = {"algorithm": algorithm, "compression": compression, "tag": tag}
        terms: dict[str, Any] = {"on_failure": on_failure, "min_contributors": min_contributors}
        try:
            weight = self._note(lent.arrays, op, weight, **how)
            pending: AsyncPendingReduction[D] = self._group.all_reduce_async(
                lent.arrays, op, weight=weight, timeout_s=timeout_s, **how, **terms
            )
        except SparkleError:
            lent.release()
            raise
        pending.gives(lent.settle)
        pending.releases(lent.release)
        return pending

    def uneven(self, batches: Iterable[B] | AsyncIterable[B]) -> AsyncIterator[B]:
        """Give ``batches`` to ``async for``, for as long as any rank has some; see :meth:`Mesh.uneven`."""
        return AsyncUneven(self, batches)

    def explain(self, nbytes: int) -> Explanation:
        """Return how ``all_reduce`` of an array of ``nbytes`` would be done: by which algorithm, in what time, and why.

        Print it for a table. Nothing is sent; every rank gets the same.
        """
        return self._group.explain(nbytes)

    async def broadcast(self, data: D, root: int = 0, *, timeout_s: float | None = None) -> D:
        """Copy ``data`` of rank ``root`` into ``data`` of every rank; returns it. Errors as :meth:`all_reduce`."""

        def broadcast(arrays: Any, root: Any) -> Awaitable[Any]:
            return self._group.broadcast(arrays, root, timeout_s=timeout_s)

        return cast(D, await self._call_with("broadcast", data, broadcast, root))

    async def reduce(self, data: D, op: str = "sum", root: int = 0, *, timeout_s: float | None = None) -> D:
        """Combine the arrays of all ranks into those of rank ``root``; returns ``data``. Errors as :meth:`all_reduce`.

        The others' arrays stay as they are, and may be read-only.
        """

        def reduce(arrays: Any, root: Any) -> Awaitable[Any]:
            return self._group.reduce(arrays, op, root, timeout_s=timeout_s)

        return cast(D, await self._call_with("reduce", data, reduce, root))

    async def reduce_scatter(self, data: Any, op: str = "sum", *, timeout_s: float | None = None) -> Any:
        """Combine the arrays of all ranks, and return this rank's part of the result: a new array for each given.

        Parts are those that :func:`numpy.array_split` makes along the first axis, of equal rows or nearly so. New
        arrays are of the library and on the device of what was given, here and below. Errors as :meth:`all_reduce`.
        """

        def reduce_scatter(arrays: Any, _: None) -> Awaitable[Any]:
            return self._group.reduce_scatter(arrays, op, timeout_s=timeout_s)

        return await self._call_with("reduce_scatter", data, reduce_scatter)

    async def all_gather(self, data: Any, *, timeout_s: float | None = None) -> Any:
        """Return the arrays of all ranks: for each of shape ``(…)`` a new one of shape ``(size, …)``.

        Every rank gives the same shapes and dtypes. Errors as :meth:`all_reduce`.
        """

        def all_gather(arrays: Any, _: None) -> Awaitable[Any]:
            return self._group.all_gather(arrays, timeout_s=timeout_s)

        return await self._call_with("all_gather", data, all_gather)

    async def gather(self, data: Any, root: int = 0, *, timeout_s: float | None = None) -> Any:
        """Return the arrays of all ranks at rank ``root``, as :meth:`all_gather` does, and None for each elsewhere."""

        def gather(arrays: Any, root: Any) -> Awaitable[Any]:
            return self._group.gather(arrays, root, timeout_s=timeout_s)

        return await self._call_with("gather", data, gather, root)

    async def scatter(self, data: Any, root: int = 0, *, timeout_s: float | None = None) -> Any:
        """Hand out rows of the arrays of rank ``root``, which are of shape ``(size, …)``: row ``r`` to rank ``r``.

        Other ranks give arrays of shape ``(…)``, which are filled in place and returned; ``root`` gets views of its own
        rows (for arrays of other libraries than NumPy: new arrays). Errors as :meth:`all_reduce`.
        """

        def scatter(arrays: Any, root: Any) -> Awaitable[Any]:
            return self._group.scatter(arrays, root, timeout_s=timeout_s)

        return await self._call_with("scatter", data, scatter, root)

    async def all_to_all(self, data: Any, *, timeout_s: float | None = None) -> Any:
        """Give row ``r`` of each array of shape ``(size, …)`` to rank ``r``; return new ones: row ``r`` is from ``r``.

        Errors as :meth:`all_reduce`.
        """

        def all_to_all(arrays: Any, _: None) -> Awaitable[Any]:
            return self._group.all_to_all(arrays, timeout_s=timeout_s)

        return await self._call_with("all_to_all", data, all_to_all)

    async def send(self, data: D, to: int, *, timeout_s: float | None = None, tag: str | None = None) -> D:
        """Give arrays to rank ``to`` alone, which must :meth:`receive` them; returns ``data`` once it has them.

        Parameters
        ----------
        data
            As for :meth:`all_reduce`; may be read-only.
        to
            Another rank. What one rank sends to another is received in the order in which it was sent, whatever
            other collectives either of them makes meanwhile.
        timeout_s
            Deadline in seconds, waiting for the other included; ``limits.COLLECTIVE_TIMEOUT_S`` if None. Two ranks that
            both send to each other before they receive wait that long: let one of them receive first.
        tag
            Keeps several streams from one rank to the other apart.

        Raises
        ------
        UsageError
            If ``to`` is no other rank, or the data cannot be sent.
        MismatchError, CollectiveTimeoutError, CollectiveAbortedError, PeerLostError, OutcomeUnknownError
            As :meth:`all_reduce`, on these two ranks: nothing was received.
        """

        def send(arrays: Any, _: None) -> Awaitable[Any]:
            return self._group.send(arrays, to, timeout_s=timeout_s, tag=tag)

        return cast(D, await self._call_with("send", data, send))

    async def receive(self, data: D, source: int, *, timeout_s: float | None = None, tag: str | None = None) -> D:
        """Fill arrays with what rank ``source`` gives to :meth:`send`, and return them.

        ``data`` has the shapes, dtypes and keys of what is sent. Parameters and errors are as there.
        """

        def receive(arrays: Any, _: None) -> Awaitable[Any]:
            return self._group.receive(arrays, source, timeout_s=timeout_s, tag=tag)

        return cast(D, await self._call_with("receive", data, receive))

    async def barrier(self, *, timeout_s: float | None = None) -> None:
        """Wait until every rank has called it. Errors as :meth:`all_reduce`."""
        self._check_process()
        await self._group.barrier(timeout_s=timeout_s)
