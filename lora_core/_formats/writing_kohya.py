"""kohya's keys and LyCORIS': ``<prefix>_<stem>.<leaf>``, an alpha beside every pair of factors."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_core._errors import ConfigError, listed
from lora_core._formats.encoded import Encoded
from lora_core._formats.families import base_of
from lora_core._formats.folding import folded, without_rslora
from lora_core._formats.kohya import parse
from lora_core._formats.metadata import ARGS, BASES, training, with_hashes
from lora_core._formats.neutral import Adapter, AdapterLayer
from lora_core._formats.spelling import (
    Place,
    check_dotted,
    check_names,
    places_of,
    recognised,
    respelled,
)

_PREFIXES = {
    "": "lycoris",
    "unet": "lora_unet",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
    "transformer": "lora_transformer",
    "prior": "lora_prior_unet",
    "prior_text_encoder": "lora_prior_te",
}


_OF_NORMS = {"weight": "w_norm", "bias": "b_norm"}
_OF_OTHERS = {"weight": "diff", "bias": "diff_b"}
_MODULES = {"kohya": "networks.lora", "lycoris": "lycoris.kohya"}
_ARGS = {"kohya": "", "lycoris": '{"algo": "locon"}'}
_OF_BASE = re.compile(
    r"ss_v2|ss_base_model_version|modelspec\.(?:architecture|implementation|resolution)"
)


def file(
    adapter: Adapter,
    format: str,  # noqa: A002
    base: str | None = None,
    spelling: str | None = None,
) -> Encoded:
    """The file of an adapter; see `encode` for the arguments.

    Raises:
        ConfigError: If a module's name can't be spelled, or a stem is that of two modules.
    """
    layers = {name: _scaled(name, layer) for name, layer in adapter.layers.items()}
    about = dict(adapter.metadata)
    found = places_of(layers)
    check_dotted(found, format, ("dotted", "stem"))
    if format == "kohya":
        found = recognised(found, format)
    if base is not None:
        about = {key: value for key, value in about.items() if not _OF_BASE.fullmatch(key)}
    known = base or base_of(layers, found) or about.get("ss_base_model_version")
    known = known if known in BASES else None
    usual = "ldm" if known == "sdxl_base_v1-0" else "diffusers"
    found = respelled(found, spelling or usual, known, must=spelling is not None)
    tensors: dict[str, Tensor] = {}
    for name, stem in _stems(layers, found, format).items():
        tensors |= _tensors(stem, layers[name])
    # of the network's own settings those stay that the tensors don't tell
    args = about.pop(ARGS, _ARGS[format])
    general, computed = training(_MODULES[format], known, adapter.name, layers, args)
    return Encoded(tensors, with_hashes(tensors, general | about | computed), layers)


def check_given(metadata: Mapping[str, str], base: str | None) -> None:
    """Refuses entries that follow from the adapter, or from a base that is named.

    Raises:
        ConfigError: If there are any.
    """
    taken = [
        key
        for key in metadata
        if key in ("ss_network_module", ARGS) or (base is not None and _OF_BASE.fullmatch(key))
    ]
    if taken:
        raise ConfigError(
            f"`metadata` must leave {listed(taken)} to the format"
            f"{'' if base is None else f' and to base={base!r}'}, but sets them. Leave them out."
        )


def _scaled(name: str, layer: AdapterLayer) -> AdapterLayer:
    """A layer whose scale every reader takes for ``alpha / rank``.

    An alpha of 0 is "not set" to some of them, and then the rank: zeros in `lora_B` are zeros to
    all.
    """
    if layer.config is None:
        return layer
    return without_rslora(layer) if layer.config.alpha else folded(name, layer)


def _stems(
    layers: Mapping[str, AdapterLayer],
    found: Mapping[str, Place],
    format: str,  # noqa: A002
) -> dict[str, str]:
    """What a file calls each layer's module: prefix and stem. A file's own stems are kept."""
    several = {place.component for place in found.values()} & {"text_encoder_2", "text_encoder_3"}
    # one text encoder, of Stable Diffusion 1 or 2, has no number
    prefixes = _PREFIXES if several else {**_PREFIXES, "text_encoder": "lora_te"}

    def stem(name: str, place: Place) -> str:
        if place.spelling == "stem" and _means(name, place):
            return name
        return f"{prefixes.get(place.component, place.component)}_{place.stem}"

    names = {name: stem(name, place) for name, place in found.items()}
    check_names(names, layers, format, lambda name: _means(names[name], found[name]))
    return names


def _means(stem: str, place: Place) -> bool:
    """Whether a reader takes a stem for that of this place."""
    key = parse(f"{stem}.alpha")
    return key is not None and (key.component, key.path) == (place.component, place.stem)


def _tensors(stem: str, layer: AdapterLayer) -> dict[str, Tensor]:
    """The tensors of one module by their keys."""
    parts = layer.parts
    if layer.config is None:
        norm = "weight" in parts and parts["weight"].ndim == 1
        leaves = _OF_NORMS if norm else _OF_OTHERS
        return {f"{stem}.{leaves[part]}": tensor for part, tensor in parts.items()}
    down, up = parts["lora_A"], parts["lora_B"]
    found = {
        "alpha": alpha_tensor(layer.settings.alpha, up.dtype),
        "lora_down.weight": down,
        "lora_up.weight": up,
    }
    if "lora_mid" in parts:
        found["lora_mid.weight"] = parts["lora_mid"]
    ones = [1] * (down.ndim - 2)
    if "lora_magnitude" in parts:
        found["dora_scale"] = parts["lora_magnitude"].reshape(-1, 1, *ones)
    if "lora_in_magnitude" in parts:
        found["dora_scale"] = parts["lora_in_magnitude"].reshape(1, -1, *ones)
    return {f"{stem}.{leaf}": tensor for leaf, tensor in found.items()}


def alpha_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """An alpha as one number of the factors' dtype, of float32 where that would round it.

    Example:
        >>> alpha_tensor(4.0, torch.bfloat16).dtype, alpha_tensor(2.7, torch.bfloat16).dtype
        (torch.bfloat16, torch.float32)
    """
    own = torch.tensor(alpha, dtype=dtype)
    return (
        own
        if own.item() == alpha
        else torch.tensor(alpha, dtype=torch.promote_types(dtype, torch.float32))
    )
