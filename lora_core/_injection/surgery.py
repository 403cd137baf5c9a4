"""The acting half of injection: one transaction that attaches, and its inverse."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import nn

from lora_core._adapters import join, layers_with, strengths_over
from lora_core._config import AdapterConfig, Settings, with_settings
from lora_core._errors import MergeError, UnsupportedLayerError, listed
from lora_core._injection.guards import is_guarded
from lora_core._injection.planner import draw_up
from lora_core._injection.rollback import all_or_nothing, freeze_module, thaw
from lora_core._injection.samples import sampled
from lora_core._injection.targets import Patterns
from lora_core._layers import (
    FROZEN,
    LoRAMixin,
    LoRAWeight,
    Members,
    Slot,
    Strength,
    WeightReader,
    attach,
    change,
    detach,
    drawing,
    exchange,
    factor_names,
    fresh_parts,
    has_our_class,
    kind_of,
    lock,
    parts_of,
    refuse_pinned,
    select,
)
from lora_core._reports import EjectReport, Report, count


@dataclass(frozen=True, slots=True)
class Graft:
    """An adapter's tensors for one layer, ready to be attached."""

    module: nn.Module | Slot
    config: AdapterConfig
    parts: Mapping[str, nn.Parameter]
    name: str = ""


@with_settings
def inject(
    model: nn.Module,
    rank: int = 4,
    alpha: float | None = None,
    *,
    targets: Patterns | None = None,
    exclude: Patterns = (),
    rules: dict[str, dict[str, Any]] | None = None,
    name: str = "default",
    samples: Iterable[Any] | None = None,
    freeze: bool = True,
    **settings: Unpack[Settings],
) -> Report:
    """Puts a fresh adapter on layers of `model`, in place, all or nothing; changes no output.

    Takes the arguments of `plan` and returns its report. With ``init="eva"`` the model is first run
    on `samples`, each a tensor, a tuple of arguments or a mapping of keywords. The adapter joins
    the active ones at strength 1. With `freeze` everything else stops training and drops its
    gradient, what was frozen before too (an optimiser would go on stepping with it); `eject` gives
    every flag back, but no gradient. Without it nothing of that changes.

    The first factors are drawn from one number of the global generator and the layer's name:
    the same seed gives a layer the same bits whatever else is adapted.

    Raises:
        TargetError: If a pattern or a rule matches nothing, or nothing is left.
        ConfigError: If a setting is out of range for a chosen layer.
        AdapterError: If the name is taken.
        UnsupportedLayerError: If a pattern asks for a layer that can't be adapted.
        MergeError: If a chosen layer is merged.

    Example:
        >>> block = nn.ModuleDict({"to_q": nn.Linear(8, 8), "mlp": nn.Linear(8, 8)})
        >>> inject(block, rank=2).trainable
        32
        >>> [n for n, p in block.named_parameters() if p.requires_grad]
        ['to_q.lora_A_default', 'to_q.lora_B_default']
    """
    report, chosen, modules = draw_up(
        model,
        {"rank": rank, "alpha": alpha, **settings},
        targets=targets,
        exclude=exclude,
        rules={} if rules is None else rules,
        name=name,
        freeze=freeze,
    )
    refuse_pinned("inject", modules)
    covariances = sampled(model, report, chosen, samples)
    seed = int(torch.randint(2**31, (), device="cpu").item())
    generator = torch.Generator("cpu")
    grafts = []
    with drawing():
        for layer, candidate in zip(report.layers, chosen, strict=True):
            # the generator takes 32 bits of a seed and drops the rest
            generator.manual_seed(seed ^ zlib.crc32(layer.name.encode()))
            covariance, module = covariances.get(layer.name), candidate.module
            kind, config, shapes = candidate.kind, layer.config, layer.shapes
            assert kind is not None
            parts = fresh_parts(module, kind, config, generator, covariance, shapes)
            grafts.append(Graft(module, layer.config, parts, layer.name))
    graft(modules, name, grafts, freeze=freeze)
    return report


def graft(
    modules: Sequence[nn.Module],
    name: str,
    grafts: Sequence[Graft],
    strength: float = 1.0,
    *,
    freeze: bool = True,
    others: bool = True,
) -> None:
    """Attaches one adapter to layers and freezes the rest, entirely or not at all.

    Args:
        modules: Every module of the model, its root first.
        name: The adapter's name.
        grafts: What to attach to which of them.
        strength: The adapter's strength.
        freeze: Whether to freeze what is there.
        others: Whether that includes the factors of other adapters.
    """
    with_parameters = [m for m in modules if m._parameters]
    with lock(), all_or_nothing(modules[0], with_parameters):
        for module in with_parameters if freeze else ():
            freeze_module(module, name, others=others)
        members = Members()
        slot, alike = {name: members}, dict[Any, Any]()
        layers = []
        for g in grafts:
            layer = attach(g.module, name, g.config, g.parts, strength, slot, alike)
            layers.append((g.name, layer))
        members.join(layers)


def regraft(
    modules: Sequence[nn.Module], name: str, grafts: Sequence[Graft], strength: float | None
) -> None:
    """Puts another adapter in the place of one, entirely or not at all.

    Layers that only the old one had lose it, and those that only the new one has get it. What
    trains stays as it is, of the host and of other adapters too.

    Args:
        modules: Every module of the model, its root first.
        name: The adapter's name, which is on the model.
        grafts: What it is to be, layer by layer.
        strength: Its strength; None for the one that it has.
    """
    holders = [m for m in modules if isinstance(m, LoRAMixin) and name in m.lora_state.configs]
    like, new = holders[0], {id(g.module) for g in grafts}
    slot, usual = {name: like.lora_state.slots[name]}, like.lora_state.strengths.get(name)
    _check_samples(holders, name, grafts, strength)
    training = any(p.requires_grad for m in holders for p in parts_of(m, name).values())
    # for the whole: a choice, or a pin, comes before or after
    with lock(), all_or_nothing(modules[0], [m for m in modules if m._parameters]):
        for g in grafts:
            if isinstance(g.module, LoRAMixin) and name in g.module.lora_state.configs:
                _pass_on_flags(g.module, g.module, name, g.parts)
                exchange(g.module, name, g.config, g.parts)
                if strength is not None:
                    chosen = {**g.module.lora_state.strengths, name: strength}
                    change(g.module, selection=select(g.module, chosen))
                continue
            for p in g.parts.values():
                p.requires_grad_(training and p.requires_grad)
            layer = attach(
                g.module, name, g.config, g.parts, usual if strength is None else strength, slot
            )
            _pass_on_flags(layer, like, name, g.parts)
            join(layer, name, like)
            slot[name].join([(g.name, layer)])
        for layer in [m for m in holders if id(m) not in new]:
            detach(layer, name)


def _check_samples(
    holders: Sequence[LoRAMixin], name: str, grafts: Sequence[Graft], strength: float | None
) -> None:
    """Refuses what would be of one weight for all samples where each has its own strength."""
    strengths: list[Strength | None] = [s for m in holders for s in strengths_over(m, name)]
    if strength is None:
        strengths += [m.lora_state.strengths.get(name) for m in holders]
    if not any(isinstance(s, tuple) for s in strengths):
        return
    shared = [g for g in grafts if kind_of(g.module).is_read or g.config.read or g.config.dora]
    if shared:
        kinds = {"DoRA" if g.config.dora else "a parameter that is read" for g in shared}
        raise UnsupportedLayerError(
            f"A strength per sample must go to layers that see samples, but {name!r} has one, and"
            f" the new file has {' and '.join(sorted(kinds))} on {len(shared)} layers. Choose one"
            " number with `scales` first."
        )


def _pass_on_flags(
    layer: LoRAMixin, like: LoRAMixin, name: str, parts: Mapping[str, nn.Parameter]
) -> None:
    """Lets whatever keeps an adapter's factors frozen on one layer keep these frozen as well."""
    record = dict(vars(layer).get(FROZEN, {}))
    old = factor_names([name])
    for holder, found in vars(like).get(FROZEN, {}).items():
        flags = {key: flag for key, flag in found.items() if key in old}
        if not flags:
            continue
        kept = {key: flag for key, flag in record.get(holder, {}).items() if key not in old}
        mine = [f"{part}_{name}" for part in parts if not part.endswith("0")]
        usual = any(flags.values())
        record[holder] = kept | {key: flags.get(key, usual) for key in mine}
    if record:
        vars(layer)[FROZEN] = record


def eject(model: nn.Module, name: str | None = None) -> EjectReport:
    """Takes an adapter (None: all of them) off `model`, in place, and frees its memory.

    The host's classes, keys, attributes and bits are then those it had before, and every
    `requires_grad` flag is as if the adapter had never come. Ejecting a part of what was injected
    restores that part; `eject` on the whole then restores what stood above it.

    Raises:
        AdapterError: If there is no such adapter, or none at all.
        MergeError: If the adapter is merged reversibly; one merged with ``reversible=False`` is
            taken off and its update stays in the weights.

    Example:
        >>> block = nn.ModuleDict({"to_q": nn.Linear(8, 8)})
        >>> _ = inject(block, rank=2)
        >>> print(eject(block))
        ejected default: 1 layers, 32 parameters; 2 requires_grad flags restored
        >>> type(block["to_q"]).__name__
        'Linear'
    """
    modules = list(model.modules())
    orphans = {
        adapter: None
        for module in modules
        for adapter in vars(module).get(FROZEN, ())
        if name in (None, adapter)
    }
    # flags and guards may be left to restore after the layers themselves were ejected one by one
    bare = not any(isinstance(m, LoRAMixin) for m in modules)
    bare = bare and bool(orphans or is_guarded(model))
    layers = {} if bare else layers_with(model, name)
    names = (
        [name] if name is not None else list({**dict.fromkeys(_names(layers.values())), **orphans})
    )
    states = {n: m.lora_state.merged for n, m in layers.items()}
    merged = [n for n, state in states.items() if state is not None and state.kept is not None]
    if merged:
        raise MergeError(
            f"An adapter must be unmerged to be ejected, but {listed(merged)} is merged."
            " Call `unmerge(model)` first, or merge with reversible=False to keep the update."
        )
    patched = [n for n, m in layers.items() if "forward" in vars(m)]
    if patched:
        raise UnsupportedLayerError(
            f"A layer must have its class's forward to be ejected, but {listed(patched)} has one"
            " patched onto the instance (offloading hooks do this). Remove that patch, eject, and"
            " put it back."
        )
    other = [n for n, m in layers.items() if not _has_our_class(m)]
    if other:
        raise UnsupportedLayerError(
            f"A layer must have the class that `inject` gave it, but that of {listed(other)} was"
            " changed since (parametrized or sharded). Undo that first, then eject."
        )
    left = [
        n
        for n, state in states.items()
        if state is not None and set(layers[n].lora_state.configs) - set(names)
    ]
    if left:
        raise MergeError(
            "Adapters merged with reversible=False must be ejected together, but only"
            f" {listed(names)} was named. Call `eject(model)`."
        )
    gone = count(
        [
            p
            for m in layers.values()
            for n in m.lora_state.configs
            if n in names
            for p in parts_of(m, n).values()
        ]
    )
    ours = (LoRAMixin, WeightReader)
    changed = [m for m in modules if FROZEN in vars(m) or isinstance(m, ours)]
    with lock(), all_or_nothing(model, changed):
        for layer in layers.values():
            for adapter in [n for n in names if n in layer.lora_state.configs]:
                detach(layer, adapter)
        restored = sum(thaw(m, names) for m in changed)
    return EjectReport(tuple(names), tuple(layers), gone, restored)


def _has_our_class(layer: LoRAMixin) -> bool:
    if isinstance(layer, LoRAWeight):
        return isinstance(layer.owner, WeightReader) and type(layer) is LoRAWeight
    return has_our_class(layer)


def _names(layers: Iterable[LoRAMixin]) -> list[str]:
    configs = (layer.lora_state.configs for layer in layers)
    return list(dict.fromkeys(name for found in configs for name in found))
