"""Adding the active updates to the weights, and handing the originals back bit for bit."""

import math
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._adapters import layers_with, without_base
from lora_core._errors import MergeError, listed
from lora_core._layers import (
    LoRAMixin,
    Merged,
    at_rest,
    bias_delta,
    change,
    changing,
    delta_of,
    refuse_pinned,
    runs_as_torch,
    stacked,
)
from lora_core._merging.checking import check_factors, check_merged, read
from lora_core._merging.probing import probe
from lora_core._merging.refusing import refuse_hollow, tied_to_merge, to_merge
from lora_core._merging.rounding import Losses, Sample, sampled, some_columns, some_rows
from lora_core._merging.swapping import (
    adds_to_bias,
    is_moved,
    own_weight,
    put,
    restore,
    strengths_of,
)
from lora_core._merging.writing import Product, product_of
from lora_core._reports import MergeReport

_TOGETHER = 2**17  # numbers whose rounding is looked at together
_FEW = 2**12  # so many always are: thousands of tiny layers should be few operations


def merge(
    model: nn.Module,
    *,
    reversible: bool = True,
    keep: torch.device | str | None = None,
    untie: bool = False,
) -> MergeReport:
    """Adds the active adapters, at their strengths, to the weights, in place.

    Reversible: all new weights are computed and checked, then swapped in together; an interrupt
    leaves the whole model before or after. Otherwise: in place, one layer at a time, without a
    copy; each layer is merged or not, never twice, and `unmerge` refuses.

    The sum is made in float32 and rounded once to the weight's dtype; the receipt says how much
    of each update that rounding lost.

    Args:
        model: A model with active adapters.
        reversible: Whether to keep the original values.
        keep: Where to keep them, as in "cpu"; None means where they are.
        untie: Whether a weight that another module shares may be given a copy of its own here.

    Raises:
        AdapterError: If the model has no adapter.
        MergeError: If it is merged already, nothing is active, a weight is tied elsewhere, a
            merged weight would not be finite, or a host's forward is not proven to follow its
            weight. Nothing is changed then.

    Example:
        >>> from lora_core import LoRALinear
        >>> layer = LoRALinear(nn.Linear(3, 5), rank=2)
        >>> print(merge(layer))
        merged default x 1 into 1 layers, originals kept; rounding lost at most 0.00% of an update
        >>> print(unmerge(layer))
        unmerged default x 1 from 1 layers
    """
    layers = to_merge(model)
    refuse_pinned("merge", layers.values())
    tied = tied_to_merge(model, layers, untie=untie, reversible=reversible)
    refuse_hollow(layers)
    check_factors(layers)
    strengths = {name: s for layer in layers.values() for name, s in strengths_of(layer).items()}
    # weights made in inference mode could not be trained on after an unmerge
    with (  # in this order: leaving the first turns on what the second turns off
        torch.inference_mode(mode=False),
        torch.no_grad(),
        at_rest(layers.values()),
    ):
        if reversible:
            loss = _merge_reversibly(layers, tied, None if keep is None else torch.device(keep))
        else:
            loss = _merge_in_place(layers)
    return MergeReport(strengths, tuple(layers), reversible, loss)


def unmerge(model: nn.Module) -> MergeReport:
    """Hands the original weights back, bit for bit, in place.

    Raises:
        AdapterError: If the model has no adapter.
        MergeError: If nothing is merged, a layer was merged with ``reversible=False``, or the
            call stands inside ``with disabled(model)``. Nothing is changed then.
    """
    layers = {n: m for n, m in layers_with(model, None).items() if m.lora_state.merged is not None}
    if not layers:
        raise MergeError("The model must be merged to be unmerged, but no layer is.")
    states = {n: m.lora_state.merged for n, m in layers.items() if m.lora_state.merged is not None}
    gone = without_base(layers)
    if gone:
        raise MergeError(
            f"`unmerge` must have the original weights, but {listed(gone)} was merged with"
            " reversible=False. Load the base model again."
        )
    moved = [n for n, m in layers.items() if is_moved(m)]
    if moved:
        raise MergeError(
            f"A merged weight must be where it was to be unmerged, but that of {listed(moved)} is"
            " computed now or gone. Take the parametrization or pruning off, then unmerge."
        )
    hidden = [n for n, state in states.items() if state.merged is not None]
    if hidden:
        raise MergeError(
            f"`unmerge` must stand outside `with disabled(model)`, but {listed(hidden)} is hidden"
            " by one. Leave it first."
        )
    with at_rest(layers.values()), changing(*layers.values()), ExitStack() as undo:
        for name, layer in layers.items():
            bias = None if states[name].bias is None else layer.lora_kind.held_bias(layer)
            undo.callback(
                put, layer, own_weight(layer), layer.lora_kind.held(layer), bias, states[name]
            )
            restore(layer, states[name])
        undo.pop_all()
    strengths = {name: s for state in states.values() for name, s in state.strengths.items()}
    return MergeReport(strengths, tuple(layers), reversible=True)


def _merge_reversibly(
    layers: dict[str, LoRAMixin], tied: set[str], keep: torch.device | None
) -> dict[str, float]:
    new, sums, losses = {}, {}, Losses(_TOGETHER)
    for name, layer in layers.items():
        new[name], sums[name], sample = _new_weight(name, layer)
        losses.add(name, sample)
    check_merged(new, sums)
    biases = {n: _new_bias(n, m) for n, m in layers.items()}
    kept = {
        n: m.lora_kind.held(m) if keep is None else m.lora_kind.held(m).to(keep)
        for n, m in layers.items()
    }
    loss = losses.finish()
    with changing(*layers.values()), ExitStack() as undo:
        for name, layer in layers.items():
            own, bias = own_weight(layer), biases[name]
            old_bias = None if bias is None else layer.lora_kind.held_bias(layer)
            undo.callback(put, layer, own, layer.lora_kind.held(layer), old_bias, None)
            untied = own if name in tied else None
            state = Merged(strengths_of(layer), kept[name], None, untied, old_bias)
            if name in tied:
                layer._parameters["weight"] = nn.Parameter(own.data, own.requires_grad)
            layer.lora_kind.put(layer, new[name], bias)
            change(layer, merged=state)
        undo.pop_all()
    return loss


def _merge_in_place(layers: dict[str, LoRAMixin]) -> dict[str, float]:
    _refuse_overflow(layers)
    largest = max(layer.weight.numel() for layer in layers.values())
    # so few that working them out takes less memory than a layer
    losses = Losses(max(_FEW, min(_TOGETHER, largest // 16)))
    for name, layer in layers.items():
        losses.add(name, _put_in_place(name, layer, Merged(strengths_of(layer), None)))
    return losses.finish()


def _refuse_overflow(layers: dict[str, LoRAMixin]) -> None:
    """Raises where a merged value would not be finite, mostly without computing it.

    By Cauchy-Schwarz no entry of the update exceeds the norm of its B times that of its A.
    """
    bounded: dict[str, tuple[Tensor, ...]] = {}
    for name, layer in layers.items():
        if runs_as_torch(layer) and not any(
            layer.lora_state.configs[n].dora for n in layer.lora_state.selection.names
        ):
            lora_A, lora_B, gain = stacked(layer)
            norms = torch.linalg.vector_norm(lora_A), torch.linalg.vector_norm(lora_B * gain)
            bounded[name] = (*norms, *layer.weight.aminmax())
    numbers = iter(read([number for four in bounded.values() for number in four]))
    bounds = dict(zip(bounded, zip(*[numbers] * 4, strict=True), strict=True))
    for name, layer in layers.items():
        down, up, low, high = bounds.get(name, (math.inf,) * 4)
        if not max(-low, high) + down * up < torch.finfo(layer.weight.dtype).max / 2:
            check_merged({name: _new_weight(name, layer)[0]})  # only the sum itself can be tried
        _new_bias(name, layer)


def _new_weight(name: str, layer: LoRAMixin) -> tuple[Tensor, Tensor, Sample]:
    """The merged weight, not yet checked, the sum of its numbers, and a sample of it."""
    weight, product = layer.weight, product_of(layer)
    if product is not None:
        new, total = product.new()
        return new.view(weight.shape), total, _sample(product, product.weight, new)
    delta = delta_of(layer)
    new = functional.merged_weight(weight, delta)
    total = new.sum()
    if not runs_as_torch(layer):
        check_merged({name: new}, {name: total})
        probe(name, layer, new)
    # all the rest of the update may go
    return new, total, Sample(sampled(weight), sampled(new), (sampled(delta).clone(),))


def _sample(product: Product, old: Tensor, new: Tensor) -> Sample:
    rows, columns = some_rows(product.lora_B), some_columns(product.lora_A)
    return Sample(sampled(old), sampled(new), (rows, columns))


def _new_bias(name: str, layer: LoRAMixin) -> Tensor | None:
    """The merged bias, checked; None where no active adapter adds to it."""
    if not adds_to_bias(layer):
        return None
    bias, delta = layer._parameters["bias"], bias_delta(layer)
    assert bias is not None
    assert delta is not None
    new = functional.merged_weight(bias, delta)
    check_merged({name: new})
    return new


def _put_in_place(name: str, layer: LoRAMixin, state: Merged) -> Sample:
    product = product_of(layer)
    if product is None or adds_to_bias(layer):
        return _copy_in_place(name, layer, state)
    weight, room = product.weight, product.room()
    before, version = _sample(product, weight, weight), weight._version
    old = before.old.clone()
    with changing(layer):
        try:
            product.put_in(room)
            change(layer, merged=state)
        except BaseException:  # an interrupt may come between the pieces, but not amid one
            done = weight._version - version
            if done:
                product.put_in(room, done)
                change(layer, merged=state)
            raise
    first, second = before.update
    # a view of the weight, which is the new one now
    return Sample(old, before.new.clone(), (first.clone(), second))


def _copy_in_place(name: str, layer: LoRAMixin, state: Merged) -> Sample:
    new, total, (old, arrived, update) = _new_weight(name, layer)
    check_merged({name: new}, {name: total})
    sample = Sample(old.clone(), arrived.clone(), update)
    bias = _new_bias(name, layer)
    with changing(layer):
        try:
            _overwrite(layer, new, bias, state)
        except BaseException:  # finish this layer: copying is idempotent, adding would not be
            _overwrite(layer, new, bias, state)
            raise
    return sample


def _overwrite(layer: LoRAMixin, weight: Tensor, bias: Tensor | None, state: Merged) -> None:
    layer.weight.copy_(weight)
    if bias is not None:
        own = layer._parameters["bias"]
        assert own is not None
        own.copy_(bias)
    change(layer, merged=state)
