"""The pure half of injection: from a model and the user's wishes to a list of layers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import lru_cache, reduce
from operator import or_
from typing import Any, Unpack

from torch import nn

from lora_core._config import (
    ASKED,
    PARTS,
    AdapterConfig,
    Settings,
    check_name,
    checked_settings,
    with_settings,
)
from lora_core._errors import (
    AdapterError,
    ConfigError,
    MergeError,
    UnsupportedLayerError,
    listed,
)
from lora_core._injection.candidates import Candidate, modules_of, walk
from lora_core._injection.readers import reasons
from lora_core._injection.targets import Patterns, choose, matches, no_rule_match
from lora_core._layers import (
    OWN_NAMES,
    STATE,
    LoRAMixin,
    LoRAWeight,
    Slot,
    State,
    factor_names,
    has_bias,
    host_of,
    layer_config,
    peek,
)
from lora_core._reports import LayerReport, Report, count

ASKED_FOR = "asked for"  # why a weight reads as the sum
_OURS = (*OWN_NAMES, *(f"{part}_" for part in PARTS))  # how names of an adapter's begin


@with_settings
def plan(
    model: nn.Module,
    rank: int = 4,
    alpha: float | None = None,
    *,
    targets: Patterns | None = None,
    exclude: Patterns = (),
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    name: str = "default",
    freeze: bool = True,
    **settings: Unpack[Settings],
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
        freeze: Whether everything but the new adapter would stop training.
        settings:

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
        {"rank": rank, "alpha": alpha, **settings},
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
    general = checked_settings(settings)  # before patterns: a slip here may be all that is wrong
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be an nn.Module, but is {type(model).__name__}.")
    candidates = walk(model)
    chosen, left_out, asked = choose(candidates, targets, exclude)
    modules = modules_of(candidates)
    why = reasons(modules, chosen) | dict.fromkeys(asked, ASKED_FOR)
    configs = _configure(chosen, settings, general, rules, why)
    stopped: dict[str, None] = {}
    for m in modules if freeze else ():
        if isinstance(m, LoRAMixin):
            stopped |= _training(m)
    notes = (
        (f"stops training: {listed(stopped)}; `trainable` lets several train",) if stopped else ()
    )
    report = describe(
        candidates, name, chosen, configs, left_out, freeze=freeze, notes=notes, why=why
    )
    return report, chosen, modules


def _training(layer: LoRAMixin) -> dict[str, None]:
    """The adapters of a layer some of whose factors train."""
    own = {key for key, p in layer._parameters.items() if p is not None and p.requires_grad}
    return dict.fromkeys(n for n in layer.lora_state.configs if factor_names([n]) & own)


def describe(
    candidates: Sequence[Candidate],
    name: str,
    chosen: Sequence[Candidate],
    configs: Sequence[AdapterConfig],
    left_out: Mapping[str, str],
    *,
    freeze: bool,
    notes: tuple[str, ...] = (),
    replaced: bool = False,
    alphas_from: Sequence[str] = (),
    why: Mapping[str, str],
) -> Report:
    """The report for these layers of all; raises if the name is taken, or one is merged.

    Where an adapter is to be `replaced`, the name must be taken.
    """
    check_room(candidates, name, chosen, replaced=replaced)
    layers = []
    for c, config, source in zip(chosen, configs, alphas_from or [""] * len(chosen), strict=True):
        kind, module, others = c.kind, c.module, c.names[1:]
        assert kind is not None
        if isinstance(module, LoRAMixin) and not isinstance(module, LoRAWeight):
            host = module.lora_host_class
        else:
            host = host_of(c.owners[0])
        sizes, shapes = kind.sizes(module), kind.shapes(module, config)
        reason = why[c.name] or ASKED_FOR if config.read else ""
        layers.append(
            LayerReport(c.name, host.__name__, *sizes, config, others, shapes, source, reason)
        )
    before = parameters_of([c.module for c in candidates if isinstance(c.module, nn.Module)])
    training = 0 if freeze else count([p for p in before if p.requires_grad])
    total = count(before)
    for layer in layers:
        numbers = layer.parameters
        training += layer.trainable if layer.config.subtracted else numbers
        total += numbers
    return Report(name, tuple(layers), left_out, training, total, notes)


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of these modules, each once; those of their children only with them."""
    # by their ids: a tensor's own hash is a call each
    found = {id(p): p for m in modules for p in m._parameters.values()}
    return [p for p in found.values() if p is not None]


def check_room(
    candidates: Sequence[Candidate],
    name: str,
    chosen: Sequence[Candidate],
    *,
    replaced: bool = False,
) -> None:
    """Refuses a taken name anywhere in the model, or one to be replaced nowhere; merged layers."""
    adapted = {
        id(c): _state(c).configs
        for c in candidates
        if isinstance(c.module, LoRAMixin) and STATE in c.module.__dict__
    }
    holders = [c for c in candidates if name in adapted.get(id(c), ())] if adapted else []
    if holders and not replaced:
        raise AdapterError(
            f"`name` must be new to the model, but {name!r} is on"
            f" {listed([c.name for c in holders])}. Choose another name, or"
            f" `eject(model, {name!r})` first; `load` puts a file in its place with replace=True."
        )
    if replaced and not holders:
        known = dict.fromkeys(adapter for configs in adapted.values() for adapter in configs)
        raise AdapterError(
            f"`name` must be an adapter of the model to be replaced, but is {name!r}; it has"
            f" {listed(known) or 'none'}. Load without replace=True to add one."
        )
    places = {id(c): c for c in (*chosen, *holders) if id(c) in adapted} if adapted else {}
    merged = [c.name for c in places.values() if _state(c).merged is not None] if places else []
    if merged:
        raise MergeError(
            f"A layer must be unmerged to take an adapter, but {listed(merged)} is merged."
            " Call `unmerge(model)` first."
        )
    picked = {id(c) for c in chosen}
    read = [c for c in candidates if isinstance(c.module, LoRAWeight)]
    busy = [c for c in read if id(c) in picked or set(adapted.get(id(c), ())) - {name}]
    _refuse_overlap(busy, chosen)
    parts = factor_names([name])
    # to look up what is not there takes long on a module
    asking = [
        c for c in chosen if name not in adapted.get(id(c), ()) and not _is_free(c.module, parts)
    ]
    for new, clash in _holders([c for c in asking if id(c) not in adapted], sorted(OWN_NAMES)):
        raise UnsupportedLayerError(
            f"A layer must leave names that begin with 'lora_' to its adapters, but"
            f" {listed(clash)} has an attribute {new!r} of its own. Rename it, or exclude the"
            " layer."
        )
    for new, clash in _holders(asking, sorted(parts)):
        raise AdapterError(
            f"`name` must be new to every layer, but {listed(clash)} has an attribute"
            f" {new!r} of its own. Choose another name."
        )


def _holders(
    candidates: Sequence[Candidate], names: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Each of these attributes that a layer has, and the layers that have it."""
    for name in names if candidates else ():
        found = [c.name for c in candidates if hasattr(c.module, name)]
        if found:
            yield name, found


def _is_free(module: nn.Module | Slot, names: Set[str]) -> bool:
    """Whether none of an adapter's names is found on a module, by a look at its dicts."""
    own = vars(module)
    return (
        _has_torchs_attributes(type(module))  # type: ignore[arg-type]
        and (STATE in own) is isinstance(module, LoRAMixin)
        and (OWN_NAMES - {STATE}).isdisjoint(own)
        and names.isdisjoint(own)
        and names.isdisjoint(own["_parameters"])
        and names.isdisjoint(own["_buffers"])
        and names.isdisjoint(own["_modules"])
    )


@lru_cache
def _has_torchs_attributes(cls: type) -> bool:
    """Whether a class finds attributes as torch does, and has none that are an adapter's."""
    return (
        getattr(cls, "__getattribute__", None) is object.__getattribute__
        and getattr(cls, "__getattr__", None) is nn.Module.__getattr__
        and not any(name.startswith(_OURS) for kind in cls.__mro__ for name in vars(kind))
    )


def _state(candidate: Candidate) -> State:
    """What an adapted layer knows of its adapters."""
    state: State = candidate.module.lora_state  # type: ignore[union-attr, assignment]
    return state


def _refuse_overlap(candidates: Sequence[Candidate], chosen: Sequence[Candidate]) -> None:
    """Refuses adapters on a whole parameter and on some of its rows: neither could be merged."""
    rows: dict[tuple[nn.Module, str], dict[bool, str]] = {}
    for c in (*candidates, *chosen):
        if isinstance(c.module, LoRAWeight):
            place, part = (c.module.owner, c.module.lora_parameter), c.module.lora_rows
        elif isinstance(c.module, Slot):
            place, part = (c.module.owner, c.module.parameter), c.module.rows
        else:
            continue
        found = rows.setdefault(place, {})
        found[part is None] = c.name
        if len(found) == 2:
            raise UnsupportedLayerError(
                "A parameter must be adapted as a whole or by its parts, but"
                f" {found[True]!r} and {found[False]!r} are both. Choose one of them."
            )


def _configure(
    chosen: Sequence[Candidate],
    settings: Mapping[str, Any],
    general: Mapping[str, Any],
    rules: Mapping[str, Mapping[str, Any]],
    why: Mapping[str, str],
) -> list[AdapterConfig]:
    """The settings of each layer.

    Args:
        chosen: The layers.
        settings: What the user gave.
        general: The same, checked and whole.
        rules: What else holds, by pattern.
        why: Why a weight reads as the sum, by layer.
    """
    if not isinstance(rules, Mapping):
        raise ConfigError(f"`rules` must map patterns to settings, but is {rules!r}.")
    for pattern, overrides in rules.items():
        if not isinstance(pattern, str) or not isinstance(overrides, Mapping):
            raise ConfigError(
                "`rules` must map patterns to settings, as in {'*mid*': {'rank': 16}}, but holds"
                f" {pattern!r}: {overrides!r}."
            )
        unknown = [key for key in overrides if key not in ASKED]
        if unknown:
            raise ConfigError(
                f"`rules` must set {listed(ASKED, len(ASKED))}, but {pattern!r} sets"
                f" {listed(unknown)}."
            )
        if not any(matches(pattern, c) for c in chosen):
            raise no_rule_match(pattern, chosen)
    configs = []
    known: dict[object, AdapterConfig] = {}
    equal: dict[AdapterConfig, AdapterConfig] = {}  # one object for all layers that are alike
    for c in chosen:
        mine, ruled = general, False
        if rules and (found := [rules[pattern] for pattern in rules if matches(pattern, c)]):
            ruled = any(overrides.get("bias") for overrides in found)
            mine = checked_settings(reduce(or_, map(dict, found), dict(settings)))
        # asked for in general, it is for those that have one
        if mine["bias"] and not ruled and not has_bias(c.module):
            mine = {**mine, "bias": False}
        read = bool(why[c.name])
        if read and not mine["read"]:
            mine = {**mine, "read": True}
        weight = peek(c.module)
        # layers of one class whose weights are alike have one config
        key = (type(c.module), id(mine), weight.shape, weight.dtype, weight.device, type(weight))
        config = known.get(key) if mine is general else None
        if config is None:
            where = f" at {c.name!r}" if c.name else ""
            where += f" ({why[c.name]})" * (read and why[c.name] != ASKED_FOR)
            config = layer_config(c.module, mine, where)
            config = known[key] = equal.setdefault(config, config)
        configs.append(config)
    if general["bias"] and not any(config.bias for config in configs):
        raise ConfigError(
            f"`bias=True` must find a bias to add to, but none of the {len(chosen)} chosen layers"
            " has one. Leave it out."
        )
    return configs
