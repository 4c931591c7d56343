"""Buffers: what is in them, who holds them, and what is told when they are misused."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparkle_mesh import limits
from sparkle_mesh.devices.buffers import Buffer
from sparkle_mesh.devices.cpu import CpuDevice
from sparkle_mesh.devices.null import NullDevice
from sparkle_mesh.errors import OutOfMemoryError, ReleasedError, UsageError

BACKWARDS = (..., *(slice(None, None, -1),) * 4)
DTYPES = ["bool", "u1", "i8", "f2", "f8", "c16", "S3"]


def read(buffer):
    array = np.empty(buffer.size, buffer.dtype)
    buffer.copy_to(array)
    return array


def test_it_says_what_it_is(device):
    with Buffer(7, "int16", device) as buffer:
        assert (buffer.size, buffer.dtype, buffer.device, buffer.nbytes) == (7, np.dtype("int16"), device, 14)
        assert len(buffer) == 7
        assert repr(buffer) == f"<Buffer of 7 int16 on {device}>"
        assert buffer.memory.device is device
        assert not buffer.is_released
    assert buffer.is_released
    assert "released" in repr(buffer)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=hnp.arrays(
        st.sampled_from(DTYPES),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0),
    ),
    axes=st.randoms(),
)
def test_arrays_of_any_strides_are_copied(real_device, array, axes):
    order = list(range(array.ndim))
    axes.shuffle(order)
    turned = array.transpose(order)[BACKWARDS[: array.ndim + 1]]
    buffer = Buffer(array.size, array.dtype, real_device)
    assert buffer.copy_from(turned) is buffer
    target = np.empty_like(array).transpose(order)[BACKWARDS[: array.ndim + 1]]
    buffer.copy_to(target)
    assert target.tobytes() == turned.tobytes()
    assert np.asarray(buffer).tobytes() == turned.tobytes()


def test_buffers_are_copied_from_any_device_to_any(real_device, gpus):
    array = np.random.default_rng(1).random(limits.HOST_STEP_BYTES // 8 + 1000)
    source = Buffer(array.size, "f8", real_device).copy_from(array)
    for target_device in (real_device, CpuDevice(), *gpus):
        target = Buffer(array.size, "f8", target_device).copy_from(source)
        np.testing.assert_array_equal(read(target), array)
        target.release()


def test_a_null_buffer_leaves_arrays_alone():
    device = NullDevice()
    buffer = Buffer(3, "f4", device).copy_from(np.ones(3, "f4"))
    target = np.full(3, 7, "f4")
    buffer.copy_to(target)
    assert (target == 7).all()
    assert device.counts["write_bytes"] == device.counts["read_bytes"] == 12


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (np.zeros(4, "f8"), "holds float64, this buffer float32"),
        (np.zeros(4, ">f4"), "holds >f4"),
        (np.zeros(5, "f4"), "has 5 elements, this buffer 4"),
        ([0.0] * 4, "is list"),
    ],
)
def test_what_does_not_fit_is_refused(device, other, why):
    buffer = Buffer(4, "f4", device)
    with pytest.raises(UsageError, match=f"source {why}"):
        buffer.copy_from(other)
    with pytest.raises(UsageError, match=f"target {why}"):
        buffer.copy_to(other)


def test_buffers_that_do_not_fit_are_refused(device):
    buffer = Buffer(4, "f4", device)
    with pytest.raises(UsageError, match="elements"):
        buffer.copy_from(Buffer(5, "f4", device))
    with pytest.raises(UsageError, match="float64"):
        buffer.copy_to(Buffer(4, "f8", device))
    array = np.zeros(4, "f4")
    array.flags.writeable = False
    with pytest.raises(UsageError, match="read-only"):
        buffer.copy_to(array)


@pytest.mark.parametrize(
    ("size", "dtype", "why"),
    [
        (-1, "f4", "nbytes is -1"),
        (2.5, "f4", "whole number"),
        (3, "O", "cannot lie in a device's memory"),
        (3, "S0", "cannot lie in a device's memory"),
        (3, ">i4", "other byte order"),
        (3, "no such", "NumPy does not know"),
    ],
)
def test_buffers_that_cannot_be_are_refused(device, size, dtype, why):
    with pytest.raises(UsageError, match=why):
        Buffer(size, dtype, device)


def test_too_large_a_buffer_is_out_of_memory(device):
    with pytest.raises(OutOfMemoryError):
        Buffer(2**58, "f8", device)


# --- Who holds it ----------------------------------------------------------------------------------


def test_the_last_release_gives_it_back(device):
    gc.collect()
    before = device.pool.in_use_bytes
    buffer = Buffer(1000, "f4", device)
    assert device.pool.in_use_bytes >= before + 4000
    assert buffer.retain() is buffer
    buffer.release()
    assert not buffer.is_released
    buffer.release()
    assert buffer.is_released
    assert device.pool.in_use_bytes == before


def test_nothing_works_after_the_release(device):
    buffer = Buffer(4, "f4", device)
    buffer.release()
    array = np.zeros(4, "f4")
    for use in [
        lambda: buffer.memory,
        buffer.release,
        buffer.retain,
        buffer.view,
        lambda: buffer.copy_from(array),
        lambda: buffer.copy_to(array),
        lambda: buffer.copy_to(Buffer(4, "f4", device)),
        lambda: Buffer(4, "f4", device).copy_to(buffer),
        lambda: np.asarray(buffer),
    ]:
        with pytest.raises(ReleasedError, match=f"this buffer of 4 float32 on {device} was released; make another"):
            use()


def test_garbage_gives_it_back(device):
    gc.collect()
    before = device.pool.in_use_bytes
    buffer = Buffer(1000, "f4", device)
    del buffer
    assert device.pool.in_use_bytes == before
    cycle = [Buffer(1000, "f4", device)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert device.pool.in_use_bytes == before


def test_it_is_held_while_it_is_copied(cpu, monkeypatch):
    buffer = Buffer(1000, "f4", cpu)
    inside, released = threading.Event(), threading.Event()
    copy_to_host = cpu.copy_to_host

    def slow(*arguments):
        inside.set()
        assert released.wait(10)
        assert not buffer.is_released
        copy_to_host(*arguments)

    monkeypatch.setattr(cpu, "copy_to_host", slow)
    thread = threading.Thread(target=buffer.copy_to, args=(np.empty(1000, "f4"),))
    thread.start()
    assert inside.wait(10)
    buffer.release()
    released.set()
    thread.join()
    assert buffer.is_released


def test_it_cannot_be_pickled_or_copied(device):
    buffer = Buffer(1, "f4", device)
    for misuse in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(UsageError, match="copy_from"):
            misuse(buffer)


# --- Arrays over it --------------------------------------------------------------------------------


def test_arrays_on_the_cpu_share_its_memory_and_hold_it(cpu):
    gc.collect()
    before = cpu.pool.in_use_bytes
    buffer = Buffer(5, "i4", cpu).copy_from(np.arange(5, dtype="i4"))
    array = np.asarray(buffer)
    array[0] = 7
    assert read(buffer)[0] == 7
    assert np.shares_memory(array, np.asarray(buffer))
    assert np.array(buffer, copy=False) is not None
    assert not np.shares_memory(array, np.array(buffer))
    part = array[1:3]
    buffer.release()
    del buffer, array
    assert part.tolist() == [1, 2]
    assert cpu.pool.in_use_bytes > before
    del part
    assert cpu.pool.in_use_bytes == before


def test_arrays_of_other_devices_are_copies(device):
    if device.capabilities.memory_is_host:
        pytest.skip("shares its memory")
    buffer = Buffer(3, "i4", device)
    assert np.asarray(buffer).shape == (3,)
    with pytest.raises(ValueError, match="cannot share memory"):
        np.array(buffer, copy=False)


def test_arrays_are_converted_where_asked(cpu):
    buffer = Buffer(3, "i4", cpu).copy_from(np.arange(3, dtype="i4"))
    assert np.asarray(buffer, dtype="f8").tolist() == [0.0, 1.0, 2.0]
    assert np.array(buffer, dtype="f8", copy=True).dtype == "f8"
    with pytest.raises(ValueError, match="float64"):
        np.array(buffer, dtype="f8", copy=False)


def test_empty_buffers_have_empty_arrays(real_device):
    buffer = Buffer(0, "f8", real_device).copy_from(np.empty((3, 0)))
    assert np.asarray(buffer).size == 0
    assert read(buffer).size == 0


def test_dlpack_on_the_cpu_shares_its_memory(cpu):
    buffer = Buffer(4, "f4", cpu).copy_from(np.ones(4, "f4"))
    assert buffer.__dlpack_device__() == (1, 0)
    array = np.from_dlpack(buffer)
    np.asarray(buffer)[2] = 5
    assert array.tolist() == [1, 1, 5, 1]
    buffer.release()
    del buffer
    gc.collect()
    assert array.tolist() == [1, 1, 5, 1]


def test_dlpack_on_gpus_is_the_librarys(gpus):
    buffer = Buffer(4, "f4", gpus[1])
    assert buffer.__dlpack_device__() == (2, 1)
    name, array, options = buffer.__dlpack__(stream=-1)
    assert (name, array.shape, options) == ("capsule", (4,), {"stream": -1})
    assert array.data.ptr == buffer.memory.native.data.ptr


def test_devices_without_dlpack_say_so():
    with pytest.raises(BufferError, match="null:0 cannot show its memory"):
        Buffer(4, "f4", NullDevice()).__dlpack__()
    with pytest.raises(UsageError, match="no arrays that share its memory"):
        Buffer(4, "f4", NullDevice()).view()


@pytest.mark.parametrize("kind", ["cuda"])
def test_views_of_real_gpus_share_their_memory(kind, device_of):
    buffer = Buffer(4, "f4", device_of(kind)).copy_from(np.arange(4, dtype="f4"))
    view = buffer.view()
    view += 1
    assert read(buffer).tolist() == [1, 2, 3, 4]
    buffer.__dlpack__()
    buffer.release()
    assert float(view.sum()) == 10
