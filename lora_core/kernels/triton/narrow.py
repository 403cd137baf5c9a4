"""The kernels whose results are as narrow as the rank: projections and factor gradients.

Letters: M tokens, K input features, N output features, R the rank, S the splits of the tokens.
"""

import triton
import triton.language as tl

from lora_core.kernels.triton.tiles import dot, gains, kept, rounded


@triton.jit
def shrink(
    x,
    a,
    seed,
    h,
    dropout,
    M,
    K,
    R,
    x_m,
    x_k,
    a_r,
    a_k,
    h_m,
    h_r,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERP: tl.constexpr,
):
    """``h = drop(x) @ a.T``; without a seed nothing is dropped.

    Shape:
        - x: ``(M, K)``; a: ``(R, K)``; seed: one int64, or None
        - h: ``(M, R)``
    """
    m0 = tl.program_id(0) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    has_m = m < M - m0
    has_r = r < R
    x_tile = x + m0.to(tl.int64) * x_m + m[:, None] * x_m + k[None, :] * x_k
    a_tile = a + r[None, :] * a_r + k[:, None] * a_k
    low = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        has_k = k < K - step * BLOCK_K
        xs = tl.load(x_tile, mask=has_m[:, None] & has_k[None, :], other=0.0)
        rows = tl.load(a_tile, mask=has_k[:, None] & has_r[None, :], other=0.0)
        if seed is not None:
            keep = kept(tl.load(seed), dropout, m0, step * BLOCK_K, BLOCK_M, BLOCK_K)
            xs = tl.where(keep, xs, tl.zeros_like(xs))
        low = dot(xs, rows, low, INTERP)
        x_tile += BLOCK_K * x_k
        a_tile += BLOCK_K * a_k
    if seed is not None:
        low = low / (1.0 - dropout)
    h_tile = h + m0.to(tl.int64) * h_m + m[:, None] * h_m + r[None, :] * h_r
    stored = rounded(low, h.dtype.element_ty, INTERP)
    tl.store(h_tile, stored, mask=has_m[:, None] & has_r[None, :])


@triton.jit
def outer(
    wide,
    narrow,
    gain,
    seed,
    out,
    dropout,
    c0,
    first,
    last,
    C,
    R,
    wide_m,
    wide_c,
    narrow_m,
    narrow_r,
    gain_r,
    out_r,
    out_c,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERP: tl.constexpr,
):
    """One block of columns of ``gain * (narrow.T @ drop(wide))``, summed over some of the tokens.

    Shape:
        - wide: ``(M, C)``; narrow: ``(M, R)``
        - out: ``(R, C)``
    """
    m = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    has_c = c < C - c0
    has_r = r < R
    # laid out as the product reads it, or the loads of sm_80 are not pipelined
    wide_tile = (
        wide + first.to(tl.int64) * wide_m + m[None, :] * wide_m + (c0 + c)[:, None] * wide_c
    )
    narrow_tile = narrow + first.to(tl.int64) * narrow_m + m[:, None] * narrow_m
    narrow_tile += r[None, :] * narrow_r
    total = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        has_m = m < last - start
        columns = tl.load(wide_tile, mask=has_c[:, None] & has_m[None, :], other=0.0)
        rows = tl.load(narrow_tile, mask=has_m[:, None] & has_r[None, :], other=0.0)
        if seed is not None:
            keep = kept(tl.load(seed), dropout, start, c0, BLOCK_M, BLOCK_C)
            columns = tl.where(tl.trans(keep), columns, tl.zeros_like(columns))
        total = dot(columns, rows, total, INTERP)
        wide_tile += BLOCK_M * wide_m
        narrow_tile += BLOCK_M * narrow_m
    if seed is not None:
        total = total / (1.0 - dropout)
    if gain is not None:
        total *= gains(gain, gain_r, R, BLOCK_R)[None, :]
    out_tile = out + (c0 + c)[:, None] * out_c + r[None, :] * out_r
    stored = rounded(total, out.dtype.element_ty, INTERP)
    tl.store(out_tile, stored, mask=has_c[:, None] & has_r[None, :])


@triton.jit
def dab(
    x,
    dy,
    h,
    q,
    gain,
    seed,
    da,
    db,
    dropout,
    M,
    K,
    N,
    R,
    x_m,
    x_k,
    dy_m,
    dy_n,
    h_m,
    h_r,
    q_m,
    q_r,
    gain_r,
    da_s,
    da_r,
    da_k,
    db_s,
    db_n,
    db_r,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERP: tl.constexpr,
):
    """``da = gain * (q.T @ drop(x))`` and ``db = gain * (dy.T @ h)`` in one launch, no atomics.

    The first programs take blocks of columns of `da`, the others blocks of rows of `db`; the second
    axis of the grid splits the tokens. With more than one split `gain` is None, and `add_splits`
    finishes.

    Shape:
        - x: ``(M, K)``; dy: ``(M, N)``; h, q: ``(M, R)``; gain: ``(R,)`` or None
        - da: ``(S, R, K)``; db: ``(S, N, R)``
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    blocks = tl.cdiv(K, BLOCK_C)
    share = tl.cdiv(tl.cdiv(M, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    first = split * share
    last = tl.minimum(first + share, M)
    if block < blocks:
        outer(
            x,
            q,
            gain,
            seed,
            da + split.to(tl.int64) * da_s,
            dropout,
            block * BLOCK_C,
            first,
            last,
            K,
            R,
            x_m,
            x_k,
            q_m,
            q_r,
            gain_r,
            da_r,
            da_k,
            BLOCK_M,
            BLOCK_C,
            BLOCK_R,
            INTERP,
        )
    else:
        outer(
            dy,
            h,
            gain,
            None,
            db + split.to(tl.int64) * db_s,
            dropout,
            (block - blocks) * BLOCK_C,
            first,
            last,
            N,
            R,
            dy_m,
            dy_n,
            h_m,
            h_r,
            gain_r,
            db_r,
            db_n,
            BLOCK_M,
            BLOCK_C,
            BLOCK_R,
            INTERP,
        )


@triton.jit
def add_block(
    parts,
    gain,
    out,
    c0,
    S,
    C,
    R,
    gain_r,
    out_r,
    out_c,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERP: tl.constexpr,
):
    """One block of columns of ``gain * parts.sum(0).T``, added in the order of the splits.

    Shape:
        - parts: ``(S, C, R)``, contiguous and float32
        - out: ``(R, C)``
    """
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    has = (c < C - c0)[:, None] & (r < R)[None, :]
    place = parts + (c0 + c)[:, None] * R + r[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
    for _ in range(S):
        total += tl.load(place, mask=has, other=0.0)
        place += C * R
    total *= gains(gain, gain_r, R, BLOCK_R)[None, :]
    out_tile = out + (c0 + c)[:, None] * out_c + r[None, :] * out_r
    tl.store(out_tile, rounded(total, out.dtype.element_ty, INTERP), mask=has)


@triton.jit
def add_splits(
    da_parts,
    db_parts,
    gain,
    da,
    db,
    S,
    K,
    N,
    R,
    gain_r,
    da_r,
    da_k,
    db_n,
    db_r,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERP: tl.constexpr,
):
    """Adds the partial sums of `dab` and multiplies by the gain.

    Shape:
        - da_parts: ``(S, K, R)``; db_parts: ``(S, N, R)``, float32 and contiguous in this order
        - gain: ``(R,)``, or a scalar with a stride of 0
        - da: ``(R, K)``; db: ``(N, R)``
    """
    block = tl.program_id(0)
    blocks = tl.cdiv(K, BLOCK_C)
    if block < blocks:
        c0 = block * BLOCK_C
        add_block(da_parts, gain, da, c0, S, K, R, gain_r, da_r, da_k, BLOCK_C, BLOCK_R, INTERP)
    else:
        c0 = (block - blocks) * BLOCK_C
        add_block(db_parts, gain, db, c0, S, N, R, gain_r, db_r, db_n, BLOCK_C, BLOCK_R, INTERP)
