"""The arithmetic of a linear layer plus its low-rank update, forward and backward.

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

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels.dropout import keep_mask
from lora_core.kernels.norms import without_autocast

Gain = float | Tensor

_NOTHING = nullcontext()


def fold(weight: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Gain, dtype: torch.dtype) -> Tensor:
    """``W + B diag(g) A`` in `dtype`, (N, K), in one product."""
    A, B = as_dtype(lora_A, dtype), as_dtype(lora_B, dtype)
    if isinstance(gain, Tensor):
        return torch.addmm(as_dtype(weight, dtype), as_dtype(B * gain, dtype), A)
    return torch.addmm(as_dtype(weight, dtype), B, A, alpha=gain)


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
    y = frozen(x, as_dtype(weight, dtype), bias, dtype)
    seen = as_dtype(as_rows(x), dtype)
    if seed is not None:
        mask, scale = keep_mask(seen, dropout, seed)
        seen, gain = seen * mask, gain * scale
    h = skinny(as_dtype(lora_A, dtype), seen.t(), gain)
    as_rows(y).addmm_(h.t(), as_dtype(lora_B, dtype).t())
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
        A, B, rows = as_dtype(lora_A, dtype), as_dtype(lora_B, dtype), as_rows(dy)
        if needs_B and h is not None:
            # a GPU writes either layout; a CPU is eight times slower at the one that saves a copy
            dB = as_dtype(rows.t().mm(h.t()) if dy.is_cuda else h.mm(rows).t(), lora_B.dtype)
        if needs_x or needs_A:
            mask, scale = _mask(rows, A, dropout, seed)
            q = skinny(B.t(), rows.t(), gain * scale)
        if needs_A and x is not None:
            seen = as_dtype(as_rows(x), dtype)
            dA = as_dtype(q.mm(seen if mask is None else seen * mask), lora_A.dtype)
        if needs_x:
            dx = rows.mm(as_dtype(weight, dtype))
            if mask is None:
                dx.addmm_(q.t(), A)
            else:
                dx.addcmul_(q.t().mm(A), mask)
            dx = as_dtype(dx, wide).view(*dy.shape[:-1], A.shape[1])
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
        A, B, rows = as_dtype(lora_A, dtype), as_dtype(lora_B, dtype), as_rows(dy)
        mask, scale = _mask(rows, A, dropout, seed)
        gain = gain * scale
        seen = None if x is None else as_dtype(as_rows(x), dtype)
        if seen is not None and mask is not None:
            seen = seen * mask
        if needs_x or needs_A:
            q = skinny(B.t(), rows.t(), gain)
        if needs_A and seen is not None:
            dA = as_dtype(q.mm(seen), lora_A.dtype)
        if needs_B:
            again = h if seen is None else skinny(A, seen.t(), gain)
            dB = None if again is None else as_dtype(again.mm(rows).t(), lora_B.dtype)
        if needs_x:
            through = q.t().mm(A)
            dx = rows.mm(as_dtype(weight, dtype)) + (through if mask is None else through * mask)
            dx = as_dtype(dx, wide).view(*dy.shape[:-1], A.shape[1])
    return dx, dA, dB


def _mask(rows: Tensor, A: Tensor, dropout: float, seed: int | None) -> tuple[Tensor | None, float]:
    """The mask that the forward dropped x with, (M, K), and its scale, which the gain takes on."""
    if seed is None:
        return None, 1.0
    return keep_mask(rows.new_empty(rows.shape[0], A.shape[1]), dropout, seed)


def outside_autocast(t: Tensor) -> AbstractContextManager[None]:
    """Autocast off, where it is on: a backward may be called inside, its forward not."""
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING
    return without_autocast(t)


def frozen(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The frozen layer, in `dtype`; `weight` is of it already."""
    return F.linear(as_dtype(x, dtype), weight, None if bias is None else as_dtype(bias, dtype))


def as_rows(x: Tensor) -> Tensor:
    """`x` with one leading dimension, copied if it must be."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def skinny(left: Tensor, right: Tensor, gain: Gain) -> Tensor:
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
        return as_dtype(samples * gain.t()[:, :, None], h.dtype).view(h.shape)
    return as_dtype(h * (gain[:, None] if gain.ndim else gain), h.dtype)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` in `dtype`; the test costs a tenth of the call."""
    return t if t.dtype is dtype else t.to(dtype)
