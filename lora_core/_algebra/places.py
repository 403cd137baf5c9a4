"""Where in a checkpoint each layer of an adapter belongs."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn

from lora_core._algebra.checkpoints import DTYPES, Checkpoint, Entry
from lora_core._algebra.factors import is_read, may_be_turned
from lora_core._errors import MismatchError, UnsupportedLayerError, listed
from lora_core._formats import Adapter
from lora_core._formats.conforming import apart
from lora_core._formats.fitting import fitted
from lora_core._formats.naming import Host, resolve
from lora_core._formats.neutral import AdapterLayer
from lora_core._layers import PROJECTIONS, WEIGHT

_PACKED = "in_proj_weight"
MOST_DIMENSIONS = 5  # of a convolution's kernel


class Place(NamedTuple):
    """The tensor that a layer's update is added to.

    Attributes:
        tensor: Its name.
        part: Which third of it, for attention's packed projection; else None.
    """

    tensor: str
    part: int | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of its rows."""
        return whole if self.part is None else (whole[0] // len(PROJECTIONS), *whole[1:])


class Located(NamedTuple):
    """A layer where it belongs.

    Attributes:
        layer: It, in the layouts of the layers here.
        place: Where its update goes.
        transposed: Whether the matrix there is stored ``(in, out)``.
        beside: What the adapter has apart from its factors: a bias, or the base's own values.
    """

    layer: AdapterLayer
    place: Place
    transposed: bool
    beside: AdapterLayer | None = None

    @property
    def changes_weight(self) -> bool:
        """Whether the tensor itself changes."""
        return self.layer.config is not None or "weight" in self.layer.parts

    @property
    def changes_bias(self) -> bool:
        """Whether the bias beside it does."""
        sides = [self.layer, *([] if self.beside is None else [self.beside])]
        return any({"lora_bias", "bias"} & side.parts.keys() for side in sides)

    def rank(self, shape: tuple[int, ...]) -> int:
        """The rank of the update of a tensor of this shape, 0 for a bias alone."""
        if self.layer.config is not None:
            return self.layer.config.rank
        return min(shape[0], math.prod(shape[1:])) if "weight" in self.layer.parts else 0


def place_of(path: str, tensors: Collection[str]) -> Place | None:
    """Where the update of a module, or of a parameter that is read, goes; None if nowhere."""
    for tensor in (f"{path}.weight".lstrip("."), path):
        if tensor in tensors:
            return Place(tensor)
    owner, _, last = path.rpartition(".")
    packed = f"{owner}.{_PACKED}".lstrip(".")
    if last in PROJECTIONS and packed in tensors:
        return Place(packed, PROJECTIONS.index(last))
    return None


def bias_of(tensor: str) -> str:
    """The name of the bias beside a weight."""
    return f"{tensor.removesuffix('weight')}bias"


def hosts_of(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Host]:
    """What a checkpoint's tensors are the weights of: modules, or parameters that are read."""
    for name, shape in shapes.items():
        owner, _, last = name.rpartition(".")
        if last == "weight":
            yield Host(owner, "", shape)
        elif len(shape) > 1:
            yield Host(name, "weight", shape)
        if last == _PACKED:
            for part, label in enumerate(PROJECTIONS):
                path = f"{owner}.{label}".lstrip(".")
                yield Host(path, "weight", Place(name, part).shape(shape))


def located(
    adapter: Adapter, checkpoint: Checkpoint, transposed: bool | None
) -> dict[str, Located]:
    """Each layer where it belongs, by the checkpoint's own name of its module.

    Args:
        adapter: The adapter.
        checkpoint: The checkpoint.
        transposed: How square matrices of linear layers are stored; None goes by the others.

    Raises:
        MismatchError: If a layer has no place, two have one, or one doesn't fit its tensor; or a
            bias that is to change is missing.
        UnsupportedLayerError: If a tensor is no plain numbers.
    """
    paths = paths_of(adapter, checkpoint)
    layers, beside = _sides(adapter, paths, checkpoint)
    places = {path: place for path in layers if (place := place_of(path, checkpoint.entries))}
    held: dict[str, list[str]] = {}
    for path, place in places.items():
        held.setdefault(place.tensor, []).append(path)
    for tensor, sharing in held.items():
        parts = [places[path].part for path in sharing]
        if len(set(parts)) < len(parts) or (None in parts and len(parts) > 1):
            _refuse_shared(sharing, tensor, checkpoint)
    for path, layer in (*layers.items(), *beside.items()):
        _check_tensors(places[path].tensor, layer, checkpoint)
    for path in [n for n, x in layers.items() if x.config is None]:
        tensor = places[path].tensor
        if len(checkpoint.entries[tensor].shape) < 2 and tensor != path:  # as of normalisation
            split = apart(path, replace(layers.pop(path), path="", spelling="dotted"))
            layers |= split
            places |= {name: Place(name) for name in split}
    turned = _orientations(layers, places, checkpoint, transposed)

    def fits(path: str, layer: AdapterLayer) -> AdapterLayer:
        return _fitted(path, layer, places[path], checkpoint.entries, turned.get(path, False))

    return {
        path: Located(
            fits(path, layer),
            places[path],
            turned.get(path, False),
            fits(path, beside[path]) if path in beside else None,
        )
        for path, layer in layers.items()
    }


def _sides(
    adapter: Adapter, paths: Mapping[str, str], checkpoint: Checkpoint
) -> tuple[dict[str, AdapterLayer], dict[str, AdapterLayer]]:
    """The layers by path, and what an adapter has apart from the factors of one."""
    layers: dict[str, AdapterLayer] = {}
    beside: dict[str, AdapterLayer] = {}
    # those with factors first
    for name in sorted(paths, key=lambda name: adapter.layers[name].config is None):
        layer, path = adapter.layers[name], paths[name]
        if path not in layers:
            layers[path] = layer
        elif layer.config is None and layers[path].config is not None and path not in beside:
            beside[path] = layer
        else:
            both = [n for n in paths if paths[n] == path]
            place = place_of(path, checkpoint.entries)
            _refuse_shared(both, path if place is None else place.tensor, checkpoint)
    return layers, beside


def _refuse_shared(names: Sequence[str], tensor: str, checkpoint: Checkpoint) -> NoReturn:
    raise MismatchError(
        f"Each layer must have a tensor of its own, but {listed(names)} share {tensor!r} of"
        f" {str(checkpoint.path)!r}. Merge them one after the other, or rename one."
    )


def paths_of(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, str]:
    """By layer the path of its module."""
    entries = checkpoint.entries
    layers = adapter.layers
    counted = [name for name, layer in layers.items() if layer.spelling == "index"]
    if counted:
        raise MismatchError(
            f"Modules must have names to be found in a checkpoint, but {listed(counted)} of adapter"
            f" {adapter.name!r} have numbers. Load it into the model, and save it from there."
        )
    # beside factors a difference has a name of its own
    own = {n: n if x.config or x.component else x.path or n for n, x in layers.items()}
    paths = {n: own[n] for n, x in layers.items() if x.spelling == "dotted"}
    paths = {n: path for n, path in paths.items() if place_of(path, entries)}
    rest = {name: layer for name, layer in layers.items() if name not in paths}
    found = resolve(rest, {"": list(hosts_of(checkpoint.shapes))}, adapter.name) if rest else None
    if found is not None:
        paths |= {name: path for name, (_, path) in found.found.items()}
    missing = [name for name in layers if name not in paths]
    if missing or not layers:
        has = [name.removesuffix(".weight") for name in entries if name.endswith(".weight")]
        parts = {layers[name].component for name in missing}
        alone = {layers[name].component for name in paths} - parts
        hint = (
            f"Pass only={min(alone)!r} for that part alone."
            if alone
            else "Take the checkpoint that it was made for."
        )
        raise MismatchError(
            f"The checkpoint must have all {len(layers)} layers of adapter {adapter.name!r}, but"
            f" {len(missing)} are not in {str(checkpoint.path)!r}: {listed(missing)}; it has"
            f" {len(has)}: {listed(has)}. {hint}"
        )
    return {name: paths[name] for name in layers}


def _check_tensors(tensor: str, layer: AdapterLayer, checkpoint: Checkpoint) -> None:
    """Refuses what can't be added to a tensor, or to the bias beside it."""
    entries, bias = checkpoint.entries, layer.parts.get("lora_bias", layer.parts.get("bias"))
    wanted = [tensor] if layer.config is not None or "weight" in layer.parts else []
    if bias is not None:
        own = bias_of(tensor)
        if own not in entries:
            raise MismatchError(
                f"The checkpoint must have the biases that the adapter changes, but {own!r} is not"
                f" in {str(checkpoint.path)!r}. Take the checkpoint that it was made for."
            )
        if entries[own].shape != tuple(bias.shape):
            raise MismatchError(
                f"A bias must have the shape of the adapter's, {tuple(bias.shape)}, but {own!r} of"
                f" {str(checkpoint.path)!r} has {entries[own].shape}. Take the checkpoint that it"
                " was made for."
            )
        wanted.append(own)
    for name in wanted:
        if entries[name].dtype not in DTYPES:
            raise UnsupportedLayerError(
                "A tensor must be of 16-bit floating numbers or wider to be merged into, but"
                f" {name!r} is {entries[name].dtype}. Merge into the checkpoint that it was made"
                " from."
            )
        if not 1 <= len(entries[name].shape) <= MOST_DIMENSIONS:
            raise UnsupportedLayerError(
                f"A tensor must have 1 to {MOST_DIMENSIONS} dimensions to be merged into, but"
                f" {name!r} has {len(entries[name].shape)}. Merge it in the model."
            )


def _orientations(
    layers: Mapping[str, AdapterLayer],
    places: Mapping[str, Place],
    checkpoint: Checkpoint,
    transposed: bool | None,
) -> dict[str, bool]:
    """By linear layer, whether its matrix is stored (in, out)."""
    told, square = {}, []
    for path, layer in layers.items():
        shape = checkpoint.entries[places[path].tensor].shape
        if not may_be_turned(layer) or len(shape) != 2:
            continue
        if shape[0] == shape[1]:
            square.append(path)
        else:  # shapes are sure, and a flag may be that of another layer
            told[path] = (layer.parts["lora_A"].shape[1], len(layer.parts["lora_B"])) == shape
    turned = [path for path, is_turned in told.items() if is_turned]
    plain = [path for path in told if path not in turned]
    said = [path for path, layer in layers.items() if layer.transposed]
    if transposed is None and square and plain and (turned or said):
        whose = listed(turned, 1) if turned else "the adapter says"
        raise MismatchError(
            f"Square matrices must be stored as all others are, but some of"
            f" {str(checkpoint.path)!r} are stored (in, out), as {whose}, and some (out, in), as"
            f" {listed(plain, 1)}. Pass transposed=True or transposed=False for {listed(square)}."
        )
    default = bool(turned or said) if transposed is None else transposed
    return {**told, **dict.fromkeys(square, default)}


def _fitted(
    path: str,
    layer: AdapterLayer,
    place: Place,
    entries: Mapping[str, Entry],
    transposed: bool,
) -> AdapterLayer:
    shape = place.shape(entries[place.tensor].shape)
    own = place.part is not None or place.tensor == path  # a parameter, by its own name
    kind = WEIGHT.name if own or is_read(layer) else ""
    return fitted(path, layer, shape[::-1] if transposed else shape, kind)
