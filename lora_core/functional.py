"""The maths of LoRA as pure functions of tensors.

`lora_linear` is the reference: slow, obvious and right. Every faster path is a claim about it, and
`fused_lora_linear` is the door to them.

Letters in the shape notes: in = in_features, out = out_features, R = rank (the sum of the ranks
where several adapters are stacked).
"""

import math
from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels import Plan, dropped, route, run

__all__ = [
    "delta_norm",
    "dora_linear",
    "dora_norm",
    "fused_lora_linear",
    "fused_plan",
    "lora_delta",
    "lora_linear",
    "lora_linear_chosen",
    "lora_update",
    "merged_weight",
    "shared_lora_linear",
    "stack_factors",
]

# below this share of |W|^2 the factored norm loses digits to cancellation
_CANCELLED = 0.4


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


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float,
    magnitude: Tensor,
    *,
    norm: Tensor | None = None,
) -> Tensor:
    """A linear layer whose adapted rows are given a length of their own.

    Computes ``(x @ V.T) * magnitude / norm + bias`` with ``V = weight + gain * lora_B @ lora_A``
    and `norm` the length of each row of V, a constant to autograd. V itself is never made.

    Args:
        x: Input.
        weight: The frozen matrix.
        bias: The frozen bias, or None.
        lora_A: Down-projection.
        lora_B: Up-projection.
        gain: What the update is multiplied by.
        magnitude: The rows' lengths.
        norm: `dora_norm` of these factors if it is known; they change once per optimiser step.

    Shape:
        - x: ``(..., in)``; magnitude, norm: ``(out,)``; gain: a scalar
        - The rest as in `lora_linear`
        - Output: ``(..., out)``

    Reference:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5 and section 4.3.

    Example:
        >>> x, W, A, B = torch.ones(7, 3), torch.ones(5, 3), torch.ones(2, 3), torch.zeros(5, 2)
        >>> dora_linear(x, W, None, A, B, 1.0, torch.ones(5)).shape
        torch.Size([7, 5])
    """
    if norm is None:
        norm = dora_norm(weight, lora_A, lora_B, gain).detach()
    directed = fused_lora_linear(x, weight, None, lora_A, lora_B, gain)
    # a row of zeros has no direction to give a length to
    length = torch.where(norm > 0, magnitude / norm.clamp_min(1e-30), 0).to(directed.dtype)
    if bias is None:
        return directed * length
    return torch.addcmul(bias.to(directed.dtype), directed, length)


def dora_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    squared: Tensor | None = None,
) -> Tensor:
    """The norm of each row of ``weight + gain * lora_B @ lora_A``, without forming that sum.

    ``|W_n|^2 + 2 g <(W A^T)_n, B_n> + g^2 <(B (A A^T))_n, B_n>``: nothing of size (out, in) is
    made in the weight's place beyond one cast of a 16-bit weight, autocast or not. Rows where the
    terms cancel are summed densely, in float64; which those are is read from the values, so a
    compiled graph breaks here.

    Args:
        weight: The frozen matrix.
        lora_A: Down-projection.
        lora_B: Up-projection.
        gain: What the update is multiplied by.
        squared: ``weight.float().square().sum(1)`` if it is known; it never changes.

    Shape:
        - weight: ``(out, in)``; lora_A: ``(R, in)``; lora_B: ``(out, R)``; gain: a scalar
        - Output: ``(out,)``, float32 or wider

    Reference:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5.

    Example:
        >>> dora_norm(torch.ones(5, 4), torch.zeros(2, 4), torch.zeros(5, 2)).tolist()
        [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        W, A, B = weight.to(dtype), lora_A.to(dtype), lora_B.to(dtype) * gain
        if squared is None:
            squared = torch.linalg.vecdot(W, W)
        total = squared + torch.linalg.vecdot(2 * (W @ A.T) + B @ (A @ A.T), B)
        rows = (total < _CANCELLED * squared).nonzero().squeeze(1)
        if rows.numel():
            wide = W[rows].double() + B[rows].double() @ A.double()
            total = total.index_put((rows,), wide.square().sum(1).to(dtype))
        some = total != 0  # at zero a square root has no gradient
        norm: Tensor = torch.where(some, total, 1).sqrt() * some
    return norm


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
