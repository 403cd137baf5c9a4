"""Saving an adapter of a model to a file."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from lora_core._adapters import adapter_names, layers_with
from lora_core._config import AdapterConfig
from lora_core._errors import AdapterError, ConfigError, MergeError, listed
from lora_core._files.fingerprint import fingerprint
from lora_core._formats import Adapter, AdapterLayer, container, native
from lora_core._injection import walk
from lora_core._layers import LoRAMixin, non_finite, part_shapes
from lora_core._reports import SaveReport


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
    _check_shapes(layers, name)
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


def _check_shapes(layers: Mapping[str, LoRAMixin], name: str) -> None:
    """Refuses tensors that were replaced by others, which no reader would take."""
    odd = [
        f"{n}.{part} {tuple(p.shape)} (rank {layer.lora_configs[name].rank} has {shape})"
        for n, layer in layers.items()
        for part, shape in part_shapes(layer, layer.lora_configs[name]).items()
        if (p := layer.lora_parts(name)[part]).shape != shape
    ]
    if odd:
        raise ConfigError(
            f"An adapter must have the shapes of its settings to be saved, but has {listed(odd)}."
            " Inject one of that rank instead of replacing tensors."
        )


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
