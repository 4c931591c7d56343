"""A CuPy whose GPUs are this process's memory, and whose streams do nothing until they are waited for.

So what was copied is there only if the right stream was waited for, and what was freed too early is found.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

import numpy as np


class OutOfMemoryError(RuntimeError):
    pass


class CompileException(Exception):
    pass


class Stream:
    def __init__(self, ptr: int, device: int) -> None:
        self.ptr, self.device = ptr, device
        self.queue: list[Callable[[], object]] = []

    def synchronize(self) -> None:
        queue, self.queue = self.queue, []
        for do in queue:
            do()


class Gpus:
    """The state of all of them; ``module`` is to be imported as ``cupy``."""

    def __init__(self) -> None:
        self.current = 0
        #: By device: a thread's current stream, and who asked for it.
        self.streams: dict[int, Stream] = {}
        self.threads: set[int] = set()
        self.pinned: list[int] = []
        self.fetched_bytes = 0
        self.full = False
        #: What the next copies to arrays raise.
        self.failures: list[BaseException] = []
        gpus = self

        class Device:
            def __init__(self, number: int) -> None:
                self.id = number

            def __enter__(self) -> Device:
                self.before, gpus.current = gpus.current, self.id
                return self

            def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
                gpus.current = self.before

        class PinnedMemory:
            def __init__(self, nbytes: int) -> None:
                if gpus.full:
                    raise OutOfMemoryError("out of memory")
                self.memory = (ctypes.c_char * nbytes)()
                self.ptr = ctypes.addressof(self.memory)
                gpus.pinned.append(nbytes)

        self.module: Any = ModuleType("cupy")
        self.module.ndarray = self._make_array_type()
        self.module.ascontiguousarray = self.packed
        self.module.empty = lambda shape, dtype: self.array(np.full(shape, 77, dtype))
        self.module.asarray = lambda array: self.array(np.array(array))
        self.module.cuda = SimpleNamespace(
            Device=Device,
            PinnedMemory=PinnedMemory,
            UnownedMemory=lambda ptr, size, owner, device: SimpleNamespace(ptr=ptr, owner=owner, device=device),
            MemoryPointer=lambda memory, offset: (memory, offset),
            get_current_stream=self.stream,
            compiler=SimpleNamespace(CompileException=CompileException),
        )

    def stream(self) -> Stream:
        self.threads.add(threading.get_ident())
        return self.streams.setdefault(self.current, Stream(1000 * self.current, self.current))

    def array(self, memory: Any, device: int | None = None) -> Any:
        """An array on a device (the current one), whose memory is ``memory``."""
        made = self.module.ndarray.__new__(self.module.ndarray)
        made.memory, made.device = memory, SimpleNamespace(id=self.current if device is None else device)
        made.data = Pointer(self, made)
        return made

    def packed(self, array: Any) -> Any:
        if array.flags.c_contiguous:
            return array
        assert array.device.id == self.current
        made = self.array(np.full(array.shape, 66, array.dtype))
        source, target = array.memory, made.memory
        self.stream().queue.append(lambda: np.copyto(target, source))
        return made

    def _make_array_type(self) -> type:
        gpus = self

        def create(self: Any, shape: Any, dtype: Any, memptr: Any, strides: Any) -> None:
            memory, offset = memptr
            raw = (ctypes.c_char * (1 << 20)).from_address(memory.ptr)
            self.memory = np.ndarray(shape, dtype, raw, offset, strides)
            self.owner, self.device = memory.owner, SimpleNamespace(id=memory.device)
            self.data = Pointer(gpus, self)

        def setitem(self: Any, where: Any, value: Any) -> None:
            assert self.device.id == gpus.current
            target, source = self.memory, value.memory
            gpus.stream().queue.append(lambda: target.__setitem__(where, source))

        def export(self: Any, **_: Any) -> Any:
            raise AssertionError("CuPy's own arrays need no DLPack")

        words: dict[str, Any] = {
            name: property(lambda self, name=name: getattr(self.memory, name))
            for name in ("shape", "dtype", "nbytes", "flags")
        }
        words |= {"__init__": create, "__setitem__": setitem, "__dlpack__": export}
        words["__dlpack_device__"] = lambda self: (2, self.device.id)
        return type("ndarray", (), {**words, "__module__": "cupy"})


class Pointer:
    """The memory of an array, freed when the array is."""

    def __init__(self, gpus: Gpus, array: Any) -> None:
        self.gpus, self.memory, self.device = gpus, array.memory, array.device.id

    def copy_to_host_async(self, address: int, nbytes: int, stream: Stream) -> None:
        assert self.memory.flags.c_contiguous
        assert stream.device == self.device == self.gpus.current
        source = self.memory
        self.gpus.fetched_bytes += nbytes
        stream.queue.append(lambda: ctypes.memmove(address, source.ctypes.data, nbytes))

    def copy_from_host_async(self, address: int, nbytes: int, stream: Stream) -> None:
        assert self.memory.flags.c_contiguous
        assert stream.device == self.device == self.gpus.current
        if self.gpus.failures:
            raise self.gpus.failures.pop(0)
        target = self.memory
        stream.queue.append(lambda: ctypes.memmove(target.ctypes.data, address, nbytes))
