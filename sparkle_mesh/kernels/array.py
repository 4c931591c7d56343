"""Arrays that are wherever they are needed: NumPy's ways to compute with them, on any device.

An array's elements are on one device or on several; copies are made when they are needed and stay valid until the
array is written to. What computes with arrays makes new ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from sparkle_mesh.devices import random
from sparkle_mesh.devices.buffers import Buffer
from sparkle_mesh.devices.device import Device
from sparkle_mesh.errors import KernelError, UsageError
from sparkle_mesh.kernels import namespace
from sparkle_mesh.kernels.frozen import Frozen, freeze
from sparkle_mesh.kernels.ops import Shape

if TYPE_CHECKING:
    from sparkle_mesh.kernels.tracing import Kernel


class Home(Protocol):
    """What arrays belong to: where kernels run that compute with them."""

    def device(self, name: str | Device) -> Device:
        """Return the device called so."""

    @property
    def host(self) -> Device:
        """The device whose memory is the host's."""

    def asarray(self, values: Any, dtype: npt.DTypeLike | None = None) -> Array:
        """Return an array with the elements of ``values``."""

    def has_copies(self, array: Array) -> None:
        """``array`` is on several devices now: what of it is spare may be asked for when memory is short."""

    def method(self, name: str, static: tuple[object, ...], keywords: tuple[tuple[str, object], ...]) -> Kernel:
        """Return a kernel that calls that method of its first operand, with the others, then what is ``static``."""

    def run(self, kernel: Kernel, *operands: object, device: str | Device = "auto") -> Any:
        """Run ``kernel``."""


class Array:
    """An array of a context; made by :meth:`.context.Context.array` and by what computes with others.

    Operators, methods and indexing are NumPy's, but for assignment to elements; so are the functions of ``numpy`` that
    kernels know; others are given NumPy's arrays. The Array API's functions are in ``array.__array_namespace__()``.
    ``print(array)`` shows the elements, its ``repr`` tells where they are.
    """

    __hash__ = None  # type: ignore[assignment]
    #: NumPy's arrays leave operators to this class.
    __array_priority__ = 1000

    def __init__(self, home: Home, shape: Shape, buffer: Buffer) -> None:
        self._home = home
        self._shape = shape
        self._dtype = buffer.dtype
        self._lock = threading.RLock()
        # The newest elements; the first is where they were written last.
        self._copies: dict[Device, Buffer] = {buffer.device: buffer}
        # Whoever has been shown this one may write to it at any time: others are of no use for longer than one look.
        self._shown: Device | None = None
        # Whether a snapshot has the same memory, which is not to be written then.
        self._is_shared = False

    # --- What it is -------------------------------------------------------------------------------

    @property
    def shape(self) -> Shape:
        """The lengths of all axes."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of each element."""
        return self._dtype

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self._shape)

    @property
    def size(self) -> int:
        """How many elements there are."""
        return prod(self._shape)

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        return self.size * self._dtype.itemsize

    @property
    def device(self) -> str:
        """Where the elements were written, as ``"cuda:0"``."""
        return str(self.whereabouts()[0])

    @property
    def devices(self) -> tuple[str, ...]:
        """Where valid copies are."""
        return tuple(map(str, self.whereabouts()))

    @property
    def T(self) -> Array:
        """With all axes reversed."""
        return self.transpose()

    @property
    def mT(self) -> Array:
        """With the last two axes exchanged."""
        return self.swapaxes(-1, -2)

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("len() of unsized object")
        return self._shape[0]

    def __repr__(self) -> str:
        lengths = ", ".join(map(str, self._shape))
        return f"<Array {self._dtype}[{lengths}] on {', '.join(self.devices)}>"

    def __str__(self) -> str:
        return str(self.__array__())

    def __format__(self, how: str) -> str:
        # One element as the number that it is: f"{loss:.4f}".
        return format(self.__array__()[()], how) if how else str(self)

    def is_of(self, home: Home) -> bool:
        """Whether it belongs to ``home``."""
        return self._home is home

    # --- Where it is ------------------------------------------------------------------------------

    def buffer_on(self, device: Device) -> Buffer:
        """Return the elements on ``device``, copied there if they are not; to be read only.

        Raises
        ------
        OutOfMemoryError
            If there is no room for them.
        """
        with self._lock:
            found = self._copies.get(device)
            if found is not None:
                return found
            source = next((one for one in self._copies if one.kind == device.kind), next(iter(self._copies)))
            copy = Buffer(self.size, self._dtype, device).copy_from(self._copies[source])
            if self._shown is None:
                self._copies[device] = copy
                self._home.has_copies(self)
            return copy

    def whereabouts(self) -> tuple[Device, ...]:
        """Return the devices that valid copies are on; the first is where the elements were written."""
        with self._lock:
            return tuple(self._copies)

    def to_device(self, device: str | Device, /) -> Array:
        """Return this array, with a valid copy on ``device``: but one that others may write to is copied each time."""
        self.buffer_on(self._home.device(device))
        return self

    def drop_copies(self) -> int:
        """Give back all copies but the one that was written last; return their bytes."""
        with self._lock:
            first, *others = self._copies
            freed = sum(self._copies.pop(device).nbytes for device in others)
            assert first in self._copies
            return freed

    def spare_copy_bytes(self, device: Device) -> int:
        """Return what :meth:`drop_copy` would give back."""
        copies = self._copies
        return self.nbytes if len(copies) > 1 and device in copies else 0

    def drop_copy(self, device: Device) -> int:
        """Give back the copy on ``device`` if there are others, and nobody is at it now; return its bytes."""
        if not self._lock.acquire(blocking=False):
            return 0
        try:
            return self._copies.pop(device).nbytes if self.spare_copy_bytes(device) else 0
        finally:
            self._lock.release()

    def copy_from(self, source: Any) -> Array:
        """Overwrite all elements; returns this array.

        Parameters
        ----------
        source
            An array of this shape; its dtype is converted if that loses no kind of number (``"same_kind"``).

        Raises
        ------
        UsageError
            If it has another shape, or a dtype that cannot be converted so.
        """
        values = np.asarray(source)
        if values.shape != self._shape:
            raise UsageError(f"the source is of shape {values.shape}, this array of {self._shape}")
        if not np.can_cast(values.dtype, self._dtype, "same_kind"):
            raise UsageError(f"the source holds {values.dtype}, this array {self._dtype}; convert it with astype")
        with self._lock:
            self._written().copy_from(values.astype(self._dtype, copy=False))
        return self

    def fill_random(self, seed: int) -> Array:
        """Overwrite all elements with random ones; returns this array.

        Uniform in [0, 1) for floats, over all values for integers. One seed gives the same bits on every device.
        """
        with self._lock:
            random.fill_random(self._written().memory, self._dtype, self.size, seed)
        return self

    def snapshot(self) -> Array:
        """Return an array of the elements as they are now, whatever is written to this one; nothing is copied yet."""
        with self._lock:
            if self._shown is not None:
                return self.copy()
            taken = Array(self._home, self._shape, next(iter(self._copies.values())))
            taken._copies = dict(self._copies)
            taken._is_shared = self._is_shared = True
            return taken

    def _written(self, *, keeps_elements: bool = False) -> Buffer:
        """Return the one copy that is left, about to be written: all of it, unless it ``keeps_elements``."""
        self.drop_copies()
        (buffer,) = self._copies.values()
        if not self._is_shared:
            return buffer
        own = Buffer(self.size, self._dtype, buffer.device)
        if keeps_elements:
            own.copy_from(buffer)
        self._copies, self._is_shared = {own.device: own}, False
        return own

    # --- For other libraries ----------------------------------------------------------------------

    def to_numpy(self) -> npt.NDArray[Any]:
        """Return the elements in a NumPy array of their own."""
        return np.array(self.__array__())

    def copy(self) -> Array:
        """Return an array of the same elements, on the same device, that is written to on its own."""
        with self._lock:
            newest = next(iter(self._copies.values()))
            return Array(self._home, self._shape, Buffer(self.size, self._dtype, newest.device).copy_from(newest))

    __copy__ = copy

    def __deepcopy__(self, memo: object) -> Array:
        return self.copy()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Array belongs to a context, and is not pickled; pickle array.to_numpy()")

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        # Without a copy it is for reading: what is written there others would not see.
        view: npt.NDArray[Any] = self.buffer_on(self._home.host).view().reshape(self._shape)
        if copy or (dtype is not None and np.dtype(dtype) != self._dtype):
            if copy is False:
                raise ValueError(f"an array of {np.dtype(dtype)} cannot share memory with this one of {self._dtype}")
            return view.astype(self._dtype if dtype is None else dtype)
        view = view.view()
        view.flags.writeable = False
        return view

    def _show(self) -> Buffer:
        """Return the newest copy, to be written by whoever sees it from now on."""
        with self._lock:
            buffer = self._written(keeps_elements=True)
            self._shown = buffer.device
            return buffer

    def __dlpack__(self, **options: Any) -> Any:
        """Return a DLPack capsule that shares the memory where the elements are: writing to it writes this array."""
        self.__dlpack_device__()
        return self._show().view().reshape(self._shape).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return type and number of the device, as DLPack counts them; the host where the device has no such thing."""
        with self._lock:
            if next(iter(self._copies)).dlpack_device() is None:
                moved = self.buffer_on(self._home.host)
                self._copies = {moved.device: moved}
            found = next(iter(self._copies)).dlpack_device()
        assert found is not None
        return found

    def __array_namespace__(self, /, *, api_version: str | None = None) -> Namespace:
        return Namespace(self._home)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **keywords: Any) -> Any:
        out = keywords.get("out", ())
        written = out if isinstance(out, tuple) else (out,)
        if method == "at":
            # It would write through the view of the elements, which is for reading only.
            written = (*written, *inputs[:1])
        if any(isinstance(one, Array) for one in written):
            raise UsageError(f"numpy.{ufunc.__name__} cannot write into an Array; take what it returns")
        if method != "__call__" or keywords:
            return getattr(ufunc, method)(*map(_as_numpy, inputs), **keywords)
        try:
            return self._call("__array_ufunc__", *inputs, static=(freeze(ufunc),))
        except KernelError:
            return ufunc(*map(_as_numpy, inputs))

    def __array_function__(self, function: Any, types: object, arguments: Any, keywords: dict[str, Any]) -> Any:
        try:
            return _run_function(self._home, function, arguments, keywords)
        except KernelError:
            # What kernels cannot do NumPy does, in the host's memory.
            return function(*_as_numpy(list(arguments)), **{key: _as_numpy(value) for key, value in keywords.items()})

    # --- Elements ---------------------------------------------------------------------------------

    def item(self) -> bool | int | float:
        """Return the only element as a Python number."""
        found: bool | int | float = self.__array__().item()
        return found

    def tolist(self) -> Any:
        """Return the elements in nested lists."""
        return self.__array__().tolist()

    def __bool__(self) -> bool:
        return bool(self.__array__())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return int(self.__array__().__index__())

    def __round__(self, digits: int = 0) -> Any:
        return round(self.item(), digits) if digits else round(self.item())

    def __contains__(self, value: object) -> bool:
        return value in self.__array__()

    def __iter__(self) -> Iterator[Array]:
        if not self._shape:
            raise TypeError("iteration over a 0-d array")
        # Through the host's memory: a kernel for each row would have to be made ready.
        return (self._home.asarray(row) for row in self.__array__())

    def __setitem__(self, key: object, value: object) -> None:
        raise UsageError("elements of an Array cannot be assigned to; make a new one with where, or use copy_from")

    # --- What kernels do --------------------------------------------------------------------------

    def _call(
        self, name: str, *operands: object, static: tuple[object, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        named = tuple(sorted((key, freeze(value)) for key, value in (keywords or {}).items()))
        return self._home.run(self._home.method(name, static, named), *operands)

    def __getitem__(self, key: Any) -> Array:
        parts = key if isinstance(key, tuple) else (key,)
        found: Array = self._call("__getitem__", self, static=(Frozen("tuple", tuple(map(_frozen_index, parts))),))
        return found

    def clip(self, min: Any = None, max: Any = None) -> Array:
        """Return the elements within ``min`` and ``max``."""
        found: Any = self
        if min is not None:
            found = np.maximum(found, min)
        return np.minimum(found, max) if max is not None else found  # type: ignore[no-any-return]

    if TYPE_CHECKING:
        # Made below, from tables.
        def __getattr__(self, name: str) -> Any: ...
        def __add__(self, other: Any) -> Array: ...
        def __radd__(self, other: Any) -> Array: ...
        def __sub__(self, other: Any) -> Array: ...
        def __rsub__(self, other: Any) -> Array: ...
        def __mul__(self, other: Any) -> Array: ...
        def __rmul__(self, other: Any) -> Array: ...
        def __truediv__(self, other: Any) -> Array: ...
        def __rtruediv__(self, other: Any) -> Array: ...
        def __matmul__(self, other: Any) -> Array: ...
        def __rmatmul__(self, other: Any) -> Array: ...
        def __pow__(self, other: Any) -> Array: ...
        def __neg__(self) -> Array: ...
        def transpose(self, *axes: Any) -> Array: ...
        def swapaxes(self, axis1: int, axis2: int) -> Array: ...


class Namespace:
    """The Array API of arrays: that of kernels (:mod:`.namespace`), each function run at once."""

    # Not functions of arrays.
    _AS_THEY_ARE = frozenset({"isdtype", "result_type", "can_cast", "finfo", "iinfo"})

    def __init__(self, home: Home) -> None:
        self._home = home

    def asarray(self, values: Any, /, *, dtype: npt.DTypeLike | None = None) -> Array:
        """Return an array with the elements of ``values``."""
        return self._home.asarray(values, dtype)

    def __getattr__(self, name: str) -> Any:
        function = getattr(namespace, name)
        if not callable(function) or isinstance(function, type) or name in self._AS_THEY_ARE:
            return function

        def run(*arguments: Any, **keywords: Any) -> Any:
            return _run_function(self._home, function, arguments, keywords)

        return run

    def __dir__(self) -> list[str]:
        return dir(namespace)


def _run_function(home: Home, function: Callable[..., Any], arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    """Run one of NumPy's functions as a kernel: which arguments are arrays differs, and they may be in lists."""
    operands: list[Any] = []
    frozen = freeze((arguments, sorted(keywords.items())), _is_array, operands)
    return home.run(home.method("__array_function__", (freeze(function), frozen), ()), *operands)


def as_of_now(operand: Any) -> Any:
    """Return ``operand`` as it is now, whatever is done to it later."""
    if isinstance(operand, Array):
        return operand.snapshot()
    return operand.copy() if isinstance(operand, np.ndarray) else operand


def _as_numpy(value: Any) -> Any:
    """Return ``value`` with NumPy's arrays in the place of :class:`Array`, in lists and tuples too."""
    if isinstance(value, Array):
        return value.__array__()
    if type(value) in (list, tuple):
        return type(value)(map(_as_numpy, value))
    return value


def _is_array(value: object) -> bool:
    return isinstance(value, (Array, np.ndarray))


def _frozen_index(part: object) -> object:
    if not (part is None or part is Ellipsis or isinstance(part, (slice, bool, int, np.integer))):
        raise UsageError(f"an Array is indexed by whole numbers and slices, not by {type(part).__name__}; use where")
    return freeze(part)


_BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"]
_BINARY.append("divmod")
_COMPARISONS = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")
_UNARY = ("__neg__", "__pos__", "__abs__", "__invert__")
#: Methods whose arguments are no arrays.
_METHODS = (
    *("astype", "reshape", "ravel", "flatten", "transpose", "swapaxes", "squeeze", "round"),
    *("sum", "prod", "max", "min", "mean", "var", "std", "any", "all"),
)


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: Array, *others: object) -> Any:
        if not all(isinstance(other, (Array, np.ndarray, np.generic, bool, int, float)) for other in others):
            return NotImplemented
        return self._call(name, self, *others)

    operator.__name__ = name
    return operator


def _method(name: str) -> Callable[..., Any]:
    def method(self: Array, *arguments: object, **keywords: object) -> Any:
        return self._call(name, self, static=tuple(map(freeze, arguments)), keywords=keywords)

    method.__name__ = name
    method.__doc__ = f"Return what ``numpy.ndarray.{name}`` does, as a new array."
    return method


for _name in (*(f"__{p}{one}__" for one in _BINARY for p in ("", "r")), *_COMPARISONS, *_UNARY):
    setattr(Array, _name, _operator(_name))
for _name in _METHODS:
    setattr(Array, _name, _method(_name))
