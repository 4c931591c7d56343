"""Reading another process's ordinary memory (Linux's cross-memory attach): one copy, and none by its owner.

Allowed between processes of one user, unless the system forbids it (``kernel.yama.ptrace_scope`` above 0, seccomp in
a container); so it is tried before it is relied on. Only reading is ever used.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from typing import Any, Final

import numpy as np

from sparkle_mesh.errors import LinkClosedError

_ADDRESS_BITS: Final = 63


class _Stretch(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@cache
def _function() -> Any:
    """Return ``process_vm_readv`` of the C library; None where there is none."""
    if sys.platform != "linux":  # pragma: no cover - Linux's own
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if function is not None:
        pointer, count = ctypes.POINTER(_Stretch), ctypes.c_ulong
        function.argtypes = (ctypes.c_int, pointer, count, pointer, count, count)
        function.restype = ctypes.c_ssize_t
    return function


def read_memory(pid: int, address: int, out: np.ndarray[Any, np.dtype[Any]]) -> None:
    """Fill the contiguous array ``out`` from ``address`` of process ``pid``.

    Raises
    ------
    LinkClosedError
        If that cannot be read: the process has ended, it has nothing there, or the system forbids it.
    """
    function = _function()
    if function is None or not 0 < address < 2**_ADDRESS_BITS:
        raise LinkClosedError(f"address {address:#x} of process {pid} cannot be read here")
    local = _Stretch(out.__array_interface__["data"][0], out.nbytes)
    remote = _Stretch(address, out.nbytes)
    got = function(pid, local, 1, remote, 1, 0)
    if got != out.nbytes:
        why = os.strerror(ctypes.get_errno() if got < 0 else errno.EFAULT)
        raise LinkClosedError(f"{out.nbytes} bytes at {address:#x} of process {pid} cannot be read: {why}")


def can_read(pid: int, address: int, expected: bytes) -> bool:
    """Whether process ``pid`` can be read: it has ``expected`` at ``address``."""
    out = np.empty(len(expected), np.uint8)
    try:
        read_memory(pid, address, out)
    except LinkClosedError:
        return False
    return out.tobytes() == expected
