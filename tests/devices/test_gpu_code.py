"""What the CuPy backend asks of CuPy, seen by a stand-in; and OpenCL's choice of devices."""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pytest

from sparkle_mesh import limits
from sparkle_mesh.devices import transfers
from sparkle_mesh.errors import DeviceError, OutOfMemoryError, UsageError


@pytest.fixture
def state(gpus, stand_in):
    return stand_in.cupy.state


def test_devices_say_what_the_runtime_says(gpus, stand_in):
    assert [str(gpu) for gpu in gpus] == ["cuda:0", "cuda:1"]
    info = gpus[0].info
    assert (info.name, info.memory_bytes, info.features, info.driver) == ("Pretended GPU", 2**31, ("sm_90",), "13000")
    backend = stand_in.CupyBackend()
    assert backend.kind == "cuda"
    assert len(backend.devices()) == 2
    assert backend.devices() is backend.devices()


@pytest.mark.parametrize("status", [35, 100])
def test_no_driver_means_no_devices(state, status, stand_in):
    state.device_count_error = status
    assert stand_in.CupyBackend().devices() == ()


def test_a_broken_driver_is_told(state, stand_in):
    state.device_count_error = 999
    with pytest.raises(DeviceError, match="cuda devices cannot be listed"):
        stand_in.CupyBackend().devices()


def test_gpus_copy_to_each_other_directly(gpus, state):
    array = np.arange(1000)
    source, target = gpus[0].allocate(array.nbytes), gpus[1].allocate(array.nbytes)
    gpus[0].copy_from_host(source, array)
    before = state.peer_copies
    assert gpus[0].copy_between(source, target)
    assert gpus[1].copy_between(source, target)
    assert state.peer_copies == before + 2
    found = np.empty_like(array)
    gpus[1].copy_to_host(target, found)
    assert (found == array).all()


def test_peer_access_that_is_on_is_fine(gpus, state):
    gpus[1]._peers.clear()
    state.enabled_peers.add((1, 0))
    assert gpus[1].reaches(gpus[0])


def test_peer_access_that_was_refused_is_asked_for_again(gpus, state, monkeypatch, stand_in):
    gpus[1]._peers.clear()
    state.enabled_peers.discard((1, 0))

    def refuse(peer):
        raise stand_in.cupy.cuda.runtime.CUDARuntimeError(2)

    with monkeypatch.context() as patch:
        patch.setattr(stand_in.cupy.cuda.runtime, "deviceEnablePeerAccess", refuse)
        with pytest.raises(DeviceError, match="cudaError: 2"):
            gpus[1].reaches(gpus[0])
    assert gpus[1].reaches(gpus[0])
    assert (1, 0) in state.enabled_peers


def test_gpus_that_do_not_reach_each_other_go_through_the_host(gpus, state):
    state.peers = False
    for gpu in gpus:
        gpu._peers.clear()
    array = np.arange(1000)
    source, target = gpus[0].allocate(array.nbytes), gpus[1].allocate(array.nbytes)
    gpus[0].copy_from_host(source, array)
    assert not gpus[0].copy_between(source, target)
    transfers.copy(source, target)
    found = np.empty_like(array)
    gpus[1].copy_to_host(target, found)
    assert (found == array).all()
    for gpu in gpus:
        gpu._peers.clear()


def test_large_copies_go_through_pinned_memory(gpus, state):
    array = np.ones(3 * limits.STAGING_BLOCK_BYTES, dtype=np.uint8)
    memory = gpus[0].allocate(array.nbytes)
    before = state.async_copies
    gpus[0].copy_from_host(memory, array)
    assert state.async_copies == before + 3
    state.is_pinnable = False
    gpus[0].close()
    gpus[0].copy_to_host(memory, array)
    assert state.async_copies == before + 6


def test_arrays_in_pinned_memory_go_at_once(gpus, state, stand_in):
    block = stand_in.cupy.cuda.alloc_pinned_memory
    array = np.frombuffer(block(3 * limits.STAGING_BLOCK_BYTES), dtype=np.uint8)
    memory = gpus[0].allocate(array.nbytes)
    before = state.async_copies
    gpus[0].copy_from_host(memory, array)
    gpus[0].copy_to_host(memory, array)
    assert state.async_copies == before + 2


def test_unknown_host_pointers_count_as_ordinary(gpus, monkeypatch, stand_in):
    cupy = stand_in.cupy

    def refuse(pointer):
        raise cupy.CUDARuntimeError(1)

    monkeypatch.setattr(cupy.runtime, "pointerGetAttributes", refuse)
    assert not gpus[0]._goes_directly(np.zeros(limits.STAGED_COPY_MIN_BYTES, dtype=np.uint8))


def test_cupys_own_pool_makes_room(gpus, state):
    before = state.released_pool
    with pytest.raises(OutOfMemoryError, match=r"cuda:0 \(Pretended GPU\)"):
        gpus[0].allocate(2**31 + 1)
    assert state.released_pool == before + 1


def test_other_errors_of_the_driver_are_told(gpus, monkeypatch, stand_in):
    cupy = stand_in.cupy

    def fail(*arguments):
        raise cupy.CUDARuntimeError(700)

    monkeypatch.setattr(cupy.cuda.memory, "Memory", fail)
    with pytest.raises(DeviceError, match="cannot allocate 8 bytes"):
        gpus[0].allocate(8)
    monkeypatch.setattr(cupy.runtime, "deviceSynchronize", fail)
    with pytest.raises(DeviceError, match="cuda:0: the driver reports cudaError: 700"):
        gpus[0].synchronize()
    monkeypatch.setattr(cupy.runtime, "deviceEnablePeerAccess", fail)
    gpus[0]._peers.clear()
    with pytest.raises(DeviceError, match="700"):
        gpus[0].reaches(gpus[1])
    gpus[0]._peers.clear()


def test_arguments_that_the_function_refuses_are_the_callers(gpus):
    source = 'extern "C" __global__ void f(int ignored) {}'
    with pytest.raises(UsageError, match="does not take these arguments"):
        gpus[0].compile(source, "f").launch((1,), None, [np.complex64(1)])


# --- OpenCL ----------------------------------------------------------------------------------------


@pytest.fixture
def opencl(device_of):
    device_of("opencl")
    from sparkle_mesh.devices import opencl_device

    return opencl_device


def listing(opencl, *devices):
    kinds = opencl.cl.device_type
    return [
        types.SimpleNamespace(type=getattr(kinds, kind), vendor_id=vendor, available=available, compiler_available=True)
        for kind, vendor, available in devices
    ]


def test_gpus_of_makers_that_are_served_are_left_out(opencl):
    gpus = (("GPU", 0x10DE, 1), ("GPU", 0x1002, 1), ("GPU", 0x8086, 1))
    devices = listing(opencl, *gpus, ("CPU", 0x10DE, 1), ("GPU", 1, 0))
    for served, wanted in [(["cuda"], [0, 1, 1, 1, 0]), (["rocm", "cpu"], [1, 0, 1, 1, 0]), ([], [1, 1, 1, 1, 0])]:
        backend = opencl.OpenClBackend(served_kinds=served)
        assert [backend._wants(device) for device in devices] == wanted


def test_devices_of_opencl_are_numbered(opencl):
    backend = opencl.OpenClBackend()
    assert backend.kind == "opencl"
    assert [device.index for device in backend.devices()] == list(range(len(backend.devices())))
    assert backend.devices() is backend.devices()


def test_too_many_or_few_arguments_are_refused(opencl):
    device = opencl.OpenClBackend().devices()[0]
    kernel = device.compile("__kernel void f(uchar on, __global uchar *out) { out[0] = on; }", "f")
    memory = device.allocate(1)
    with pytest.raises(UsageError, match="takes 2 arguments, not 1"):
        kernel.launch((1,), None, [memory])
    with pytest.raises(DeviceError, match="kernel f on opencl"):
        kernel.launch((1,), None, [np.int64(1), memory])
    kernel.launch((1,), None, [np.bool_(True), memory])
    found = np.zeros(1, np.uint8)
    device.copy_to_host(memory, found)
    assert found[0] == 1


def test_devices_of_opencl_do_not_copy_to_each_other(opencl):
    first, second = (opencl.OpenClBackend().devices()[0] for _ in range(2))
    array = np.arange(100)
    source, target = first.allocate(array.nbytes), second.allocate(array.nbytes)
    first.copy_from_host(source, array)
    assert not first.copy_between(source, target)
    transfers.copy(source, target)
    found = np.empty_like(array)
    second.copy_to_host(target, found)
    assert (found == array).all()


def test_optional_packages_are_not_imported_by_the_rest():
    program = "import sys, sparkle_mesh.devices.registry, sparkle_mesh.devices.buffers, sparkle_mesh.devices.profiles\n"
    program += "assert not {'cupy', 'pyopencl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.fixture
def refuse(opencl):
    """Return a function that raises an error of OpenCL's own."""
    device = opencl.OpenClBackend().devices()[0]

    def raise_it(*arguments, **options):
        opencl.cl.Buffer(device._context, opencl.cl.mem_flags.READ_WRITE, size=2**60)

    return raise_it


def test_platforms_that_cannot_be_listed_are_told(opencl, refuse, monkeypatch):
    platform = types.SimpleNamespace(name="Refusing", get_devices=refuse)
    with pytest.raises(DeviceError, match="devices of OpenCL platform Refusing"):
        opencl._devices_of(platform)
    monkeypatch.setattr(opencl, "_NO_DEVICE", opencl._INVALID_BUFFER_SIZE)
    assert opencl._devices_of(platform) == []
    monkeypatch.setattr(opencl.cl, "get_platforms", refuse)
    with pytest.raises(DeviceError, match="platforms cannot be listed"):
        opencl.OpenClBackend().devices()
    monkeypatch.setattr(opencl, "_NO_PLATFORM", opencl._INVALID_BUFFER_SIZE)
    assert opencl.OpenClBackend().devices() == ()


def test_errors_of_allocating_are_told(opencl, refuse, monkeypatch):
    device = opencl.OpenClBackend().devices()[0]
    monkeypatch.setattr(opencl.cl, "enqueue_migrate_mem_objects", refuse)
    with pytest.raises(OutOfMemoryError, match="INVALID_BUFFER_SIZE"):
        device.allocate(8)
    monkeypatch.setattr(opencl, "_INVALID_BUFFER_SIZE", 0)
    with pytest.raises(DeviceError, match="cannot allocate 8 bytes"):
        device.allocate(8)
