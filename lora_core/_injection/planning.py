"""The pure half of injection: from a model and the user's wishes to a list of layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_core._config import AdapterConfig, check_name
from lora_core._errors import AdapterError, ConfigError, MergeError, listed
from lora_core._injection.targets import (
    Candidate,
    Patterns,
    choose,
    matches,
    no_rule_match,
    walk,
)
from lora_core._layers import LoRAMixin, factor_names, layer_config, sizes
from lora_core._reports import LayerReport, Report, count

_SETTINGS = ("rank", "alpha", "dropout", "dtype", "rslora")


def plan(
    model: nn.Module,
    rank: int = 4,
    alpha: float | None = None,
    *,
    targets: Patterns | None = None,
    exclude: Patterns = (),
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    name: str = "default",
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    rslora: bool = False,
    freeze: bool = True,
) -> Report:
    """What `inject` with the same arguments would do; changes nothing.

    Args:
        model: Any module.
        rank: Inner dimension of the updates.
        alpha: Numerator of the scale, not 0; None means each layer's rank, a scale of 1.
        targets: Which layers: a glob over the dotted name or any tail of it (a bare word is the
            last segment), a compiled regex (full match), a module class, a predicate
            ``(name, module)``, or a list of these. None finds the attention projections.
        exclude: Patterns for chosen layers to leave out.
        rules: Settings by pattern, as in ``{"*mid*": {"rank": 16}}``; later rules win.
        name: The adapter's name.
        dropout: Probability of dropping an input element of the update while training.
        dtype: Type of the factors; None means the weight's, but float32 at least.
        rslora: Whether the scale is alpha / sqrt(rank), so that a larger rank learns as fast;
            with alpha left out it is then sqrt(rank).
        freeze: Whether everything but the new adapter would stop training.

    Returns:
        The chosen layers, why each other one was left out, and the parameter counts.

    Raises:
        TargetError: If a pattern or a rule matches nothing, or nothing is left.
        ConfigError: If a setting is out of range for a chosen layer.
        AdapterError: If the name is taken on a chosen layer.
        UnsupportedLayerError: If a pattern asks for a layer that can't be adapted.
        MergeError: If a chosen layer is merged.

    Example:
        >>> block = nn.ModuleDict({"to_q": nn.Linear(8, 8), "mlp": nn.Linear(8, 8)})
        >>> [layer.name for layer in plan(block, rank=2).layers]
        ['to_q']
    """
    return draw_up(
        model,
        {"rank": rank, "alpha": alpha, "dropout": dropout, "dtype": dtype, "rslora": rslora},
        targets=targets,
        exclude=exclude,
        rules={} if rules is None else rules,
        name=name,
        freeze=freeze,
    )[0]


def draw_up(
    model: nn.Module,
    settings: Mapping[str, Any],
    *,
    targets: Patterns | None,
    exclude: Patterns,
    rules: Mapping[str, Mapping[str, Any]],
    name: str,
    freeze: bool,
) -> tuple[Report, list[Candidate], list[nn.Module]]:
    """The report of `plan`, the layers it speaks of in the same order, and all modules."""
    check_name(name)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be an nn.Module, but is {type(model).__name__}.")
    candidates = walk(model)
    chosen, left_out = choose(candidates, targets, exclude)
    configs = _configure(chosen, settings, rules)
    report = describe(candidates, name, chosen, configs, left_out, freeze=freeze)
    return report, chosen, [c.module for c in candidates]


def describe(
    candidates: Sequence[Candidate],
    name: str,
    chosen: Sequence[Candidate],
    configs: Sequence[AdapterConfig],
    left_out: Mapping[str, str],
    *,
    freeze: bool,
    notes: tuple[str, ...] = (),
) -> Report:
    """The report for these layers of all; raises if the name is taken, or one is merged."""
    check_room(candidates, name, chosen)
    layers = tuple(
        LayerReport(c.name, _host_name(c.module), *sizes(c.module), config, c.names[1:])
        for c, config in zip(chosen, configs, strict=True)
    )
    added = sum(layer.parameters for layer in layers)
    before = list(
        {p: None for c in candidates for p in c.module._parameters.values() if p is not None}
    )
    training = 0 if freeze else count([p for p in before if p.requires_grad])
    return Report(name, layers, left_out, training + added, count(before) + added, notes)


def check_room(candidates: Sequence[Candidate], name: str, chosen: Sequence[Candidate]) -> None:
    """Refuses a taken name anywhere in the model, and merged layers."""
    taken = [c.name for c in candidates if name in vars(c.module).get("lora_configs", ())]
    if taken:
        raise AdapterError(
            f"`name` must be new to the model, but {name!r} is on {listed(taken)}."
            f" Choose another name, or `eject(model, {name!r})` first."
        )
    merged = [c.name for c in chosen if getattr(c.module, "lora_merged", None) is not None]
    if merged:
        raise MergeError(
            f"A layer must be unmerged to take an adapter, but {listed(merged)} is merged."
            " Call `unmerge(model)` first."
        )
    for new in sorted(factor_names([name])):
        clash = [c.name for c in chosen if hasattr(c.module, new)]
        if not clash:
            continue
        raise AdapterError(
            f"`name` must be new to every layer, but {listed(clash)} has an attribute"
            f" {new!r} of its own. Choose another name."
        )


def _configure(
    chosen: Sequence[Candidate],
    settings: Mapping[str, Any],
    rules: Mapping[str, Mapping[str, Any]],
) -> list[AdapterConfig]:
    if not isinstance(rules, Mapping):
        raise ConfigError(f"`rules` must map patterns to settings, but is {rules!r}.")
    for pattern, overrides in rules.items():
        if not isinstance(pattern, str) or not isinstance(overrides, Mapping):
            raise ConfigError(
                "`rules` must map patterns to settings, as in {'*mid*': {'rank': 16}}, but holds"
                f" {pattern!r}: {overrides!r}."
            )
        unknown = [key for key in overrides if key not in _SETTINGS]
        if unknown:
            raise ConfigError(
                f"`rules` must set {listed(_SETTINGS)}, but {pattern!r} sets {listed(unknown)}."
            )
        if not any(matches(pattern, c) for c in chosen):
            raise no_rule_match(pattern, chosen)
    configs = []
    for c in chosen:
        mine = dict(settings)
        for pattern, overrides in rules.items():
            if matches(pattern, c):
                mine.update(overrides)
        repair = f" at {c.name!r}" if c.name else ""
        configs.append(layer_config(c.module, **mine, where=repair))
    return configs


def _host_name(module: nn.Module) -> str:
    return (module.host_class if isinstance(module, LoRAMixin) else type(module)).__name__
