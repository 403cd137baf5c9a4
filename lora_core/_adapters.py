"""The adapters on a model: listing them, and choosing which are active and how strongly."""

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lora_core._config import AdapterConfig, check_finite
from lora_core._errors import (
    AdapterError,
    ConfigError,
    MergeError,
    UnsupportedLayerError,
    listed,
)
from lora_core._layers import LoRAMixin, Selection
from lora_core._reports import AdapterSummary, Summary, count

_NONE = Selection((), (), ())


def clean(name: str) -> str:
    """A module's dotted name without what `torch.compile` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def adapted_layers(model: nn.Module) -> dict[str, LoRAMixin]:
    """The layers of `model` that carry adapters, each once, by their first dotted name."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be an nn.Module, but is {type(model).__name__}.")
    return {clean(n): m for n, m in model.named_modules() if isinstance(m, LoRAMixin)}


def adapter_names(layers: Mapping[str, LoRAMixin]) -> list[str]:
    """The names of all adapters on these layers, in order of arrival."""
    return list(dict.fromkeys(name for layer in layers.values() for name in layer.lora_configs))


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
    found = {n: m for n, m in layers.items() if name is None or name in m.lora_configs}
    if not found:
        raise AdapterError(
            f"`name` must be an adapter of the model, but is {name!r};"
            f" it has {listed(adapter_names(layers))}."
        )
    return found


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
        UnsupportedLayerError: If one stands where nothing would call it, so that its factors
            would never get a gradient.

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
        factor
        for layer in layers.values()
        for adapter in layer.lora_configs
        if name in (None, adapter)
        for factor in layer.factors(adapter)
    ]


def summary(model: nn.Module) -> Summary:
    """How the adapters of a model stand; changes nothing and prints as a table."""
    layers = adapted_layers(model)
    adapters = []
    for name in adapter_names(layers):
        mine = {n: m for n, m in layers.items() if name in m.lora_configs}
        factors = [factor for m in mine.values() for factor in m.factors(name)]
        strengths = (_strengths(m)[name] for m in mine.values() if name in _strengths(m))
        adapters.append(
            AdapterSummary(
                name=name,
                layers=tuple(mine),
                ranks=tuple(sorted({m.lora_configs[name].rank for m in mine.values()})),
                scales=tuple(sorted({m.lora_configs[name].scale for m in mine.values()})),
                parameters=count(factors),
                nbytes=sum(p.numel() * p.element_size() for p in factors),
                strengths=tuple(dict.fromkeys(strengths)),
                trainable=any(p.requires_grad for p in factors),
                merged=any(
                    m.lora_merged and name in m.lora_merged.strengths for m in mine.values()
                ),
            )
        )
    everything = list(model.parameters())
    return Summary(
        adapters=tuple(adapters),
        trainable=count([p for p in everything if p.requires_grad]),
        total=count(everything),
    )


def _strengths(layer: LoRAMixin) -> dict[str, float]:
    """The strengths that a layer's output shows: those merged in, or those selected."""
    if layer.lora_merged is not None:
        return layer.lora_merged.strengths
    return dict(zip(*layer.lora_selection[:2], strict=True))


class _Found(NamedTuple):
    """What a scope found on one layer.

    Attributes:
        selection: What was selected.
        adapters: The adapters there were, known by their settings' identity: one that left and
            another that came under its name are two.
        hides: Whether the scope needs merged values hidden.
    """

    selection: Selection
    adapters: Mapping[str, AdapterConfig]
    hides: bool


class _Scope:
    """A change of selections that can be taken back, in whatever order scopes come to an end.

    Taking one back restores what it found, and with it whatever was chosen since. A block entered
    since that is not over goes on showing what it shows, and restores in place of this one.

    Attributes:
        entered: Whether this is a block, not a receipt alone.
    """

    def __init__(self, layers: Iterable[LoRAMixin], *, entered: bool, hides: bool) -> None:
        self.entered = entered
        self._found: dict[LoRAMixin, _Found] = {}
        with _LOCK:
            for layer in layers:
                hidden = hides and layer.lora_merged is not None
                found = _Found(layer.lora_selection, dict(layer.lora_configs), hidden)
                others = _scopes(layer)
                self._found[layer] = found
                _SCOPES[layer] = [weakref.ref(scope) for scope in [*others, self]]

    @property
    def over(self) -> bool:
        """Whether there is nothing left to take back."""
        return not self._found

    def undo(self) -> None:
        """Puts back what was there before."""
        with _LOCK:
            for layer in list(self._found):
                self._leave(layer)

    def _leave(self, layer: LoRAMixin) -> None:
        mine, scopes = self._found[layer], _scopes(layer)
        since = scopes[scopes.index(self) + 1 :]
        heir = next((scope for scope in since if scope.entered), None)
        alive = "lora_configs" in vars(layer)
        if heir is not None:
            theirs = heir._found[layer]
            if alive:
                selection = _restored(layer, mine, theirs.selection)
                heir._found[layer] = theirs._replace(selection=selection)
            since = since[: since.index(heir)]
        elif alive:
            layer.lora_selection = _restored(layer, mine, layer.lora_selection)
        left = [scope for scope in scopes if scope is not self and scope not in since]
        if mine.hides and not any(scope._found[layer].hides for scope in left):
            _show(layer)
        for scope in (self, *since):
            del scope._found[layer]
        _SCOPES[layer] = [weakref.ref(scope) for scope in left]
        if not left:
            del _SCOPES[layer]


_LOCK = threading.RLock()


def _renew_lock() -> None:
    """Gives a forked child a lock that no thread of its parent holds."""
    global _LOCK  # noqa: PLW0603  # the one of the parent may never be released here
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

# layer -> the scopes over it, the outermost first; one that nobody holds can't end any more
_SCOPES: weakref.WeakKeyDictionary[LoRAMixin, list[weakref.ref[_Scope]]] = (
    weakref.WeakKeyDictionary()
)


def _scopes(layer: LoRAMixin) -> list[_Scope]:
    scopes = (ref() for ref in _SCOPES.get(layer, ()))
    return [scope for scope in scopes if scope is not None and layer in scope._found]


def _restored(layer: LoRAMixin, found: _Found, now: Selection) -> Selection:
    """What was found, of the adapters that are still there.

    Adapters that came in the meantime stay as active as they are `now`.
    """
    names, strengths, gains = found.selection
    here = {n for n, c in layer.lora_configs.items() if found.adapters.get(n) is c}
    new = {name: s for name, s in zip(*now[:2], strict=True) if name not in here}
    weight = layer.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    fit = all((gain.device, gain.dtype) == (weight.device, wide) for gain in gains)
    if not new and fit and here.issuperset(names):
        return found.selection
    old = {name: s for name, s in zip(names, strengths, strict=True) if name in here}
    return layer.select({**old, **new})


def _hide(layer: LoRAMixin) -> None:
    """Shows the original values of a merged layer."""
    state = layer.lora_merged
    if state is not None and state.merged is None and state.kept is not None:
        layer.lora_merged = state._replace(merged=layer.weight.data)
        swap(layer.weight, state.kept)


def _show(layer: LoRAMixin) -> None:
    """Shows the merged values again."""
    state = vars(layer).get("lora_merged")
    if state is not None and state.merged is not None:
        swap(layer.weight, state.merged)
        layer.lora_merged = state._replace(merged=None)


class Scales(_Scope, AbstractContextManager["Scales"]):
    """What `scales` did; leaving it as a context puts back what was there before.

    Attributes:
        strengths: The active adapters and their strengths.
    """

    def __init__(self, layers: Mapping[str, LoRAMixin], strengths: Mapping[str, float]) -> None:
        self.strengths = dict(strengths)
        self._chosen = [(layer, layer.select(self.strengths)) for layer in layers.values()]
        self._choose(entered=False)

    def _choose(self, *, entered: bool) -> None:
        with _LOCK, ExitStack() as undo:
            super().__init__([layer for layer, _ in self._chosen], entered=entered, hides=False)
            undo.callback(self.undo)
            for layer, selection in self._chosen:
                layer.lora_selection = selection
            undo.pop_all()
        self._ended = False

    def undo(self) -> None:
        """Puts back what was there before."""
        self._ended, self._chosen = True, []
        super().undo()

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value:g}" for name, value in self.strengths.items())
        return f"scales({inner})"

    def __enter__(self) -> Self:
        if self._ended:
            raise ConfigError(
                "A `scales` block must be entered once, but this one is over and its strengths are"
                " gone. Call `scales(model, ...)` again."
            )
        with _LOCK:
            # an earlier block that ended in the meantime took this receipt back with it
            if self.over:
                self._choose(entered=True)
            self.entered = True
        return self

    def __reduce__(self) -> Any:
        raise ConfigError(
            "What `scales` returns must stay with the model it was made for, but was to be copied."
            " Copy the model alone."
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def scales(model: nn.Module, /, **strengths: float) -> Scales:
    """Chooses the active adapters and their strengths, in place.

    The adapters named become the active ones, in this order, each multiplied by its strength on
    top of its layers' scales; all others become inactive. Works at once, and as a context manager
    that restores what it found.

    Args:
        model: A model with adapters.
        strengths: A strength for each adapter that is to be active.

    Raises:
        AdapterError: If a name is no adapter of the model.
        ConfigError: If a strength is no finite number, or none is given.
        MergeError: If the model is merged: its weights hold the strengths that they were given.

    Example:
        >>> from lora_core import LoRALinear
        >>> layer = LoRALinear(nn.Linear(3, 5), rank=2, name="style")
        >>> with scales(layer, style=0.5):
        ...     summary(layer).adapters[0].strengths
        (0.5,)
        >>> summary(layer).adapters[0].strengths
        (1.0,)
    """
    layers = layers_with(model, None)
    known = adapter_names(layers)
    unknown = [name for name in strengths if name not in known]
    if unknown:
        raise AdapterError(
            f"`scales` must name adapters of the model, but got {listed(unknown)};"
            f" it has {listed(known)}."
        )
    if not strengths:
        raise ConfigError(
            "`scales` must be given a strength for an adapter, but got none."
            f" Write `scales(model, {known[0]}=1.0)`, or use `disabled(model)`."
        )
    checked = {name: check_finite(name, value) for name, value in strengths.items()}
    merged = [name for name, layer in layers.items() if layer.lora_merged is not None]
    if merged:
        raise MergeError(
            f"Strengths must be chosen while unmerged, but {listed(merged)} is merged."
            " Call `unmerge(model)` first, then `scales`, then `merge`."
        )
    return Scales(layers, checked)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Shows the base model for a while, merged or not, and restores exactly what it found.

    Blocks may overlap, as those of two threads or generators do: each shows the base to its end.

    Raises:
        AdapterError: If the model has no adapter.
        MergeError: If it was merged with ``reversible=False``: the base is gone.
    """
    layers = layers_with(model, None)
    gone = [
        n for n, m in layers.items() if m.lora_merged is not None and m.lora_merged.kept is None
    ]
    if gone:
        raise MergeError(
            f"`disabled` must have the original weights, but {listed(gone)} was merged with"
            " reversible=False. Load the base model again."
        )
    scope = _Scope(layers.values(), entered=True, hides=True)
    try:
        with _LOCK:
            for layer in layers.values():
                if layer.lora_merged is None:
                    layer.lora_selection = _NONE
                else:
                    _hide(layer)
        yield
    finally:
        scope.undo()


def swap(weight: Tensor, values: Tensor) -> None:
    """Gives a Parameter other values without a copy, and lets autograd know.

    A backward through a forward made before the swap raises instead of using wrong values.
    """
    weight.data = values.to(weight.device, weight.dtype)
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)
