"""Changes of what is active that can be taken back, in whatever order they come to an end."""

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from lora_core._adapters.listing import layers_with, without_base
from lora_core._config import AdapterConfig
from lora_core._errors import MergeError, listed
from lora_core._layers import LoRAMixin, Selection, Strength, peek, refuse_pinned


class _Found(NamedTuple):
    """What a scope found on one layer.

    Attributes:
        selection: What was selected.
        configs: The settings that it was made for.
        slots: The adapters there were: one that left and another that came under its name are two.
        hides: Whether the scope needs merged values hidden.
    """

    selection: Selection
    configs: Mapping[str, AdapterConfig]
    slots: Mapping[str, object]
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
                found = _Found(layer.lora_selection, layer.lora_configs, layer.lora_slots, hidden)
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
    names, strengths, gains, _ = found.selection
    here = {n for n, slot in layer.lora_slots.items() if found.slots.get(n) is slot}
    new = {name: s for name, s in zip(*now[:2], strict=True) if name not in here}
    weight = peek(layer)
    wide = torch.promote_types(weight.dtype, torch.float32)
    fit = all((g.value.device, g.value.dtype) == (weight.device, wide) for g in gains)  # type: ignore[union-attr]
    if not new and fit and found.configs is layer.lora_configs:
        return found.selection
    old = {name: s for name, s in zip(names, strengths, strict=True) if name in here}
    return layer.lora_select({**old, **new})


def join(layer: LoRAMixin, name: str, like: LoRAMixin) -> None:
    """Lets the blocks over `like` restore an adapter's strength on a layer that has it new, too."""
    for scope in _scopes(like):
        theirs = scope._found[like]
        if theirs.slots.get(name) is not layer.lora_slots[name]:
            continue
        strengths = dict(zip(*theirs.selection[:2], strict=True))
        mine = scope._found.get(layer)
        if mine is None:
            mine = _Found(layer.lora_select({}), layer.lora_configs, {}, hides=False)
            SCOPES.setdefault(layer, []).append(weakref.ref(scope))
        before = dict(zip(*mine.selection[:2], strict=True))
        wanted = before | ({name: strengths[name]} if name in strengths else {})
        scope._found[layer] = mine._replace(
            selection=layer.lora_select(wanted),
            configs=layer.lora_configs,
            slots={**mine.slots, name: layer.lora_slots[name]},
        )


def strengths_over(layer: LoRAMixin, name: str) -> list[Strength]:
    """The strengths that an adapter of a layer will have when a block ends."""
    chosen = [
        dict(zip(*scope._found[layer].selection[:2], strict=True)) for scope in _scopes(layer)
    ]
    return [strengths[name] for strengths in chosen if name in strengths]


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

    Blocks may overlap, as those of two threads or generators do: each shows the base to its end. An
    adapter that arrives inside one is active there.

    Raises:
        AdapterError: If the model has no adapter.
        MergeError: If it was merged with ``reversible=False``: the base is gone.
    """
    layers = layers_with(model, None)
    gone = without_base(layers)
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
