"""Where the layers of a file belong in live models: found, of the right kind and size, or refused.

A model is walked once; what a file names is looked for among what was found there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lora_core._errors import ConfigError, CorruptFileError, MismatchError, listed
from lora_core._files.fingerprint import differing
from lora_core._formats import Adapter, AdapterLayer
from lora_core._formats.bases import rebased
from lora_core._formats.conforming import apart, changed, conformed, joined
from lora_core._formats.naming import Host, Resolution, resolve
from lora_core._injection import Candidate
from lora_core._layers import LINEAR, Slot, has_bias, kind_named, kind_of, may_be_one, peek


def as_models(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The models by the part of a pipeline that each is; "" for one that is given alone.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(model, nn.Module):
        return {"": unwrapped(model)}
    if not isinstance(model, Mapping) or not model:
        raise ConfigError(
            "`model` must be an nn.Module, or modules by part as in {'unet': unet}, but is"
            f" {type(model).__name__ if not isinstance(model, Mapping) else 'an empty mapping'}."
        )
    odd = [f"{n!a}: {type(m).__name__}" for n, m in model.items() if not _is_part(n, m)]
    if odd:
        raise ConfigError(
            "`model` must map parts of a pipeline to modules, as in {'unet': unet}, but holds"
            f" {', '.join(odd)}."
        )
    parts = dict(model)
    for name, part in model.items():
        parts[name] = unwrapped(part)
    return parts


_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in what replicates or averages it, which puts ``module.`` before every name."""
    while isinstance(model, _WRAPPERS):
        model = model.module
    return model


def _is_part(name: object, model: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and isinstance(model, nn.Module)


def whole(models: Mapping[str, nn.Module]) -> nn.Module:
    """One module for all of them, in which each has its part's name; it changes none of them."""
    if set(models) == {""}:
        return models[""]
    host = nn.Module()
    host._modules.update(models)
    return host


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
    read = any(x.config is not None and kind_named(x.kind).is_read for x in file.layers.values())
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
    file: Adapter,
    models: Mapping[str, nn.Module],
    walked: Sequence[Candidate],
    where: str,
    *,
    strict: bool,
) -> tuple[Adapter, list[str]]:
    """The file with the models' own names and layers, and notes of what was left out.

    Args:
        file: What was read.
        models: The models by the part of a pipeline that each is; "" for one that is none.
        walked: What was found in the `whole` of them.
        where: The file, for messages.
        strict: Whether what has no place is an error.

    Raises:
        MismatchError: If it has, a name means several modules, or a layer doesn't fit.
    """
    candidates = _by_part(walked, models)
    found = found_in(file, candidates, where)
    notes = _check(found, file, models, candidates, where, strict=strict)
    layers: dict[str, AdapterLayer] = {}
    names: dict[str, str] = {}
    odd: dict[str, str] = {}
    # factors first: a bias or the base's own values may stand beside them
    for name in sorted(found.resolution.found, key=lambda n: found.layers[n].config is None):
        part, path = found.resolution.found[name]
        layer, candidate = found.layers[name], candidates[part][path]
        dotted = f"{part}.{path}".strip(".")
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
    if kind_of(module).own_layout:  # which PEFT has no layer for
        return {}
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


def _by_part(
    walked: Sequence[Candidate], models: Mapping[str, nn.Module]
) -> dict[str, dict[str, Candidate]]:
    """What can be adapted, by the part of a pipeline and the name in it."""
    found: dict[str, dict[str, Candidate]] = {part: {} for part in models}
    for candidate in walked:
        for name in candidate.names if candidate.adaptable else ():
            part, _, path = name.partition(".") if "" not in models else ("", "", name)
            found[part][path] = candidate
    return found


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


def matched(
    model: nn.Module,
    candidates: Sequence[Candidate],
    file: Adapter,
    where: str,
    strict: bool,
) -> tuple[dict[str, Candidate], list[str]]:
    """The model's layer for each of the file's, and the names that the model lacks."""
    by_name = {name: c for c in candidates if c.adaptable for name in c.names}
    # in the model's order, which is that of the factors that an optimiser is given
    found = {name: c for name, c in by_name.items() if name in file.layers}
    missing = [name for name in file.layers if name not in by_name]
    if missing and (strict or not found):
        raise MismatchError(
            f"The model must have all {len(file.layers)} layers of {where!r}, but"
            f" {len(missing)} are no layers of this {type(model).__name__}:"
            f" {listed(missing)}; it has {len(by_name)}: {listed(by_name)}."
            + (" Load it into the model it was made for, or pass strict=False." if found else "")
        )
    wrong = [said for n, c in found.items() if (said := _misfit(n, c, file.layers[n]))]
    if wrong:
        raise MismatchError(
            f"Layers must have the sizes that {where!r} was made for, but {len(wrong)} of"
            f" {len(found)} differ: {listed(wrong)}. Load it into the model it was made for."
        )
    hollow = [n for n, c in found.items() if peek(c.module).is_meta]
    if hollow:
        raise MismatchError(
            f"Every layer of {where!r} must be materialised in the model, but {listed(hollow)} is"
            " on the meta device. Call `model.to_empty(device=...)`, load the base, then this."
        )
    hazards = [c for c in found.values() if c.problem]
    if hazards:
        raise MismatchError(
            f"Every layer of {where!r} must be adaptable, but {hazards[0].name!r}"
            f" {hazards[0].problem}"
        )
    if len({id(c.module) for c in found.values()}) < len(found):
        raise MismatchError(
            f"Every layer of {where!r} must be a module of its own, but two names of the file are"
            " one shared module of the model. Untie it, or load into the model it was made for."
        )
    return found, missing


def compare_aliases(
    model: nn.Module, file: Adapter, found: Mapping[str, Candidate], where: str, strict: bool
) -> list[str]:
    """A shared module's adapter works under every name: where the model has two, half is lost."""
    apart = [
        f"{alias} (file {name}, model another or none)"
        for name, c in found.items()
        for alias in file.layers[name].aliases
        if alias not in c.names and not _is_at(model, alias, c.module)
    ]
    if not apart:
        return []
    if strict:
        raise MismatchError(
            f"The model must share the layers that {where!r} shares, but {len(apart)} names are not"
            f" the same module: {listed(apart)}. Load it into the model it was made for, or pass"
            " strict=False to adapt the first name alone."
        )
    return [f"shared in the file, not in the model: {listed(apart)}"]


def _is_at(model: nn.Module, name: str, module: nn.Module | Slot) -> bool:
    """Whether a module is found under a name, of which a walk notes only the first so many."""
    try:
        return model.get_submodule(name) is module
    except AttributeError:
        return False


def compare_base(
    file: Adapter, found: Mapping[str, Candidate], where: str, strict: bool
) -> list[str]:
    modules = {name: found[name].module if name in found else None for name in file.layers}
    try:
        other = differing(file.base, modules)
    except ValueError as error:
        raise CorruptFileError(f"{where!r} must describe its base, but {error}.") from error
    if not other:
        return []
    said = f"base weights differ at {len(other)} of {len(found)} layers: {listed(other, 2)}"
    if strict:
        raise MismatchError(
            f"The model must be the one that {where!r} was trained on, but its {said}."
            " Load that base first, or pass check_base=False."
        )
    return [said]


def _misfit(name: str, candidate: Candidate, layer: AdapterLayer) -> str:
    """How a layer differs from the one that its adapter was made for; "" if it doesn't."""
    module = candidate.module
    kind = kind_of(module)
    if kind.name != layer.kind and not (
        # a matrix is the same whether it is called or read
        layer.parts["lora_A"].ndim == 2 and may_be_one(kind.name, layer.kind)
    ):
        return f"{name} (file a layer of kind {layer.kind!r}, model {kind.name!r})"
    if layer.settings.bias and not has_bias(module):
        return f"{name} (file adds to a bias, model has none there)"
    try:
        mine = kind.shapes(module, layer.settings)
    except ValueError:  # too few dimensions for this form
        mine = {}
    theirs = {part: p.shape for part, p in layer.parts.items()}
    if mine == theirs:
        return ""
    if kind_named(layer.kind) is LINEAR:
        sizes_there = (layer.parts["lora_A"].shape[1], layer.parts["lora_B"].shape[0])
        return "{} (file {} -> {}, model {} -> {})".format(name, *sizes_there, *kind.sizes(module))
    part = next((p for p in theirs if theirs[p] != mine.get(p)), "lora_A")
    return f"{name} (file {part} {tuple(theirs[part])}, model {mine.get(part)})"
