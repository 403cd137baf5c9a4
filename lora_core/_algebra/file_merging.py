"""An adapter merged into a checkpoint on the disk, one tensor at a time."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from lora_core._algebra.checkpoints import (
    Checkpoint,
    Entry,
    as_tensor,
    open_checkpoint,
    respliced,
)
from lora_core._algebra.hosts import Hosts
from lora_core._algebra.layers import check_adapter
from lora_core._algebra.locating import located
from lora_core._algebra.results import FileMergeReport, Teller, Told
from lora_core._config import check_finite
from lora_core._errors import ConfigError
from lora_core._formats import Adapter
from lora_core._formats.neutral import part_of
from lora_core._formats.replacing import new_file, new_folder
from lora_core._merging import merge


def merge_file(
    base: str | os.PathLike[str],
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    strength: float = 1.0,
    only: str | None = None,
    transposed: bool | None = None,
    force: bool = False,
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
        told: Told of each layer when it is merged, with the share of the update that rounding
            lost for its error; see `LayerResult`.

    Raises:
        ConfigError: If a setting is out of range, or something is at `out`.
        MismatchError: If a layer of the adapter is not in the checkpoint, or has other sizes.
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
    layers = located(part_of(adapter, only, f"adapter {adapter.name!r}"), checkpoint, transposed)
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


def _merge_one(tensor: str, entry: Entry, data: memoryview, hosts: Hosts) -> Mapping[str, float]:
    """Puts the merged values of one tensor into its bytes; what rounding lost, by layer."""
    made = hosts.make(tensor, as_tensor(entry, data))
    loss = merge(made.model, reversible=False).loss  # into the very bytes
    path = hosts.biases.get(tensor)
    # of a layer whose weight changes too, that tells
    return {} if path is not None and hosts.located[path].changes_weight else loss
