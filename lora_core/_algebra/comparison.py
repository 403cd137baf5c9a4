"""Two adapters side by side: which layers are one module's, and how far apart their updates are.

Dense matrices are made of factors only where the other adapter has a whole difference.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core._algebra.factors import (
    form_of,
    kernel_of,
    may_be_turned,
    norm_of,
    parts_of,
    scaled,
    widened,
)
from lora_core._algebra.spectrum import one_thread, product_norm
from lora_core._errors import MismatchError, listed
from lora_core._formats import Adapter, AdapterLayer
from lora_core._formats.deltas import dense_delta
from lora_core._formats.spelling import TEXT_MODEL, Place, places_of
from lora_core._layers import WEIGHT


class Key(NamedTuple):
    """What a layer is for, as far as both adapters say it: factors, or a whole difference."""

    place: Place
    whole: bool


Names = dict[Key, str]
_Held = dict[bool, str]  # the layers of one module, by whether they are whole differences


def names_of(one: Adapter, other: Adapter) -> tuple[Names, Names]:
    """The layers of each by what they mean, as far as both say it: what one module is is one key.

    Raises:
        MismatchError: If names in one of them mean several layers.
    """
    mine, theirs = _paired(one), _paired(other)
    if not all(_has_parts(found) for found in (mine, theirs)):
        mine, theirs = _without_parts(mine), _without_parts(theirs)
    if not all(_is_dotted(found) for found in (mine, theirs)):
        mine, theirs = _as_stems(mine), _as_stems(theirs)
    return mine, theirs


def check_names(adapters: Sequence[Adapter]) -> None:
    """Refuses adapters that call one module by two names, of which a sum would have both.

    Raises:
        MismatchError: If they do.
    """
    first = adapters[0]
    for other in adapters[1:]:
        mine, theirs = names_of(first, other)
        both = [(mine[key], theirs[key]) for key in mine if key in theirs]
        apart = [pair for pair in both if pair[0] != pair[1]]
        if apart:
            raise MismatchError(
                f"Adapters must call a module by one name to be combined, but {apart[0][0]!a} and"
                f" {apart[0][1]!a} are one, and so are {len(apart) - 1} more pairs. Load each into"
                " the models and save it again, or give lora-core --base PART=CHECKPOINT."
            )


def _paired(adapter: Adapter) -> Names:
    return _unique(
        (Key(place._replace(path=_unwrapped(place)), adapter.layers[name].config is None), name)
        for name, place in places_of(adapter.layers).items()
    )


def _unwrapped(place: Place) -> str:
    stem = place.spelling == "stem"
    return place.path.removeprefix(TEXT_MODEL.replace(".", "_") if stem else TEXT_MODEL)


def _has_parts(names: Names) -> bool:
    return all(key.place.component for key in names)


def _is_dotted(names: Names) -> bool:
    return all(key.place.spelling == "dotted" for key in names)


def _without_parts(names: Names) -> Names:
    return _unique(
        (key._replace(place=key.place._replace(component="")), name) for key, name in names.items()
    )


def _as_stems(names: Names) -> Names:
    return _unique((key._replace(place=_stem(key.place)), name) for key, name in names.items())


def _stem(place: Place) -> Place:
    dotted = place.spelling == "dotted"
    return place._replace(path=place.stem, spelling="stem") if dotted else place


def _unique(pairs: Iterable[tuple[Key, str]]) -> Names:
    found: Names = {}
    for key, name in pairs:
        if key in found:
            raise MismatchError(
                f"A name must mean one layer to be compared, but {listed([found[key], name])} may"
                " both be the other adapter's. Load each into the models and save it again, or give"
                " lora-core --base PART=CHECKPOINT."
            )
        found[key] = name
    return found


@dataclass(frozen=True, slots=True)
class Compared:
    """A layer that both adapters have.

    Attributes:
        name: Its name in the first, or that of its factors where a bias stands apart.
        other: Its name in the second.
        difference: The norm of what their updates differ by over the norm of the larger; for what
            is beside the factors likewise, and of all that the largest. Infinite where they can't
            be subtracted.
        why: Why they can't; "" where they can.
    """

    name: str
    other: str
    difference: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two adapters have in common.

    Attributes:
        layers: The layers that both have.
        alone: For the first and for the second, the layers that it alone has, with the norm of
            what each adds; infinite where it adds more than an update.
    """

    layers: Sequence[Compared]
    alone: tuple[Mapping[str, float], Mapping[str, float]]

    @property
    def largest(self) -> float:
        """The largest difference of a layer that both have, 0 if there is none."""
        return max((layer.difference for layer in self.layers), default=0.0)

    def is_same(self, tolerance: float) -> bool:
        """Whether both are one function: what one alone has must add nothing."""
        lonely = any(norm for side in self.alone for norm in side.values())
        return not lonely and self.largest <= tolerance


def compare(one: Adapter, other: Adapter, step: Callable[[int, int], object]) -> Comparison:
    """Compares two adapters; what is in one alone and zero is no difference.

    Args:
        one: An adapter.
        other: Another.
        step: Told how many of how many layers are done.

    Raises:
        MismatchError: If names in one of them mean several layers.
    """
    mine, theirs = map(_by_place, names_of(one, other))
    pairs = [
        pair for place in mine if place in theirs for pair in _pairs(mine[place], theirs[place])
    ]
    layers = []
    with one_thread():
        for done, (names, there) in enumerate(pairs, 1):
            difference, why = _apart(
                [one.layers[name] for name in names], [other.layers[name] for name in there]
            )
            layers.append(Compared(names[0], there[0], difference, why))
            step(done, len(pairs))
    alone = _alone(one, mine, theirs), _alone(other, theirs, mine)
    return Comparison(layers, alone)


def _by_place(names: Names) -> dict[Place, _Held]:
    found: dict[Place, _Held] = {}
    for key, name in names.items():
        found.setdefault(key.place, {})[key.whole] = name
    return found


def _pairs(mine: _Held, theirs: _Held) -> list[tuple[list[str], list[str]]]:
    """What to compare of one module: like with like, or all that one has with all of the other."""
    if mine.keys() == theirs.keys():
        return [([mine[whole]], [theirs[whole]]) for whole in mine]
    one, other = ([held[whole] for whole in sorted(held)] for held in (mine, theirs))
    return [(one, other)]


def _alone(
    adapter: Adapter, mine: Mapping[Place, _Held], theirs: Mapping[Place, _Held]
) -> dict[str, float]:
    lonely = [name for place, held in mine.items() if place not in theirs for name in held.values()]
    return {name: _weight(adapter.layers[name]) for name in lonely}


def _apart(one: Sequence[AdapterLayer], other: Sequence[AdapterLayer]) -> tuple[float, str]:
    """As `difference_of`, of the layers of one module, factors first."""
    mine, theirs = _joined(one), _joined(other)
    if mine is None or theirs is None:
        forms = [" and ".join(map(form_of, side)) for side in (one, other)]
        return math.inf, f"{forms[0]} in one, {forms[1]} in the other"
    return difference_of(mine, theirs)


def _joined(layers: Sequence[AdapterLayer]) -> AdapterLayer | None:
    """Factors and a bias that stands apart, as one layer; None of what is more than that."""
    if len(layers) == 1:
        return layers[0]
    factors, whole = layers
    if whole.kind != "difference" or set(whole.parts) != {"bias"}:
        return None
    bias = widened(whole.parts["bias"])
    if "lora_bias" in factors.parts:
        bias = bias + factors.parts["lora_bias"]
    config = replace(factors.settings, bias=True)
    return replace(factors, config=config, parts={**factors.parts, "lora_bias": bias})


def difference_of(one: AdapterLayer, other: AdapterLayer) -> tuple[float, str]:
    """How far two layers are apart, and why that can't be said ("" where it can)."""
    forms = form_of(one), form_of(other)
    lengths = [{"lora_magnitude", "lora_in_magnitude"} & x.parts.keys() for x in (one, other)]
    if lengths[0] != lengths[1] or ("values" in forms and forms[0] != forms[1]):
        return math.inf, f"{forms[0]} in one, {forms[1]} in the other"
    gaps = []
    if one.config is not None and other.config is not None:
        mine, theirs = scaled(one), scaled(other)
        sizes = [(*B.shape[:-1], A.shape[-1]) for A, B in (mine, theirs)]
        if sizes[0] != sizes[1]:
            return math.inf, f"for a weight {sizes[0]} in one, {sizes[1]} in the other"
        kernels = kernel_of(one), kernel_of(other)
        if kernels[0] != kernels[1]:
            return math.inf, f"for a kernel {kernels[0]} in one, {kernels[1]} in the other"
        gaps.append(_product_gap(mine, theirs))
        parts = parts_of(one), parts_of(other)
    elif one.config is None and other.config is None:
        parts = one.parts, other.parts
    else:
        weights = [side.parts.get("weight") for side in (one, other) if side.config is None]
        try:
            parts = _dense(one, weights[0]), _dense(other, weights[0])
        except MismatchError:
            shapes = [{n: tuple(t.shape) for n, t in x.parts.items()} for x in (one, other)]
            return math.inf, f"{shapes[0]} in one, {shapes[1]} in the other"
    for part in sorted(parts[0].keys() | parts[1].keys()):
        pair = [side.get(part) for side in parts]
        mine_, theirs_ = (
            torch.zeros_like(next(t for t in pair if t is not None)) if t is None else t
            for t in pair
        )
        if mine_.numel() != theirs_.numel():
            found = f"{tuple(mine_.shape)} in one, {tuple(theirs_.shape)} in the other"
            return math.inf, f"{part} {found}"
        gaps.append(_relative(*(widened(t).double().flatten() for t in (mine_, theirs_))))
    return max(gaps, default=0.0), ""


def _product_gap(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The norm of the difference of two products over that of the larger, from small matrices."""
    if all(map(torch.equal, one, other)):
        return 0.0
    (A, B), (other_A, other_B) = ((a.double(), b.double()) for a, b in (one, other))
    gap = product_norm(torch.cat([A, other_A], dim=-2), torch.cat([B, -other_B], dim=-1))
    return _over(gap, product_norm(A, B), product_norm(other_A, other_B))


def _relative(one: Tensor, other: Tensor) -> float:
    return _over(*(float(t.norm()) for t in (one - other, one, other)))


def _over(gap: float, one: float, other: float) -> float:
    largest = max(one, other)
    return gap / largest if largest else 0.0


def _dense(layer: AdapterLayer, like: Tensor | None) -> Mapping[str, Tensor]:
    """What a layer adds, in the layout of a whole difference of the weight; none is of zeros.

    Raises:
        MismatchError: If factors are for a weight of another shape.
    """
    if layer.config is None:
        return layer.parts
    found = {part.removeprefix("lora_"): t for part, t in parts_of(layer).items()}
    if like is None:
        norm = product_norm(*(factor.double() for factor in scaled(layer)))
        return {"weight": torch.tensor([norm]), **found}
    sizes = layer.parts["lora_B"].shape[0], layer.parts["lora_A"].shape[-1]
    # stored (in, out), as GPT-2's; of a square one the file must say so
    turned = may_be_turned(layer) and like.shape == sizes[::-1] != sizes
    zeros = torch.zeros((), dtype=torch.float64).expand(like.shape)
    kind = WEIGHT.name if like.ndim == 1 else ""  # a vector is a row
    weight = dense_delta("", layer, zeros, kind=kind, transposed=turned or None)
    return {"weight": weight, **found}


def _weight(layer: AdapterLayer) -> float:
    """The norm of all that a layer adds, infinite where that can't be said without a base."""
    norm = norm_of(layer)
    if norm is None or "DoRA" in form_of(layer):
        return math.inf
    others = parts_of(layer) if layer.config is not None else {}
    return math.hypot(norm, *(float(widened(t).double().norm()) for t in others.values()))
