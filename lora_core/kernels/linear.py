"""The eager forms: in-place low-rank products, and a merge on the fly, as autograd Functions.

The letters are those of `products`, which holds the arithmetic.
"""

from typing import Any

import torch
from torch import Tensor

from lora_core.kernels.dropout import draw_seed
from lora_core.kernels.products import (
    Gain,
    as_dtype,
    as_rows,
    differentiable_gradients,
    fold,
    forward,
    frozen,
    gradients,
    outside_autocast,
    skinny,
)


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
        return frozen(x, fold(weight, lora_A, lora_B, gain, dtype), bias, dtype)
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
        return frozen(x, folded, bias, dtype)

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
        A, B, rows = as_dtype(lora_A, dtype), as_dtype(lora_B, dtype), as_rows(dy)
        dx = dA = dB = None
        # every operand is an input, so that these products are differentiable as they stand
        if needs_A:
            q = skinny(B.t(), rows.t(), gain)
            dA = as_dtype(q.mm(as_dtype(as_rows(x), dtype)), lora_A.dtype)
        if needs_B:
            h = skinny(A, as_dtype(as_rows(x), dtype).t(), gain)
            dB = as_dtype(h.mm(rows).t(), lora_B.dtype)
        if needs_x:
            dx = as_dtype(rows.mm(fold(weight, lora_A, lora_B, gain, dtype)), wide)
            dx = dx.view(*dy.shape[:-1], A.shape[1])
        return dx, None, None, dA, dB, None, None


def _flat(x: Tensor) -> Tensor:
    """`x` with one leading dimension, if that is a view and gives `F.linear` the same product.

    For other layouts `F.linear` adds the bias after the product rather than within it. The
    difference is one rounding, and a fresh adapter must not make it.
    """
    return x.view(-1, x.shape[-1]) if x.ndim != 2 and x.is_contiguous() else x
