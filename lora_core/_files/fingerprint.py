"""A few sampled values of the adapted weights: enough to tell one base model from another."""

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_core._files.offload import at_hand
from lora_core._formats.bases import (
    SAMPLES,
    Row,
    differing_rows,
    name_of,
    places,
    precision_of,
)
from lora_core._layers import LoRAMixin, LoRAWeight, Slot, peek
from lora_core._merging import Residue

# what values can be read of; a residue gives those of the weight that it stands for
_PLAIN = (Tensor, nn.Parameter, Residue)


def fingerprint(layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The samples of these layers' original weights, in the order of their names."""
    weights = [original(layers[name]) for name in sorted(layers)]
    values = [value for row in samples(weights) for value in row]
    # quantised weights have no precision to compare by, and no values are read of them
    plain = [weight for weight in weights if weight.is_floating_point()]
    dtypes = {weight.dtype for weight in plain} or {torch.float32}
    return {
        "dtype": sorted(map(name_of, dtypes), key=lambda name: -precision_of(name))[0],
        "samples": base64.b64encode(struct.pack(f"<{len(values)}d", *values)).decode(),
    }


def differing(base: Mapping[str, Any], layers: Mapping[str, nn.Module | Slot | None]) -> list[str]:
    """The layers whose weights are not those that were sampled, as "name (file ..., model ...)".

    A layer that is None is passed over.

    Raises:
        ValueError: If the fingerprint is malformed.
    """
    # a weight that is no Parameter is computed (weight_norm, prune) and may be stale
    weights = {
        name: original(module)
        for name, module in layers.items()
        if module is not None and _is_stored(module)
    }
    rows = zip(weights.values(), samples(list(weights.values())), strict=True)
    found = {n: Row(weight.dtype, row) for n, (weight, row) in zip(weights, rows, strict=True)}
    return differing_rows(base, layers, found)


def _is_stored(module: nn.Module | Slot) -> bool:
    return isinstance(module, Slot | LoRAWeight) or "weight" in module._parameters


def original(module: nn.Module | Slot) -> Tensor:
    """A layer's weight as it is unmerged."""
    weight = peek(module)
    merged = module.lora_state.merged if isinstance(module, LoRAMixin) else None
    kept = merged.kept if merged is not None else None
    assert isinstance(weight, Tensor)
    if kept is not None:
        return kept
    away = weight.is_meta and isinstance(module, nn.Module)
    return at_hand(module, "weight", weight) if away else weight  # type: ignore[arg-type]


def samples(weights: Sequence[Tensor]) -> list[list[float]]:
    """Evenly spaced values of each weight; not-a-number where none can be read."""
    rows = [[float("nan")] * SAMPLES] * len(weights)  # each is replaced, none changed
    where: dict[tuple[int, torch.device], Tensor] = {}
    picked: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
    with torch.no_grad():
        for i, weight in enumerate(weights):
            size, device, dtype = weight.numel(), weight.device, weight.dtype
            plain = type(weight) in _PLAIN and dtype.is_floating_point
            if not plain or weight.is_meta or not size:
                continue
            at = where.get((size, device))
            if at is None:
                at = where[size, device] = torch.tensor(places(size), device=device)
            # one operation where the dtype has it: there may be thousands of layers
            flat = weight if dtype.itemsize > 1 else weight.reshape(-1).to(torch.float32)
            picked.setdefault((device, dtype), {})[i] = flat.take(at)
    for group in picked.values():
        fetched = torch.stack(list(group.values())).to(torch.float64).tolist()
        for i, row in zip(group, fetched, strict=True):
            rows[i] = row
    return rows
