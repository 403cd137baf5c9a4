"""What there is to say of an adapter's layers, one by one and by the block of the model."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core._algebra.layers import scaled, widened
from lora_core._cli.progress import Step
from lora_core._formats import Adapter, AdapterLayer

_FORMS = {
    "lora_mid": "Tucker",
    "lora_magnitude": "DoRA",
    "lora_in_magnitude": "DoRA of columns",
    "lora_bias": "bias",
    "lora_A0": "subtracted",
}
_NUMBERED = re.compile(r".*?(?<![A-Za-z0-9])\d+")


@dataclass(frozen=True, slots=True)
class Measured:
    """One layer of an adapter in figures.

    Attributes:
        name: Its name in the file.
        component: The part of a pipeline that it is for; "" where the file doesn't say.
        block: The block of the model that it is in.
        kind: What kind of layer it is for, as in `AdapterLayer`.
        form: "LoRA", with its additions; or "difference" or "values".
        rank: Its rank; None where it has no factors.
        alpha: Likewise.
        alpha_from: Where alpha is from.
        scale: Likewise, what its product of factors is multiplied by.
        dtype: Type of its tensors.
        parameters: Numbers in its tensors.
        norm: Frobenius norm of what it adds to the weight, scale included and lengths of DoRA not;
            None of values, which replace the weight.
    """

    name: str
    component: str
    block: str
    kind: str
    form: str
    rank: int | None
    alpha: float | None
    alpha_from: str
    scale: float | None
    dtype: str
    parameters: int
    norm: float | None


def measured(adapter: Adapter, step: Step) -> list[Measured]:
    """The layers of an adapter in figures, in the order of the file."""
    found = []
    with one_thread():
        for done, (name, layer) in enumerate(adapter.layers.items(), 1):
            found.append(_measured(name, layer))
            step(done, len(adapter.layers))
    return found


def _measured(name: str, layer: AdapterLayer) -> Measured:
    config = layer.config
    dtypes = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in layer.parts.values())
    return Measured(
        name,
        layer.component,
        block_of(name, layer),
        layer.kind,
        form_of(layer),
        None if config is None else config.rank,
        None if config is None else config.alpha,
        "" if config is None else layer.alpha_from,
        None if config is None else config.scale,
        ", ".join(dtypes),
        sum(tensor.numel() for tensor in layer.parts.values()),
        norm_of(layer),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """For matrices so small that sharing them among threads takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def form_of(layer: AdapterLayer) -> str:
    """What kind of update a layer is, in words."""
    if layer.config is None:
        return layer.kind
    return ", ".join(["LoRA", *(words for part, words in _FORMS.items() if part in layer.parts)])


def norm_of(layer: AdapterLayer) -> float | None:
    """The norm of a layer's update, from its factors alone; None where it replaces the weight."""
    if layer.config is not None:
        lora_A, lora_B = (factor.double() for factor in scaled(layer))
        # ``tr(A A' B' B)``: a sum of squares, so that nothing cancels
        return float((lora_A @ lora_A.mT * (lora_B.mT @ lora_B).mT).sum().clamp(min=0).sqrt())
    if layer.kind == "values":
        return None
    return total(float(widened(part).double().norm()) for part in layer.parts.values())


def total(norms: Iterable[float]) -> float:
    """The norm of what has parts of these norms."""
    return math.hypot(*norms)


def block_of(name: str, layer: AdapterLayer) -> str:
    """The part of a model that a layer is in: its name to the first number, or its first word."""
    if layer.spelling == "index":
        return layer.component
    path = layer.path or name
    found = _NUMBERED.match(path.replace("_", ".") if layer.spelling == "stem" else path)
    block = path[: found.end()] if found else path.partition(".")[0]
    return f"{layer.component} {block}".lstrip()


@dataclass(frozen=True, slots=True)
class Block:
    """The layers of one block.

    Attributes:
        name: Its name.
        layers: How many there are.
        ranks: Their ranks, each once.
        alphas: Their alphas, each once.
        scales: Their scales, each once.
        parameters: Numbers in their tensors.
        norm: The norm of their updates together.
        largest: The norm of the largest of them.
    """

    name: str
    layers: int
    ranks: Sequence[int]
    alphas: Sequence[float]
    scales: Sequence[float]
    parameters: int
    norm: float
    largest: float


def blocks(layers: Iterable[Measured]) -> list[Block]:
    """The blocks of a model, numbers in their names in the order of numbers."""
    by_block: dict[str, list[Measured]] = {}
    for layer in layers:
        by_block.setdefault(layer.block, []).append(layer)
    return [_block(name, by_block[name]) for name in sorted(by_block, key=_natural)]


def _block(name: str, held: Sequence[Measured]) -> Block:
    norms = [layer.norm for layer in held if layer.norm is not None]
    return Block(
        name,
        len(held),
        sorted({layer.rank for layer in held if layer.rank is not None}),
        sorted({layer.alpha for layer in held if layer.alpha is not None}),
        sorted({layer.scale for layer in held if layer.scale is not None}),
        sum(layer.parameters for layer in held),
        total(norms),
        max(norms, default=0.0),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(n), "") if n.isdigit() else (-1, n) for n in re.split(r"(\d+)", name)]


def figures(values: Sequence[float]) -> str:
    """A few numbers, or the ends of many.

    Example:
        >>> figures([4, 8]), figures([1, 2, 3, 4]), figures([])
        ('4, 8', '1 .. 4', '-')
    """
    if len(values) > 3:
        return f"{values[0]:g} .. {values[-1]:g}"
    return ", ".join(f"{value:g}" for value in values) or "-"


def parts_of(layer: AdapterLayer) -> Mapping[str, Tensor]:
    """The tensors of a layer that are no factors."""
    factors = ("lora_A", "lora_B", "lora_mid", "lora_A0", "lora_B0")
    return {part: tensor for part, tensor in layer.parts.items() if part not in factors}
