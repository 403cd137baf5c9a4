"""The two kernels that hold the base product: all in one, or with a finished down-projection.

Letters: M rows of `x`, N columns of `y`, K the summed dimension, R the rank. Both kernels serve the
forward pass and, with the strides of the transposed matrices, the gradient of the input.
"""

import triton
import triton.language as tl

from lora_core.kernels.triton.tiles import dot, gains, kept, rounded, tile_of


@triton.jit
def gemm_lora(
    x,
    w,
    bias,
    a,
    b,
    gain,
    y,
    h,
    M,
    N,
    K,
    R,
    x_m,
    x_k,
    w_n,
    w_k,
    bias_n,
    a_r,
    a_k,
    b_n,
    b_r,
    gain_r,
    y_m,
    y_n,
    h_m,
    h_r,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    INTERP: tl.constexpr,
):
    """``y = x @ w.T + bias + (gain * h) @ b.T`` with ``h = x @ a.T``, in one pass over `x`.

    Each tile of `y` makes its own rows of `h` from the tiles of `x` that it reads anyway; the first
    column of tiles stores them, without the gain. `bias` and `h` may be None.

    Shape:
        - x: ``(M, K)``; w: ``(N, K)``; bias: ``(N,)``; a: ``(R, K)``; b: ``(N, R)``
        - gain: ``(R,)``, or a scalar with a stride of 0
        - y: ``(M, N)``; h: ``(M, R)``
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m0 = tile_m * BLOCK_M
    n0 = tile_n * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    has_m = m < M - m0
    has_n = n < N - n0
    has_r = r < R

    # the start of a tile may lie past 2**31 elements, an offset within it does not
    x_tile = x + m0.to(tl.int64) * x_m + m[:, None] * x_m + k[None, :] * x_k
    w_tile = w + n0.to(tl.int64) * w_n + n[None, :] * w_n + k[:, None] * w_k
    a_tile = a + r[None, :] * a_r + k[:, None] * a_k
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    low = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        has_k = k < K - step * BLOCK_K
        xs = tl.load(x_tile, mask=has_m[:, None] & has_k[None, :], other=0.0)
        ws = tl.load(w_tile, mask=has_k[:, None] & has_n[None, :], other=0.0)
        rows = tl.load(a_tile, mask=has_k[:, None] & has_r[None, :], other=0.0)
        total = dot(xs, ws, total, INTERP)
        low = dot(xs, rows, low, INTERP)
        x_tile += BLOCK_K * x_k
        w_tile += BLOCK_K * w_k
        a_tile += BLOCK_K * a_k

    if h is not None and tile_n == 0:
        h_tile = h + m0.to(tl.int64) * h_m + m[:, None] * h_m + r[None, :] * h_r
        stored = rounded(low, h.dtype.element_ty, INTERP)
        tl.store(h_tile, stored, mask=has_m[:, None] & has_r[None, :])

    b_tile = b + n0.to(tl.int64) * b_n + n[None, :] * b_n + r[:, None] * b_r
    columns = tl.load(b_tile, mask=has_r[:, None] & has_n[None, :], other=0.0)
    low = rounded(low * gains(gain, gain_r, R, BLOCK_R)[None, :], b.dtype.element_ty, INTERP)
    total = dot(low, columns, total, INTERP)
    if bias is not None:
        shift = tl.load(bias + (n0 + n) * bias_n, mask=has_n, other=0.0)
        total += shift.to(tl.float32)[None, :]
    y_tile = y + m0.to(tl.int64) * y_m + m[:, None] * y_m + (n0 + n)[None, :] * y_n
    stored = rounded(total, y.dtype.element_ty, INTERP)
    tl.store(y_tile, stored, mask=has_m[:, None] & has_n[None, :])


@triton.jit
def gemm_expand(
    x,
    w,
    bias,
    h,
    b,
    gain,
    seed,
    y,
    dropout,
    M,
    N,
    K,
    R,
    x_m,
    x_k,
    w_n,
    w_k,
    bias_n,
    h_m,
    h_r,
    b_n,
    b_r,
    gain_r,
    y_m,
    y_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    INTERP: tl.constexpr,
):
    """``y = x @ w.T + bias + keep * ((gain * h) @ b.T)`` from a finished `h`.

    `keep` is one without a seed, as in the forward pass. With one it is the mask of dropout over
    the elements of `y`, divided by its mean: for the gradient of an input that the update saw
    through dropout. `bias` and `seed` may be None.

    Shape:
        - x: ``(M, K)``; w: ``(N, K)``; bias: ``(N,)``; h: ``(M, R)``; b: ``(N, R)``
        - gain: ``(R,)``, or a scalar with a stride of 0; seed: one int64
        - y: ``(M, N)``
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m0 = tile_m * BLOCK_M
    n0 = tile_n * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    has_m = m < M - m0
    has_n = n < N - n0
    has_r = r < R

    # the start of a tile may lie past 2**31 elements, an offset within it does not
    x_tile = x + m0.to(tl.int64) * x_m + m[:, None] * x_m + k[None, :] * x_k
    w_tile = w + n0.to(tl.int64) * w_n + n[None, :] * w_n + k[:, None] * w_k
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        has_k = k < K - step * BLOCK_K
        xs = tl.load(x_tile, mask=has_m[:, None] & has_k[None, :], other=0.0)
        ws = tl.load(w_tile, mask=has_k[:, None] & has_n[None, :], other=0.0)
        total = dot(xs, ws, total, INTERP)
        x_tile += BLOCK_K * x_k
        w_tile += BLOCK_K * w_k

    h_tile = h + m0.to(tl.int64) * h_m + m[:, None] * h_m + r[None, :] * h_r
    low = tl.load(h_tile, mask=has_m[:, None] & has_r[None, :], other=0.0).to(tl.float32)
    low = rounded(low * gains(gain, gain_r, R, BLOCK_R)[None, :], b.dtype.element_ty, INTERP)
    b_tile = b + n0.to(tl.int64) * b_n + n[None, :] * b_n + r[:, None] * b_r
    columns = tl.load(b_tile, mask=has_r[:, None] & has_n[None, :], other=0.0)
    if seed is None:
        total = dot(low, columns, total, INTERP)
    else:
        keep = kept(tl.load(seed), dropout, m0, n0, BLOCK_M, BLOCK_N)
        update = dot(low, columns, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), INTERP)
        total += tl.where(keep, update / (1.0 - dropout), 0.0)
    if bias is not None:
        shift = tl.load(bias + (n0 + n) * bias_n, mask=has_n, other=0.0)
        total += shift.to(tl.float32)[None, :]
    y_tile = y + m0.to(tl.int64) * y_m + m[:, None] * y_m + (n0 + n)[None, :] * y_n
    stored = rounded(total, y.dtype.element_ty, INTERP)
    tl.store(y_tile, stored, mask=has_m[:, None] & has_n[None, :])
