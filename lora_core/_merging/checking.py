"""Whether all values are finite: one pass over each tensor, and one read for all of them."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lora_core._errors import MergeError, listed
from lora_core._layers import LoRAMixin, parts_of

_Key = TypeVar("_Key")


def check_factors(layers: Mapping[str, LoRAMixin]) -> None:
    """Refuses non-finite factors and strengths: cheap, and before any large product."""
    factors = {
        (name, adapter, part): factor.detach()
        for name, layer in layers.items()
        for adapter in layer.lora_state.selection.names
        for part, factor in parts_of(layer, adapter).items()
    }
    bad = list(dict.fromkeys(f"{name}.{adapter}" for name, adapter, _ in _non_finite(factors)))
    if bad:
        raise MergeError(
            f"An adapter must be finite to be merged, but {listed(bad)} holds NaN or infinity."
            " Nothing was changed; retrain it or load an earlier file."
        )


def check_merged(new: Mapping[str, Tensor], sums: Mapping[str, Tensor] | None = None) -> None:
    """Raises if a merged value is not finite.

    Args:
        new: The values, by the layer's name.
        sums: The sum of each, where it was taken already.
    """
    bad = _non_finite(new, sums)
    if bad:
        raise MergeError(
            f"A merged weight must be finite, but that of {bad[0]!r} overflows"
            f" {new[bad[0]].dtype} or its base is not finite. Nothing was changed; use a"
            " smaller strength or a wider dtype."
        )


def read(scalars: Sequence[Tensor]) -> list[float]:
    """Their values; those of one device and dtype are read at once."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, scalar in enumerate(scalars):
        groups.setdefault((scalar.device, scalar.dtype), []).append(i)
    values = [0.0] * len(scalars)
    for group in groups.values():
        found = torch.stack([scalars[i] for i in group]).tolist()
        for i, value in zip(group, found, strict=True):
            values[i] = value
    return values


def _non_finite(
    values: Mapping[_Key, Tensor], sums: Mapping[_Key, Tensor] | None = None
) -> list[_Key]:
    """Those that hold NaN or infinity."""
    if sums is None:
        sums = {key: t.sum() for key, t in values.items()}
    # a sum with such a number in it is never finite; one without may overflow
    totals = zip(sums, read(list(sums.values())), strict=True)
    return [key for key, total in totals if not (math.isfinite(total) or is_finite(values[key]))]


def is_finite(values: Tensor) -> bool:
    """Whether all are finite, without a mask of their size."""
    return not values.numel() or all(bool(v.isfinite()) for v in values.aminmax())
