"""Any adapter file into the neutral form, without a model: the format is told key by key."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from lora_core._config import RESERVED, path_of
from lora_core._errors import CorruptFileError, UnsupportedFileError, listed
from lora_core._formats import container, diffusers, loralib, minlora, native
from lora_core._formats.alphas import Alphas, Source
from lora_core._formats.assembling import FLOAT8, Module, layer, number, paired, whole
from lora_core._formats.gathering import gathered
from lora_core._formats.neutral import Adapter, AdapterLayer
from lora_core._formats.opening import Opened, open_file
from lora_core._formats.settings import PeftSettings
from lora_core._layers import non_finite

_SCALE_ONE = "the format, whose scale is 1"
_MISSING = "missing, and so the rank"
_NARROW = "read as float32, as float8 has no arithmetic"


def read(
    path: str | os.PathLike[str],
    *,
    alpha: float | Mapping[str, float] | None = None,
    allow_pickle: bool = False,
    enable_lora: loralib.Enabled = None,
    strict: bool = True,
) -> Adapter:
    """The adapter of a file, or of PEFT's folder, by whichever program it was written.

    Args:
        path: A file, or a folder that PEFT or diffusers wrote.
        alpha: Numerator of the scale where the file stores none: a number, or a dict by the
            file's module names. Required where the format has no rule for it.
        allow_pickle: Whether a pickle may be read, its tensors alone and no code.
        enable_lora: Which projections of a loralib MergedLinear were trained, for all or by name.
        strict: Whether keys of no known format and modules with one factor are errors; else they
            are left out and noted.

    Raises:
        CorruptFileError: If the file is damaged, hostile, or holds NaN or infinity.
        UnsupportedFileError: If it holds something other than LoRA, which the message names.
        ConfigError: If `alpha` or `enable_lora` is missing, or is given where the file decides.
        OSError: If it can't be read.
    """
    opened = open_file(Path(path if type(path) is str else path_of(path)), allow_pickle)
    where = str(opened.path)
    alphas = Alphas(alpha, where)
    merged = loralib.Merged(enable_lora, where)
    if "lora_core" in opened.metadata:
        return _native(opened, alphas, merged)
    modules, wholes, notes = gathered(opened, strict=strict)
    layers, more = _layers(opened, modules, alphas, merged, strict=strict)
    narrow = []
    for family, module in wholes:
        name = module.key.module
        if name in layers:
            name = f"{name}.{next(iter(module.parts))}"
        kind = "difference" if family == "difference" else "values"
        layers[name] = whole(module, kind, name, where)
        if any(tensor.dtype in FLOAT8 for tensor in module.parts.values()):
            narrow.append(name)
    notes += more + ([f"{_NARROW}: {listed(narrow)}"] if narrow else [])
    if not layers:
        raise UnsupportedFileError(
            f"{where!r} must hold LoRA, but none of its modules has a rank. {' '.join(notes)}"
        )
    bad = non_finite({name: list(found.parts.values()) for name, found in layers.items()})
    if bad:
        raise CorruptFileError(
            f"The numbers of {where!r} must be finite, but a factor of {listed(bad)} holds NaN or"
            " infinity. Fetch it again, or train again where the training diverged."
        )
    rest = {k: v for k, v in opened.metadata.items() if k not in native.RESERVED}
    families = {family for module in modules.values() for family in module.families}
    families |= {family for family, _ in wholes}
    return Adapter(
        _name(opened.path), layers, {}, rest, _format(families, opened, layers), tuple(notes)
    )


def _native(opened: Opened, alphas: Alphas, merged: loralib.Merged) -> Adapter:
    where = str(opened.path)
    try:
        about = container.strict_json(opened.metadata["lora_core"])
    except ValueError as error:
        raise CorruptFileError(f"{where!r} must describe its tensors, but {error}.") from error
    file = native.decode(opened.tensors, opened.metadata, about, where)
    for name, found in file.layers.items():
        alphas.choose(name, (found.settings.alpha, "the file"), None)
    alphas.check()
    merged.check([])
    return file


def _layers(
    opened: Opened,
    modules: Mapping[str, Module],
    alphas: Alphas,
    merged: loralib.Merged,
    *,
    strict: bool,
) -> tuple[dict[str, AdapterLayer], list[str]]:
    where = str(opened.path)
    described = _described(opened, modules)
    any_alpha = any("alpha" in m.parts or "scale" in m.parts for m in modules.values())
    layers: dict[str, AdapterLayer] = {}
    empty, narrow, halved = [], [], []
    for name, module in modules.items():
        parts, times, embedding = module.parts, 1.0, False
        if "loralib" in module.families and len(parts) == 2:
            down, up, times = merged.unmerged(name, parts["down"], parts["up"])
            parts |= {"down": down, "up": up}
        if "embedding down" in parts or "embedding up" in parts:
            parts = module.parts = {k.removeprefix("embedding "): t for k, t in parts.items()}
            embedding = True
        if "minLoRA" in module.families and len(parts) == 2:
            embedding = minlora.is_embedding(parts["down"], parts["up"])
            if embedding:
                parts |= {half: parts[half].T for half in ("down", "up")}
        if not (strict or {"down", "up"} <= parts.keys()):
            halved.append(f"{name} (only {', '.join(parts)})")
            alphas.choose(name, None, (1.0, ""))  # one that is given for it is no mistake
            continue
        pair = paired(name, parts, where)
        settings = described.get(module.key.component)
        rank = pair[0].shape[0]
        stored = _stored(module, rank, settings, where)
        value, source = alphas.choose(
            name, stored, _default(module, rank, settings, any_alpha=any_alpha or bool(described))
        )
        if not rank:
            empty.append(name)
            continue
        if any(tensor.dtype in FLOAT8 for tensor in parts.values()):
            narrow.append(name)
        ours = settings if "alpha" not in parts else None
        layers[name] = layer(
            module,
            pair,
            (value * times, source),
            where,
            rslora=ours is not None and ours.rslora,
            embedding=embedding,
            transposed=ours is not None and ours.transposed,
        )
    alphas.check()
    merged.check([name for name, module in modules.items() if "loralib" in module.families])
    return layers, _notes(layers, empty, narrow, halved, described)


def _described(opened: Opened, modules: Mapping[str, Module]) -> dict[str, PeftSettings]:
    """The settings by component: metadata decides only where the keys are those it is of."""
    where, found = str(opened.path), {}
    if opened.settings is not None:
        found = {"": opened.settings}
    elif any(m.families & {"A/B"} and "alpha" not in m.parts for m in modules.values()):
        found = diffusers.settings(opened.metadata, where)
    paths = [module.key.path or name for name, module in modules.items()]
    for settings in found.values():
        settings.check_work(paths, where)
    return found


def _stored(module: Module, rank: int, settings: PeftSettings | None, where: str) -> Source | None:
    name = module.key.module
    if "scale" in module.parts:
        return number(name, module.parts["scale"], where) * rank, "the file's scale"
    if "alpha" in module.parts:
        return number(name, module.parts["alpha"], where), "the file"
    return settings.alpha_of(module.key.path or name) if settings is not None else None


def _default(
    module: Module, rank: int, settings: PeftSettings | None, *, any_alpha: bool
) -> Source | None:
    """The alpha where the file has none; None where the format has no rule for it."""
    if settings is not None:
        return settings.default()
    families = module.families
    if families & {"kohya", "dotted"}:
        return float(rank), _MISSING
    if families & {"diffusers", "cloneofsimo"} or (
        "A/B" in families and (module.key.component or any_alpha)
    ):
        return float(rank), _MISSING if any_alpha else _SCALE_ONE
    return None


def _notes(
    layers: Mapping[str, AdapterLayer],
    empty: list[str],
    narrow: list[str],
    halved: list[str],
    described: Mapping[str, PeftSettings],
) -> list[str]:
    zero = [name for name, found in layers.items() if found.settings.alpha == 0]
    unknown = sorted({key for settings in described.values() for key in settings.unknown})
    said = (
        (zero, "alpha is 0, so that these add nothing (some programs read it as the rank)"),
        (empty, "left out, modules of rank 0"),
        (halved, "left out, modules without both factors"),
        (narrow, _NARROW),
        (unknown, "settings that this reader doesn't know"),
    )
    notes = [f"{what}: {listed(names)}" for names, what in said if names]
    defaults = {s.default()[1] for s in described.values() if s.alpha is None}
    return notes + [f"alpha is {said}" for said in sorted(defaults)]


def _format(families: set[str], opened: Opened, layers: Mapping[str, AdapterLayer]) -> str:
    if families & {"kohya", "difference"}:
        own = any(
            name.startswith("lycoris_")
            or found.config is None
            or set(found.parts) & {"lora_mid", "lora_magnitude", "lora_in_magnitude"}
            for name, found in layers.items()
        )
        by = opened.metadata.get("ss_network_module", "").startswith("lycoris")
        return "lycoris" if own or by else "kohya"
    if families == {"dotted"}:
        return "dotted kohya"
    if families & {"diffusers", "A/B"}:
        known = diffusers.ENTRY in opened.metadata or "diffusers" in families
        return "diffusers" if known or any(f.component for f in layers.values()) else "A/B"
    return min(families).removesuffix(" values").lower()


def _name(path: Path) -> str:
    """A name for an adapter whose file holds none: the file's own, or its folder's."""
    general = path.stem in ("adapter_model", "pytorch_lora_weights", "pytorch_lora_weights_bin")
    stem = path.resolve().parent.name if general else path.stem
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_")[:63] or "default"
    return f"{name}_" if name in RESERVED else name
