"""What is active on a layer: as products that a forward adds, and as a change of the weight."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lora_core import functional
from lora_core._config import AdapterConfig, Recipe
from lora_core._errors import ConfigError, MergeError, listed
from lora_core._layers.context import refuse_pins, seen_state
from lora_core._layers.kind import Kind, Update, own_weight
from lora_core._layers.lengths import column_norm_of, length_of, norm_of
from lora_core._layers.parts import factors_of, trained_parts
from lora_core._layers.state import Merged, Order, State, Term, is_per_sample
from lora_core.kernels.norms import sum_dtype


class Active(NamedTuple):
    """What a forward adds to its host's output.

    Attributes:
        updates: Low-rank updates, one for each share of the input that is dropped.
        stretch: How much of the host's output without its bias is added to it, (out,).
        bias: What is added to every position, (out,) or (batch, out).
        columns: How much of each input feature the host's matrix takes once more, (in,).
    """

    updates: list[Update]
    stretch: Tensor | None = None
    bias: Tensor | None = None
    columns: Tensor | None = None

    @property
    def is_one_update(self) -> bool:
        """Whether it is one pair of products, which a fused form adds to the base itself."""
        return len(self.updates) == 1 and not any(part is not None for part in self[1:])


def active(layer: Any, x: Tensor | None = None) -> Active:
    """What a forward of `x` adds: stacked where dropout allows, so one pair of products.

    Adapters that drop the same share of the input are one pair; merged ones are in the weight
    already and none. A gain is a number where one will do, which costs a fast path nothing; under
    torch.compile it is a tensor, so that another value recompiles nothing, and every adapter on
    the layer takes part, so that another choice doesn't either.

    Raises:
        MergeError: If the layer is merged and this forward would train an adapter.
        ConfigError: If strengths per sample don't fit the batch of `x`.
        AdapterError: If an adapter that is pinned was taken off.
    """
    if torch.compiler.is_compiling():
        refuse_pins()
        state: State = layer.lora_state
        terms = state.selection.bank
    else:
        state = seen_state(layer)
        terms = state.selection.terms
    if state.merged is not None:
        _refuse_training(layer, tuple(state.merged.strengths))
        _refuse_tied(layer, state.merged)
        return Active([])
    return _collect(layer, terms, x, training=layer.training)


def added(layer: Any, x: Tensor, base: Tensor, found: Active, *more: Any) -> Tensor:
    """The host's output for `x` plus what is active; `more` is what else the host was given."""
    kind: Kind = layer.lora_kind
    updates, stretch, bias, columns = found
    out = base
    if columns is not None:
        out = out + kind.through_weight(layer, x, columns).to(base.dtype)
    if stretch is not None:
        own = getattr(layer, "bias", None)
        directed = base if own is None else base - kind.channels(layer, own, base).to(base.dtype)
        out = out + (kind.channels(layer, stretch, base) * directed).to(base.dtype)
    for update in updates:
        out = out + kind.update(layer, x, update, *more).to(base.dtype)
    if bias is not None:
        out = out + kind.channels(layer, bias, base).to(base.dtype)
    return out


def delta_of(layer: Any) -> Tensor:
    """The sum of the active updates in the weight's own layout, float32 or wider."""
    return dense(layer, _wide(layer))


def dense(layer: Any, found: Active) -> Tensor:
    """What is active as one change of the weight, which knows no input to drop numbers of."""
    kind: Kind = layer.lora_kind
    updates, stretch, _, columns = found
    dense, *more = [
        functional.lora_delta(*kind.as_matrices(lora_A, lora_B), gain)
        for lora_A, lora_B, gain, _ in updates
    ]
    for other in more:
        dense = dense + other
    weight = own_weight(layer)
    if stretch is not None:
        dense = dense + stretch[:, None] * kind.matrix(weight).to(dense.dtype)
    if columns is not None:
        dense = dense + kind.matrix(weight.to(dense.dtype) * kind.columns(layer, columns))
    return kind.like_weight(dense, weight)


def bias_delta(layer: Any) -> Tensor | None:
    """What the active adapters add to the bias, None if nothing."""
    return _wide(layer).bias


def stacked(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(lora_A, lora_B, gain)`` of what is active as one adapter of matrices, detached.

    In the weight's precision, float32 or wider, as a forward multiplies them. A DoRA adapter adds
    more than these: see `delta`.
    """
    lora_A, lora_B, gain, _ = _wide(layer).updates[0]
    return (*layer.lora_kind.as_matrices(lora_A, lora_B), cast(Tensor, gain))


def update_norm(layer: Any, name: str, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The norm that an adapter's update would have with these factors, by Frobenius."""
    config: AdapterConfig = layer.lora_state.configs[name]
    if config.tucker:
        lora_A = functional.tucker_down(lora_A, getattr(layer, f"lora_mid_{name}"))
    kind: Kind = layer.lora_kind
    return functional.delta_norm(*kind.as_matrices(lora_A, lora_B), config.scale)


def _wide(layer: Any) -> Active:
    selection = layer.lora_state.selection
    exact = {term.name: term for term in selection.bank}  # gains are tensors
    terms = [exact[name] for name in selection.names]
    wide = sum_dtype(own_weight(layer).dtype)
    with torch.no_grad():
        (update,), stretch, bias, columns = _collect(layer, terms, None, training=False)
    lora_A, lora_B = (f.detach().to(wide) for f in update[:2])
    found = Update(lora_A, lora_B, cast(Tensor, update.gain).to(wide), 0.0)
    return Active([found], stretch, None if bias is None else bias.detach(), columns)


def _collect(layer: Any, terms: Sequence[Term], x: Tensor | None, *, training: bool) -> Active:
    kind: Kind = layer.lora_kind
    if len(terms) == 1:
        name, recipe, value, *_ = terms[0]
        if recipe.plain and not is_per_sample(value):
            dropout = recipe.dropout if training else 0.0
            return Active([Update(*factors_of(layer, name), value, dropout)])
    groups: dict[float, list[tuple[Tensor, Tensor, Tensor | float]]] = {}
    stretch = bias = columns = None
    for name, recipe, value, strength, order in terms:
        gain = _per_sample(layer, value, order, x)
        lora_A, lora_B = _low_rank(layer, name, recipe)
        if recipe.bias:
            own = _bias_term(layer, name, _per_sample(layer, strength, order, x))
            bias = own if bias is None else bias + own
        if recipe.dora_in:
            ratio = _column_ratio(layer, name, gain, strength, lora_A, lora_B)
            lora_A = lora_A * kind.columns(layer, ratio).to(lora_A.dtype)
            columns = ratio - 1 if columns is None else columns + (ratio - 1)
        elif recipe.dora:
            ratio = _ratio(layer, name, gain, strength, lora_A, lora_B)
            lora_B = lora_B * ratio.view(-1, *[1] * (lora_B.ndim - 1)).to(lora_B.dtype)
            stretch = ratio - 1 if stretch is None else stretch + (ratio - 1)
        if training:
            gain = _dropped(layer, gain, recipe, lora_A, x)
        dropout = recipe.dropout if training else 0.0
        if is_per_sample(gain) and not (training and recipe.rank_dropout):
            gain = gain[:, None].expand(-1, lora_A.shape[kind.rank_dims[0]])  # type: ignore[index]
        groups.setdefault(dropout, []).append((lora_A, lora_B, gain))
    updates = [
        Update(*functional.stack_factors(group, kind.rank_dims), p) for p, group in groups.items()
    ]
    return Active(updates, stretch, bias, columns)


def _low_rank(layer: Any, name: str, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The update as two factors, whatever parts it consists of."""
    lora_A: Tensor
    lora_B: Tensor
    lora_A, lora_B = factors_of(layer, name)
    if recipe.tucker:
        lora_A = functional.tucker_down(lora_A, getattr(layer, f"lora_mid_{name}"))
    if recipe.subtracted:
        first = getattr(layer, f"lora_A0_{name}"), getattr(layer, f"lora_B0_{name}")
        return layer.lora_kind.subtracted(lora_A, lora_B, *first)  # type: ignore[no-any-return]
    return lora_A, lora_B


def _per_sample(
    layer: Any, gain: Tensor | float | None, order: Order, x: Tensor | None
) -> Tensor | float:
    """A gain per sample for the batch of `x`, in the order that `scales` was told."""
    assert gain is not None
    if not isinstance(gain, Tensor) or gain.ndim == 0 or x is None:
        return gain
    batch, given = layer.lora_kind.samples(layer, x), gain.shape[0]
    guidance, repeats = order
    if batch == given:
        return gain
    if guidance and repeats == 2 and batch == 2 * given:
        raise ConfigError(
            "A batch must have one order, but with `guidance` and `repeats=2` the input of a"
            f" {layer.lora_host_class.__name__} has shape {tuple(x.shape)}: {given} samples twice,"
            " which either may be. Give this model `scales` with one of the two."
        )
    if guidance and batch == 2 * given:
        return gain.repeat(2)
    if repeats > 1 and batch == repeats * given:
        return gain.repeat_interleave(repeats)
    if guidance and batch == 2 * repeats * given:
        return gain.repeat_interleave(repeats).repeat(2)
    raise ConfigError(
        f"Strengths per sample must fit the batch, but `scales` gave {given} and the input of a"
        f" {layer.lora_host_class.__name__} has shape {tuple(x.shape)}. Give as many strengths as"
        " samples; where a batch holds them twice for guidance, or each several times in a row,"
        " say so: scales(..., guidance=True, repeats=n)."
    )


def _bias_term(layer: Any, name: str, strength: Tensor | float) -> Tensor:
    values: Tensor = getattr(layer, f"lora_bias_{name}")
    return values * (strength[:, None] if is_per_sample(strength) else strength)  # type: ignore[index]


def _ratio(
    layer: Any,
    name: str,
    gain: Tensor | float,
    strength: Tensor | float | None,
    lora_A: Tensor,
    lora_B: Tensor,
) -> Tensor:
    _refuse_samples(name, gain)
    kind: Kind = layer.lora_kind
    matrix = kind.matrix(own_weight(layer))
    norm = norm_of(layer, name, matrix, *kind.as_matrices(lora_A, lora_B), gain)
    magnitude: Tensor = getattr(layer, f"lora_magnitude_{name}")
    return functional.dora_ratio(
        magnitude.to(norm.dtype),
        length_of(layer, matrix),
        norm,
        cast(Tensor | float, strength),
    )


def _column_ratio(
    layer: Any,
    name: str,
    gain: Tensor | float,
    strength: Tensor | float | None,
    lora_A: Tensor,
    lora_B: Tensor,
) -> Tensor:
    """What each column is multiplied by; the sum is made dense, which no new adapter needs."""
    _refuse_samples(name, gain)
    kind: Kind = layer.lora_kind
    matrix = kind.matrix(own_weight(layer))

    def adapted() -> Tensor:
        dense = functional.lora_delta(*kind.as_matrices(lora_A, lora_B), gain)
        return kind.like_weight(dense + matrix.to(dense.dtype), own_weight(layer))

    norm = column_norm_of(layer, name, gain, adapted)
    magnitude: Tensor = getattr(layer, f"lora_in_magnitude_{name}")
    return functional.dora_ratio(
        magnitude.to(norm.dtype),
        column_norm_of(layer, "", 1.0, lambda: own_weight(layer)),
        norm,
        cast(Tensor | float, strength),
    )


def _refuse_samples(name: str, gain: Tensor | float) -> None:
    if is_per_sample(gain):
        raise ConfigError(
            f"A DoRA adapter must have one strength for all samples, but {name!r} has one for"
            " each: the lengths of a weight's rows belong to no sample. Use `scales` with a"
            " number."
        )


def _dropped(
    layer: Any, gain: Tensor | float, recipe: Recipe, lora_A: Tensor, x: Tensor | None
) -> Tensor | float:
    """A gain with whole ranks, or all of them, dropped at random."""
    kind: Kind = layer.lora_kind
    if recipe.rank_dropout:
        rank = recipe.room  # those that are subtracted are dropped with theirs
        batch = None if x is None else kind.samples(layer, x)
        shape = (rank,) if batch is None else (batch, rank)
        kept = torch.rand(shape, device=lora_A.device) >= recipe.rank_dropout
        halves = lora_A.shape[kind.rank_dims[0]] // rank
        mask = kept.repeat(*[1] * (kept.ndim - 1), halves) / (1 - recipe.rank_dropout)
        gain = mask * (gain[:, None] if is_per_sample(gain) else gain)  # type: ignore[index]
    if recipe.module_dropout:
        gain = gain * (torch.rand((), device=lora_A.device) >= recipe.module_dropout)
    return gain


def _refuse_tied(layer: Any, merged: Merged) -> None:
    """Raises where a weight that a merge had to untie was tied again since."""
    if merged.parameter is None or merged.merged is not None:  # or `disabled` shows the original
        return
    if layer._parameters.get("weight") is merged.parameter:
        repair = "Eject it and load it again" if merged.kept is None else "Call `unmerge(model)`"
        raise MergeError(
            "A weight that was untied for a merge must stay so, but that of this"
            f" {layer.lora_host_class.__name__} was tied again, as `tie_weights` does, and"
            f" {listed(merged.strengths)} is not in it. {repair}, and merge after tying."
        )


def _refuse_training(layer: Any, names: tuple[str, ...]) -> None:
    if not (layer.training and torch.is_grad_enabled()):
        return
    if any(p.requires_grad for name in names for p in trained_parts(layer, name).values()):
        raise MergeError(
            f"A layer in training mode must be unmerged, but {listed(names)} is merged into its"
            " weight and would get no gradient. Call `unmerge(model)`, or `model.eval()`."
        )
