"""A file's names for modules, found in live models: tables of every spelling, never a guess.

A stem, the path with its dots as underscores, can't be taken apart again: the models' own paths
are spelled as files spell them, and looked up whole.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_core._errors import MismatchError, listed
from lora_core._formats.ldm import other_names
from lora_core._formats.neutral import AdapterLayer
from lora_core._formats.numbering import numbered
from lora_core._formats.spelling import IN_TEXT, TEXT_MODEL

_IN_PROJ = ".in_proj_weight"  # what PEFT adapts of an attention, by the attention's own name
# programs call any denoiser a UNet
_STANDS_FOR = {"unet": "transformer"}
_NEAR = 5  # names of which near misses are looked for


class Host(NamedTuple):
    """A module of a live model: its dotted path, its kind, and its weight's shape."""

    path: str
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """What files may call the modules of one model.

    Attributes:
        dotted: Path by dotted name.
        stems: Path by stem.
        collisions: Stems and names that mean several modules, which no table has.
    """

    dotted: Mapping[str, str]
    stems: Mapping[str, str]
    collisions: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, hosts: Iterable[Host]) -> "Table":
        """The table of a model's modules."""
        paths = list(dict.fromkeys(host.path for host in hosts))
        others = other_names(paths)
        dotted: dict[str, dict[str, None]] = {}
        stems: dict[str, dict[str, None]] = {}
        for path in paths:
            for name in _spellings(path, others):
                dotted.setdefault(name, {})[path] = None
                stems.setdefault(name.replace(".", "_"), {})[path] = None
        both = [*dotted.items(), *stems.items()]
        return cls(
            {name: next(iter(found)) for name, found in dotted.items() if len(found) == 1},
            {stem: next(iter(found)) for stem, found in stems.items() if len(found) == 1},
            {name: tuple(found) for name, found in both if len(found) > 1},
        )

    def find(self, name: str, spelling: str) -> str | None:
        """The path of the module that a name means.

        Raises:
            MismatchError: If it means several.
        """
        table = self.stems if spelling == "stem" else self.dotted
        if name in self.collisions and name not in table:
            raise MismatchError(
                f"A name in a file must mean one module, but {name!a} is the spelling of"
                f" {listed(self.collisions[name])}. Rename it in the file, with dots."
            )
        return table.get(name)


@dataclass(frozen=True, slots=True)
class Resolution:
    """Where the layers of a file belong.

    Attributes:
        found: Model and module path by layer.
        missing: Layers that their model lacks, each with the nearest name that it has, or "".
        elsewhere: Layers by the component that they are for, of components without a model.
    """

    found: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, Sequence[str]] = field(default_factory=dict)


def resolve(
    layers: Mapping[str, AdapterLayer], models: Mapping[str, Sequence[Host]], where: str = ""
) -> Resolution:
    """Finds the module of each layer.

    Args:
        layers: A file's layers by its own names.
        models: The modules that can carry an adapter, in the order of `named_modules`, of each
            model by its component, as "unet"; "" for a model that is given without saying.
        where: The file, for messages.

    Raises:
        MismatchError: If a name means several modules, two names mean one, or numbers don't fit.
    """
    tables = {component: Table.of(hosts) for component, hosts in models.items()}
    found: dict[str, tuple[str, str]] = {}
    lost: dict[str, str] = {}
    elsewhere: dict[str, list[str]] = {}
    numbers = _numbers(layers, models, where)
    for name, layer in layers.items():
        places = [c for c in _components(layer, models) if c in models]
        if not places:
            elsewhere.setdefault(layer.component, []).append(name)
            continue
        hits = [(c, path) for c in places if (path := _path(name, layer, tables[c], numbers))]
        if len(hits) > 1:
            raise MismatchError(
                f"A name must mean one module, but {name!a} of {where!r} is in"
                f" {listed([c for c, _ in hits])}. Load it into one model at a time."
            )
        if hits:
            found[name] = hits[0]
        else:
            lost[name] = places[0]
    if "" in models:  # which part of a pipeline it is shows by what it has
        has = {layers[name].component for name in found}
        for name in [n for n in lost if layers[n].component not in has and found]:
            elsewhere.setdefault(layers[name].component, []).append(name)
            del lost[name]
    _check_once(layers, found, where)
    return Resolution(found, dict(_near(layers, lost, tables)), elsewhere)


def _spellings(path: str, others: Mapping[str, str]) -> Iterator[str]:
    yield path
    if path in others:
        yield others[path]
    if path.endswith(_IN_PROJ):
        yield path.removesuffix(_IN_PROJ)
    if path.startswith(TEXT_MODEL):
        yield path.removeprefix(TEXT_MODEL)
    elif path.startswith(IN_TEXT):
        yield TEXT_MODEL + path


def _components(layer: AdapterLayer, models: Mapping[str, object]) -> Sequence[str]:
    """The models that a layer may be for."""
    if not layer.component:
        return list(models)
    if layer.component in models:
        return [layer.component]
    other = _STANDS_FOR.get(layer.component, "")
    return [other] if other in models else [""]


def _path(name: str, layer: AdapterLayer, table: Table, numbers: Mapping[str, str]) -> str | None:
    if layer.spelling == "index":
        return numbers.get(name)
    path = table.find(layer.path or name, layer.spelling)
    # what looks like a component may be a module of the model's own
    return path if path is not None or layer.spelling == "stem" else table.find(name, "dotted")


def _numbers(
    layers: Mapping[str, AdapterLayer], models: Mapping[str, Sequence[Host]], where: str
) -> dict[str, str]:
    """The paths of modules that have numbers."""
    by_model: dict[str, dict[str, AdapterLayer]] = {}
    for name, layer in layers.items():
        if layer.spelling == "index":
            for component in _components(layer, models):
                if component in models:
                    by_model.setdefault(component, {})[name] = layer
    paths: dict[str, str] = {}
    for component, numbers in by_model.items():
        kinds = {layer.component for layer in numbers.values()}
        for kind in kinds:
            alike = {n: layer for n, layer in numbers.items() if layer.component == kind}
            paths |= numbered(alike, models[component], where, must=len(kinds) == 1)
    return paths


def _check_once(
    layers: Mapping[str, AdapterLayer], found: Mapping[str, tuple[str, str]], where: str
) -> None:
    first: dict[tuple[str, str, bool], str] = {}
    for name, (component, path) in found.items():
        whole = layers[name].config is None  # beside factors a module may have values
        other = first.setdefault((component, path, whole), name)
        if other != name:
            apart = layers[other].component != layers[name].component
            raise MismatchError(
                f"Each module must have one name in {where!r}, but {path!a} has"
                f" {listed([other, name])}. "
                + (
                    'Say which part the model is, as in {"text_encoder": model}.'
                    if apart
                    else "Keep one of the two."
                )
            )


def _near(
    layers: Mapping[str, AdapterLayer], lost: Mapping[str, str], tables: Mapping[str, Table]
) -> Iterator[tuple[str, str]]:
    for count, (name, component) in enumerate(lost.items()):
        layer, table = layers[name], tables[component]
        names = table.stems if layer.spelling == "stem" else table.dotted
        close = []
        if count < _NEAR and layer.spelling != "index":
            close = difflib.get_close_matches(layer.path or name, names, n=1)
        yield name, close[0] if close else ""
