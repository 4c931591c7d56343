"""Memory of arrays of other libraries, as NumPy arrays: no copy, by DLPack, the protocol that all of them speak.

An array gives a *capsule*, which holds a C structure: where its memory is, on which device, its shape, strides and
dtype (https://dmlc.github.io/dlpack/latest/c_api.html). :func:`numpy.from_dlpack` reads it fastest, and is asked first;
what it cannot take is read here: bfloat16, which NumPy does not know; memory of GPUs; and capsules from before DLPack
1.0, which do not say whether their memory may be written to, so that NumPy takes all of them to be read-only. A capsule
is never consumed here: it frees its memory itself when it goes, and whatever is made of it keeps it.
"""

from __future__ import annotations

import importlib
from ctypes import PYFUNCTYPE, c_char, c_char_p, c_int, c_int64, c_void_p, py_object, pythonapi, string_at
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import mul
from struct import Struct
from typing import Any, Final, NamedTuple

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.reduction import Array
from sparkle_mesh.errors import UsageError

#: Memory that the processor reads: plain, and pinned by CUDA or ROCm.
HOST_DEVICES: Final = frozenset({1, 3, 11})
#: CUDA, ROCm, and CUDA's managed memory.
GPU_DEVICES: Final = frozenset({2, 10, 13})
ROCM: Final = 10
#: Whatever a library raises that does not give an array; torch, NumPy and JAX raise all of these.
REFUSALS: Final = (BufferError, TypeError, ValueError, RuntimeError, AttributeError)
# All arrays of these may be written to, though versions before DLPack 1.0 cannot say so.
_ALWAYS_WRITABLE: Final = frozenset({"torch", "cupy"})
_VERSION: Final = (1, 0)
_READ_ONLY, _COPIED = 0x1, 0x2
_KINDS: Final = {0: "i", 1: "u", 2: "f", 5: "c"}
_BITS: Final = {"i": (8, 16, 32, 64), "u": (8, 16, 32, 64), "f": (16, 32, 64), "c": (64, 128)}
_BFLOAT16, _BOOL = (4, 16), (6, 8)

# DLManagedTensorVersioned up to its tensor: major, minor, context, deleter, flags.
_HEAD: Final = Struct("@IIPPQ")
# DLTensor: data, device_type, device_id, ndim, code, bits, lanes, shape, strides, byte_offset.
_TENSOR: Final = Struct("@PiiiBBHPPQ")
# Prototypes of our own: those that pythonapi hands out are everybody's.
_is_valid = PYFUNCTYPE(c_int, py_object, c_char_p)(("PyCapsule_IsValid", pythonapi))
_get_pointer = PYFUNCTYPE(c_void_p, py_object, c_char_p)(("PyCapsule_GetPointer", pythonapi))


class Exported(NamedTuple):
    """Memory that an array has lent.

    Attributes
    ----------
    address
        Of the first element.
    device_type, device_id
        As DLPack counts them.
    strides
        In bytes.
    writable
        Whether the array is what is written there.
    owner
        Keep it for as long as the memory is used.
    """

    address: int
    device_type: int
    device_id: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    writable: bool
    owner: object

    @property
    def span(self) -> tuple[int, int]:
        """Of the memory; see :func:`byte_span`."""
        return byte_span(self.address, self.shape, self.strides, self.dtype.itemsize)


def byte_span(address: int, shape: tuple[int, ...], strides: tuple[int, ...], item_bytes: int) -> tuple[int, int]:
    """Return the address of the first byte of an array, and of the one after the last.

    Parameters
    ----------
    address
        Of the first element, which need not be the first byte.
    strides
        In bytes.
    """
    if not prod(shape):
        return address, address
    ways = [stride * (length - 1) for stride, length in zip(strides, shape, strict=True)]
    return address + sum(min(way, 0) for way in ways), address + sum(max(way, 0) for way in ways) + item_bytes


def is_foreign(kind: type) -> bool:
    """Whether arrays of a type are another library's than NumPy's, and can lend their memory."""
    return hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__") and not issubclass(kind, np.ndarray)


@lru_cache(maxsize=limits.FOREIGN_TYPES_CACHED_MAX_COUNT)
def libraries_of(kind: Any) -> frozenset[str]:
    """Return the packages that a type of arrays, and those that it is made from, are of."""
    return frozenset(base.__module__.partition(".")[0] for base in kind.__mro__)


def is_always_writable(kind: Any) -> bool:
    """Whether a type is of a library all of whose arrays may be written to."""
    return not _ALWAYS_WRITABLE.isdisjoint(libraries_of(kind))


def device_of(value: Any) -> tuple[int, int] | None:
    """Return DLPack's type and number of the device that holds an array; None if it has none."""
    try:
        kind, number = value.__dlpack_device__()
    except REFUSALS:
        return None
    return int(kind), int(number)


def quick_view(value: Any) -> Array | None:
    """Return the memory of an array on the processor as a NumPy array, if NumPy can take it.

    It may be read-only where the memory is not: then, too, :func:`host_view` knows more.
    """
    try:
        view: Array = np.from_dlpack(value, copy=False)
    except REFUSALS:
        return None
    return view


def host_view(value: Any, what: str) -> Array:
    """Return the memory of an array on the processor as a NumPy array, writable if that is.

    Raises
    ------
    UsageError
        If ``what`` cannot lend it, or has numbers that NumPy cannot have.
    """
    exported = export(value, what)
    if exported.device_type not in HOST_DEVICES:
        raise UsageError(
            f"{what} is in the memory of device type {exported.device_type} (DLPack's number); pass a copy on the CPU"
        )
    return _as_array(exported)


def export(value: Any, what: str, **stream: int) -> Exported:
    """Let an array lend its memory; see :func:`host_view`.

    ``stream`` is the one that is to wait for what is still being computed, on a GPU.
    """
    name, why = type_name(type(value)), None
    # As the protocol grew: what does not know an argument has none of its meaning either.
    for options in ({"max_version": _VERSION, "copy": False}, {"max_version": _VERSION}, {}):
        try:
            return _read(value.__dlpack__(**stream, **options), is_always_writable(type(value)), what)
        except TypeError as error:
            why = why or error
        except UsageError:
            raise
        except REFUSALS as error:
            raise UsageError(f"{what}, a {name}, does not lend its memory: {error}") from error
    raise UsageError(f"{what}, a {name}, does not lend its memory: {why}") from why


def type_name(kind: type) -> str:
    """Return a type for people: ``torch.Tensor``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _read(capsule: object, writable: bool, what: str) -> Exported:
    if _is_valid(capsule, b"dltensor_versioned"):
        pointer = _get_pointer(capsule, b"dltensor_versioned")
        major, _, _, _, flags = _HEAD.unpack(string_at(pointer, _HEAD.size))
        if major != _VERSION[0]:
            raise UsageError(f"{what} speaks DLPack {major}, which is not known here; pass a NumPy array")
        pointer, writable = pointer + _HEAD.size, not flags & (_READ_ONLY | _COPIED)
    elif _is_valid(capsule, b"dltensor"):
        pointer = _get_pointer(capsule, b"dltensor")
    else:
        raise UsageError(f"{what} gives {capsule!r} for DLPack, which is no capsule of it; pass a NumPy array")
    fields = _TENSOR.unpack(string_at(pointer, _TENSOR.size))
    data, device_type, device_id, ndim, code, bits, lanes, lengths, steps, offset = fields
    dtype = _dtype(code, bits, lanes)
    if dtype is None:
        raise UsageError(f"{what} {_unknown(code, bits, lanes)}")
    shape = _numbers(lengths, ndim)
    # Without strides it is packed; where they are, they are in elements.
    ways = _numbers(steps, ndim) if steps else tuple(accumulate(shape[:0:-1], mul, initial=1))[::-1][:ndim]
    strides = tuple(map(dtype.itemsize.__mul__, ways))
    return Exported(data + offset, device_type, device_id, dtype, shape, strides, writable, capsule)


def _numbers(address: int, count: int) -> tuple[int, ...]:
    return tuple((c_int64 * count).from_address(address)) if count else ()


@lru_cache(maxsize=limits.FOREIGN_TYPES_CACHED_MAX_COUNT)
def _dtype(code: int, bits: int, lanes: int) -> np.dtype[Any] | None:
    """Return NumPy's name for it; None if it has none."""
    if lanes != 1:
        return None
    if (code, bits) == _BFLOAT16:
        return _bfloat16()
    if (code, bits) == _BOOL:
        return np.dtype(bool)
    kind = _KINDS.get(code, "")
    return np.dtype(f"{kind}{bits // 8}") if bits in _BITS.get(kind, ()) else None


def _unknown(code: int, bits: int, lanes: int) -> str:
    if (code, bits, lanes) == (*_BFLOAT16, 1):
        return "is of bfloat16, which NumPy knows with the package ml_dtypes alone: pip install ml_dtypes"
    return (
        f"has numbers of DLPack's type {code} with {bits} bits ({lanes} together), which NumPy does not know; convert"
        " it to float32 first"
    )


def _bfloat16() -> np.dtype[Any] | None:
    try:
        ml_dtypes = importlib.import_module("ml_dtypes")
    except ModuleNotFoundError:
        return None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _as_array(exported: Exported) -> Array:
    low, high = exported.span
    if low == high:
        return np.empty(exported.shape, exported.dtype)
    memory = memory_at(low, high - low, exported.owner)
    array: Array = np.ndarray(exported.shape, exported.dtype, memory, exported.address - low, exported.strides)
    array.flags.writeable = exported.writable
    return array


def memory_at(address: int, nbytes: int, owner: object) -> memoryview:
    """Return memory that is somebody else's; ``owner`` lives for as long as it does."""
    memory = (c_char * nbytes).from_address(address)
    memory.owner = owner  # type: ignore[attr-defined]
    return memoryview(memory)
