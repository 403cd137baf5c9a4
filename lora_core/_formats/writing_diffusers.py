"""diffusers' file: PEFT's leaves behind a component, and the settings of each in the metadata.

Text encoders are named with the ``text_model`` that older versions of transformers wrap them in;
a reader with a newer one takes it off the keys, though not out of the settings, whose patterns
hence match with it and without.
"""

import json

from torch import Tensor

from lora_core._formats.diffusers import ENTRY, parse
from lora_core._formats.encoded import Encoded
from lora_core._formats.neutral import Adapter, AdapterLayer
from lora_core._formats.spelling import (
    TEXT_MODEL,
    Place,
    check_dotted,
    check_names,
    places_of,
    recognised,
    respelled,
)
from lora_core._formats.writing_peft import check_alike, leaves, scaled, settings

_MAGNITUDE = "lora_magnitude_vector"


def file(adapter: Adapter) -> Encoded:
    """The file of an adapter of a pipeline.

    Raises:
        ConfigError: If a module can't be named, or PEFT has one setting for what differs.
    """
    layers = {name: scaled(name, layer) for name, layer in adapter.layers.items()}
    found = places_of(layers)
    check_dotted(found, "diffusers")
    found = respelled(recognised(found, "diffusers"), "diffusers")
    names = {name: f"{place.component}.{place.path}" for name, place in found.items()}
    check_names(names, layers, "diffusers", lambda name: _means(names[name], found[name]))
    components: dict[str, dict[str, AdapterLayer]] = {}
    for name, layer in layers.items():
        components.setdefault(found[name].component, {})[name] = layer
    tensors: dict[str, Tensor] = {}
    about: dict[str, object] = {}
    for component, own in components.items():
        check_alike(own, "diffusers")
        of_text = component.startswith("text_encoder")
        paths = {name: found[name].path.removeprefix(TEXT_MODEL) for name in own}
        config = settings(own, paths, TEXT_MODEL if of_text else None)
        about |= {f"{component}.{key}": value for key, value in config.items()}
        for name, layer in own.items():
            for leaf, tensor in leaves(layer, biased=config["lora_bias"]).items():
                # transformers looks for magnitudes as they are called in memory
                whole = f"{leaf}.weight" if of_text and leaf == _MAGNITUDE else leaf
                tensors[f"{names[name]}.{whole}"] = tensor
    text = json.dumps(about, separators=(",", ":"), sort_keys=True)
    return Encoded(tensors, {**adapter.metadata, "format": "pt", ENTRY: text}, layers)


def _means(name: str, place: Place) -> bool:
    """Whether a reader takes a name for that of this place."""
    key = parse(f"{name}.lora_A.weight")
    return key is not None and (key.component, key.path) == (place.component, place.path)
