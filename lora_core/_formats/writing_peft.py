"""PEFT's leaves and settings, which diffusers' files have too, behind other prefixes."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lora_core._errors import ConfigError, listed
from lora_core._formats.encoded import Encoded
from lora_core._formats.folding import folded
from lora_core._formats.holding import refuse
from lora_core._formats.neutral import Adapter, AdapterLayer
from lora_core._formats.peft import parse
from lora_core._formats.spelling import check_dotted, check_names, places

_ROOT = "base_model.model."


def scaled(name: str, layer: AdapterLayer) -> AdapterLayer:
    """A layer whose bias can stand inside the update, which its scale multiplies."""
    hidden = layer.config is not None and layer.config.bias and not layer.config.scale
    return folded(name, layer) if hidden else layer


def check_alike(layers: Mapping[str, AdapterLayer], format: str) -> None:  # noqa: A002
    """Refuses what PEFT has one setting for, where layers differ in it.

    Args:
        layers: Those of one model.
        format: Their format, for messages.

    Raises:
        ConfigError: If they do.
    """
    factors = {n: x for n, x in layers.items() if x.config is not None}
    rows = [n for n, x in factors.items() if "lora_magnitude" in x.parts]
    plain = [n for n in factors if n not in set(rows)]
    if rows and plain:
        raise ConfigError(
            f"All layers or none must have lengths of rows (DoRA) to be written as {format!r}, but"
            f" {listed(rows, 2)} have and {listed(plain, 2)} have not. Use format='lycoris', or"
            " format='lora_core'."
        )
    biased = [n for n, x in factors.items() if "lora_bias" in x.parts]
    if biased and rows:
        refuse(format, "a bias beside lengths of rows (DoRA)", biased, ("lora_core",))
    embeddings = [n for n, x in factors.items() if x.kind == "embedding"]
    if biased and embeddings:
        refuse(format, "a bias beside an embedding", biased, ("lora_core",))


def leaves(layer: AdapterLayer, *, biased: bool) -> dict[str, Tensor]:
    """The tensors of a layer with factors, by the ends of their keys.

    Args:
        layer: A layer.
        biased: Whether layers of this model have a bias, which all have then.
    """
    parts, config = layer.parts, layer.settings
    down, up = parts["lora_A"], parts["lora_B"]
    embedding = layer.kind == "embedding"
    found = (
        {"lora_embedding_A": down, "lora_embedding_B": up}
        if embedding
        else {"lora_A.weight": down, "lora_B.weight": up}
    )
    if "lora_magnitude" in parts:
        ones = [1] * (down.ndim - 2)
        shape = (1, -1, *ones) if ones else (-1,)
        found["lora_magnitude_vector"] = parts["lora_magnitude"].reshape(shape)
    if biased:
        bias = parts.get("lora_bias")
        # it stands inside the update, whose scale it gets
        inside = (
            up.new_zeros(up.shape[0]) if bias is None else bias.detach().double() / config.scale
        )
        found["lora_B.bias"] = inside.to(up.dtype if bias is None else bias.dtype)
    return found


def settings(
    layers: Mapping[str, AdapterLayer], paths: Mapping[str, str], wrapper: str | None = None
) -> dict[str, Any]:
    """A `LoraConfig` for these layers, as JSON has it; the same for every order of them.

    Args:
        layers: The layers of one model.
        paths: What their modules are called there.
        wrapper: What paths may begin with besides; None for nothing.
    """
    factors = {
        paths[name]: x.settings for name, x in sorted(layers.items()) if x.config is not None
    }
    # a scale by the root of the rank is a setting of all or of none
    rslora = bool(factors) and all(config.rslora for config in factors.values())
    alphas = {
        path: config.alpha if config.rslora == rslora else config.alpha * config.rank**0.5
        for path, config in factors.items()
    }
    ranks = {path: config.rank for path, config in factors.items()}
    rank, alpha = _commonest(ranks, 8), _commonest(alphas, 8.0)
    dropouts = {config.dropout for config in factors.values()}
    parts = {part for layer in layers.values() for part in layer.parts}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_pattern(p, wrapper): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {
            _pattern(p, wrapper): _number(a) for p, a in alphas.items() if a != alpha
        },
        "target_modules": _targets(list(factors), wrapped=wrapper is not None),
        "use_rslora": rslora,
        "use_dora": "lora_magnitude" in parts,
        "lora_bias": "lora_bias" in parts,
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
    }


def file(adapter: Adapter) -> Encoded:
    """The folder of an adapter of one model.

    Raises:
        ConfigError: If it is for several models, a module can't be named, or PEFT has one setting
            for what differs.
    """
    layers = {name: scaled(name, layer) for name, layer in adapter.layers.items()}
    found = places(layers)
    check_dotted(found, "peft")
    components = sorted({place.component for place in found.values()})
    if len(components) > 1:
        raise ConfigError(
            f"A folder of PEFT's must be for one model, but this adapter is for"
            f" {listed(components)}. Save each model's part, or use format='diffusers'."
        )
    paths = {name: place.path for name, place in found.items()}
    check_names(paths, layers, "peft", lambda name: _means(paths[name]))
    check_alike(layers, "peft")
    config = settings(layers, paths)
    targets = {paths[name] for name, layer in layers.items() if layer.config is not None}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        path = paths[name]
        inside = "base_layer." if path in targets else ""
        found_leaves = (
            {f"{inside}{part}": t for part, t in layer.parts.items()}
            if layer.config is None
            else leaves(layer, biased=config["lora_bias"])
        )
        tensors |= {f"{_ROOT}{path}.{leaf}": t for leaf, t in found_leaves.items()}
    matrices = [x for x in layers.values() if x.config is not None and x.kind != "conv"]
    about = {
        # a setting of all; where it is of some, PEFT tells them by their classes
        "fan_in_fan_out": bool(matrices) and all(x.transposed for x in matrices),
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
    }
    config |= about | _values(layers, paths, targets)
    return Encoded(tensors, {**adapter.metadata, "format": "pt"}, layers, config)


def _values(
    layers: Mapping[str, AdapterLayer], paths: Mapping[str, str], targets: set[str]
) -> dict[str, Any]:
    """The settings for parameters that were trained whole."""
    whole = {paths[name]: x.parts for name, x in layers.items() if x.config is None}
    saved = [path for path, parts in whole.items() if "weight" in parts and path not in targets]
    biased = [path for path in whole if path not in saved and "bias" in whole[path]]
    bias = "none"
    if biased:
        bias = "lora_only" if targets.issuperset(biased) else "all"
    return {"bias": bias, "modules_to_save": sorted(saved) or None}


def _means(path: str) -> bool:
    """Whether a reader takes a path for itself."""
    key = parse(f"{_ROOT}{path}.lora_A.weight")
    return key is not None and key.module == path


def _pattern(path: str, wrapper: str | None) -> str:
    """What matches this path alone, and within its wrapper; readers look for it at a path's end."""
    plain = re.escape(path)
    return f"^{plain}" if wrapper is None else f"^{plain}|^{re.escape(wrapper)}{plain}"


def _targets(paths: Sequence[str], *, wrapped: bool) -> list[str] | str:
    """What PEFT adapts: paths, in a list each of which also means longer ones that end with it.

    Where a path is a single name, which may well be the end of others, an expression for them all.
    """
    if not wrapped and any("." not in path for path in paths):
        return "|".join(map(re.escape, sorted(paths)))
    return sorted(paths)


def _commonest(values: Mapping[str, Any], default: Any) -> Any:
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], value), default=default)


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value
