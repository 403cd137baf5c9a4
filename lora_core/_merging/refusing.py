"""Which layers a merge takes, and why others can't be merged."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_core._adapters import layers_with
from lora_core._errors import MergeError, listed
from lora_core._layers import LoRAMixin
from lora_core._merging.swapping import adds_to_bias


def to_merge(model: nn.Module) -> dict[str, LoRAMixin]:
    """The layers with active adapters.

    Raises:
        AdapterError: If the model has no adapter.
        MergeError: If one is merged already or can't be, or if nothing is active.
    """
    everything = layers_with(model, None)
    merged = [n for n, m in everything.items() if m.lora_state.merged is not None]
    if merged:
        raise MergeError(
            f"A layer must be unmerged to be merged, but {listed(merged)} is merged already."
            " Call `unmerge(model)` first."
        )
    layers = {n: m for n, m in everything.items() if m.lora_state.selection.names}
    if not layers:
        raise MergeError(
            f"An adapter must be active to be merged, but none is on {len(everything)} layers."
            " Choose one with `scales(model, <name>=1.0)`."
        )
    patched = [n for n, m in layers.items() if "forward" in vars(m)]
    if patched:
        raise MergeError(
            f"A layer must have its class's forward to be merged, but {listed(patched)} has one"
            " patched onto the instance (offloading hooks do this). Remove that patch, merge, and"
            " put it back."
        )
    mixed = [n for n, m in layers.items() if _is_mixed(m)]
    if mixed:
        raise MergeError(
            f"A weight must be merged at one strength, but {listed(mixed)} has one for each sample."
            " Choose numbers with `scales` first."
        )
    odd = [n for n, m in layers.items() if not _is_stored(m)]
    if odd:
        raise MergeError(
            f"A weight must be a plain Parameter to be merged, but that of {listed(odd)} is"
            " computed (parametrized or quantised). Eject, undo that, and inject again."
        )
    coded = [n for n, m in layers.items() if _is_coded(m.weight)]
    if coded:
        raise MergeError(
            f"A weight must be of plain floating numbers to be merged, but that of {listed(coded)}"
            " is quantised: rounding to its levels would lose the update. Merge into the model it"
            " was made from, or keep this one unmerged."
        )
    return layers


def tied_to_merge(
    model: nn.Module, layers: Mapping[str, LoRAMixin], *, untie: bool, reversible: bool
) -> set[str]:
    """Which of these layers share their weight and are to be untied.

    Raises:
        MergeError: If a parameter is shared that can't be, or isn't to be, untied.
    """
    tied = _tied(model, {n: (*m.lora_kind.home(m), m.weight) for n, m in layers.items()})
    parts = [n for n in tied if layers[n].lora_kind.is_read]
    biases = {
        n: (m, "bias", bias)
        for n, m in layers.items()
        if adds_to_bias(m) and (bias := m._parameters["bias"]) is not None
    }
    shared = {**{n: tied[n] for n in parts}, **_tied(model, biases)}
    if shared:
        names = [f"{name} (also {other})" for name, other in shared.items()]
        raise MergeError(
            f"A parameter must belong to one module to be merged, but {listed(names)} is shared and"
            " would change there too. Untie it, or keep this one unmerged."
        )
    if tied and not (untie and reversible):
        names = [f"{name} (also {other})" for name, other in tied.items()]
        raise MergeError(
            f"A weight must belong to one module to be merged, but {listed(names)} is shared and"
            " would change there too. "
            + ("Pass untie=True." if reversible else "Merge reversibly, with untie=True.")
        )
    return set(tied)


def refuse_hollow(layers: Mapping[str, LoRAMixin]) -> None:
    """Raises if a weight has no values."""
    hollow = [n for n, m in layers.items() if m.weight.is_meta]
    if hollow:
        raise MergeError(
            f"A weight must have values to be merged, but {listed(hollow)} is on the meta device."
            " Call `model.to_empty(device=...)` and load the base first."
        )


def _is_mixed(layer: LoRAMixin) -> bool:
    return any(isinstance(strength, tuple) for strength in layer.lora_state.strengths.values())


def _is_stored(layer: LoRAMixin) -> bool:
    home, key = layer.lora_kind.home(layer)
    return home._parameters.get(key) is not None


def _is_coded(weight: Tensor) -> bool:
    wrapped: bool = is_traceable_wrapper_subclass(weight)
    return (
        (wrapped and type(weight).__name__ != "DTensor")
        or not weight.is_floating_point()
        or weight.dtype.itemsize < 2
    )


# the module that a Parameter is of, its name there, and the values in question
_Place = tuple[nn.Module, str, Tensor]


def _tied(model: nn.Module, places: Mapping[str, _Place]) -> dict[str, str]:
    """Those that share memory with another parameter or a buffer, with its name."""
    if not places:
        return {}
    wanted = {_storage(values) for _, _, values in places.values()}
    holders: dict[int, list[tuple[nn.Module, str, str, Tensor]]] = {}
    for module_name, module in model.named_modules():
        for name, p in (*module._parameters.items(), *module._buffers.items()):
            # a sparse tensor has no storage of its own to share
            if p is not None and p.layout == torch.strided and (key := _storage(p)) in wanted:
                label = f"{module_name}.{name}".lstrip(".")
                holders.setdefault(key, []).append((module, name, label, p))
    found = {}
    for layer, (home, own, values) in places.items():
        for module, name, label, p in holders.get(_storage(values), ()):
            if not (module is home and name == own) and (p is values or _overlap(p, values)):
                found[layer] = label
    return found


def _storage(p: Tensor) -> int:
    # a tensor without memory is tied only to itself
    return (0 if p.is_meta else p.untyped_storage().data_ptr()) or id(p)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the spans of two tensors in one storage meet."""
    (a_first, a_last), (b_first, b_last) = (
        (
            t.data_ptr(),
            t.data_ptr() + t.untyped_storage().nbytes() - t.storage_offset() * t.itemsize,
        )
        if not t.is_contiguous()
        else (t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize)
        for t in (a, b)
    )
    return a_first < b_last and b_first < a_last
