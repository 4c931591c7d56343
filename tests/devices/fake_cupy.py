"""Stands in for CuPy where there is no GPU: two pretended ones, whose memory is the host's.

Only what the library uses, with CuPy's names, order of arguments and errors. Kernels in CUDA C are compiled as C, and
run one thread after the other.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
import types
from itertools import product
from pathlib import Path

import numpy as np

DEVICES = 2
MEMORY_BYTES = 2**31
SHIM = """
#include <stdint.h>
typedef struct { unsigned x, y, z; } dim3_t;
dim3_t blockIdx, blockDim, threadIdx, gridDim;
#define __global__
#define __device__ static
#define __umulhi(a, b) ((unsigned)(((unsigned long long)(a) * (unsigned long long)(b)) >> 32))
#define __clzll(x) __builtin_clzll((unsigned long long)(x))
"""


class CUDARuntimeError(RuntimeError):
    def __init__(self, status):
        self.status = status
        super().__init__(f"cudaError: {status}")


class State:
    """What tests look at and turn."""

    def __init__(self):
        self.device = 0
        self.device_count_error = 0
        self.peers = True
        self.peer_copies = 0
        self.enabled_peers = set()
        self.is_pinnable = True
        self.pinned = set()
        self.used = [0] * DEVICES
        self.async_copies = 0
        self.released_pool = 0


state = State()


class Device:
    def __init__(self, index):
        self.index = index

    def __enter__(self):
        self.before, state.device = state.device, self.index
        return self

    def __exit__(self, *error):
        state.device = self.before


class _Null:
    ptr = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def wait_event(self, event):
        assert event.recorded


class Stream:
    null = _Null()


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.timed = not disable_timing
        self.recorded = False

    def record(self, stream=None):
        assert stream is Stream.null
        self.recorded = True

    def synchronize(self):
        assert self.recorded


def get_elapsed_time(start, end):
    assert start.timed
    assert end.timed
    return 1.5


class Memory:
    def __init__(self, size):
        if state.used[state.device] + size > MEMORY_BYTES:
            raise CUDARuntimeError(2)
        self.device_id, self.size = state.device, size
        state.used[self.device_id] += size
        self.block = np.empty(size, dtype=np.uint8)
        self.ptr = self.block.ctypes.data

    def __del__(self):
        if hasattr(self, "block"):
            state.used[self.device_id] -= self.size


class UnownedMemory:
    def __init__(self, ptr, size, owner, device_id=-1):
        self.ptr, self.size, self.owner, self.device_id = ptr, size, owner, device_id


class MemoryPointer:
    def __init__(self, mem, offset):
        self.mem, self.ptr = mem, mem.ptr + offset

    def __add__(self, offset):
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)


class ndarray:
    def __init__(self, shape, dtype=float, memptr=None):
        self.shape, self.dtype, self.data = tuple(shape), np.dtype(dtype), memptr
        self.size = int(np.prod(self.shape))

    def host(self):
        pointer = ctypes.cast(self.data.ptr, ctypes.POINTER(ctypes.c_uint8))
        if not self.size:
            return np.empty(self.shape, dtype=self.dtype)
        flat = np.ctypeslib.as_array(pointer, (self.size * self.dtype.itemsize,))
        return flat.view(self.dtype).reshape(self.shape)

    def swapaxes(self, one, other):
        return Swapped(self, one, other)

    def __dlpack__(self, **options):
        return ("capsule", self, options)


class Swapped:
    def __init__(self, base, one, other):
        self.base, self.axes = base, (one, other)

    def host(self):
        return self.base.host().swapaxes(*self.axes)


def matmul(a, b, out):
    np.matmul(a.host(), b.host(), out=out.host())


class CompileException(Exception):
    def __init__(self, message):
        self.message = message
        super().__init__()

    def __str__(self):
        return self.message


class CUDADriverError(RuntimeError):
    pass


class RawModule:
    def __init__(self, *, code=None, options=()):
        assert isinstance(options, tuple)
        self.code = code

    def get_function(self, name):
        compiler = shutil.which("cc") or shutil.which("gcc")
        folder = Path(tempfile.mkdtemp())
        try:
            source, library = folder / "kernel.c", folder / "kernel.so"
            source.write_text(SHIM + re.sub(r'extern\s+"C"', "", self.code))
            command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            if done.returncode:
                raise CompileException(done.stderr)
            loaded = ctypes.CDLL(str(library))
        finally:
            shutil.rmtree(folder)
        if not hasattr(loaded, name):
            raise CUDADriverError("CUDA_ERROR_NOT_FOUND: named symbol not found")
        return Function(loaded, name)


class Function:
    def __init__(self, library, name):
        self.library, self.function = library, getattr(library, name)

    def __call__(self, grid, block, args):
        assert isinstance(args, tuple)
        values = [self.value(argument) for argument in args]
        grid, block = ((*sizes, 1, 1)[:3] for sizes in (grid, block))
        index, thread, width = (
            (ctypes.c_uint * 3).in_dll(self.library, name) for name in ("blockIdx", "threadIdx", "blockDim")
        )
        width[:] = block
        for at in product(*map(range, grid)):
            index[:] = at
            for within in product(*map(range, block)):
                thread[:] = within
                self.function(*values)

    @staticmethod
    def value(argument):
        if isinstance(argument, ndarray):
            return ctypes.c_void_p(argument.data.ptr)
        if np.asarray(argument).dtype.kind == "c":
            raise TypeError("no complex numbers here")
        return np.ctypeslib.as_ctypes_type(argument.dtype)(argument.item())


class Pinned(bytearray):
    def __init__(self, nbytes):
        super().__init__(nbytes)
        self.address = ctypes.addressof(ctypes.c_uint8.from_buffer(self))
        state.pinned.add(self.address)

    def __del__(self):
        state.pinned.discard(getattr(self, "address", None))


class PinnedMemory(Pinned):
    def __init__(self, nbytes):
        if not state.is_pinnable:
            raise CUDARuntimeError(2)
        super().__init__(nbytes)


def alloc_pinned_memory(nbytes):
    """Return what CuPy's own pool would keep."""
    return PinnedMemory(nbytes)


def pinned_pointer(memory, offset):
    assert offset == 0
    return memory


# --- cuBLAS: matrices lie by columns --------------------------------------------------------------

_KINDS = {(2, 68): np.float16, (0, 68): np.float32, (1, 70): np.float64}


def _columns(pointer, kind, rows, columns, leading):
    """Return the matrix of ``rows`` by ``columns`` at ``pointer``, whose columns are ``leading`` elements apart."""
    assert leading >= max(rows, 1)
    size = leading * (columns - 1) + rows
    itemsize = np.dtype(kind).itemsize
    flat = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint8)), (size * itemsize,))
    return np.lib.stride_tricks.as_strided(flat.view(kind), (rows, columns), (itemsize, leading * itemsize))


def _scalar(pointer, kind):
    held = np.float64 if kind == np.float64 else np.float32
    number = ctypes.c_double if held == np.float64 else ctypes.c_float
    return ctypes.cast(pointer, ctypes.POINTER(number)).contents.value


def _gemm(handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, b, type_b, ldb, beta, c, type_c, ldc, compute, algorithm):
    assert (handle, algorithm) == ("handle", -1)
    assert type_a == type_b == type_c
    kind = _KINDS[type_a, compute]
    left = _columns(a, kind, k, m, lda).T if op_a else _columns(a, kind, m, k, lda)
    right = _columns(b, kind, n, k, ldb).T if op_b else _columns(b, kind, k, n, ldb)
    assert (_scalar(alpha, kind), _scalar(beta, kind)) == (1, 0)
    wide = np.float32 if kind == np.float16 else kind
    with np.errstate(all="ignore"):
        _columns(c, kind, m, n, ldc)[...] = left.astype(wide) @ right.astype(wide)


def _gemm_batched(
    handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, step_a, b, type_b, ldb, step_b,
    beta, c, type_c, ldc, step_c, count, compute, algorithm,
):  # fmt: skip
    size = np.dtype(_KINDS[type_a, compute]).itemsize
    for at in range(count):
        _gemm(
            *(handle, op_a, op_b, m, n, k, alpha, a + at * step_a * size, type_a, lda),
            *(b + at * step_b * size, type_b, ldb, beta, c + at * step_c * size, type_c, ldc, compute, algorithm),
        )


cublas = types.SimpleNamespace(gemmEx=_gemm, gemmStridedBatchedEx=_gemm_batched)


def _copy(target, source, size, kind, stream):
    assert stream == 0
    state.async_copies += 1
    ctypes.memmove(target, source, size)


def _count():
    if state.device_count_error:
        raise CUDARuntimeError(state.device_count_error)
    return DEVICES


def _enable_peer(peer):
    if (state.device, peer) in state.enabled_peers:
        raise CUDARuntimeError(704)
    state.enabled_peers.add((state.device, peer))


def _copy_peer(target, target_device, source, source_device, size, stream):
    assert (target_device, source_device) in state.enabled_peers
    state.peer_copies += 1
    ctypes.memmove(target, source, size)


def _attributes(pointer):
    return types.SimpleNamespace(type=1 if pointer in state.pinned else 0)


def _properties(index):
    return {
        "name": b"Pretended GPU",
        "totalGlobalMem": MEMORY_BYTES,
        "major": 9,
        "minor": 0,
        "maxThreadsPerBlock": 1024,
        "integrated": 0,
    }


def _free_all_blocks():
    state.released_pool += 1


def get_default_memory_pool():
    return types.SimpleNamespace(free_all_blocks=_free_all_blocks)


runtime = types.SimpleNamespace(
    is_hip=False,
    CUDARuntimeError=CUDARuntimeError,
    getDeviceCount=_count,
    getDeviceProperties=_properties,
    driverGetVersion=lambda: 13000,
    memGetInfo=lambda: (MEMORY_BYTES - state.used[state.device], MEMORY_BYTES),
    deviceSynchronize=lambda: None,
    getDevice=lambda: state.device,
    memcpyHostToDevice=1,
    memcpyDeviceToHost=2,
    memcpyDeviceToDevice=3,
    memcpyAsync=_copy,
    memsetAsync=lambda pointer, value, size, stream: ctypes.memset(pointer, value, size),
    deviceCanAccessPeer=lambda device, peer: int(state.peers),
    deviceEnablePeerAccess=_enable_peer,
    memcpyPeerAsync=_copy_peer,
    pointerGetAttributes=_attributes,
    memoryTypeHost=1,
)
cuda = types.SimpleNamespace(
    Device=Device,
    device=types.SimpleNamespace(get_cublas_handle=lambda: "handle"),
    PinnedMemory=PinnedMemory,
    PinnedMemoryPointer=pinned_pointer,
    Stream=Stream,
    get_current_stream=lambda: Stream.null,
    Event=Event,
    get_elapsed_time=get_elapsed_time,
    UnownedMemory=UnownedMemory,
    MemoryPointer=MemoryPointer,
    alloc_pinned_memory=alloc_pinned_memory,
    runtime=runtime,
    memory=types.SimpleNamespace(Memory=Memory, OutOfMemoryError=type("OutOfMemoryError", (MemoryError,), {})),
    compiler=types.SimpleNamespace(CompileException=CompileException),
    driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
)
