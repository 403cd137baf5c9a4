"""Changes of what is active that can be taken back, in whatever order they come to an end."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

from torch import Tensor, nn

from lora_core._adapters.names import layers_with, without_base
from lora_core._errors import MergeError, listed
from lora_core._layers import (
    LoRAMixin,
    Selection,
    State,
    Strength,
    change,
    changing,
    lock,
    peek,
    refuse_pinned,
    select,
    state_of,
)
from lora_core.kernels.norms import sum_dtype


class _Found(NamedTuple):
    """What a scope found on one layer.

    Attributes:
        state: What the layer knew of its adapters; those that left and came again are others.
        hides: Whether the scope needs merged values hidden.
    """

    state: State
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
        with lock():
            for layer in layers:
                state = layer.lora_state
                found = _Found(state, hides and state.merged is not None)
                others = _scopes(layer)
                self._found[layer] = found
                SCOPES[layer] = [weakref.ref(scope) for scope in [*others, self]]

    @property
    def over(self) -> bool:
        """Whether there is nothing left to take back."""
        return not self._found

    def undo(self) -> None:
        """Puts back what was there before; an interrupt comes afterwards."""
        interrupted: BaseException | None = None
        with lock():
            for layer in list(self._found):
                try:
                    self._leave(layer)
                except KeyboardInterrupt as error:
                    interrupted = error
                    if layer in self._found:  # each step may be done twice
                        self._leave(layer)
        if interrupted is not None:
            raise interrupted

    def _leave(self, layer: LoRAMixin) -> None:
        mine, scopes = self._found[layer], _scopes(layer)
        since = scopes[scopes.index(self) + 1 :]
        heir = next((scope for scope in since if scope.entered), None)
        now = state_of(layer)
        if heir is not None:
            theirs = heir._found[layer]
            if now is not None:
                selection = _restored(layer, mine.state, theirs.state.selection)
                found = theirs.state._replace(selection=selection)
                heir._found[layer] = theirs._replace(state=found)
            since = since[: since.index(heir)]
        elif now is not None:
            change(layer, selection=_restored(layer, mine.state, now.selection))
        left = [scope for scope in scopes if scope is not self and scope not in since]
        if mine.hides and not any(scope._found[layer].hides for scope in left):
            _show(layer)
        for scope in (self, *since):
            del scope._found[layer]
        SCOPES[layer] = [weakref.ref(scope) for scope in left]
        if not left:
            del SCOPES[layer]


# layer -> the scopes over it, the outermost first; one that nobody holds can't end any more
SCOPES: weakref.WeakKeyDictionary[LoRAMixin, list[weakref.ref[Scope]]] = weakref.WeakKeyDictionary()


def _scopes(layer: LoRAMixin) -> list[Scope]:
    scopes = (ref() for ref in SCOPES.get(layer, ()))
    return [scope for scope in scopes if scope is not None and layer in scope._found]


def _restored(layer: LoRAMixin, found: State, now: Selection) -> Selection:
    """What was selected, of the adapters that are still there.

    Adapters that came in the meantime stay as active as they are `now`.
    """
    state = layer.lora_state
    here = {n for n, slot in state.slots.items() if found.slots.get(n) is slot}
    new = {name: s for name, s in zip(now.names, now.strengths, strict=True) if name not in here}
    weight = peek(layer)
    wide = sum_dtype(weight.dtype)
    gains = [cast(Tensor, term.gain) for term in found.selection.bank]
    fit = all((gain.device, gain.dtype) == (weight.device, wide) for gain in gains)
    if not new and fit and found.configs is state.configs:
        return found.selection
    return select(layer, {**{n: s for n, s in found.strengths.items() if n in here}, **new})


def join(layer: LoRAMixin, name: str, like: LoRAMixin) -> None:
    """Lets the blocks over `like` restore an adapter's strength on a layer that has it new, too."""
    state = layer.lora_state
    for scope in _scopes(like):
        theirs = scope._found[like].state
        if theirs.slots.get(name) is not state.slots[name]:
            continue
        mine = scope._found.get(layer)
        if mine is None:
            mine = _Found(state._replace(selection=select(layer, {}), slots={}), hides=False)
            SCOPES.setdefault(layer, []).append(weakref.ref(scope))
        before, strengths = mine.state.strengths, theirs.strengths
        wanted = before | ({name: strengths[name]} if name in strengths else {})
        found = mine.state._replace(
            selection=select(layer, wanted),
            configs=state.configs,
            slots={**mine.state.slots, name: state.slots[name]},
        )
        scope._found[layer] = mine._replace(state=found)


def strengths_over(layer: LoRAMixin, name: str) -> list[Strength]:
    """The strengths that an adapter of a layer will have when a block ends."""
    chosen = [scope._found[layer].state.strengths for scope in _scopes(layer)]
    return [strengths[name] for strengths in chosen if name in strengths]


def _hide(layer: LoRAMixin) -> None:
    """Shows the original values of a merged layer."""
    kind, merged = layer.lora_kind, layer.lora_state.merged
    if merged is not None and merged.merged is None and merged.kept is not None:
        held, bias = kind.held(layer), kind.held_bias(layer)
        with changing(layer):
            change(layer, merged=merged._replace(merged=held, merged_bias=bias))
            kind.put(layer, merged.kept, merged.bias)


def _show(layer: LoRAMixin) -> None:
    """Shows the merged values again."""
    state = state_of(layer)
    merged = None if state is None else state.merged
    if merged is not None and merged.merged is not None:
        bias = None if merged.bias is None else merged.merged_bias
        with changing(layer):
            layer.lora_kind.put(layer, merged.merged, bias)
            change(layer, merged=merged._replace(merged=None, merged_bias=None))


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
        with lock():
            for layer in layers.values():
                if layer.lora_state.merged is None:
                    change(layer, selection=select(layer, {}))
                else:
                    _hide(layer)
        yield
    finally:
        scope.undo()
