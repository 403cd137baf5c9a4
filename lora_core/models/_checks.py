"""What several of the reference models ask of their settings and inputs."""

import torch
from torch import Tensor


def check_sizes(**sizes: int) -> None:
    """Refuse a size below one."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {size}.")


def check_indices(name: str, indices: Tensor, limit: int) -> None:
    """Refuse what a lookup table of `limit` rows cannot answer."""
    if indices.dtype not in {torch.int32, torch.int64}:
        raise TypeError(
            f"`{name}` must be int32 or int64, but has dtype {indices.dtype}. "
            f"Write `{name}.long()`."
        )
    # a tracer cannot branch on values; there the lookup itself is the check
    if torch.compiler.is_compiling() or indices.numel() == 0:
        return
    low, high = (int(extreme) for extreme in indices.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(
            f"`{name}` must be from 0 to {limit - 1}, but is {low if low < 0 else high}."
        )


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse numbers that a fraction would be rounded away in."""
    if not tensor.is_floating_point():
        raise TypeError(
            f"`{name}` must be floating, but has dtype {tensor.dtype}. "
            f"Write `{name}.float()`, and scale it if it is an image."
        )
