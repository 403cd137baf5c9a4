"""A checkpoint's tensor as the module that it is the weight of, so that one code merges all."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_core._algebra.checkpoints import DTYPES, Checkpoint
from lora_core._algebra.locating import Located, bias_of
from lora_core._config import AdapterConfig
from lora_core._formats import AdapterLayer
from lora_core._formats.conforming import changed, conformed, joined
from lora_core._layers import PROJECTIONS, Slot, attach, kind_named

_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_VALUE = "value"


class Conv1D(nn.Module):
    """A linear layer that stores its matrix (in, out), known as transformers' by its looks."""

    nf: ClassVar[int] = 0
    weight: Tensor


class Made(NamedTuple):
    """One module, ready to be merged.

    Attributes:
        model: A model of nothing else.
        module: It.
    """

    model: nn.Module
    module: nn.Module


class Hosts:
    """The modules of a checkpoint's tensors, each made when it is needed.

    Args:
        name: The adapter's name.
        layers: Its layers where they belong, by the path of their modules.
        checkpoint: Whose tensors they are.
        strength: How strongly the adapter is on.

    Attributes:
        located: The layers.
        layers: By weight that changes, the layers whose update it gets.
        biases: By bias that changes, the layer that it is of.
    """

    def __init__(
        self, name: str, layers: Mapping[str, Located], checkpoint: Checkpoint, strength: float
    ) -> None:
        self._name, self.located, self._strength = name, layers, strength
        self._entries = checkpoint.entries
        self.layers: dict[str, list[str]] = {}
        for path, found in layers.items():
            if found.changes_weight:
                self.layers.setdefault(found.place.tensor, []).append(path)
        self.biases = {
            bias_of(found.place.tensor): path
            for path, found in layers.items()
            if found.changes_bias
        }

    def make(self, tensor: str, values: Tensor) -> Made:
        """The module of one weight or bias, which is not copied, with the adapter on."""
        if tensor in self.biases:
            made, targets = self._beside(self.biases[tensor], values)
        else:
            paths = self.layers[tensor]
            first = self.located[paths[0]]
            is_read = first.place.part is not None or paths[0] == tensor
            if first.layer.kind == "weight" or is_read:
                made, slots = self._read(paths, values)
                targets = {
                    slot: self._conformed(path, slot)
                    for path, slot in zip(paths, slots, strict=True)
                }
            else:
                module = _module(first, values)
                module._parameters["weight"] = nn.Parameter(values, requires_grad=False)
                module._parameters["bias"] = None
                made = Made(_under(paths[0], module), module)
                targets = {module: self._conformed(paths[0], module)}
        for target, layer in targets.items():
            parts = {part: nn.Parameter(t, requires_grad=False) for part, t in layer.parts.items()}
            attach(target, self._name, layer.settings, parts, self._strength)
        return made

    def _conformed(self, path: str, module: nn.Module | Slot) -> AdapterLayer:
        """What a weight gets: what is whole becomes factors, as `load` has it."""
        found = self.located[path]
        layer = _without_bias(found.layer)
        if found.beside is not None and "weight" in found.beside.parts:
            beside = changed(_without_bias(found.beside), module)
            if beside is not None:
                return joined(path, layer, conformed(path, beside, module, self._name), self._name)
        return conformed(path, layer, module, self._name)

    def _beside(self, path: str, bias: Tensor) -> tuple[Made, dict[nn.Module | Slot, AdapterLayer]]:
        """A bias beside a weight of no numbers, which need not be read for it."""
        found = self.located[path]
        weight = torch.zeros(
            len(bias), 1, dtype=DTYPES.get(self._entries[found.place.tensor].dtype)
        )
        module = nn.Linear(1, len(bias), device="meta")
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        side = found.layer if found.beside is None else found.beside
        if side.config is None:
            alone = replace(side, parts={"bias": side.parts["bias"]})
            layer = conformed(path, alone, module, self._name)
        else:
            ours = side.parts["lora_bias"]
            config = AdapterConfig(rank=1, alpha=0.0, dropout=0.0, dtype=ours.dtype, bias=True)
            none = {"lora_A": ours.new_zeros(1, 1), "lora_B": ours.new_zeros(len(ours), 1)}
            layer = replace(side, kind="linear", config=config, parts={**none, "lora_bias": ours})
        return Made(_under(path, module), module), {module: layer}

    def _read(
        self, paths: Sequence[str], weight: Tensor
    ) -> tuple[Made, Sequence[nn.Module | Slot]]:
        """A parameter that is read, whole or by its thirds."""
        owner = nn.Module()
        owner.register_parameter(_VALUE, nn.Parameter(weight, requires_grad=False))
        size = len(weight) // len(PROJECTIONS)
        places = [self.located[path].place for path in paths]
        rows = [None if p.part is None else (p.part * size, (p.part + 1) * size) for p in places]
        slots = [
            Slot(owner, _VALUE, path.rpartition(".")[2], some)
            for path, some in zip(paths, rows, strict=True)
        ]
        return Made(_under(paths[0].rpartition(".")[0], owner), owner), slots


def _under(path: str, module: nn.Module) -> nn.Module:
    """A model that has a module under a dotted path, for errors and receipts to name it by."""
    model = nn.Module()
    model._modules[path] = module
    return model


def _without_bias(layer: AdapterLayer) -> AdapterLayer:
    parts = {n: t for n, t in layer.parts.items() if n not in ("bias", "lora_bias")}
    config = None if layer.config is None else replace(layer.config, bias=False)
    return replace(layer, config=config, parts=parts)


def _module(found: Located, weight: Tensor) -> nn.Module:
    """A module without values for a weight."""
    first, *others = weight.shape
    options: dict[str, Any] = {"device": "meta"}
    kind = kind_named(found.layer.kind if found.layer.config is not None else "matrix")
    if kind.own_layout:
        return kind.blank(tuple(weight.shape))
    if found.layer.kind == "embedding":
        return nn.Embedding(first, others[0], **options)
    # of what is whole the file says no kind: its numbers are added one by one
    if found.layer.kind == "conv" or (found.layer.config is None and others[1:]):
        kernel = tuple(others[1:])
        return _CONVOLUTIONS[weight.ndim](others[0], first, kernel, **options)
    return Conv1D() if found.transposed else nn.Linear(others[0], first, **options)
