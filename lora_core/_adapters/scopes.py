"""Changes of what is active that can be taken back, in whatever order they come to an end."""

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from lora_core._adapters.listing import layers_with
from lora_core._config import AdapterConfig
from lora_core._errors import MergeError, listed
from lora_core._layers import LoRAMixin, Selection, peek, refuse_pinned


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


class Scope:
    """A change of selections that can be taken back, in whatever order scopes come to an end.

    Taking one back restores what it found, and with it whatever was chosen since. A block entered
    since that is not over goes on showing what it shows, and restores in place of this one.

    Attributes:
        entered: Whether this is a block, not a receipt alone.
    """

    def __init__(self, layers: Iterable[LoRAMixin], *, entered: bool, hides: bool) -> None:
        self.entered = entered
        self._found: dict[LoRAMixin, _Found] = {}
        with LOCK:
            for layer in layers:
                hidden = hides and layer.lora_merged is not None
                found = _Found(layer.lora_selection, dict(layer.lora_configs), hidden)
                others = _scopes(layer)
                self._found[layer] = found
                SCOPES[layer] = [weakref.ref(scope) for scope in [*others, self]]

    @property
    def over(self) -> bool:
        """Whether there is nothing left to take back."""
        return not self._found

    def undo(self) -> None:
        """Puts back what was there before."""
        with LOCK:
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
        SCOPES[layer] = [weakref.ref(scope) for scope in left]
        if not left:
            del SCOPES[layer]


LOCK = threading.RLock()  # to be read from this module each time: a fork renews it


def _renew_lock() -> None:
    """Gives a forked child a lock that no thread of its parent holds."""
    global LOCK  # noqa: PLW0603  # the one of the parent may never be released here
    LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

# layer -> the scopes over it, the outermost first; one that nobody holds can't end any more
SCOPES: weakref.WeakKeyDictionary[LoRAMixin, list[weakref.ref[Scope]]] = weakref.WeakKeyDictionary()


def _scopes(layer: LoRAMixin) -> list[Scope]:
    scopes = (ref() for ref in SCOPES.get(layer, ()))
    return [scope for scope in scopes if scope is not None and layer in scope._found]


def _restored(layer: LoRAMixin, found: _Found, now: Selection) -> Selection:
    """What was found, of the adapters that are still there.

    Adapters that came in the meantime stay as active as they are `now`.
    """
    names, strengths, gains, bank = found.selection
    here = {n for n, c in layer.lora_configs.items() if found.adapters.get(n) is c}
    new = {name: s for name, s in zip(*now[:2], strict=True) if name not in here}
    weight = peek(layer)
    wide = torch.promote_types(weight.dtype, torch.float32)
    fit = all((g.value.device, g.value.dtype) == (weight.device, wide) for g in gains)  # type: ignore[union-attr]
    whole = list(found.adapters) == list(layer.lora_configs) and len(here) == len(bank)
    if not new and fit and whole and here.issuperset(names):
        return found.selection
    old = {name: s for name, s in zip(names, strengths, strict=True) if name in here}
    return layer.lora_select({**old, **new})


def pass_on(layer: LoRAMixin, name: str, old: AdapterConfig) -> None:
    """Lets the scopes over a layer take an adapter for the one whose place it took."""
    for scope in _scopes(layer):
        found = scope._found[layer]
        if found.adapters.get(name) is old:
            adapters = {**found.adapters, name: layer.lora_configs[name]}
            names, strengths, _, _ = found.selection
            here = {n: s for n, s in zip(names, strengths, strict=True) if n in layer.lora_configs}
            selection = layer.lora_select(here)
            scope._found[layer] = found._replace(selection=selection, adapters=adapters)


def _hide(layer: LoRAMixin) -> None:
    """Shows the original values of a merged layer."""
    state = layer.lora_merged
    if state is not None and state.merged is None and state.kept is not None:
        layer.lora_merged = state._replace(
            merged=layer.lora_held(), merged_bias=layer.lora_held_bias()
        )
        layer.lora_put(state.kept, state.bias)


def _show(layer: LoRAMixin) -> None:
    """Shows the merged values again."""
    state = vars(layer).get("lora_merged")
    if state is not None and state.merged is not None:
        layer.lora_put(state.merged, None if state.bias is None else state.merged_bias)
        layer.lora_merged = state._replace(merged=None, merged_bias=None)


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
    refuse_pinned("disabled", layers.values())
    scope = Scope(layers.values(), entered=True, hides=True)
    try:
        with LOCK:
            for layer in layers.values():
                if layer.lora_merged is None:
                    layer.lora_selection = layer.lora_select({})
                else:
                    _hide(layer)
        yield
    finally:
        scope.undo()
