"""Saving an adapter to a file, and loading one into a model: validate everything, then act."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from lora_core._adapters import adapter_names, layers_with
from lora_core._config import AdapterConfig, check_finite, check_name
from lora_core._errors import (
    AdapterError,
    ConfigError,
    CorruptFileError,
    MergeError,
    MismatchError,
    listed,
)
from lora_core._files.fingerprint import differing, fingerprint
from lora_core._formats import Adapter, AdapterLayer, container, native
from lora_core._injection import Candidate, Graft, graft, modules_of, walk
from lora_core._injection.planning import describe
from lora_core._layers import LoRAMixin, Slot, mixin_for, non_finite, part_shapes, sizes
from lora_core._reports import Report, SaveReport, count

__all__ = ["load", "save"]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    plain: bool = False,
) -> SaveReport:
    """Writes one adapter of `model` to a self-describing `.safetensors` file.

    Atomic, and byte for byte the same for the same adapter, merged or not. Strengths set by
    `scales` are not part of an adapter and are not saved; rank, alpha, dropout and `rslora` are.

    Args:
        model: A model with adapters.
        path: Where to write; an existing file is replaced.
        name: The adapter; None if the model has just one.
        metadata: Entries of your own, strings by string.
        plain: Whether first factors that are subtracted on the fly (``init="pissa"`` or "olora")
            are written as a part of plain factors of twice the rank, which any reader of LoRA
            files understands but which train on as another adapter.

    Raises:
        AdapterError: If there is no such adapter, or several and none named.
        ConfigError: If `metadata` is not made of strings or uses a reserved key, or a factor is
            not finite.
        MergeError: If the base weights are gone (``merge(..., reversible=False)``).
        OSError: If the file can't be written, or one that is read-only is there; an existing one is
            then as it was.

    Example:
        >>> import tempfile, lora_core
        >>> layer = lora_core.LoRALinear(nn.Linear(3, 5), rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(layer, f"{folder}/style.safetensors").parameters
        16
    """
    path = os.fsdecode(path)
    layers = layers_with(model, name)
    if name is None:
        known = adapter_names(layers)
        if len(known) > 1:
            raise AdapterError(
                f"`name` must say which adapter to save, but the model has {listed(known)}."
            )
        name = known[0]
    own = _check_metadata({} if metadata is None else metadata)
    gone = [
        n for n, m in layers.items() if m.lora_merged is not None and m.lora_merged.kept is None
    ]
    if gone:
        raise MergeError(
            f"An adapter must be saved with its base at hand, but {listed(gone)} was merged with"
            " reversible=False. Save before such a merge."
        )
    held = {n: m.lora_stored(name) for n, m in layers.items()}
    hollow = [n for n, parts in held.items() if any(f.is_meta for f in parts.values())]
    if hollow:
        raise ConfigError(
            f"An adapter must have values to be saved, but that of {listed(hollow)} is on the meta"
            " device. Call `model.to_empty(device=...)` and train it first."
        )
    others, file_layers = _other_names(model, layers), {}
    for n, layer in layers.items():
        config, parts = layer.lora_configs[name], cast(Mapping[str, torch.Tensor], held[n])
        if plain:
            config, parts = _plain(n, layer, config, parts)
        file_layers[n] = AdapterLayer(layer.lora_kind, config, parts, others.get(n, ()))
    tensors, entries = native.encode(Adapter(name, file_layers, fingerprint(layers), own))
    try:
        data = container.pack(tensors, entries)
    except container.NonFiniteError:
        raise ConfigError(
            f"An adapter must be finite to be saved, but that of {listed(_bad(held))} holds"
            " NaN or infinity. Go back to an earlier state; lower the learning rate."
        ) from None
    container.write(path, data)
    numbers = sum(t.numel() for t in tensors.values())
    return SaveReport(os.fspath(path), name, tuple(layers), numbers, len(data))


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    scale: float = 1.0,
    strict: bool = True,
    *,
    check_base: bool = True,
) -> Report:
    """Puts the adapter of a file on `model`, in place, all or nothing.

    What the file needs is injected; the adapter is active at strength `scale` beside those that
    are there, and trainable. As with `inject` the host stops training; other adapters keep their
    flags.

    Args:
        model: The model, bare or with other adapters.
        path: A file written by `save`.
        name: What to call the adapter here; None means as it was saved.
        scale: Its strength.
        strict: Whether a layer that the model lacks, or a base model with other weights, is an
            error, or a module that the file knows under several names and the model does not; else
            the rest is loaded, and all are warned of and noted in the report.
        check_base: Whether to compare the weights with those the adapter was trained on.

    Returns:
        What was adapted, with the file's own metadata.

    Raises:
        CorruptFileError: If the file is damaged or of another kind.
        MismatchError: If file and model don't belong together.
        AdapterError: If the name is taken.
        ConfigError: If the name or the scale is out of range.
        MergeError: If a layer that is needed is merged.
        OSError: If the file can't be read.
        Whatever is raised, the model is as it was.

    Example:
        >>> import tempfile, lora_core
        >>> base, bare = nn.Linear(3, 5), nn.Linear(3, 5)
        >>> _ = bare.load_state_dict(base.state_dict())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(lora_core.LoRALinear(base, rank=2), f"{folder}/style.safetensors")
        ...     load(bare, f"{folder}/style.safetensors", name="style").layers[0].rank
        2
    """
    path = os.fsdecode(path)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be an nn.Module, but is {type(model).__name__}.")
    strength = check_finite("scale", scale)
    if name is not None:
        check_name(name)
    file = _read(path)
    name = file.name if name is None else name
    candidates = walk(model)
    found, missing = _resolve(model, candidates, file, os.fspath(path), strict)
    notes = [f"not in the model: {listed(missing)}"] if missing else []
    notes += _compare_aliases(model, file, found, os.fspath(path), strict)
    if check_base:
        notes += _compare(file, found, os.fspath(path), strict)
    for note in notes:
        warnings.warn(f"{os.fspath(path)}: {note}", stacklevel=2)
    grafts = [_graft(candidate, file.layers[n]) for n, candidate in found.items()]
    configs = [g.config for g in grafts]
    report = describe(
        candidates,
        name,
        list(found.values()),
        configs,
        dict.fromkeys(missing, "not in the model"),
        freeze=True,
        notes=tuple(notes),
    )
    graft(modules_of(candidates), name, grafts, strength, others=False)
    training = count([p for p in model.parameters() if p.requires_grad])
    return replace(report, trainable=training, metadata=file.metadata)


def _bad(held: Mapping[str, Mapping[str, torch.Tensor]]) -> list[str]:
    return non_finite({n: list(parts.values()) for n, parts in held.items()})


def _plain(
    name: str, layer: LoRAMixin, config: AdapterConfig, parts: Mapping[str, torch.Tensor]
) -> tuple[AdapterConfig, Mapping[str, torch.Tensor]]:
    """The same update without factors that are subtracted: twice the rank, at the same scale."""
    if not config.subtracted:
        return config, parts
    limit = min(layer.lora_sizes(layer))
    if 2 * config.rank > limit:
        raise ConfigError(
            f"A plain file needs twice the rank, at most min(in_features, out_features) = {limit},"
            f" but that is {2 * config.rank} at {name!r}. Save it without plain=True."
        )
    with torch.no_grad():
        lora_A, lora_B = layer.lora_subtracted(
            *(parts[part] for part in ("lora_A", "lora_B", "lora_A0", "lora_B0"))
        )
    rest = {part: p for part, p in parts.items() if part in ("lora_magnitude", "lora_bias")}
    rank = 2 * config.rank
    plain = replace(
        config,
        rank=rank,
        alpha=config.scale * rank,
        rslora=False,
        init="kaiming",
        reserve_rank=None,
    )
    return plain, {"lora_A": lora_A, "lora_B": lora_B, **rest}


def _other_names(model: nn.Module, layers: Mapping[str, LoRAMixin]) -> dict[str, tuple[str, ...]]:
    """What else the layers are called that have several names, by the name given."""
    seen, shared, left = {model}, [], [model]
    while left:
        for child in left.pop()._modules.values():
            if child is None:
                continue
            if child in seen:
                shared.append(child)
            else:
                seen.add(child)
                left.append(child)
    # a walk takes as long as all the rest, and mostly nothing but an activation is shared
    if not any(isinstance(m, LoRAMixin) for module in shared for m in module.modules()):
        return {}
    names = {c.module: c.names for c in walk(model)}
    return {n: tuple(sorted(set(names[layer]) - {n})) for n, layer in layers.items()}


def _check_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(metadata, Mapping):
        raise ConfigError(
            f"`metadata` must map strings to strings, but is {metadata!r}."
            " Write {'note': 'text'}, for example."
        )
    odd = [k for k, v in metadata.items() if not (_is_text(k) and _is_text(v))]
    if odd:
        raise ConfigError(
            f"`metadata` must map strings to strings, but {listed(odd)} does not."
            " Write other values as text, with json.dumps for example."
        )
    reserved = [key for key in native.RESERVED if key in metadata]
    if reserved:
        raise ConfigError(
            f"`metadata` must leave {listed(native.RESERVED)} to the format, but sets"
            f" {listed(reserved)}. Choose other keys."
        )
    return dict(metadata)


def _is_text(value: object) -> bool:
    # a lone surrogate is a str that no file can hold
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _read(path: str | os.PathLike[str]) -> Adapter:
    tensors, metadata = container.read(path)
    where = os.fspath(path)
    if "lora_core" not in metadata:
        raise CorruptFileError(
            f"{where!r} must be a file written by `lora_core.save`, but has no 'lora_core' entry;"
            f" it holds {len(tensors)} tensors: {listed(tensors)}."
        )
    try:
        about = container.strict_json(metadata["lora_core"])
    except ValueError as error:
        raise CorruptFileError(f"{where!r} must describe its tensors, but {error}.") from error
    return native.decode(tensors, metadata, about, where)


def _resolve(
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
    hollow = [n for n, c in found.items() if c.module.weight.is_meta]
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


def _compare_aliases(
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


def _compare(file: Adapter, found: Mapping[str, Candidate], where: str, strict: bool) -> list[str]:
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
    mixin = mixin_for(module)
    assert mixin is not None
    # a matrix is the same whether it is called or read
    kinds = {"linear", "weight"} if layer.parts["lora_A"].ndim == 2 else {layer.kind}
    if mixin.lora_kind != layer.kind and not {mixin.lora_kind, layer.kind} <= kinds:
        return f"{name} (file a layer of kind {layer.kind!r}, model {mixin.lora_kind!r})"
    theirs = {part: tuple(p.shape) for part, p in layer.parts.items()}
    try:
        mine = part_shapes(module, layer.config)
    except ValueError:  # too few dimensions for this form
        mine = {}
    if mine == theirs:
        return ""
    if layer.kind == "linear":
        sizes_there = (layer.parts["lora_A"].shape[1], layer.parts["lora_B"].shape[0])
        return "{} (file {} -> {}, model {} -> {})".format(name, *sizes_there, *sizes(module))
    part = next((p for p in theirs if theirs[p] != mine.get(p)), "lora_A")
    return f"{name} (file {part} {theirs[part]}, model {mine.get(part)})"


def _graft(candidate: Candidate, layer: AdapterLayer) -> Graft:
    weight: torch.Tensor = candidate.module.weight  # type: ignore[assignment]
    with torch.inference_mode(mode=False):
        parts = {
            # what was read in inference mode could never be trained
            part: nn.Parameter(
                (p.clone() if p.is_inference() else p).to(weight.device),
                requires_grad=not part.endswith("0"),
            )
            for part, p in layer.parts.items()
        }
        return Graft(candidate.module, layer.config, parts)
