"""Whether two adapters are the same function, layer by layer and without dense matrices."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core._algebra.layers import scaled, widened
from lora_core._algebra.matching import names_of
from lora_core._algebra.products import product_norm
from lora_core._cli.measures import form_of, norm_of, one_thread, parts_of
from lora_core._cli.progress import Step
from lora_core._formats import Adapter, AdapterLayer


@dataclass(frozen=True, slots=True)
class Compared:
    """A layer that both adapters have.

    Attributes:
        name: Its name in the first.
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


def compare(one: Adapter, other: Adapter, step: Step) -> Comparison:
    """Compares two adapters; what is in one alone and zero is no difference.

    Raises:
        MismatchError: If names in one of them mean several layers.
    """
    mine, theirs = names_of(one, other)
    pairs = [(mine[key], theirs[key]) for key in mine if key in theirs]
    layers = []
    with one_thread():
        for done, (name, there) in enumerate(pairs, 1):
            difference, why = difference_of(one.layers[name], other.layers[there])
            layers.append(Compared(name, there, difference, why))
            step(done, len(pairs))
    alone = (
        {name: _weight(one.layers[name]) for key, name in mine.items() if key not in theirs},
        {name: _weight(other.layers[name]) for key, name in theirs.items() if key not in mine},
    )
    return Comparison(layers, alone)


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
        gaps.append(_product_gap(mine, theirs))
        parts = parts_of(one), parts_of(other)
    elif one.config is None and other.config is None:
        parts = one.parts, other.parts
    else:  # a whole difference is dense as it is stored
        parts = _dense(one), _dense(other)
    for part in sorted(parts[0].keys() | parts[1].keys()):
        pair = [side.get(part) for side in parts]
        mine_, theirs_ = (
            torch.zeros_like(next(t for t in pair if t is not None)) if t is None else t
            for t in pair
        )
        if mine_.numel() != theirs_.numel():
            shapes = tuple(mine_.shape), tuple(theirs_.shape)
            return math.inf, f"{part} {shapes[0]} in one, {shapes[1]} in the other"
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


def _dense(layer: AdapterLayer) -> dict[str, Tensor]:
    if layer.config is None:
        return dict(layer.parts)
    lora_A, lora_B = scaled(layer)
    bias = layer.parts.get("lora_bias")
    return {"weight": lora_B @ lora_A} | ({} if bias is None else {"bias": bias})


def _weight(layer: AdapterLayer) -> float:
    """The norm of all that a layer adds, infinite where that can't be said without a base."""
    norm = norm_of(layer)
    if norm is None or "DoRA" in form_of(layer):
        return math.inf
    others = parts_of(layer) if layer.config is not None else {}
    return math.hypot(norm, *(float(widened(t).double().norm()) for t in others.values()))
