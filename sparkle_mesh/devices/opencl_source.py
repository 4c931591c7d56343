"""OpenCL C for what OpenCL brings no library for: the product of matrices.

Each work item makes a patch of ``out``, some rows high and one vector wide, from values in registers. Patches at the
edges read clamped places, and write only what exists.
"""

from __future__ import annotations

import numpy as np

#: OpenCL C's names of NumPy's integers.
INTEGERS = {
    "int8": "char",
    "int16": "short",
    "int32": "int",
    "int64": "long",
    "uint8": "uchar",
    "uint16": "ushort",
    "uint32": "uint",
    "uint64": "ulong",
}
_FLOATS = {"float16": "half", "float32": "float", "float64": "double"}
_EXTENSIONS = {"float16": "cl_khr_fp16", "float64": "cl_khr_fp64"}
_ROWS = 4
# Of a vector of sums. One of 64 bytes crashes PoCL 3.0, which does not align it.
_VECTOR_BYTES = 32
_MATMUL = """
__kernel void NAME(__global const T *restrict a, __global const T *restrict b, __global T *restrict out,
                             ulong m, ulong n, ulong k, ulong a_start, ulong b_start, ulong out_start) {
  const size_t column = get_global_id(0) * COLUMNS, row = get_global_id(1) * ROWS;
  if (row >= m || column >= n) return;
  __global const T *restrict left[ROWS];
  for (int i = 0; i < ROWS; i++) left[i] = a + a_start + min((ulong)(row + i), m - 1) * k;
  b += b_start;
  out += out_start;
  SUM sums[ROWS];
  for (int i = 0; i < ROWS; i++) sums[i] = (SUM)(0);
  if (column + COLUMNS <= n) {
    for (size_t at = 0; at < k; at++) {
      const SUM right = CONVERT(LOAD(0, b + at * n + column));
      for (int i = 0; i < ROWS; i++) sums[i] += (SUM)((SUM_ITEM)left[i][at]) * right;
    }
  } else {
    for (size_t at = 0; at < k; at++) {
      SUM_ITEM items[COLUMNS];
      for (int j = 0; j < COLUMNS; j++) items[j] = b[at * n + min((ulong)(column + j), n - 1)];
      const SUM right = LOAD(0, items);
      for (int i = 0; i < ROWS; i++) sums[i] += (SUM)((SUM_ITEM)left[i][at]) * right;
    }
  }
  for (int i = 0; i < ROWS && row + i < m; i++) {
    SUM_ITEM items[COLUMNS];
    STORE(sums[i], 0, items);
    for (int j = 0; j < COLUMNS && column + j < n; j++) out[(row + i) * n + column + j] = (T)items[j];
  }
}
"""


def matmul(dtype: str) -> tuple[str, str]:
    """Return the source of the kernel for one dtype, and its name; float16 is summed in float32, as libraries do.

    Its parameters: a, b, out, m, n, k, and where each array begins, in elements.
    """
    item = INTEGERS.get(dtype) or _FLOATS[dtype]
    total = "float" if item == "half" else item
    lines = [f"#pragma OPENCL EXTENSION {_EXTENSIONS[dtype]} : enable"] if dtype in _EXTENSIONS else []
    columns = _columns(dtype)
    names = {
        "NAME": f"sparkle_matmul_{dtype}",
        "T": item,
        "SUM_ITEM": total,
        "SUM": f"{total}{columns}",
        "CONVERT": f"convert_{total}{columns}",
        "LOAD": f"vload{columns}",
        "STORE": f"vstore{columns}",
        "ROWS": str(_ROWS),
        "COLUMNS": str(columns),
    }
    lines += [f"#define {name} {meaning}" for name, meaning in names.items()]
    return "\n".join(lines) + _MATMUL, f"sparkle_matmul_{dtype}"


def matmul_size(dtype: str, rows: int, columns: int) -> tuple[int, int]:
    """Return how many work items make an ``out`` of this size."""
    return -(-columns // _columns(dtype)), -(-rows // _ROWS)


def _columns(dtype: str) -> int:
    return min(_VECTOR_BYTES // np.dtype(dtype).itemsize, 8)
