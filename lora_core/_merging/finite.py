"""Whether all values are finite: one pass over each tensor, and one read for all of them."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

_Key = TypeVar("_Key")
_PLAIN = {Tensor, nn.Parameter}


def non_finite(
    values: Mapping[_Key, Tensor], sums: Mapping[_Key, Tensor] | None = None
) -> list[_Key]:
    """Those that hold NaN or infinity.

    Args:
        values: What to look at, all of floating numbers.
        sums: The sum of each, where it was taken already.
    """
    sums = {} if sums is None else sums
    left = [key for key in values if key not in sums]
    taken = dict(zip(left, norms([values[key] for key in left]), strict=True))
    found = read([*sums.values(), *taken.values()])
    # neither is finite with such a number in it; without one it may still overflow
    keys = zip([*sums, *taken], found, strict=True)
    odd = [key for key, total in keys if not -math.inf < total < math.inf]
    return [key for key in odd if not is_finite(values[key])]


def is_finite(values: Tensor) -> bool:
    """Whether all are finite, without a mask of their size."""
    return not values.numel() or all(bool(v.isfinite()) for v in values.aminmax())


def norms(values: Sequence[Tensor]) -> list[Tensor]:
    """The Frobenius norm of each, in one call: there may be thousands."""
    if {type(v) for v in values} <= _PLAIN:
        return list(torch._foreach_norm(list(values))) if values else []
    return [torch.linalg.vector_norm(v) for v in values]


def read(scalars: Sequence[Tensor]) -> list[float]:
    """Their values; those of one device and dtype are read at once."""
    if len({(scalar.device, scalar.dtype) for scalar in scalars}) == 1:
        return cast(list[float], torch.stack(list(scalars)).tolist())
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, scalar in enumerate(scalars):
        groups.setdefault((scalar.device, scalar.dtype), []).append(i)
    values = [0.0] * len(scalars)
    for group in groups.values():
        found = torch.stack([scalars[i] for i in group]).tolist()
        for i, value in zip(group, found, strict=True):
            values[i] = value
    return values
