"""What arrays of other libraries say of their memory, read from capsules that are made here by hand."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparkle_mesh.collectives import dlpack
from sparkle_mesh.collectives.dlpack import byte_span, export, host_view
from sparkle_mesh.collectives.foreign import lend
from sparkle_mesh.errors import UsageError

INT, UINT, FLOAT, BFLOAT, COMPLEX, BOOL = 0, 1, 2, 4, 5, 6


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


# Whoever takes a capsule reads it once more when it lets go, which may be after its exporter has gone. What is here
# stays, as it would for an exporter whose deleter frees it.
LENT: list[Any] = []


class ByHand:
    """An exporter all of whose words are chosen: its memory is a NumPy array's."""

    def __init__(self, memory: Any, code: int, shape: tuple[int, ...], **words: Any) -> None:
        self.memory = memory
        self.words = {"bits": 8 * memory.itemsize, "lanes": 1, "device": (1, 0), "version": (1, 1), "flags": 0}
        self.words |= {"strides": None, "offset": 0, "error": None} | words
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        strides = self.words["strides"]
        self.strides = None if strides is None else (ctypes.c_int64 * len(shape))(*strides)
        LENT.append((memory, self.shape, self.strides))
        self.code = code
        self.asked: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        if self.words["device"] is None:
            raise ValueError("no such device")
        return self.words["device"]

    def __dlpack__(self, **options: Any) -> Any:
        self.asked.append(options)
        if self.words["error"] is not None:
            raise self.words["error"]
        words = self.words
        if words["version"] is None and options.keys() - {"stream"}:
            raise TypeError("unexpected arguments")
        tensor = Tensor(
            self.memory.ctypes.data,
            words["device"],
            len(self.shape),
            self.code,
            words["bits"],
            words["lanes"],
            self.shape,
            self.strides,
            words["offset"],
        )
        if words["version"] is None:
            managed: Any = Managed(tensor, None, None)
            LENT.append(managed)
            return new_capsule(ctypes.addressof(managed), b"dltensor", None)
        managed = ManagedVersioned(words["version"], None, None, words["flags"], tensor)
        LENT.append(managed)
        return new_capsule(ctypes.addressof(managed), b"dltensor_versioned", None)


@pytest.mark.parametrize("version", [None, (1, 0), (1, 9)])
@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        *((INT, "i1"), (INT, "i8"), (UINT, "u2"), (FLOAT, "f2"), (FLOAT, "f8"), (COMPLEX, "c8"), (COMPLEX, "c16")),
        *((BOOL, bool), (BFLOAT, ml_dtypes.bfloat16)),
    ],
)
def test_every_dtype(code: int, dtype: Any, version: Any) -> None:
    memory = np.arange(24).astype(dtype)
    exported = export(ByHand(memory, code, (2, 3, 4), version=version), "it")
    assert exported.dtype == np.dtype(dtype)
    assert (exported.address, exported.device_type, exported.device_id) == (memory.ctypes.data, 1, 0)
    assert exported.shape == (2, 3, 4)
    assert exported.strides == memory.reshape(2, 3, 4).strides
    assert exported.writable is (version is not None)
    by_hand = ByHand(memory, code, (2, 3, 4), version=version)
    view = host_view(by_hand, "it")
    assert view.tobytes() == memory.tobytes()
    assert view.flags.writeable is (version is not None)


def test_strides_may_be_negative_and_the_offset_counts() -> None:
    memory = np.arange(12, dtype=ml_dtypes.bfloat16)
    view = host_view(ByHand(memory, BFLOAT, (3, 2), strides=(-4, 2), offset=2 * 9), "it")
    assert view.astype(int).tolist() == [[9, 11], [5, 7], [1, 3]]
    view[0, 0] = 100
    assert memory[9] == 100
    assert host_view(ByHand(memory, BFLOAT, (3, 2), strides=(0, 1)), "it").tolist() == [[0, 1]] * 3


def test_nothing_at_no_address() -> None:
    for shape in ((0,), (3, 0, 2)):
        by_hand = ByHand(np.empty(0, ml_dtypes.bfloat16), BFLOAT, shape)
        assert host_view(by_hand, "it").shape == shape
    assert host_view(ByHand(np.ones(1, ml_dtypes.bfloat16), BFLOAT, ()), "it").shape == ()


@pytest.mark.parametrize("flags", [1, 2, 3])
def test_what_is_read_only_or_a_copy_is_not_written_to(flags: int) -> None:
    view = host_view(ByHand(np.ones(3, ml_dtypes.bfloat16), BFLOAT, (3,), flags=flags), "it")
    assert not view.flags.writeable
    with pytest.raises(UsageError, match=r"the data, a .*ByHand, is read-only"):
        lend(ByHand(np.ones(3), FLOAT, (3,), flags=1))


def test_torch_before_dlpack_1_is_written_to_all_the_same() -> None:
    memory = np.ones(3, np.float32)
    tensor = type("Tensor", (ByHand,), {"__module__": "torch"})(memory, FLOAT, (3,), version=None)
    tensor.is_neg, tensor.requires_grad, tensor.dtype, tensor.device = lambda: False, False, "float32", "cpu"
    lent = lend(tensor)
    lent.arrays[:] = 7
    assert lent.settle() is tensor
    assert memory.tolist() == [7] * 3


def test_arguments_that_are_not_known_are_left_out() -> None:
    by_hand = ByHand(np.ones(3, np.float32), FLOAT, (3,), version=None)
    export(by_hand, "it", stream=1)
    version = {"stream": 1, "max_version": (1, 0)}
    assert by_hand.asked == [{**version, "copy": False}, version, {"stream": 1}]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"code": 3}, "type 3 with 64 bits"),
        ({"code": FLOAT, "bits": 8}, "type 2 with 8 bits.*float32"),
        ({"code": FLOAT, "bits": 4}, "with 4 bits"),
        ({"code": FLOAT, "bits": 128}, "with 128 bits"),
        ({"code": FLOAT, "lanes": 2}, r"\(2 together"),
        ({"code": 12, "bits": 8}, "type 12"),
        ({"version": (2, 0)}, "DLPack 2, which is not known here"),
        ({"device": (8, 0)}, "device type 8"),
        ({"error": BufferError("not today")}, "does not lend its memory: not today"),
        ({"error": TypeError("never")}, "does not lend its memory: never"),
        ({"error": RuntimeError("deleted")}, "does not lend its memory: deleted"),
    ],
)
def test_what_cannot_be_lent_is_refused_with_a_reason(words: dict[str, Any], complaint: str) -> None:
    code = words.pop("code", FLOAT)
    with pytest.raises(UsageError, match=f"the data.*{complaint}"):
        lend(ByHand(np.ones(4), code, (4,), **words))


def test_no_capsule_is_refused() -> None:
    class Odd(ByHand):
        def __dlpack__(self, **options: Any) -> Any:
            return "memory"

    with pytest.raises(UsageError, match="'memory' for DLPack, which is no capsule"):
        lend(Odd(np.ones(1), FLOAT, (1,)))


def test_bfloat16_without_ml_dtypes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    dlpack._dtype.cache_clear()
    try:
        with pytest.raises(UsageError, match="pip install ml_dtypes"):
            lend(ByHand(np.ones(3, np.uint16), BFLOAT, (3,)))
    finally:
        dlpack._dtype.cache_clear()


def test_the_capsule_lives_as_long_as_what_is_made_of_it() -> None:
    class Owner:
        pass

    owner = Owner()
    gone = weakref.ref(owner)
    memory = np.arange(6, dtype=np.int16)
    exported = dlpack.Exported(memory.ctypes.data, 1, 0, memory.dtype, (6,), (2,), True, owner)
    view = dlpack._as_array(exported)[1:][::2]
    del owner, exported
    gc.collect()
    assert gone() is not None
    assert view.tolist() == [1, 3, 5]
    del view
    gc.collect()
    assert gone() is None


def test_arrays_of_devices_that_give_copies_come_back_as_new_ones() -> None:
    class OnAccelerator(ByHand):
        device = "tpu:0"

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return self.memory.copy()

        def __array_namespace__(self) -> Any:
            return type(self)

        @staticmethod
        def asarray(array: Any, *, device: str) -> tuple[str, list[float]]:
            return device, array.tolist()

    for device in ((2, 0), None):
        value = OnAccelerator(np.ones(2), FLOAT, (2,), device=device)
        if device is None:
            value.words["error"] = BufferError("not for this device")
        lent = lend(value)
        lent.arrays[:] = 4
        assert lent.settle() == ("tpu:0", [4.0, 4.0])
        assert value.memory.tolist() == [1, 1]


@pytest.mark.parametrize(
    "view", [np.s_[:], np.s_[::-1, 1::2], np.s_[2, ::-3], np.s_[:, :0], np.s_[1:2, 3], np.s_[..., None, :2]]
)
def test_the_span_of_an_array_is_that_of_its_bytes(view: Any) -> None:
    array = np.zeros((4, 6), np.int32)[view]
    expected = np.lib.array_utils.byte_bounds(array) if array.size else (array.ctypes.data, array.ctypes.data)
    assert byte_span(array.ctypes.data, array.shape, array.strides, 4) == expected
