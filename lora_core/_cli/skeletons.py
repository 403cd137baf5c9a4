"""A model's modules rebuilt without values from a checkpoint's names and shapes.

What a module is shows by its name and its tensors:

- ``.weight`` of two dimensions: a linear layer; an embedding where the name says so; GPT-2's
  Conv1D where a bias has the length of its second dimension, or of both while other layers' have.
- ``.weight`` of three to five dimensions: a convolution.
- ``in_proj_weight`` beside ``out_proj``: ``nn.MultiheadAttention``.
- anything else: a plain parameter.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lora_core._algebra.hosts import Conv1D
from lora_core._cli.bases import Shapes

_EMBEDDING = re.compile(r"(?:\w*_)?(?:embed(?:ding|dings|s)?|emb|wte|wpe|shared)(?:_\w*)?")
_CONVOLUTIONS: Mapping[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    3: nn.Conv1d,
    4: nn.Conv2d,
    5: nn.Conv3d,
}


def skeleton(bases: Mapping[str, Shapes]) -> nn.Module:
    """A model on the meta device with the modules of these checkpoints, which can't be called.

    Args:
        bases: Tensors by the part of a pipeline, "" for a model that is alone.
    """
    with torch.device("meta"):
        parts = {part: _model(shapes) for part, shapes in bases.items()}
    if set(parts) == {""}:
        return parts[""]
    whole = nn.Module()
    whole._modules.update(parts)
    return whole


def _model(shapes: Shapes) -> nn.Module:
    """The modules of one checkpoint, in the order of its names."""
    owned: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        owner, _, last = name.rpartition(".")
        owned.setdefault(owner, {})[last] = shape
    turned = any(_is_turned(held) for held in owned.values())
    modules = {path: _module(path, held, owned, turned) for path, held in owned.items()}
    root = modules.pop("", nn.Module())
    for path in modules:
        _attach(root, path, modules)
    return root


def _attach(root: nn.Module, path: str, modules: Mapping[str, nn.Module]) -> None:
    """Puts a module and those above it in their places, unless they are there."""
    at, words = root, path.split(".")
    for depth, word in enumerate(words, 1):
        child = at._modules.get(word)
        if child is None:
            # torch's own way to add a child minds names that are those of attributes
            child = modules.get(".".join(words[:depth])) or nn.Module()
            at._modules[word] = child
        at = child


def _module(
    path: str,
    held: Mapping[str, tuple[int, ...]],
    owned: Mapping[str, Mapping[str, tuple[int, ...]]],
    turned: bool,
) -> nn.Module:
    weight, bias = held.get("weight", ()), "bias" in held
    size = len(weight)
    if "in_proj_weight" in held and f"{path}.out_proj".lstrip(".") in owned:
        width = held["in_proj_weight"][-1]
        if held["in_proj_weight"] == (3 * width, width):
            return nn.MultiheadAttention(width, 1, bias="in_proj_bias" in held)
    if size == 2 and set(held) <= {"weight", "bias"}:
        if _is_turned(held) or (turned and held.get("bias") == weight[1:]):
            return _conv1d(weight)
        if not bias and _EMBEDDING.fullmatch(path.rpartition(".")[2]):
            return nn.Embedding(weight[0], weight[1])
        return nn.Linear(weight[1], weight[0], bias=bias)
    if size in _CONVOLUTIONS and set(held) <= {"weight", "bias"} and 0 not in weight:
        out, ins, *kernel = weight
        return _CONVOLUTIONS[size](ins, out, tuple(kernel), bias=bias)  # type: ignore[arg-type]
    module = nn.Module()
    for name, shape in held.items():
        module._parameters[name] = nn.Parameter(torch.empty(shape))
    return module


def _is_turned(held: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a bias says that a matrix is stored (in, out)."""
    weight, bias = held.get("weight", ()), held.get("bias", ())
    return len(weight) == 2 and bias == weight[1:] and weight[0] != weight[1]


def _conv1d(weight: tuple[int, ...]) -> nn.Module:
    module = Conv1D()
    module.weight = nn.Parameter(torch.empty(weight))
    module.bias = nn.Parameter(torch.empty(weight[1:]))
    return module


def kinds_of(model: nn.Module) -> Iterator[str]:
    """The class of each module that has tensors of its own, in words where it is none's."""
    for module in model.modules():
        if module._parameters:
            yield type(module).__name__ if type(module) is not nn.Module else "of unknown kind"
