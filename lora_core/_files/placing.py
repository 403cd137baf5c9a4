"""A file of another program, with the names and layers of the models it is to go on."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lora_core._errors import MismatchError, listed
from lora_core._formats import Adapter, AdapterLayer
from lora_core._formats.bases import rebased
from lora_core._formats.conforming import apart, conformed, joined
from lora_core._formats.naming import Host, Resolution, resolve
from lora_core._injection import Candidate, walk
from lora_core._layers import mixin_of, peek


def is_placed(file: Adapter, models: Mapping[str, nn.Module]) -> bool:
    """Whether the names of a file are the models' own already, as those that `save` wrote are."""
    if file.format != "lora_core":
        return False
    plain = all(
        layer.config is not None and not layer.component and layer.spelling == "dotted"
        for layer in file.layers.values()
    )
    return plain and ("" in models or all(name in models for name in file.layers))


def placed(
    file: Adapter, models: Mapping[str, nn.Module], where: str, *, strict: bool
) -> tuple[Adapter, list[str]]:
    """The file with the models' own names and layers, and notes of what was left out.

    Args:
        file: What was read.
        models: The models by the part of a pipeline that each is; "" for one that is none.
        where: The file, for messages.
        strict: Whether what has no place is an error.

    Raises:
        MismatchError: If it has, a name means several modules, or a layer doesn't fit.
    """
    candidates = {part: _adaptable(model) for part, model in models.items()}
    hosts = {part: _hosts(found) for part, found in candidates.items()}
    resolution = resolve(file.layers, hosts, where)
    # what is whole may be of a module whose parameters alone can carry an adapter
    bare = {name for name in resolution.missing if file.layers[name].config is None}
    if bare:
        split = [apart(n, x) if n in bare else {n: x} for n, x in file.layers.items()]
        file = replace(file, layers={n: x for each in split for n, x in each.items()})
        resolution = resolve(file.layers, hosts, where)
    notes = _check(resolution, file, models, candidates, where, strict=strict)
    layers: dict[str, AdapterLayer] = {}
    names: dict[str, str] = {}
    for name, (part, path) in resolution.found.items():
        layer = conformed(name, file.layers[name], candidates[part][path].module, where)
        dotted = f"{part}.{path}" if part else path
        if dotted in layers:
            pair = (layers[dotted], layer)
            whole = file.layers[name].config is None
            layer = joined(name, *(pair if whole else pair[::-1]), where)
        layers[dotted] = replace(layer, aliases=_renamed(file.layers[name], part))
        names[dotted] = name
    base = rebased(file.base, file.layers, names)
    return replace(file, layers=layers, base=base), notes


def _renamed(layer: AdapterLayer, part: str) -> tuple[str, ...]:
    """The other names of a module, with the part of a pipeline that the model is here."""
    own = f"{layer.component}." if layer.component else ""
    prefix = f"{part}." if part else ""
    return tuple(prefix + alias.removeprefix(own) for alias in layer.aliases)


def _adaptable(model: nn.Module) -> dict[str, Candidate]:
    return {name: c for c in walk(model) if c.adaptable for name in c.names}


def _hosts(candidates: Mapping[str, Candidate]) -> list[Host]:
    found = []
    for name, candidate in candidates.items():
        mixin = mixin_of(candidate.module)
        found.append(Host(name, mixin.lora_kind, tuple(peek(candidate.module).shape)))
    return found


def _check(
    resolution: Resolution,
    file: Adapter,
    models: Mapping[str, nn.Module],
    candidates: Mapping[str, Mapping[str, Candidate]],
    where: str,
    *,
    strict: bool,
) -> list[str]:
    """Refuses what has no place, or notes it."""
    wanted = [name for names in resolution.elsewhere.values() for name in names]
    parts = sorted(resolution.elsewhere)
    served = {part for part, _ in resolution.found.values()}
    idle = [part for part in models if part not in served]
    lost = resolution.missing
    if not resolution.found:
        known = [
            f"{part}.{path}".lstrip(".")
            for part, mine in candidates.items()
            for path, candidate in mine.items()
            if not candidate.raw
        ]
        raise MismatchError(
            f"A layer of {where!r} must be in the model, but none of its {len(file.layers)} is:"
            f" {listed([_near(n, lost.get(n, '')) for n in file.layers])}; it has {len(known)}:"
            f" {listed(known)}. {_repair(file, models)}"
        )
    own = _own(file, resolution)
    if wanted and strict:
        models_wanted = ", ".join(f"{part!r}: ..." for part in dict.fromkeys([*own, *parts]))
        raise MismatchError(
            f"Every part of {where!r} must have its model, but it also has {len(wanted)} layers"
            f" for {listed(parts)}: {listed(wanted, 2)}. Load it into"
            f" {{{models_wanted}}}, or in part with only={own[0]!r}."
        )
    if lost and strict:
        raise MismatchError(
            f"The model must have every layer of {where!r}, but {len(lost)} of {len(file.layers)}"
            f" are not there: {listed([_near(n, near) for n, near in lost.items()])}. Load it into"
            " the model it was made for, or pass strict=False."
        )
    if idle and strict:
        raise MismatchError(
            f"Every model must have a part in {where!r}, but {listed(idle)} has none; the file has"
            f" {listed([part or '(no part)' for part in own])}. Leave it out."
        )
    said = (
        (wanted, "for a model that is not given"),
        ([*lost], "not in the model"),
        (idle, "without a part in the file"),
    )
    return [f"{what}: {listed(names)}" for names, what in said if names]


def _repair(file: Adapter, models: Mapping[str, nn.Module]) -> str:
    """What to do where nothing of a file is in the models: one may hold those it is for."""
    wanted = dict.fromkeys(layer.component for layer in file.layers.values() if layer.component)
    inside = models[""]._modules if "" in models else {}
    if wanted and all(part in inside for part in wanted):
        given = ", ".join(f"{part!r}: model.{part}" for part in wanted)
        return f"Give the models in it by part: {{{given}}}."
    return "Load it into the model it was made for."


def _own(file: Adapter, resolution: Resolution) -> list[str]:
    """The parts of the file that found their model."""
    return list(dict.fromkeys(file.layers[name].component for name in resolution.found))


def _near(name: str, near: str) -> str:
    return f"{name} (near {near})" if near else name
