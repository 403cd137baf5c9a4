"""What the kernels share: a dot, a rounding, a dropout mask and the order of the tiles.

`INTERP` is true under Triton's interpreter, which computes on the bit patterns of bfloat16 and
casts to it by truncation: there, products are taken of float32 copies (exact for bfloat16) and the
rounding to nearest even is done on the bits. Compiled kernels contain none of this.
"""

import triton
import triton.language as tl


@triton.jit
def dot(left, right, total, INTERP: tl.constexpr):
    """``total + left @ right``, accumulated in float32; float32 products are exact, never TF32."""
    if INTERP:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def rounded(value, DTYPE: tl.constexpr, INTERP: tl.constexpr):
    """A float32 value in another dtype, rounded to nearest even."""
    if INTERP and DTYPE.is_bf16():
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def gains(gain, gain_r, R, BLOCK_R: tl.constexpr):
    """The gain of each rank in float32, zero past the last; a stride of 0 repeats a scalar."""
    rank = tl.arange(0, BLOCK_R)
    return tl.load(gain + rank * gain_r, mask=rank < R, other=0.0).to(tl.float32)


@triton.jit
def kept(seed, dropout, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a tile dropout keeps, from the seed and the elements' places alone.

    The same element gets the same answer in every kernel, whatever the tile around it, so the mask
    is never stored. One call of Philox serves four columns; `column` is a multiple of four.
    """
    rows = row + tl.arange(0, ROWS)[:, None]
    quads = column // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    zeros = tl.zeros([ROWS, COLUMNS // 4], dtype=tl.int32)
    word0, word1, word2, word3 = tl.philox(seed, zeros + quads, zeros + rows, zeros, zeros)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return tl.uint_to_uniform_float(words) >= dropout


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a program's tile; `GROUP_M` rows share the columns they read in L2."""
    rows = tl.cdiv(M, BLOCK_M)
    columns = tl.maximum(tl.cdiv(N, BLOCK_N), 1)
    group = program // (GROUP_M * columns)
    within = program % (GROUP_M * columns)
    height = tl.minimum(rows - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % height, within // height
