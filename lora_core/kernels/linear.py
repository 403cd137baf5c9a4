"""The eager forms of a linear layer plus its low-rank update, forward and backward.

Letters: M tokens, K in_features, N out_features, R ranks in all; x (M, K), W (N, K), A (R, K),
B (N, R), g the gain of each rank, and

    y = x W^T + b + h^T B^T        h = g * (A x^T)         (R, M)
    dx = dy W + q^T A              q = g * (B^T dy^T)      (R, M)
    dA = q x                       dB = (h dy)^T

The rank stands first in h and q: that operand order is up to eight times faster on a CPU (dB) and
all the same on a GPU. Nothing here makes an elementwise pass over an (M, N) tensor, a gradient of
W, or a copy of x that outlives a product.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels.dropout import draw_seed, keep_mask

Gain = float | Tensor


def low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Gain,
    *,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The update as two skinny products beside the frozen one, accumulated in place.

    Keeps x as it is and h, (R, M); nothing else.

    Args:
        x: Input.
        weight: The frozen matrix.
        bias: The frozen bias, or None.
        lora_A: Down-projection; cast to `dtype`.
        lora_B: Up-projection, likewise.
        gain: What each rank's product is multiplied by; takes no gradient.
        dropout: Probability of dropping an element of `x` in the update alone.
        dtype: What the products are computed in, None for that of `x`.

    Shape:
        - x: ``(..., in)``
        - gain: a number, a scalar, ``(R,)`` or ``(batch, R)``
        - Output: ``(..., out)``
    """
    dtype = dtype or x.dtype
    seed = draw_seed() if dropout > 0 else None
    flat = _flat(x)
    if torch.is_grad_enabled() and (
        x.requires_grad or lora_A.requires_grad or lora_B.requires_grad
    ):
        y: Tensor = LowRank.apply(  # type: ignore[no-untyped-call]
            flat, weight, bias, lora_A, lora_B, gain, dtype, dropout, seed
        )
    else:
        y, _ = forward(flat, weight, bias, lora_A, lora_B, gain, dtype, dropout, seed)
    return y if flat is x else y.view(*x.shape[:-1], y.shape[-1])


def merged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Gain,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The update folded into a scratch copy of the matrix, for many tokens over a small one.

    Keeps x as it is and nothing else: the backward folds again.

    Args and shapes:
        As for `low_rank`, with one gain for all samples and no dropout.
    """
    dtype = dtype or x.dtype
    if not torch.is_grad_enabled() or not (
        x.requires_grad or lora_A.requires_grad or lora_B.requires_grad
    ):
        return _frozen(x, fold(weight, lora_A, lora_B, gain, dtype), bias, dtype)
    flat = _flat(x)
    y: Tensor = MergedOnTheFly.apply(flat, weight, bias, lora_A, lora_B, gain, dtype)  # type: ignore[no-untyped-call]
    return y if flat is x else y.view(*x.shape[:-1], y.shape[-1])


class LowRank(torch.autograd.Function):
    """`low_rank` where a gradient is wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        gain: Gain,
        dtype: torch.dtype,
        dropout: float,
        seed: int | None,
    ) -> Tensor:
        """The output; keeps the inputs and h."""
        y, h = forward(x, weight, bias, lora_A, lora_B, gain, dtype, dropout, seed)
        ctx.save_for_backward(x, weight, lora_A, lora_B, h)
        ctx.settings = gain, dtype, dropout, seed
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the factors."""
        x, weight, lora_A, lora_B, h = ctx.saved_tensors
        operands = grads[0], x, weight, lora_A, lora_B
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            found = differentiable_gradients(*operands, *ctx.settings)
        else:
            asked = ctx.needs_input_grad
            found = gradients(*operands, h, *ctx.settings, needed=(asked[0], asked[3], asked[4]))
        dx, dA, dB = found
        return dx, None, None, dA, dB, None, None, None, None


class MergedOnTheFly(torch.autograd.Function):
    """`merged` where a gradient is wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        gain: Gain,
        dtype: torch.dtype,
    ) -> Tensor:
        """The output; keeps the inputs alone."""
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.settings = gain, dtype
        folded = fold(weight, lora_A, lora_B, gain, dtype)
        return _frozen(x, folded, bias, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the factors."""
        dy = _rows(grads[0])
        x, weight, lora_A, lora_B = ctx.saved_tensors
        gain, dtype = ctx.settings
        needs_x, _, _, needs_A, needs_B = ctx.needs_input_grad[:5]
        A, B, x_ = _as(lora_A, dtype), _as(lora_B, dtype), _as(_rows(x), dtype)
        # every operand is an input, so that these products are differentiable as they stand
        dA = _skinny(B.t(), dy.t(), gain).mm(x_).to(lora_A.dtype) if needs_A else None
        dB = _skinny(A, x_.t(), gain).mm(dy).t().to(lora_B.dtype) if needs_B else None
        dx = None
        if needs_x:
            dx = _as(dy.mm(fold(weight, lora_A, lora_B, gain, dtype)), x.dtype).view(x.shape)
        return dx, None, None, dA, dB, None, None


def fold(weight: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Gain, dtype: torch.dtype) -> Tensor:
    """``W + B diag(g) A`` in `dtype`, (N, K), in one product."""
    A, B = _as(lora_A, dtype), _as(lora_B, dtype)
    if isinstance(gain, Tensor):
        return torch.addmm(_as(weight, dtype), B * gain.to(dtype), A)
    return torch.addmm(_as(weight, dtype), B, A, alpha=gain)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Gain,
    dtype: torch.dtype,
    dropout: float = 0.0,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and h, ``(R, M)``; not differentiable."""
    y = _frozen(x, _as(weight, dtype), bias, dtype)
    seen = _as(_rows(x), dtype)
    if seed is not None:
        mask, scale = keep_mask(seen, dropout, seed)
        seen = (seen * mask).mul_(scale)
    h = _skinny(_as(lora_A, dtype), seen.t(), gain)
    _rows(y).addmm_(h.t(), _as(lora_B, dtype).t())
    return y, h


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor,
    gain: Gain,
    dtype: torch.dtype,
    dropout: float = 0.0,
    seed: int | None = None,
    *,
    needed: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dA, dB)``, those that are needed; not differentiable."""
    needs_x, needs_A, needs_B = needed
    dx = dA = dB = mask = None
    A, B, dy = _as(lora_A, dtype), _as(lora_B, dtype), _rows(dy)
    if needs_B:
        # a GPU writes either layout; a CPU is eight times slower at the one that saves a copy
        dB = _as(dy.t().mm(h.t()) if dy.is_cuda else h.mm(dy).t(), lora_B.dtype)
    if needs_x or needs_A:
        q = _skinny(B.t(), dy.t(), gain)
        seen = _as(_rows(x), dtype)
        if seed is not None:
            mask, scale = keep_mask(seen, dropout, seed)
    if needs_A:
        if mask is not None:
            seen = (seen * mask).mul_(scale)
        dA = _as(q.mm(seen), lora_A.dtype)
    if needs_x:
        dx = dy.mm(_as(weight, dtype))
        if mask is None:
            dx.addmm_(q.t(), A)
        else:
            dx.addcmul_(q.t().mm(A), mask, value=scale)
        dx = _as(dx, x.dtype).view(x.shape)
    return dx, dA, dB


def differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Gain,
    dtype: torch.dtype,
    dropout: float = 0.0,
    seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dA, dB)`` by operations that can be differentiated again.

    Made from the inputs alone: h, kept by a Function, is a constant to autograd, and second-order
    gradients through it would be silently wrong.
    """
    A, B, dy, seen = _as(lora_A, dtype), _as(lora_B, dtype), _rows(dy), _as(_rows(x), dtype)
    mask = None
    if seed is not None:
        ones, scale = keep_mask(seen, dropout, seed)
        mask = ones * scale
        seen = seen * mask
    q = _skinny(B.t(), dy.t(), gain)
    through = q.t().mm(A)
    dx = dy.mm(_as(weight, dtype)) + (through if mask is None else through * mask)
    dB = _skinny(A, seen.t(), gain).mm(dy).t()
    return (
        _as(dx, x.dtype).view(x.shape),
        _as(q.mm(seen), lora_A.dtype),
        _as(dB, lora_B.dtype),
    )


def _frozen(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(_as(x, dtype), weight, None if bias is None else _as(bias, dtype))


def _flat(x: Tensor) -> Tensor:
    """`x` with one leading dimension, if that is a view and gives `F.linear` the same product.

    For other layouts `F.linear` adds the bias after the product rather than within it. The
    difference is one rounding, and a fresh adapter must not make it.
    """
    return x.view(-1, x.shape[-1]) if x.ndim != 2 and x.is_contiguous() else x


def _rows(x: Tensor) -> Tensor:
    """`x` with one leading dimension, copied if it must be."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _skinny(left: Tensor, right: Tensor, gain: Gain) -> Tensor:
    """``gain * (left @ right)``, (R, M), the gain for free where it is one number."""
    if not isinstance(gain, Tensor):
        if gain == 1:
            return left.mm(right)
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=gain)
    return spread(left.mm(right), gain)


def spread(h: Tensor, gain: Tensor) -> Tensor:
    """The product of h and the gains.

    Shape:
        - h: ``(R, M)``
        - gain: a scalar, ``(R,)``, or ``(batch, R)`` where `batch` divides M
        - Output: ``(R, M)``
    """
    gain = gain.to(h.dtype)
    if gain.ndim == 2:
        samples = h.view(*gain.t().shape, h.shape[1] // max(len(gain), 1))  # (R, batch, n)
        return (samples * gain.t()[:, :, None]).view(h.shape)
    return h * (gain[:, None] if gain.ndim else gain)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` in `dtype`; the test costs a tenth of the call."""
    return t if t.dtype is dtype else t.to(dtype)
