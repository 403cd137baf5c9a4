"""The low-rank update of a bilinear layer.

Letters in the shape notes: in1, in2 = the features of both inputs, out = out_features, R = rank.
"""

import torch.nn.functional as F
from torch import Tensor


def bilinear_update(
    x: Tensor,
    z: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """The low-rank update of a bilinear layer: a bilinear map to the rank, then a matrix.

    Computes ``lora_B @ (gain * (x.T @ lora_A[r] @ z for each r))`` at every place, which is the
    bilinear map with the weight ``lora_B @ diag(gain) @ lora_A.flatten(1)``, seen as ``(out, in1,
    in2)``.

    Args:
        x: First input.
        z: Second input.
        lora_A: Down-projection, a matrix per rank; cast to the dtype of `x`.
        lora_B: Up-projection; likewise.
        gain: What each rank's number is multiplied by.
        dropout: Probability of dropping an element of `x`; 0 is none.

    Shape:
        - x: ``(..., in1)``; z: ``(..., in2)``
        - lora_A: ``(R, in1, in2)``; lora_B: ``(out, R)``
        - gain: a scalar, ``(R,)``, or ``(batch, R)`` for a different mix per sample, where
          `batch` is the first dimension of `x`
        - Output: ``(..., out)``

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.

    Example:
        >>> import torch
        >>> x, z, A, B = torch.ones(7, 3), torch.ones(7, 4), torch.ones(2, 3, 4), torch.zeros(5, 2)
        >>> bilinear_update(x, z, A, B).shape
        torch.Size([7, 5])
    """
    if dropout > 0:
        x = F.dropout(x, dropout)
    h = F.bilinear(x, z, lora_A.to(x.dtype))  # (..., R)
    if isinstance(gain, Tensor) and gain.ndim == 2:
        gain = gain.reshape(gain.shape[0], *[1] * (h.ndim - 2), gain.shape[1])
    h = (h * gain).to(h.dtype)  # a gain of several entries would promote h
    return F.linear(h, lora_B.to(h.dtype))
