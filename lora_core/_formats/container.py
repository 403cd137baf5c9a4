"""The rim: safetensors bytes in and out, checked on the way in and atomic on the way out."""

import errno
import glob
import json
import os
import platform
import secrets
import stat
import struct
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora_core._errors import ConfigError, CorruptFileError, UnsupportedFileError, listed
from lora_core._formats.showing import shown
from lora_core._formats.sniffing import MAX_NAME, content, looks_like

_MAX_HEADER = 8 * 2**20  # bytes
_MAX_TENSORS = 65_536
_MAX_NESTED = 5 * _MAX_TENSORS  # lists and objects in JSON: each costs more than its text
# what torch says to a dtype that it lacks, or to an empty tensor of sizes beyond all memory
_UNBUILDABLE = (ValueError, KeyError, OverflowError, TypeError, RuntimeError)
_PADDING = 64  # bytes of spaces before a header's brace that are passed over
# in the order in which safetensors lays them out: the widest first, so that all are aligned
_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_ABANDONED = 3600  # seconds after which a dead process's temporary file is swept


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file, read whole: later changes to it do no harm.

    Raises:
        CorruptFileError: If it is no safetensors file, is damaged, or is built to do harm.
        OSError: If it can't be read, or is no regular file.
    """
    path = Path(path)
    data = content(path)
    header = _header(data, path)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, *_UNBUILDABLE) as error:
        _refuse(path, shown(str(error).partition("\n")[0]).rstrip("."))
    return tensors, header.get("__metadata__") or {}


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
        if tensors[name].dtype not in groups:
            raise ConfigError(
                f"A tensor must be one of {listed([str(d) for d in _KINDS])} to be saved, but"
                f" {name!r} is {tensors[name].dtype}. Cast it first."
            )
        groups[tensors[name].dtype].append(name)
    # safetensors itself writes metadata in random order, and takes long for thousands of tensors
    about = json.dumps(dict(sorted(metadata.items())), separators=(",", ":"), ensure_ascii=False)
    # text rather than a tree for `json.dumps`: thousands of small objects cost the collector dear
    entries, end = [f'"__metadata__":{about}'], 0
    for dtype, names in groups.items():
        kind, itemsize = _KINDS[dtype], dtype.itemsize
        for name in names:
            t = tensors[name]
            start, end = end, end + t.numel() * itemsize
            shape = ",".join(map(str, t.shape))
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
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # what remains of links that lead round
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
        raise OSError(errno.EINVAL, f"a file is to be written, but {kind} is there", str(path))
    if mode is not None and not mode & 0o222:
        raise PermissionError(errno.EACCES, "the file there is read-only", str(path))
    folder = target.parent
    _sweep(target)
    mine = f"{_host()}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary = folder / f".{_start(target)}.{mine}.tmp"
    try:
        fd, unnamed = _open(folder, temporary)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            if mode is not None:
                os.fchmod(fd, stat.S_IMODE(mode))
            os.fsync(fd)
            if unnamed:
                _name(fd, temporary)
        temporary.replace(target)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({len(data)} bytes)", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync(folder)


def strict_json(text: str | bytes) -> Any:
    """`json.loads` that refuses duplicate keys, NaN, infinities and bottomless nesting.

    Raises:
        ValueError: If the text is any of that, or no JSON.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) < len(items):
            raise ValueError("a key stands twice")
        return dict(items)

    def constant(value: str) -> NoReturn:
        raise ValueError(f"{value} is no JSON number")

    raw = text.encode(errors="replace") if isinstance(text, str) else text
    if raw.count(b"[") + raw.count(b"{") > _MAX_NESTED:
        raise ValueError(f"it has more than {_MAX_NESTED:,} lists and objects")
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
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
        header = strict_json(data[8 : 8 + size])
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


def _open(folder: Path, temporary: Path) -> tuple[int, bool]:
    """A file to write into, without a name where the system allows it: a kill leaves nothing."""
    if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").exists():
        with suppress(OSError):
            return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), True
    return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), False


def _name(fd: int, path: Path) -> None:
    """Gives a nameless file its name."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # the link in /proc is followed only where a folder's descriptor is given
        os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _sweep(target: Path) -> None:
    """Removes what killed processes left of this target.

    With nameless files that takes a kill in the instant between naming and renaming. Another
    machine's files are left alone for an hour: its processes can't be asked after.
    """
    for old in target.parent.glob(f".{glob.escape(_start(target))}.*.*.*.tmp"):
        host, pid = old.name.split(".")[-4:-2]
        with suppress(OSError, ValueError):
            here = host == _host()
            if not _alive(int(pid)) if here else time.time() - old.stat().st_mtime > _ABANDONED:
                old.unlink()


def _start(target: Path) -> str:
    """As much of a file's name as leaves room for more: systems count bytes."""
    return os.fsdecode(os.fsencode(target.name)[:200])


def _host() -> str:
    """A short name for this machine, for names of temporary files."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(folder: Path) -> None:
    # the rename itself must survive a power cut; not every system lets a folder be opened
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
