"""Saving an adapter of a model to a file."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lora_core._adapters import (
    adapter_names,
    clean,
    gone,
    layers_with,
    parameters,
    without_base,
)
from lora_core._config import path_of
from lora_core._errors import AdapterError, ConfigError, MergeError, listed
from lora_core._files.fingerprint import fingerprint
from lora_core._files.offload import at_hand, is_offloaded
from lora_core._files.place import OF_PEFT, as_models, left_out, whole
from lora_core._formats import Adapter, AdapterLayer, write
from lora_core._formats.folding import without_first
from lora_core._formats.peft import CONFIG, WEIGHTS
from lora_core._injection import walk
from lora_core._layers import LoRAMixin, idle, parts_of, stored_parts, zeros
from lora_core._reports import SaveReport, idleness


def save(
    model: nn.Module | Mapping[str, nn.Module],
    path: str | os.PathLike[str],
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    plain: bool = False,
    format: str = "lora_core",  # noqa: A002  # what everyone calls it
    fold: bool = False,
    base: str | None = None,
    spelling: str | None = None,
    strict: bool | None = None,
) -> SaveReport:
    """Writes one adapter of `model` to a file.

    Atomic, and byte for byte the same for the same adapter, merged or not. Strengths set by
    `scales` are not part of an adapter and are not saved; rank, alpha, dropout and `rslora` are.
    Whatever a format has no place for is refused, never dropped. The receipt names the layers on
    which the adapter is as it began, and adds nothing, and what else of the model trains, as a head
    that was let train: it is not in the file.

    Args:
        model: A model with adapters, or the models of a pipeline by the part that each is, as in
            ``{"unet": unet, "text_encoder": encoder}``.
        path: Where to write; an existing file is replaced.
        name: The adapter; None if the model has just one.
        metadata: Entries of your own, strings by string.
        plain: Whether first factors that are subtracted on the fly (``init="pissa"`` or "olora")
            are written as a part of plain factors of twice the rank, which any reader of LoRA
            files understands but which train on as another adapter.
        format: "lora_core", self-describing; or what other programs read: "kohya" (A1111, ComfyUI,
            Civitai), "lycoris", "peft" (a folder) or "diffusers". All but "lora_core" and "peft"
            are for pipelines: name the part, as in ``{"unet": unet}``.
        fold: Whether to multiply the scale into `lora_B`, and to express in plainer terms what the
            format has no place for, where that keeps the function.
        base: For kohya's metadata and names: "sd_v1", "sd_v2", "sd_v2_v" or "sdxl_base_v1-0"; None
            tells it by the modules.
        spelling: How kohya's keys spell a UNet: "diffusers", "ldm", or None for the usual one.
        strict: True to refuse where something else trains too; False to save what is left of an
            adapter whose layers were replaced, which is refused else.

    Raises:
        AdapterError: If there is no such adapter, or several and none named, or layers that it was
            put on are gone.
        ConfigError: If `metadata` is not made of strings or uses a reserved key, a factor is not
            finite, or the format can't hold the adapter.
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
    path = path_of(path)
    models = as_models(model)
    found, lost = _adapter_of(models, name, plain=plain, strict=strict is not False)
    others = _beside(whole(models))
    if others and strict:
        raise ConfigError(
            f"All that trains must be in the file where `strict` is True, but {listed(others)}"
            " trains too. Freeze it, or save it with the model's own state dict."
        )
    if format in OF_PEFT:
        _check_geometry(model, found.name, format)
    written = write(found, path, format, fold=fold, base=base, metadata=metadata, spelling=spelling)
    numbers = sum(t.numel() for t in written.tensors.values())
    folder = written.config is not None
    files = [Path(path, n) for n in (WEIGHTS[0], CONFIG)] if folder else [Path(path)]
    nbytes = sum(file.stat().st_size for file in files)
    layers, notes, asleep = tuple(found.layers), [*written.notes, *lost], []
    if others:
        notes.append(f"not in the file, though it trains: {listed(others)}")
    ups = {n: layer.parts["lora_B"] for n, layer in found.layers.items()}
    moved = any(layer.settings.subtracted for layer in found.layers.values())
    if moved or zeros(ups):  # mostly nothing is, and a walk takes as long as all the rest
        asleep = idle(layers_with(whole(models), found.name), found.name)
    if asleep:
        notes.append(idleness(found.name, layers, asleep))
    return SaveReport(path, found.name, layers, numbers, nbytes, tuple(notes))


def adapter_of(
    model: nn.Module | Mapping[str, nn.Module], name: str | None = None, *, plain: bool = False
) -> Adapter:
    """An adapter of a model as a value, for `combine`, `resize` or `write`.

    Its tensors are those on the model: they change as it trains.

    Args:
        model: A model with adapters, or models by part, as for `save`.
        name: The adapter; None if the model has just one.
        plain: Whether first factors that are subtracted are a part of plain ones, as for `save`.

    Raises:
        AdapterError: If there is no such adapter, or several and none named.
        ConfigError: If it has no values, or tensors of other shapes than its settings say.
        MergeError: If the base weights are gone (``merge(..., reversible=False)``).

    Example:
        >>> from lora_core import LoRALinear
        >>> adapter_of(LoRALinear(nn.Linear(3, 5), rank=2)).name
        'default'
    """
    return _adapter_of(as_models(model), name, plain=plain)[0]


def _beside(host: nn.Module) -> list[str]:
    """The parameters that train and are of no adapter."""
    if not _trains_beside(host):  # mostly nothing does, and a walk by names takes far longer
        return []
    mine = {id(p) for p in parameters(host)}
    found = [(n, p) for n, p in host.named_parameters() if p.requires_grad and id(p) not in mine]
    return [clean(n) for n, _ in found]


def _trains_beside(host: nn.Module) -> bool:
    seen: set[nn.Module] = set()
    left = [host]
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        for key, p in module._parameters.items():
            if p is not None and p.requires_grad and key[:5] != "lora_":
                return True
        if module._modules:
            left += [child for child in module._modules.values() if child is not None]
    return False


def _adapter_of(
    models: Mapping[str, nn.Module], name: str | None, *, plain: bool, strict: bool = True
) -> tuple[Adapter, list[str]]:
    """The adapter, and what of it is gone, in a sentence, where that is no error."""
    host = whole(models)
    layers = layers_with(host, name)
    if name is None:
        known = adapter_names(layers)
        if len(known) > 1:
            raise AdapterError(
                f"`name` must say which adapter is meant, but the model has {listed(known)}."
            )
        name = known[0]
    lost = gone(layers, name)
    if lost and strict:
        raise AdapterError(
            f"An adapter must be on every layer that it was put on to be saved, but {listed(lost)}"
            f" of {name!r} is gone or was replaced, and its factors with it. Resize or replace"
            " layers before `inject`; `save(..., strict=False)` saves the rest."
        )
    bare = without_base(layers)
    if bare:
        raise MergeError(
            f"An adapter must be saved with its base at hand, but {listed(bare)} was merged with"
            " reversible=False. Save before such a merge."
        )
    held = _held(layers, name)
    hollow = [n for n, parts in held.items() if any(f.is_meta for f in parts.values())]
    away = [n for n in hollow if is_offloaded(layers[n])]
    if away:
        raise ConfigError(
            f"An adapter must have its values at hand to be saved, but that of {listed(away)} is"
            " offloaded to where they can't be read. Take the hooks off first, with"
            " `accelerate.hooks.remove_hook_from_module(model, recurse=True)`."
        )
    if hollow:
        raise ConfigError(
            f"An adapter must have values to be saved, but that of {listed(hollow)} is on the meta"
            " device. Call `model.to_empty(device=...)` and train it first."
        )
    others, found = _other_names(host, layers), {}
    for n, layer in layers.items():
        part, dot, path = n.partition(".") if "" not in models else ("", "", "")
        found[n] = AdapterLayer(
            layer.lora_kind.name,
            layer.lora_state.configs[name],
            held[n],
            others.get(n, ()),
            component=part if dot else "",
            path=path,
            alpha_from="",  # there is no file
        )
        if plain and found[n].settings.subtracted:
            found[n] = without_first(found[n])
    notes = [f"gone or replaced, and so not in the file: {listed(lost)}"] if lost else []
    return Adapter(name, found, fingerprint(layers)), notes


def _check_geometry(
    model: nn.Module | Mapping[str, nn.Module],
    name: str,
    format: str,  # noqa: A002
) -> None:
    """Refuses convolutions that PEFT would run as something else than they are here."""
    odd: dict[str, str] = {}
    for n, layer in layers_with(whole(as_models(model)), name).items():
        odd |= left_out(n, layer)
    if odd:
        raise ConfigError(
            f"A convolution must have no {next(iter(odd.values()))} to be saved as {format!r}, but"
            f" {listed(odd)} has: PEFT's forward leaves it out. Pass format='lora_core', or"
            " 'lycoris'."
        )


def _held(layers: Mapping[str, LoRAMixin], name: str) -> dict[str, Mapping[str, Tensor]]:
    """The tensors to be stored; refuses those replaced by others, which no reader would take."""
    held: dict[str, Mapping[str, Tensor]] = {}
    odd = []
    for n, layer in layers.items():
        config, parts = layer.lora_state.configs[name], parts_of(layer, name)
        for part, shape in layer.lora_kind.shapes(layer, config).items():
            if parts[part].shape != shape:
                has = tuple(parts[part].shape)
                odd.append(f"{n}.{part} {has} (rank {config.rank} has {shape})")
        held[n] = parts
        if parts["lora_A"].is_meta:
            held[n] = {part: at_hand(layer, f"{part}_{name}", p) for part, p in parts.items()}
    if odd:
        raise ConfigError(
            f"An adapter must have the shapes of its settings to be saved, but has {listed(odd)}."
            " Resize a layer before it is adapted, and inject a rank instead of replacing tensors."
        )
    for n, layer in layers.items():
        config = layer.lora_state.configs[name]
        if config.room > config.rank:
            held[n] = _cut(n, held[n], stored_parts(layer, name))
    return held


def _cut(
    name: str, whole: Mapping[str, Tensor], used: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The tensors without ranks that are only reserved; refuses where those hold numbers."""
    lost = [p for p, t in used.items() if int(whole[p].count_nonzero()) > int(t.count_nonzero())]
    if "lora_B" in lost and len(lost) > 1:  # one of two alone adds nothing
        raise ConfigError(
            f"Ranks that are only reserved must stay zero to be saved, but those of {listed(lost)}"
            f" at {name!r} hold numbers. Inject an adapter of that rank instead."
        )
    return used


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
