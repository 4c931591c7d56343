"""What every device does alike, whatever it is made of."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparkle_mesh import limits
from sparkle_mesh.devices import transfers
from sparkle_mesh.devices.cpu import CpuDevice
from sparkle_mesh.devices.device import Device
from sparkle_mesh.devices.host_bytes import host_bytes
from sparkle_mesh.devices.null import NullDevice
from sparkle_mesh.errors import CompileError, DeviceError, OutOfMemoryError, ReleasedError, SparkleError, UsageError

ONE_DEVICE = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ADD = {
    "cuda": """extern "C" __global__ void add(const float *a, const float *b, float *out, float scale, unsigned n) {
        unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
        if (at < n) out[at] = a[at] + scale * b[at];
    }""",
    "opencl": """__kernel void add(__global const float *a, __global const float *b, __global float *out, float scale,
                                   uint n) {
        size_t at = get_global_id(0);
        if (at < n) out[at] = a[at] + scale * b[at];
    }""",
}
# Each work item of three dimensions adds one to its own element.
COUNT = {
    "cuda": """extern "C" __global__ void count(int *out, int nx, int ny, int nz) {
        int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
        int z = blockIdx.z * blockDim.z + threadIdx.z;
        if (x < nx && y < ny && z < nz) out[(z * ny + y) * nx + x] += 1;
    }""",
    "opencl": """__kernel void count(__global int *out, int nx, int ny, int nz) {
        int x = get_global_id(0), y = get_global_id(1), z = get_global_id(2);
        if (x < nx && y < ny && z < nz) out[(z * ny + y) * nx + x] += 1;
    }""",
}


def block_of(device, array):
    memory = device.allocate(array.nbytes)
    device.copy_from_host(memory, array)
    return memory


def content(memory, like):
    found = np.full_like(like, 1)
    memory.device.copy_to_host(memory, found)
    return found


def test_it_says_what_it_is(device):
    assert str(device) == f"{device.kind}:{device.index}"
    assert str(device) in repr(device)
    assert device.name in repr(device)
    assert "float32" in device.capabilities.dtypes
    assert device.capabilities.matmul_dtypes <= device.capabilities.dtypes
    assert device.free_memory_bytes() > 0
    device.synchronize()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (5, 7), (1,) * 20, (300, 1000)])
@pytest.mark.parametrize("dtype", ["bool", "int8", "float16", "float64", "complex128", "S3", "M8[ns]"])
def test_arrays_come_back_as_they_went(real_device, shape, dtype):
    numbers = np.arange(prod(shape)) % 100
    array = numbers.astype("i8").astype(dtype).reshape(shape) if dtype != "S3" else numbers.astype("S3").reshape(shape)
    memory = block_of(real_device, array)
    assert memory.nbytes == array.nbytes
    np.testing.assert_array_equal(content(memory, array), array)
    real_device.free(memory)


def test_large_arrays_come_back_as_they_went(real_device):
    array = np.random.default_rng(5).integers(0, 255, 5 * limits.THREAD_PIECE_BYTES + 12345, dtype=np.uint8)
    memory = block_of(real_device, array)
    assert (content(memory, array) == array).all()
    other = real_device.allocate(array.nbytes)
    assert real_device.copy_between(memory, other)
    real_device.clear(memory)
    assert (content(other, array) == array).all()
    assert not content(memory, array).any()


@ONE_DEVICE
@given(data=st.data())
def test_parts_are_written_and_read(real_device, data):
    size = data.draw(st.integers(0, 3000))
    whole = np.arange(size).astype(np.uint8)
    start = data.draw(st.integers(0, size))
    part = data.draw(hnp.arrays(np.uint8, st.integers(0, size - start)))
    memory = block_of(real_device, whole)
    real_device.copy_from_host(memory, part, start)
    whole[start : start + part.size] = part
    np.testing.assert_array_equal(content(memory, whole), whole)
    read = np.empty_like(part)
    real_device.copy_to_host(memory, read, start)
    np.testing.assert_array_equal(read, part)


def test_the_host_array_may_change_at_once(real_device):
    for size in (100, 3 * limits.STAGING_BLOCK_BYTES):
        array = np.ones(size, dtype=np.uint8)
        memory = block_of(real_device, array)
        array[:] = 7
        assert (content(memory, array) == 1).all()


@pytest.mark.parametrize("offset_bytes", [-1, 93, 2**62])
def test_what_does_not_fit_is_refused(device, offset_bytes):
    memory = device.allocate(100)
    array = np.zeros(8, dtype=np.uint8)
    with pytest.raises(UsageError, match="not within"):
        device.copy_from_host(memory, array, offset_bytes)
    with pytest.raises(UsageError, match="not within"):
        device.copy_to_host(memory, array, offset_bytes)


def test_arrays_that_cannot_be_copied_are_refused(device):
    memory = device.allocate(80)
    for array, why in [
        (np.zeros((4, 4)).T[1:], "not C-contiguous"),
        (np.zeros(10)[::2], "not C-contiguous"),
        (np.zeros(10, dtype=object), "cannot copy object"),
        ([1, 2], "cannot copy list"),
    ]:
        with pytest.raises(UsageError, match=why):
            device.copy_from_host(memory, array)
    array = np.zeros(10)
    array.flags.writeable = False
    device.copy_from_host(memory, array)
    with pytest.raises(UsageError, match="read-only"):
        device.copy_to_host(memory, array)


def test_subclasses_are_copied_as_their_numbers():
    assert type(host_bytes(np.ma.masked_array([1.0], mask=[True]))) is np.ndarray


@pytest.mark.parametrize("nbytes", [-1, 1.5, "many", None])
def test_sizes_that_are_none_are_refused(device, nbytes):
    for allocate in (device.allocate, device.pool.allocate):
        with pytest.raises(UsageError, match="nbytes"):
            allocate(nbytes)


def test_freed_blocks_are_not_used_again(device):
    memory = device.allocate(np.int64(64))
    before = device.allocated_bytes
    device.free(memory)
    assert device.allocated_bytes == before - 64
    assert memory.freed
    assert "freed" in repr(memory)
    array = np.zeros(8)
    other = device.allocate(64)
    for use in [
        lambda: device.free(memory),
        lambda: memory.native,
        lambda: device.copy_from_host(memory, array),
        lambda: device.copy_to_host(memory, array),
        lambda: device.copy_between(memory, other),
        lambda: device.copy_between(other, memory),
        lambda: device.clear(memory),
        lambda: device.view(memory, "f8", 1, None),
        lambda: device.matmul(memory, other, other, (1, 1), (1, 1), "f4"),
    ]:
        with pytest.raises(SparkleError):
            use()
    with pytest.raises(ReleasedError, match="was freed"):
        device.free(memory)


def test_blocks_of_another_device_are_refused(device):
    foreign = CpuDevice().allocate(64)
    for use in [
        lambda: device.free(foreign),
        lambda: device.copy_from_host(foreign, np.zeros(8)),
        lambda: device.clear(foreign),
    ]:
        with pytest.raises(UsageError, match=r"not a block of"):
            use()
    with pytest.raises(UsageError, match="neither"):
        device.copy_between(foreign, foreign)


def test_only_one_of_two_threads_frees(device):
    for _ in range(20):
        memory = device.allocate(8)
        start = threading.Barrier(2)

        def free(memory=memory, start=start):
            start.wait()
            try:
                device.free(memory)
            except ReleasedError:
                return 0
            return 1

        with ThreadPoolExecutor(2) as pool:
            assert sum(pool.map(lambda _, free=free: free(), range(2))) == 1


def test_too_large_a_block_is_out_of_memory(device):
    with pytest.raises(OutOfMemoryError, match=r"has no block of \d+ bytes") as caught:
        device.allocate(2**61)
    assert isinstance(caught.value, MemoryError)
    assert str(device) in str(caught.value)
    assert "are free" in str(caught.value)
    with pytest.raises(OutOfMemoryError):
        device.pool.allocate(2**61)


def test_copies_on_the_device_keep_order(real_device):
    arrays = [np.full(1000, fill, dtype=np.int32) for fill in range(3)]
    first, second = block_of(real_device, arrays[1]), block_of(real_device, arrays[2])
    third = block_of(real_device, arrays[0])
    assert real_device.copy_between(first, third)
    assert real_device.copy_between(second, first, 2000)
    assert real_device.copy_between(second, second)
    assert real_device.copy_between(second, first, 0)
    np.testing.assert_array_equal(content(third, arrays[0]), arrays[1])
    np.testing.assert_array_equal(content(first, arrays[0]), np.repeat([2, 1], 500))
    with pytest.raises(UsageError, match="not within"):
        real_device.copy_between(first, second, 4001)
    with pytest.raises(UsageError, match="not within"):
        real_device.copy_between(first, real_device.allocate(5))


def test_parts_are_cleared(real_device):
    array = np.ones(100, dtype=np.uint8)
    memory = block_of(real_device, array)
    real_device.clear(memory, 40)
    np.testing.assert_array_equal(content(memory, array), np.repeat([0, 1], [40, 60]))
    real_device.clear(real_device.allocate(0))
    with pytest.raises(UsageError, match="not within"):
        real_device.clear(memory, 101)


def test_copies_between_devices_of_two_kinds(real_device):
    array = np.arange(10000.0)
    host = CpuDevice()
    there, back = real_device.allocate(array.nbytes), host.allocate(array.nbytes)
    transfers.copy(block_of(host, array), there)
    transfers.copy(there, back)
    np.testing.assert_array_equal(content(back, array), array)
    transfers.copy(there, back, 0)
    with pytest.raises(UsageError, match="not within"):
        transfers.copy(there, host.allocate(8))


def test_many_threads_at_once(real_device):
    def use(number):
        array = np.full(limits.STAGED_COPY_MIN_BYTES // 4 + number, number, dtype=np.int32)
        for _ in range(10):
            memory = real_device.pool.allocate(array.nbytes)
            real_device.copy_from_host(memory, array)
            other = real_device.pool.allocate(array.nbytes)
            real_device.copy_between(memory, other, array.nbytes)
            real_device.pool.free(memory)
            assert (content(other, array) == number).all()
            real_device.pool.free(other)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(8)))
    assert real_device.pool.in_use_bytes >= 0


# --- Work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local_size", [None, (1,), (7,), (64,)])
def test_kernels_run(real_compiling_device, local_size):
    language = real_compiling_device.capabilities.language
    kernel = real_compiling_device.compile(ADD[language], "add")
    assert kernel.name == "add"
    assert kernel.device is real_compiling_device
    a, b = np.arange(1001, dtype=np.float32), np.ones(1001, dtype=np.float32)
    blocks = [block_of(real_compiling_device, array) for array in (a, b, np.zeros_like(a))]
    kernel.launch((1001,), local_size, [*blocks, np.float32(0.5), np.uint32(1001)])
    np.testing.assert_array_equal(content(blocks[2], a), a + np.float32(0.5) * b)


@pytest.mark.parametrize("local_size", [None, (2, 2, 2), (5, 1, 3)])
def test_kernels_run_in_three_dimensions(real_compiling_device, local_size):
    kernel = real_compiling_device.compile(COUNT[real_compiling_device.capabilities.language], "count")
    counts = np.zeros((3, 5, 7), dtype=np.int32)
    memory = block_of(real_compiling_device, counts)
    kernel.launch((7, 5, 3), local_size, [memory, np.int32(7), np.int32(5), np.int32(3)])
    assert (content(memory, counts) == 1).all()


def test_nothing_runs_over_no_work_items(compiling_device):
    language = compiling_device.capabilities.language
    kernel = compiling_device.compile(COUNT[language], "count")
    memory = compiling_device.allocate(4)
    kernel.launch((0, 5), (1, 1), [memory, np.int32(1), np.int32(1), np.int32(1)])
    compiling_device.synchronize()


def test_kernels_are_compiled_once(compiling_device):
    language = compiling_device.capabilities.language
    first = compiling_device.compile(ADD[language], "add")
    assert compiling_device.compile(ADD[language], "add") is first
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: compiling_device.compile(ADD[language], "add"), range(6))) == {first}
    assert compiling_device.compile(ADD[language] + "\n", "add") is not first


def test_few_kernels_are_kept(compiling_device, monkeypatch):
    language = compiling_device.capabilities.language
    monkeypatch.setattr(limits, "COMPILED_KERNELS_MAX_COUNT", 2)
    sources = [ADD[language] + "\n" * number for number in range(3)]
    kernels = [compiling_device.compile(source, "add") for source in sources]
    assert compiling_device.compile(sources[2], "add") is kernels[2]
    assert compiling_device.compile(sources[0], "add") is not kernels[0]


def test_what_does_not_compile_is_told(real_compiling_device):
    language = real_compiling_device.capabilities.language
    with pytest.raises(CompileError, match="no_such_thing"):
        real_compiling_device.compile(ADD[language].replace("scale * b", "no_such_thing * b"), "add")
    with pytest.raises(CompileError, match="cannot compile kernel subtract"):
        real_compiling_device.compile(ADD[language], "subtract")


def test_devices_without_a_compiler_say_so(cpu):
    with pytest.raises(UsageError, match="compiles no kernels"):
        cpu.compile("", "add")


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        (((), None), "global_size"),
        (((1, 1, 1, 1), None), "global_size"),
        (((-1,), None), "global_size"),
        (((1.5,), None), "global_size"),
        (((4, 4), (4,)), "as many dimensions"),
        (((4,), (0,)), "groups of 1 to"),
        (((4,), (2**20,)), "groups of 1 to"),
    ],
)
def test_sizes_of_launches_are_checked(compiling_device, sizes, why):
    kernel = compiling_device.compile(ADD[compiling_device.capabilities.language], "add")
    with pytest.raises(UsageError, match=why):
        kernel.launch(*sizes, [])


def test_arguments_of_launches_are_checked(compiling_device):
    kernel = compiling_device.compile(ADD[compiling_device.capabilities.language], "add")
    memory, freed = compiling_device.allocate(4), compiling_device.allocate(4)
    compiling_device.free(freed)
    for argument in (3, 1.5, np.zeros(3), "x", None):
        with pytest.raises(UsageError, match="argument 3 of kernel add"):
            kernel.launch((1,), None, [memory, memory, memory, argument, np.uint32(0)])
    with pytest.raises(ReleasedError):
        kernel.launch((1,), None, [freed])
    with pytest.raises(UsageError, match="not a block of"):
        kernel.launch((1,), None, [CpuDevice().allocate(4)])


@ONE_DEVICE
@given(data=st.data())
def test_matrices_are_multiplied(real_device, data):
    signature = hnp.mutually_broadcastable_shapes(signature="(m,k),(k,n)->(m,n)", max_dims=3, max_side=6, min_side=0)
    shape_a, shape_b = data.draw(signature).input_shapes
    numeric = sorted({"int8", "uint64", "float16", "float32", "float64"} & real_device.capabilities.matmul_dtypes)
    dtype = data.draw(st.sampled_from(numeric))
    numbers = (
        hnp.arrays(dtype, shape_a, elements=st.integers(0, 5)),
        hnp.arrays(dtype, shape_b, elements=st.integers(0, 5)),
    )
    a, b = (data.draw(one) for one in numbers)
    expected = np.matmul(a, b)
    out = block_of(real_device, np.ones(expected.shape, dtype=dtype))
    real_device.matmul(block_of(real_device, a), block_of(real_device, b), out, shape_a, shape_b, dtype)
    np.testing.assert_array_equal(content(out, expected), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_larger_matrices_are_multiplied(real_device, dtype):
    if dtype not in real_device.capabilities.matmul_dtypes:
        pytest.skip(f"{real_device} does not compute with {dtype}")
    random = np.random.default_rng(3)
    a, b = random.random((65, 130)).astype(dtype), random.random((130, 33)).astype(dtype)
    out = real_device.allocate(65 * 33 * a.itemsize)
    real_device.matmul(block_of(real_device, a), block_of(real_device, b), out, a.shape, b.shape, dtype)
    expected = a.astype("f8") @ b.astype("f8")
    tolerance = 130 * np.finfo(dtype).eps
    np.testing.assert_allclose(content(out, np.empty((65, 33), dtype)), expected, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["int32", "float16", "float32", "float64"])
@pytest.mark.parametrize(
    "shapes", [((2, 3, 4), (2, 4, 5)), ((2, 1, 3, 4), (5, 4, 2)), ((7, 3, 4), (4, 5)), ((3, 4), (2, 1, 4, 1))]
)
def test_batches_of_matrices_are_multiplied(real_device, shapes, dtype):
    if dtype not in real_device.capabilities.matmul_dtypes:
        pytest.skip(f"{real_device} does not compute with {dtype}")
    a, b = ((np.arange(prod(shape)) % 7).astype(dtype).reshape(shape) for shape in shapes)
    expected = np.matmul(a, b)
    out = real_device.allocate(expected.nbytes)
    real_device.matmul(block_of(real_device, a), block_of(real_device, b), out, *shapes, dtype)
    np.testing.assert_array_equal(content(out, expected), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("transposed", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_factors_may_lie_transposed_on_gpus(real_device, batch, transposed, dtype):
    a, b = (np.arange(prod(batch) * 20).reshape(*batch, *shape) % 7 for shape in ((4, 5), (5, 4)))
    expected = np.matmul(a, b).astype(dtype)
    lie = [np.swapaxes(one, -1, -2) if flag else one for one, flag in zip((a, b), transposed, strict=True)]
    blocks = [block_of(real_device, np.ascontiguousarray(one.astype(dtype))) for one in lie]
    out = real_device.allocate(expected.nbytes)
    if real_device.kind not in ("cuda", "rocm"):
        if dtype in real_device.capabilities.matmul_dtypes:
            with pytest.raises(UsageError, match="lie transposed"):
                real_device.matmul(*blocks, out, a.shape, b.shape, dtype, transposed=transposed)
        return
    real_device.matmul(*blocks, out, a.shape, b.shape, dtype, transposed=transposed)
    np.testing.assert_array_equal(content(out, expected), expected)


@pytest.mark.parametrize("dtype", ["int32", "float16", "float32", "float64"])
@pytest.mark.parametrize("transposed", [(True, False), (False, True), (True, True)], ids=str)
def test_one_right_factor_for_left_ones_that_lie_transposed(real_device, transposed, dtype):
    if not real_device.capabilities.matmul_transposes:
        pytest.skip(f"needs a device that takes factors that lie transposed, a GPU through CuPy; not {real_device}")
    a, b = np.arange(3 * 20).reshape(3, 4, 5) % 7, np.arange(35).reshape(5, 7) % 5
    lie = [np.swapaxes(one, -1, -2) if flag else one for one, flag in zip((a, b), transposed, strict=True)]
    blocks = [block_of(real_device, np.ascontiguousarray(one.astype(dtype))) for one in lie]
    expected = np.matmul(a, b).astype(dtype)
    out = real_device.allocate(expected.nbytes)
    real_device.matmul(*blocks, out, a.shape, b.shape, dtype, transposed=transposed)
    np.testing.assert_array_equal(content(out, expected), expected)


def test_matrices_that_do_not_fit_are_refused(device):
    block, out = device.allocate(16), device.allocate(16)
    for shapes, why in [
        (((2, 2), (3, 2)), "do not multiply"),
        (((4,), (4, 1)), "do not multiply"),
        (((2, 1, 1), (3, 1, 1)), "do not multiply"),
        (((2, 4), (4, 2)), "not within"),
        (((1, 1), (1, 5)), "not within"),
    ]:
        with pytest.raises(UsageError, match=why):
            device.matmul(block, block, out, *shapes, "float32")
    with pytest.raises(UsageError, match="one of the factors"):
        device.matmul(block, out, out, (1, 1), (1, 1), "float32")
    with pytest.raises(UsageError, match="multiplies no matrices of datetime64"):
        device.matmul(block, block, out, (1, 1), (1, 1), "M8[s]")
    with pytest.raises(UsageError, match="other byte order"):
        device.matmul(block, block, out, (1, 1), (1, 1), np.dtype("float32").newbyteorder())


def test_work_is_measured(device):
    block = device.allocate(1 << 20)
    taken = device.measure(lambda: device.clear(block))
    assert 0 <= taken < 10


def test_a_closed_device_may_be_used_again(device):
    device.pool.free(device.pool.allocate(1000))
    assert device.pool.kept_bytes
    device.close()
    assert device.pool.kept_bytes == 0
    device.pool.free(device.pool.allocate(1000))
    array = np.ones(limits.STAGED_COPY_MIN_BYTES, dtype=np.uint8)
    block_of(device, array)


# --- What backends have in common ------------------------------------------------------------------


def test_a_backend_that_promises_too_much_is_told(cpu):
    boaster = CpuDevice()
    boaster.capabilities = NullDevice().capabilities
    with pytest.raises(DeviceError, match="says that it compiles opencl, and does not"):
        boaster.compile("", "f")
    with pytest.raises(DeviceError, match="says that it multiplies float32, and does not"):
        Device._multiplier(boaster, boaster._product((1, 1), (1, 1), "float32", (False, False)))


def test_a_block_that_another_thread_freed_in_between_is_told(cpu, monkeypatch):
    memory = cpu.allocate(8)
    monkeypatch.setattr(cpu, "native_of", lambda memory: memory._natives.clear())
    with pytest.raises(ReleasedError, match="was freed"):
        cpu.free(memory)


def test_the_processor_does_not_promise_what_is_not_there(cpu, monkeypatch):
    monkeypatch.setattr(cpu, "free_memory_bytes", lambda: limits.HOST_CHECKED_MIN_BYTES)
    with pytest.raises(OutOfMemoryError, match="are free"):
        cpu.allocate(limits.HOST_CHECKED_MIN_BYTES + 1)
    monkeypatch.setattr(cpu, "free_memory_bytes", lambda: 2**62)
    with pytest.raises(OutOfMemoryError, match="Unable to allocate"):
        cpu.allocate(2**61)


def test_changes_that_meet_the_lock_are_added_later():
    device = CpuDevice()
    with device._changes_lock:
        memory = device.allocate(100)
    assert device.allocated_bytes == memory.nbytes
