"""The linear layer plus its low-rank update on a processor or by a GPU's own products.

Letters: M tokens, K in_features, N out_features, R ranks in all; x (M, K), W (N, K), A (R, K),
B (N, R), g the gain of each rank, and

    y = x W^T + b + g h B^T        h = x A^T           (M, R)
    dx = dy W + g q A              q = dy B            (M, R)
    dA = g q^T x                   dB = g dy^T h

"addmm" computes just that; "merge" folds ``W + g B A`` into scratch for y and dx, and makes h anew
in its backward. A gain that is one number rides on a product for free, others are multiplied into
h and q. Nothing here makes an elementwise pass over an (M, N) tensor, a gradient of W, or a copy of
x that outlives a product.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lora_core.kernels.dropout import draw_seed, keep_mask
from lora_core.kernels.norms import without_autocast

Gain = float | Tensor
Factor = Tensor | Sequence[Tensor]  # of one adapter, or of each of several

# numbers in x or dy up to which, and a rank from which, a CPU is as fast at the straight products
# h, q and dB; between them it is up to eight times faster at their transposes, h from `NARROW` on
FEW, NARROW, WIDE = 2**12, 5, 16

_wants_grad = attrgetter("requires_grad")


def low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Factor,
    lora_B: Factor,
    gain: Gain,
    dropout: float = 0.0,
) -> Tensor:
    """The update as two skinny products beside the frozen one, accumulated in place.

    Keeps x as it is and h, (M, R); nothing else.

    Args:
        x: Input.
        weight: The frozen matrix.
        bias: The frozen bias, or None.
        lora_A: Down-projection, or those of several adapters; cast to the dtype of the products,
            that of `x` or autocast's.
        lora_B: Up-projection, likewise.
        gain: What each rank's product is multiplied by; takes no gradient.
        dropout: Probability of dropping an element of `x` in the update alone.

    Shape:
        - x: ``(..., in)``
        - gain: a number, a scalar, ``(R,)`` or ``(batch, R)``
        - Output: ``(..., out)``
    """
    dtype = computed_in(x) if torch._C._is_any_autocast_enabled() else x.dtype
    seed = draw_seed() if dropout > 0 else None
    rows = _flat(x) if x.ndim != 2 else x
    factors = (lora_A, lora_B) if isinstance(lora_A, Tensor) else (*lora_A, *lora_B)
    if torch.is_grad_enabled() and (x.requires_grad or any(map(_wants_grad, factors))):
        y: Tensor = _low_rank(rows, weight, bias, gain, dtype, dropout, seed, *factors)
    else:
        A, B = factors if len(factors) == 2 else _stacks(factors)
        y, _ = forward(rows, weight, bias, A, B, gain, dtype, dropout, seed)
    return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])


def merged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Factor,
    lora_B: Factor,
    gain: Gain,
) -> Tensor:
    """The update folded into a scratch copy of the matrix, for many tokens over a small one.

    Keeps x as it is and nothing else: the backward folds again.

    Args and shapes:
        As for `low_rank`, with one gain for all samples and no dropout.
    """
    dtype = computed_in(x) if torch._C._is_any_autocast_enabled() else x.dtype
    factors = (lora_A, lora_B) if isinstance(lora_A, Tensor) else (*lora_A, *lora_B)
    if torch.is_grad_enabled() and (x.requires_grad or any(map(_wants_grad, factors))):
        rows = _flat(x) if x.ndim != 2 else x
        y: Tensor = _merged(rows, weight, bias, gain, dtype, *factors)
        return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])
    A, B = factors if len(factors) == 2 else _stacks(factors)
    folded = fold(weight, A, B, gain, dtype)
    shift = bias if bias is None or bias.dtype is dtype else bias.to(dtype)
    return F.linear(x if x.dtype is dtype else x.to(dtype), folded, shift)


class LowRank(Function):
    """`low_rank` where a gradient is wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Gain,
        dtype: torch.dtype,
        dropout: float,
        seed: int | None,
        *factors: Tensor,
    ) -> Tensor:
        """The output; keeps of the inputs and h what the gradients asked for are made from."""
        one = len(factors) == 2  # which is not to pay for several
        lora_A, lora_B = factors if one else _stacks(factors)
        y, h = forward(x, weight, bias, lora_A, lora_B, gain, dtype, dropout, seed)
        asked = ctx.needs_input_grad
        needs_x, needs_A, needs_B = (asked[0], *asked[7:]) if one else _needed(asked, 7)
        # the gradient of B is made from h, and from x only if that gradient may want one of x
        kept = x if needs_A or (needs_B and needs_x) else None
        number, vector = (None, gain) if isinstance(gain, Tensor) else (gain, None)
        ctx.save_for_backward(kept, weight, h if needs_B else None, vector, *factors)
        ctx.settings = number, dtype, dropout, seed, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the factors."""
        x, weight, h, vector, *factors = ctx.saved_tensors
        number, dtype, dropout, seed, wide = ctx.settings
        # h, kept by a Function, is a constant to autograd: a second derivative through it would be
        # silently wrong. Where x is not kept, neither x nor lora_A takes a gradient
        if x is not None and torch.is_grad_enabled():
            h = None
        lora_A, lora_B = _stacks(factors)
        dx, dA, dB = gradients(
            *(grads[0], x, weight, lora_A, lora_B, h, number if vector is None else vector),
            *(dtype, dropout, seed),
            needed=_needed(ctx.needs_input_grad, 7),
            wide=wide,
        )
        return dx, None, None, None, None, None, None, *_apart(dA, dB, factors)


class Merged(Function):
    """`merged` where a gradient is wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Gain,
        dtype: torch.dtype,
        *factors: Tensor,
    ) -> Tensor:
        """The output; keeps of the inputs what the gradients asked for are made from."""
        number, vector = (None, gain) if isinstance(gain, Tensor) else (gain, None)
        # the gradient of B needs x, that of A too; x's own needs neither
        kept = x if any(ctx.needs_input_grad[5:]) else None
        ctx.save_for_backward(kept, weight, vector, *factors)
        ctx.settings = number, dtype, x.dtype
        folded = fold(weight, *_stacks(factors), gain, dtype)
        shift = bias if bias is None or bias.dtype is dtype else bias.to(dtype)
        return F.linear(x if x.dtype is dtype else x.to(dtype), folded, shift)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the factors."""
        x, weight, vector, *factors = ctx.saved_tensors
        number, dtype, wide = ctx.settings
        lora_A, lora_B = _stacks(factors)
        # every operand is an input, so that these products are differentiable as they stand
        dx, dA, dB = gradients(
            *(grads[0], x, weight, lora_A, lora_B, None, number if vector is None else vector),
            dtype,
            needed=_needed(ctx.needs_input_grad, 5),
            wide=wide,
            merge=True,
        )
        return dx, None, None, None, None, *_apart(dA, dB, factors)


# past `Function.apply`, which walks over the arguments in Python: what it looks for, a transform
# that is active or was, is sent to plain operations before
_low_rank: Any = super(Function, LowRank).apply
_merged: Any = super(Function, Merged).apply


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
    """The output and h, ``(M, R)``; not differentiable."""
    same = x.dtype is dtype is weight.dtype is lora_A.dtype is lora_B.dtype
    if not same or (bias is not None and bias.dtype is not dtype):
        bias = None if bias is None else as_dtype(bias, dtype)
        x, weight = as_dtype(x, dtype), as_dtype(weight, dtype)
        lora_A, lora_B = as_dtype(lora_A, dtype), as_dtype(lora_B, dtype)
    y = F.linear(x, weight, bias)
    seen, out = x, y
    if x.ndim != 2:
        seen, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if seed is not None:
        mask, scale = keep_mask(seen, dropout, seed)
        seen, gain = seen * mask, gain * scale
    if seen.numel() > FEW and NARROW <= lora_A.shape[0] < WIDE:
        h = lora_A.mm(seen.t()).t()
    else:
        h = F.linear(seen, lora_A)  # makes the transpose without Python, half a microsecond less
    if isinstance(gain, Tensor):
        h = spread(h, gain)
        gain = 1.0
    if gain == 1.0:  # nor is the least to be paid for a number that says nothing
        out.addmm_(h, lora_B.t())
    else:
        out.addmm_(h, lora_B.t(), alpha=gain)
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
    merge: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dA, dB)``, those that are needed; differentiable where `h` is None or a constant.

    `x` serves dA and `h` dB; each may be None where its gradient is not needed, and `h` is made of
    `x` where it is None. `wide` is the dtype of x. `merge` folds the update into the matrix for dx.
    """
    if torch._C._is_any_autocast_enabled():  # a backward may be called inside, its forward not
        with without_autocast(dy):
            return gradients(
                *(dy, x, weight, lora_A, lora_B, h, gain, dtype, dropout, seed),
                needed=needed,
                wide=wide,
                merge=merge,
            )
    needs_x, needs_A, needs_B = needed
    dx = dA = dB = mask = None
    A = lora_A if lora_A.dtype is dtype else lora_A.to(dtype)
    B = lora_B if lora_B.dtype is dtype else lora_B.to(dtype)
    rows = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])
    # a GPU writes either layout
    straight = rows.is_cuda or rows.numel() <= FEW or A.shape[0] >= WIDE
    if seed is not None:
        mask, scale = keep_mask(rows.new_empty(rows.shape[0], A.shape[1]), dropout, seed)
        gain = gain * scale
    number, vector = (1.0, gain) if isinstance(gain, Tensor) else (gain, None)
    if x is not None and (needs_A or needs_B):
        seen = as_dtype(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]), dtype)
        if mask is not None:
            seen = seen * mask
        if h is None:
            turned = A.shape[0] >= NARROW and not straight
            h = A.mm(seen.t()).t() if turned else seen.mm(A.t())
            h = h if vector is None else spread(h, vector)
    # beta=0 reads nothing of the first operand: it lends its shape
    if needs_B and h is not None:
        if straight:
            dB = torch.addmm(B, rows.t(), h, beta=0, alpha=number)
        else:
            dB = torch.addmm(B.t(), h.t(), rows, beta=0, alpha=number).t()
        dB = dB if dB.dtype is lora_B.dtype else dB.to(lora_B.dtype)
    if needs_A or (needs_x and not merge):
        q = rows.mm(B) if straight else B.t().mm(rows.t()).t()
        if vector is not None:
            q = spread(q, vector)
    if needs_A and x is not None:
        dA = torch.addmm(A, q.t(), seen, beta=0, alpha=number)
        dA = dA if dA.dtype is lora_A.dtype else dA.to(lora_A.dtype)
    if needs_x:
        if merge:
            dx = rows.mm(fold(weight, A, B, gain, dtype))
        else:
            dx = rows.mm(weight if weight.dtype is dtype else weight.to(dtype))
            if mask is None:
                dx.addmm_(q, A, alpha=number)
            else:
                dx.addcmul_(q.mm(A), mask, value=number)
        dx = dx if dx.dtype is wide else dx.to(wide)
        if dy.ndim != 2:
            dx = dx.view(*dy.shape[:-1], A.shape[1])
    return dx, dA, dB


def computed_in(x: Tensor) -> torch.dtype:
    """What the products of a call are computed in: the dtype of x, or autocast's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def fold(weight: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Gain, dtype: torch.dtype) -> Tensor:
    """``W + B diag(g) A`` in `dtype`, (N, K), in one product."""
    W = weight if weight.dtype is dtype else weight.to(dtype)
    A = lora_A if lora_A.dtype is dtype else lora_A.to(dtype)
    B = lora_B if lora_B.dtype is dtype else lora_B.to(dtype)
    if isinstance(gain, Tensor):
        return torch.addmm(W, as_dtype(B * gain, dtype), A)
    return torch.addmm(W, B, A, alpha=gain)


def spread(h: Tensor, gain: Tensor) -> Tensor:
    """The product of h and the gains.

    Shape:
        - h: ``(M, R)``
        - gain: a scalar, ``(R,)``, or ``(batch, R)`` where `batch` divides M
        - Output: ``(M, R)``
    """
    # in the wider of both dtypes, rounded once: a gain of 0.3 in 16 bits is off at every step
    if gain.ndim == 2:
        samples = h.reshape(gain.shape[0], h.shape[0] // max(len(gain), 1), h.shape[1])
        return as_dtype(samples * gain[:, None], h.dtype).reshape(h.shape)
    return as_dtype(h * gain, h.dtype)


def stacked(factor: Factor, rank_dim: int = 0) -> Tensor:
    """The factors of several adapters as one; of one, itself."""
    if isinstance(factor, Tensor):
        return factor
    return factor[0] if len(factor) == 1 else torch.cat(tuple(factor), rank_dim)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` in `dtype`; the test costs a tenth of the call."""
    return t if t.dtype is dtype else t.to(dtype)


def _flat(x: Tensor) -> Tensor:
    """`x` with one leading dimension, if that is a view and gives `F.linear` the same product.

    For other layouts `F.linear` adds the bias after the product rather than within it. The
    difference is one rounding, and a fresh adapter must not make it.
    """
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else x


def _stacks(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of a Function's last operands: all down-projections, then all up-projections."""
    if len(factors) == 2:
        return factors[0], factors[1]
    n = len(factors) // 2
    return torch.cat(tuple(factors[:n])), torch.cat(tuple(factors[n:]), 1)


def _needed(flags: Sequence[bool], first: int) -> tuple[bool, bool, bool]:
    """Which of the gradients of x, A and B a Function is asked for, its factors from `first` on."""
    if len(flags) == first + 2:
        return flags[0], flags[first], flags[first + 1]
    n = (len(flags) - first) // 2
    return flags[0], any(flags[first : first + n]), any(flags[first + n :])


def _apart(
    dA: Tensor | None, dB: Tensor | None, factors: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients of `_stacks` as those of its operands."""
    if len(factors) == 2:
        return dA, dB
    n = len(factors) // 2
    sizes = [lora_A.shape[0] for lora_A in factors[:n]]
    downs = [None] * n if dA is None else dA.split_with_sizes(sizes)
    ups = [None] * n if dB is None else dB.split_with_sizes(sizes, 1)
    found = zip((*downs, *ups), factors, strict=True)
    return [None if d is None else as_dtype(d, factor.dtype) for d, factor in found]
