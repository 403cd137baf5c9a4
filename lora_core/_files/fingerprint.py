"""A few sampled values of the adapted weights: enough to tell one base model from another."""

import base64
import binascii
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_core._files.offload import at_hand
from lora_core._formats.bases import SAMPLES
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
        "dtype": sorted(map(_name_of, dtypes), key=lambda name: -_eps(name))[0],
        "samples": base64.b64encode(struct.pack(f"<{len(values)}d", *values)).decode(),
    }


def differing(base: Mapping[str, Any], layers: Mapping[str, nn.Module | Slot | None]) -> list[str]:
    """The layers whose weights are not those that were sampled, as "name (file ..., model ...)".

    Weights of one dtype must be equal; across dtypes they may differ by what rounding explains.
    A layer that is None is passed over.

    Raises:
        ValueError: If the fingerprint is malformed.
    """
    try:
        data = base64.b64decode(base["samples"], validate=True)
        stored = struct.unpack(f"<{len(layers) * SAMPLES}d", data)
        eps = _eps(base["dtype"])
    except (binascii.Error, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the base fingerprint is malformed ({error})") from error
    # a weight that is no Parameter is computed (weight_norm, prune) and may be stale
    weights = {
        i: (name, original(module))
        for i, name in enumerate(sorted(layers))
        if (module := layers[name]) is not None and _is_stored(module)
    }
    # the same for thousands of layers
    dtypes = {weight.dtype for _, weight in weights.values()}
    own = {d: _eps(_name_of(d)) if d.is_floating_point else eps for d in dtypes}
    found = []
    rows = samples([weight for _, weight in weights.values()])
    for (i, (name, weight)), row in zip(weights.items(), rows, strict=True):
        mine = own[weight.dtype]
        tolerance = 0.0 if mine == eps else 2 * max(mine, eps)
        theirs = stored[i * SAMPLES : (i + 1) * SAMPLES]
        if theirs == tuple(row):
            continue
        for a, b in zip(theirs, row, strict=True):
            # not-a-number stands for a weight without readable values, as on the meta device
            if abs(a - b) > tolerance * max(abs(a), 2**-14):
                found.append(f"{name} (file {a:.6g}, model {b:.6g})")
                break
    return found


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
                places = [(2 * i + 1) * size // (2 * SAMPLES) for i in range(SAMPLES)]
                at = where[size, device] = torch.tensor(places, device=device)
            # one operation where the dtype has it: there may be thousands of layers
            flat = weight if dtype.itemsize > 1 else weight.reshape(-1).to(torch.float32)
            picked.setdefault((device, dtype), {})[i] = flat.take(at)
    for group in picked.values():
        fetched = torch.stack(list(group.values())).to(torch.float64).tolist()
        for i, row in zip(group, fetched, strict=True):
            rows[i] = row
    return rows


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _eps(dtype: str) -> float:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point or kind.itemsize < 1:
        raise TypeError(f"{dtype!a} is no floating type")
    try:
        return torch.finfo(kind).eps
    except (TypeError, NotImplementedError) as error:
        raise TypeError(f"{dtype!a} has no precision") from error
