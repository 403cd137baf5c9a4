"""Which adapters are on a model, and how they stand."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import nn

from lora_core._errors import (
    AdapterError,
    ConfigError,
    TargetError,
    UnsupportedLayerError,
    listed,
)
from lora_core._layers import CHILD, LoRAMixin, Strength, idle, parts_of, trained_parts
from lora_core._reports import AdapterSummary, Summary, count


def clean(name: str) -> str:
    """A module's dotted name without what `torch.compile`, or an adapted parameter, puts into it.

    Example:
        >>> clean("_orig_mod.attn.lora_at_q_proj_weight"), clean("attn.out_proj.lora_at")
        ('attn.q_proj_weight', 'attn.out_proj')
    """
    if "_orig_mod" not in name and CHILD not in name:
        return name
    parts = (part for part in name.split(".") if part not in ("_orig_mod", CHILD))
    return ".".join(part.removeprefix(f"{CHILD}_") for part in parts)


@lru_cache
def glob(pattern: str) -> re.Pattern[str]:
    """A glob over a dotted name, or over any tail of it that begins after a dot.

    Example:
        >>> bool(glob("attn.*").fullmatch("blocks.0.attn.to_q")), bool(glob("to").fullmatch("to_q"))
        (True, False)
    """
    return re.compile(rf"(?s:.*\.)?(?:{fnmatch.translate(pattern)})")


def by_pattern(what: str, values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The value of each name: that of the first pattern which matches it.

    Args:
        what: What has the values, for messages.
        values: By glob.
        names: The dotted names.

    Raises:
        ConfigError: If a pattern is no string.
        TargetError: If a pattern matches nothing, or nothing matches a name.
    """
    odd = [pattern for pattern in values if not isinstance(pattern, str)]
    if odd or not values:
        raise ConfigError(
            f"`{what}` must map globs to numbers, as in {{'*mid*': 0.3, '*': 1.0}}, but holds"
            f" {listed(odd) if odd else 'nothing'}."
        )
    found: dict[str, Any] = {}
    used: set[str] = set()
    names = list(names)
    for name in names:
        hits = [pattern for pattern in values if glob(pattern).fullmatch(name)]
        used.update(hits)
        if hits:
            found[name] = values[hits[0]]
    idle = [pattern for pattern in values if pattern not in used]
    if idle:
        raise TargetError(
            f"`{what}` must match a layer with each pattern, but {idle[0]!r} matches none of"
            f" {len(names)}: {listed(names)}."
        )
    left = [name for name in names if name not in found]
    if left:
        raise TargetError(
            f"`{what}` must have a value for every layer, but none for {listed(left)}. Add '*' as"
            " the last pattern."
        )
    return found


def adapted_layers(model: nn.Module) -> dict[str, LoRAMixin]:
    """The layers of `model` that carry adapters, each once, by their first dotted name."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be an nn.Module, but is {type(model).__name__}.")
    return {clean(n): m for n, m in model.named_modules() if isinstance(m, LoRAMixin)}


def adapter_names(layers: Mapping[str, LoRAMixin]) -> list[str]:
    """The names of all adapters on these layers, in order of arrival."""
    configs = (layer.lora_state.configs for layer in layers.values())
    return list(dict.fromkeys(name for found in configs for name in found))


def without_base(layers: Mapping[str, LoRAMixin]) -> list[str]:
    """Those whose original weights are gone: merged with ``reversible=False``."""
    merged = {n: m.lora_state.merged for n, m in layers.items()}
    return [n for n, state in merged.items() if state is not None and state.kept is None]


def layers_with(model: nn.Module, name: str | None) -> dict[str, LoRAMixin]:
    """The layers that carry adapter `name`, or any adapter where it is None.

    Raises:
        AdapterError: If there are none.
    """
    layers = adapted_layers(model)
    if not layers:
        raise AdapterError(
            f"The model must have an adapter, but this {type(model).__name__} has none."
            " Call `inject` or `load` first."
        )
    found = {n: m for n, m in layers.items() if name is None or name in m.lora_state.configs}
    if not found:
        raise AdapterError(
            f"`name` must be an adapter of the model, but is {name!r};"
            f" it has {listed(adapter_names(layers))}."
        )
    return found


def gone(layers: Mapping[str, LoRAMixin], name: str | None = None) -> list[str]:
    """The layers that an adapter was put on and that are no more, replaced by others perhaps.

    Args:
        layers: Those that it is on.
        name: The adapter; None means all.
    """
    found: list[str] = []
    seen: set[object] = set()
    last = None
    for layer in layers.values():
        slots = layer.lora_state.slots
        if slots is last:  # as that of most layers is
            continue
        last = slots
        for adapter, members in slots.items():
            if members not in seen and name in (None, adapter):
                seen.add(members)
                found += members.gone(layers)
    return found


def check_known(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Refuses names that are no adapter of the model; `what` is the function that got them."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise AdapterError(
            f"`{what}` must name adapters of the model, but got {listed(unknown)};"
            f" it has {listed(known)}."
        )


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The factors of one adapter, or of all: what an optimiser should be given.

    Those that are frozen now are among them: an optimiser passes over what has no gradient, and
    goes on working when `trainable` chooses other adapters.

    Args:
        model: A model with adapters.
        name: The adapter; None means all.

    Returns:
        Each Parameter once, `lora_A` before `lora_B`, in the order of the model.

    Raises:
        AdapterError: If there is no such adapter, or none at all.
        UnsupportedLayerError: If a layer was placed by hand where nothing would call it, so that
            its factors would never get a gradient.

    Example:
        >>> from lora_core import LoRALinear
        >>> [tuple(p.shape) for p in parameters(LoRALinear(nn.Linear(3, 5), rank=2))]
        [(2, 3), (5, 2)]
    """
    layers = layers_with(model, name)
    uncalled = [
        f"{n}.out_proj".lstrip(".")
        for n, m in model.named_modules()
        if isinstance(m, nn.MultiheadAttention) and isinstance(m.out_proj, LoRAMixin)
    ]
    if uncalled:
        raise UnsupportedLayerError(
            f"An adapted layer must be called to train, but {listed(uncalled)} is not:"
            " nn.MultiheadAttention reads its weight itself. Put the plain layer back."
        )
    return [
        part
        for layer in layers.values()
        for adapter in layer.lora_state.configs
        if name in (None, adapter)
        for part in trained_parts(layer, adapter).values()
    ]


def summary(model: nn.Module) -> Summary:
    """How the adapters of a model stand; changes nothing and prints as a table."""
    layers = adapted_layers(model)
    adapters = []
    for name in adapter_names(layers):
        mine = {n: m for n, m in layers.items() if name in m.lora_state.configs}
        configs = {m.lora_state.configs[name] for m in mine.values()}
        factors = [part for m in mine.values() for part in parts_of(m, name).values()]
        strengths = (_strengths(m)[name] for m in mine.values() if name in _strengths(m))
        adapters.append(
            AdapterSummary(
                name=name,
                layers=tuple(mine),
                ranks=tuple(sorted({config.rank for config in configs})),
                scales=tuple(sorted({config.scale for config in configs})),
                parameters=count(factors),
                nbytes=sum(p.numel() * p.element_size() for p in factors),
                strengths=tuple(dict.fromkeys(strengths)),
                trainable=any(p.requires_grad for p in factors),
                merged=any(
                    state is not None and name in state.strengths
                    for state in (m.lora_state.merged for m in mine.values())
                ),
                idle=tuple(idle(mine, name)),
                gone=tuple(gone(mine, name)),
                unreached=tuple(_unreached(mine, name)),
            )
        )
    everything = list(model.parameters())
    return Summary(
        adapters=tuple(adapters),
        trainable=count([p for p in everything if p.requires_grad]),
        total=count(everything),
    )


def _unreached(layers: Mapping[str, LoRAMixin], name: str) -> list[str]:
    """The layers whose factors train and have no gradient, where others' have one."""
    found: list[str] = []
    reached = False
    for n, layer in layers.items():
        trains = [p for p in trained_parts(layer, name).values() if p.requires_grad]
        has = any(p.grad is not None for p in trains)
        reached = reached or has
        if trains and not has:
            found.append(n)
    return found if reached else []


def _strengths(layer: LoRAMixin) -> Mapping[str, Strength]:
    """The strengths that a layer's output shows: those merged in, or those selected."""
    state = layer.lora_state
    return state.strengths if state.merged is None else state.merged.strengths
