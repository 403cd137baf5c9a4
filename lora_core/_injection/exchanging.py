"""Putting another adapter in the place of one, on all layers of a model."""

from collections.abc import Mapping, Sequence

from torch import nn

from lora_core._adapters import scopes
from lora_core._errors import UnsupportedLayerError
from lora_core._injection.surgery import Graft
from lora_core._injection.transactions import all_or_nothing
from lora_core._layers import (
    FROZEN,
    LoRAMixin,
    LoRAWeight,
    Slot,
    Strength,
    attach,
    detach,
    exchange,
    factor_names,
)


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
    holders = [m for m in modules if isinstance(m, LoRAMixin) and name in m.lora_configs]
    like, new = holders[0], {id(g.module) for g in grafts}
    slot, usual = {name: like.lora_slots[name]}, like.lora_strengths().get(name)
    _check_samples(holders, name, grafts, strength)
    training = any(p.requires_grad for m in holders for p in m.lora_parts(name).values())
    # for the whole: a choice, or a pin, comes before or after
    with scopes.LOCK, all_or_nothing(modules[0], [m for m in modules if m._parameters]):
        for g in grafts:
            if isinstance(g.module, LoRAMixin) and name in g.module.lora_configs:
                _pass_on_flags(g.module, g.module, name, g.parts)
                exchange(g.module, name, g.config, g.parts)
                if strength is not None:
                    chosen = {**g.module.lora_strengths(), name: strength}
                    g.module.lora_selection = g.module.lora_select(chosen)
                continue
            for p in g.parts.values():
                p.requires_grad_(training and p.requires_grad)
            layer = attach(
                g.module, name, g.config, g.parts, usual if strength is None else strength, slot
            )
            _pass_on_flags(layer, like, name, g.parts)
            scopes.join(layer, name, like)
        for layer in [m for m in holders if id(m) not in new]:
            detach(layer, name)


def _check_samples(
    holders: Sequence[LoRAMixin], name: str, grafts: Sequence[Graft], strength: float | None
) -> None:
    """Refuses what would be of one weight for all samples where each has its own strength."""
    strengths: list[Strength | None] = [s for m in holders for s in scopes.strengths_over(m, name)]
    if strength is None:
        strengths += [m.lora_strengths().get(name) for m in holders]
    if not any(isinstance(s, tuple) for s in strengths):
        return
    shared = [g for g in grafts if isinstance(g.module, Slot | LoRAWeight) or g.config.dora]
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
