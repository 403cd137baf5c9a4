"""The difference of two models as an adapter, one tensor at a time."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_core._adapters import clean
from lora_core._algebra.checkpoints import DTYPES, open_checkpoint
from lora_core._algebra.factors import check_result, check_seed
from lora_core._algebra.places import MOST_DIMENSIONS, Place, place_of
from lora_core._algebra.ranks import Limit, check_limit, cut, subspace_rank, unheard
from lora_core._algebra.spectrum import dense_spectrum, is_finite
from lora_core._config import AdapterConfig, check_dtype, check_name
from lora_core._errors import ConfigError, MismatchError, listed
from lora_core._formats import Adapter, AdapterLayer
from lora_core._injection import walk
from lora_core._layers import PROJECTIONS, Kind, LoRAMixin, kind_for, kind_of_shape
from lora_core._reports import Teller, Told

Model = nn.Module | str | os.PathLike[str]


class _Side(NamedTuple):
    """A model's tensors, read when they are asked for.

    Attributes:
        shapes: Their shapes by name.
        floating: Those that are plain floating numbers.
        read: Reads one.
        module: The model itself if it is one.
    """

    shapes: Mapping[str, tuple[int, ...]]
    floating: frozenset[str]
    read: Callable[[str], Tensor]
    module: nn.Module | None = None


class _Layer(NamedTuple):
    """A layer that can have an update.

    Attributes:
        name: Its name.
        place: Where its weight is.
        kind: Its kind.
    """

    name: str
    place: Place
    kind: Kind


def extract(
    base: Model,
    tuned: Model,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    svd: Literal["auto", "exact", "randomised"] = "auto",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    name: str = "default",
    told: Told | None = None,
) -> Adapter:
    """The adapter that makes `tuned` of `base`, as nearly as its ranks allow.

    Each weight's difference is taken in float32 or wider and cut to its largest singular values.
    Tensors are read one pair at a time. Layers that don't differ get nothing.

    The kinds of the layers are those of a model's modules. Two files say no more than shapes:
    there a ``.weight`` of two dimensions is taken for that of a linear layer, stored (out, in),
    and one of three to five for a convolution's. Where that is wrong, as for embeddings, give a
    model for one side.

    Only the matrices and kernels of layers become factors. Other tensors that differ (biases, the
    vectors of norms, tensors that one side alone has) are left out, warned of and noted in the
    result.

    Args:
        base: A model, or a checkpoint: a ``.safetensors`` file, the index of shards, or a folder
            with either.
        tuned: Another of the same layers; adapters on it must be merged.
        rank: The highest rank of a layer.
        energy: The share of each difference's squared norm to keep, in (0, 1].
        error: The highest relative error of a difference, in [0, 1).
        svd: "exact", or "randomised" by a subspace iteration, which takes a rank and is far faster
            on large matrices; "auto" is exact up to 1024 for the smaller side, and wherever the
            rank is over a quarter of that or `energy` or `error` is asked for.
        seed: Decides the random subspace.
        dtype: Type of the factors.
        name: The adapter's name.
        told: Told of each layer's rank and relative error, rank 0 where nothing differs; see
            `LayerResult`.

    Raises:
        ConfigError: If a setting is out of range, an adapter is active and not merged, a weight
            holds NaN or infinity, or a layer's factors overflow `dtype`.
        MismatchError: If a tensor has another shape on each side, or no weight differs.
        CorruptFileError: If a checkpoint is damaged or of another kind.
        OSError: If a file can't be read.

    Reference:
        Eckart and Young, "The Approximation of One Matrix by Another of Lower Rank", 1936.

    Example:
        >>> base, tuned = nn.Linear(6, 5), nn.Linear(6, 5)
        >>> with torch.no_grad():
        ...     _ = tuned.weight.copy_(base.weight + torch.ones(5, 1) @ torch.ones(1, 6))
        ...     _ = tuned.bias.copy_(base.bias)
        >>> adapter = extract(nn.Sequential(base), nn.Sequential(tuned), rank=1)
        >>> adapter.layers["0"].kind
        'linear'
    """
    limit = check_limit(rank, energy, error)
    _check(svd, limit)
    check_dtype("dtype", dtype)
    check_name(name)
    check_seed(seed)
    sides = _side("base", base), _side("tuned", tuned)
    layers = _layers(*sides)
    wrong = [
        f"{n} (base {sides[0].shapes[n]}, tuned {sides[1].shapes[n]})"
        for n in sides[0].shapes.keys() & sides[1].shapes.keys()
        if sides[0].shapes[n] != sides[1].shapes[n]
    ]
    if wrong:
        raise MismatchError(
            f"`base` and `tuned` must be of one shape, but {listed(sorted(wrong))} differ. Give"
            " two states of one model."
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    tell, made = Teller(told, len(layers)), {}
    with torch.no_grad():
        for layer in layers:
            difference = _difference(layer, *sides)
            if not is_finite(difference):
                _check_finite(layer, *sides)
            if not difference.any():
                tell(layer.name, 0, 0.0)
                continue
            matrix = layer.kind.matrix(difference)
            found = dense_spectrum(matrix, subspace_rank(matrix, limit, svd), generator)
            one = AdapterConfig(rank=1, alpha=1.0, dropout=0.0, dtype=dtype)
            shapes = layer.kind.fitting(tuple(difference.shape), one)
            parts = {part: torch.empty(shape, device="meta") for part, shape in shapes.items()}
            like = AdapterLayer(layer.kind.name, one, parts)
            silent = unheard(layer.kind, matrix)
            result, lost = cut(found, limit, like, dtype, silent=silent)
            check_result(layer.name, result, lost)
            del difference, matrix, found
            # copies, made when all that is large is gone: a factor that lives on between two large
            # tensors keeps the allocator from joining their memory, and each layer would take more
            made[layer.name] = replace(
                result, parts={n: t.clone() for n, t in result.parts.items()}
            )
            tell(layer.name, result.settings.rank, lost)
        left = _left(layers, *sides)
    if not made:
        others = f"; what differs is {listed(left)}" if left else ""
        raise MismatchError(
            f"`tuned` must differ from `base` in a weight, but all {len(layers)} that can have an"
            f" update are equal{others}. Give two states of one model."
        )
    notes: tuple[str, ...] = (
        f"extracted with a relative error of {tell.worst:.2e} at most in a layer",
    )
    if left:
        note = (
            f"left out are {len(left)} tensors that differ, being no layer's matrix or kernel:"
            f" {listed(left)}"
        )
        warnings.warn(note, stacklevel=2)
        notes += (note,)
    return Adapter(name, made, notes=notes)


def _check(svd: str, limit: Limit) -> None:
    kinds = ("auto", "exact", "randomised")
    if svd not in kinds:
        raise ConfigError(f"`svd` must be one of {listed(kinds)}, but is {svd!r}.")
    if svd == "randomised" and limit.rank is None:
        raise ConfigError(
            "`svd` must be 'exact' or 'auto' where no rank is given, but is 'randomised': a share"
            " takes all singular values."
        )


def _side(what: str, model: Model) -> _Side:
    if isinstance(model, str | os.PathLike):
        file = open_checkpoint(model)
        entries = file.entries
        floating = frozenset(name for name, entry in entries.items() if entry.dtype in DTYPES)
        return _Side(file.shapes, floating, file.read)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"`{what}` must be an nn.Module or the path of a checkpoint, but is"
            f" {type(model).__name__}."
        )
    active = [
        clean(name)
        for name, m in model.named_modules()
        if isinstance(m, LoRAMixin) and m.lora_state.selection.names and m.lora_state.merged is None
    ]
    if active:
        raise ConfigError(
            f"`{what}` must have its adapters in its weights, but one on {listed(active)} is active"
            " beside them. Call `merge(model)` first."
        )
    tensors = {
        clean(name): t.detach()
        for name, t in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
        if not name.rpartition(".")[2].startswith("lora_")
    }
    hollow = [name for name, t in tensors.items() if t.is_meta]
    if hollow:
        raise ConfigError(
            f"`{what}` must have values, but {listed(hollow)} is on the meta device. Load it first."
        )
    plain = {n for n, t in tensors.items() if t.is_floating_point() and t.dtype.itemsize > 1}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return _Side(shapes, frozenset(plain), tensors.__getitem__, model)


def _layers(base: _Side, tuned: _Side) -> list[_Layer]:
    """The layers that both sides have and that can have an update."""
    both = base.floating & tuned.floating
    model = base.module if base.module is not None else tuned.module
    found = list(
        _of_model(model, base.shapes, both) if model is not None else _of_shapes(base.shapes, both)
    )
    if not found:
        raise MismatchError(
            "`base` and `tuned` must share a weight that can have an update, but `base` has"
            f" {len(base.shapes)} tensors, {listed(base.shapes)}, and `tuned` {len(tuned.shapes)},"
            f" {listed(tuned.shapes)}. Give two states of one model."
        )
    return found


def _of_model(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], tensors: frozenset[str]
) -> Iterator[_Layer]:
    found: dict[Place, _Layer] = {}
    for candidate in walk(model):
        place, kind = place_of(candidate.name, tensors), kind_for(candidate.module)
        if place is None or kind is None or len(shapes[place.tensor]) < 2:
            continue
        # a module's weight may be a parameter of its own too, which knows less of it
        if place in found and candidate.name == place.tensor:
            continue
        if candidate.adaptable and not candidate.problem:
            found[place] = _Layer(candidate.name, place, kind)
    packed = {place.tensor for place in found if place.part is not None}
    for place, layer in found.items():  # by its parts, or whole
        if place.part is not None or place.tensor not in packed:
            yield layer


def _of_shapes(shapes: Mapping[str, tuple[int, ...]], tensors: frozenset[str]) -> Iterator[_Layer]:
    for name, shape in shapes.items():
        if name in tensors and name.endswith(".weight") and 2 <= len(shape) <= MOST_DIMENSIONS:
            yield _Layer(name.removesuffix(".weight"), Place(name), kind_of_shape(shape))


def _difference(layer: _Layer, base: _Side, tuned: _Side) -> Tensor:
    """What was added to a layer's weight, in its own layout, in float32 or wider."""
    tensor, part = layer.place
    before, after = base.read(tensor), tuned.read(tensor)
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    is_own = tuned.module is None or after.dtype != dtype  # a model's tensors are not ours
    after, before = after.to(dtype), before.to(after.device)
    found = after.sub_(before) if is_own else after - before
    return _part(found, part)


def _part(weight: Tensor, part: int | None) -> Tensor:
    if part is None:
        return weight
    size = len(weight) // len(PROJECTIONS)
    return weight[part * size : (part + 1) * size]


def _check_finite(layer: _Layer, base: _Side, tuned: _Side) -> None:
    """Names the side whose weight is not finite; of finite ones the difference may overflow."""
    for what, side in (("base", base), ("tuned", tuned)):
        if not is_finite(_part(side.read(layer.place.tensor), layer.place.part)):
            raise ConfigError(
                f"`{what}` must be finite, but {layer.name!a} holds NaN or infinity. Go back to an"
                " earlier state."
            )


def _left(layers: list[_Layer], base: _Side, tuned: _Side) -> list[str]:
    """The tensors that differ and are no layer's weight."""
    known = {layer.place.tensor for layer in layers}
    both = [n for n in base.shapes if n in tuned.shapes and n not in known]
    differ = [n for n in both if not _is_same(base.read(n), tuned.read(n))]
    return [*differ, *sorted(base.shapes.keys() ^ tuned.shapes.keys())]


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.dtype == other.dtype:
        return torch.equal(one, other.to(one.device))
    return torch.equal(one.double(), other.to(one.device).double())
