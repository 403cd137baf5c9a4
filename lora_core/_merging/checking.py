"""Whether all values are finite: few operations, though the layers be thousands and tiny."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lora_core._errors import MergeError, listed
from lora_core._layers import LoRAMixin

# numbers that are looked at together: enough that thousands of tiny layers are few operations, and
# so few that an in-place merge needs less memory than a layer
_TOGETHER = 2**14


def check_factors(layers: dict[str, LoRAMixin]) -> None:
    """Refuses non-finite factors and strengths: cheap, and before any large product."""
    factors = (
        (f"{name}.{adapter}", factor)
        for name, layer in layers.items()
        for adapter in layer.lora_selection.names
        for factor in layer.lora_parts(adapter).values()
    )
    bad = list(dict.fromkeys(n for batch in batches(factors) for n in _non_finite(batch)))
    if bad:
        raise MergeError(
            f"An adapter must be finite to be merged, but {listed(bad)} holds NaN or infinity."
            " Nothing was changed; retrain it or load an earlier file."
        )


def check_merged(batch: Iterable[tuple[str, Tensor]]) -> None:
    """Raises if a merged value is not finite."""
    batch = list(batch)
    bad = _non_finite(batch)
    if bad:
        raise MergeError(
            f"A merged weight must be finite, but that of {bad[0]!r} overflows"
            f" {dict(batch)[bad[0]].dtype} or its base is not finite. Nothing was changed; use a"
            " smaller strength or a wider dtype."
        )


def batches(named: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """As many tensors at a time as have `_TOGETHER` numbers, one at least."""
    batch, numbers = [], 0
    for item in named:
        if item[1].numel() >= _TOGETHER:  # joined to others it would be copied
            yield [item]
            continue
        batch.append(item)
        numbers += item[1].numel()
        if numbers >= _TOGETHER:
            yield batch
            batch, numbers = [], 0
    yield batch


def _non_finite(batch: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that hold NaN or infinity; few operations where none does."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, t in batch:
        groups.setdefault((t.device, t.dtype), []).append((name, t.detach()))
    bad = []
    for group in groups.values():
        one = len(group) == 1
        whole = group[0][1] if one else torch.cat([t.reshape(-1) for _, t in group])
        if not _is_finite(whole):
            bad += [name for name, t in group if one or not _is_finite(t)]
    return bad


def _is_finite(values: Tensor) -> bool:
    """Whether all are finite, in one pass and without a mask of their size."""
    return not values.numel() or all(bool(v.isfinite()) for v in values.aminmax())
