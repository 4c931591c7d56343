"""Compiles CUDA C without a GPU, through NVIDIA's library for that, where it is installed."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

REASON = "needs NVRTC, which compiles without a GPU: pip install nvidia-cuda-nvrtc-cu12"


@cache
def library() -> ctypes.CDLL | None:
    """Return the library; None if it is not there."""
    try:
        found = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        return None
    folders = (found and found.submodule_search_locations) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("lib/libnvrtc.so.*"))]
    return ctypes.CDLL(str(files[0])) if files else None


def compiled(source: str, options: Sequence[str]) -> str:
    """Compile ``source`` to assembly and return that; fails if the compiler has anything to say."""
    nvrtc = library()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    try:
        # One of the two functions that convert float16 may not be needed.
        wanted = ["--gpu-architecture=compute_80", "--std=c++17", "-diag-suppress=177", *options]
        flags = [option.encode() for option in wanted]
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        said = text_of(nvrtc, program, "ProgramLog")
        complaint = f"{said}\n{source}" if failed or said.strip() else ""
        assert not complaint, complaint
        return text_of(nvrtc, program, "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def text_of(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.value.decode()
