"""The linear layer with a low-rank update: the reference, and the door to the fast forms.

Letters in the shape notes: in = in_features, out = out_features, R = rank (the sum of the ranks
where several adapters are stacked).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels import Plan, dropped, route, run


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
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """`lora_linear` by the fastest form that is right for this call.

    Never makes an elementwise pass over the output, never a gradient of `weight`; keeps `x` in its
    own dtype and at most one number per token and rank. Falls back to `lora_linear` wherever the
    fast forms would be wrong: `fused_plan` says when and why.

    Args and shapes:
        As for `lora_linear`; under autocast the products are computed in its dtype.

    Example:
        >>> x, W, A, B = torch.ones(7, 3), torch.ones(5, 3), torch.ones(2, 3), torch.zeros(5, 2)
        >>> fused_lora_linear(x, W, None, A, B).shape
        torch.Size([7, 5])
    """
    plan = route(x, weight, bias, lora_A, lora_B, gain, dropout)
    if plan.form == "composed":
        return lora_linear(x, weight, bias, lora_A, lora_B, gain, dropout=dropout)
    return run(plan, x, weight, bias, lora_A, lora_B, gain, dropout)


def fused_plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    dropout: float = 0.0,
) -> Plan:
    """The form that `fused_lora_linear` takes for these arguments, and why.

    Example:
        >>> x, W = torch.ones(7, 300), torch.ones(500, 300)
        >>> print(fused_plan(x, W, None, torch.ones(2, 300), torch.ones(500, 2)))
        addmm: two skinny products accumulate in place beside the frozen one
    """
    return route(x, weight, bias, lora_A, lora_B, gain, dropout)


def lora_linear_chosen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    index: Tensor,
) -> Tensor:
    """A linear layer plus one adapter per sample, out of several of one rank.

    Gathers each sample's factors and multiplies them in batches, which costs what one adapter
    costs, however many there are. For a mix of several in one sample, stack them and pass
    `lora_linear` a gain per sample and rank.

    Args:
        x: Input.
        weight: The frozen matrix.
        bias: The frozen bias, or None.
        lora_A: The adapters' down-projections.
        lora_B: The adapters' up-projections.
        gain: The adapters' gains.
        index: The adapter of each sample.

    Shape:
        - x: ``(batch, ..., in)``
        - lora_A: ``(adapters, R, in)``; lora_B: ``(adapters, out, R)``; gain: ``(adapters,)``
        - index: integers below `adapters`, ``(batch,)``
        - Output: ``(batch, ..., out)``

    Example:
        >>> x, W, gain = torch.ones(2, 7, 3), torch.ones(5, 3), torch.ones(4)
        >>> A, B = torch.ones(4, 2, 3), torch.ones(4, 5, 2)
        >>> lora_linear_chosen(x, W, None, A, B, gain, torch.tensor([3, 1])).shape
        torch.Size([2, 7, 5])
    """
    base = F.linear(x, weight, bias)
    places = math.prod(x.shape[1:-1])
    samples = x.reshape(x.shape[0], places, x.shape[-1])  # (b, n, in)
    A = lora_A[index].to(x.dtype)  # (b, R, in)
    B = (lora_B * gain[:, None, None])[index].to(x.dtype)  # (b, out, R)
    h = samples @ A.transpose(1, 2)  # (b, n, R)
    out = base.reshape(x.shape[0], places, base.shape[-1])
    h, up = h.to(out.dtype), B.transpose(1, 2).to(out.dtype)
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return torch.baddbmm(out, h, up).view(base.shape)
    return out.baddbmm_(h, up).view(base.shape)


def shared_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    gains: Sequence[Tensor | float],
) -> list[Tensor]:
    """Several adapted projections of one x, such as q, k and v, in one call's products.

    The projections' matrices come stacked along their outputs, so do their down-projections along
    the rank; the up-projections stand on a block diagonal. Three launches instead of nine; on a
    CPU, which pays for arithmetic rather than launches, three calls are as fast.

    Args:
        x: Input.
        weight: The projections' frozen matrices, stacked.
        bias: Their biases, stacked, or None.
        lora_A: Down-projections.
        lora_B: Up-projections.
        gains: A gain for each projection.

    Shape:
        - x: ``(..., in)``
        - weight: ``(sum of out_i, in)``; bias: ``(sum of out_i,)``
        - lora_A[i]: ``(R_i, in)``; lora_B[i]: ``(out_i, R_i)``
        - Output: one ``(..., out_i)`` per projection, views of one tensor

    Example:
        >>> A, B = [torch.ones(2, 3)] * 2, [torch.zeros(5, 2)] * 2
        >>> q, k = shared_lora_linear(torch.ones(7, 3), torch.ones(10, 3), None, A, B, [1.0, 1.0])
        >>> q.shape, k.shape
        (torch.Size([7, 5]), torch.Size([7, 5]))
    """
    blocks = torch.block_diag(*[B * g for B, g in zip(lora_B, gains, strict=True)])  # type: ignore[no-untyped-call]
    y = fused_lora_linear(x, weight, bias, torch.cat(list(lora_A)), blocks.to(lora_B[0].dtype))
    return list(torch.split(y, [B.shape[0] for B in lora_B], dim=-1))
