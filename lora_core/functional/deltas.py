"""Updates as matrices: the dense one, its norm, its sum with a weight, several as one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.kernels.norms import sum_dtype, without_autocast


def lora_delta(lora_A: Tensor, lora_B: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """The dense update ``lora_B @ diag(gain) @ lora_A``, in float32 or wider.

    Shape:
        - lora_A: ``(..., R, in)``; lora_B: ``(..., out, R)``; gain: a scalar or ``(R,)``
        - Output: ``(..., out, in)``
    """
    dtype = sum_dtype(lora_A.dtype, lora_B.dtype)
    return (lora_B.to(dtype) * gain) @ lora_A.to(dtype)


def delta_norm(lora_A: Tensor, lora_B: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """The Frobenius norm of `lora_delta`, without forming it.

    ``sqrt(trace((B.T @ B) @ (A @ A.T)))`` with the gain in B: nothing larger than a factor is made.
    Summed in float64, because the trace cancels where the factors are nearly at right angles.

    Shape:
        - lora_A: ``(..., R, in)``; lora_B: ``(..., out, R)``; gain: a scalar or ``(R,)``
        - Output: a scalar, float64

    Example:
        >>> delta_norm(torch.ones(2, 3), torch.ones(3, 2)).item()
        6.0
    """
    with without_autocast(lora_A):
        A, B = lora_A.double(), lora_B.double() * gain
        total = ((B.mT @ B) * (A @ A.mT)).sum()
    zero = total <= 0  # where a square root has no gradient; NaN stays NaN
    return torch.where(zero, 1, total).sqrt() * ~zero


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """``weight + delta``, summed in float32 or wider and rounded once to the weight's dtype.

    Shape:
        - weight, delta, Output: all alike
    """
    dtype = sum_dtype(weight.dtype, delta.dtype)
    return (weight.to(dtype) + delta.to(dtype)).to(weight.dtype)


def stack_factors(
    factors: Sequence[tuple[Tensor, Tensor, Tensor | float]], rank_dims: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Several adapters as one: their sum is one pair of products, exactly.

    Args:
        factors: ``(lora_A, lora_B, gain)`` of each adapter, at least one. A gain is a number, a
            scalar tensor, or one for each rank.
        rank_dims: The dimensions of `lora_A` and `lora_B` that are the rank.

    Shape:
        - gain: ``()``, ``(R_i,)`` or ``(batch, R_i)``
        - Output: ``(R, in)``, ``(out, R)`` and ``(R,)`` or ``(batch, R)`` with R the sum of the
          ranks; one number for all stays a number, and a single adapter comes back as it is
    """
    if len(factors) == 1:
        return factors[0]
    down, up = rank_dims
    dtype = factors[0][0].dtype
    for lora_A, lora_B, _ in factors:
        dtype = torch.promote_types(dtype, torch.promote_types(lora_A.dtype, lora_B.dtype))
    stacked_A = torch.cat([lora_A.to(dtype) for lora_A, _, _ in factors], dim=down)
    stacked_B = torch.cat([lora_B.to(dtype) for _, lora_B, _ in factors], dim=up)
    gains = [gain for _, _, gain in factors]
    if not any(isinstance(gain, Tensor) for gain in gains) and len(set(gains)) == 1:
        return stacked_A, stacked_B, gains[0]
    like = next((g for g in gains if isinstance(g, Tensor)), stacked_A)
    tensors = [
        g if isinstance(g, Tensor) else torch.full((), g, dtype=like.dtype, device=like.device)
        for g in gains
    ]
    batch = torch.broadcast_shapes(*[g.shape[:-1] for g in tensors])  # type: ignore[no-untyped-call]
    spread = [
        g.expand(*batch, lora_A.shape[down])
        for g, (lora_A, _, _) in zip(tensors, factors, strict=True)
    ]
    return stacked_A, stacked_B, torch.cat(spread, dim=-1)
