"""The maths of LoRA as pure functions of tensors.

`lora_linear` is the reference: slow, obvious and right. Every faster path is a claim about it.

Letters in the shape notes: in = in_features, out = out_features, R = rank (the sum of the ranks
where several adapters are stacked).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["lora_delta", "lora_linear", "lora_update", "merged_weight", "stack_factors"]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """A linear layer plus a low-rank update.

    Computes ``x @ weight.T + bias + (gain * (drop(x) @ lora_A.T)) @ lora_B.T``.

    Args:
        x: Input, of the weight's dtype.
        weight: The frozen matrix.
        bias: The frozen bias, or None.
        lora_A: Down-projection; cast to the dtype of `x`, never the other way round.
        lora_B: Up-projection, likewise.
        gain: What each rank's product is multiplied by.
        dropout: Probability of dropping an element of `x` in the update alone; 0 is none.

    Shape:
        - x: ``(..., in)``
        - weight: ``(out, in)``; bias: ``(out,)``
        - lora_A: ``(R, in)``; lora_B: ``(out, R)``
        - gain: a scalar, ``(R,)``, or ``(batch, R)`` for a different mix per sample, where
          `batch` is the first dimension of `x`
        - Output: ``(..., out)``

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.

    Example:
        >>> x, W, A, B = torch.ones(7, 3), torch.ones(5, 3), torch.ones(2, 3), torch.zeros(5, 2)
        >>> lora_linear(x, W, None, A, B).shape
        torch.Size([7, 5])
    """
    base = F.linear(x, weight, bias)
    return base + lora_update(x, lora_A, lora_B, gain, dropout=dropout).to(base.dtype)


def lora_update(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """The low-rank update alone, ``(gain * (drop(x) @ lora_A.T)) @ lora_B.T``.

    Shape:
        As for `lora_linear`.
    """
    if dropout > 0:
        x = F.dropout(x, dropout)
    h = F.linear(x, lora_A.to(x.dtype))  # (..., R)
    if isinstance(gain, Tensor) and gain.ndim == 2:
        gain = gain.reshape(gain.shape[0], *[1] * (h.ndim - 2), gain.shape[1])
    h = (h * gain).to(h.dtype)  # a gain of several entries would promote h
    return F.linear(h, lora_B.to(h.dtype))


def lora_delta(lora_A: Tensor, lora_B: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """The dense update ``lora_B @ diag(gain) @ lora_A``, in float32 or wider.

    Shape:
        - lora_A: ``(R, in)``; lora_B: ``(out, R)``; gain: a scalar or ``(R,)``
        - Output: ``(out, in)``
    """
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    return (lora_B.to(dtype) * gain) @ lora_A.to(dtype)


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """``weight + delta``, summed in float32 or wider and rounded once to the weight's dtype.

    Shape:
        - weight, delta, Output: all alike
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
    return (weight.to(dtype) + delta.to(dtype)).to(weight.dtype)


def stack_factors(
    factors: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Several adapters as one: their sum is one pair of products, exactly.

    Args:
        factors: ``(lora_A, lora_B, gain)`` of each adapter, with scalar gains; at least one.

    Shape:
        - Output: ``(R, in)``, ``(out, R)`` and ``(R,)`` with R the sum of the ranks; a single
          adapter comes back as it is
    """
    if len(factors) == 1:
        return factors[0]
    dtype = factors[0][0].dtype
    for lora_A, _, _ in factors[1:]:
        dtype = torch.promote_types(dtype, lora_A.dtype)
    return (
        torch.cat([lora_A.to(dtype) for lora_A, _, _ in factors]),
        torch.cat([lora_B.to(dtype) for _, lora_B, _ in factors], dim=1),
        torch.cat([gain.expand(lora_A.shape[0]) for lora_A, _, gain in factors]),
    )
