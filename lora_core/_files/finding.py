"""Where the layers of a file belong in live models: on which modules, or on which parameters."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from lora_core._errors import MismatchError, listed
from lora_core._formats import Adapter, AdapterLayer
from lora_core._formats.conforming import apart
from lora_core._formats.naming import Host, Resolution, resolve
from lora_core._injection import Candidate
from lora_core._layers import kind_of, peek

Candidates = Mapping[str, Mapping[str, Candidate]]  # by the part of a pipeline, then by name


class Found(NamedTuple):
    """Where the layers of a file belong.

    Attributes:
        resolution: The module of each; what is missing or for another model goes by the file's own
            names.
        layers: The layers, those split that belong on parameters and on no module.
    """

    resolution: Resolution
    layers: Mapping[str, AdapterLayer]


def found_in(file: Adapter, candidates: Candidates, where: str) -> Found:
    """Finds each layer's module, or for what is whole the parameters, where it is no layer."""
    read = any(layer.kind == "weight" for layer in file.layers.values())
    first = resolve(file.layers, _hosts(candidates, vectors=read), where)
    wholes = {name: layer for name, layer in file.layers.items() if layer.config is None}
    lost = {name: layer for name, layer in wholes.items() if name in first.missing}
    # a weight that attention reads itself has its bias beside it
    for name in [name for name in wholes if name in first.found and "bias" in wholes[name].parts]:
        part, path = first.found[name]
        if kind_of(candidates[part][path].module).is_read:
            lost[name] = wholes[name]
    if not lost:
        return Found(first, file.layers)
    layers = {name: layer for name, layer in file.layers.items() if name not in lost}
    pieces: dict[str, AdapterLayer] = {}
    of: dict[str, str] = {}
    for name, layer in lost.items():
        split = apart(name, layer)
        if name in first.found:  # the weight itself is there
            split = {(name if n.endswith("weight") else n): x for n, x in split.items()}
            split = {n: replace(x, path=layer.path) if n == name else x for n, x in split.items()}
        pieces |= split
        of |= dict.fromkeys(split, name)
    twice = [name for name in pieces if name in layers]
    if twice or len(of) < sum(len(layer.parts) for layer in lost.values()):
        raise MismatchError(
            f"Each parameter must have one name in {where!r}, but {listed(twice or of)} is that of"
            " two modules. Rename one of them in the file."
        )
    second = resolve(pieces, _hosts(candidates, vectors=True), where)
    whole = Resolution(
        {**{n: p for n, p in first.found.items() if n not in lost}, **second.found},
        {n: near for n, near in first.missing.items() if n not in lost}
        | {of[n]: near for n, near in second.missing.items()},
        {**first.elsewhere, **second.elsewhere},
    )
    return Found(whole, layers | pieces)


def _hosts(candidates: Candidates, *, vectors: bool) -> dict[str, list[Host]]:
    """What files may name of each model; parameters of one dimension only where asked for."""
    found: dict[str, list[Host]] = {part: [] for part in candidates}
    for part, mine in candidates.items():
        for name, candidate in mine.items():
            shape = tuple(peek(candidate.module).shape)
            if vectors or len(shape) > 1:
                found[part].append(Host(name, kind_of(candidate.module).name, shape))
    return found
