"""Tensors out of a pickle, without running code: torch's own restricted reader, and a guard."""

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lora_core._errors import CorruptFileError, UnsupportedFileError, listed
from lora_core._formats import instructions
from lora_core._formats.showing import shown
from lora_core._formats.sniffing import MAX_DIMS, MAX_NAME, content

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_MAX_DEPTH = 16
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # in what torch.load says of a function it won't call
_MAX_TENSORS = 65_536
_MAX_NAMES = 8 * 2**20  # characters of all keys together, as a header has
_OLD_PICKLES = 5  # before archives: a number, a version, a system, the content, its storages
_TIMES = 4  # as many bytes as the file has may its tensors take: some hold the same numbers
_UNREADABLE = (ValueError, OSError, NotImplementedError, KeyError, IndexError, RuntimeError)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save by key, of a list by number: copies, detached.

    Raises:
        CorruptFileError: If it is damaged, or is built to do harm.
        UnsupportedFileError: If it needs code, or holds no dict or list of tensors.
        OSError: If it can't be read.
    """
    data = content(path)
    if data[:4] == b"PK\x03\x04":
        _check_archive(path, data)
    else:
        _check_instructions(path, data, _OLD_PICKLES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001  # whatever damage makes the reader stumble over
        wanted = _GLOBAL.search(str(error))
        if wanted:
            raise UnsupportedFileError(
                f"{str(path)!r} must be a pickle of tensors alone, but runs code, which is never"
                f" done: it calls for {wanted[1]!a}. Have its owner save it as safetensors."
            ) from None
        _refuse(path, f"it can't be read ({type(error).__name__})")
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        raise UnsupportedFileError(
            f"{str(path)!r} must hold a dict or a list of tensors, but holds a"
            f" {type(value).__name__}. Give the file of an adapter."
        )
    flat = _flat(value, path)
    found: dict[str, Tensor] = {}
    room = _TIMES * len(data) + _MAX_NAMES
    for key, held in flat:
        found[key] = _own(path, key, held, room)
        room -= found[key].nbytes
    if len(found) < len(flat):
        _refuse(path, "two of its keys are spelled alike")
    return found


def _flat(value: Mapping[Any, Any], path: Path) -> list[tuple[str, Any]]:
    """The entries, those of a nested dict under "outer.inner"."""
    found: list[tuple[str, Any]] = []
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    long = 0
    for prefix, held, depth in waiting:
        if not isinstance(held, Mapping) or depth > _MAX_DEPTH:
            found.append((prefix.removeprefix("."), held))
            continue
        if len(waiting) + len(held) > _MAX_TENSORS:
            _refuse(path, f"it lists more than {_MAX_TENSORS:,} tensors")
        for key, inner in held.items():
            # of any other kind, one may be far larger than its bytes
            plain = isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**63)
            if not plain or len(prefix) + len(str(key)) > MAX_NAME:
                _refuse(path, f"a key is no text of up to {MAX_NAME:,} characters")
            waiting.append((f"{prefix}.{key}", inner, depth + 1))
            long += len(prefix) + len(str(key))
        if long > _MAX_NAMES:
            _refuse(path, f"its keys have more than {_MAX_NAMES:,} characters")
    return found


def _own(path: Path, key: str, value: object, room: int) -> Tensor:
    """A plain copy of a tensor, refused where it is larger than what the file holds of it."""
    if isinstance(value, int | float):  # some writers keep alpha as a plain number
        try:
            return torch.tensor(float(value), dtype=torch.float64)
        except OverflowError:
            _refuse(path, f"{listed([key])} is a number beyond every float")
    if not isinstance(value, Tensor):
        raise UnsupportedFileError(
            f"{str(path)!r} must hold tensors alone, but {listed([key])} is a"
            f" {type(value).__name__}. Give the file of an adapter."
        )
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    plain = plain and value.ndim <= MAX_DIMS
    held = value.untyped_storage().nbytes() if plain else 0
    if not plain or value.numel() * value.itemsize > min(held, room):
        _refuse(path, f"{listed([key])} is no plain tensor whose numbers the file holds")
    return value.detach().clone(memory_format=torch.contiguous_format)


def _check_archive(path: Path, data: bytes) -> None:
    """torch.save never compresses: an archive that does is built to unpack to more."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type]
            total = sum(entry.file_size for entry in archive.infolist())
            if packed or total > len(data):
                _refuse(path, "its archive unpacks to more than it holds")
            # torch's own reader of archives passes over the case of names
            names = [name.lower() for name in archive.namelist()]
            if len(set(names)) < len(names):
                _refuse(path, "two entries of its archive are named alike")
            pickled = [entry for entry in archive.namelist() if entry.lower().endswith(".pkl")]
            programs = [archive.read(name) for name in pickled]
    except (zipfile.BadZipFile, *_UNREADABLE) as error:
        _refuse(path, f"it can't be read ({shown(error)})")
    for program in programs:
        _check_instructions(path, program)


def _check_instructions(path: Path, data: bytes, many: int = 1) -> None:
    """Of the first pickles in some bytes, until something else comes."""
    stream = io.BytesIO(data)
    try:
        for _ in range(many):
            instructions.check(stream)
    except ValueError as error:
        if str(error).startswith("it calls for"):
            raise UnsupportedFileError(
                f"{str(path)!r} must be a pickle of tensors alone, but holds other objects:"
                f" {shown(error)}. Have its owner save a state dict, as safetensors."
            ) from None
        _refuse(path, f"it can't be read ({shown(error)})")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise CorruptFileError(
        f"{str(path)!r} must be a whole file of torch.save, but {reason}. Fetch or save it again."
    )
