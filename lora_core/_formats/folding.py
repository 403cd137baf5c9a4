"""One layer in plainer terms, the function that it adds kept: for formats that hold no more."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._errors import ConfigError
from lora_core._formats.neutral import AdapterLayer
from lora_core._layers import kind_named


def folded(name: str, layer: AdapterLayer) -> AdapterLayer:
    """The scale multiplied into `lora_B`, in float32 or wider and rounded once; alpha is the rank.

    Raises:
        ConfigError: If the products are more than the dtype of `lora_B` reaches.
    """
    config, parts = layer.settings, dict(layer.parts)
    if config.alpha == config.rank and not config.rslora:
        return layer
    for part in ("lora_B", "lora_B0"):
        if part in parts:
            parts[part] = (_wide(parts[part]) * config.scale).to(parts[part].dtype)
    if not all(bool(p.isfinite().all()) for p in parts.values()):
        raise ConfigError(
            f"A scale must leave finite numbers where it is folded, but {config.scale:g} makes"
            f" infinities of `lora_B` of {name!a} in {layer.parts['lora_B'].dtype}. Cast the"
            " adapter to torch.float32 first."
        )
    return _with(layer, parts, alpha=float(config.rank), rslora=False)


def without_rslora(layer: AdapterLayer) -> AdapterLayer:
    """The same scale by the plain rule: ``alpha * sqrt(rank) / rank``."""
    config = layer.settings
    if not config.rslora:
        return layer
    return _with(layer, layer.parts, alpha=config.alpha * math.sqrt(config.rank), rslora=False)


def without_core(layer: AdapterLayer) -> AdapterLayer:
    """A Tucker form as a plain convolution of the same rank: its core goes into `lora_A`."""
    parts = dict(layer.parts)
    down, core = parts["lora_A"], parts.pop("lora_mid")
    parts["lora_A"] = functional.tucker_down(_wide(down), _wide(core)).to(down.dtype)
    return _with(layer, parts, tucker=False)


def without_first(layer: AdapterLayer) -> AdapterLayer:
    """The first factors, which are subtracted, as a part of plain ones of twice the rank."""
    config, parts = layer.settings, dict(layer.parts)
    names = ("lora_A", "lora_B", "lora_A0", "lora_B0")
    down, up = kind_named(layer.kind).subtracted(*(_wide(parts.pop(part)) for part in names))
    parts |= {"lora_A": down.to(config.dtype), "lora_B": up.to(config.dtype)}
    rank = 2 * config.rank
    return _with(layer, parts, rank=rank, alpha=config.scale * rank, rslora=False, init="kaiming")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _with(layer: AdapterLayer, parts: Mapping[str, Tensor], **settings: object) -> AdapterLayer:
    config: AdapterConfig = replace(layer.settings, reserve_rank=None, **settings)  # type: ignore[arg-type]
    return replace(layer, config=config, parts=parts)


def as_differences(layers: Mapping[str, AdapterLayer]) -> dict[str, AdapterLayer]:
    """The layers with those of a module's vectors as one whole difference of the module.

    So programs have what is trained of normalisation: its weight and bias are not read by name.
    """
    found: dict[str, AdapterLayer] = {}
    for name, layer in layers.items():
        module, _, part = name.rpartition(".")
        path = layer.path or name
        plain = layer.kind == "weight" and layer.parts.keys() == {"lora_A", "lora_B"}
        vector = plain and layer.parts["lora_B"].shape == (1, 1) and module not in layers
        if not vector or part not in ("weight", "bias") or not path.endswith(f".{part}"):
            found[name] = layer
            continue
        product = functional.lora_delta(
            layer.parts["lora_A"], layer.parts["lora_B"], layer.settings.scale
        )
        parts = found[module].parts if module in found else {}
        found[module] = replace(
            layer,
            kind="difference",
            config=None,
            parts={**parts, part: product[0].to(layer.settings.dtype)},
            path=path.removesuffix(f".{part}"),
            aliases=(),
        )
    return found
