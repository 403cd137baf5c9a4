"""The acting half of injection: one transaction that attaches, and its inverse."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_core._adapters import adapted_layers, layers_with
from lora_core._config import AdapterConfig
from lora_core._errors import MergeError, UnsupportedLayerError, listed
from lora_core._injection.planning import draw_up
from lora_core._injection.targets import Patterns
from lora_core._layers import FROZEN, LoRAMixin, adapted_class, attach, detach, fresh_factors
from lora_core._reports import EjectReport, Report, count


@dataclass(frozen=True, slots=True)
class Graft:
    """An adapter's factors for one layer, ready to be attached."""

    module: nn.Module
    config: AdapterConfig
    lora_A: nn.Parameter
    lora_B: nn.Parameter


def inject(
    model: nn.Module,
    rank: int = 4,
    alpha: float | None = None,
    *,
    targets: Patterns | None = None,
    exclude: Patterns = (),
    rules: dict[str, dict[str, Any]] | None = None,
    name: str = "default",
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> Report:
    """Puts a fresh adapter on layers of `model`, in place, all or nothing; changes no output.

    Takes the arguments of `plan` and returns its report. The adapter joins the active ones at
    strength 1. With `freeze` everything else stops training and drops its gradient (an optimiser
    would go on stepping with it); `eject` gives every flag back. Without it no flag changes.

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
    settings = {"rank": rank, "alpha": alpha, "dropout": dropout, "dtype": dtype}
    report, chosen = draw_up(
        model,
        settings,
        targets=targets,
        exclude=exclude,
        rules=rules or {},
        name=name,
        freeze=freeze,
    )
    seed = int(torch.randint(2**31, (), device="cpu").item())
    generator = torch.Generator("cpu")
    grafts = []
    for layer, candidate in zip(report.layers, chosen, strict=True):
        # the generator takes 32 bits of a seed and drops the rest
        generator.manual_seed(seed ^ zlib.crc32(layer.name.encode()))
        factors = fresh_factors(candidate.module, layer.config, generator)
        grafts.append(Graft(candidate.module, layer.config, *factors))
    frozen = [(m, p) for m in model.modules() for p in m._parameters] if freeze else []
    graft(name, grafts, frozen)
    return report


def graft(
    name: str,
    grafts: Sequence[Graft],
    frozen: Iterable[tuple[nn.Module, str]] = (),
    strength: float = 1.0,
) -> None:
    """Attaches one adapter to layers and freezes parameters, entirely or not at all."""
    with ExitStack() as undo:
        for module, parameter in frozen:
            _freeze(module, parameter, name, undo)
        for g in grafts:
            undo.callback(_snapshot(g.module))
            attach(g.module, name, g.config, g.lora_A, g.lora_B, strength)
        undo.pop_all()


def eject(model: nn.Module, name: str | None = None) -> EjectReport:
    """Takes an adapter (None: all of them) off `model`, in place, and frees its memory.

    The host's classes, keys, attributes and bits are then those it had before, and every
    `requires_grad` flag that the injection changed is set back once nothing is left that
    relies on it.

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
    orphans = {
        adapter: None
        for module in model.modules()
        for adapter in vars(module).get(FROZEN, ())
        if name in (None, adapter)
    }
    # flags may be left to restore after the layers themselves were ejected one by one
    layers = layers_with(model, name) if adapted_layers(model) or not orphans else {}
    names = (
        [name] if name is not None else list({**dict.fromkeys(_names(layers.values())), **orphans})
    )
    merged = [
        n for n, m in layers.items() if m.lora_merged is not None and m.lora_merged.kept is not None
    ]
    if merged:
        raise MergeError(
            f"An adapter must be unmerged to be ejected, but {listed(merged)} is merged."
            " Call `unmerge(model)` first, or merge with reversible=False to keep the update."
        )
    other = [n for n, m in layers.items() if type(m) is not adapted_class(m.host_class)]
    if other:
        raise UnsupportedLayerError(
            f"A layer must have the class that `inject` gave it, but that of {listed(other)} was"
            " changed since (parametrized or sharded). Undo that first, then eject."
        )
    left = [
        m for m in layers.values() if m.lora_merged is not None and set(m.lora_configs) - set(names)
    ]
    if left:
        raise MergeError(
            "Adapters merged with reversible=False must be ejected together, but only"
            f" {listed(names)} was named. Call `eject(model)`."
        )
    gone = count(
        [p for m in layers.values() for n in m.lora_configs if n in names for p in m.factors(n)]
    )
    with ExitStack() as undo:
        for layer in layers.values():
            undo.callback(_snapshot(layer))
            for adapter in [n for n in names if n in layer.lora_configs]:
                detach(layer, adapter)
        restored = sum(_thaw(model, names, undo))
        undo.pop_all()
    return EjectReport(tuple(names), tuple(layers), gone, restored)


def _names(layers: Iterable[LoRAMixin]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers for name in layer.lora_configs))


def _snapshot(module: nn.Module) -> Callable[[], None]:
    """A call that puts the module's class, attributes and parameter table back."""
    cls, attributes, own = type(module), dict(vars(module)), dict(module._parameters)

    def restore() -> None:
        module.__class__ = cls
        vars(module).clear()
        vars(module).update(attributes)
        module._parameters.clear()
        module._parameters.update(own)

    return restore


def _freeze(module: nn.Module, parameter: str, adapter: str, undo: ExitStack) -> None:
    p = module._parameters[parameter]
    if p is None:
        return
    was, grad, record = p.requires_grad, p.grad, vars(module).get(FROZEN)
    # what an earlier injection froze is relied on by this one too
    if not was and not any(parameter in held for held in (record or {}).values()):
        return

    def restore() -> None:
        p.requires_grad_(was)
        p.grad = grad
        _record(module, record)

    undo.callback(restore)
    mine = (record or {}).get(adapter, ())
    _record(module, {**(record or {}), adapter: (*mine, parameter) if was else mine})
    p.requires_grad_(False)
    p.grad = None


def _thaw(model: nn.Module, names: Sequence[str], undo: ExitStack) -> Iterable[int]:
    """Sets back the flags that these adapters' injections changed; yields 1 for each.

    While adapters stay that rely on it, the host stays frozen: its flags pass to one of those.
    """
    for module in model.modules():
        record = vars(module).get(FROZEN)
        if record is None:
            continue
        heirs = [n for n in record if n not in names]
        mine = [p for name in names for p in record.get(name, ())]
        back = [p for p in mine if not heirs or p.startswith(("lora_A_", "lora_B_"))]
        kept = {n: ps for n, ps in record.items() if n not in names}
        passed = tuple(p for p in mine if p not in back)
        if passed:
            kept[heirs[0]] = (*kept.get(heirs[0], ()), *passed)
        undo.callback(_record, module, record)
        _record(module, kept or None)
        for name in back:
            p = module._parameters.get(name)
            if p is not None:
                undo.callback(p.requires_grad_, p.requires_grad)
                p.requires_grad_(True)
                yield 1


def _record(module: nn.Module, record: dict[str, tuple[str, ...]] | None) -> None:
    if record is None:
        vars(module).pop(FROZEN, None)
    else:
        vars(module)[FROZEN] = record
