"""The linear layer with a low-rank update: the reference, and the door to the fast forms.

Letters in the shape notes: in = in_features, out = out_features, R = rank (the sum of the ranks
where several adapters are stacked).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels import Form, dropped, route, run, stacked


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
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
        seed: Decides what is dropped; None draws from PyTorch's own dropout.

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
        >>> import torch
        >>> x, W, A, B = torch.ones(7, 3), torch.ones(5, 3), torch.ones(2, 3), torch.zeros(5, 2)
        >>> lora_linear(x, W, None, A, B).shape
        torch.Size([7, 5])
    """
    base = F.linear(x, weight, bias)
    update = lora_update(x, lora_A, lora_B, gain, dropout=dropout, seed=seed)
    return base + update.to(base.dtype)


def lora_update(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """The low-rank update alone, ``(gain * (drop(x) @ lora_A.T)) @ lora_B.T``.

    Shape:
        As for `lora_linear`.
    """
    if dropout > 0:
        x = F.dropout(x, dropout) if seed is None else dropped(x, dropout, seed)
    h = F.linear(x, lora_A.to(x.dtype))  # (..., R)
    if isinstance(gain, Tensor) and gain.ndim == 2:
        gain = gain.reshape(gain.shape[0], *[1] * (h.ndim - 2), gain.shape[1])
    h = (h * gain).to(h.dtype)  # a gain of several entries would promote h
    return F.linear(h, lora_B.to(h.dtype))


def fused_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    gain: Tensor | float = 1.0,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """`lora_linear` by the fastest form that is right for this call.

    Never makes an elementwise pass over the output, never a gradient of `weight`; keeps `x` in its
    own dtype and at most one number per token and rank. Falls back to `lora_linear` wherever the
    fast forms would be wrong: `fused_plan` says when and why.

    Args and shapes:
        As for `lora_linear`; under autocast the products are computed in its dtype. Several
        adapters are given as their `lora_A` in a row and their `lora_B` likewise, with one gain
        for all or one for each of their ranks: stacked inside, and no stack is kept.

    Example:
        >>> import torch
        >>> x, W, A, B = torch.ones(7, 3), torch.ones(5, 3), torch.ones(2, 3), torch.zeros(5, 2)
        >>> fused_lora_linear(x, W, None, A, B).shape
        torch.Size([7, 5])
        >>> fused_lora_linear(x, W, None, (A, A), (B, B), torch.tensor([1.0, 1.0, 0.5, 0.5])).shape
        torch.Size([7, 5])
    """
    form = route(x, weight, bias, lora_A, lora_B, gain, dropout)
    if form.form == "composed":
        A, B = stacked(lora_A), stacked(lora_B, 1)
        return lora_linear(x, weight, bias, A, B, gain, dropout=dropout)
    return run(form, x, weight, bias, lora_A, lora_B, gain, dropout)


def fused_plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    gain: Tensor | float = 1.0,
    *,
    dropout: float = 0.0,
) -> Form:
    """The form that `fused_lora_linear` takes for these arguments, and why.

    Example:
        >>> import torch
        >>> x, W = torch.ones(7, 300), torch.ones(500, 300)
        >>> print(fused_plan(x, W, None, torch.ones(2, 300), torch.ones(500, 2)))
        addmm: two skinny products accumulate in place beside the frozen one
    """
    return route(x, weight, bias, lora_A, lora_B, gain, dropout)
