"""Updates as matrices: the dense one, its norm, its sum with a weight, several as one."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor


def lora_delta(lora_A: Tensor, lora_B: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """The dense update ``lora_B @ diag(gain) @ lora_A``, in float32 or wider.

    Shape:
        - lora_A: ``(R, in)``; lora_B: ``(out, R)``; gain: a scalar or ``(R,)``
        - Output: ``(out, in)``
    """
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    return (lora_B.to(dtype) * gain) @ lora_A.to(dtype)


def delta_norm(lora_A: Tensor, lora_B: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """The Frobenius norm of `lora_delta`, without forming it.

    ``sqrt(trace((B.T @ B) @ (A @ A.T)))`` with the gain in B: nothing larger than a factor is made.
    Summed in float64, because the trace cancels where the factors are nearly at right angles.

    Shape:
        - lora_A: ``(R, in)``; lora_B: ``(out, R)``; gain: a scalar or ``(R,)``
        - Output: a scalar, float64

    Example:
        >>> delta_norm(torch.ones(2, 3), torch.ones(3, 2)).item()
        6.0
    """
    with torch.autocast(lora_A.device.type, enabled=False):
        A, B = lora_A.double(), lora_B.double() * gain
        total = ((B.T @ B) * (A @ A.T)).sum()
    zero = total <= 0  # where a square root has no gradient; NaN stays NaN
    return torch.where(zero, 1, total).sqrt() * ~zero


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """``weight + delta``, summed in float32 or wider and rounded once to the weight's dtype.

    Shape:
        - weight, delta, Output: all alike
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
    return (weight.to(dtype) + delta.to(dtype)).to(weight.dtype)


@overload
def stack_factors(
    factors: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def stack_factors(
    factors: Sequence[tuple[Tensor, Tensor, Tensor | float]],
) -> tuple[Tensor, Tensor, Tensor | float]: ...
def stack_factors(
    factors: Sequence[tuple[Tensor, Tensor, Tensor | float]],
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Several adapters as one: their sum is one pair of products, exactly.

    Args:
        factors: ``(lora_A, lora_B, gain)`` of each adapter, at least one. The gains are scalar
            tensors, or one number that all share.

    Shape:
        - Output: ``(R, in)``, ``(out, R)`` and ``(R,)`` with R the sum of the ranks; a number
          stays a number, and a single adapter comes back as it is
    """
    if len(factors) == 1:
        return factors[0]
    dtype = factors[0][0].dtype
    for lora_A, lora_B, _ in factors:
        dtype = torch.promote_types(dtype, torch.promote_types(lora_A.dtype, lora_B.dtype))
    stacked_A = torch.cat([lora_A.to(dtype) for lora_A, _, _ in factors])
    stacked_B = torch.cat([lora_B.to(dtype) for _, lora_B, _ in factors], dim=1)
    gains = [gain for _, _, gain in factors]
    if not isinstance(gains[0], Tensor):
        return stacked_A, stacked_B, gains[0]
    spread = [gain.expand(lora_A.shape[0]) for lora_A, _, gain in factors]  # type: ignore[union-attr]
    return stacked_A, stacked_B, torch.cat(spread)
