"""Weight-decomposed LoRA: the rows of the adapted matrix get lengths of their own."""

import torch
from torch import Tensor

from lora_core.functional.linear import fused_lora_linear
from lora_core.kernels.norms import row_norms


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
    ratio = dora_ratio(magnitude, magnitude.detach(), norm).to(directed.dtype)
    if bias is None:
        return directed * ratio
    return torch.addcmul(bias.to(directed.dtype), directed, ratio)


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
    terms cancel are summed densely, in float64. Under torch.compile it is one operator, and a
    constant to autograd; torch.export, tracers and torch.func get the plain sum.

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
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        from lora_core.kernels import ops  # 10 ms that only tracers and GPUs need

        return ops.dora_norm(weight, lora_A, lora_B, gain, squared)
    return row_norms(weight, lora_A, lora_B, gain, squared)


def dora_ratio(
    magnitude: Tensor, length: Tensor, norm: Tensor, strength: Tensor | float = 1.0
) -> Tensor:
    """What each row of ``weight + gain * lora_B @ lora_A`` is multiplied by.

    ``((1 - strength) * length + strength * magnitude) / norm``: the row's length goes from its
    own to the trained one. Exactly 1 where the three lengths are equal, and wherever `norm` equals
    `length` at strength 0.

    Args:
        magnitude: The rows' trained lengths.
        length: The rows' lengths in `weight`, which `magnitude` started from.
        norm: The rows' lengths with the update, `dora_norm`.
        strength: How much of the adapter is on.

    Shape:
        - magnitude, length, norm: ``(out,)``; strength: a scalar
        - Output: ``(out,)``; a row of zeros, which has no direction to give a length to, gets 1 if
          it was one in `weight`, else 0

    Reference:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5.

    Example:
        >>> dora_ratio(torch.tensor([3.0, 6.0]), torch.tensor([3.0, 2.0]), torch.tensor([3.0, 2.0]))
        tensor([1., 3.])
    """
    dtype = torch.promote_types(magnitude.dtype, norm.dtype)
    if isinstance(strength, Tensor):
        strength = strength.to(dtype)
    wanted = torch.lerp(length.to(dtype), magnitude.to(dtype), strength)
    none = norm == 0  # a NaN stays one
    return torch.where(none, (length == 0).to(dtype), wanted / torch.where(none, 1, norm))
