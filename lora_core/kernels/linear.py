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
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels.dropout import draw_seed, keep_mask

Gain = float | Tensor

_NOTHING = nullcontext()


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
        """The output; keeps of the inputs and h what the gradients asked for are made from."""
        y, h = forward(x, weight, bias, lora_A, lora_B, gain, dtype, dropout, seed)
        needs_x, _, _, needs_A, needs_B = ctx.needs_input_grad[:5]
        # the gradient of B is made from h, and from x only if that gradient may want one of x
        kept = x if needs_A or (needs_B and needs_x) else None
        number, vector = (None, gain) if isinstance(gain, Tensor) else (gain, None)
        ctx.save_for_backward(kept, weight, lora_A, lora_B, h if needs_B else None, vector)
        ctx.settings = number, dtype, dropout, seed, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the factors."""
        x, weight, lora_A, lora_B, h, vector = ctx.saved_tensors
        number, dtype, dropout, seed, wide = ctx.settings
        gain = number if vector is None else vector
        asked = ctx.needs_input_grad
        needed = asked[0], asked[3], asked[4]
        way = differentiable_gradients if torch.is_grad_enabled() else gradients
        dx, dA, dB = way(
            *(grads[0], x, weight, lora_A, lora_B, h, gain, dtype, dropout, seed),
            needed=needed,
            wide=wide,
        )
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
        """The output; keeps of the inputs what the gradients asked for are made from."""
        number, vector = (None, gain) if isinstance(gain, Tensor) else (gain, None)
        # the gradient of B needs x, that of A too; x's own needs neither
        kept = x if ctx.needs_input_grad[3] or ctx.needs_input_grad[4] else None
        ctx.save_for_backward(kept, weight, lora_A, lora_B, vector)
        ctx.settings = number, dtype, x.dtype
        folded = fold(weight, lora_A, lora_B, gain, dtype)
        return _frozen(x, folded, bias, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the factors."""
        with outside_autocast(grads[0]):
            return MergedOnTheFly._gradients(ctx, grads[0])

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, vector = ctx.saved_tensors
        number, dtype, wide = ctx.settings
        gain = number if vector is None else vector
        needs_x, _, _, needs_A, needs_B = ctx.needs_input_grad[:5]
        A, B, rows = _as(lora_A, dtype), _as(lora_B, dtype), _rows(dy)
        dx = dA = dB = None
        # every operand is an input, so that these products are differentiable as they stand
        if needs_A:
            dA = _as(_skinny(B.t(), rows.t(), gain).mm(_as(_rows(x), dtype)), lora_A.dtype)
        if needs_B:
            dB = _as(_skinny(A, _as(_rows(x), dtype).t(), gain).mm(rows).t(), lora_B.dtype)
        if needs_x:
            dx = _as(rows.mm(fold(weight, lora_A, lora_B, gain, dtype)), wide)
            dx = dx.view(*dy.shape[:-1], A.shape[1])
        return dx, None, None, dA, dB, None, None


def fold(weight: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Gain, dtype: torch.dtype) -> Tensor:
    """``W + B diag(g) A`` in `dtype`, (N, K), in one product."""
    A, B = _as(lora_A, dtype), _as(lora_B, dtype)
    if isinstance(gain, Tensor):
        return torch.addmm(_as(weight, dtype), _as(B * gain, dtype), A)
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
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor | None,
    gain: Gain,
    dtype: torch.dtype,
    dropout: float = 0.0,
    seed: int | None = None,
    *,
    needed: Sequence[bool] = (True, True, True),
    wide: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dA, dB)``, those that are needed; not differentiable.

    `x` serves dA and `h` dB; each may be None where its gradient is not needed. `wide` is the
    dtype of x.
    """
    needs_x, needs_A, needs_B = needed
    dx = dA = dB = None
    with outside_autocast(dy):
        A, B, rows = _as(lora_A, dtype), _as(lora_B, dtype), _rows(dy)
        if needs_B and h is not None:
            # a GPU writes either layout; a CPU is eight times slower at the one that saves a copy
            dB = _as(rows.t().mm(h.t()) if dy.is_cuda else h.mm(rows).t(), lora_B.dtype)
        if needs_x or needs_A:
            q = _skinny(B.t(), rows.t(), gain)
            mask, scale = _mask(rows, A, dropout, seed)
        if needs_A and x is not None:
            seen = _as(_rows(x), dtype)
            dA = _as(q.mm(seen if mask is None else (seen * mask).mul_(scale)), lora_A.dtype)
        if needs_x:
            dx = rows.mm(_as(weight, dtype))
            if mask is None:
                dx.addmm_(q.t(), A)
            else:
                dx.addcmul_(q.t().mm(A), mask, value=scale)
            dx = _as(dx, wide).view(*dy.shape[:-1], A.shape[1])
    return dx, dA, dB


def differentiable_gradients(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor | None,
    gain: Gain,
    dtype: torch.dtype,
    dropout: float = 0.0,
    seed: int | None = None,
    *,
    needed: Sequence[bool] = (True, True, True),
    wide: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `gradients`, by operations that can be differentiated again.

    Made from the inputs: h, kept by a Function, is a constant to autograd, and second-order
    gradients through it would be silently wrong. It serves only where x is None, which says that
    neither x nor lora_A takes a gradient.
    """
    needs_x, needs_A, needs_B = needed
    dx = dA = dB = None
    with outside_autocast(dy):
        A, B, rows = _as(lora_A, dtype), _as(lora_B, dtype), _rows(dy)
        ones, scale = _mask(rows, A, dropout, seed)
        mask = None if ones is None else ones * scale
        seen = None if x is None else _as(_rows(x), dtype)
        if seen is not None and mask is not None:
            seen = seen * mask
        if needs_x or needs_A:
            q = _skinny(B.t(), rows.t(), gain)
        if needs_A and seen is not None:
            dA = _as(q.mm(seen), lora_A.dtype)
        if needs_B:
            again = h if seen is None else _skinny(A, seen.t(), gain)
            dB = None if again is None else _as(again.mm(rows).t(), lora_B.dtype)
        if needs_x:
            through = q.t().mm(A)
            dx = rows.mm(_as(weight, dtype)) + (through if mask is None else through * mask)
            dx = _as(dx, wide).view(*dy.shape[:-1], A.shape[1])
    return dx, dA, dB


def _mask(rows: Tensor, A: Tensor, dropout: float, seed: int | None) -> tuple[Tensor | None, float]:
    """The mask that the forward dropped x with, (M, K), and its scale."""
    if seed is None:
        return None, 1.0
    return keep_mask(rows.new_empty(rows.shape[0], A.shape[1]), dropout, seed)


def outside_autocast(t: Tensor) -> AbstractContextManager[None]:
    """Autocast off, where it is on: a backward may be called inside, its forward not."""
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING
    return torch.autocast(t.device.type, enabled=False)


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
    # in the wider of both dtypes, rounded once: a gain of 0.3 in 16 bits is off at every step
    if gain.ndim == 2:
        samples = h.view(*gain.t().shape, h.shape[1] // max(len(gain), 1))  # (R, batch, n)
        return _as(samples * gain.t()[:, :, None], h.dtype).view(h.shape)
    return _as(h * (gain[:, None] if gain.ndim else gain), h.dtype)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` in `dtype`; the test costs a tenth of the call."""
    return t if t.dtype is dtype else t.to(dtype)
