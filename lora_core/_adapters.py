"""The adapters on a model: listing them, and choosing which are active and how strongly."""

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from lora_core._layers import CHILD, LoRAMixin, LoRAWeight, Selection, Strength
from lora_core._reports import AdapterSummary, Summary, count


def clean(name: str) -> str:
    """A module's dotted name without what `torch.compile`, or an adapted parameter, puts into it.

    Example:
        >>> clean("_orig_mod.attn.lora_at_q_proj_weight"), clean("attn.out_proj.lora_at")
        ('attn.q_proj_weight', 'attn.out_proj')
    """
    if "_orig_mod" not in name and CHILD not in name:
        return name
    parts = (part for part in name.split(".") if part not in ("_orig_mod", CHILD))
    return ".".join(part.removeprefix(f"{CHILD}_") for part in parts)


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
        UnsupportedLayerError: If a layer was placed by hand where nothing would call it, so that
            its factors would never get a gradient.

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
        part
        for layer in layers.values()
        for adapter in layer.lora_configs
        if name in (None, adapter)
        for part in layer.lora_trained_parts(adapter).values()
    ]


def summary(model: nn.Module) -> Summary:
    """How the adapters of a model stand; changes nothing and prints as a table."""
    layers = adapted_layers(model)
    adapters = []
    for name in adapter_names(layers):
        mine = {n: m for n, m in layers.items() if name in m.lora_configs}
        factors = [part for m in mine.values() for part in m.lora_parts(name).values()]
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


def _strengths(layer: LoRAMixin) -> Mapping[str, Strength]:
    """The strengths that a layer's output shows: those merged in, or those selected."""
    if layer.lora_merged is not None:
        merged: Mapping[str, Strength] = layer.lora_merged.strengths
        return merged
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
    names, strengths, gains, bank = found.selection
    here = {n for n, c in layer.lora_configs.items() if found.adapters.get(n) is c}
    new = {name: s for name, s in zip(*now[:2], strict=True) if name not in here}
    weight = layer.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    fit = all((gain.device, gain.dtype) == (weight.device, wide) for gain in gains)
    whole = list(found.adapters) == list(layer.lora_configs) and len(here) == len(bank)
    if not new and fit and whole and here.issuperset(names):
        return found.selection
    old = {name: s for name, s in zip(names, strengths, strict=True) if name in here}
    return layer.lora_select({**old, **new})


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


class Scales(_Scope, AbstractContextManager["Scales"]):
    """What `scales` did; leaving it as a context puts back what was there before.

    Attributes:
        strengths: The active adapters and their strengths.
    """

    def __init__(self, layers: Mapping[str, LoRAMixin], strengths: Mapping[str, Strength]) -> None:
        self.strengths = dict(strengths)
        self._chosen = [(layer, layer.lora_select(self.strengths)) for layer in layers.values()]
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
        inner = ", ".join(f"{name}={shown(s)}" for name, s in self.strengths.items())
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


Sample = str | None | Mapping[str, float]


def scales(
    model: nn.Module,
    samples: Sequence[Sample] | None = None,
    /,
    **strengths: float | Sequence[float] | Tensor,
) -> Scales:
    """Chooses the active adapters and their strengths, in place.

    The adapters named become the active ones, in this order, each multiplied by its strength on
    top of its layers' scales; all others become inactive. Works at once, and as a context manager
    that restores what it found.

    A strength may be a tensor or a list with one entry for each sample of a batch; `samples` says
    the same sample by sample. Such a mix costs what one adapter of all their ranks costs, trains
    as well, and holds for the doubled batch of classifier-free guidance too. A layer whose input
    has another batch (2 x samples is taken for guidance) raises when it is called.

    Args:
        model: A model with adapters.
        samples: For each sample an adapter's name, a mapping of names to strengths, or None for
            the base model.
        strengths: A strength for each adapter that is to be active.

    Raises:
        AdapterError: If a name is no adapter of the model.
        ConfigError: If a strength is no finite number, numbers of samples differ, or none is given.
        UnsupportedLayerError: If samples are told apart on an adapter in a parameter that is read,
            which all samples share, or on one with magnitudes (DoRA).
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
    asked: dict[str, Any] = dict(strengths)
    if samples is not None:
        if asked:
            raise ConfigError(
                "`scales` must be given samples or strengths, but got both. Put the strengths into"
                " the samples, as in [{'style': 0.5}, None]."
            )
        asked = _by_adapter(samples)
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise AdapterError(
            f"`scales` must name adapters of the model, but got {listed(unknown)};"
            f" it has {listed(known)}."
        )
    if not asked:
        raise ConfigError(
            "`scales` must be given a strength for an adapter, but got none."
            f" Write `scales(model, {known[0]}=1.0)`, or use `disabled(model)`."
        )
    checked = {name: _strength(name, value) for name, value in asked.items()}
    _check_samples(layers, checked)
    merged = [name for name, layer in layers.items() if layer.lora_merged is not None]
    if merged:
        raise MergeError(
            f"Strengths must be chosen while unmerged, but {listed(merged)} is merged."
            " Call `unmerge(model)` first, then `scales`, then `merge`."
        )
    return Scales(layers, checked)


def _by_adapter(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """A list of strengths for each adapter, from what each sample asks for."""
    if isinstance(samples, str | Mapping) or not isinstance(samples, Sequence) or not samples:
        raise ConfigError(
            "`samples` must be a list with a name, a mapping of names to strengths, or None for"
            f" each sample, but is {samples!r}."
        )
    mixes: list[Mapping[str, float]] = []
    for sample in samples:
        mix = {sample: 1.0} if isinstance(sample, str) else {} if sample is None else sample
        if not isinstance(mix, Mapping):
            raise ConfigError(
                "`samples` must hold names, mappings of names to strengths, or None, but holds"
                f" {sample!r}."
            )
        mixes.append(mix)
    names = dict.fromkeys(name for mix in mixes for name in mix)
    return {name: [mix.get(name, 0.0) for mix in mixes] for name in names}


def _strength(name: str, value: object) -> Strength:
    """One strength, or one for each sample."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ConfigError(
                f"`{name}` must be a strength that takes no gradient, but requires one."
                " Pass `strength.detach()`."
            )
        if value.ndim > 1 or value.is_complex():
            raise ConfigError(
                f"`{name}` must be a number or hold one for each sample, but has shape"
                f" {tuple(value.shape)}."
            )
        value = value.tolist()
    if isinstance(value, list | tuple):
        if not value:
            raise ConfigError(f"`{name}` must hold a number for each sample, but is empty.")
        return tuple(check_finite(name, v) for v in value)
    return check_finite(name, value)


def _check_samples(layers: Mapping[str, LoRAMixin], strengths: Mapping[str, Strength]) -> None:
    """Refuses strengths per sample that differ in number, or where samples can't be told apart."""
    sizes = {name: len(s) for name, s in strengths.items() if isinstance(s, tuple)}
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"Strengths must be given for one number of samples, but differ: {sizes!r}."
        )
    shared = [
        f"{n} ({name})"
        for n, layer in layers.items()
        for name in sizes
        if name in layer.lora_configs
        and (isinstance(layer, LoRAWeight) or layer.lora_configs[name].dora)
    ]
    if shared:
        raise UnsupportedLayerError(
            "A strength per sample must go to layers that see samples, but"
            f" {listed(shared)} adapts a weight that all samples share. Give one number, or eject"
            " the adapter there."
        )


def shown(strength: Strength) -> str:
    """A strength as a receipt prints it."""
    if isinstance(strength, tuple):
        return "(" + ", ".join(f"{s:g}" for s in strength) + ")"
    return f"{strength:g}"


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
                    layer.lora_selection = layer.lora_select({})
                else:
                    _hide(layer)
        yield
    finally:
        scope.undo()
