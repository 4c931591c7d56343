"""Random numbers that are the same bits on every device, for the same seed.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
section 3.3): a bijection of a 128-bit counter under a 64-bit key, so that any block of the stream is computed from its
number alone, by whoever gets to it. The key is the seed, the counter the number of the block; both begin with their
low 32 bits. A block's four words are 16 bytes of the stream, low bytes first, and elements take their bytes from it in
order. All conversions to floating point are exact, and done on bits alone, so that a device needs no float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.devices.device import Device, Memory
from sparkle_mesh.devices.threads import in_threads
from sparkle_mesh.errors import UsageError

ROUNDS = 10
_BLOCK_BYTES = 16
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
#: The dtypes that can be filled, and how the kernels call what is done with the words of a block.
RANDOM_DTYPES = {**dict.fromkeys(_INTEGERS, 0), "bool": 1, "float16": 2, "float32": 4, "float64": 8}

# One work item makes one block. CUDA C and OpenCL C differ in the names at the top alone.
_PRELUDES = {
    "cuda": """
#define KERNEL extern "C" __global__
#define GLOBAL
#define DEVICE __device__
#define HIGH(x, y) __umulhi(x, y)
#define ZEROS(x) __clzll((long long)(x))
#define INDEX ((unsigned64)blockIdx.x * blockDim.x + threadIdx.x)
typedef unsigned char unsigned8;
typedef unsigned int unsigned32;
typedef unsigned long long unsigned64;
""",
    "opencl": """
#define KERNEL __kernel
#define GLOBAL __global
#define DEVICE
#define HIGH(x, y) mul_hi((unsigned32)(x), (unsigned32)(y))
#define ZEROS(x) (int)clz(x)
#define INDEX ((unsigned64)get_global_id(0))
typedef uchar unsigned8;
typedef uint unsigned32;
typedef ulong unsigned64;
""",
}
_SOURCE = """
/* The bits of value / 2^width as a float with that many bits in its fraction and the bias of its exponent; exact. */
DEVICE unsigned64 unit(unsigned64 value, int width, int fraction, int bias) {
  if (value == 0) return 0;
  const int top = 63 - ZEROS(value);
  const unsigned64 shifted = top > fraction ? value >> (top - fraction) : value << (fraction - top);
  return ((unsigned64)(bias + top - width) << fraction) | (shifted & (((unsigned64)1 << fraction) - 1));
}

KERNEL void sparkle_random(GLOBAL unsigned8 *out, unsigned64 nbytes, unsigned32 key0, unsigned32 key1) {
  const unsigned64 block = INDEX;
  if (block >= (nbytes + 15) / 16) return;
  unsigned32 w[4] = {(unsigned32)block, (unsigned32)(block >> 32), 0, 0};
  for (int round = 0; round < 10; round++) {
    const unsigned32 high0 = HIGH(0xD2511F53u, w[0]), low0 = 0xD2511F53u * w[0];
    const unsigned32 high1 = HIGH(0xCD9E8D57u, w[2]), low1 = 0xCD9E8D57u * w[2];
    w[0] = high1 ^ w[1] ^ key0;
    w[1] = low1;
    w[2] = high0 ^ w[3] ^ key1;
    w[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
#if FORM == 1
  for (int i = 0; i < 4; i++) w[i] &= 0x01010101u;
#elif FORM == 2
  for (int i = 0; i < 4; i++)
    w[i] = (unsigned32)(unit((w[i] & 0xFFFFu) >> 5, 11, 10, 15) | unit(w[i] >> 21, 11, 10, 15) << 16);
#elif FORM == 4
  for (int i = 0; i < 4; i++) w[i] = (unsigned32)unit(w[i] >> 8, 24, 23, 127);
#elif FORM == 8
  for (int i = 0; i < 4; i += 2) {
    const unsigned64 bits = unit(((unsigned64)w[i + 1] << 32 | w[i]) >> 11, 53, 52, 1023);
    w[i] = (unsigned32)bits;
    w[i + 1] = (unsigned32)(bits >> 32);
  }
#endif
  const unsigned64 start = block * 16;
  if (start + 16 <= nbytes) {
    GLOBAL unsigned32 *words = (GLOBAL unsigned32 *)(out + start);
    for (int i = 0; i < 4; i++) words[i] = w[i];
  } else {
    for (int i = 0; start + i < nbytes; i++) out[start + i] = (unsigned8)(w[i / 4] >> (8 * (i % 4)));
  }
}
"""
KERNEL_NAME = "sparkle_random"


def fill_random(memory: Memory, dtype: npt.DTypeLike, count: int, seed: int) -> None:
    """Fill the first ``count`` elements of a block with random numbers, the same on every device.

    Parameters
    ----------
    dtype
        Floating point is uniform in [0, 1), in steps of 2^-11 (float16), 2^-24 (float32) or 2^-53 (float64); integers
        and bool are uniform over all of their values.
    seed
        Of 64 bits; each seed gives another stream.

    Raises
    ------
    UsageError
        If the dtype is none of these, the seed none of 64 bits, or the block too small.
    """
    kind = np.dtype(dtype)
    if kind.name not in RANDOM_DTYPES or not kind.isnative:
        raise UsageError(f"there are no random numbers of dtype {kind}; choose one of {', '.join(RANDOM_DTYPES)}")
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed is {seed}; give one from 0 to 2**64 - 1")
    nbytes = count * kind.itemsize
    if not 0 <= nbytes <= memory.nbytes:
        raise UsageError(f"{count} elements of {kind} do not fit into {memory!r}")
    device = memory.device
    if nbytes == 0:
        return
    if device.capabilities.memory_is_host:
        _fill(memory.native[:nbytes], kind, seed, 0)
    elif device.capabilities.language in _PRELUDES:
        blocks = -(-nbytes // _BLOCK_BYTES)
        keys = (np.uint32(seed & _WORD), np.uint32(seed >> 32))
        kernel = device.compile(kernel_source(device, kind), KERNEL_NAME)
        kernel.launch((blocks,), None, [memory, np.uint64(nbytes), *keys])
    else:
        step = np.empty(min(nbytes, limits.HOST_STEP_BYTES), dtype=np.uint8)
        for start in range(0, nbytes, step.size):
            part = step[: nbytes - start]
            _fill(part, kind, seed, start // _BLOCK_BYTES)
            device.copy_from_host(memory, part, start)


def kernel_source(device: Device, dtype: np.dtype[Any]) -> str:
    """Return the source of the kernel that fills with ``dtype``, in the device's language."""
    return f"#define FORM {RANDOM_DTYPES[dtype.name]}{_PRELUDES[device.capabilities.language]}{_SOURCE}"


def philox(counters: tuple[npt.NDArray[np.uint64], ...], seed: int) -> tuple[npt.NDArray[np.uint64], ...]:
    """Return Philox4x32-10 of many counters under the key ``seed``: four words of 32 bits, in arrays of 64 bits."""
    w0, w1, w2, w3 = (counter.copy() for counter in counters)
    spare = np.empty_like(w0)
    keys = [seed & _WORD, seed >> 32]
    for _ in range(ROUNDS):
        # Products of two words; then their high halves cross over, and their low halves stay. In place: new arrays
        # would cost more than the arithmetic.
        w0 *= np.uint64(_MULTIPLIERS[0])
        w2 *= np.uint64(_MULTIPLIERS[1])
        np.right_shift(w2, np.uint64(32), out=spare)
        w1 ^= spare
        w1 ^= np.uint64(keys[0])
        np.right_shift(w0, np.uint64(32), out=spare)
        w3 ^= spare
        w3 ^= np.uint64(keys[1])
        w0 &= np.uint64(_WORD)
        w2 &= np.uint64(_WORD)
        w0, w1, w2, w3 = w1, w2, w3, w0
        keys = [(key + weyl) & _WORD for key, weyl in zip(keys, _WEYL, strict=True)]
    return w0, w1, w2, w3


def _fill(target: npt.NDArray[np.uint8], dtype: np.dtype[Any], seed: int, first_block: int) -> None:
    """Fill bytes of the stream, from a block on, in threads where they are many."""
    at_once = limits.RANDOM_BLOCKS_AT_ONCE_COUNT
    blocks = -(-target.size // _BLOCK_BYTES)

    def work(pieces: range) -> None:
        for piece in pieces:
            start = piece * at_once
            numbers = np.arange(start, min(start + at_once, blocks), dtype=np.uint64) + np.uint64(first_block)
            part = target[start * _BLOCK_BYTES : (start + numbers.size) * _BLOCK_BYTES]
            part[:] = _elements(numbers, dtype, seed).view(np.uint8)[: part.size]

    in_threads(-(-blocks // at_once), work)


def _elements(blocks: npt.NDArray[np.uint64], dtype: np.dtype[Any], seed: int) -> npt.NDArray[Any]:
    zero = np.zeros_like(blocks)
    words = np.empty((blocks.size, 4), dtype=np.uint32)
    for column, word in enumerate(philox((blocks & np.uint64(_WORD), blocks >> np.uint64(32), zero, zero), seed)):
        words[:, column] = word
    stream = words.reshape(-1)
    if dtype.kind == "f":
        digits = np.finfo(dtype).nmant + 1
        bits = stream.view(f"u{dtype.itemsize}") >> np.array(dtype.itemsize * 8 - digits, f"u{dtype.itemsize}")
        fractions: npt.NDArray[Any] = bits.astype(dtype) * dtype.type(2.0**-digits)
        return fractions
    if dtype.kind == "b":
        return stream.view(np.uint8) & np.uint8(1)
    return stream
