"""An adapter merged into a checkpoint on the disk, one tensor at a time.

Each tensor becomes the module that it is the weight of, so that one code merges all.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_core._algebra.checkpoints import (
    DTYPES,
    Checkpoint,
    Entry,
    as_tensor,
    open_checkpoint,
    respliced,
    sampled,
)
from lora_core._algebra.factors import check_adapter, is_read
from lora_core._algebra.places import Located, bias_of, located, paths_of, place_of
from lora_core._config import AdapterConfig, check_finite
from lora_core._errors import ConfigError, CorruptFileError, MismatchError, listed
from lora_core._formats import Adapter, AdapterLayer
from lora_core._formats.bases import differing_rows
from lora_core._formats.conforming import changed, conformed, joined
from lora_core._formats.neutral import part_of
from lora_core._formats.replacing import new_file, new_folder
from lora_core._layers import PROJECTIONS, Slot, attach, kind_named, kind_of_shape
from lora_core._merging import merge
from lora_core._reports import FileMergeReport, Teller, Told

_VALUE = "value"


class Conv1D(nn.Module):
    """A linear layer that stores its matrix (in, out), known as transformers' by its looks."""

    nf: ClassVar[int] = 0
    weight: Tensor


def merge_file(
    base: str | os.PathLike[str],
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    strength: float = 1.0,
    only: str | None = None,
    transposed: bool | None = None,
    force: bool = False,
    check_base: bool = True,
    told: Told | None = None,
) -> FileMergeReport:
    """Writes a checkpoint with an adapter merged in, reading and writing one tensor at a time.

    Each weight is what `merge` makes of it in a model, bit for bit: the sum in float32, rounded
    once. (Of a whole difference in float64, at a strength other than 1, a last bit may differ.)
    Every other tensor, and the header, are the base's, byte for byte. In memory is one tensor at a
    time, whatever the size of the checkpoint; what is more than factors takes a few copies.

    The file appears whole at the end: after a kill at any moment `out` is what it was, or the new
    checkpoint. Shards go into a new folder, which appears whole likewise.

    Args:
        base: A ``.safetensors`` file, the ``.safetensors.index.json`` of several, or a folder with
            either.
        adapter: What to merge; its names are found as `load` finds them in a model.
        out: The new file; for shards the new folder.
        strength: What the adapter's update is multiplied by.
        only: The part of a pipeline to merge, as "unet", of an adapter for several models.
        transposed: Whether square matrices of linear layers are stored ``(in, out)``, as GPT-2's
            are; None takes them as the adapter's other linear layers are stored.
        force: Whether a file that is there may be replaced; a folder may not.
        check_base: Whether to compare the weights with those the adapter was trained on.
        told: Told of each layer when it is merged, with the share of the update that rounding
            lost for its error; see `LayerResult`.

    Raises:
        ConfigError: If a setting is out of range, or something is at `out`.
        MismatchError: If a layer of the adapter is not in the checkpoint, or has other sizes, or
            the adapter was trained on another base.
        UnsupportedLayerError: If the tensor of a layer is quantised.
        MergeError: If a merged weight would not be finite.
        CorruptFileError: If the checkpoint is damaged or of another kind.
        OSError: If a file can't be read or written.
        Whatever is raised, `out` is as it was.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from lora_core._config import AdapterConfig
        >>> from lora_core._formats import AdapterLayer
        >>> config = AdapterConfig(rank=2, alpha=2.0, dropout=0.0, dtype=torch.float32)
        >>> parts = {"lora_A": torch.ones(2, 6), "lora_B": torch.ones(5, 2)}
        >>> adapter = Adapter("style", {"to_q": AdapterLayer("linear", config, parts)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, out = f"{folder}/base.safetensors", f"{folder}/out.safetensors"
        ...     save_file({"to_q.weight": torch.ones(5, 6)}, base)
        ...     report = merge_file(base, adapter, out)
        >>> report.changed, report.untouched
        (1, 0)
    """
    adapter = check_adapter("adapter", adapter)
    strength = check_finite("strength", strength)
    target = Path(os.fsdecode(out))
    checkpoint = open_checkpoint(base)
    _check_free(target, checkpoint, force=force)
    adapter = part_of(adapter, only, f"adapter {adapter.name!r}")
    layers = located(adapter, checkpoint, transposed)
    if check_base and adapter.base:
        _check_base(adapter, checkpoint)
    hosts = Hosts(adapter.name, layers, checkpoint, strength)
    tell, lost = Teller(told, len(layers)), dict[str, float]()
    changed = {*hosts.layers, *hosts.biases}
    here = {n: checkpoint.entries[n] for n in checkpoint.entries if n in changed}

    def write(file: Path, into: BinaryIO) -> None:
        names = {entry: name for name, entry in here.items() if entry.file == file}

        def change(entry: Entry, data: memoryview) -> None:
            for name, share in _merge_one(names[entry], entry, data, hosts).items():
                lost[name] = share
                found = layers[name]
                shape = found.place.shape(checkpoint.entries[found.place.tensor].shape)
                tell(name, found.rank(shape), share)

        respliced(file, names, into, change)

    if checkpoint.index is None:
        with new_file(target) as into:
            write(checkpoint.files[0], into)
        nbytes = target.stat().st_size
    else:
        with new_folder(target) as folder:
            for file in checkpoint.files:
                with (folder / file.name).open("xb") as into:
                    write(file, into)
                    into.flush()
                    os.fsync(into.fileno())
            with (folder / checkpoint.index.name).open("xb") as into:
                into.write(checkpoint.index.read_bytes())
                into.flush()
                os.fsync(into.fileno())
        nbytes = sum((target / file.name).stat().st_size for file in checkpoint.files)
    untouched = len(checkpoint.entries) - len(changed)
    return FileMergeReport(
        str(target), adapter.name, strength, lost, len(changed), untouched, nbytes
    )


def _check_base(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that is not the one that an adapter was trained on."""
    rows = {}
    for name, path in paths_of(adapter, checkpoint).items():
        place = place_of(path, checkpoint.entries)
        assert place is not None
        entry = checkpoint.entries[place.tensor]
        numbers = math.prod(place.shape(entry.shape))
        row = sampled(entry, (place.part or 0) * numbers, numbers)
        if row is not None:
            rows[name] = row
    try:
        other = differing_rows(adapter.base, adapter.layers, rows)
    except ValueError as error:
        raise CorruptFileError(
            f"Adapter {adapter.name!r} must describe its base, but {error}. Fetch or save it again."
        ) from error
    if other:
        raise MismatchError(
            f"The checkpoint must be the one that adapter {adapter.name!r} was trained on, but the"
            f" weights of {str(checkpoint.path)!r} differ at {len(other)} of {len(rows)} layers:"
            f" {listed(other, 2)}. Name that base, or pass check_base=False."
        )


def _check_free(target: Path, checkpoint: Checkpoint, *, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if checkpoint.index is not None:
        raise ConfigError(
            f"`out` must be a new folder for a checkpoint of shards, but {str(target)!r} is there."
            " Choose another name: several files can't be replaced at once."
        )
    if target.is_dir():
        raise ConfigError(f"`out` must be a file, but {str(target)!r} is a folder. Name a file.")
    if not force:
        raise ConfigError(
            f"`out` must be a new file, but {str(target)!r} is there. Pass force=True to replace"
            " it."
        )


def _merge_one(tensor: str, entry: Entry, data: memoryview, hosts: "Hosts") -> Mapping[str, float]:
    """Puts the merged values of one tensor into its bytes; what rounding lost, by layer."""
    made = hosts.make(tensor, as_tensor(entry, data))
    loss = merge(made.model, reversible=False).loss  # into the very bytes
    path = hosts.biases.get(tensor)
    # of a layer whose weight changes too, that tells
    return {} if path is not None and hosts.located[path].changes_weight else loss


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
            if first.place.part is not None or paths[0] == tensor or is_read(first.layer):
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
    shape = tuple(weight.shape)
    # of what is whole the file says no kind: it is added as it is
    is_whole = found.layer.config is None
    kind = kind_of_shape(shape) if is_whole else kind_named(found.layer.kind)
    return Conv1D() if found.transposed and kind.may_be_turned else kind.blank(shape)
