"""What a file is, by its first bytes, before anything parses it."""

import errno
import os
import stat
from pathlib import Path

MAX_NAME = 1024  # characters of a tensor's name
MAX_DIMS = 16  # of a tensor: torch itself can do little with more than 64
_LOOKS = (
    (b"version https://git-lfs", "a git-lfs pointer: the file itself was never fetched"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes: a pickle, which may hold code"),
    *((b"\x80" + bytes([n]), "a pickle, which may hold code") for n in (2, 3, 4, 5)),
    (b"<", "a web page: the download answered with HTML"),
    (b"{", "JSON text"),
    (b"GGUF", "a GGUF model"),
)


def content(path: Path) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: If it can't be read, or is no regular file.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a file is needed, but this is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(
            errno.EINVAL, "a regular file is needed, but this is a device or pipe", str(path)
        )
    return path.read_bytes()


def looks_like(data: bytes) -> str:
    """What a file that is no safetensors file seems to be; "" where that can't be told."""
    start = data[:64].lstrip()
    return next((what for magic, what in _LOOKS if start.startswith(magic)), "")


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts as torch.save's archives or its older pickles do."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return "pickle" in looks_like(file.read(64))
