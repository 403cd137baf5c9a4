"""What a layer knows of its adapters: one value, replaced whole by every change.

A forward reads it once and asks nothing of it that only a change can alter: a change prepares it.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora_core._config import AdapterConfig, Recipe
from lora_core._errors import ConfigError
from lora_core._layers.kind import Update, peek
from lora_core._layers.members import Members

# attribute of a module: adapter -> parameters that it keeps frozen, and whether each trained before
FROZEN = "lora_frozen"
STATE = "lora_state"  # attribute of an adapted layer

Strength = float | tuple[float, ...]  # one for all samples, or one for each


class Order(NamedTuple):
    """How a batch may hold its samples more than once; where it does not, it fits as well.

    Attributes:
        guidance: Whether all of them may stand there twice, one whole batch after the other.
        repeats: How often each may stand there, one after the other.
    """

    guidance: bool = False
    repeats: int = 1


ONCE = Order()


class PerSample(tuple[float, ...]):
    """A strength for each sample, and the order of samples in a batch."""

    order: Order

    def __new__(cls, values: Iterable[float], order: Order = ONCE) -> "PerSample":
        made = super().__new__(cls, values)
        made.order = order
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PerSample) and self._key() == other._key()

    def __ne__(self, other: object) -> bool:  # the tuple's own would not look at the order
        return not self == other

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> Any:
        return type(self), (tuple(self), self.order)

    def _key(self) -> tuple[tuple[float, ...], Order]:
        return tuple(self), self.order


class Term(NamedTuple):
    """One adapter's part in what a layer adds.

    Attributes:
        name: The adapter.
        recipe: How it is put together.
        gain: ``strength * scale``: a number, () or (batch,).
        strength: The strength alone, likewise, where a bias or magnitudes need it; else None.
        order: The order of the samples that a gain per sample is for.
    """

    name: str
    recipe: Recipe
    gain: Tensor | float
    strength: Tensor | float | None = None
    order: Order = ONCE


class Pair(NamedTuple):
    """One adapter as one pair of products: what an ordinary forward reads.

    Attributes:
        down: The name of the parameter that is the down-projection.
        up: That of the up-projection.
        gain: What the product is multiplied by.
        dropout: Probability of dropping an element of the input while training.
    """

    down: str
    up: str
    gain: float
    dropout: float

    def read(self, layer: nn.Module) -> Update:
        """The update, of the parameters as they are.

        Raises:
            KeyError: If one is no longer there.
        """
        return Update(*self.row(layer))

    def row(self, layer: nn.Module) -> tuple[Tensor, Tensor, float, float]:
        """The same, where adapters may stand in a row: a fused form stacks them itself."""
        own: Any = layer._parameters
        return own[self.down], own[self.up], self.gain, self.dropout * layer.training


class Stack(NamedTuple):
    """Several adapters as one pair of products, stacked along their ranks.

    Attributes:
        down: The names of the parameters that are down-projections.
        up: Those of the up-projections.
        gain: What each rank is multiplied by: one number for all, or (R,).
        dropout: Probability of dropping an element of the input while training.
        rank_dims: The dimensions of the two that are the rank.
    """

    down: tuple[str, ...]
    up: tuple[str, ...]
    gain: Tensor | float
    dropout: float
    rank_dims: tuple[int, int]

    def read(self, layer: nn.Module) -> Update:
        """The update, of the parameters as they are.

        Raises:
            KeyError: If one is no longer there.
        """
        down, up, gain, dropout = self.row(layer)
        lora_A, lora_B = torch.cat(down, self.rank_dims[0]), torch.cat(up, self.rank_dims[1])
        return Update(lora_A, lora_B, gain, dropout)

    def row(
        self, layer: nn.Module
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | float, float]:
        """The same, with the adapters in a row: a fused form stacks them itself."""
        own: Any = layer._parameters
        down, up = tuple([own[name] for name in self.down]), tuple([own[name] for name in self.up])
        return down, up, self.gain, self.dropout * layer.training


class Selection(NamedTuple):
    """The active adapters of one layer.

    Attributes:
        names: The active adapters, in the order in which they were chosen.
        strengths: What the user multiplies each by: a number, or one for each sample.
        terms: What each adds; gains are numbers where all are one number.
        bank: The same of all adapters on the layer, zero where one is inactive, with tensors for
            gains: what a compiled graph reads, so that another choice recompiles nothing.
        pair: The terms as one pair of products; None where they are more than that, or none.
    """

    names: tuple[str, ...]
    strengths: tuple[Strength, ...]
    terms: tuple[Term, ...]
    bank: tuple[Term, ...]
    pair: Pair | Stack | None


NOTHING = Selection((), (), (), (), None)  # of a layer without adapters


class Merged(NamedTuple):
    """What a merge did to one layer.

    Attributes:
        strengths: The adapters that were added, and how strongly.
        kept: The original values, None where the merge kept no copy.
        merged: The merged values while `disabled` shows the originals, else None.
        parameter: The layer's own Parameter where the merge had to untie it, else None.
        bias: The bias's original values where the merge changed it, else None.
        merged_bias: As `merged`, of the bias.
    """

    strengths: dict[str, float]
    kept: Tensor | None
    merged: Tensor | None = None
    parameter: nn.Parameter | None = None
    bias: Tensor | None = None
    merged_bias: Tensor | None = None


class Change:
    """One stand of a layer's tensors: another object after each change of them, and during one.

    Attributes:
        thread: Who is changing them; None where nobody is.
    """

    __slots__ = ("thread",)

    def __init__(self, thread: int | None = None) -> None:
        self.thread = thread

    def __reduce__(self) -> Any:
        return Change, ()  # nobody changes a copy


class State(NamedTuple):
    """What a layer knows of its adapters; every change is one assignment of another one.

    Attributes:
        configs: The settings of its adapters, by name.
        slots: The members of each, one object on all its layers, which tells it from another of
            its name that came before or after; kept where a file takes its place.
        selection: What is active.
        merged: What a merge did; None where nothing is merged.
        change: How its tensors stand: a forward that finds another one afterwards runs again.
        pair: What an ordinary forward adds; None where a forward has to look closer.
    """

    configs: Mapping[str, AdapterConfig] = {}  # replaced, never changed
    slots: Mapping[str, Members] = {}
    selection: Selection = NOTHING
    merged: Merged | None = None
    change: Change = Change()
    pair: Pair | Stack | None = None

    @property
    def strengths(self) -> dict[str, Strength]:
        """The active adapters and their strengths, in order."""
        return dict(zip(self.selection.names, self.selection.strengths, strict=True))

    def having(self, **changes: Any) -> "State":
        """The same but for what is given, with what follows from it."""
        new: dict[str, Any] = {**dict(zip(self._fields, self, strict=True)), **changes}
        ordinary = new["merged"] is None and new["change"].thread is None
        new["pair"] = new["selection"].pair if ordinary else None
        return tuple.__new__(State, new.values())  # as `State(**new)`, in a third of the time


def state_of(module: nn.Module) -> State | None:
    """The state of an adapted layer; None of any other module."""
    found: State | None = vars(module).get(STATE)
    return found


def is_settled(layer: nn.Module, before: State) -> bool:
    """Whether a layer's tensors are as they were when this was its state."""
    now = vars(layer).get(STATE)
    return now is not None and now.change is before.change


_LOCK = threading.RLock()


def lock() -> threading.RLock:
    """What is held while states are read and replaced; to be asked for each time."""
    return _LOCK


def _renew_lock() -> None:
    """Gives a forked child a lock that no thread of its parent holds."""
    global _LOCK  # noqa: PLW0603  # the one of the parent may never be released here
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def undone_by(back: Callable[[], object]) -> Iterator[None]:
    """Calls `back` where what follows raises, be it an interrupt: the one way of all verbs."""
    try:
        yield
    except BaseException:
        back()
        raise


# each `with` of one line: what is raised between two lines, as by a debugger, leaves none locked


def change(layer: Any, **changes: Any) -> None:
    """Gives a layer another state, in place."""
    with _LOCK: layer.__dict__[STATE] = layer.lora_state.having(**changes)  # fmt: skip  # noqa: E701


def set_merged(layer: Any, merged: Merged | None) -> None:
    """Lets a layer know what its weight holds, in place; as `change`, for thousands of layers."""
    with _LOCK: _restate(layer, merged=merged)  # fmt: skip  # noqa: E701


def set_changes(layers: Iterable[Any], change: Change) -> None:
    """Says how the tensors of layers stand, in place; likewise."""
    with _LOCK: deque(map(partial(_restate, change=change), layers), 0)  # fmt: skip  # noqa: E701


def _restate(layer: Any, merged: Any = ..., change: Change | None = None) -> None:
    own = layer.__dict__
    configs, slots, selection, was, stand, _ = own[STATE]
    merged, stand = was if merged is ... else merged, stand if change is None else change
    pair = selection.pair if merged is None and stand.thread is None else None
    own[STATE] = tuple.__new__(State, (configs, slots, selection, merged, stand, pair))


def select(
    layer: Any,
    strengths: Mapping[str, Strength],
    configs: Mapping[str, AdapterConfig] | None = None,
    alike: dict[Any, Any] | None = None,
) -> Selection:
    """The selection with these strengths, of the adapters that a layer has, or will have.

    Args:
        layer: The layer.
        strengths: The active adapters; those that the layer has not are passed over.
        configs: The settings of all of its adapters; None for those that it has.
        alike: What was worked out for other layers in the same call, to be shared by those with
            equal settings; changed in place.
    """
    state: State = layer.lora_state
    configs = state.configs if configs is None else configs
    weight = peek(layer)
    device = weight.device
    # what sums are made in, without a call for each layer
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    known = _known(state, configs, device, dtype) if state.selection.bank else {}
    bank = []
    for name, config in configs.items():
        wanted = strengths.get(name, 0.0)
        was, term = known.get(name, (None, None))
        if term is None or was != wanted:
            if wanted:
                _check_gain(name, config, wanted, dtype)
            term = _term(name, config, wanted, device, dtype)
        bank.append(term)
    key = (tuple(map(id, configs.values())), tuple(configs), layer.lora_kind)
    shared = alike.get(key) if alike is not None else None
    if shared is None:
        active = {name: s for name, s in strengths.items() if name in configs}
        terms = _numbers(active, configs)
        pair = _pair(layer, terms) if terms else None
        shared = tuple(active), tuple(active.values()), terms, pair
        if alike is not None:
            alike[key] = shared
    names, values, terms, pair = shared
    if terms is None:  # gains differ, and are tensors then
        terms = tuple(term for name in names for term in bank if term.name == name)
        pair = _pair(layer, terms)
    return Selection(names, values, terms, tuple(bank), pair)


def _known(
    state: State, configs: Mapping[str, AdapterConfig], device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Strength, Term]]:
    """The terms that are there, by adapter with their strengths, of those that still hold.

    An inactive adapter has a gain of its own on every layer, of strength 0: a compiled graph
    guards on which tensors are the same, so one that all shared would make it compile again when
    the choice changes.
    """
    bank = state.selection.bank
    if not bank or (bank[0].gain.device, bank[0].gain.dtype) != (device, dtype):  # type: ignore[union-attr]
        return {}
    active = state.strengths
    kept = (term for term in bank if configs.get(term.name) is state.configs[term.name])
    return {term.name: (active.get(term.name, 0.0), term) for term in kept}


def _numbers(
    active: Mapping[str, Strength], configs: Mapping[str, AdapterConfig]
) -> tuple[Term, ...] | None:
    """The active terms with numbers for gains, which costs a fast path nothing.

    None where they are not all one number.
    """
    terms = []
    for name, strength in active.items():
        if isinstance(strength, tuple):
            return None
        config = configs[name]
        terms.append(Term(name, config.recipe, strength * config.scale, strength))
    return tuple(terms) if len({term.gain for term in terms}) <= 1 else None


def _pair(layer: Any, terms: tuple[Term, ...]) -> Pair | Stack | None:
    """Terms as one pair of products, where nothing of them depends on a call."""
    if not terms:
        return None
    names, dropout, gain = [], terms[0].recipe.dropout, terms[0].gain
    for name, recipe, value, _, _ in terms:
        if not recipe.plain or recipe.dropout != dropout or is_per_sample(value):
            return None
        names.append(name)
    if len(terms) == 1:
        return Pair(f"lora_A_{names[0]}", f"lora_B_{names[0]}", cast(float, gain), dropout)
    if isinstance(gain, Tensor):
        with torch.inference_mode(mode=False):  # as of the gains themselves
            gain = torch.cat([cast(Tensor, t.gain).expand(t.recipe.room) for t in terms])
    down, up = (tuple(f"{part}_{name}" for name in names) for part in ("lora_A", "lora_B"))
    return Stack(down, up, gain, dropout, layer.lora_kind.rank_dims)


def is_per_sample(gain: Tensor | float) -> bool:
    """Whether a gain has an entry for each sample."""
    return isinstance(gain, Tensor) and gain.ndim == 1


def _check_gain(name: str, config: AdapterConfig, strength: Strength, dtype: torch.dtype) -> None:
    scale, limit = config.scale, torch.finfo(dtype).max
    largest = max(map(abs, strength), default=0.0) if isinstance(strength, tuple) else abs(strength)
    value = largest * abs(scale)
    if not value <= limit:
        raise ConfigError(
            f"`strength * scale` must be at most {limit:.3g}, but is {value:.3g} for"
            f" {name!r}. Choose smaller values."
        )


def _term(
    name: str,
    config: AdapterConfig,
    strength: Strength,
    device: torch.device,
    dtype: torch.dtype,
) -> Term:
    scale = config.scale
    product = [s * scale for s in strength] if isinstance(strength, tuple) else strength * scale
    if torch.is_inference_mode_enabled():  # a selection made there must be usable in training
        with torch.inference_mode(mode=False):
            return _term(name, config, strength, device, dtype)
    gain = torch.tensor(product, dtype=dtype, device=device)
    alone = None if config.plain_sum else torch.tensor(strength, dtype=dtype, device=device)
    order = strength.order if isinstance(strength, PerSample) else ONCE
    # copies: a graph guards on which objects two layers share
    return Term(name, tuple.__new__(Recipe, config.recipe), gain, alone, Order(*order))
