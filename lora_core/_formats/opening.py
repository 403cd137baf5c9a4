"""From a path to tensors and what stands beside them: files, PEFT's folders, pickles on request."""

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lora_core._config import check_flag
from lora_core._errors import UnsupportedFileError
from lora_core._formats import cloneofsimo, container, peft, pickles, refusing
from lora_core._formats.settings import PeftSettings
from lora_core._formats.sniffing import is_pickle

_LARGE = 2**30  # bytes, from which on a file is asked what it is before it is read
# what diffusers calls the file in a folder that it saved
_LONE = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


@dataclass(frozen=True, slots=True)
class Opened:
    """What was found at a path.

    Attributes:
        path: The file that holds the tensors.
        tensors: Its tensors by key.
        metadata: What else it says.
        settings: PEFT's settings beside it; None where there are none.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    settings: PeftSettings | None = None


def open_file(path: Path, allow_pickle: bool) -> Opened:
    """Opens a file, or a folder of PEFT's or diffusers'.

    Raises:
        CorruptFileError: If it is damaged or hostile.
        UnsupportedFileError: If it is a pickle, and those are not allowed.
        ConfigError: If `allow_pickle` is no boolean.
        OSError: If it can't be read, or a folder holds no adapter.
    """
    check_flag("allow_pickle", allow_pickle)
    if path.is_dir():
        path = _within(path)
    beside = path.parent / peft.CONFIG
    settings = peft.settings(beside) if path.name in peft.WEIGHTS and beside.exists() else None
    if path.suffix.lower() not in pickles.SUFFIXES or not is_pickle(path):
        if path.is_file() and path.stat().st_size > _LARGE:
            refusing.refuse_checkpoint(str(path), container.keys(path))
        tensors, metadata = container.read(path)
        return Opened(path, tensors, metadata, settings)
    if not allow_pickle:
        raise UnsupportedFileError(
            f"{str(path)!r} must be a safetensors file, but is a pickle, which may hold code. Pass"
            " allow_pickle=True to read its tensors alone: no code in it is run."
        )
    found = pickles.read(path)
    if cloneofsimo.is_list(found):
        found = cloneofsimo.named(found, path)
    return Opened(path, found, {}, settings)


def _within(folder: Path) -> Path:
    """The file with the tensors in a folder, safetensors before a pickle."""
    names = peft.WEIGHTS if (folder / peft.CONFIG).exists() else _LONE
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise IsADirectoryError(
        errno.EISDIR,
        f"a file is needed, or a folder with {peft.CONFIG} and {peft.WEIGHTS[0]}",
        str(folder),
    )
