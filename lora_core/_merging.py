"""Adding the active updates to the weights, and handing the originals back bit for bit."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_core import functional
from lora_core._adapters import layers_with
from lora_core._errors import MergeError, listed
from lora_core._layers import KINDS, LoRAMixin, LoRAWeight, Merged
from lora_core._reports import MergeReport

_SAMPLED_ROWS = 16
# numbers that are looked at together: enough that thousands of tiny layers are few operations, and
# so few that an in-place merge needs less memory than a layer
_CHECKED_TOGETHER = 2**14
_SAMPLED_TOGETHER = 2**17


class _Sample(NamedTuple):
    """Some rows of a layer, to tell by them what rounding lost.

    Attributes:
        old: The weight before.
        new: The weight after.
        update: What was to be added, as matrices whose product it is.
    """

    old: Tensor
    new: Tensor
    update: tuple[Tensor, ...]


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
    layers = _to_merge(model)
    tied = _tied(model, {n: _weight_of(m) for n, m in layers.items()})
    parts = [n for n in tied if isinstance(layers[n], LoRAWeight)]
    biases = {
        n: (m, "bias", bias)
        for n, m in layers.items()
        if _adds_to_bias(m) and (bias := m._parameters["bias"]) is not None
    }
    shared = {**{n: tied[n] for n in parts}, **_tied(model, biases)}
    if shared:
        names = [f"{name} (also {other})" for name, other in shared.items()]
        raise MergeError(
            f"A parameter must belong to one module to be merged, but {listed(names)} is shared and"
            " would change there too. Untie it, or keep this one unmerged."
        )
    if tied and not (untie and reversible):
        names = [f"{name} (also {other})" for name, other in tied.items()]
        raise MergeError(
            f"A weight must belong to one module to be merged, but {listed(names)} is shared and"
            " would change there too. "
            + ("Pass untie=True." if reversible else "Merge reversibly, with untie=True.")
        )
    hollow = [n for n, m in layers.items() if m.weight.is_meta]
    if hollow:
        raise MergeError(
            f"A weight must have values to be merged, but {listed(hollow)} is on the meta device."
            " Call `model.to_empty(device=...)` and load the base first."
        )
    _check_factors(layers)
    strengths = {name: s for layer in layers.values() for name, s in _chosen(layer).items()}
    how = _merge_reversibly if reversible else _merge_in_place
    # weights made in inference mode could not be trained on after an unmerge
    with torch.inference_mode(mode=False), torch.no_grad():  # in this order: leaving turns it on
        loss = how(layers, set(tied), torch.device(keep) if keep is not None else None)
    return MergeReport(strengths, tuple(layers), reversible, loss)


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
    gone = [n for n, state in states.items() if state.kept is None]
    if gone:
        raise MergeError(
            f"`unmerge` must have the original weights, but {listed(gone)} was merged with"
            " reversible=False. Load the base model again."
        )
    hidden = [n for n, state in states.items() if state.merged is not None]
    if hidden:
        raise MergeError(
            f"`unmerge` must stand outside `with disabled(model)`, but {listed(hidden)} is hidden"
            " by one. Leave it first."
        )
    with ExitStack() as undo:
        for name, layer in layers.items():
            bias = None if states[name].bias is None else layer.lora_held_bias()
            undo.callback(_put, layer, _own(layer), layer.lora_held(), bias, states[name])
            _restore(layer, states[name])
        undo.pop_all()
    strengths = {name: s for state in states.values() for name, s in state.strengths.items()}
    return MergeReport(strengths, tuple(layers), reversible=True)


def _to_merge(model: nn.Module) -> dict[str, LoRAMixin]:
    everything = layers_with(model, None)
    merged = [n for n, m in everything.items() if m.lora_merged is not None]
    if merged:
        raise MergeError(
            f"A layer must be unmerged to be merged, but {listed(merged)} is merged already."
            " Call `unmerge(model)` first."
        )
    layers = {n: m for n, m in everything.items() if m.lora_selection.names}
    if not layers:
        raise MergeError(
            f"An adapter must be active to be merged, but none is on {len(everything)} layers."
            " Choose one with `scales(model, <name>=1.0)`."
        )
    patched = [n for n, m in layers.items() if "forward" in vars(m)]
    if patched:
        raise MergeError(
            f"A layer must have its class's forward to be merged, but {listed(patched)} has one"
            " patched onto the instance (offloading hooks do this). Remove that patch, merge, and"
            " put it back."
        )
    mixed = [n for n, m in layers.items() if any(isinstance(s, tuple) for s in _chosen(m).values())]
    if mixed:
        raise MergeError(
            f"A weight must be merged at one strength, but {listed(mixed)} has one for each sample."
            " Choose numbers with `scales` first."
        )
    odd = [n for n, m in layers.items() if not _is_stored(m)]
    if odd:
        raise MergeError(
            f"A weight must be a plain Parameter to be merged, but that of {listed(odd)} is"
            " computed (parametrized or quantised). Eject, undo that, and inject again."
        )
    coded = [n for n, m in layers.items() if _is_coded(m.weight)]
    if coded:
        raise MergeError(
            f"A weight must be of plain floating numbers to be merged, but that of {listed(coded)}"
            " is quantised: rounding to its levels would lose the update. Merge into the model it"
            " was made from, or keep this one unmerged."
        )
    return layers


def _is_coded(weight: Tensor) -> bool:
    wrapped: bool = is_traceable_wrapper_subclass(weight)
    return (
        (wrapped and type(weight).__name__ != "DTensor")
        or not weight.is_floating_point()
        or weight.dtype.itemsize < 2
    )


def _is_stored(layer: LoRAMixin) -> bool:
    home, key = layer.lora_home()
    return home._parameters.get(key) is not None


# the module that a Parameter is of, its name there, and the values in question
_Place = tuple[nn.Module, str, Tensor]


def _tied(model: nn.Module, places: Mapping[str, _Place]) -> dict[str, str]:
    """Those that share memory with another parameter or a buffer, with its name."""
    wanted = {_storage(values) for _, _, values in places.values()}
    holders: dict[int, list[tuple[nn.Module, str, str, Tensor]]] = {}
    for module_name, module in model.named_modules():
        for name, p in (*module._parameters.items(), *module._buffers.items()):
            # a sparse tensor has no storage of its own to share
            if p is not None and p.layout == torch.strided and (key := _storage(p)) in wanted:
                label = f"{module_name}.{name}".lstrip(".")
                holders.setdefault(key, []).append((module, name, label, p))
    found = {}
    for layer, (home, own, values) in places.items():
        for module, name, label, p in holders.get(_storage(values), ()):
            if not (module is home and name == own) and (p is values or _overlap(p, values)):
                found[layer] = label
    return found


def _weight_of(layer: LoRAMixin) -> _Place:
    return (*layer.lora_home(), layer.weight)


def _storage(p: Tensor) -> int:
    # a tensor without memory is tied only to itself
    return (0 if p.is_meta else p.untyped_storage().data_ptr()) or id(p)


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


def _check_factors(layers: dict[str, LoRAMixin]) -> None:
    """Refuses non-finite factors and strengths: cheap, and before any large product."""
    factors = (
        (f"{name}.{adapter}", factor)
        for name, layer in layers.items()
        for adapter in layer.lora_selection.names
        for factor in layer.lora_parts(adapter).values()
    )
    bad = list(dict.fromkeys(n for batch in _batches(factors) for n in _non_finite(batch)))
    if bad:
        raise MergeError(
            f"An adapter must be finite to be merged, but {listed(bad)} holds NaN or infinity."
            " Nothing was changed; retrain it or load an earlier file."
        )


def _batches(named: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """As many tensors at a time as have `_CHECKED_TOGETHER` numbers, one at least."""
    batch, numbers = [], 0
    for item in named:
        if item[1].numel() >= _CHECKED_TOGETHER:  # joined to others it would be copied
            yield [item]
            continue
        batch.append(item)
        numbers += item[1].numel()
        if numbers >= _CHECKED_TOGETHER:
            yield batch
            batch, numbers = [], 0
    yield batch


def _non_finite(batch: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that hold NaN or infinity; few operations where none does."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, t in batch:
        groups.setdefault((t.device, t.dtype), []).append((name, t.detach()))
    bad = []
    for group in groups.values():
        one = len(group) == 1
        whole = group[0][1] if one else torch.cat([t.reshape(-1) for _, t in group])
        if not _is_finite(whole):
            bad += [name for name, t in group if one or not _is_finite(t)]
    return bad


def _check_merged(batch: Iterable[tuple[str, Tensor]]) -> None:
    batch = list(batch)
    bad = _non_finite(batch)
    if bad:
        raise MergeError(
            f"A merged weight must be finite, but that of {bad[0]!r} overflows"
            f" {dict(batch)[bad[0]].dtype} or its base is not finite. Nothing was changed; use a"
            " smaller strength or a wider dtype."
        )


def _adds_to_bias(layer: LoRAMixin) -> bool:
    return any(layer.lora_configs[name].bias for name in layer.lora_selection.names)


def _new_bias(name: str, layer: LoRAMixin) -> Tensor | None:
    """The merged bias, checked; None where no active adapter adds to it."""
    if not _adds_to_bias(layer):
        return None
    bias, delta = layer._parameters["bias"], layer.lora_bias_delta()
    assert bias is not None
    assert delta is not None
    new = functional.merged_weight(bias, delta)
    _check_merged([(name, new)])
    return new


def _new_weight(name: str, layer: LoRAMixin) -> tuple[Tensor, _Sample]:
    """The merged weight, not yet checked, and a sample of it."""
    weight = layer.weight
    update: tuple[Tensor, ...]
    if _sums_in_product(layer):
        lora_A, lora_B, rows = _scaled(layer)
        new = torch.addmm(weight, lora_B, lora_A)
        update = (rows, lora_A)
    else:
        delta = layer.lora_delta()
        new = functional.merged_weight(weight, delta)
        if not _linear_in_weight(layer):
            _check_merged([(name, new)])
            _probe(name, layer, new)
        update = (_sampled(delta).clone(),)  # all the rest of it may go
    return new, _Sample(_sampled(weight), _sampled(new), update)


def _sums_in_product(layer: LoRAMixin) -> bool:
    """Whether the matrix product itself may add to the weight: the update is never written."""
    weight = layer.weight
    return (
        _linear_in_weight(layer)
        and layer.lora_matrix(weight) is weight
        and weight.ndim == 2
        and all(layer.lora_configs[n].plain_sum for n in layer.lora_selection.names)
        and type(weight) is nn.Parameter
        and weight.dtype in (torch.float32, torch.float64)  # the product's own rounding is theirs
        and weight.is_contiguous()
        and not weight.is_inference()  # which has no version to tell by
    )


def _scaled(layer: LoRAMixin) -> tuple[Tensor, Tensor, Tensor]:
    """The stacked lora_A, the stacked and scaled lora_B, and some rows of that."""
    lora_A, lora_B, gain = layer.lora_stacked()
    dtype = layer.weight.dtype
    lora_B = lora_B.to(dtype) * gain.to(dtype)
    return lora_A.to(dtype), lora_B, _sampled(lora_B)


def _is_finite(values: Tensor) -> bool:
    """Whether all are finite, in one pass and without a mask of their size."""
    return not values.numel() or all(bool(v.isfinite()) for v in values.aminmax())


def _linear_in_weight(layer: LoRAMixin) -> bool:
    """Whether the host's forward is one that is known to be."""
    return layer.lora_linear_in_weight or any(
        issubclass(layer.host_class, kind) and layer.host_class.forward is kind.forward
        for kind in KINDS
    )


def _probe(name: str, layer: LoRAMixin, new: Tensor) -> None:
    """Raises unless the host's own forward makes of a new weight what the update adds."""
    taken = list(inspect.signature(layer.host_class.forward).parameters.values())
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    options = [str(p) for i, p in enumerate(taken) if i > 1 or p.kind in many]
    if options:
        raise MergeError(
            f"A host's forward must take its input alone to be merged, but that of"
            f" {layer.host_class.__name__} at {name!r} also takes {listed(options)}, with which the"
            " update might not follow. Nothing was changed; keep this layer unmerged."
        )
    weight = _own(layer)
    x = layer.lora_probe(torch.Generator("cpu").manual_seed(0))
    try:
        before = layer.host_class.forward(layer, x)
        layer._parameters["weight"] = nn.Parameter(new, requires_grad=False)
        after = layer.host_class.forward(layer, x)
    finally:
        layer._parameters["weight"] = weight
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        raise MergeError(
            f"A host must return a tensor to be merged, but {layer.host_class.__name__} at {name!r}"
            f" returns {type(before).__name__}. Nothing was changed; keep this layer unmerged."
        )
    asked, got = layer.lora_addition(x, before), after.double() - before.double()
    eps = torch.finfo(weight.dtype).eps
    bound = 64 * eps * float(before.double().norm() + asked.norm())
    if not bool((asked - got).norm() <= bound):
        raise MergeError(
            f"A host's output must follow its weight to be merged, but the forward of"
            f" {layer.host_class.__name__} at {name!r} makes something else of it. Nothing was"
            " changed; keep this layer unmerged."
        )


def _sampled(values: Tensor) -> Tensor:
    step = -(-values.shape[0] // _SAMPLED_ROWS)
    return values[::step] if step > 1 else values


def _lost(samples: Mapping[str, _Sample]) -> dict[str, float]:
    """The share of each update that rounding lost; those of one shape are worked out together."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, (old, new, update) in samples.items():
        shape = tuple((f.shape, f.dtype, f.device) for f in (old, new, *update))
        groups.setdefault(shape, []).append(name)
    lost: dict[str, float] = {}
    for group in groups.values():
        step = _SAMPLED_TOGETHER // (samples[group[0]].new.numel() or 1) or 1
        for some in (group[i : i + step] for i in range(0, len(group), step)):
            rows = [(s.old, s.new, *s.update) for s in map(samples.__getitem__, some)]
            old, new, *factors = (torch.stack(c).double() for c in zip(*rows, strict=True))
            asked = factors[0] @ factors[1] if len(factors) > 1 else factors[0]
            off, norm = ((v.flatten(1).norm(dim=1)) for v in (asked - (new - old), asked))
            shares = torch.where(norm > 0, off / norm, 0.0).tolist()
            lost.update(zip(some, shares, strict=True))
    return {name: lost[name] for name in samples}


def _merge_reversibly(
    layers: dict[str, LoRAMixin], tied: set[str], keep: torch.device | None
) -> dict[str, float]:
    new, samples = {}, {}

    def made() -> Iterator[tuple[str, Tensor]]:
        for name, layer in layers.items():
            new[name], samples[name] = _new_weight(name, layer)
            yield name, new[name]

    for batch in _batches(made()):  # while they are in the cache
        _check_merged(batch)
    loss = _lost(samples)
    biases = {n: _new_bias(n, m) for n, m in layers.items()}
    kept = {n: m.lora_held() if keep is None else m.lora_held().to(keep) for n, m in layers.items()}
    with ExitStack() as undo:
        for name, layer in layers.items():
            own, bias = _own(layer), biases[name]
            old_bias = None if bias is None else layer.lora_held_bias()
            undo.callback(_put, layer, own, layer.lora_held(), old_bias, None)
            if name in tied:
                layer._parameters["weight"] = nn.Parameter(own.data, own.requires_grad)
            layer.lora_put(new[name], bias)
            untied = own if name in tied else None
            layer.lora_merged = Merged(_chosen(layer), kept[name], None, untied, old_bias)
        undo.pop_all()
    return loss


def _merge_in_place(
    layers: dict[str, LoRAMixin],
    tied: set[str],  # noqa: ARG001  # refused before
    keep: torch.device | None,  # noqa: ARG001  # nothing is kept
) -> dict[str, float]:
    for name, layer in layers.items():
        if _linear_in_weight(layer):
            _refuse_overflow(name, layer)
        else:  # only the sum itself can be tried
            _check_merged([(name, _new_weight(name, layer)[0])])
        _new_bias(name, layer)
    loss: dict[str, float] = {}
    for name, layer in layers.items():
        state = Merged(_chosen(layer), None)
        if _sums_in_product(layer):
            loss |= _lost({name: _add_in_place(layer, state)})
            continue
        new, sample = _new_weight(name, layer)
        _check_merged([(name, new)])
        loss |= _lost({name: sample})
        bias = _new_bias(name, layer)
        try:
            _overwrite(layer, new, bias, state)
        except BaseException:  # finish this layer: copying is idempotent, adding would not be
            _overwrite(layer, new, bias, state)
            raise
    return loss


def _overwrite(layer: LoRAMixin, weight: Tensor, bias: Tensor | None, state: Merged) -> None:
    layer.weight.copy_(weight)
    if bias is not None:
        own = layer._parameters["bias"]
        assert own is not None
        own.copy_(bias)
    layer.lora_merged = state


def _add_in_place(layer: LoRAMixin, state: Merged) -> _Sample:
    lora_A, lora_B, rows = _scaled(layer)
    weight = layer.weight
    old, version = _sampled(weight).clone(), weight._version
    try:
        weight.addmm_(lora_B, lora_A)
        layer.lora_merged = state
    except BaseException:  # an interrupt may come before the note, but not amid the product
        if weight._version != version:
            layer.lora_merged = state
        raise
    return _Sample(old, _sampled(weight), (rows, lora_A))


def _refuse_overflow(name: str, layer: LoRAMixin) -> None:
    """Raises where a merged weight would not be finite, mostly without computing it.

    By Cauchy-Schwarz no entry of the update exceeds the norm of its B times that of its A.
    """
    if any(layer.lora_configs[n].dora for n in layer.lora_selection.names):
        _check_merged([(name, _new_weight(name, layer)[0])])
        return
    lora_A, lora_B, gain = layer.lora_stacked()
    bound = (lora_A.double().norm() * (lora_B * gain).double().norm()).to(layer.weight.device)
    low, high = layer.weight.aminmax()
    largest = torch.maximum(-low, high).double()
    if not bool(largest + bound < torch.finfo(layer.weight.dtype).max / 2):
        _check_merged([(name, _new_weight(name, layer)[0])])


def _chosen(layer: LoRAMixin) -> dict[str, float]:
    return layer.lora_strengths()  # type: ignore[return-value]  # no mix per sample


def _own(layer: LoRAMixin) -> nn.Parameter:
    home, key = layer.lora_home()
    weight = home._parameters[key]
    assert weight is not None
    return weight


def _put(
    layer: LoRAMixin,
    own: nn.Parameter,
    values: Tensor,
    bias: Tensor | None,
    state: Merged | None,
) -> None:
    home, key = layer.lora_home()
    home._parameters[key] = own
    layer.lora_put(values, bias)
    layer.lora_merged = state


def _restore(layer: LoRAMixin, state: Merged) -> None:
    assert state.kept is not None
    if state.parameter is not None:  # the shared Parameter was never written
        layer._parameters["weight"] = state.parameter
        if state.bias is not None:
            layer.lora_put(state.parameter.data, state.bias)
    else:
        layer.lora_put(state.kept, state.bias)
    layer.lora_merged = None
