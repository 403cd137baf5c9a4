"""New weights, written in pieces that a processor's cache holds."""

import torch
from torch import Tensor

_PIECE = 2**17  # numbers of the weight that one thread adds to at a time
_WHOLE = 4 * _PIECE  # up to here pieces don't pay
_ROWS = 64  # the matrix product takes as many together, or a divisor; others might round otherwise


def added(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """``weight + lora_B @ lora_A`` as a new tensor, and the sum of its numbers."""
    cuts = _cuts(weight)
    if len(cuts) == 1:
        new = torch.addmm(weight, lora_B, lora_A)
        return new, new.sum()
    new, sums = torch.empty_like(weight), []
    pieces = (torch.split(t, cuts) for t in (weight, lora_B, new))
    for old, up, piece in zip(*pieces, strict=True):
        torch.addmm(old, up, lora_A, out=piece)
        sums.append(piece.sum())  # while it is in the cache
    return new, torch.stack(sums).sum()


def _cuts(weight: Tensor) -> list[int]:
    """How many rows each piece has; the last one takes what is left over."""
    height, width = weight.shape
    if weight.device.type != "cpu" or weight.numel() <= _WHOLE:
        return [height]
    rows = max(_PIECE * torch.get_num_threads() // width // _ROWS, 1) * _ROWS
    full = max(height // rows - 1, 0)
    return [rows] * full + [height - rows * full]
