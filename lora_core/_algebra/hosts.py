"""A checkpoint's tensor as the module that it is the weight of, so that one code merges all."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_core._algebra.checkpoints import DTYPES, Checkpoint
from lora_core._errors import MismatchError, UnsupportedLayerError, listed
from lora_core._formats import Adapter, AdapterLayer
from lora_core._layers import PROJECTIONS, Slot, attach, mixin_for, part_shapes

_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_PACKED = "in_proj_weight"


class Place(NamedTuple):
    """Where in a checkpoint a layer's update goes.

    Attributes:
        tensor: The tensor.
        part: Which third of it, for attention's packed projection; else None.
    """

    tensor: str
    part: int | None = None


class Conv1D(nn.Module):
    """A linear layer that stores its matrix (in, out), known as transformers' by its looks."""

    nf: ClassVar[int] = 0
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)


def place_of(name: str, tensors: Collection[str]) -> Place | None:
    """Where the update of a module, or of a parameter that is read, goes; None if nowhere."""
    for tensor in (f"{name}.weight".lstrip("."), name):
        if tensor in tensors:
            return Place(tensor)
    owner, _, last = name.rpartition(".")
    packed = f"{owner}.{_PACKED}".lstrip(".")
    if last in PROJECTIONS and packed in tensors:
        return Place(packed, PROJECTIONS.index(last))
    return None


def places(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Place]:
    """Where each layer's update goes, and its bias.

    Raises:
        MismatchError: If a layer has no place, two have one, or a bias that is to change is
            missing.
        UnsupportedLayerError: If a layer is no product of factors, or its tensor no plain numbers.
    """
    found = {name: place_of(name, checkpoint.entries) for name in adapter.layers}
    missing = [name for name, place in found.items() if place is None]
    if missing or not found:
        weights = [n.removesuffix(".weight") for n in checkpoint.entries if n.endswith(".weight")]
        raise MismatchError(
            f"The checkpoint must have all {len(found)} layers of adapter {adapter.name!r}, but"
            f" {len(missing)} are not in {str(checkpoint.path)!r}: {listed(missing)}; it has"
            f" {len(weights)}: {listed(weights)}. Take the checkpoint that it was made for."
        )
    there = {name: place for name, place in found.items() if place is not None}
    if len(set(there.values())) < len(there):
        twice = [name for name, place in there.items() if list(there.values()).count(place) > 1]
        raise MismatchError(
            f"Each layer must have a tensor of its own, but {listed(twice)} share one of"
            f" {str(checkpoint.path)!r}. Rename one of them."
        )
    for name, layer in adapter.layers.items():
        if layer.config is None or "lora_magnitude_in" in layer.parts:
            kind = layer.kind if layer.config is None else "DoRA over inputs"
            raise UnsupportedLayerError(
                f"A layer must be factors to be merged into a file, but {name!r} is of the kind"
                f" {kind!r}. Merge it into the model, with `load` and `merge`."
            )
        tensor = there[name].tensor
        if layer.config.bias and _bias_of(tensor) not in checkpoint.entries:
            raise MismatchError(
                f"The checkpoint must have the biases that the adapter changes, but"
                f" {_bias_of(tensor)!r} is not in {str(checkpoint.path)!r}. Take the checkpoint"
                " that it was made for."
            )
        dtype = checkpoint.entries[tensor].dtype
        if dtype not in DTYPES:
            raise UnsupportedLayerError(
                f"A tensor must be of 16-bit floating numbers or wider to be merged into, but"
                f" {tensor!r} is {dtype}. Merge into the checkpoint that it was made from."
            )
    return there


def _bias_of(tensor: str) -> str:
    return f"{tensor.removesuffix('weight')}bias"


class Hosts:
    """The modules of a checkpoint's tensors, each made when it is needed.

    Args:
        adapter: What goes on them.
        checkpoint: Whose tensors they are.
        transposed: How square matrices of linear layers are stored: ``(in, out)`` if True,
            ``(out, in)`` if False; None takes them as all the others are.
        strength: How strongly the adapter is on.

    Raises:
        MismatchError: If a layer's sizes are not those of its tensor.
    """

    def __init__(
        self, adapter: Adapter, checkpoint: Checkpoint, transposed: bool | None, strength: float
    ) -> None:
        self._adapter, self._checkpoint, self._strength = adapter, checkpoint, strength
        self._places = places(adapter, checkpoint)
        self._layers: dict[str, list[str]] = {}  # tensor -> the layers whose update it gets
        for name, place in self._places.items():
            self._layers.setdefault(place.tensor, []).append(name)
        self._transposed = self._orientations(transposed)
        entries = checkpoint.entries
        wrong = [
            said
            for tensor, names in self._layers.items()
            for name, target in self._targets(
                tensor, torch.empty(entries[tensor].shape, device="meta"), nn.Module()
            ).items()
            if (said := _misfit(name, adapter.layers[name], target, entries[tensor].shape))
        ]
        if wrong:
            raise MismatchError(
                f"Layers must have the sizes that adapter {adapter.name!r} was made for, but"
                f" {len(wrong)} of {len(self._places)} differ: {listed(wrong)}. Take the checkpoint"
                " that it was made for."
            )
        self.biases = {
            _bias_of(tensor): tensor
            for tensor, names in self._layers.items()
            if any(adapter.layers[name].settings.bias for name in names)
        }

    @property
    def changed(self) -> set[str]:
        """The tensors that get other values."""
        return {*self._layers, *self.biases}

    def layers_of(self, tensor: str) -> Sequence[str]:
        """The layers whose update a weight gets."""
        return self._layers[tensor]

    def make(self, tensor: str, weight: Tensor) -> tuple[nn.Module, nn.Module]:
        """A model of nothing but the module of one weight, adapted; and that module."""
        model = nn.Module()
        targets = self._targets(tensor, weight, model)
        for name, target in targets.items():
            layer = self._adapter.layers[name]
            shapes = part_shapes(target, layer.settings)
            parts = {
                part: nn.Parameter(
                    value.reshape(shapes[part]) if layer.kind == "matrix" else value,
                    requires_grad=False,
                )
                for part, value in layer.parts.items()
            }
            attach(target, self._adapter.name, layer.settings, parts, self._strength)
        (module,) = (m for m in model._modules.values() if m is not None)
        return model, module

    def _targets(
        self, tensor: str, weight: Tensor, model: nn.Module
    ) -> dict[str, nn.Module | Slot]:
        """What each layer of a weight goes on, put into `model` under the checkpoint's names."""
        names = self._layers[tensor]
        layers = [self._adapter.layers[name] for name in names]
        bias = any(layer.settings.bias for layer in layers)
        if layers[0].kind == "weight" or not tensor.endswith(f"{names[0]}.weight".lstrip(".")):
            owner = nn.Module()
            path = names[0].rpartition(".")[0]
            owner.register_parameter("value", nn.Parameter(weight, requires_grad=False))
            model._modules[path] = owner
            size = weight.shape[0] // len(PROJECTIONS)
            found: dict[str, nn.Module | Slot] = {}
            for name in names:
                part = self._places[name].part
                rows = None if part is None else (part * size, (part + 1) * size)
                found[name] = Slot(owner, "value", name.rpartition(".")[2], rows)
            return found
        module = _module(layers[0].kind, weight, self._transposed.get(names[0], False))
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        module._parameters["bias"] = None
        if bias and not weight.is_meta:
            values = self._checkpoint.read(_bias_of(tensor)).clone()
            module._parameters["bias"] = nn.Parameter(values, requires_grad=False)
        model._modules[names[0]] = module
        return {names[0]: module}

    def _orientations(self, transposed: bool | None) -> dict[str, bool]:
        """By linear layer, whether its matrix is stored (in, out)."""
        told, square = {}, []
        for name, layer in self._adapter.layers.items():
            shape = self._checkpoint.entries[self._places[name].tensor].shape
            lora_A, lora_B = layer.parts["lora_A"], layer.parts["lora_B"]
            if layer.kind not in ("linear", "matrix") or len(shape) != 2:
                continue
            if shape[0] == shape[1]:
                square.append(name)
            else:
                told[name] = (lora_A.shape[-1], len(lora_B)) == shape
        if transposed is None and square and len(set(told.values())) > 1:
            raise MismatchError(
                "Square matrices must be stored as all others are, but some of"
                f" {str(self._checkpoint.path)!r} are stored (in, out), as"
                f" {listed([n for n, t in told.items() if t], 1)}, and some (out, in), as"
                f" {listed([n for n, t in told.items() if not t], 1)}. Pass transposed=True or"
                f" transposed=False for {listed(square)}."
            )
        default = any(told.values()) if transposed is None else transposed
        return {**told, **dict.fromkeys(square, default)}


def _module(kind: str, weight: Tensor, transposed: bool) -> nn.Module:
    """A module without values whose weight has this shape."""
    first, *others = weight.shape or (0,)
    options: dict[str, Any] = {"device": "meta"}
    if kind == "embedding" and len(others) == 1:
        return nn.Embedding(first, others[0], **options)
    if len(others) == 1:
        return Conv1D() if transposed else nn.Linear(others[0], first, **options)
    if len(others) + 1 in _CONVOLUTIONS:
        return _CONVOLUTIONS[len(others) + 1](others[0], first, tuple(others[1:]), **options)
    return nn.Identity()


def _misfit(
    name: str, layer: AdapterLayer, target: nn.Module | Slot, shape: tuple[int, ...]
) -> str:
    """How a layer differs from the one that its update was made for; "" if it doesn't."""
    theirs = {part: tuple(p.shape) for part, p in layer.parts.items()}
    mixin = mixin_for(target)
    kinds = {layer.kind, mixin.lora_kind if mixin is not None else ""}
    try:
        mine = part_shapes(target, layer.settings) if mixin is not None else {}
    except (ValueError, AttributeError):  # too few dimensions for this form
        mine = {}
    if layer.kind == "matrix" and mine:  # a convolution by 1x1 is one too
        theirs = {part: s + (1,) * (len(mine.get(part, s)) - len(s)) for part, s in theirs.items()}
        kinds = {"matrix"}
    if mine == theirs and (len(kinds) == 1 or kinds <= {"linear", "weight"}):
        return ""
    part = next((p for p in theirs if theirs[p] != mine.get(p)), "lora_A")
    return f"{name} (adapter {part} {theirs[part]}, checkpoint {tuple(shape)})"
