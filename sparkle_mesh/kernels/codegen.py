"""Generated kernels: the text around them, in CUDA C (HIP on ROCm), OpenCL C, and C.

One generator writes for all languages. What differs between them stands in a few definitions before a kernel (its
*prelude*), and in the names of mathematical functions. So a device of one language tests what the other runs.

Values are kept in registers as the type that they are computed with: float16 as ``f32`` that is rounded after each
operation, as NumPy has it, and bool as a byte of 0 or 1. In memory float16 is ``u16``, which every device can load.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from sparkle_mesh.kernels.ops import Scalar

Language: TypeAlias = Literal["cuda", "opencl", "c"]

_NAMES = {"bool": "u8", "float16": "u16", "float32": "f32", "float64": "f64"}

_CUDA = """\
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f32;
typedef double f64;
typedef u16 word2;
typedef u32 word4;
#if defined(__HIP__) || defined(__HIPCC_RTC__)
#pragma clang fp contract(off)
typedef u32 word8 __attribute__((ext_vector_type(2)));
typedef u32 word16 __attribute__((ext_vector_type(4)));
#define SHUFFLE_DOWN(x, by) __shfl_down(x, by)
#else
typedef uint2 word8;
typedef uint4 word16;
#define SHUFFLE_DOWN(x, by) __shfl_down_sync(0xffffffffu, x, by)
#endif
#define FUNCTION static __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define GLOBAL
#define LOCAL __shared__
#define RESTRICT __restrict__
#define BARRIER() __syncthreads()
#define LOCAL_ID() ((i32)threadIdx.x)
#define GROUP_X() ((ix)blockIdx.x)
#define GROUP_Y() ((ix)blockIdx.y)
#define BITS_OF_F32(x) __float_as_uint(x)
#define BITS_OF_F64(x) ((u64)__double_as_longlong(x))
#define F32_OF_BITS(x) __uint_as_float(x)
#define F64_OF_BITS(x) __longlong_as_double((i64)(x))
"""
_CUDA_HALF = """\
#if defined(__HIP__) || defined(__HIPCC_RTC__)
FUNCTION f32 from_half(u16 bits) {
  union { u16 bits; _Float16 half; } one;
  one.bits = bits;
  return (f32)one.half;
}
FUNCTION u16 to_half(f32 x) {
  union { u16 bits; _Float16 half; } one;
  one.half = (_Float16)x;
  return one.bits;
}
#else
FUNCTION f32 from_half(u16 bits) {
  f32 x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
FUNCTION u16 to_half(f32 x) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif
"""

_OPENCL = """\
#pragma OPENCL FP_CONTRACT OFF
typedef char i8;
typedef short i16;
typedef int i32;
typedef long i64;
typedef uchar u8;
typedef ushort u16;
typedef uint u32;
typedef ulong u64;
typedef float f32;
typedef u16 word2;
typedef u32 word4;
typedef uint2 word8;
typedef uint4 word16;
#define FUNCTION static
#define KERNEL(threads) __kernel __attribute__((reqd_work_group_size(threads, 1, 1))) void
#define GLOBAL __global
#define LOCAL __local
#define RESTRICT restrict
#define BARRIER() barrier(CLK_LOCAL_MEM_FENCE)
#define LOCAL_ID() ((i32)get_local_id(0))
#define GROUP_X() ((ix)get_group_id(0))
#define GROUP_Y() ((ix)get_group_id(1))
#define BITS_OF_F32(x) as_uint(x)
#define F32_OF_BITS(x) as_float(x)
"""
_OPENCL_HALF = """\
FUNCTION f32 from_half(u16 bits) { return vload_half(0, (const __private half *)&bits); }
FUNCTION u16 to_half(f32 x) {
  u16 bits;
  vstore_half_rte(x, 0, (__private half *)&bits);
  return bits;
}
"""
_OPENCL_DOUBLE = """\
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
typedef double f64;
#define BITS_OF_F64(x) as_ulong(x)
#define F64_OF_BITS(x) as_double((u64)(x))
"""

_C = """\
#include <math.h>
#include <stdint.h>
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef float f32;
typedef double f64;
#define FUNCTION static inline __attribute__((always_inline))
#define RESTRICT restrict
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif
FUNCTION f32 F32_OF_BITS(u32 bits) { union { u32 bits; f32 value; } one = {bits}; return one.value; }
FUNCTION f64 F64_OF_BITS(u64 bits) { union { u64 bits; f64 value; } one = {bits}; return one.value; }
"""

# Past the caches, which would read first what is written over. Other processors have no such stores in plain C.
_C_STREAM = """\
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#define STREAM_BYTES 16
#define STREAM(to, from) _mm_stream_si128((__m128i *)(to), _mm_loadu_si128((const __m128i *)(from)))
#define STREAMED() _mm_sfence()
#else
#define STREAMED()
#endif
FUNCTION void stream(void *target, const void *source, i64 bytes) {
  char *to = target;
  const char *from = source;
#ifdef STREAM_BYTES
  i64 i = -(intptr_t)to & (STREAM_BYTES - 1);
  if (i > bytes) i = bytes;
  memcpy(to, from, i);
  for (; i + STREAM_BYTES <= bytes; i += STREAM_BYTES) STREAM(to + i, from + i);
  memcpy(to + i, from + i, bytes - i);
#else
  memcpy(to, from, bytes);
#endif
}
"""

#: One access of so many bytes.
WORDS = {1: "u8", 2: "word2", 4: "word4", 8: "word8", 16: "word16"}


# Not digits of constants, as 0x3f64u.
_IS_DOUBLE = re.compile(r"\bf64\b|F64")


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A kernel, ready to be compiled.

    Attributes
    ----------
    text
        Its source; the same for the same work.
    name
        Of its function: what it does, and a hash of the text.
    """

    text: str
    name: str


class Code:
    """Collects the functions that a kernel's text calls; each is written once, after those that it calls."""

    def __init__(self, language: Language) -> None:
        self.language: Language = language
        self._functions: dict[str, str] = {}

    def function(self, name: str, text: str) -> str:
        """Have ``text`` define ``name``; returns ``name``."""
        self._functions.setdefault(name, f"FUNCTION {text}")
        return name

    def math(self, name: str, dtype: str) -> str:
        """Return C's name of a mathematical function of a value in registers of ``dtype``."""
        return f"{name}f" if self.language != "opencl" and dtype != "float64" else name

    def finish(self, kind: str, body: str, *, wide: bool) -> KernelSource:
        """Return the whole source. ``body`` has ``@name@`` where the kernel's name goes.

        Parameters
        ----------
        wide
            Whether indices (``ix``) are of 64 bits.
        """
        index = f"typedef {'i64' if wide else 'i32'} ix;\n"
        text = index + "\n".join([*self._functions.values(), body])
        head = {"cuda": _CUDA, "opencl": _OPENCL, "c": _C}[self.language]
        if self.language == "opencl" and _IS_DOUBLE.search(text):
            head += _OPENCL_DOUBLE
        if "stream(" in text:
            head += _C_STREAM
        if "_half(" in text:
            head += _CUDA_HALF if self.language == "cuda" else _OPENCL_HALF
        text = head + text
        name = f"sparkle_{kind}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return KernelSource(text.replace("@name@", name), name)


def options(language: Language, *, hip: bool = False) -> tuple[str, ...]:
    """Return how to compile what is generated: no multiplication is contracted with an addition.

    NumPy rounds after each; kernels that are bound by memory lose nothing. (HIP and OpenCL are told so in the source.)
    """
    return ("--fmad=false",) if language == "cuda" and not hip else ()


def memory_type(dtype: str) -> str:
    """Return the C type of ``dtype`` in memory."""
    if dtype in _NAMES:
        return _NAMES[dtype]
    return dtype.replace("uint", "u").replace("int", "i")


def value_type(dtype: str) -> str:
    """Return the C type of ``dtype`` in registers."""
    return "f32" if dtype == "float16" else memory_type(dtype)


def loaded(dtype: str, expression: str) -> str:
    """Return the value of what lies in memory."""
    return f"from_half({expression})" if dtype == "float16" else expression


def stored(dtype: str, expression: str) -> str:
    """Return what a value is in memory."""
    return f"to_half({expression})" if dtype == "float16" else expression


def itemsize(dtype: str) -> int:
    """Return the bytes of one element."""
    return int(np.dtype(dtype).itemsize)


def is_signed(dtype: str) -> bool:
    """Whether ``dtype`` is one of signed integers."""
    return dtype.startswith("int")


def is_integer(dtype: str) -> bool:
    """Whether ``dtype`` is one of integers."""
    return "int" in dtype


def literal(value: Scalar, dtype: str) -> str:
    """Return a number as C, to the bit."""
    if dtype == "bool":
        return str(int(value))
    if dtype in ("float16", "float32"):
        # float16 is rounded first; numbers beyond its range are infinite, as NumPy has it.
        with np.errstate(over="ignore"):
            rounded = float(np.float32(np.dtype(dtype).type(value)))
        return f"F32_OF_BITS(0x{struct.unpack('<I', struct.pack('<f', rounded))[0]:08x}u)"
    if dtype == "float64":
        bits = struct.unpack("<Q", struct.pack("<d", float(value)))[0]
        return f"F64_OF_BITS(((u64)0x{bits >> 32:08x}u << 32) | 0x{bits & 0xFFFFFFFF:08x}u)"
    # C has no negative literals: the least one would not fit before its sign.
    number = int(value) % (1 << 64)
    kind = memory_type(dtype)
    if number < 1 << 31:
        return f"(({kind}){number})"
    return f"(({kind})(((u64)0x{number >> 32:08x}u << 32) | 0x{number & 0xFFFFFFFF:08x}u))"
