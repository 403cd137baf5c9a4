"""Weight-decomposed LoRA: the rows of the adapted matrix get lengths of their own."""

import torch
from torch import Tensor

from lora_core.functional.linear import fused_lora_linear

# below this share of |W|^2 the factored norm loses digits to cancellation
_CANCELLED = 0.4


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
