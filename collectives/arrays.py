"""What a caller may pass to a collective, and how it becomes flat vectors.

Accepted: one NumPy array, or a list, tuple or dict (with text keys) of arrays; each is reduced in place and the
same object is returned. Shapes: any, 0-d and empty ones included. An array that is C-contiguous and in
little-endian order is used as it lies; anything else (strided, Fortran-ordered, big-endian) is staged: copied in,
and the result is copied back into it in its own layout. The arrays of a container are staged into one vector per
dtype, so that a model's many small gradients cost as few messages as one large one. Dicts are taken in the order of
their sorted keys, so the order of insertion does not matter.

Refused, saying why: Python numbers and NumPy scalars (nothing to write the result into), read-only arrays, arrays
that share memory with each other or with themselves, masked arrays, other dtypes, nested containers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from ctypes import addressof, c_char
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.messages import call_digest
from sparkle_mesh.collectives.reduction import Array
from sparkle_mesh.errors import UsageError

_LITTLE = sys.byteorder == "little"

# Gives a staging vector: (elements, dtype).
Allocate = Callable[[int, np.dtype[Any]], Array]


@dataclass(frozen=True, slots=True)
class Named:
    """One array of a call. ``name`` is its key or position, empty for a lone array."""

    name: str
    array: Array

    @property
    def label(self) -> str:
        return f"array {self.name}" if self.name else "the array"


@dataclass(slots=True)
class Bucket:
    """One flat vector of the call, and where its elements belong.

    Attributes
    ----------
    data
        1-d, contiguous, little-endian: the caller's own memory, or a staging vector if ``staged``.
    arrays
        The arrays it consists of, in order.
    """

    data: Array
    arrays: list[Array]
    staged: bool

    def stage(self, vector: Array) -> None:
        """Let ``vector`` take the place of the data, which are the caller's; what it holds is committed to them."""
        self.data, self.staged = vector, True

    def commit(self, result: Array) -> None:
        """Write ``result`` (like ``data``) into the caller's arrays."""
        if not self.staged:
            self.data[:] = result
            return
        position = 0
        for array in self.arrays:
            array[...] = result[position : position + array.size].reshape(array.shape)
            position += array.size


class ArraysLook(NamedTuple):
    """The form, names, dtypes and shapes of arrays: what all ranks must have in common."""

    form: str
    items: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]

    def signature(self) -> tuple[object, ...]:
        """Return it as plain values."""
        return (self.form, tuple((name, dtype.name, shape) for name, dtype, shape in self.items))

    def describe(self) -> str:
        """Return it for people, shortened if there are many."""
        shown = self.items[: limits.COLLECTIVE_ARRAYS_DESCRIBED_MAX_COUNT]
        parts = []
        for name, dtype, shape in shown:
            kind = f"{dtype.name}{list(shape)}"
            parts.append(f"{_shorten(name)!r}: {kind}" if self.form == "dict" else kind)
        if len(self.items) > len(shown):
            fingerprint = call_digest(self.signature()).hex()[:8]
            parts.append(f"… {len(self.items) - len(shown)} more, all together {fingerprint}")
        text = ", ".join(parts)
        return {"array": text, "list": f"[{text}]", "dict": f"{{{text}}}"}[self.form]


@dataclass(frozen=True, slots=True)
class Arrays:
    """The checked arrays of one call; ``form`` is ``array``, ``list`` or ``dict``."""

    form: str
    named: tuple[Named, ...]

    @property
    def nbytes(self) -> int:
        return sum(item.array.nbytes for item in self.named)

    @property
    def look(self) -> ArraysLook:
        """What they are, without what is in them."""
        return ArraysLook(self.form, tuple((item.name, item.array.dtype, item.array.shape) for item in self.named))

    def buckets(self, allocate: Allocate, *, fill: bool = True) -> list[Bucket]:
        """Return one vector per dtype, in the order of the dtypes' names.

        Parameters
        ----------
        allocate
            Gives staging vectors where they are needed.
        fill
            Whether staging vectors start with the arrays' contents.
        """
        if len(self.named) == 1:
            only = self.named[0].array
            if is_plain_vector(only):
                return [Bucket(only.reshape(-1), [only], staged=False)]
        groups: dict[np.dtype[Any], list[Array]] = {}
        for item in self.named:
            groups.setdefault(item.array.dtype.newbyteorder("<"), []).append(item.array)
        made = []
        for dtype, arrays in sorted(groups.items(), key=lambda group: group[0].name):
            only = arrays[0]
            if len(arrays) == 1 and only.flags.c_contiguous and only.dtype == dtype:
                made.append(Bucket(only.reshape(-1), arrays, staged=False))
                continue
            staging = allocate(sum(array.size for array in arrays), dtype)
            if fill and len(arrays) > 1:
                # What is contiguous is flat without a copy.
                np.concatenate([array.reshape(-1) for array in arrays], out=staging)
            elif fill:
                np.copyto(staging.reshape(only.shape), only)
            made.append(Bucket(staging, arrays, staged=True))
        return made


def is_plain_vector(array: Array) -> bool:
    """Whether ``array`` is contiguous and in the order of bytes in which numbers are sent."""
    return array.flags.c_contiguous and array.dtype.isnative and _LITTLE


def _can_be_sent(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shorten(name: str) -> str:
    return name if len(name) <= 80 else name[:77] + "…"


def check_arrays(data: object, check: Callable[[np.dtype[Any], str], None], *, written: bool = True) -> Arrays:
    """Check what the caller passed.

    Parameters
    ----------
    data
        An array, or a list, tuple or dict of arrays.
    check
        Called with each dtype and the array's label; raises for those the operation cannot take.
    written
        Whether results are written into them; only then must they be writable, and share no memory.

    Raises
    ------
    UsageError
        Naming what was wrong with which array, and what to do.
    """
    arrays = _collect(data)
    if len(arrays.named) > limits.COLLECTIVE_ARRAYS_MAX_COUNT:
        raise UsageError(
            f"{len(arrays.named)} arrays in one call are over the limit of {limits.COLLECTIVE_ARRAYS_MAX_COUNT}; make"
            " several calls"
        )
    checked: set[np.dtype[Any]] = set()
    for item in arrays.named:
        if item.array.dtype not in checked:
            check(item.array.dtype, item.label)
            checked.add(item.array.dtype)
        if written and not item.array.flags.writeable:
            raise UsageError(f"{item.label} is read-only, and the result is written into it; pass a copy()")
        if not item.array.flags.c_contiguous and _overlaps_itself(item.array):
            raise UsageError(f"{item.label} has strides by which elements share memory; pass a copy()")
    if written and len(arrays.named) > 1:
        _refuse_shared_memory(arrays.named)
    return arrays


def _collect(data: object) -> Arrays:
    if isinstance(data, np.ndarray):
        return Arrays("array", (Named("", _array(data, "the data")),))
    if isinstance(data, Mapping):
        wrong = next((key for key in data if not isinstance(key, str)), None)
        if wrong is not None:
            raise UsageError(f"key {wrong!r} is not text; ranks agree on a dict's order by its sorted text keys")
        broken = next((key for key in data if not _can_be_sent(key)), None)
        if broken is not None:
            raise UsageError(f"key {broken!r} holds half a character (a lone surrogate), which cannot be sent")
        return Arrays("dict", tuple(Named(key, _array(data[key], f"the value of {key!r}")) for key in sorted(data)))
    if isinstance(data, list | tuple):
        # Almost all are plain arrays, and there may be thousands.
        given = [value if type(value) is np.ndarray else _array(value, f"item {i}") for i, value in enumerate(data)]
        return Arrays("list", tuple(Named(str(i), array) for i, array in enumerate(given)))
    return Arrays("array", (Named("", _array(data, "the data")),))


def _array(value: object, what: str) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise UsageError(f"{what} is a masked array; pass its .data, or filled()")
    if isinstance(value, np.ndarray):
        # A plain view: subclasses (matrix, memmap) would carry their own rules into slicing and reshaping.
        return value.view(np.ndarray)
    if isinstance(value, bool | int | float | complex | np.generic):
        raise UsageError(
            f"{what} is the number {value!r}, and results are written in place; pass an array, for example"
            f" np.array({value})"
        )
    if isinstance(value, Mapping | list | tuple):
        raise UsageError(f"{what} is a {type(value).__name__} inside a container; pass one flat list or dict of arrays")
    raise UsageError(
        f"{what} is a {type(value).__module__}.{type(value).__qualname__}; pass a NumPy array, or a list or dict of"
        " them (a CPU tensor's .numpy() shares its memory)"
    )


def _overlaps_itself(array: Array) -> bool:
    """Whether two elements may share bytes; never wrongly False."""
    if array.size <= 1:
        return False
    reach = array.itemsize
    for stride, length in sorted(
        (abs(stride), length) for stride, length in zip(array.strides, array.shape, strict=True)
    ):
        if length > 1:
            if stride < reach:
                return True
            reach += stride * (length - 1)
    return False


def _refuse_shared_memory(named: tuple[Named, ...]) -> None:
    spans = sorted(((*_byte_bounds(item.array), item) for item in named if item.array.size), key=lambda span: span[:2])
    open_spans: list[tuple[int, Named]] = []
    for low, high, item in spans:
        open_spans = [(end, other) for end, other in open_spans if end > low]
        for _, other in open_spans:
            if _may_share(item.array, other.array):
                raise UsageError(f"{other.label} and {item.label} share memory; each result needs a place of its own")
        open_spans.append((high, item))


def _byte_bounds(array: Array) -> tuple[int, int]:
    """Return the address of the first byte and of the one after the last."""
    if array.dtype.kind in "iufc" and array.flags.c_contiguous and array.flags.writeable:
        # A third of the time of what works for all.
        address = addressof(c_char.from_buffer(array.data))
        return address, address + array.nbytes
    address = int(array.__array_interface__["data"][0])
    reach = [stride * (length - 1) for stride, length in zip(array.strides, array.shape, strict=True)]
    return address + sum(min(way, 0) for way in reach), address + sum(max(way, 0) for way in reach) + array.itemsize


def _may_share(one: Array, other: Array) -> bool:
    try:
        return bool(np.shares_memory(one, other, max_work=limits.ARRAYS_SHARING_MAX_WORK_COUNT))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
