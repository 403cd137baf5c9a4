"""Checkpoints read and rewritten tensor by tensor: one safetensors file, or several shards."""

import errno
import os
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors
import torch
from torch import Tensor

from lora_core._errors import ConfigError, CorruptFileError, listed
from lora_core._formats import container, sniffing
from lora_core._formats.bases import Row, places

SUFFIX = ".safetensors"
INDEX = f"{SUFFIX}.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_OTHERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_BLOCK = 2**20  # bytes copied at a time
_ALIGNED = 64  # bytes that torch aligns a tensor to


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Attributes:
        file: Where it is.
        dtype: The format's name of its type.
        shape: Its shape.
        start: Its first byte.
        stop: The byte after its last.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a model's files, none of which has been read yet.

    Attributes:
        path: What the user named.
        files: The files.
        entries: Their tensors by name.
        index: The file that says which shard has which tensor; None where there is one file.
    """

    path: Path
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    index: Path | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        entry = self.entries[name]
        with entry.file.open("rb") as file:
            return as_tensor(entry, read_bytes(file, entry))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The tensors of a ``.safetensors`` file, of an index of shards, or of a folder with either.

    Raises:
        CorruptFileError: If a file is damaged or of another kind, or the index and the shards
            disagree.
        OSError: If a file isn't there or can't be read.
    """
    path = Path(os.fsdecode(path))
    found = _in_folder(path) if path.is_dir() else path
    if not found.name.endswith(INDEX):
        return Checkpoint(path, (found,), _entries(found))
    try:
        where = container.strict_json(found.read_bytes())["weight_map"]
        names = sorted({Path(file).name for file in where.values()})
        if any(file != Path(file).name for file in where.values()):
            raise ValueError("a shard is not beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{str(found)!r} must map tensors to files beside it, but does not"
            f" ({type(error).__name__}: {error}). Fetch or save it again."
        ) from error
    files = tuple(found.parent / name for name in names)
    held = [entry for file in files for entry in _entries(file).items()]
    entries, times = dict(held), Counter(name for name, _ in held)
    # a tensor in two shards would be changed in one of them alone
    apart = [n for n in {*entries, *where} if times[n] != 1 or where.get(n) != entries[n].file.name]
    if apart:
        raise CorruptFileError(
            f"{str(found)!r} must map exactly the tensors of its {len(files)} files, but differs at"
            f" {listed(sorted(apart))}. Fetch or save it again."
        )
    return Checkpoint(path, files, entries, found)


def _in_folder(path: Path) -> Path:
    found = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        raise ConfigError(
            f"A folder must hold one checkpoint, but {str(path)!r} holds"
            f" {listed([p.name for p in found]) or 'none'}. Name the file."
        )
    return found[0]


def _entries(path: Path) -> dict[str, Entry]:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise OSError(
            errno.EINVAL, "a regular file is needed, but this is a device or pipe", str(path)
        )
    with path.open("rb") as file:
        start = file.read(64)
        file.seek(0)
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass  # its own checks of sizes, offsets and types
            size = struct.unpack("<Q", file.read(8))[0]
            header = container.strict_json(file.read(size))
        except (safetensors.SafetensorError, ValueError, struct.error) as error:
            looks = sniffing.looks_like(start)
            hint = f"It looks like {looks}." if looks else "Fetch or save it again."
            raise CorruptFileError(
                f"{str(path)!r} must be a whole safetensors file, but is not ({error}). {hint}"
            ) from error
    header.pop("__metadata__", None)
    first = 8 + size
    return {
        name: Entry(
            path,
            about["dtype"],
            tuple(about["shape"]),
            *(first + offset for offset in about["data_offsets"]),
        )
        for name, about in header.items()
    }


def read_bytes(file: BinaryIO, entry: Entry) -> memoryview:
    """The bytes of one tensor, where torch itself might have put them.

    Products of numbers at other places might be rounded otherwise.

    Raises:
        CorruptFileError: If the file has become shorter.
    """
    size = entry.stop - entry.start
    room = bytearray(size + _ALIGNED)
    first = -torch.frombuffer(room, dtype=torch.uint8).data_ptr() % _ALIGNED
    data = memoryview(room)[first : first + size]
    file.seek(entry.start)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise CorruptFileError(
            f"{str(entry.file)!r} must stay as it is while it is read, but was cut short. Start"
            " again."
        )
    return data


def sampled(entry: Entry, first: int, numbers: int) -> Row | None:
    """The sampled values of some of a tensor's numbers, without a look at the others.

    None where they are no plain numbers.

    Args:
        entry: The tensor.
        first: Where the numbers begin.
        numbers: How many they are.
    """
    dtype = DTYPES.get(entry.dtype)
    if dtype is None or not dtype.is_floating_point or not numbers:
        return None
    values = []
    with entry.file.open("rb") as file:
        for place in places(numbers):
            file.seek(entry.start + (first + place) * dtype.itemsize)
            data = bytearray(file.read(dtype.itemsize))
            values.append(float(torch.frombuffer(data, dtype=dtype).double()))
    return Row(dtype, values)


def as_tensor(entry: Entry, data: memoryview) -> Tensor:
    """The tensor that some bytes are: writing to it writes to them. Odd types are plain bytes."""
    dtype = (DTYPES | _OTHERS).get(entry.dtype)
    if dtype is None:
        return torch.frombuffer(data, dtype=torch.uint8)
    if not data:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(entry.shape)


def respliced(
    file: Path,
    entries: Iterable[Entry],
    out: BinaryIO,
    change: Callable[[Entry, memoryview], None],
) -> None:
    """Copies a file to another, with the bytes of these entries changed on the way.

    Args:
        file: What to copy.
        entries: Its tensors to change.
        out: Where to.
        change: Called with each and its bytes, to be changed in place.
    """
    with file.open("rb") as source:
        place = 0
        for entry in sorted(entries, key=lambda entry: entry.start):
            _copy(source, out, place, entry.start)
            data = read_bytes(source, entry)
            change(entry, data)
            out.write(data)
            del data  # before the next one comes
            place = entry.stop
        _copy(source, out, place, os.fstat(source.fileno()).st_size)


def _copy(source: BinaryIO, out: BinaryIO, start: int, stop: int) -> None:
    source.seek(start)
    while start < stop:
        block = source.read(min(_BLOCK, stop - start))
        if not block:
            raise CorruptFileError(
                f"{source.name!r} must stay as it is while it is read, but was cut short. Start"
                " again."
            )
        out.write(block)
        start += len(block)
