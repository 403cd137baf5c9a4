"""The library's own format: plain factors by module name, and one JSON value that describes them.

Tensors: ``<module>.lora_A`` (rank, in_features) and ``<module>.lora_B`` (out_features, rank).
Metadata: ``format`` = "pt", ``lora_core`` = the JSON value below, and the user's own entries.

    {"version": 1, "adapter": "style",
     "layers": {"down.0.attn.to_q": {"alpha": 4.0, "kind": "linear", "rank": 4}},
     "base": {"dtype": "float32", "samples": "<base64>"}}

Optional in a layer: ``dropout``; ``rslora``, true where the scale is alpha / sqrt(rank) and not
alpha / rank; and ``aliases``, the other names of a module that has several. A key that this reader
doesn't know is refused: it may change what the tensors mean.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_core._config import check_alpha, check_dropout, check_flag, check_name
from lora_core._errors import ConfigError, CorruptFileError, listed
from lora_core._layers import non_finite

_VERSION = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KEYS = ("version", "adapter", "layers", "base")
_BASE_KEYS = ("dtype", "samples")
_LAYER_KEYS = ("alpha", "kind", "rank", "dropout", "rslora", "aliases")
RESERVED = ("format", "lora_core")


@dataclass(frozen=True, slots=True)
class FileLayer:
    """One layer's factors as a file holds them.

    Attributes:
        lora_A: Down-projection (rank, in_features).
        lora_B: Up-projection (out_features, rank).
        alpha: Numerator of the scale.
        dropout: Probability of dropping an input element while training.
        aliases: Other dotted names of the same module.
        rslora: Whether the scale is alpha / sqrt(rank).
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    dropout: float = 0.0
    aliases: tuple[str, ...] = ()
    rslora: bool = False

    @property
    def rank(self) -> int:
        """Inner dimension, taken from the tensors."""
        return self.lora_A.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter outside any model: the neutral form between files and layers.

    Attributes:
        name: The name it was saved under.
        layers: Factors by dotted module name.
        base: Fingerprint of the weights that it was trained on.
        metadata: The file's other entries, verbatim.
    """

    name: str
    layers: Mapping[str, FileLayer]
    base: Mapping[str, Any]
    metadata: Mapping[str, str]


def encode(file: AdapterFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata that stand for an adapter."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    # layers with the same settings share their entry: thousands of dicts cost the collector dear
    alike: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, layer in file.layers.items():
        tensors[_key(name, "lora_A")] = layer.lora_A
        tensors[_key(name, "lora_B")] = layer.lora_B
        settings = (layer.rank, layer.alpha, layer.dropout, layer.aliases, layer.rslora)
        if settings not in alike:
            alike[settings] = _entry(layer)
        layers[name] = alike[settings]
    about = {"version": _VERSION, "adapter": file.name, "layers": layers, "base": file.base}
    text = json.dumps(about, separators=(",", ":"), sort_keys=True)
    return tensors, {**file.metadata, "format": "pt", "lora_core": text}


def _entry(layer: FileLayer) -> dict[str, Any]:
    entry: dict[str, Any] = {"alpha": layer.alpha, "kind": "linear", "rank": layer.rank}
    if layer.dropout:
        entry["dropout"] = layer.dropout
    if layer.rslora:
        entry["rslora"] = True
    if layer.aliases:
        entry["aliases"] = list(layer.aliases)
    return entry


def decode(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], about: Any, where: str
) -> AdapterFile:
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
        layers = {n: _layer(n, entry, tensors) for n, entry in about["layers"].items()}
        bad = non_finite({n: (layer.lora_A, layer.lora_B) for n, layer in layers.items()})
        if bad:
            raise ValueError(f"a factor of {listed(bad)} holds NaN or infinity")
        base = dict(about["base"])
    except (ConfigError, ValueError) as error:
        raise CorruptFileError(f"{where!r} must describe its tensors, but {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{where!r} must describe its tensors, but its 'lora_core' entry is malformed"
            f" ({type(error).__name__}: {error}). Save it again."
        ) from error
    expected = {_key(n, factor) for n in layers for factor in ("lora_A", "lora_B")}
    surplus = sorted(set(tensors) - expected)
    if surplus or not layers:
        raise CorruptFileError(
            f"{where!r} must hold exactly the tensors of its {len(layers)} layers, but"
            f" {listed(surplus) or 'it has none'}. Save it again."
        )
    rest = {key: value for key, value in metadata.items() if key not in RESERVED}
    return AdapterFile(name, layers, base, rest)


def _layer(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FileLayer:
    _check_keys(repr(name), entry, _LAYER_KEYS)
    kind = entry["kind"]
    if kind != "linear":
        raise ValueError(f"{listed([name])} is of the unknown kind {kind!a}")
    missing = [k for k in (_key(name, "lora_A"), _key(name, "lora_B")) if k not in tensors]
    if missing:
        raise ValueError(f"{listed(missing)} is missing. Save it again.")
    lora_A, lora_B = (tensors[_key(name, factor)] for factor in ("lora_A", "lora_B"))
    for factor in (lora_A, lora_B):
        if factor.ndim != 2 or factor.dtype not in DTYPES or not factor.numel():
            raise ValueError(
                f"a factor of {listed([name])} is {factor.dtype} of shape {tuple(factor.shape)};"
                " a floating matrix of 16 bits or more is needed"
            )
    rank = lora_A.shape[0]
    if lora_B.shape[1] != rank or entry["rank"] != rank or lora_A.dtype != lora_B.dtype:
        raise ValueError(
            f"the factors of {listed([name])} disagree: lora_A {tuple(lora_A.shape)} {lora_A.dtype}"
            f", lora_B {tuple(lora_B.shape)} {lora_B.dtype}, described rank {entry['rank']!r}"
        )
    if rank > min(lora_A.shape[1], lora_B.shape[0]):
        raise ValueError(f"the rank {rank} of {listed([name])} exceeds its layer's sizes")
    alpha, dropout = entry["alpha"], entry.get("dropout", 0.0)
    if alpha is None:
        raise ValueError(f"{listed([name])} has no alpha, which sets the scale. Save it again.")
    aliases = entry.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError(
            f"the aliases of {listed([name])} are {aliases!a}; a list of names is needed"
        )
    checked = check_alpha(alpha, rank), check_dropout(dropout)
    rslora = check_flag("rslora", entry.get("rslora", False))
    return FileLayer(lora_A, lora_B, *checked, tuple(aliases), rslora)


def _check_keys(what: str, entry: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise ValueError(
            f"{what} has the unknown keys {listed(unknown)}; this reader knows {listed(known)}."
            " Read it with the lora_core that wrote it."
        )


def _key(name: str, factor: str) -> str:
    return f"{name}.{factor}".lstrip(".")
