"""The library's own file, of an adapter that may have come from any other."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from lora_core._errors import ConfigError, listed
from lora_core._formats import native
from lora_core._formats.encoded import Encoded
from lora_core._formats.neutral import Adapter, AdapterLayer
from lora_core._formats.spelling import check_dotted, check_names, places


def file(adapter: Adapter) -> Encoded:
    """The file of an adapter, whose names have a component where there are several.

    Raises:
        ConfigError: If a module is unknown by its dots, or is lower in rank than its adapter.
    """
    if all(map(_is_on_layer, adapter.layers.values())):  # as `adapter_of` a model gives them
        return Encoded(*native.encode(adapter), adapter.layers)
    found = places(adapter.layers)
    check_dotted(found, "lora_core")
    several = len({place.component for place in found.values()}) > 1
    names = {
        name: f"{place.component}.{place.path}" if several and place.component else place.path
        for name, place in found.items()
    }
    check_names(names, adapter.layers, "lora_core", lambda _: True)
    layers = {names[name]: _as_on_layer(layer) for name, layer in adapter.layers.items()}
    _check_ranks(layers)
    tensors, metadata = native.encode(replace(adapter, layers=layers))
    return Encoded(tensors, metadata, adapter.layers)


def _is_on_layer(layer: AdapterLayer) -> bool:
    """Whether a layer is one of a single model, under its key there."""
    return not layer.alpha_from and not layer.component


def _as_on_layer(layer: AdapterLayer) -> AdapterLayer:
    """A layer as one of a model has it: of a kind that is known, its factors of one dtype."""
    parts, config = layer.parts, layer.settings
    dtype = layer.parts["lora_A"].dtype
    for part, tensor in parts.items():
        if not part.endswith("magnitude"):
            dtype = torch.promote_types(dtype, tensor.dtype)
    parts = {p: t if p.endswith("magnitude") else t.to(dtype) for p, t in parts.items()}
    config = replace(config, dtype=dtype)
    kind = "linear" if layer.kind == "matrix" else layer.kind
    return replace(layer, kind=kind, config=config, parts=parts)


def _check_ranks(layers: Mapping[str, AdapterLayer]) -> None:
    high = []
    for name, layer in layers.items():
        down, up = layer.parts["lora_A"], layer.parts["lora_B"]
        sizes = (
            (down.shape[-1], up.shape[-2])
            if layer.kind == "weight"
            else (down[0].numel(), up.shape[0])
        )
        if layer.settings.rank > min(sizes) and not layer.settings.tucker:
            high.append(name)
    if high:
        raise ConfigError(
            "`rank` must be at most min(in_features, out_features) to be written as 'lora_core',"
            f" but is more for {listed(high)}. Resize the adapter to that rank, which changes no"
            " number of its update."
        )
