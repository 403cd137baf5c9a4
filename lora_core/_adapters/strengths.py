"""Choosing which adapters are active, and how strongly."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from lora_core._adapters import scopes
from lora_core._adapters.names import adapter_names, by_pattern, check_known, layers_with
from lora_core._config import check_finite, check_flag
from lora_core._errors import (
    ConfigError,
    MergeError,
    UnsupportedLayerError,
    listed,
)
from lora_core._layers import (
    ONCE,
    LoRAMixin,
    Order,
    PerSample,
    Strength,
    change,
    lock,
    refuse_pinned,
    select,
    undone_by,
)


class Scales(scopes.Scope, AbstractContextManager["Scales"]):
    """What `scales` did; leaving it as a context puts back what was there before.

    Attributes:
        strengths: The active adapters and their strengths, or those by layer.
    """

    def __init__(
        self,
        layers: Mapping[str, LoRAMixin],
        strengths: Mapping[str, Strength | Mapping[str, Strength]],
    ) -> None:
        self.strengths = dict(strengths)
        alike: dict[object, dict[Any, Any]] = {}  # what layers of equal strengths share
        self._chosen = []
        for n, layer in layers.items():
            here: dict[str, Strength] = {}
            for name, strength in strengths.items():
                if not isinstance(strength, Mapping):
                    here[name] = strength
                elif n in strength:
                    here[name] = strength[n]
            key = tuple(here.items())
            self._chosen.append((layer, select(layer, here, None, alike.setdefault(key, {}))))
        self._choose(entered=False)

    def _choose(self, *, entered: bool) -> None:
        with lock():
            super().__init__([layer for layer, _ in self._chosen], entered=entered, hides=False)
            with undone_by(self.undo):
                for layer, selection in self._chosen:
                    change(layer, selection=selection)
        self._ended = False

    def undo(self) -> None:
        """Puts back what was there before."""
        self._ended, self._chosen = True, []
        super().undo()

    def __repr__(self) -> str:
        inner = [f"{name}={shown(s)}" for name, s in self.strengths.items()]
        order = next((s.order for s in self.strengths.values() if isinstance(s, PerSample)), ONCE)
        inner += ["guidance=True"] * order.guidance
        inner += [f"repeats={order.repeats}"] * (order.repeats > 1)
        return f"scales({', '.join(inner)})"

    def __enter__(self) -> Self:
        if self._ended:
            raise ConfigError(
                "A `scales` block must be entered once, but this one is over and its strengths are"
                " gone. Call `scales(model, ...)` again."
            )
        with lock():
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
    *,
    # of any type, or no checker would take `**` of a mapping of strengths
    guidance: object = False,
    repeats: object = 1,
    **strengths: float | Sequence[float] | Tensor | Mapping[str, float],
) -> Scales:
    """Chooses the active adapters and their strengths, in place.

    The adapters named become the active ones, in this order, each multiplied by its strength on
    top of its layers' scales; all others become inactive. Works at once, and as a context manager
    that restores what it found.

    A strength may be a mapping of globs, as in ``{"*mid*": 0.3, "*": 1.0}``: each layer has that of
    the first which matches its name, and each must have one.

    A strength may be a tensor or a list with one entry for each sample of a batch; `samples` says
    the same sample by sample. Such a mix costs what one adapter of all their ranks costs, and
    trains as well. Programs that draw or write repeat samples: classifier-free guidance puts the
    whole batch twice, one after the other, and several pictures or beams for each prompt put each
    sample several times in a row. Nothing is guessed: `guidance` and `repeats` say so, and a layer
    whose input has another batch raises when it is called.

    Args:
        model: A model with adapters.
        samples: For each sample an adapter's name, a mapping of names to strengths, or None for
            the base model.
        guidance: Whether a batch may hold all samples twice, the whole batch after itself.
        repeats: How often a batch may hold each sample, one after the other; as in
            `num_images_per_prompt`, `num_return_sequences` and `num_beams`.
        strengths: A strength for each adapter that is to be active.

    Raises:
        AdapterError: If a name is no adapter of the model.
        TargetError: If a pattern matches no layer of its adapter, or a layer no pattern.
        ConfigError: If a strength is no finite number, numbers of samples differ, or none is given.
        UnsupportedLayerError: If samples are told apart on an adapter in a parameter that is read,
            which all samples share, or on one with magnitudes (DoRA).
        MergeError: If the model is merged: its weights hold the strengths that they were given.

    Example:
        >>> from lora_core import LoRALinear, summary
        >>> layer = LoRALinear(nn.Linear(3, 5), rank=2, name="style")
        >>> with scales(layer, style=0.5):
        ...     summary(layer).adapters[0].strengths
        (0.5,)
        >>> summary(layer).adapters[0].strengths
        (1.0,)
    """
    order = Order(check_flag("guidance", guidance), _repeats(repeats))
    with lock():  # or another thread's eject could come between the look and the choice
        return _scales(layers_with(model, None), samples, order, dict(strengths))


def _scales(
    layers: Mapping[str, LoRAMixin],
    samples: Sequence[Sample] | None,
    order: Order,
    asked: dict[str, Any],
) -> Scales:
    known = adapter_names(layers)
    if samples is not None:
        if asked:
            raise ConfigError(
                "`scales` must be given samples or strengths, but got both. Put the strengths into"
                " the samples, as in [{'style': 0.5}, None]."
            )
        asked = _by_adapter(samples)
    check_known("scales", asked, known)
    if not asked and samples is None:
        raise ConfigError(
            "`scales` must be given a strength for an adapter, but got none."
            f" Write `scales(model, {known[0]}=1.0)`, or use `disabled(model)`."
        )
    checked: dict[str, Any] = {}
    for name, value in asked.items():
        if isinstance(value, Mapping):
            mine = [n for n, layer in layers.items() if name in layer.lora_state.configs]
            found = by_pattern(name, value, mine)
            checked[name] = {n: check_finite(name, strength) for n, strength in found.items()}
        else:
            checked[name] = _strength(name, value, order)
    if order != ONCE and not any(isinstance(s, tuple) for s in checked.values()):
        raise ConfigError(
            "`guidance` and `repeats` must go with a strength for each sample, but every strength"
            " is one number, which holds for any batch. Leave them out."
        )
    _check_samples(layers, checked)
    merged = [name for name, layer in layers.items() if layer.lora_state.merged is not None]
    if merged:
        raise MergeError(
            f"Strengths must be chosen while unmerged, but {listed(merged)} is merged."
            " Call `unmerge(model)` first, then `scales`, then `merge`."
        )
    refuse_pinned("scales", layers.values())
    return Scales(layers, checked)


def _by_adapter(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """A list of strengths for each adapter, from what each sample asks for."""
    if isinstance(samples, str | Mapping) or not isinstance(samples, Sequence) or not samples:
        raise ConfigError(
            "`scales` must be given strengths by name, or a list with a name, a mapping of names to"
            f" strengths, or None for each sample, but got {samples!r}. Write"
            " scales(model, style=0.5), or scales(model, **{'my-style': 0.5})."
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


def _repeats(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"`repeats` must be a whole number of at least 1, but is {value!r}.")
    return value


def _strength(name: str, value: object, order: Order) -> Strength:
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
        return PerSample([check_finite(name, v) for v in value], order)
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
        if name in layer.lora_state.configs
        and (layer.lora_is_read or layer.lora_state.configs[name].dora)
    ]
    if shared:
        raise UnsupportedLayerError(
            "A strength per sample must go to layers that see samples, but"
            f" {listed(shared)} adapts a weight that all samples share. Give one number, or eject"
            " the adapter there."
        )


def shown(strength: Strength | Mapping[str, Strength]) -> str:
    """A strength as a receipt prints it."""
    if isinstance(strength, Mapping):
        return "by layer"
    if isinstance(strength, tuple):
        return "(" + ", ".join(f"{s:g}" for s in strength) + ")"
    return f"{strength:g}"
