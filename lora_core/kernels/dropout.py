"""Dropout that is replayed from its seed: no mask and no dropped copy outlives a product."""

import torch
from torch import Tensor

_LEVELS = 1 << 16  # a probability is rounded to a multiple of 1 / 65,536


def draw_seed() -> int:
    """A seed from PyTorch's own generator, so that `torch.manual_seed` decides the mask."""
    return int(torch.randint(2**62, (), dtype=torch.int64, device="cpu").item())


def kept(p: float) -> int:
    """How many of the 65,536 levels are kept under dropout probability `p`, at least one."""
    return max(1, _LEVELS - round(p * _LEVELS))


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """`x` with each element zeroed with probability `p`, the rest scaled by 1 / (1 - p).

    The same seed and shape give the same mask. 16 random bits per element, on the CPU's generator
    whatever the device of `x`.

    Shape:
        - x: any
        - Output: the shape of `x`
    """
    mask, scale = keep_mask(x, p, seed)
    return x * mask * scale


def keep_mask(x: Tensor, p: float, seed: int) -> tuple[Tensor, float]:
    """The mask of `dropped` as ones and zeros in the dtype of `x`, and the scale of what stays."""
    levels = kept(p)
    with torch._C._DisableFuncTorch():  # the same mask for every gradient of a batch of them
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device="cpu")
        words.random_(-(2**63), None, generator=torch.Generator("cpu").manual_seed(seed))
        bits = words.view(torch.int16)[: x.numel()]
        # the threshold is the last level kept: one more would not fit 16 bits where all are
        ones = torch.empty(
            x.numel(), dtype=x.dtype, device="cpu"
        )  # at an eighth of a cast of bools
        torch.le(bits, levels - _LEVELS // 2 - 1, out=ones)
        mask = ones.to(x.device).view(x.shape)
    return mask, _LEVELS / levels
