"""A file of another program, with the names and layers of the models it is to go on."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lora_core._errors import MismatchError, listed
from lora_core._files.finding import Candidates, Found, found_in
from lora_core._formats import Adapter, AdapterLayer
from lora_core._formats.bases import rebased
from lora_core._formats.conforming import changed, conformed, joined
from lora_core._injection import Candidate, walk
from lora_core._layers import Slot

OF_PEFT = ("peft", "diffusers")  # whose convolutions leave a part of the geometry out


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
    found = found_in(file, candidates, where)
    notes = _check(found, file, models, candidates, where, strict=strict)
    layers: dict[str, AdapterLayer] = {}
    names: dict[str, str] = {}
    odd: dict[str, str] = {}
    # factors first: a bias or the base's own values may stand beside them
    for name in sorted(found.resolution.found, key=lambda n: found.layers[n].config is None):
        part, path = found.resolution.found[name]
        layer, candidate = found.layers[name], candidates[part][path]
        dotted = f"{part}.{path}" if part else path
        if dotted in layers:
            rest = changed(layer, candidate.module)
            if rest is not None:
                beside = conformed(name, rest, candidate.module, where)
                layers[dotted] = joined(name, layers[dotted], beside, where)
            continue
        _check_alone(name, candidate, models[part], where)
        if file.format in OF_PEFT and layer.config is not None:
            odd |= left_out(name, candidate.module)
        conform = conformed(name, layer, candidate.module, where)
        layers[dotted] = replace(conform, aliases=_renamed(layer, part))
        names[dotted] = name
    if odd and strict:
        name, what = next(iter(odd.items()))
        raise MismatchError(
            f"A convolution must have no {what} for a file of PEFT's, but {listed(odd)} in"
            f" {where!r} has: PEFT trains its update without, as no change of the weight would be."
            " Pass strict=False for what PEFT merges of it."
        )
    if odd:
        notes.append(f"as PEFT merges it, and not as it runs: {listed(odd)}")
    order = {name: i for i, name in enumerate(file.layers)}
    layers = dict(sorted(layers.items(), key=lambda pair: order.get(names[pair[0]], len(order))))
    base = rebased(file.base, file.layers, names)
    return replace(file, layers=layers, base=base), notes


def _check_alone(name: str, candidate: Candidate, model: nn.Module, where: str) -> None:
    """Refuses a vector that other modules read as well, where the adapter would not reach it."""
    module = candidate.module
    if not isinstance(module, Slot) or module.weight.ndim > 1:
        return
    held = [
        f"{path}.{key}".lstrip(".")
        for path, m in model.named_modules()
        for key, p in m._parameters.items()
        if p is module.owner._parameters[module.parameter]
    ]
    if len(held) > 1:
        raise MismatchError(
            f"A vector must be one module's to be changed, but that of {name!a} in {where!r} is"
            f" {listed(held)}. Untie it, or merge the file with the program that wrote it."
        )


def left_out(name: str, module: nn.Module | Slot) -> dict[str, str]:
    """What of a convolution's geometry PEFT leaves out of its update, by the layer."""
    kernel = getattr(module, "kernel_size", ())
    if not isinstance(kernel, tuple) or max(kernel, default=1) == 1:
        return {}
    dilated = max(getattr(module, "dilation", (1,))) > 1
    padded = getattr(module, "padding_mode", "zeros") != "zeros"
    what = "dilation" if dilated else "padding mode of its own" if padded else ""
    return {name: what} if what else {}


def _renamed(layer: AdapterLayer, part: str) -> tuple[str, ...]:
    """The other names of a module, with the part of a pipeline that the model is here."""
    own = f"{layer.component}." if layer.component else ""
    prefix = f"{part}." if part else ""
    return tuple(prefix + alias.removeprefix(own) for alias in layer.aliases)


def _adaptable(model: nn.Module) -> dict[str, Candidate]:
    return {name: c for c in walk(model) if c.adaptable for name in c.names}


def _check(
    found: Found,
    file: Adapter,
    models: Mapping[str, nn.Module],
    candidates: Candidates,
    where: str,
    *,
    strict: bool,
) -> list[str]:
    """Refuses what has no place, or notes it."""
    resolution = found.resolution
    wanted = [name for names in resolution.elsewhere.values() for name in names]
    parts = sorted(resolution.elsewhere)
    served = {part for part, _ in resolution.found.values()}
    idle = [part for part in models if part not in served]
    lost = resolution.missing
    if not resolution.found:
        every = [
            (f"{part}.{path}".lstrip("."), candidate.raw)
            for part, mine in candidates.items()
            for path, candidate in mine.items()
        ]
        known = [name for name, raw in every if not raw] or [name for name, _ in every]
        raise MismatchError(
            f"A layer of {where!r} must be in the model, but none of its {len(file.layers)} is:"
            f" {listed([_near(n, lost.get(n, '')) for n in file.layers])}; it has {len(known)}:"
            f" {listed(known)}. {_repair(file, models)}"
        )
    own = _own(found)
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
        (list(lost), "not in the model"),
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


def _own(found: Found) -> list[str]:
    """The parts of the file that found their model."""
    return list(dict.fromkeys(found.layers[name].component for name in found.resolution.found))


def _near(name: str, near: str) -> str:
    return f"{name} (near {near})" if near else name
