"""A checkpoint's tensor as the module that it is the weight of, so that one code merges all."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lora_core._algebra.checkpoints import Checkpoint
from lora_core._algebra.locating import Located, bias_of
from lora_core._formats import AdapterLayer
from lora_core._formats.conforming import conformed, joined
from lora_core._layers import PROJECTIONS, Slot, attach

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
        layers: By weight, the layers whose update it gets.
        biases: By bias that changes, the weight beside it.
    """

    def __init__(
        self, name: str, layers: Mapping[str, Located], checkpoint: Checkpoint, strength: float
    ) -> None:
        self._name, self._located, self._strength = name, layers, strength
        self._checkpoint = checkpoint
        self.layers: dict[str, list[str]] = {}
        for path, found in layers.items():
            self.layers.setdefault(found.place.tensor, []).append(path)
        self.biases = {
            bias_of(found.place.tensor): found.place.tensor
            for found in layers.values()
            if found.changes_bias
        }

    def make(self, tensor: str, weight: Tensor) -> Made:
        """The module of one weight, which is not copied, with the layers' adapters on."""
        paths = self.layers[tensor]
        first = self._located[paths[0]]
        if first.layer.kind == "weight" or first.place.part is not None or paths[0] == tensor:
            made, targets = self._read(paths, weight)
        else:
            module = _module(first, weight)
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            module._parameters["bias"] = None
            if first.changes_bias:
                bias = self._checkpoint.read(bias_of(tensor)).clone()
                module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
            made, targets = Made(_under(paths[0], module), module), [module]
        for path, target in zip(paths, targets, strict=True):
            layer = self._conformed(path, target)
            parts = {part: nn.Parameter(t, requires_grad=False) for part, t in layer.parts.items()}
            attach(target, self._name, layer.settings, parts, self._strength)
        return made

    def _conformed(self, path: str, module: nn.Module | Slot) -> AdapterLayer:
        """The layer as the module carries it: what is whole becomes factors, as `load` has it."""
        found, where = self._located[path], str(self._checkpoint.path)
        layer = conformed(path, found.layer, module, where)
        if found.beside is None:
            return layer
        return joined(path, layer, conformed(path, found.beside, module, where), where)

    def _read(
        self, paths: Sequence[str], weight: Tensor
    ) -> tuple[Made, Sequence[nn.Module | Slot]]:
        """A parameter that is read, whole or by its thirds."""
        owner = nn.Module()
        owner.register_parameter(_VALUE, nn.Parameter(weight, requires_grad=False))
        size = len(weight) // len(PROJECTIONS)
        places = [self._located[path].place for path in paths]
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


def _module(found: Located, weight: Tensor) -> nn.Module:
    """A module without values for a weight."""
    first, *others = weight.shape
    options: dict[str, Any] = {"device": "meta"}
    if found.layer.kind == "embedding":
        return nn.Embedding(first, others[0], **options)
    # of what is whole the file says no kind, nor does it matter
    if found.layer.kind == "conv" or (found.layer.config is None and others[1:]):
        kernel = tuple(others[1:])
        return _CONVOLUTIONS[weight.ndim](others[0], first, kernel, **options)
    return Conv1D() if found.transposed else nn.Linear(others[0], first, **options)
