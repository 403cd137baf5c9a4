"""The base model of an adapter as its checkpoint's header tells of it: names and shapes alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_core._algebra.checkpoints import open_checkpoint
from lora_core._errors import ConfigError, MismatchError, listed
from lora_core._formats import Adapter, AdapterLayer
from lora_core._formats.fitting import fitted
from lora_core._formats.naming import Host, Resolution, resolve
from lora_core._formats.spelling import places_of
from lora_core._layers import PROJECTIONS

Shapes = Mapping[str, tuple[int, ...]]
PARTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "prior")
# what one file of a whole Stable Diffusion puts before the names of its parts
_PREFIXES = {
    "model.diffusion_model.": "unet",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
_PACKED = "in_proj_weight"


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
        here = {part: _shapes(path)} if is_part else dict(_parts(path))
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
            yield part, _shapes(path / part)
        return
    shapes = _shapes(path)
    split: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        for prefix, part in _PREFIXES.items():
            if name.startswith(prefix):
                split.setdefault(part, {})[name.removeprefix(prefix)] = shape
    if split:
        yield from split.items()
    else:
        yield "", shapes


def _shapes(path: Path) -> Shapes:
    return {name: entry.shape for name, entry in open_checkpoint(path).entries.items()}


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
    hosts = {part: list(_hosts(shapes)) for part, shapes in bases.items()}
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


def _hosts(shapes: Shapes) -> Iterator[Host]:
    """What the tensors are the weights of."""
    for name, shape in shapes.items():
        owner, _, last = name.rpartition(".")
        if last == "weight":
            yield Host(owner, "", shape)
        elif len(shape) > 1:
            yield Host(name, "weight", shape)
        if last == _PACKED:
            for label in PROJECTIONS:
                third = (shape[0] // len(PROJECTIONS), *shape[1:])
                yield Host(f"{owner}.{label}".lstrip("."), "weight", third)


def _fitted(path: str, layer: AdapterLayer, shape: tuple[int, ...], where: str) -> AdapterLayer:
    kind = "weight" if path.rpartition(".")[2] in PROJECTIONS else ""
    turned = layer.transposed or _is_turned(layer, shape)
    layer = fitted(path, layer, shape[::-1] if turned else shape, kind, where)
    return replace(layer, transposed=turned)


def _is_turned(layer: AdapterLayer, shape: tuple[int, ...]) -> bool:
    """Whether a matrix that is not square fits as one that is stored (in, out)."""
    if layer.config is None or layer.kind not in ("linear", "matrix") or len(shape) != 2:
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
