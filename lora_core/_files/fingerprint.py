"""A few sampled values of the adapted weights: enough to tell one base model from another."""

import base64
import binascii
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_core._layers import LoRAMixin

_SAMPLES = 4  # values per layer


def fingerprint(layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The samples of these layers' original weights, in the order of their names."""
    values = [v for name in sorted(layers) for v in samples(original(layers[name]))]
    dtypes = {str(original(m).dtype).removeprefix("torch.") for m in layers.values()}
    return {
        "dtype": sorted(dtypes, key=lambda name: -_eps(name))[0],
        "samples": base64.b64encode(struct.pack(f"<{len(values)}d", *values)).decode(),
    }


def differing(base: Mapping[str, Any], layers: Mapping[str, nn.Module | None]) -> list[str]:
    """The layers whose weights are not those that were sampled, as "name (file ..., model ...)".

    Weights of one dtype must be equal; across dtypes they may differ by what rounding explains.
    A layer that is None is passed over.

    Raises:
        ValueError: If the fingerprint is malformed.
    """
    try:
        data = base64.b64decode(base["samples"], validate=True)
        stored = struct.unpack(f"<{len(layers) * _SAMPLES}d", data)
        eps = _eps(base["dtype"])
    except (binascii.Error, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the base fingerprint is malformed ({error})") from error
    found = []
    for i, name in enumerate(sorted(layers)):
        module = layers[name]
        # a weight that is no Parameter is computed (weight_norm, prune) and may be stale
        if module is None or "weight" not in module._parameters:
            continue
        weight = original(module)
        mine = _eps(str(weight.dtype).removeprefix("torch."))
        tolerance = 0.0 if mine == eps else 2 * max(mine, eps)
        theirs = stored[i * _SAMPLES : (i + 1) * _SAMPLES]
        for a, b in zip(theirs, samples(weight), strict=True):
            # not-a-number stands for a weight without readable values, as on the meta device
            if abs(a - b) > tolerance * max(abs(a), 2**-14):
                found.append(f"{name} (file {a:.6g}, model {b:.6g})")
                break
    return found


def original(module: nn.Module) -> Tensor:
    """A layer's weight as it is unmerged."""
    weight = module.weight
    merged = module.lora_merged if isinstance(module, LoRAMixin) else None
    kept = merged.kept if merged is not None else None
    assert isinstance(weight, Tensor)
    return weight if kept is None else kept


def samples(weight: Tensor) -> Sequence[float]:
    """Evenly spaced values of a weight."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not weight.numel():
        return [float("nan")] * _SAMPLES
    size = weight.numel()
    where = [(2 * i + 1) * size // (2 * _SAMPLES) for i in range(_SAMPLES)]
    flat = weight.detach().reshape(-1)[torch.tensor(where, device=weight.device)]
    return flat.to(torch.float64).tolist()


def _eps(dtype: str) -> float:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point or kind.itemsize < 1:
        raise TypeError(f"{dtype!a} is no floating type")
    try:
        return torch.finfo(kind).eps
    except (TypeError, NotImplementedError) as error:
        raise TypeError(f"{dtype!a} has no precision") from error
