"""New files and folders that appear whole or not at all, written bit by bit."""

import errno
import glob
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lora_core._formats import container


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path`, whole and on the disk, when the block ends without an error.

    After a kill at any moment what was at `path` is there, or the new file. It follows a symbolic
    link to its target and keeps an existing file's permissions, as `container.write` does.

    Raises:
        OSError: If it can't be written, or a read-only file is there.
    """
    target = Path(os.path.realpath(path))
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(
            errno.EINVAL, "a file is to be written, but a device or pipe is there", str(path)
        )
    if mode is not None and not mode & 0o222:
        raise PermissionError(errno.EACCES, "the file there is read-only", str(path))
    container._sweep(target)
    temporary = temporary_name(target)
    try:
        fd, unnamed = container._open(target.parent, temporary)
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            if mode is not None:
                os.fchmod(fd, stat.S_IMODE(mode))
            os.fsync(fd)
            if unnamed:
                container._name(fd, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    container._sync(target.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` with all that was put into it, when the block ends well."""
    target = Path(os.path.realpath(path))
    for old in target.parent.glob(f".{glob.escape(target.name[:200])}.{container._host()}.*.*.tmp"):
        pid = old.name.split(".")[-3]
        if old.is_dir() and pid.isdigit() and not container._alive(int(pid)):
            shutil.rmtree(old, ignore_errors=True)  # a killed process's
    temporary = temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
        container._sync(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    container._sync(target.parent)


def temporary_name(target: Path) -> Path:
    """A name beside `target` that nobody else takes, and that tells whose it is."""
    mine = f"{container._host()}.{os.getpid()}.{os.urandom(4).hex()}"
    return target.parent / f".{target.name[:200]}.{mine}.tmp"
