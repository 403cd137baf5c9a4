"""The kernels as plain functions of tensors; they allocate their results and launch.

Letters in the shape notes: M tokens, in = in_features, out = out_features, R = rank, 1 .. 64. All
matrices share one dtype, of float16, bfloat16 and float32, and may have any strides; factors of a
wider dtype are cast down by the caller, who gets their gradients in the wider one through
`grad_dtype`. `gain` is a tensor of its own dtype, ``(R,)`` or a scalar. Nothing here is
differentiable. Sums are taken in float32 in a fixed order, without atomics, so results repeat
bit for bit.

The gradient of the gain needs no kernel: it is ``(h * q).sum(0)``, summed once more if the gain is
a scalar, with the `h` that the forward pass returns and the `q` that the backward pass does.

Dropout drops what the update alone sees. Its mask is a function of `seed` and of an element's row
and column, so the backward pass makes it again from the same seed. A fresh seed per call is the
caller's to draw, on the device.
"""

import torch
from torch import Tensor

from lora_core.kernels.triton.calls import (
    empty,
    factor_products,
    multiply_expand,
    multiply_lora,
    project,
)
from lora_core.kernels.triton.configs import padded_rank

__all__ = [
    "factor_gradients",
    "one_kernel_backward",
    "one_kernel_forward",
    "two_kernel_backward",
    "two_kernel_forward",
]


def one_kernel_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    *,
    keep_h: bool = True,
) -> tuple[Tensor, Tensor]:
    """``x @ weight.T + bias + (gain * h) @ lora_B.T`` with ``h = x @ lora_A.T``, in one launch.

    Args:
        x: Input.
        weight: The frozen matrix.
        bias: The frozen bias, or None.
        lora_A: Down-projection.
        lora_B: Up-projection.
        gain: What each rank's product is multiplied by.
        keep_h: Whether to store `h`, which the backward pass needs.

    Shape:
        - x: ``(M, in)``; weight: ``(out, in)``; bias: ``(out,)``
        - lora_A: ``(R, in)``; lora_B: ``(out, R)``; gain: ``(R,)`` or ``()``
        - Output: ``(M, out)`` and h ``(M, R)``, or ``(0, R)`` if it is not kept

    Raises:
        ValueError: If the rank is not within ``1 .. 64`` or the dtypes differ.
    """
    _check(lora_A.shape[0], x, weight, lora_A, lora_B)
    h = empty(x, x.shape[0] if keep_h else 0, lora_A.shape[0])
    return multiply_lora(x, weight, bias, lora_A, lora_B, gain, h if keep_h else None), h


def one_kernel_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    h: Tensor,
    *,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `one_kernel_forward`, in two launches, or three with split tokens.

    Args:
        dy: Gradient of the output.
        x: As in the forward pass, and so are `weight`, `lora_A`, `lora_B` and `gain`.
        weight: The frozen matrix.
        lora_A: Down-projection.
        lora_B: Up-projection.
        gain: What each rank's product was multiplied by.
        h: What the forward pass returned.
        grad_dtype: Of the factors' gradients; that of the factors if None.

    Shape:
        - dy: ``(M, out)``; h: ``(M, R)``; the others as in the forward pass
        - Output: dx ``(M, in)``, dA ``(R, in)``, dB ``(out, R)`` and ``q = dy @ lora_B`` ``(M, R)``

    Raises:
        ValueError: As the forward pass.
    """
    _check(h.shape[1], dy, x, weight, lora_A, lora_B, h)
    q = empty(dy, *h.shape)
    dx = multiply_lora(dy, weight.t(), None, lora_B.t(), lora_A.t(), gain, q)
    dA, dB = factor_products(x, dy, h, q, gain, 0.0, None, grad_dtype or lora_A.dtype)
    return dx, dA, dB, q


def two_kernel_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x @ weight.T + bias + (gain * h) @ lora_B.T`` with ``h = drop(x) @ lora_A.T``, in two.

    Args:
        x: Input.
        weight: The frozen matrix.
        bias: The frozen bias, or None.
        lora_A: Down-projection.
        lora_B: Up-projection.
        gain: What each rank's product is multiplied by.
        dropout: Probability of dropping an element of `x` in the update alone, below 1.
        seed: One int64 on the device that decides the mask; without it nothing is dropped.

    Shape:
        - x: ``(M, in)``; weight: ``(out, in)``; bias: ``(out,)``
        - lora_A: ``(R, in)``; lora_B: ``(out, R)``; gain: ``(R,)`` or ``()``; seed: one element
        - Output: ``(M, out)`` and h ``(M, R)``

    Raises:
        ValueError: If the rank is not within ``1 .. 64`` or the dtypes differ.
    """
    _check(lora_A.shape[0], x, weight, lora_A, lora_B)
    h = project(x, lora_A, dropout, seed)
    return multiply_expand(x, weight, bias, h, lora_B, gain), h


def two_kernel_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    h: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `two_kernel_forward`, in three launches, or four with split tokens.

    Args:
        dy: Gradient of the output.
        x: As in the forward pass, and so are all that follow but `h` and `grad_dtype`.
        weight: The frozen matrix.
        lora_A: Down-projection.
        lora_B: Up-projection.
        gain: What each rank's product was multiplied by.
        h: What the forward pass returned.
        dropout: Probability of dropping an element.
        seed: What decided the mask.
        grad_dtype: Of the factors' gradients; that of the factors if None.

    Shape:
        - dy: ``(M, out)``; h: ``(M, R)``; the others as in the forward pass
        - Output: dx ``(M, in)``, dA ``(R, in)``, dB ``(out, R)`` and ``q = dy @ lora_B`` ``(M, R)``

    Raises:
        ValueError: As the forward pass.
    """
    _check(h.shape[1], dy, x, weight, lora_A, lora_B, h)
    q = project(dy, lora_B.t())
    dx = multiply_expand(dy, weight.t(), None, q, lora_A.t(), gain, dropout, seed)
    dA, dB = factor_products(x, dy, h, q, gain, dropout, seed, grad_dtype or lora_A.dtype)
    return dx, dA, dB, q


def factor_gradients(
    dy: Tensor,
    x: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    h: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Either path's backward pass where the input needs no gradient.

    Args:
        dy: Gradient of the output.
        x: As in the forward pass, and so are all that follow but `h` and `grad_dtype`.
        lora_B: Up-projection.
        gain: What each rank's product was multiplied by.
        h: What the forward pass returned.
        dropout: Probability of dropping an element.
        seed: What decided the mask.
        grad_dtype: Of the factors' gradients; that of the factors if None.

    Shape:
        - dy: ``(M, out)``; x: ``(M, in)``; lora_B: ``(out, R)``; h: ``(M, R)``
        - Output: dA ``(R, in)``, dB ``(out, R)`` and ``q = dy @ lora_B`` ``(M, R)``

    Raises:
        ValueError: As the forward pass.
    """
    _check(h.shape[1], dy, x, lora_B, h)
    q = project(dy, lora_B.t())
    dA, dB = factor_products(x, dy, h, q, gain, dropout, seed, grad_dtype or lora_B.dtype)
    return dA, dB, q


def _check(rank: int, *tensors: Tensor) -> None:
    padded_rank(rank)
    dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    if len(dtypes) > 1:
        raise ValueError(
            f"The matrices must share one dtype, but have {', '.join(dtypes)}. "
            "Cast the factors to the dtype of the input."
        )
