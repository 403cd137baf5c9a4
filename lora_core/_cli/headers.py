"""A base model as its checkpoint's header tells of it: names and shapes, and modules made of them.

What a module is shows by its name and its tensors:

- ``.weight`` of two dimensions: a linear layer; an embedding where the name says so; GPT-2's
  Conv1D where a bias has the length of its second dimension, or of both while other layers' have.
- ``.weight`` of three to five dimensions: a convolution.
- ``in_proj_weight`` beside ``out_proj``: ``nn.MultiheadAttention``.
- anything else: a plain parameter.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lora_core._algebra import Conv1D, hosts_of, open_checkpoint
from lora_core._algebra.factors import may_be_turned
from lora_core._errors import ConfigError, MismatchError, listed
from lora_core._formats import Adapter, AdapterLayer
from lora_core._formats.fitting import fitted
from lora_core._formats.naming import Resolution, resolve
from lora_core._formats.spelling import places_of
from lora_core._layers import PROJECTIONS, WEIGHT

Shapes = Mapping[str, tuple[int, ...]]
PARTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "prior")
# what one file of a whole Stable Diffusion puts before the names of its parts
_PREFIXES = {
    "model.diffusion_model.": "unet",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
_EMBEDDING = re.compile(r"(?:\w*_)?(?:embed(?:ding|dings|s)?|emb|wte|wpe|shared)(?:_\w*)?")
_CONVOLUTIONS: Mapping[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    3: nn.Conv1d,
    4: nn.Conv2d,
    5: nn.Conv3d,
}


def open_bases(words: Sequence[str]) -> dict[str, Shapes]:
    """The tensors of base models by their part of a pipeline, "" for one that is given alone.

    Args:
        words: Paths, or ``PART=PATH``. A path may be a file, the index of shards, a folder with
            either, a folder with a folder for each part, or one file with all parts.

    Raises:
        ConfigError: If a part is given twice, or a folder holds no checkpoint.
        CorruptFileError: If a file is damaged or of another kind.
        OSError: If a file can't be read.
    """
    found: dict[str, Shapes] = {}
    for word in words:
        part, equals, rest = word.partition("=")
        is_part = bool(equals) and part in PARTS
        path = Path(rest if is_part else word)
        here = {part: open_checkpoint(path).shapes} if is_part else dict(_parts(path))
        twice = found.keys() & here.keys()
        if twice:
            raise ConfigError(
                f"Each part must have one base, but {listed(sorted(twice))} has several. Write"
                f" PART=PATH, with a part of {listed(PARTS, len(PARTS))}."
            )
        found |= here
    return found


def _parts(path: Path) -> Iterator[tuple[str, Shapes]]:
    folders = [part for part in PARTS if (path / part).is_dir()]
    if folders:
        for part in folders:
            yield part, open_checkpoint(path / part).shapes
        return
    shapes = open_checkpoint(path).shapes
    split: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        for prefix, part in _PREFIXES.items():
            if name.startswith(prefix):
                split.setdefault(part, {})[name.removeprefix(prefix)] = shape
    if split:
        yield from split.items()
    else:
        yield "", shapes


def named(adapter: Adapter, bases: Mapping[str, Shapes], where: str) -> Adapter:
    """The adapter with each layer under the dotted name of its module, and as that carries it.

    Args:
        adapter: An adapter as its file spells it.
        bases: Its base models, as `open_bases` gives them.
        where: The file, for messages.

    Raises:
        MismatchError: If a layer has no module there, or doesn't fit it.
    """
    placed = {
        name: replace(adapter.layers[name], **place._asdict())
        for name, place in places_of(adapter.layers).items()
    }
    adapter = replace(adapter, layers=placed)
    counted = [name for name, layer in adapter.layers.items() if layer.spelling == "index"]
    if counted:
        raise MismatchError(
            f"Modules must have names to be found in a checkpoint, but {listed(counted)} of"
            f" {where!r} have numbers. Load it into the model, and save it from there."
        )
    hosts = {part: list(hosts_of(shapes)) for part, shapes in bases.items()}
    found = resolve(adapter.layers, hosts, where)
    _check(adapter, found, where)
    weights = {part: {host.path: host.shape for host in held} for part, held in hosts.items()}
    layers: dict[str, AdapterLayer] = {}
    for name, layer in adapter.layers.items():
        if name not in found.found:  # of a part without a base, and named with dots already
            layers[name] = layer
            continue
        part, path = found.found[name]
        component = part or layer.component
        ours = f"{component}.{path}" if component else path
        if ours in layers:  # factors, and a difference beside them
            ours = f"{ours}.{next(iter(layer.parts))}"
        layers[ours] = replace(
            _fitted(path, layer, weights[part][path], where),
            component=component,
            path=path if component else "",
            spelling="dotted",
        )
    return replace(adapter, layers=layers)


def _fitted(path: str, layer: AdapterLayer, shape: tuple[int, ...], where: str) -> AdapterLayer:
    kind = WEIGHT.name if path.rpartition(".")[2] in PROJECTIONS else ""
    turned = layer.transposed or _is_turned(layer, shape)
    layer = fitted(path, layer, shape[::-1] if turned else shape, kind, where)
    return replace(layer, transposed=turned)


def _is_turned(layer: AdapterLayer, shape: tuple[int, ...]) -> bool:
    """Whether a matrix that is not square fits as one that is stored (in, out)."""
    if not may_be_turned(layer) or len(shape) != 2:
        return False
    sizes = layer.parts["lora_A"].shape[1], layer.parts["lora_B"].shape[0]
    return shape[0] != shape[1] and sizes == shape


def _check(adapter: Adapter, found: Resolution, where: str) -> None:
    if found.missing:
        near = next((near for near in found.missing.values() if near), "")
        raise MismatchError(
            f"`base` must have every module of {where!r}, but lacks {len(found.missing)} of its"
            f" {len(adapter.layers)}: {listed(found.missing)}."
            + (f" The nearest that it has is {near!r}." if near else "")
            + " Take the checkpoint that it was made for."
        )
    for part, names in found.elsewhere.items():
        if any(adapter.layers[name].spelling != "dotted" for name in names):
            every = dict.fromkeys(layer.component for layer in adapter.layers.values())
            raise MismatchError(
                f"`base` must have every part of {where!r}, but has nothing of {part!r}, which"
                f" {len(names)} of its {len(adapter.layers)} layers are for. Give each its own:"
                f" {' '.join(f'--base {part}=CHECKPOINT' for part in every if part)}."
            )


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
    turned = any(_is_stored_in_out(held) for held in owned.values())
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
        if _is_stored_in_out(held) or (turned and held.get("bias") == weight[1:]):
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


def _is_stored_in_out(held: Mapping[str, tuple[int, ...]]) -> bool:
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
