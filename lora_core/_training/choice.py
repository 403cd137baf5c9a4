"""Choosing which adapters train, apart from which are active."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

from torch import Tensor, nn

from lora_core._adapters import adapted_layers, adapter_names, check_known, layers_with
from lora_core._errors import ConfigError, listed
from lora_core._layers import FROZEN, LoRAMixin, trained_parts, undone_by
from lora_core._reports import count


class _Found(NamedTuple):
    """What `trainable` found of one factor.

    Attributes:
        parameter: The factor.
        flag: Whether it required a gradient.
        grad: Its gradient.
        holders: The adapters that keep it frozen, and what each of them found.
        slot: Which adapter it is of; another of its name has another.
    """

    parameter: nn.Parameter
    flag: bool
    grad: Tensor | None
    holders: dict[str, bool]
    slot: object


class Trainable(AbstractContextManager["Trainable"]):
    """What `trainable` did; leaving it as a context puts back what was there before.

    Attributes:
        adapters: Names of the adapters that train now.
        frozen: Names of those that don't.
        parameters: Numbers in the factors that train now.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, LoRAMixin], names: Sequence[str]
    ) -> None:
        self.adapters = tuple(dict.fromkeys(names))
        self.frozen = tuple(n for n in adapter_names(layers) if n not in names)
        chosen = [
            p
            for m in layers.values()
            for n in names
            if n in m.lora_state.configs
            for p in trained_parts(m, n).values()
        ]
        self.parameters = count(list(dict.fromkeys(chosen)))
        self._over, self._model = False, model
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
        usual = _usual(found for factors in self._found.values() for found in factors.values())
        # layers may have come since, with a file in an adapter's place
        for layer in {**self._found, **dict.fromkeys(adapted_layers(self._model).values())}:
            if isinstance(layer, LoRAMixin):
                _put_back(layer, self._found.get(layer, {}), usual)
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
    check_known("trainable", names, known)
    if not names:
        raise ConfigError(
            "`trainable` must be given an adapter, but got none."
            f" Write `trainable(model, {known[0]!r})`; where none is to train, use"
            " `model.requires_grad_(False)`."
        )
    receipt = Trainable(model, layers, names)
    with undone_by(partial(receipt.__exit__, None, None, None)):
        for layer in layers.values():
            _choose(layer, names)
    return receipt


def _record(layer: LoRAMixin) -> dict[str, dict[str, bool]]:
    """A copy of what the adapters keep frozen on a layer, and whether each trained before."""
    return {name: dict(found) for name, found in vars(layer).get(FROZEN, {}).items()}


def _trained(layer: LoRAMixin) -> Iterator[tuple[str, str, nn.Parameter]]:
    """The adapter, the key and the Parameter of all that can train on a layer."""
    for adapter in layer.lora_state.configs:
        for part, p in trained_parts(layer, adapter).items():
            yield adapter, f"{part}_{adapter}", p


def _look(layer: LoRAMixin) -> dict[str, _Found]:
    """What stands on a layer, by the names of its factors."""
    record = _record(layer)
    return {
        key: _Found(
            p,
            p.requires_grad,
            p.grad,
            {n: f[key] for n, f in record.items() if key in f},
            layer.lora_state.slots[adapter],
        )
        for adapter, key, p in _trained(layer)
    }


def _usual(found: Iterable[_Found]) -> dict[object, _Found]:
    """By adapter what its factors had in common: what one that came since would have had."""
    usual: dict[object, _Found] = {}
    for one in found:
        seen = usual.get(one.slot, one)
        holders = {n: one.holders.get(n, f) or f for n, f in seen.holders.items()}
        usual[one.slot] = seen._replace(flag=seen.flag or one.flag, grad=None, holders=holders)
    return usual


def _choose(layer: LoRAMixin, names: Sequence[str]) -> None:
    """Sets the flags of a layer's factors, and of what adapters found of them before."""
    record = _record(layer)
    for adapter, key, p in _trained(layer):
        for found in record.values():
            if key in found:  # it stays in their care, but is not to train after them
                found[key] = False
        _set(p, adapter in names, None)
    if record:
        vars(layer)[FROZEN] = record


def _put_back(
    layer: LoRAMixin, factors: Mapping[str, _Found], usual: Mapping[object, _Found]
) -> None:
    """Makes flags and records what they would be had the choice never been made."""
    record = _record(layer)
    for adapter, key, p in _trained(layer):
        slot = layer.lora_state.slots[adapter]
        was = factors.get(key)
        if was is None or was.slot is not slot:
            was = usual.get(slot)
        if was is None:
            continue  # its adapter came in the meantime
        trained = False
        for name, flag in was.holders.items():
            trained = trained or flag
            if key in record.get(name, ()):
                record[name][key], trained = trained, False
        # what an adapter that left was to give back goes to the next holder, or is given back
        trained = trained or was.flag
        newcomer = next((n for n, f in record.items() if key in f and n not in was.holders), None)
        if newcomer is None:
            _set(p, trained, was.grad if p is was.parameter else None)
        else:
            record[newcomer][key] = trained
    if record:
        vars(layer)[FROZEN] = record


def _set(parameter: nn.Parameter, flag: bool, grad: Tensor | None) -> None:
    """Sets a flag, and where that is a change the gradient."""
    if parameter.requires_grad is not flag:
        parameter.requires_grad_(flag)
        parameter.grad = grad
