"""The library's own format: plain factors by module name, and one JSON value that describes them.

Tensors: ``<module>.<part>`` for each part of an adapter, ``lora_A`` and ``lora_B`` always. Their
shapes are those they have on the layer, without ranks that are only reserved.
Metadata: ``format`` = "pt", ``lora_core`` = the JSON value below, and the user's own entries.

    {"version": 1, "adapter": "style",
     "layers": {"down.0.attn.to_q": {"alpha": 4.0, "kind": "linear", "rank": 4}},
     "base": {"dtype": "float32", "samples": "<base64>"}}

Kinds are "linear", "conv", "embedding", "weight" for a parameter that is read rather than called,
and what else `_layers` has a kind for. Always in a layer: ``init``, which says how it began, and
whether ``lora_A0`` and ``lora_B0`` are there to be subtracted. Optional: ``dropout``,
``rank_dropout`` and ``module_dropout``; ``rslora``, true where the scale is alpha / sqrt(rank) and
not alpha / rank; ``dora``, ``bias`` and ``tucker``, true where ``lora_magnitude``, ``lora_bias`` or
``lora_mid`` is there; ``dora_in`` beside ``dora``, true where it is ``lora_in_magnitude``, lengths
of columns; ``aliases``, the other names of a module that has several; and ``part``, the model of a
pipeline that the layer is of, with which its name begins. A key that this reader doesn't know is
refused: it may change what the tensors mean.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core._config import SETTINGS, AdapterConfig, check_alpha, check_name
from lora_core._errors import ConfigError, CorruptFileError, listed
from lora_core._formats.neutral import Adapter, AdapterLayer
from lora_core._formats.showing import shown
from lora_core._layers import filed_kinds, kind_named, non_finite

_VERSION = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KEYS = ("version", "adapter", "layers", "base")
_BASE_KEYS = ("dtype", "samples")
_FILED = tuple(key for key, setting in SETTINGS.items() if setting.filed)
_LAYER_KEYS = tuple(dict.fromkeys(("alpha", "kind", "rank", *_FILED, "aliases", "part")))
KINDS = filed_kinds()
RESERVED = ("format", "lora_core")


def encode(file: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata that stand for an adapter."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    # layers with the same settings share their entry: thousands of dicts cost the collector dear
    alike: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, layer in file.layers.items():
        for part, tensor in layer.parts.items():
            tensors[_key(name, part)] = tensor
        settings = (layer.kind, layer.config, layer.aliases, layer.component)
        entry = alike.get(settings)
        if entry is None:
            entry = alike[settings] = _entry(name, layer)
        layers[name] = entry
    about = {"version": _VERSION, "adapter": file.name, "layers": layers, "base": file.base}
    text = json.dumps(about, separators=(",", ":"), sort_keys=True)
    return tensors, {**file.metadata, "format": "pt", "lora_core": text}


def _entry(name: str, layer: AdapterLayer) -> dict[str, Any]:
    config = layer.config
    if config is None:
        raise ConfigError(
            f"Every layer must have factors to be saved, but {name!r} holds a {layer.kind}. Merge"
            " it into the base instead."
        )
    entry: dict[str, Any] = {"kind": layer.kind}
    for key in _FILED:
        value = getattr(config, key)
        if SETTINGS[key].filed == "always" or value != SETTINGS[key].default:
            entry[key] = value
    if layer.aliases:
        entry["aliases"] = list(layer.aliases)
    if layer.component:
        entry["part"] = layer.component
    return entry


def decode(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], about: Any, where: str
) -> Adapter:
    """The adapter that tensors and metadata stand for; `about` is the parsed JSON value.

    Raises:
        CorruptFileError: If the description and the tensors don't fit each other.
    """
    try:
        if about["version"] != _VERSION or about["version"] is True:
            raise ValueError(
                f"its format version is {about['version']!a}, this reader knows {_VERSION}."
                " Read it with the lora_core that wrote it."
            )
        name = check_name(about["adapter"])
        _check_keys("the description", about, _KEYS)
        _check_keys("the base", about["base"], _BASE_KEYS)
        known: dict[Any, AdapterConfig] = {}  # thousands of layers have a few settings
        layers = {n: _layer(n, entry, tensors, known) for n, entry in about["layers"].items()}
        bad = non_finite({n: list(layer.parts.values()) for n, layer in layers.items()})
        if bad:
            raise ValueError(f"a factor of {listed(bad)} holds NaN or infinity")
        base = dict(about["base"])
        # it is looked up in torch, where some names import a package
        if "dtype" in base and not str(base["dtype"]).startswith(("float", "bfloat")):
            raise ValueError(f"its base is of {base['dtype']!a}, which is no floating dtype")
    except (ConfigError, ValueError) as error:
        raise CorruptFileError(
            f"{where!r} must describe its tensors, but {shown(error)}"
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{where!r} must describe its tensors, but its 'lora_core' entry is malformed"
            f" ({type(error).__name__}: {shown(error)}). Save it again."
        ) from error
    expected = {_key(n, part) for n, layer in layers.items() for part in layer.parts}
    surplus = sorted(set(tensors) - expected)
    if surplus or not layers:
        raise CorruptFileError(
            f"{where!r} must hold exactly the tensors of its {len(layers)} layers, but"
            f" {listed(surplus) or 'it has none'}. Save it again."
        )
    rest = {key: value for key, value in metadata.items() if key not in RESERVED}
    return Adapter(name, layers, base, rest)


def _layer(
    name: str,
    entry: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    known: dict[Any, AdapterConfig],
) -> AdapterLayer:
    _check_keys(repr(name), entry, _LAYER_KEYS)
    kind = entry["kind"]
    if kind not in KINDS:
        raise ValueError(f"{listed([name])} is of the unknown kind {kind!a}")
    alpha, rank = entry["alpha"], entry["rank"]
    if alpha is None:
        raise ValueError(f"{listed([name])} has no alpha, which sets the scale. Save it again.")
    first = tensors.get(_key(name, "lora_A"))
    # a rank is checked against the tensors, and any number of them against the layer
    dtype = torch.float32 if first is None else first.dtype
    # by their types as well: 1 is no flag
    same = (dtype, *((key, type(v), v) for key, v in entry.items() if key in _FILED))
    config = known.get(same)
    if config is None:
        settings = {
            key: check(key, entry.get(key, SETTINGS[key].default))
            for key in _FILED
            if (check := SETTINGS[key].check)
        }
        alpha = check_alpha(alpha, 1)
        config = known[same] = AdapterConfig(rank=rank, alpha=alpha, dtype=dtype, **settings)
    keys = {part: _key(name, part) for part in config.parts}
    missing = [key for key in keys.values() if key not in tensors]
    if missing:
        raise ValueError(f"{listed(missing)} is missing. Save it again.")
    parts = {part: tensors[key] for part, key in keys.items()}
    lora_A, lora_B = parts["lora_A"], parts["lora_B"]
    for part, factor in parts.items():
        flat = part in ("lora_magnitude", "lora_in_magnitude", "lora_bias")
        many = factor.ndim == 1 if flat else factor.ndim >= 2
        if not many or factor.dtype not in DTYPES or not factor.numel():
            raise ValueError(
                f"a factor of {listed([name])} is {factor.dtype} of shape {tuple(factor.shape)};"
                " a floating matrix of 16 bits or more is needed"
            )
    down, up = kind_named(kind).rank_dims
    dtypes = {factor.dtype for part, factor in parts.items() if not part.endswith("magnitude")}
    ranks = {lora_A.shape[down], lora_B.shape[up]}
    if ranks != {rank} or type(rank) is not int or len(dtypes) > 1:
        raise ValueError(
            f"the factors of {listed([name])} disagree: lora_A {tuple(lora_A.shape)} {lora_A.dtype}"
            f", lora_B {tuple(lora_B.shape)} {lora_B.dtype}, described rank {rank!r}"
        )
    aliases = entry.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError(
            f"the aliases of {listed([name])} are {aliases!a}; a list of names is needed"
        )
    part = entry.get("part", "")
    if not isinstance(part, str) or (part and not name.startswith(f"{part}.")):
        raise ValueError(f"{listed([name])} is said to be of the part {part!a}, which it is not")
    path = name.removeprefix(f"{part}.") if part else ""
    return AdapterLayer(kind, config, parts, tuple(aliases), component=part, path=path)


def _check_keys(what: str, entry: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = set(entry).difference(known)
    if unknown:
        raise ValueError(
            f"{what} has the unknown keys {listed(sorted(unknown))}; this reader knows"
            f" {listed(known)}. Read it with the lora_core that wrote it."
        )


def _key(name: str, factor: str) -> str:
    return f"{name}.{factor}".lstrip(".")
