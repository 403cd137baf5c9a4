"""`merge` and `unmerge`: what they refuse, what they change, and what an interrupt leaves."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._adapters import layers_with, without_base
from lora_core._errors import ConfigError, MergeError, listed
from lora_core._layers import (
    LoRAMixin,
    Merged,
    at_rest,
    bias_delta,
    changing,
    delta_of,
    lock,
    refuse_pinned,
    set_merged,
    undone_by,
)
from lora_core._merging.contact import (
    Kept,
    Site,
    commit,
    is_moved,
    kept_by,
    largest_update,
    merged_with,
    put,
    restore,
    site_of,
    sum_of,
)
from lora_core._merging.finite import norms, read
from lora_core._merging.loss import Losses, Sample, sample
from lora_core._merging.refusals import (
    check_factors,
    check_merged,
    check_sizes,
    overflow,
    refuse_hollow,
    tied_to_merge,
    to_merge,
)
from lora_core._merging.residue import (
    REPAIR,
    ChangedError,
    Residue,
    Rooms,
    pays,
    residue_of,
)
from lora_core._reports import MergeReport

_TOGETHER = 2**17  # numbers whose rounding is looked at together
_FEW = 9_000  # so many always are: thousands of tiny layers should be few operations
_AT_ONCE = 2**20  # numbers that are written while other threads' calls wait


def merge(
    model: nn.Module,
    *,
    reversible: bool | Literal["compact"] = True,
    keep: torch.device | str | None = None,
    untie: bool = False,
) -> MergeReport:
    """Adds the active adapters, at their strengths, to the weights, in place.

    Reversible: all new weights are computed and checked, then swapped in together; an interrupt
    leaves the whole model before or after.

    "compact" is reversible too, bit for bit, and keeps no copy: it writes in place and keeps a
    quarter to an eighth of the memory (of 16-bit weights a half to a quarter). Un-merging takes
    about as long as the merge then, and is refused where the merged weights were changed since.

    Otherwise: in place, one layer at a time, without a copy; each layer is merged or not, never
    twice, and `unmerge` refuses.

    The sum is made in float32 and rounded once to the weight's dtype; the receipt says how much
    of each update that rounding lost.

    Args:
        model: A model with active adapters.
        reversible: Whether to keep the original values; "compact" for what the merged ones don't
            tell of them.
        keep: Where to keep them, as in "cpu"; None means where they are.
        untie: Whether a weight that another module shares may be given a copy of its own here.

    Raises:
        ConfigError: If `reversible` is neither of the three, or `keep` goes with False.
        AdapterError: If the model has no adapter.
        MergeError: If it is merged already, nothing is active, a weight is tied elsewhere, a
            merged weight would not be finite. Nothing is changed then.

    Example:
        >>> from lora_core import LoRALinear
        >>> layer = LoRALinear(nn.Linear(3, 5), rank=2)
        >>> print(merge(layer))
        merged default x 1 into 1 layers, originals kept; rounding lost at most 0.00% of an update
        >>> print(unmerge(layer))
        unmerged default x 1 from 1 layers
    """
    if reversible not in (True, False, "compact"):
        raise ConfigError(
            f"`reversible` must be True, False or 'compact', but is {reversible!r}. 'compact' keeps"
            " less memory than True."
        )
    if keep is not None and not reversible:
        raise ConfigError(
            f"`keep` must go with a merge that keeps something, but `reversible` is False and"
            f" `keep` is {str(keep)!r}. Leave one of them out."
        )
    sites = to_merge(model)
    layers = [site.layer for site in sites.values()]
    refuse_pinned("merge", layers)
    tied = tied_to_merge(model, sites, untie=untie)
    refuse_hollow(sites)
    strengths: dict[str, float] = {}
    for site in sites.values():
        strengths |= site.strengths
    with _plainly({site.weight.device.type for site in sites.values()}), at_rest(layers):
        sizes = check_factors(sites)
        if not reversible:
            check_sizes(sites)
            loss = _merge_in_place(sites, tied, sizes)
            return MergeReport(strengths, tuple(sites), reversible=False, loss=loss)
        device = None if keep is None else torch.device(keep)
        try:
            loss, kept = _merge_reversibly(sites, tied, device, compact=reversible == "compact")
        except RuntimeError:  # of torch, where factors don't fit; all is as it was
            check_sizes(sites)
            raise
    report = MergeReport(strengths, tuple(sites), reversible=True, loss=loss)
    if reversible != "compact":
        return report
    copied = tuple(name for name, each in kept.items() if isinstance(each, Tensor))
    return replace(report, kept=sum(each.nbytes for each in kept.values()), copied=copied)


def unmerge(model: nn.Module) -> MergeReport:
    """Hands the original weights back, bit for bit, in place.

    After a compact merge they are made again, one layer at a time: an interrupt, or a layer that
    can't be made again here, leaves each merged or not, and another call does the rest.

    Raises:
        AdapterError: If the model has no adapter.
        MergeError: If nothing is merged, a layer was merged with ``reversible=False``, the call
            stands inside ``with disabled(model)``, or a weight that was merged compactly was
            changed since. Nothing is changed then.
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
    compact = {n: kept for n, s in states.items() if isinstance(kept := kept_by(s), Residue)}
    broken = [n for n, residue in compact.items() if not residue.is_whole()]
    if broken:
        raise MergeError(
            "A merged weight must be as `merge` left it to be unmerged, but that of"
            f" {listed(broken)} was changed since. {REPAIR}"
        )
    with _plainly({residue.device.type for residue in compact.values()}), at_rest(layers.values()):
        _restore_compactly(layers, compact)
        undo: list[_Before] = []
        left = {n: m for n, m in layers.items() if n not in compact}
        with changing(*left.values()), undone_by(partial(_put_back, undo)):
            for name, layer in left.items():
                undo.append(_before(layer, states[name]))
                restore(layer, states[name])
    strengths = {name: s for state in states.values() for name, s in state.strengths.items()}
    return MergeReport(strengths, tuple(layers), reversible=True)


@contextmanager
def _plainly(devices: set[str]) -> Iterator[None]:
    """Neither in inference mode nor for gradients, and no number narrower than it is.

    Weights made in inference mode could not be trained on after an unmerge.
    """
    with ExitStack() as stack:
        # in this order: leaving the first turns on what the second turns off
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


# what `put` takes
_Before = tuple[LoRAMixin, nn.Parameter, Tensor, Tensor | None, Merged | None]


def _before(layer: LoRAMixin, state: Merged) -> _Before:
    """A merged layer as it is."""
    site = site_of(layer)
    assert site is not None
    bias = None if state.bias is None else layer.lora_kind.held_bias(layer)
    return layer, site.own, layer.lora_kind.held(layer), bias, state


def _put_back(undo: list[_Before]) -> None:
    for before in reversed(undo):
        put(*before)


def _merge_reversibly(
    sites: Mapping[str, Site], tied: set[str], keep: torch.device | None, *, compact: bool
) -> tuple[dict[str, float], dict[str, Kept]]:
    """Merges all layers or none; what rounding lost of each update, and what is kept.

    Args:
        sites: The layers.
        tied: Those to be untied.
        keep: Where to keep what is kept, None for where it is.
        compact: Whether to keep no copy where less will do.
    """
    losses, done = Losses(_TOGETHER), _Done(keep)
    with undone_by(done.undo):
        if compact:
            for name, site in sites.items():
                # who shares a weight that is untied keeps it anyway
                if name not in tied and pays(site.weight):
                    done.merge(name, site, losses)
        left = {n: site for n, site in sites.items() if n not in done.residues}
        kept: dict[str, Kept] = {**done.residues}
        kept |= _merge_into_copies(left, tied, keep, losses, done.swapped)
    shares = losses.finish()
    return {name: shares[name] for name in sites}, {name: kept[name] for name in sites}


class _Done:
    """What of a merge is done, to be taken back; merges layers in place, one after the other.

    Args:
        keep: Where to keep what is kept, None for where it is.
    """

    def __init__(self, keep: torch.device | None) -> None:
        self.keep, self.rooms = keep, Rooms()
        self.residues: dict[str, Residue] = {}
        self.swapped: list[_Before] = []
        self._begun: list[tuple[Site, Residue, Tensor | None]] = []

    def merge(self, name: str, site: Site, losses: Losses) -> None:
        """Merges a layer, unless as much as a copy would have to be kept."""
        made = sum_of(site)
        if made is None:
            return
        try:
            new, residue = residue_of(made, site.weight.shape, self.rooms)
        except OverflowError:
            raise overflow(name, site.weight.dtype) from None
        if residue is None:
            return
        residue = residue if self.keep is None else residue.kept_on(self.keep)
        few = sample(made.weight, made.weight, made.lora_B, made.lora_A)
        old = few.old.clone()
        bias, before = None, None
        if site.bias is not None:
            bias, before = _new_bias(name, site), site.layer.lora_kind.held_bias(site.layer)
        with lock(), changing(site.layer):
            _check_unmerged({name: site})
            self._begun.append((site, residue, before))
            commit(site, new.view(residue.shape), bias, merged_with(site, residue, None, before))
        self.residues[name] = residue
        losses.add(name, few._replace(old=old))  # the other is a view, of the new one now

    def undo(self) -> None:
        """Gives every layer that was merged its values back."""
        with changing(*[layer for layer, *_ in self.swapped]):
            _put_back(self.swapped)
        for site, residue, bias in reversed(self._begun):
            if site.layer.lora_state.merged is not None:
                with changing(site.layer):
                    commit(site, residue.values(self.rooms), bias, None)


def _restore_compactly(layers: Mapping[str, LoRAMixin], residues: Mapping[str, Residue]) -> None:
    """Gives layers their values back in place; an interrupt leaves each merged or not."""
    rooms = Rooms()
    for name, residue in residues.items():
        layer, site = layers[name], site_of(layers[name])
        assert site is not None
        assert layer.lora_state.merged is not None
        try:
            values = residue.values(rooms)
        except ChangedError:
            raise MergeError(
                f"An original must be made again as it was, but that of {name!r} is not: numbers"
                f" are rounded otherwise here than at the merge. {REPAIR}"
            ) from None
        bias, own = layer.lora_state.merged.bias, site.own
        with changing(layer):
            if (own.data_ptr(), own.dtype) == (residue.merged.data_ptr(), residue.dtype):
                commit(site, values, bias, None)
            else:  # the model was moved, and has a merged weight of its own
                layer.lora_kind.put(layer, values.clone(), bias)
                set_merged(layer, None)


def _merge_into_copies(
    sites: Mapping[str, Site],
    tied: set[str],
    keep: torch.device | None,
    losses: Losses,
    undo: list[_Before],
) -> dict[str, Tensor]:
    """Gives all layers new weights; what they had, as well as in `undo` before it is changed."""
    new, sums = {}, {}
    for name, site in sites.items():
        new[name], total, few = _new_weight(site)
        if total is not None:
            sums[name] = total
        losses.add(name, few)
    check_merged(new, sums)
    biases = {n: _new_bias(n, site) for n, site in sites.items() if site.bias is not None}
    held = {  # a part's is a copy, of whoever reads the whole
        n: site.own.data if site.weight is site.own else site.layer.lora_kind.held(site.layer)
        for n, site in sites.items()
    }
    kept = held if keep is None else {n: values.to(keep) for n, values in held.items()}
    losses.finish()
    with lock(), changing(*[site.layer for site in sites.values()]):
        _check_unmerged(sites)
        for name, site in sites.items():
            layer, own, bias = site.layer, site.own, biases.get(name)
            old_bias = None if bias is None else layer.lora_kind.held_bias(layer)
            undo.append((layer, own, held[name], old_bias, None))
            if name in tied:
                layer._parameters["weight"] = nn.Parameter(own.data, own.requires_grad)
            layer.lora_kind.put(layer, new[name], bias)
            untied = own if name in tied else None
            set_merged(layer, merged_with(site, kept[name], untied, old_bias))
    return kept


def _merge_in_place(
    sites: Mapping[str, Site], tied: set[str], sizes: Sequence[float]
) -> dict[str, float]:
    _refuse_overflow(sites, sizes)
    shared = {name: sites[name].own for name in tied}
    sites = {n: _untied(site) if n in tied else site for n, site in sites.items()}
    largest = max(site.weight.numel() for site in sites.values())
    # so few that working them out takes less memory than a layer
    losses = Losses(max(_FEW, min(_TOGETHER, largest // 16)))
    for together in _batches(sites):
        with lock(), changing(*[sites[name].layer for name in together]):
            _check_unmerged({name: sites[name] for name in together})
            for name in together:
                site = sites[name]
                state = Merged(site.strengths, None, parameter=shared.get(name))
                losses.add(name, _put_in_place(name, site, state))
    return losses.finish()


def _untied(site: Site) -> Site:
    """A layer with a weight of its own, as it was but for whom it shares it with; in place."""
    own = nn.Parameter(site.own.data.clone(), site.own.requires_grad)
    site.layer._parameters["weight"] = own
    return site._replace(own=own, weight=own)


def _check_unmerged(sites: Mapping[str, Site]) -> None:
    """Refuses layers that another thread merged since they were found unmerged."""
    merged = [n for n, site in sites.items() if site.layer.lora_state.merged is not None]
    if merged:
        raise MergeError(
            f"A layer must be unmerged to be merged, but {listed(merged)} was merged by another"
            " thread meanwhile. Merge a model in one thread at a time."
        )


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
        if not (largest < limit or _largest(site) < limit):
            check_merged({name: _new_weight(site)[0]})  # only the sum itself can be tried
        if site.bias is not None:
            _new_bias(name, site)


def _largest(site: Site) -> float:
    if not site.weight.numel():
        return 0.0
    low, high = site.weight.aminmax()
    return max(-float(low), float(high)) if math.isfinite(low + high) else math.inf


def _new_weight(site: Site) -> tuple[Tensor, Tensor | None, Sample]:
    """The merged weight, not yet checked, perhaps the sum of its numbers, and a sample of it."""
    weight, made = site.weight, sum_of(site)
    if made is not None:
        matrix, total = made.new()
        new = matrix if matrix.shape == weight.shape else matrix.view(weight.shape)
        return new, total, sample(made.weight, matrix, made.lora_B, made.lora_A)
    delta = delta_of(site.layer)
    new = functional.merged_weight(weight, delta)
    total = new.sum()
    few = sample(weight, new, delta)
    # all the rest of the update may go
    return new, total, few._replace(update=(few.update[0].clone(),))


def _new_bias(name: str, site: Site) -> Tensor:
    """The merged bias, checked."""
    bias, delta = site.bias, bias_delta(site.layer)
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
        set_merged(layer, state)
    except BaseException:  # an interrupt may come between the pieces, but not amid one
        done = weight._version - version
        if done:
            made.put_in(room, done)
            set_merged(layer, state)
        raise
    # the other is a view of the weight, which is the new one now
    return Sample(old, few.new, few.update)


def _copy_in_place(name: str, site: Site, state: Merged) -> Sample:
    new, total, (old, arrived, update) = _new_weight(site)
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
    set_merged(site.layer, state)
