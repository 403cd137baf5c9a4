"""What an adapter is on one kind of layer: its tensors, their layouts and what they add.

A kind is one stateless object. Everything that differs between kinds of layers is asked of it, by
layers, files and the algebra alike; a new kind is a file beside this one and its line in `KINDS`.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import AdapterConfig

Shape = tuple[int, ...]


class Update(NamedTuple):
    """A low-rank update as one pair of products.

    Attributes:
        lora_A: Down-projection.
        lora_B: Up-projection.
        gain: What each rank is multiplied by: a number, (), (R,) or (batch, R).
        dropout: Probability of dropping an element of its input.
    """

    lora_A: Tensor
    lora_B: Tensor
    gain: Tensor | float
    dropout: float


def peek(module: Any) -> Tensor:
    """A layer's weight as a forward would find it, read without moving anything.

    A parametrization may change when it is read in training mode, as a spectral norm does.
    """
    weight: Tensor
    if isinstance(module, nn.Module) and "weight" in module._parameters:
        return module._parameters["weight"]  # type: ignore[return-value]
    computed = module._modules.get("parametrizations") if isinstance(module, nn.Module) else None
    if computed is None:
        weight = module.weight
        return weight
    moving = [m for m in computed.modules() if m.training]
    try:
        for m in moving:
            m.training = False
        weight = module.weight
        return weight
    finally:
        for m in moving:
            m.training = True


def own_weight(layer: Any) -> Tensor:
    """A layer's weight without an update, also where reading it gives the sum."""
    own: Tensor | None = layer._parameters.get("weight")
    if own is None:
        own = layer.weight
    return own


def swap(weight: Tensor, values: Tensor) -> None:
    """Gives a Parameter other values without a copy, and lets autograd know.

    A backward through a forward made before the swap raises instead of using wrong values.
    """
    weight.data = values.to(weight.device, weight.dtype)
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)


class Kind:
    """Adapters on a matrix that maps ``in_features`` to ``out_features``; others say what differs.

    Attributes:
        name: What files call it.
        also: What else files may call its factors, where their shapes agree.
        words: What messages call an adapter of it that few programs know; "" for what all do.
        formats: The formats that hold it, where there are `words`.
        rank_dims: Where `lora_A` and `lora_B` have their rank.
        own_layout: Whether its factors have a layout of this library's own, as `fitting` says;
            other programs know those of the rest.
        out_dim: The dimension of the weight that counts outputs, of one group.
        is_matrix: Whether it adapts matrices, as the projections of attention are.
        is_batched: Whether leading dimensions of the factors are a batch of matrices.
        takes_indices: Whether an input is of indices, not of numbers.
        is_read: Whether the host is a parameter that is read, and no layer that is called.
    """

    name = "linear"
    also: tuple[str, ...] = ("weight", "matrix")
    words = ""
    formats: tuple[str, ...] = ()
    rank_dims = (0, 1)
    own_layout = False
    out_dim = 0
    is_matrix = True
    is_batched = False
    takes_indices = False
    is_read = False

    @property
    def may_be_turned(self) -> bool:
        """Whether some hosts store its weight ``(in, out)``, as GPT-2's Conv1D does."""
        return self.is_matrix and not self.is_read

    # -- the tensors

    def sizes(self, host: Any) -> tuple[int, int]:
        """``(in, out)`` of the matrix that is adapted; in is all that one output sees."""
        return int(host.in_features), int(host.out_features)  # a quantised weight has other shapes

    def shapes(self, host: Any, config: AdapterConfig) -> dict[str, Shape]:
        """The shape of each part of an adapter."""
        size, out = self.sizes(host)
        return self._of(config, (config.room, size), (out, config.room), size, out)

    @staticmethod
    def _of(
        config: AdapterConfig, down: Shape, up: Shape, size: int, out: int, mid: Shape = ()
    ) -> dict[str, Shape]:
        """The shapes of the parts that an adapter with these settings has."""
        every = {
            "lora_A": down,
            "lora_B": up,
            "lora_mid": mid,
            "lora_magnitude": (out,),
            "lora_in_magnitude": (size,),
            "lora_bias": (out,),
            "lora_A0": down,
            "lora_B0": up,
        }
        return dict(zip(config.parts, map(every.__getitem__, config.parts), strict=True))

    def refusal(self, host: Any, config: AdapterConfig) -> str:  # noqa: ARG002
        """Which setting this kind of layer can't have, and why; "" if it can have all."""
        return "`tucker` needs a convolution" if config.tucker else ""

    def fitting(self, shape: Shape, config: AdapterConfig) -> dict[str, Shape]:
        """The shape of each part of an adapter of a weight of this shape."""
        out, size = self.matrix(torch.empty(shape, device="meta")).shape
        return self._of(config, (config.room, size), (out, config.room), size, out)

    def blank(self, shape: Shape) -> nn.Module:
        """A module without values that has a weight of this shape."""
        return nn.Linear(shape[1], shape[0], device="meta")

    def fan_in(self, size: int) -> int:
        """How many entries of its input a rank sums over."""
        return size

    def tidy(self, host: Any, values: dict[str, Tensor]) -> None:
        """Changes the tensors of a fresh adapter as this kind of layer needs it, in place."""

    # -- their layouts

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight of this kind as ``(out, in)``, a view."""
        return weight

    def like_weight(self, dense: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG002
        """An ``(out, in)`` matrix in the layout of a weight of this kind."""
        return dense

    def as_matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors as the matrices whose product the update is."""
        return lora_A.flatten(1), lora_B.flatten(1)

    def laid_out(self, part: str, matrix: Tensor, shape: Shape) -> Tensor:  # noqa: ARG002
        """A factor that is a matrix, in the shape that it has on a layer."""
        return matrix.reshape(shape)

    def kernel(self, parts: Mapping[str, Tensor]) -> Shape:  # noqa: ARG002
        """The sizes in which factors differ whose matrices agree; () where there is one number."""
        return ()

    def ranks_of(self, part: str) -> tuple[int, ...]:
        """The dimensions of a part that count its ranks."""
        down, up = self.rank_dims
        dims = {"lora_A": (down,), "lora_B": (up,), "lora_mid": (0, 1)}
        return dims.get(part.removesuffix("0"), ())

    def subtracted(self, lora_A: Tensor, lora_B: Tensor, *first: Tensor) -> tuple[Tensor, Tensor]:
        """`functional.subtracted` for factors of this kind."""
        return functional.subtracted(lora_A, lora_B, *first)

    def columns(self, layer: Any, values: Tensor) -> Tensor:  # noqa: ARG002
        """Values per input feature, ``(in,)``, as they broadcast to ``lora_A`` and to an input."""
        return values

    def channels(self, layer: Any, values: Tensor, out: Tensor) -> Tensor:  # noqa: ARG002
        """Values per output feature, ``(out,)`` or ``(batch, out)``, as they broadcast to `out`."""
        if values.ndim == 1:
            return values
        return values.view(values.shape[0], *[1] * (out.ndim - 2), values.shape[1])

    # -- what a forward adds

    def update(self, layer: Any, x: Tensor, update: Update, *more: Any) -> Tensor:  # noqa: ARG002
        """What one update adds to the host's output for `x`."""
        lora_A, lora_B, gain, dropout = update
        return functional.lora_update(x, lora_A, lora_B, gain, dropout=dropout)

    def through_weight(self, layer: Any, x: Tensor, columns: Tensor) -> Tensor:
        """What the host's matrix gives for `x` with its features multiplied by `columns`."""
        weight = own_weight(layer).to(columns.dtype)
        return nn.functional.linear(x.to(columns.dtype) * columns, weight)

    def samples(self, layer: Any, x: Tensor) -> int | None:  # noqa: ARG002
        """How many samples an input holds, None where it has no batch dimension."""
        return x.shape[0] if x.ndim > 1 else None

    def rows(self, layer: Any, x: Tensor) -> Tensor:  # noqa: ARG002
        """All that one output sees of an input, a row for each output; of no input of indices."""
        return x.reshape(-1, x.shape[-1])

    def inputs(self, layer: Any, x: Tensor) -> tuple[str, bool]:
        """The shape that an input must have, and whether `x` has it."""
        size, _ = self.sizes(layer)
        return f"(..., {size})", x.ndim > 0 and x.shape[-1] == size

    def probe(self, layer: Any, generator: torch.Generator) -> Tensor:
        """An input on which a host can be tried."""
        weight = peek(layer)
        x = torch.randn(4, self.sizes(layer)[0], generator=generator)
        return x.to(weight.device, weight.dtype)

    # -- the values that a merge changes

    def home(self, layer: Any) -> tuple[nn.Module, str]:
        """The module that has the adapted Parameter, and its name there."""
        return layer, "weight"

    def held(self, layer: Any) -> Tensor:
        """The weight's values, to be kept: no later `put` changes them."""
        own: Tensor | None = layer._parameters.get("weight")
        values: Tensor = layer.weight.data if own is None else own.data
        return values

    def held_bias(self, layer: Any) -> Tensor | None:
        """The bias's values, likewise; None where there is none."""
        bias = layer._parameters.get("bias")
        return None if bias is None else bias.data

    def put(self, layer: Any, weight: Tensor, bias: Tensor | None = None) -> None:
        """Gives the weight other values, and the bias where they are given; in place."""
        own: Tensor | None = layer._parameters.get("weight")
        swap(layer.weight if own is None else own, weight)
        if bias is not None:
            swap(layer._parameters["bias"], bias)


class TransposedKind(Kind):
    """A matrix that is stored ``(in, out)``, as GPT-2's Conv1D does."""

    def sizes(self, host: Any) -> tuple[int, int]:
        """The weight's own order."""
        in_features, out_features = peek(host).shape
        return in_features, out_features

    def matrix(self, weight: Tensor) -> Tensor:
        """The transposed weight."""
        return weight.T

    def like_weight(self, dense: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG002
        """The transposed matrix."""
        return dense.T


LINEAR, TRANSPOSED = Kind(), TransposedKind()
_COMPUTING = ("forward", "_conv_forward", "_output_padding")  # methods that use a weight
# host class -> the kind of its objects and of its subclasses'; each kind's file adds its line
KINDS: dict[type[nn.Module], Kind] = {nn.Linear: LINEAR}
# what files call the kinds; a matrix of which no more is known is one
NAMED: dict[str, Kind] = {"linear": LINEAR, "matrix": LINEAR}


def kind_named(name: str) -> Kind:
    """The kind that a file calls so."""
    return NAMED[name]


def may_be_one(name: str, other: str) -> bool:
    """Whether factors that two files, or a file and a model, call so may be for one layer."""
    return name == other or name in NAMED[other].also or other in NAMED[name].also


def kind_of_shape(shape: Shape) -> Kind:
    """The kind of a weight of which no more is known than its shape."""
    return NAMED["conv"] if len(shape) > 2 else LINEAR


def filed_kinds() -> tuple[str, ...]:
    """What our own files call the kinds."""
    return tuple(name for name, kind in NAMED.items() if kind.name == name)


@lru_cache
def host_kind(cls: type) -> type[nn.Module] | None:
    """The class that is adapted among those that a module's class derives from."""
    return next((host for host in cls.__mro__ if host in KINDS), None)


@lru_cache
def computes_as_torch(cls: type) -> bool:
    """Whether a class makes its output of the weight by the methods of torch's own."""
    kind = host_kind(cls)
    return kind is None or all(getattr(cls, n, None) is getattr(kind, n, None) for n in _COMPUTING)
