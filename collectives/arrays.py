"""What a caller may pass to a collective, and how it becomes flat vectors.

Accepted: one NumPy array, or a list, tuple or dict (with text keys) of arrays; each is reduced in place and the
same object is returned. Shapes: any, 0-d and empty ones included. An array that is C-contiguous and in
little-endian order is used as it lies; anything else (strided, Fortran-ordered, big-endian) is staged: copied in,
and the result is copied back into it in its own layout. The arrays of a container are staged into one vector per
dtype, so that a model's many small gradients cost as few messages as one large one. Dicts are taken in the order of
their sorted keys, so the order of insertion does not matter.

Arrays of other libraries become NumPy arrays before they come here: :mod:`.foreign`.

Refused, saying why: Python numbers and NumPy scalars (nothing to write the result into), read-only arrays, arrays
that share memory with each other or with themselves, masked arrays, other dtypes, nested containers.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import addressof, c_char
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, repeat
from math import prod
from operator import attrgetter, setitem
from typing import Any, Final, NamedTuple, cast

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.dlpack import byte_span, type_name
from sparkle_mesh.collectives.foreign import Refused, label_of
from sparkle_mesh.collectives.messages import call_digest
from sparkle_mesh.collectives.reduction import Array
from sparkle_mesh.errors import UsageError

_LITTLE = sys.byteorder == "little"
# Of ndarray.flags.num (numpy/ndarraytypes.h).
_C_CONTIGUOUS, _OWNDATA, _WRITEABLE = 0x1, 0x4, 0x400
_dtype_of, _shape_of, _flags_of = attrgetter("dtype"), attrgetter("shape"), attrgetter("flags.num")
_size_of = attrgetter("size")

# Gives a staging vector: (elements, dtype).
Allocate = Callable[[int, np.dtype[Any]], Array]


class Named(NamedTuple):
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
        The arrays it consists of, in order; flat ones where they are contiguous.
    sizes
        Their elements.
    flat
        Whether all of them are of one dimension.
    """

    data: Array
    arrays: Sequence[Array]
    staged: bool
    sizes: tuple[int, ...]
    flat: bool

    def stage(self, vector: Array) -> None:
        """Let ``vector`` take the place of the data, which are the caller's; what it holds is committed to them."""
        self.data, self.staged = vector, True

    def commit(self, result: Array) -> None:
        """Write ``result`` (like ``data``) into the caller's arrays."""
        if not self.staged:
            self.data[:] = result
            return
        parts: Iterable[Array] = map(result.__getitem__, _cuts(self.sizes))
        if not self.flat:
            parts = (part.reshape(array.shape) for part, array in zip(parts, self.arrays, strict=True))
        # A loop that takes two thirds of the time of a statement's.
        deque(map(cast(Any, setitem), self.arrays, repeat(...), parts), maxlen=0)


@lru_cache(maxsize=limits.COLLECTIVE_PLANS_CACHED_MAX_COUNT)
def _cuts(sizes: tuple[int, ...]) -> tuple[slice, ...]:
    """Return where in one vector parts of these sizes lie."""
    ends = list(accumulate(sizes))
    return tuple(slice(end - size, end) for end, size in zip(ends, sizes, strict=True))


class ArraysLook(NamedTuple):
    """The form, names, dtypes and shapes of arrays: what all ranks must have in common."""

    form: str
    #: The keys of a dict; empty otherwise.
    names: tuple[str, ...]
    dtypes: tuple[np.dtype[Any], ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def nbytes(self) -> int:
        """Of all together."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in zip(self.dtypes, self.shapes, strict=True))

    def name(self, number: int) -> str:
        """Return an array's key or position; "" for a lone one."""
        return self.names[number] if self.form == "dict" else str(number) if self.form == "list" else ""

    def signature(self) -> tuple[object, ...]:
        """Return it as plain values."""
        names = {dtype: dtype.name for dtype in set(self.dtypes)}
        items = enumerate(zip(self.dtypes, self.shapes, strict=True))
        return (self.form, tuple((self.name(number), names[dtype], shape) for number, (dtype, shape) in items))

    def describe(self) -> str:
        """Return it for people, shortened if there are many."""
        most = limits.COLLECTIVE_ARRAYS_DESCRIBED_MAX_COUNT
        parts = []
        for number, (dtype, shape) in enumerate(zip(self.dtypes[:most], self.shapes[:most], strict=True)):
            kind = f"{dtype.name}{list(shape)}"
            parts.append(f"{_shorten(self.name(number))!r}: {kind}" if self.form == "dict" else kind)
        if len(self.dtypes) > most:
            fingerprint = call_digest(self.signature()).hex()[:8]
            parts.append(f"… {len(self.dtypes) - most} more, all together {fingerprint}")
        text = ", ".join(parts)
        return {"array": text, "list": f"[{text}]", "dict": f"{{{text}}}"}[self.form]


class _Facts(NamedTuple):
    """What follows from how arrays look; see :class:`Arrays`."""

    dtypes: tuple[np.dtype[Any], ...]
    nbytes: int
    vectors: bool


@lru_cache(maxsize=limits.COLLECTIVE_PLANS_CACHED_MAX_COUNT)
def _facts(look: ArraysLook) -> _Facts:
    # Training repeats the same few calls over and over.
    return _Facts(tuple(dict.fromkeys(look.dtypes)), look.nbytes, all(len(shape) == 1 for shape in look.shapes))


@dataclass(frozen=True, slots=True)
class Arrays:
    """The checked arrays of one call.

    There may be thousands: what is asked of all of them at every call is asked once, and left to C as far as can be.

    Attributes
    ----------
    look
        What they are, without what is in them.
    values
        The arrays.
    dtypes
        Every dtype that occurs, in the order in which it first does.
    nbytes
        Of all together.
    flat
        Whether all are contiguous and of one dimension.
    """

    look: ArraysLook
    values: tuple[Array, ...]
    dtypes: tuple[np.dtype[Any], ...]
    nbytes: int
    flat: bool

    @property
    def form(self) -> str:
        """``array``, ``list`` or ``dict``."""
        return self.look.form

    @property
    def named(self) -> list[Named]:
        """Every array with its name."""
        return [Named(self.look.name(number), array) for number, array in enumerate(self.values)]

    def buckets(self, allocate: Allocate, *, fill: bool = True) -> list[Bucket]:
        """Return one vector per dtype, in the order of the dtypes' names.

        Parameters
        ----------
        allocate
            Gives staging vectors where they are needed.
        fill
            Whether staging vectors start with the arrays' contents.
        """
        if len(self.values) == 1:
            only = self.values[0]
            if is_plain_vector(only):
                return [_own_memory(only)]
        made = []
        for dtype, arrays in sorted(self._by_sent_dtype().items(), key=lambda group: group[0].name):
            only = arrays[0]
            if len(arrays) == 1 and only.flags.c_contiguous and only.dtype == dtype:
                made.append(_own_memory(only))
                continue
            sizes = tuple(map(_size_of, arrays))
            staging = allocate(sum(sizes), dtype)
            flat = self.flat
            if not flat:
                arrays = [array.reshape(-1) if array.flags.c_contiguous else array for array in arrays]
                flat = all(array.ndim == 1 for array in arrays)
            if fill and len(arrays) > 1:
                np.concatenate(arrays if flat else [array.reshape(-1) for array in arrays], out=staging)
            elif fill:
                np.copyto(staging.reshape(only.shape), only)
            made.append(Bucket(staging, arrays, True, sizes, flat))
        return made

    def _by_sent_dtype(self) -> dict[np.dtype[Any], Sequence[Array]]:
        """The arrays by the dtype in which they are sent."""
        sent = {dtype: dtype.newbyteorder("<") for dtype in self.dtypes}
        if len(self.dtypes) == 1:
            return {sent[self.dtypes[0]]: self.values}
        groups: dict[np.dtype[Any], list[Array]] = {}
        for array in self.values:
            groups.setdefault(sent[array.dtype], []).append(array)
        return dict(groups)


def _own_memory(array: Array) -> Bucket:
    return Bucket(array.reshape(-1), [array], False, (array.size,), False)


#: Of a call without data.
NO_ARRAYS: Final = Arrays(ArraysLook("list", (), (), ()), (), dtypes=(), nbytes=0, flat=True)


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
    form, values, names = _collect(data)
    count = len(values)
    if count > limits.COLLECTIVE_ARRAYS_MAX_COUNT:
        raise UsageError(
            f"{count} arrays in one call are over the limit of {limits.COLLECTIVE_ARRAYS_MAX_COUNT}; make several calls"
        )
    look = ArraysLook(form, names, tuple(map(_dtype_of, values)), tuple(map(_shape_of, values)))
    flags = set(map(_flags_of, values))
    contiguous = all(flag & _C_CONTIGUOUS for flag in flags)
    facts = _facts(look)
    arrays = Arrays(look, values, facts.dtypes, facts.nbytes, flat=contiguous and facts.vectors)
    for dtype in arrays.dtypes:
        check(dtype, Named(look.name(look.dtypes.index(dtype)), values[0]).label)
    if written and not all(flag & _WRITEABLE for flag in flags):
        label = _first(arrays, lambda array: not array.flags.writeable)
        raise UsageError(f"{label} is read-only, and the result is written into it; pass a copy()")
    if not contiguous and any(map(_overlaps_itself, values)):
        raise UsageError(
            f"{_first(arrays, _overlaps_itself)} has strides by which elements share memory; pass a copy()"
        )
    # Arrays that each own their memory share none, if they are not the same.
    owning = all(flag & _OWNDATA for flag in flags) and len(set(map(id, values))) == count
    if written and count > 1 and not owning:
        bounds = sorted(map(_byte_bounds, filter(_size_of, values)))
        if any(high > low for (_, high), (low, _) in pairwise(bounds)):
            _refuse_shared_memory(arrays.named)
    return arrays


def _first(arrays: Arrays, wanted: Callable[[Array], bool]) -> str:
    """Return the label of the first array that is ``wanted``."""
    return next(item.label for item in arrays.named if wanted(item.array))


def _collect(data: object) -> tuple[str, tuple[Array, ...], tuple[str, ...]]:
    """Return the form of ``data``, the arrays, and their keys if it is a dict."""
    if isinstance(data, Refused):
        raise data.error
    if isinstance(data, Mapping):
        wrong = next((key for key in data if not isinstance(key, str)), None)
        if wrong is not None:
            raise UsageError(f"key {wrong!r} is not text; ranks agree on a dict's order by its sorted text keys")
        broken = next((key for key in data if not _can_be_sent(key)), None)
        if broken is not None:
            raise UsageError(f"key {broken!r} holds half a character (a lone surrogate), which cannot be sent")
        names = tuple(sorted(data))
        values = tuple(map(data.__getitem__, names))
        return "dict", _plain(values) or tuple(_array(data[key], label_of(data, key)) for key in names), names
    if isinstance(data, list | tuple):
        items = enumerate(data)
        return "list", _plain(tuple(data)) or tuple(_array(value, label_of(data, place)) for place, value in items), ()
    return "array", (_array(data, label_of(data)),), ()


def _plain(values: tuple[Any, ...]) -> tuple[Array, ...]:
    """Return ``values`` if all of them are arrays that need no look one by one; else nothing."""
    return values if set(map(type, values)) == {np.ndarray} else ()


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
        f"{what} is a {type_name(type(value))}; pass a NumPy array, one of another library that has DLPack, or a list"
        " or dict of them"
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


def _refuse_shared_memory(named: list[Named]) -> None:
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
    return byte_span(int(array.__array_interface__["data"][0]), array.shape, array.strides, array.itemsize)


def _may_share(one: Array, other: Array) -> bool:
    try:
        return bool(np.shares_memory(one, other, max_work=limits.ARRAYS_SHARING_MAX_WORK_COUNT))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
