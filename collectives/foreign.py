"""What callers may pass instead of NumPy arrays: arrays of any library that has DLPack, as NumPy arrays for one call.

:func:`lend` gives NumPy arrays in the form of what it was given, for collectives to read and to write; when the call
has succeeded, :meth:`Lent.settle` gives the caller its own arrays back, with the result in them. When it has failed
they are as they were, and :meth:`Lent.release` keeps what memory was used for the next call.

- Memory of the processor that can be written to (tensors of PyTorch) is used where it lies.
- Arrays that cannot be written to (of JAX, for example, wherever they are) are copied, and the caller gets new ones of
  the same library, on the same device: made by ``asarray`` of the Array API, which they have.
- Arrays of GPUs pass through pinned memory of the host: :mod:`.cupy_arrays`. They are read in the order of the calling
  thread's streams, and written before :meth:`Lent.settle` returns: call both in the thread of the caller.

What a collective makes anew is made like what it was given, of the same library and on the same device.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np

from sparkle_mesh.collectives.dlpack import (
    GPU_DEVICES,
    HOST_DEVICES,
    REFUSALS,
    device_of,
    host_view,
    is_always_writable,
    is_foreign,
    libraries_of,
    quick_view,
    type_name,
)
from sparkle_mesh.collectives.reduction import Array
from sparkle_mesh.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from sparkle_mesh.collectives.cupy_arrays import OnGpus

D = TypeVar("D")
T = TypeVar("T")
# In these all ranks but one get what that one gives.
_GIVEN_BY_ROOT = ("broadcast", "scatter", "receive")


@dataclass(frozen=True, slots=True)
class Refused:
    """In the place of arrays that cannot be lent: a call that is given it fails with ``error``."""

    error: UsageError


class Lent(Generic[D]):
    """The arrays of one call, where nothing had to be lent: most calls are of NumPy's. See :func:`lend`.

    Attributes
    ----------
    arrays
        What was given, with NumPy arrays for those of other libraries.
    """

    __slots__ = ("_data", "arrays")

    def __init__(self, data: D) -> None:
        self.arrays: Any = data
        self._data = data

    def run(self, call: Callable[[Any], Awaitable[T]]) -> Awaitable[T]:
        """Await ``call(arrays)``; :meth:`release` them if it fails, or is cancelled."""
        return call(self.arrays)

    def release(self) -> None:
        """The call has ended without a result, and writes to :attr:`arrays` no more: they may become another call's.

        A link may still be sending from them what nobody waits for; as it may from arrays of NumPy, which their owner
        may then write to.
        """

    def settle(self) -> D:
        """Return what the call returns whose result is in :attr:`arrays`: the caller's own, which hold it now.

        Where arrays cannot be written to, it is a container of the same form with new ones in their places. It may be
        called again, and from any thread.

        Raises
        ------
        DeviceError
            If the result cannot be put where it belongs: then every time.
        """
        return self._data

    def returned(self, result: Any) -> Any:
        """Return what the caller gets for what the collective returned: ``arrays``, or new ones in their form."""
        return result


class _LentByOthers(Lent[D]):
    """The arrays of one call, some of which are of other libraries: ``values``, in the order of ``data``."""

    __slots__ = ("_failure", "_foreign", "_gpus", "_lock", "_replaced", "_values", "_written")

    def __init__(self, data: D, values: list[Any]) -> None:
        super().__init__(data)
        self._lock = Lock()
        self._values = values
        self._foreign: list[int] = []
        self._replaced: dict[int, Array] = {}
        self._gpus: OnGpus | None = None
        self._failure: DeviceError | None = None
        self._written = False

    async def run(self, call: Callable[[Any], Awaitable[T]]) -> T:
        finished = False
        try:
            result = await call(self.arrays)
            finished = True
            return result
        finally:
            if not finished:
                self.release()

    def release(self) -> None:
        with self._lock:
            if self._gpus is not None:
                self._gpus.give_back()
                self._gpus = None

    def settle(self) -> D:
        with self._lock:
            if self._gpus is not None:
                try:
                    if self._written:
                        self._gpus.write_back()
                except DeviceError as error:
                    self._failure = error
                # Not if it was interrupted: then it is done again.
                self._gpus.give_back()
                self._gpus = None
            if self._failure is not None:
                raise self._failure
            if self._written and self._replaced:
                for place, host in self._replaced.items():
                    self._values[place] = _remade(self._values[place], host)
                self._replaced = {}
                self._data = cast(D, _in_form(self._data, self._values))
            return self._data

    def returned(self, result: Any) -> Any:
        if result is self.arrays:
            return self.settle()
        try:
            return self._in_their_libraries(result)
        finally:
            # Not before: they may be parts of what is given back then.
            self.settle()

    def _in_their_libraries(self, result: Any) -> Any:
        if isinstance(result, dict):
            places = {name: place for place, name in enumerate(cast(Mapping[str, Any], self._data))}
            return {name: self._like(places[name], array) for name, array in result.items()}
        if isinstance(result, list):
            return [self._like(place, array) for place, array in enumerate(result)]
        return self._like(0, result)

    def _like(self, place: int, array: Array | None) -> Any:
        return array if array is None or place not in self._foreign else _made_like(self._values[place], array)

    def _take(self, kinds: Mapping[type, frozenset[str]], *, read: bool, written: bool, in_place: bool) -> None:
        """Let every array of one of ``kinds``, which are of these libraries, lend its memory. Raises UsageError."""
        self._written = written
        hosts: list[Any] = []
        keys = list(self._data) if isinstance(self._data, Mapping) else range(len(self._values))
        on_gpus: list[tuple[int, object, str]] = []
        # There may be hundreds: what NumPy could not take it is not asked again.
        odd: set[object] = set()
        for place, value in enumerate(self._values):
            libraries = kinds.get(type(value))
            if libraries is None:
                hosts.append(value)
                continue
            self._foreign.append(place)
            look = None
            if "torch" in libraries:
                if value.requires_grad or value.is_neg():
                    value = _without_gradient(value, label_of(self._data, keys[place]))
                look = (value.dtype, value.device)
            host = None if look in odd or "cupy" in libraries else quick_view(value)
            if host is None or (written and not host.flags.writeable):
                odd.add(look) if look is not None else None
                what = label_of(self._data, keys[place])
                if in_place:
                    hosts.append(_writable_view(value, what))
                    continue
                host = None if "cupy" in libraries else _on_host(value, what)
                if host is None:
                    on_gpus.append((place, value, what))
                elif written and not host.flags.writeable:
                    _check_can_be_remade(value, what)
                    self._replaced[place] = host = host.copy()
            hosts.append(host)
        if on_gpus:
            from sparkle_mesh.collectives.cupy_arrays import OnGpus

            self._gpus = OnGpus([(value, what) for _, value, what in on_gpus], read=read, written=written)
            for (place, _, _), host in zip(on_gpus, self._gpus.hosts, strict=True):
                hosts[place] = host
        self.arrays = _in_form(self._data, hosts)


def lend(data: D, *, read: bool = True, written: bool = True, in_place: bool = False) -> Lent[D]:
    """Return NumPy arrays for all arrays of ``data``, which may be anything: what is no array stays as it is.

    Parameters
    ----------
    data
        An array, or a list, tuple or dict of arrays.
    read
        Whether their contents count: what is only written to is not fetched from a GPU.
    written
        Whether results are written into them.
    in_place
        Whether to refuse, before anything is copied, what cannot be written to where it lies.

    Raises
    ------
    UsageError
        If an array of another library cannot be lent; it says why, and what to do.
    """
    if type(data) is np.ndarray:
        return Lent(data)
    values: Any = data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else (data,)
    types = set(map(type, values))
    kinds = {kind: libraries_of(kind) for kind in types if kind is not np.ndarray and is_foreign(kind)}
    if not kinds:
        return Lent(data)
    lent = _LentByOthers(data, list(values))
    lent._take(kinds, read=read, written=written, in_place=in_place)
    return lent


def lend_for(kind: str, data: D, *, at_root: bool = False) -> Lent[D]:
    """Return what :func:`lend` does for a collective, at the rank that is its root or at another.

    What cannot be lent becomes :class:`Refused`: the call raises why, in its turn, because the others make theirs.
    """
    if type(data) is np.ndarray:
        return Lent(data)
    read = kind not in _GIVEN_BY_ROOT or at_root
    written = kind == "all_reduce" or (at_root if kind == "reduce" else kind in _GIVEN_BY_ROOT and not at_root)
    try:
        return lend(data, read=read, written=written)
    except UsageError as error:
        lent = Lent(data)
        lent.arrays = Refused(error)
        return lent


def label_of(data: object, key: object = None) -> str:
    """Return what people call the array of ``data`` that has this key, or number."""
    if isinstance(data, Mapping):
        return f"the value of {key!r}"
    return f"item {key}" if isinstance(data, list | tuple) else "the data"


def _in_form(data: object, values: list[Any]) -> object:
    """Return ``values`` in the form of ``data``."""
    if isinstance(data, Mapping):
        return dict(zip(data, values, strict=True))
    if isinstance(data, list | tuple):
        return values if isinstance(data, list) else tuple(values)
    return values[0]


def _without_gradient(value: Any, what: str) -> Any:
    """Return a tensor of PyTorch as one that can be lent: parameters are taken as the numbers that they hold."""
    if value.is_neg():
        raise UsageError(f"{what} is a tensor whose memory holds its negative; pass its resolve_neg()")
    if not value.is_leaf:
        raise UsageError(
            f"{what} is a tensor within a graph of gradients, which do not pass through a collective; pass its detach()"
        )
    return value.detach()


def _on_host(value: Any, what: str) -> Array | None:
    """Return the memory of an array; a copy, if it gives only that; None if it is a GPU's, and CuPy can copy it."""
    always_writable = is_always_writable(type(value))
    device = device_of(value)
    is_on_gpu = device is not None and device[0] in GPU_DEVICES
    if is_on_gpu and always_writable:
        return None
    try:
        return host_view(value, what)
    except UsageError:
        if hasattr(value, "__array_namespace__") and not always_writable:
            # JAX has devices of its own, and gives copies of what they hold.
            with suppress(*REFUSALS):
                array = np.asarray(value).view()
                array.flags.writeable = False
                return array
        if is_on_gpu:
            return None
        raise


def _writable_view(value: Any, what: str) -> Array:
    """Return the memory of an array on the processor, that may be written to. Raises UsageError if there is none."""
    device = device_of(value)
    if device is None or device[0] in HOST_DEVICES:
        host = host_view(value, what)
        if host.flags.writeable:
            return host
    raise UsageError(f"{what} is on a GPU, or cannot be written to; give arrays on the CPU that can be, and copy back")


def _check_can_be_remade(value: Any, what: str) -> None:
    if not hasattr(value, "__array_namespace__"):
        raise UsageError(
            f"{what}, a {type_name(type(value))}, is read-only, or does not say that it is not (DLPack before 1.0), and"
            " the result is written into it; pass a NumPy array"
        )


def _remade(value: Any, result: Array) -> object:
    try:
        return value.__array_namespace__().asarray(result, device=value.device)
    except (*REFUSALS, MemoryError) as error:
        raise DeviceError(f"the result cannot be made a {type_name(type(value))} on {value.device}: {error}") from error


def _made_like(value: Any, result: Array) -> object:
    """Return ``result`` as an array of the library of ``value``, on its device; as it is if that cannot be told."""
    kind: Any = type(value)
    libraries = libraries_of(kind)
    if "cupy" in libraries:
        from sparkle_mesh.collectives.cupy_arrays import make_like

        return make_like(value, result)
    if hasattr(value, "__array_namespace__"):
        return _remade(value, result)
    if "torch" in libraries:
        lent = lend(value.new_empty(result.shape), read=False)
        lent.arrays[...] = result
        return lent.settle()
    return result
