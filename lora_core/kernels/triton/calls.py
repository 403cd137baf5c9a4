"""Each kernel as a function of tensors: allocates the result, picks the configuration, launches.

Matrices may have any strides, so a transposed one is a view; what the arguments mean is said at the
kernels.
"""

from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from lora_core.kernels.triton.configs import (
    LEAST_CAPABILITY,
    Config,
    config_for,
    padded_rank,
    splits_for,
)
from lora_core.kernels.triton.gemm import gemm_expand, gemm_lora
from lora_core.kernels.triton.narrow import add_splits, dab, shrink

INTERPRETED = not isinstance(gemm_lora, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on the CPU."""

GROUP = 8  # tile rows that run side by side and share what they read in L2


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """What every result is allocated by."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def multiply_lora(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gain: Tensor,
    h: Tensor | None,
) -> Tensor:
    """``x @ w.T + bias + (gain * (x @ a.T)) @ b.T``; fills `h` with ``x @ a.T`` *in place*."""
    (rows, depth), columns, rank = x.shape, w.shape[0], a.shape[0]
    config = _config("gemm_lora", x, rows, columns)
    y = empty(x, rows, columns)
    with _device_of(x):
        gemm_lora[_tiles(rows, columns, config)](
            *(x, w, bias, a, b, gain, y, h),
            *(rows, columns, depth, rank),
            *(*x.stride(), *w.stride(), _step(bias), *a.stride(), *b.stride(), _step(gain)),
            *(*y.stride(), *((0, 1) if h is None else h.stride())),
            *(config.rows, config.columns, config.depth, padded_rank(rank), GROUP, INTERPRETED),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return y


def multiply_expand(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    h: Tensor,
    b: Tensor,
    gain: Tensor,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``x @ w.T + bias + keep * ((gain * h) @ b.T)``."""
    (rows, depth), columns, rank = x.shape, w.shape[0], b.shape[1]
    config = _config("gemm_expand" if seed is None else "gemm_expand_dropped", x, rows, columns)
    y = empty(x, rows, columns)
    with _device_of(x):
        gemm_expand[_tiles(rows, columns, config)](
            *(x, w, bias, h, b, gain, seed, y, float(dropout)),
            *(rows, columns, depth, rank),
            *(*x.stride(), *w.stride(), _step(bias), *h.stride(), *b.stride(), _step(gain)),
            *y.stride(),
            *(config.rows, config.columns, config.depth, padded_rank(rank), GROUP, INTERPRETED),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return y


def project(x: Tensor, a: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``drop(x) @ a.T``."""
    (rows, depth), rank = x.shape, a.shape[0]
    config = _config("shrink", x, rows, rank)
    h = empty(x, rows, rank)
    with _device_of(x):
        shrink[(triton.cdiv(rows, config.rows),)](
            *(x, a, seed, h, float(dropout)),
            *(rows, depth, rank),
            *(*x.stride(), *a.stride(), *h.stride()),
            *(config.rows, config.depth, padded_rank(rank), INTERPRETED),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return h


def factor_products(
    x: Tensor,
    dy: Tensor,
    h: Tensor,
    q: Tensor,
    gain: Tensor,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``gain * (q.T @ drop(x))`` and ``gain * (dy.T @ h)``, of `dtype`."""
    (tokens, inputs), outputs, rank = x.shape, dy.shape[1], h.shape[1]
    config = _config("dab", x, rank, inputs + outputs)
    splits = splits_for(tokens, inputs, outputs, config)
    blocks = triton.cdiv(inputs, config.columns) + triton.cdiv(outputs, config.columns)
    da, db = empty(x, rank, inputs, dtype=dtype), empty(x, outputs, rank, dtype=dtype)
    if splits == 1:
        parts = da[None], db[None]  # (1, R, in), (1, out, R)
    else:
        a_parts = empty(x, splits, inputs, rank, dtype=torch.float32)
        parts = a_parts.mT, empty(x, splits, outputs, rank, dtype=torch.float32)
    with _device_of(x):
        dab[(blocks, splits)](
            *(x, dy, h, q, gain if splits == 1 else None, seed, *parts, float(dropout)),
            *(tokens, inputs, outputs, rank),
            *(*x.stride(), *dy.stride(), *h.stride(), *q.stride(), _step(gain)),
            *(*parts[0].stride(), *parts[1].stride()),
            *(config.columns, config.depth, padded_rank(rank), INTERPRETED),
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if splits > 1:
            add_splits[(blocks,)](
                *(*parts, gain, da, db),
                *(splits, inputs, outputs, rank),
                *(_step(gain), *da.stride(), *db.stride()),
                *(config.columns, padded_rank(rank), INTERPRETED),
                num_warps=config.warps,
            )
    return da, db


def _device_of(x: Tensor) -> AbstractContextManager[None]:
    """Launches go to the current device, which need not be that of `x`; a CPU changes nothing."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]


def _config(kernel: str, x: Tensor, rows: int, columns: int) -> Config:
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else LEAST_CAPABILITY
    return config_for(kernel, capability, rows=rows, columns=columns, itemsize=x.itemsize)


def _tiles(rows: int, columns: int, config: Config) -> tuple[int]:
    """The grid; one column of tiles at least, because that one stores `h`."""
    return (triton.cdiv(rows, config.rows) * max(1, triton.cdiv(columns, config.columns)),)


def _step(vector: Tensor | None) -> int:
    """Stride of a vector; 0 repeats a scalar."""
    return vector.stride(0) if vector is not None and vector.ndim else 0
