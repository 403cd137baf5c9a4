"""Which layers a merge takes, and why others can't be merged."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_core._adapters import gone, layers_with
from lora_core._errors import MergeError, listed
from lora_core._layers import misfits
from lora_core._merging import contact
from lora_core._merging.contact import Site
from lora_core._merging.finite import is_finite, non_finite, norms, read


def to_merge(model: nn.Module) -> dict[str, Site]:
    """The layers with active adapters.

    Raises:
        AdapterError: If the model has no adapter.
        MergeError: If one is merged already or can't be, or if nothing is active.
    """
    everything = layers_with(model, None)
    merged = [n for n, m in everything.items() if m.lora_state.merged is not None]
    if merged:
        raise MergeError(
            f"A layer must be unmerged to be merged, but {listed(merged)} is merged already."
            " Call `unmerge(model)` first."
        )
    layers = {n: m for n, m in everything.items() if m.lora_state.selection.names}
    lost = gone(everything)
    if lost:
        raise MergeError(
            f"An adapter must be on every layer that it was put on to be merged, but {listed(lost)}"
            " is gone or was replaced, and its factors with it. Save the rest with"
            " `save(..., strict=False)`, eject, and load that."
        )
    if not layers:
        raise MergeError(
            f"An adapter must be active to be merged, but none is on {len(everything)} layers."
            " Choose one with `scales(model, <name>=1.0)`."
        )
    patched = [n for n, m in layers.items() if "forward" in m.__dict__]
    if patched:
        raise MergeError(
            f"A layer must have its class's forward to be merged, but {listed(patched)} has one"
            " patched onto the instance (offloading hooks do this). Remove that patch, merge, and"
            " put it back."
        )
    mixed = [n for n, m in layers.items() if contact.is_mixed(m)]
    if mixed:
        raise MergeError(
            f"A weight must be merged at one strength, but {listed(mixed)} has one for each sample."
            " Choose numbers with `scales` first."
        )
    sites = {n: contact.site_of(m) for n, m in layers.items()}
    found = {n: site for n, site in sites.items() if site is not None}
    if len(found) < len(sites):
        odd = [n for n in sites if n not in found]
        raise MergeError(
            f"A weight must be a plain Parameter to be merged, but that of {listed(odd)} is"
            " computed (parametrized or quantised). Eject, undo that, and inject again."
        )
    coded = [n for n, site in found.items() if _is_coded(site.weight)]
    if coded:
        raise MergeError(
            f"A weight must be of plain floating numbers to be merged, but that of {listed(coded)}"
            " is quantised: rounding to its levels would lose the update. Merge into the model it"
            " was made from, or keep this one unmerged."
        )
    return found


def check_sizes(sites: Mapping[str, Site]) -> None:
    """Refuses layers that were resized under their adapters; few calls, as most are alike."""
    seen = set()
    for n, site in sites.items():
        own, shape = site.layer._parameters, site.weight.shape
        for name in site.strengths:
            down, up = f"lora_A_{name}", f"lora_B_{name}"
            key = (shape, own[down].shape, own[up].shape) if down in own and up in own else n  # type: ignore[union-attr]
            if key in seen:
                continue
            seen.add(key)
            wrong = misfits(site.layer)
            if wrong:
                raise MergeError(
                    f"A layer must keep its size while it carries an adapter, but at {n!r} {wrong}."
                    " Resize before `inject`; or eject, resize and inject again."
                )


def tied_to_merge(model: nn.Module, sites: Mapping[str, Site], *, untie: bool) -> set[str]:
    """Which of these layers share their weight and are to be untied.

    Raises:
        MergeError: If a parameter is shared that can't be, or isn't to be, untied.
    """
    places: dict[tuple[str, str], _Place] = {
        (n, "weight"): (site.owner, site.key, site.weight) for n, site in sites.items()
    }
    for n, site in sites.items():
        if site.bias is not None:
            places[n, "bias"] = (site.layer, "bias", site.bias)
    found = _tied(model, places)
    tied = {n: other for (n, what), other in found.items() if what == "weight"}
    shared = {n: other for n, other in tied.items() if contact.is_part(sites[n])}
    shared |= {n: other for (n, what), other in found.items() if what == "bias"}
    if shared:
        names = [f"{name} (also {other})" for name, other in shared.items()]
        raise MergeError(
            f"A parameter must belong to one module to be merged, but {listed(names)} is shared and"
            " would change there too. Untie it, or keep this one unmerged."
        )
    if tied and not untie:
        names = [f"{name} (also {other})" for name, other in tied.items()]
        raise MergeError(
            f"A weight must belong to one module to be merged, but {listed(names)} is shared and"
            " would change there too. Pass untie=True."
        )
    return set(tied)


def refuse_hollow(sites: Mapping[str, Site]) -> None:
    """Raises if a weight has no values."""
    hollow = [n for n, site in sites.items() if site.weight.is_meta]
    if hollow:
        raise MergeError(
            f"A weight must have values to be merged, but {listed(hollow)} is on the meta device."
            " Call `model.to_empty(device=...)` and load the base first."
        )


def check_factors(sites: Mapping[str, Site]) -> list[float]:
    """The norms of all factors, as `tensors_of` has them.

    Raises:
        MergeError: If a factor is not finite: cheap, and before any large product.
    """
    factors = [factor for site in sites.values() for factor in contact.tensors_of(site)]
    totals = read(norms(factors))
    # not below infinity is what holds such a number, and what only overflows when it is squared
    odd = {i for i, total in enumerate(totals) if not total < math.inf}
    odd = {i for i in odd if not is_finite(factors[i])}
    if odd:
        names = [f"{n}.{a}" for n, site in sites.items() for a in contact.adapters_of(site)]
        bad = list(dict.fromkeys(name for i, name in enumerate(names) if i in odd))
        raise MergeError(
            f"An adapter must be finite to be merged, but {listed(bad)} holds NaN or infinity."
            " Nothing was changed; retrain it or load an earlier file."
        )
    return totals


def check_merged(new: Mapping[str, Tensor], sums: Mapping[str, Tensor] | None = None) -> None:
    """Raises if a merged value is not finite.

    Args:
        new: The values, by the layer's name.
        sums: The sum of each, where it was taken already.
    """
    bad = non_finite(new, sums)
    if bad:
        raise overflow(bad[0], new[bad[0]].dtype)


def overflow(name: str, dtype: torch.dtype) -> MergeError:
    """What is raised for a layer whose merged values are not all finite."""
    return MergeError(
        f"A merged weight must be finite, but that of {name!r} overflows"
        f" {dtype} or its base is not finite. Nothing was changed; use a"
        " smaller strength or a wider dtype."
    )


_USUAL = (nn.Parameter, Tensor)


def _is_coded(weight: Tensor) -> bool:
    dtype = weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return True
    if type(weight) in _USUAL:
        return False
    wrapped: bool = is_traceable_wrapper_subclass(weight)
    return wrapped and type(weight).__name__ != "DTensor"


# the module that a Parameter is of, its name there, and the values in question
_Place = tuple[nn.Module, str, Tensor]


def _tied(model: nn.Module, places: Mapping[tuple[str, str], _Place]) -> dict[tuple[str, str], str]:
    """Those that share memory with another parameter or a buffer, with its name."""
    # a tensor without memory is tied only to itself
    stores = {
        place: (0 if p.is_meta else p.untyped_storage().data_ptr()) or id(p)
        for place, (_, _, p) in places.items()
    }
    wanted = set(stores.values())
    holders: dict[int, list[tuple[nn.Module, str, Tensor]]] = {}
    for module in _modules(model):
        for held in (module._parameters, module._buffers):
            for name, p in held.items():
                # a sparse tensor has no storage of its own to share
                if p is not None and p.layout is torch.strided:
                    store = (0 if p.is_meta else p.untyped_storage().data_ptr()) or id(p)
                    if store in wanted:
                        holders.setdefault(store, []).append((module, name, p))
    found = {}
    for place, (owner, own, values) in places.items():
        for module, name, p in holders.get(stores[place], ()):
            if not (module is owner and name == own) and (p is values or _overlap(p, values)):
                found[place] = (module, name)
    if not found:
        return {}
    names = {module: name for name, module in model.named_modules()}
    return {place: f"{names[m]}.{name}".lstrip(".") for place, (m, name) in found.items()}


def _modules(model: nn.Module) -> Iterable[nn.Module]:
    """Every module once, in order: `modules` calls itself once more for each."""
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and module not in found:
            found[module] = None
            left += reversed(module._modules.values())
    return found


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the spans of two tensors in one storage meet."""
    (a_first, a_last), (b_first, b_last) = (
        (
            t.data_ptr(),
            t.data_ptr() + t.untyped_storage().nbytes() - t.storage_offset() * t.itemsize,
        )
        if not t.is_contiguous()
        else (t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize)
        for t in (a, b)
    )
    return a_first < b_last and b_first < a_last
