"""The library's own file, of an adapter that may have come from any other."""

from dataclasses import replace

import torch

from lora_core._formats import native
from lora_core._formats.bases import rebased
from lora_core._formats.encoded import Encoded
from lora_core._formats.neutral import Adapter, AdapterLayer
from lora_core._formats.spelling import check_dotted, check_names, places


def file(adapter: Adapter) -> Encoded:
    """The file of an adapter, whose names begin with the part of a pipeline where they have one.

    Raises:
        ConfigError: If a module is unknown by its dots.
    """
    if all(not layer.alpha_from for layer in adapter.layers.values()):  # `adapter_of` a model
        return Encoded(*native.encode(adapter), adapter.layers)
    found = places(adapter.layers)
    check_dotted(found, "lora_core")
    names = {
        name: f"{place.component}.{place.path}" if place.component else place.path
        for name, place in found.items()
    }
    check_names(names, adapter.layers, "lora_core", lambda _: True)
    layers = {names[name]: _as_on_layer(layer) for name, layer in adapter.layers.items()}
    base = rebased(adapter.base, adapter.layers, {new: old for old, new in names.items()})
    tensors, metadata = native.encode(replace(adapter, layers=layers, base=base))
    return Encoded(tensors, metadata, adapter.layers)


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
