"""The weight form: adapters on a parameter that is read, whoever reads it, and never called.

The module that owns the parameter takes on a class in which reading it gives the value plus the
update. Its Parameter, its key and its bits stay; nothing is ever written to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._errors import UnsupportedLayerError
from lora_core._layers.context import checked, recorded_read, settled
from lora_core._layers.kind import NAMED, Kind, Shape, swap
from lora_core._layers.mixin import LoRAMixin
from lora_core._layers.state import STATE, State
from lora_core._layers.updates import active
from lora_core.kernels.norms import without_autocast

CHILD = "lora_at"  # what the child that carries the factors is called in its owner
PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # of attention, unpacked


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter, or some of its rows, that an adapter can go on.

    Attributes:
        owner: The module that has the parameter.
        parameter: Its name there.
        label: What the slot is called after its owner; "" for the owner's own name.
        rows: The first row and the one after the last; None for all.
    """

    owner: nn.Module
    parameter: str
    label: str
    rows: tuple[int, int] | None = None

    @property
    def weight(self) -> Tensor:
        """The rows as they are."""
        return _rows(self.owner, self.parameter, self.rows)

    @property
    def child(self) -> str:
        """The name of the child that carries the factors."""
        return f"{CHILD}_{self.label}" if self.label else CHILD

    def occupy(self) -> "LoRAWeight":
        """The child that carries the factors, made if it is not there; in place."""
        found = self.owner._modules.get(self.child)
        if found is None:
            found = LoRAWeight(self)
            self.owner._modules[self.child] = found
            reads = (*_reads(self.owner), (self.parameter, self.child))
            self.owner.__class__ = reading_class(host_of(self.owner), reads)
        assert isinstance(found, LoRAWeight)
        return found


class WeightKind(Kind):
    """Adapters on a parameter that is read: a matrix, a batch of matrices, or a vector as a row.

    A parameter of more than two dimensions, such as the weights of several experts (E, out, in),
    is a batch of matrices, each with factors of its own: ``lora_A`` (E, rank, in), ``lora_B``
    (E, out, rank).
    """

    name = "weight"
    also = ("linear", "matrix")
    words = "a parameter that is read"
    formats = ("lora_core",)
    rank_dims = (-2, -1)
    is_batched = True
    is_read = True

    def sizes(self, host: Any) -> tuple[int, int]:
        """``(in, out)`` of the last two dimensions."""
        *_, out_features, in_features = self.matrix(host.weight).shape
        return int(in_features), int(out_features)

    def shapes(self, host: Any, config: AdapterConfig) -> dict[str, Shape]:
        """Those for the parameter, or the rows of it that are adapted."""
        return self.fitting(tuple(host.weight.shape), config)

    def fitting(self, shape: Shape, config: AdapterConfig) -> dict[str, Shape]:
        """The parameter's leading dimensions stand before both factors'."""
        *batch, out, size = (1, *shape)[-max(2, len(shape)) :]
        down, up = (*batch, config.room, size), (*batch, out, config.room)
        every = {"lora_A": down, "lora_B": up, "lora_A0": down, "lora_B0": up}
        return {part: every[part] for part in config.parts if part in every}

    def refusal(self, host: Any, config: AdapterConfig) -> str:  # noqa: ARG002
        """Which setting needs the input of a layer, or its output."""
        asked = {
            "`dropout`": config.dropout,
            "`dora`": config.dora,
            "`bias`": config.bias,
            "`tucker`": config.tucker,
            "`init='eva'`": config.starts_from == "inputs",
        }
        wrong = [what for what, value in asked.items() if value]
        return (
            f"{wrong[0]} is for layers that are called, and this parameter is only read"
            if wrong
            else ""
        )

    def matrix(self, weight: Tensor) -> Tensor:
        """The parameter itself, a vector as a row."""
        return weight[None] if weight.ndim == 1 else weight

    def like_weight(self, dense: Tensor, weight: Tensor) -> Tensor:
        """The matrix itself, or its row."""
        return dense.view(weight.shape)

    def as_matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """The factors as they are, batches of matrices perhaps."""
        return lora_A, lora_B

    def subtracted(self, lora_A: Tensor, lora_B: Tensor, *first: Tensor) -> tuple[Tensor, Tensor]:
        """`functional.subtracted` for a batch of matrices, whose ranks are not their first."""
        (A, A0), (B, B0) = (lora_A, first[0]), (lora_B, first[1])
        down, up = functional.subtracted(
            A.movedim(-2, 0), B.movedim(-1, 1), A0.movedim(-2, 0), B0.movedim(-1, 1)
        )
        return down.movedim(0, -2), up.movedim(1, -1)

    def inputs(self, layer: Any, x: Tensor) -> tuple[str, bool]:
        """That of the whole parameter."""
        whole = layer.owner._parameters[layer.lora_parameter]
        return str(tuple(whole.shape)), x.shape == whole.shape

    def home(self, layer: Any) -> tuple[nn.Module, str]:
        """The owner, and the parameter's name there."""
        return layer.owner, layer.lora_parameter

    def held(self, layer: Any) -> Tensor:
        """The rows' values; a copy where others share the parameter."""
        values: Tensor = layer.weight.data
        return values if layer.lora_rows is None else values.clone()

    def held_bias(self, layer: Any) -> None:
        """None: a parameter that is read has no bias."""

    def put(self, layer: Any, weight: Tensor, bias: Tensor | None = None) -> None:  # noqa: ARG002
        """Gives the rows other values, in place."""
        whole = layer.owner._parameters[layer.lora_parameter]
        values = weight
        if layer.lora_rows is not None:  # who has read the whole keeps what it was
            values = whole.data.clone()
            values[layer.lora_rows[0] : layer.lora_rows[1]].copy_(weight)
        swap(whole, values)


WEIGHT = NAMED["weight"] = WeightKind()


class LoRAWeight(LoRAMixin):
    """Adapters on a parameter: maps the parameter to its sum with the updates."""

    lora_host_class, lora_kind, lora_is_read = nn.Module, WEIGHT, True

    def __init__(self, slot: Slot) -> None:
        nn.Module.__init__(self)
        self.training = slot.owner.training
        vars(self)[STATE] = State()
        # in a tuple, or it would be a child of its own child
        vars(self)["lora_owner"] = (slot.owner,)
        self.lora_parameter, self.lora_label, self.lora_rows = (
            slot.parameter,
            slot.label,
            slot.rows,
        )

    @property
    def owner(self) -> nn.Module:
        """The module that has the parameter."""
        return cast(nn.Module, vars(self)["lora_owner"][0])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parameter's rows as they are."""
        return _rows(self.owner, self.lora_parameter, self.lora_rows)

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter plus the active updates; only `lora_rows` of it change."""
        updates = active(self).updates
        if not updates:
            return weight
        ((lora_A, lora_B, gain, _),) = updates  # as nothing drops a part of an input
        start, stop = self.lora_rows or (0, weight.shape[0])
        with without_autocast(weight):
            rows = weight[start:stop]
            delta = WEIGHT.like_weight(functional.lora_delta(lora_A, lora_B, gain), rows)
            mine = functional.merged_weight(rows, delta)
        whole = mine
        if self.lora_rows is not None:
            whole = torch.cat([weight[:start], mine, weight[stop:]])
        return checked(self, whole)

    def leave(self) -> None:
        """Takes the child off its owner, in place; with the last one the owner's class goes."""
        owner = self.owner
        child = next(name for name, module in owner._modules.items() if module is self)
        host = host_of(owner)
        reads = tuple(read for read in _reads(owner) if read[1] != child)
        if not reads and isinstance(owner, nn.RNNBase):
            names = owner._flat_weights_names
            vars(owner)["_flat_weights"] = [owner._parameters.get(name) for name in names]
        # before the child goes: another thread's read that misses it reads again
        owner.__class__ = reading_class(host, reads) if reads else host
        del owner._modules[child]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, state, *rest = super().__reduce_ex__(protocol)
        return (_blank_weight, (), state, *rest)


Reads = tuple[tuple[str, str], ...]  # a parameter and the child that adds to it, in order


class WeightReader(nn.Module):
    """A module some of whose parameters read as their value plus an update."""

    lora_host: ClassVar[type[nn.Module]]
    lora_reads: ClassVar[Reads]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *rest = reduced
        return (_blank_reader, (self.lora_host, self.lora_reads), *rest)


_CLASSES: dict[tuple[type[nn.Module], Reads], type[nn.Module]] = {}


def reading_class(host: type[nn.Module], reads: Reads) -> type[nn.Module]:
    """The class that a module takes on whose parameters read with these children's updates."""
    if (host, reads) in _CLASSES:
        return _CLASSES[host, reads]
    names: dict[str, Any] = {
        "lora_host": host,
        "lora_reads": reads,
        "__module__": host.__module__,
        "__doc__": host.__doc__,
    }
    for parameter in dict.fromkeys(parameter for parameter, _ in reads):
        names[parameter] = _reading(parameter, [c for p, c in reads if p == parameter])
    if issubclass(host, nn.RNNBase):
        names["_flat_weights"] = property(_flat_weights, _pass_by)
        names["_update_flat_weights"] = _pass_by
        # its own also sets an entry of that list, which reads every weight, old and new ones mixed
        names["__setattr__"] = nn.Module.__setattr__
    made = type(f"LoRA{host.__name__}", (WeightReader, host), names)
    return _CLASSES.setdefault((host, reads), made)


def slots(module: nn.Module, *, is_layer: bool) -> Iterator[Slot]:
    """The parameters of a module that an adapter can go on in the weight form, by what they are.

    The parts of attention's packed projection come under the names that they have unpacked. A
    vector, such as a bias, is one where it stands beside a weight that is no layer's.

    Args:
        module: The module.
        is_layer: Whether it is of a kind that is adapted as a whole: its weight and its vectors
            are no slots of their own.
    """
    own = module._parameters
    parts: tuple[str, ...] = ()
    if isinstance(module, nn.MultiheadAttention):
        parts = PROJECTIONS
        size, packed = module.embed_dim, own.get("in_proj_weight") is not None
        for i, part in enumerate(parts):
            if packed:
                yield Slot(module, "in_proj_weight", part, (i * size, (i + 1) * size))
            else:
                yield Slot(module, part, part)
    least = 2 if is_layer or own.get("weight") is None else 1
    for name, p in own.items():
        if p is None or p.ndim < least or (name == "weight" and is_layer):
            continue
        if not name.startswith("lora_") and name not in parts:
            yield Slot(module, name, name)


def _rows(owner: nn.Module, parameter: str, rows: tuple[int, int] | None) -> Tensor:
    whole = owner._parameters[parameter]
    if whole is None:
        raise UnsupportedLayerError(
            f"An adapted parameter must be there, but {parameter!r} of a {type(owner).__name__} is"
            " None now. Put it back, or eject the adapter first."
        )
    return whole if rows is None else whole[rows[0] : rows[1]]


def _reading(parameter: str, children: list[str]) -> property:
    def read(self: nn.Module) -> Tensor:
        # by torch's own look-up, which gives tracers of torch.fx a node of their graph
        value: Any = nn.Module.__getattr__(self, parameter)
        if isinstance(value, Proxy):
            return recorded_read(self, parameter, value)  # type: ignore[return-value]
        layers = [cast(LoRAWeight, self._modules.get(child)) for child in children]
        if None in layers:  # another thread took one off
            return cast(Tensor, getattr(self, parameter))

        def compute() -> Tensor:
            read: Tensor = value
            for layer in layers:
                read = layer(read)
            merged = any(layer.lora_state.merged is not None for layer in layers)
            # what an unmerge gives the Parameter must not reach who reads it now
            return read.view_as(read) if merged else read

        return settled(layers, compute)

    return property(read)


def _flat_weights(self: nn.RNNBase) -> list[Tensor]:
    return [getattr(self, name, None) for name in self._flat_weights_names]  # type: ignore[misc]


def _pass_by(self: nn.RNNBase, *_: object) -> None:
    """The list of a recurrent layer's weights is made when it is read."""


def host_of(owner: nn.Module) -> type[nn.Module]:
    """The class that a module had before its parameters were adapted."""
    return owner.lora_host if isinstance(owner, WeightReader) else type(owner)


def _reads(owner: nn.Module) -> Reads:
    return owner.lora_reads if isinstance(owner, WeightReader) else ()


def _blank_reader(host: type[nn.Module], reads: Reads) -> nn.Module:
    cls = reading_class(host, reads)
    return cls.__new__(cls)


def _blank_weight() -> LoRAWeight:
    return LoRAWeight.__new__(LoRAWeight)
