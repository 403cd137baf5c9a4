"""What rounding lost of an update, told by some rows of each layer."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 16
_TOGETHER = 2**17  # numbers that are looked at together


class Sample(NamedTuple):
    """Some rows of a layer, to tell by them what rounding lost.

    Attributes:
        old: The weight before.
        new: The weight after.
        update: What was to be added, as matrices whose product it is.
    """

    old: Tensor
    new: Tensor
    update: tuple[Tensor, ...]


def sampled(values: Tensor) -> Tensor:
    """Evenly spaced rows, a view."""
    step = -(-values.shape[0] // _ROWS)
    return values[::step] if step > 1 else values


def lost(samples: Mapping[str, Sample]) -> dict[str, float]:
    """The share of each update that rounding lost; those of one shape are worked out together."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, (old, new, update) in samples.items():
        shape = tuple((f.shape, f.dtype, f.device) for f in (old, new, *update))
        groups.setdefault(shape, []).append(name)
    shares: dict[str, float] = {}
    for group in groups.values():
        step = _TOGETHER // (samples[group[0]].new.numel() or 1) or 1
        for some in (group[i : i + step] for i in range(0, len(group), step)):
            rows = [(s.old, s.new, *s.update) for s in map(samples.__getitem__, some)]
            old, new, *factors = (torch.stack(c).double() for c in zip(*rows, strict=True))
            asked = factors[0] @ factors[1] if len(factors) > 1 else factors[0]
            off, norm = ((v.flatten(1).norm(dim=1)) for v in (asked - (new - old), asked))
            found = torch.where(norm > 0, off / norm, 0.0).tolist()
            shares.update(zip(some, found, strict=True))
    return {name: shares[name] for name in samples}
