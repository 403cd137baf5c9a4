"""The rim: safetensors bytes in and out, checked on the way in and atomic on the way out."""

import json
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora_core._errors import ConfigError, CorruptFileError, UnsupportedFileError, listed
from lora_core._formats.replacing import new_file
from lora_core._formats.showing import shown
from lora_core._formats.sniffing import MAX_DIMS, MAX_NAME, content, looks_like

_MAX_HEADER = 8 * 2**20  # bytes
_MAX_TENSORS = 65_536
_MAX_NESTED = 5 * _MAX_TENSORS  # lists and objects in JSON: each costs more than its text
# what torch says to a dtype that it lacks, or to an empty tensor of sizes beyond all memory
_UNBUILDABLE = (ValueError, KeyError, OverflowError, TypeError, RuntimeError)
_SAID: dict[str, Any] = {}  # stands for what a header says of a tensor, which torch reads itself
_PADDING = 64  # bytes of spaces before a header's brace that are passed over
# in the order in which safetensors lays them out: the widest first, so that all are aligned
_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file, read whole: later changes to it do no harm.

    Raises:
        CorruptFileError: If it is no safetensors file, is damaged, or is built to do harm.
        OSError: If it can't be read, or is no regular file.
    """
    path = Path(path)
    data = content(path)
    metadata = _header(data, path).get("__metadata__") or {}
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, *_UNBUILDABLE) as error:
        _refuse(path, shown(str(error).partition("\n")[0]).rstrip("."))
    deep = [key for key, t in tensors.items() if t.ndim > MAX_DIMS]
    if deep:
        _refuse(path, f"{listed(deep)} has more than {MAX_DIMS} dimensions")
    return tensors, metadata


def keys(path: Path) -> list[str]:
    """The names in a safetensors file's header; nothing else of the file is read.

    Raises:
        CorruptFileError: If the header is damaged.
        OSError: If it can't be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        header = _header(start + file.read(min(size, _MAX_HEADER + 1)), path)
    return [key for key in header if key != "__metadata__"]


class NonFiniteError(ValueError):
    """A tensor that is to be packed holds NaN or infinity."""


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes | bytearray:
    """The bytes of a safetensors file: equal for equal content, whatever the order of the keys.

    Raises:
        NonFiniteError: If a tensor holds NaN or infinity.
        ConfigError: If the header would be too large, or a tensor's dtype is none of a factor's.
    """
    groups: dict[torch.dtype, list[str]] = {dtype: [] for dtype in _KINDS}
    for name in sorted(tensors):
        dtype = tensors[name].dtype
        if dtype not in groups:
            raise ConfigError(
                f"A tensor must be one of {listed([str(d) for d in _KINDS])} to be saved, but"
                f" {name!r} is {dtype}. Cast it first."
            )
        groups[dtype].append(name)
    # safetensors itself writes metadata in random order, and takes long for thousands of tensors
    about = json.dumps(dict(sorted(metadata.items())), separators=(",", ":"), ensure_ascii=False)
    # text rather than a tree for `json.dumps`: thousands of small objects cost the collector dear
    entries, end = [f'"__metadata__":{about}'], 0
    sizes: dict[torch.Size, tuple[str, int]] = {}  # most tensors have the shape of another
    for dtype, names in groups.items():
        kind, itemsize = _KINDS[dtype], dtype.itemsize
        for name in names:
            t = tensors[name]
            size = sizes.get(t.shape)
            if size is None:
                size = sizes[t.shape] = ",".join(map(str, t.shape)), t.numel()
            shape, count = size
            start, end = end, end + count * itemsize
            entries.append(
                f'{encode_basestring(name)}:{{"dtype":"{kind}","shape":[{shape}],'
                f'"data_offsets":[{start},{end}]}}'
            )
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER or len(tensors) > _MAX_TENSORS:
        raise ConfigError(
            f"A file's header must have at most {_MAX_HEADER:,} bytes and {_MAX_TENSORS:,}"
            f" tensors, but has {len(text):,} and {len(tensors):,}. Shorten the metadata."
        )
    data = bytearray(8 + len(text) + end)
    data[: 8 + len(text)] = struct.pack("<Q", len(text)) + text
    place = 8 + len(text)
    for names in filter(None, groups.values()):
        place += _fill(data, place, [tensors[name] for name in names])
    return data


def _fill(data: bytearray, start: int, tensors: Sequence[Tensor]) -> int:
    """Writes tensors of one dtype one after the other, without a copy between; how many bytes."""
    with torch.no_grad():
        # views cost most where there are thousands
        flat = [t.view(-1) if t.is_contiguous() else t.reshape(-1) for t in tensors]
        flat = [t if t.is_cpu else t.cpu() for t in flat]
        count = sum(t.numel() for t in flat)
        if not count:
            return 0
        whole = torch.frombuffer(data, dtype=tensors[0].dtype, count=count, offset=start)
        torch.cat(flat, out=whole)
        if not all(bool(bound.isfinite()) for bound in whole.aminmax()):
            raise NonFiniteError
        if sys.byteorder == "big":
            whole.view(torch.uint8).copy_(whole.view(torch.uint8).view(count, -1).flip(1).view(-1))
        return whole.nbytes


def write(path: str | os.PathLike[str], data: bytes | bytearray) -> None:
    """Puts `data` at `path`: after a crash at any moment the old file is there or the new one.

    Follows a symbolic link to its target, keeps an existing file's permissions and gives a new
    one the ordinary ones. A read-only file is refused, as `open` refuses it.

    Raises:
        OSError: If it can't be written; an existing file is then as it was.
    """
    with new_file(Path(path), f" ({len(data)} bytes)") as file:
        file.write(data)


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, no key twice."""
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a key stands twice")
    return found


def _name_alone(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The same, without what a header says of a tensor: thousands of lists cost the collector."""
    found = _once(items)
    return _SAID if isinstance(found.get("data_offsets"), list) else found


def strict_json(
    text: str | bytes, make: Callable[[list[tuple[str, Any]]], dict[str, Any]] = _once
) -> Any:
    """`json.loads` that refuses duplicate keys, NaN, infinities and bottomless nesting.

    Args:
        text: What to read.
        make: What makes an object of its keys and values.

    Raises:
        ValueError: If the text is any of that, or no JSON.
    """

    def constant(value: str) -> NoReturn:
        raise ValueError(f"{value} is no JSON number")

    raw = text.encode(errors="replace") if isinstance(text, str) else text
    if raw.count(b"[") + raw.count(b"{") > _MAX_NESTED:
        raise ValueError(f"it has more than {_MAX_NESTED:,} lists and objects")
    try:
        return json.loads(text, object_pairs_hook=make, parse_constant=constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _header(data: bytes, path: Path) -> dict[str, Any]:
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    # the format says "{"; its reader passes over spaces, and files have them
    if not 2 <= size <= len(data) - 8 or not data[8 : 8 + _PADDING].lstrip().startswith(b"{"):
        _refuse(path, "it has no header", data)
    if size > _MAX_HEADER:
        _refuse(path, f"its header has {size:,} bytes, over the limit of {_MAX_HEADER:,}")
    try:
        header = strict_json(data[8 : 8 + size], _name_alone)
    except ValueError as error:
        _refuse(path, f"its header is not valid: {error}")
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        _refuse(path, f"its header lists more than {_MAX_TENSORS:,} tensors")
    longest = max(map(len, header), default=0)
    if longest > MAX_NAME:
        _refuse(path, f"it has a name of {longest:,} characters, over the limit of {MAX_NAME:,}")
    return header


def _refuse(path: Path, reason: str, data: bytes = b"") -> NoReturn:
    looks = looks_like(data)
    hint = f" It looks like {looks}." if looks else " Fetch or save it again."
    kind = UnsupportedFileError if looks else CorruptFileError
    raise kind(f"{str(path)!r} must be a whole safetensors file, but {reason}.{hint}")
