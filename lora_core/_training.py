"""What trains, how fast, and how far it may go: the adapters as an optimiser meets them."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._adapters import adapter_names, layers_with, parameters
from lora_core._config import check_finite
from lora_core._errors import AdapterError, ConfigError, MergeError, listed
from lora_core._layers import FROZEN, LoRAMixin
from lora_core._reports import NormReport, count


def parameter_groups(
    model: nn.Module,
    name: str | None = None,
    *,
    lr: float,
    lr_ratio: float = 16.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for an optimiser in which `lora_B` learns faster than `lora_A`, as LoRA+ has it.

    Only factors that train now are in them, each Parameter once. Both kinds are matrices and get
    `weight_decay`; a parameter of one dimension would get none, and an adapter has none.

    Args:
        model: A model with adapters.
        name: The adapter; None means all.
        lr: The learning rate of `lora_A`.
        lr_ratio: How many times that `lora_B` gets.
        weight_decay: The decay of both.

    Returns:
        Two groups, `lora_A` before `lora_B`; one of them alone where nothing else trains.

    Raises:
        AdapterError: If there is no such adapter, or none at all.
        ConfigError: If a number is out of range, or no factor trains.
        UnsupportedLayerError: As `parameters` does.

    Reference:
        Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024.

    Example:
        >>> import torch
        >>> from lora_core import LoRALinear
        >>> groups = parameter_groups(LoRALinear(nn.Linear(3, 5), rank=2), lr=0.25)
        >>> [group["lr"] for group in torch.optim.AdamW(groups).param_groups]
        [0.25, 4.0]
    """
    slow = _positive("lr", lr)
    fast = _positive("lr * lr_ratio", slow * _positive("lr_ratio", lr_ratio))
    if check_finite("weight_decay", weight_decay) < 0:
        raise ConfigError(f"`weight_decay` must be at least 0, but is {weight_decay!r}.")
    factors = parameters(model, name)
    groups: list[dict[str, Any]] = []
    for kind, rate in ((factors[0::2], slow), (factors[1::2], fast)):  # lora_A, lora_B
        training = list(dict.fromkeys(p for p in kind if p.requires_grad))
        if training:
            groups.append({"params": training, "lr": rate, "weight_decay": float(weight_decay)})
    if not groups:
        raise ConfigError(
            f"An adapter must train to be optimised, but all {len(factors)} factors of"
            f" {'the model' if name is None else repr(name)} are frozen."
            " Call `trainable(model, ...)` with those that are to train."
        )
    return groups


def limit_norm(model: nn.Module, name: str | None = None, *, max_norm: float) -> NormReport:
    """Scales factors down, in place, until no layer's update has a norm above `max_norm`.

    The norm is that of the whole update at strength 1, ``scale * lora_B @ lora_A``, by Frobenius;
    each adapter counts by itself, frozen or not. Both factors shrink by the same share, so the
    update keeps its direction up to the rounding of the factors; what is within the limit keeps
    its bits. Call it after each step of an optimiser. A call that is refused changes nothing.

    Args:
        model: A model with adapters.
        name: The adapter; None means all.
        max_norm: The limit.

    Raises:
        AdapterError: If there is no such adapter, or none at all.
        ConfigError: If `max_norm` is not above 0, or a norm is not finite.
        MergeError: If a layer is merged: its weight holds the update as it was.

    Reference:
        kohya-ss/sd-scripts, option `scale_weight_norms`.

    Example:
        >>> import torch
        >>> from lora_core import LoRALinear
        >>> layer = LoRALinear(nn.Linear(3, 4), rank=2, name="style")
        >>> with torch.no_grad():
        ...     _ = layer.lora_A_style.fill_(1), layer.lora_B_style.fill_(4)
        >>> limit_norm(layer, max_norm=1.0).limited
        {'style': ('',)}
        >>> limit_norm(layer, max_norm=1.0).limited
        {'style': ()}
    """
    limit = _positive("max_norm", max_norm)
    layers = layers_with(model, name)
    merged = [n for n, m in layers.items() if m.lora_merged is not None]
    if merged:
        raise MergeError(
            f"A norm must be limited while unmerged, but {listed(merged)} is merged."
            " Call `unmerge(model)` first."
        )
    names = adapter_names(layers) if name is None else [name]
    found = {
        (adapter, n): (*layer.factors(adapter), layer.lora_configs[adapter].scale)
        for adapter in names
        for n, layer in layers.items()
        if adapter in layer.lora_configs
    }
    with torch.no_grad():
        norms = {key: float(functional.delta_norm(*update)) for key, update in found.items()}
        bad = [f"{n}.{a}".lstrip(".") for (a, n), norm in norms.items() if not math.isfinite(norm)]
        if bad:
            raise ConfigError(
                f"An update must have a finite norm to be limited, but that of {listed(bad)} has"
                " none. Go back to an earlier state; lower the learning rate."
            )
        small = {
            key: _shrunk(*found[key], norm, limit) for key, norm in norms.items() if norm > limit
        }
        for key, factors in small.items():
            for factor, values in zip(found[key][:2], factors, strict=True):
                factor.copy_(values)
    before = {a: {n: norms[a, n] for n in layers if (a, n) in norms} for a in names}
    return NormReport(limit, before)


def _shrunk(
    lora_A: Tensor, lora_B: Tensor, scale: float, norm: float, limit: float
) -> tuple[Tensor, Tensor]:
    """These factors at the limit, or as little below as their dtype allows."""
    margin = 0.0
    while True:
        root = math.sqrt(limit / norm * (1 - margin))
        small = lora_A * root, lora_B * root
        if functional.delta_norm(*small, scale) <= limit:
            return small
        # rounding left it a trifle above
        margin = min(2 * margin or torch.finfo(lora_A.dtype).eps / 4, 1.0)


class _Found(NamedTuple):
    """What `trainable` found of one factor.

    Attributes:
        parameter: The factor.
        flag: Whether it required a gradient.
        grad: Its gradient.
        holders: The adapters that keep it frozen, and what each of them found.
    """

    parameter: nn.Parameter
    flag: bool
    grad: Tensor | None
    holders: dict[str, bool]


class Trainable(AbstractContextManager["Trainable"]):
    """What `trainable` did; leaving it as a context puts back what was there before.

    Attributes:
        adapters: Names of the adapters that train now.
        frozen: Names of those that don't.
        parameters: Numbers in the factors that train now.
    """

    def __init__(self, layers: Mapping[str, LoRAMixin], names: Sequence[str]) -> None:
        self.adapters = tuple(dict.fromkeys(names))
        self.frozen = tuple(n for n in adapter_names(layers) if n not in names)
        chosen = [
            p for m in layers.values() for n in names if n in m.lora_configs for p in m.factors(n)
        ]
        self.parameters = count(list(dict.fromkeys(chosen)))
        self._over = False
        self._found = {layer: _look(layer) for layer in layers.values()}

    def __repr__(self) -> str:
        rest = f"; frozen: {listed(self.frozen)}" if self.frozen else ""
        return f"trainable {listed(self.adapters)}: {self.parameters:,} parameters{rest}"

    def __enter__(self) -> Self:
        if self._over:
            raise ConfigError(
                "A `trainable` block must be entered once, but this one is over and what it found"
                " is put back. Call `trainable(model, ...)` again."
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        for layer, factors in self._found.items():
            _put_back(layer, factors)
        self._found = {}


def trainable(model: nn.Module, *names: str) -> Trainable:
    """Chooses the adapters that train, in place: exactly those named.

    Their factors require gradients from now on, those of other adapters don't and drop theirs (an
    optimiser would go on stepping with them). Which adapters take part in a forward is another
    matter, for `scales`; the host's own parameters keep their flags. The choice outlasts other
    adapters: no later `eject` of one makes a factor train that was left out here.

    Works at once, and as a context manager that restores the flags and gradients that it found,
    with what `eject` is to make of them. Blocks must end in the reverse order of their beginning.

    Args:
        model: A model with adapters.
        names: The adapters that are to train.

    Raises:
        AdapterError: If a name is no adapter of the model; nothing is changed then.
        ConfigError: If no name is given.

    Example:
        >>> from lora_core import LoRALinear, inject
        >>> layer = LoRALinear(nn.Linear(3, 5), rank=2, name="style")
        >>> _ = inject(layer, targets=nn.Linear, rank=1, name="ink")
        >>> with trainable(layer, "style") as receipt:
        ...     receipt
        trainable 'style': 16 parameters; frozen: 'ink'
        >>> [n for n, p in layer.named_parameters() if p.requires_grad]
        ['lora_A_ink', 'lora_B_ink']
    """
    layers = layers_with(model, None)
    known = adapter_names(layers)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise AdapterError(
            f"`trainable` must name adapters of the model, but got {listed(unknown)};"
            f" it has {listed(known)}."
        )
    if not names:
        raise ConfigError(
            "`trainable` must be given an adapter, but got none."
            f" Write `trainable(model, {known[0]!r})`; where none is to train, use"
            " `model.requires_grad_(False)`."
        )
    receipt = Trainable(layers, names)
    try:
        for layer in layers.values():
            _choose(layer, names)
    except BaseException:
        receipt.__exit__(None, None, None)
        raise
    return receipt


def _record(layer: LoRAMixin) -> dict[str, dict[str, bool]]:
    """A copy of what the adapters keep frozen on a layer, and whether each trained before."""
    return {name: dict(found) for name, found in vars(layer).get(FROZEN, {}).items()}


def _keys(adapter: str) -> tuple[str, str]:
    return f"lora_A_{adapter}", f"lora_B_{adapter}"


def _look(layer: LoRAMixin) -> dict[str, _Found]:
    """What stands on a layer, by the names of its factors."""
    record = _record(layer)
    return {
        key: _Found(p, p.requires_grad, p.grad, {n: f[key] for n, f in record.items() if key in f})
        for adapter in layer.lora_configs
        for key, p in zip(_keys(adapter), layer.factors(adapter), strict=True)
    }


def _choose(layer: LoRAMixin, names: Sequence[str]) -> None:
    """Sets the flags of a layer's factors, and of what adapters found of them before."""
    record = _record(layer)
    for adapter in layer.lora_configs:
        for key, p in zip(_keys(adapter), layer.factors(adapter), strict=True):
            for found in record.values():
                if key in found:  # it stays in their care, but is not to train after them
                    found[key] = False
            _set(p, adapter in names, None)
    if record:
        vars(layer)[FROZEN] = record


def _put_back(layer: LoRAMixin, factors: Mapping[str, _Found]) -> None:
    """Makes flags and records what they would be had the choice never been made."""
    record = _record(layer)
    for key, was in factors.items():
        if layer._parameters.get(key) is not was.parameter:
            continue  # its adapter left in the meantime
        trained = False
        for name, flag in was.holders.items():
            trained = trained or flag
            if key in record.get(name, ()):
                record[name][key], trained = trained, False
        # what an adapter that left was to give back goes to the next holder, or is given back
        trained = trained or was.flag
        newcomer = next((n for n, f in record.items() if key in f and n not in was.holders), None)
        if newcomer is None:
            _set(was.parameter, trained, was.grad)
        else:
            record[newcomer][key] = trained
    if record:
        vars(layer)[FROZEN] = record


def _set(parameter: nn.Parameter, flag: bool, grad: Tensor | None) -> None:
    """Sets a flag, and where that is a change the gradient."""
    if parameter.requires_grad is not flag:
        parameter.requires_grad_(flag)
        parameter.grad = grad


def _positive(what: str, value: float) -> float:
    number = check_finite(what, value)
    if number <= 0:
        raise ConfigError(f"`{what}` must be above 0, but is {value!r}.")
    return number
