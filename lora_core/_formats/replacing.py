"""New files and folders that appear whole or not at all: after a kill it is the old or the new."""

import errno
import glob
import os
import platform
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_ABANDONED = 3600  # seconds after which a dead process's temporary file is swept


@contextmanager
def new_file(path: Path, said: str = "") -> Iterator[BinaryIO]:
    """A file that appears at `path`, whole and on the disk, when the block ends without an error.

    Follows a symbolic link to its target, keeps an existing file's permissions and gives a new
    one the ordinary ones. A read-only file is refused, as `open` refuses it.

    Args:
        path: Where.
        said: What to say of it after what the system says, where it can't be written.

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
    _sweep(target)
    temporary = temporary_name(target)
    try:
        fd, unnamed = _open(target.parent, temporary)
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            if mode is not None:
                os.fchmod(fd, stat.S_IMODE(mode))
            os.fsync(fd)
            if unnamed:
                _name(fd, temporary)
        temporary.replace(target)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}{said}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync(target.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` with all that was put into it, when the block ends well."""
    target = Path(os.path.realpath(path))
    for old in target.parent.glob(f".{glob.escape(_start(target))}.{_host()}.*.*.tmp"):
        pid = old.name.split(".")[-3]
        if old.is_dir() and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(old, ignore_errors=True)  # a killed process's
    temporary = temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(target.parent)


def temporary_name(target: Path) -> Path:
    """A name beside `target` that nobody else takes, and that tells whose it is."""
    mine = f"{_host()}.{os.getpid()}.{secrets.token_hex(4)}"
    return target.parent / f".{_start(target)}.{mine}.tmp"


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
