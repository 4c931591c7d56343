"""Generated kernels: the product of matrices, for devices that bring no library for it.

A group of work items makes a square tile of the result. It goes along the inner axis in short pieces: all fetch the
pieces of both operands into local memory, neighbours what lies side by side, and then each adds the products for a
square of its own, which it keeps in registers. So each fetched element is used as often as the tile is wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod

from sparkle_mesh import limits
from sparkle_mesh.kernels import codegen
from sparkle_mesh.kernels.codegen import Code, KernelSource, Language
from sparkle_mesh.kernels.program import MatmulStep

# Elements along each side of what one work item makes, and of the inner axis that are in local memory at once.
_PATCH = 4
_DEPTH = 16

_TEXT = """\
KERNEL(THREADS_) @name@(GLOBAL const T_ *RESTRICT a, GLOBAL const T_ *RESTRICT b, GLOBAL T_ *RESTRICT out,
                        ix rows, ix inner, ix columns) {
  LOCAL V_ left[DEPTH_][TILE_ + 1];
  LOCAL V_ right[DEPTH_][TILE_ + 1];
  const i32 me = LOCAL_ID(), x = me % SIDE_, y = me / SIDE_;
  const ix across = (columns + TILE_ - 1) / TILE_, down = (rows + TILE_ - 1) / TILE_;
  const ix column = GROUP_X() % across * TILE_, row = GROUP_X() / across % down * TILE_;
  const ix matrix = GROUP_X() / across / down;
  a += matrix * rows * inner;
  b += matrix * inner * columns;
  out += matrix * rows * columns;
  V_ sums[PATCH_][PATCH_];
  #pragma unroll
  for (i32 i = 0; i < PATCH_; ++i)
    #pragma unroll
    for (i32 j = 0; j < PATCH_; ++j) sums[i][j] = 0;
  for (ix start = 0; start < inner; start += DEPTH_) {
    for (i32 e = me; e < TILE_ * DEPTH_; e += THREADS_) {
      const i32 d = LEFT_DEPTH_, r = LEFT_ROW_;
      const ix at = row + r, by = start + d;
      left[d][r] = at < rows && by < inner ? LOAD_LEFT_ : 0;
    }
    for (i32 e = me; e < TILE_ * DEPTH_; e += THREADS_) {
      const i32 d = RIGHT_DEPTH_, c = RIGHT_COLUMN_;
      const ix at = column + c, by = start + d;
      right[d][c] = at < columns && by < inner ? LOAD_RIGHT_ : 0;
    }
    BARRIER();
    #pragma unroll
    for (i32 d = 0; d < DEPTH_; ++d) {
      V_ mine[PATCH_], other[PATCH_];
      #pragma unroll
      for (i32 i = 0; i < PATCH_; ++i) {
        mine[i] = left[d][y + i * SIDE_];
        other[i] = right[d][x + i * SIDE_];
      }
      #pragma unroll
      for (i32 i = 0; i < PATCH_; ++i)
        #pragma unroll
        for (i32 j = 0; j < PATCH_; ++j) sums[i][j] = FMA_(mine[i], other[j], sums[i][j]);
    }
    BARRIER();
  }
  #pragma unroll
  for (i32 i = 0; i < PATCH_; ++i)
    #pragma unroll
    for (i32 j = 0; j < PATCH_; ++j) {
      const ix at = row + y + i * SIDE_, to = column + x + j * SIDE_;
      if (at < rows && to < columns) out[at * columns + to] = STORED_;
    }
}
"""


@dataclass(frozen=True, slots=True)
class MatmulKernel:
    """A kernel for a product of matrices, and how it is launched.

    Attributes
    ----------
    source
        Its parameters are the blocks of a, b and the result, then ``arguments``.
    arguments
        Rows, inner length, columns.
    is_wide
        Whether these are passed in 64 bits, rather than 32.
    groups
        Of ``threads`` work items each.
    """

    source: KernelSource
    arguments: tuple[int, int, int]
    is_wide: bool
    groups: int
    threads: int


def matmul(language: Language, step: MatmulStep, threads: int) -> MatmulKernel:
    """Return the kernel for ``step``, whose result has elements.

    Parameters
    ----------
    threads
        Most work items of a group.
    """
    side = 1 << (isqrt(threads).bit_length() - 1)
    tile = side * _PATCH
    batch = prod(step.batch)
    groups = batch * -(-step.rows // tile) * -(-step.columns // tile)
    sizes = (step.rows * step.inner, step.inner * step.columns, step.rows * step.columns)
    is_wide = max(batch * max(sizes), groups) + tile * _DEPTH >= limits.GENERATED_NARROW_MAX_COUNT
    code = Code(language)
    # float16 is summed in float32.
    value = codegen.value_type(step.dtype)
    along, across = (f"e % {_DEPTH}", f"e / {_DEPTH}"), (f"e / {tile}", f"e % {tile}")
    left, right = along if not step.transpose_a else across, across if not step.transpose_b else along
    place_a = "by * rows + at" if step.transpose_a else "at * inner + by"
    place_b = "at * inner + by" if step.transpose_b else "by * columns + at"
    words = {
        "LEFT_DEPTH_": left[0],
        "LEFT_ROW_": left[1],
        "RIGHT_DEPTH_": right[0],
        "RIGHT_COLUMN_": right[1],
        "LOAD_LEFT_": codegen.loaded(step.dtype, f"a[{place_a}]"),
        "LOAD_RIGHT_": codegen.loaded(step.dtype, f"b[{place_b}]"),
        "STORED_": codegen.stored(step.dtype, "sums[i][j]"),
        # The one place where a product is added without being rounded: there are no bits to be kept.
        "FMA_": code.math("fma", step.dtype) if language == "cuda" else "mad",
        "THREADS_": str(side * side),
        "DEPTH_": str(_DEPTH),
        "PATCH_": str(_PATCH),
        "TILE_": str(tile),
        "SIDE_": str(side),
        "T_": codegen.memory_type(step.dtype),
        "V_": value,
    }
    text = _TEXT
    for word, meaning in words.items():
        text = text.replace(word, meaning)
    source = code.finish("matmul", text, wide=is_wide)
    return MatmulKernel(source, (step.rows, step.inner, step.columns), is_wide, groups, side * side)
