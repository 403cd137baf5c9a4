"""`merge` and `unmerge`: what they refuse, what they change, and what an interrupt leaves."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._adapters import layers_with, without_base
from lora_core._errors import MergeError, listed
from lora_core._layers import LoRAMixin, Merged, at_rest, changing, refuse_pinned
from lora_core._merging.contact import (
    Site,
    is_linear_in_weight,
    is_moved,
    largest_update,
    put,
    restore,
    site_of,
    sum_of,
)
from lora_core._merging.finite import norms, read
from lora_core._merging.loss import Losses, Sample, sample
from lora_core._merging.probe import probe
from lora_core._merging.refusals import (
    check_factors,
    check_merged,
    refuse_hollow,
    tied_to_merge,
    to_merge,
)
from lora_core._reports import MergeReport

_TOGETHER = 2**17  # numbers whose rounding is looked at together
_FEW = 2**14  # so many always are: thousands of tiny layers should be few operations
_AT_ONCE = 2**20  # numbers that are written while other threads' calls wait


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
    sites = to_merge(model)
    layers = [site.layer for site in sites.values()]
    refuse_pinned("merge", layers)
    tied = tied_to_merge(model, sites, untie=untie, reversible=reversible)
    refuse_hollow(sites)
    strengths: dict[str, float] = {}
    for site in sites.values():
        strengths |= site.strengths
    # weights made in inference mode could not be trained on after an unmerge
    with (  # in this order: leaving the first turns on what the second turns off
        torch.inference_mode(mode=False),
        torch.no_grad(),
        at_rest(layers),
    ):
        sizes = check_factors(sites)
        if reversible:
            loss = _merge_reversibly(sites, tied, None if keep is None else torch.device(keep))
        else:
            loss = _merge_in_place(sites, sizes)
    return MergeReport(strengths, tuple(sites), reversible, loss)


def unmerge(model: nn.Module) -> MergeReport:
    """Hands the original weights back, bit for bit, in place.

    Raises:
        AdapterError: If the model has no adapter.
        MergeError: If nothing is merged, a layer was merged with ``reversible=False``, or the
            call stands inside ``with disabled(model)``. Nothing is changed then.
    """
    layers = {n: m for n, m in layers_with(model, None).items() if m.lora_merged is not None}
    if not layers:
        raise MergeError("The model must be merged to be unmerged, but no layer is.")
    states = {n: m.lora_merged for n, m in layers.items() if m.lora_merged is not None}
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
    undo: list[_Before] = []
    with at_rest(layers.values()), changing(*layers.values()):
        try:
            for name, layer in layers.items():
                undo.append(_before(layer, states[name]))
                restore(layer, states[name])
        except BaseException:
            _put_back(undo)
            raise
    strengths = {name: s for state in states.values() for name, s in state.strengths.items()}
    return MergeReport(strengths, tuple(layers), reversible=True)


# what `put` takes
_Before = tuple[LoRAMixin, nn.Parameter, Tensor, Tensor | None, Merged | None]


def _before(layer: LoRAMixin, state: Merged) -> _Before:
    """A merged layer as it is."""
    site = site_of(layer)
    assert site is not None
    return layer, site.own, layer.lora_held(), state.bias and layer.lora_held_bias(), state


def _put_back(undo: list[_Before]) -> None:
    for before in reversed(undo):
        put(*before)


def _merge_reversibly(
    sites: Mapping[str, Site], tied: set[str], keep: torch.device | None
) -> dict[str, float]:
    new, sums, losses = {}, {}, Losses(_TOGETHER)
    for name, site in sites.items():
        new[name], total, sample = _new_weight(name, site)
        if total is not None:
            sums[name] = total
        losses.add(name, sample)
    check_merged(new, sums)
    biases = {n: _new_bias(n, site) for n, site in sites.items() if site.bias is not None}
    held = {n: site.layer.lora_held() for n, site in sites.items()}
    kept = held if keep is None else {n: values.to(keep) for n, values in held.items()}
    loss = losses.finish()
    undo: list[_Before] = []
    with changing(*[site.layer for site in sites.values()]):
        try:
            for name, site in sites.items():
                layer, own, bias = site.layer, site.own, biases.get(name)
                old_bias = None if bias is None else layer.lora_held_bias()
                undo.append((layer, own, held[name], old_bias, None))
                untied = own if name in tied else None
                state = Merged(site.strengths, kept[name], None, untied, old_bias)
                if name in tied:
                    layer._parameters["weight"] = nn.Parameter(own.data, own.requires_grad)
                layer.lora_put(new[name], bias)
                layer.__dict__["lora_merged"] = state
        except BaseException:
            _put_back(undo)
            raise
    return loss


def _merge_in_place(sites: Mapping[str, Site], sizes: Sequence[float]) -> dict[str, float]:
    _refuse_overflow(sites, sizes)
    largest = max(site.weight.numel() for site in sites.values())
    # so few that working them out takes less memory than a layer
    losses = Losses(max(_FEW, min(_TOGETHER, largest // 16)))
    for together in _batches(sites):
        with changing(*[sites[name].layer for name in together]):
            for name in together:
                site = sites[name]
                state = Merged(site.strengths, None)
                losses.add(name, _put_in_place(name, site, state))
    return losses.finish()


def _batches(sites: Mapping[str, Site]) -> list[list[str]]:
    """The layers in groups of few numbers, or of one."""
    found: list[list[str]] = [[]]
    numbers = 0
    for name, site in sites.items():
        numbers += site.weight.numel()
        if found[-1] and numbers > _AT_ONCE:
            found.append([])
            numbers = site.weight.numel()
        found[-1].append(name)
    return found


def _refuse_overflow(sites: Mapping[str, Site], sizes: Sequence[float]) -> None:
    """Raises where a merged value would not be finite, mostly without computing it."""
    norm = iter(sizes)
    updates = {n: largest_update(site, norm) for n, site in sites.items()}
    # no entry of a weight exceeds its norm, which may overflow where no entry does
    weights = read(norms([site.weight for site in sites.values()]))
    for (name, site), largest in zip(sites.items(), weights, strict=True):
        limit = torch.finfo(site.weight.dtype).max / 2 - updates[name]
        if not (is_linear_in_weight(site.layer) and (largest < limit or _largest(site) < limit)):
            check_merged({name: _new_weight(name, site)[0]})  # only the sum itself can be tried
        if site.bias is not None:
            _new_bias(name, site)


def _largest(site: Site) -> float:
    if not site.weight.numel():
        return 0.0
    low, high = site.weight.aminmax()
    return max(-float(low), float(high)) if math.isfinite(low + high) else math.inf


def _new_weight(name: str, site: Site) -> tuple[Tensor, Tensor | None, Sample]:
    """The merged weight, not yet checked, perhaps the sum of its numbers, and a sample of it."""
    weight, made = site.weight, sum_of(site)
    if made is not None:
        matrix, total = made.new()
        new = matrix if matrix.shape == weight.shape else matrix.view(weight.shape)
        return new, total, sample(made.weight, matrix, made.lora_B, made.lora_A)
    delta = site.layer.lora_delta()
    new = functional.merged_weight(weight, delta)
    total = new.sum()
    if not is_linear_in_weight(site.layer):
        check_merged({name: new}, {name: total})
        probe(name, site, new)
    few = sample(weight, new, delta)
    # all the rest of the update may go
    return new, total, few._replace(update=(few.update[0].clone(),))


def _new_bias(name: str, site: Site) -> Tensor:
    """The merged bias, checked."""
    bias, delta = site.bias, site.layer.lora_bias_delta()
    assert bias is not None
    assert delta is not None
    new = functional.merged_weight(bias, delta)
    check_merged({name: new})
    return new


def _put_in_place(name: str, site: Site, state: Merged) -> Sample:
    made = sum_of(site)
    if made is None or site.bias is not None:
        return _copy_in_place(name, site, state)
    layer, weight, room = site.layer, made.weight, made.room()
    few, version = sample(weight, weight, made.lora_B, made.lora_A), weight._version
    old = few.old.clone()
    try:
        made.put_in(room)
        layer.__dict__["lora_merged"] = state
    except BaseException:  # an interrupt may come between the pieces, but not amid one
        done = weight._version - version
        if done:
            made.put_in(room, done)
            layer.__dict__["lora_merged"] = state
        raise
    # the other is a view of the weight, which is the new one now
    return few._replace(old=old)


def _copy_in_place(name: str, site: Site, state: Merged) -> Sample:
    new, total, (old, arrived, update) = _new_weight(name, site)
    check_merged({name: new}, {} if total is None else {name: total})
    few = Sample(old.clone(), arrived.clone(), update)
    bias = None if site.bias is None else _new_bias(name, site)
    try:
        _overwrite(site, new, bias, state)
    except BaseException:  # finish this layer: copying is idempotent, adding would not be
        _overwrite(site, new, bias, state)
        raise
    return few


def _overwrite(site: Site, weight: Tensor, bias: Tensor | None, state: Merged) -> None:
    site.weight.copy_(weight)
    if bias is not None and site.bias is not None:
        site.bias.copy_(bias)
    site.layer.__dict__["lora_merged"] = state
