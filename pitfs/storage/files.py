"""Files with data: the few operations that durability and exactness depend on, each with its reason."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator

from pitfs.errors import CapacityError, CorruptionError, DiskFullError, PitfsError

_FALLOC_FL_KEEP_SIZE = 0x01  # linux/falloc.h
_FALLOC_FL_PUNCH_HOLE = 0x02
_LIBC = ctypes.CDLL(None, use_errno=True)
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


def storage_error(error: OSError, path: str, doing: str) -> PitfsError:
    """The error for the user for an OSError on our own files: full is retryable, all else is not."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in FULL_ERRNOS:
        return DiskFullError(f"{path}: {doing}: {reason}")
    return PitfsError(f"{path}: {doing}: {reason}")


@contextlib.contextmanager
def disk_errors(path: str, advice: str) -> Iterator[None]:
    """For files that the user named: an OSError in the block becomes one line with the path and the advice."""
    try:
        yield
    except OSError as error:
        kind = CapacityError if error.errno in FULL_ERRNOS else PitfsError
        raise kind(f"{path}: {os.strerror(error.errno or 0)}: {advice}") from error


@contextlib.contextmanager
def open_fd(path: str, flags: int, mode: int = 0o600) -> Iterator[int]:
    """A descriptor that is closed at the end of the block."""
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def file_identity(fd: int) -> tuple[int, int, int]:
    """(st_dev, st_ino, st_rdev): equal for two descriptors of one file or device."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_rdev


@contextlib.contextmanager
def closed_on_error(fd: int) -> Iterator[int]:
    """Closes the descriptor only if the block fails."""
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise


def fsync_directory(path: str) -> None:
    """Makes the entries of a directory durable: a file's own fsync doesn't cover its name."""
    with open_fd(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def durable_replace(path: str, content: bytes) -> None:
    """Replaces a file whole: after power loss it has the content before or the content after, nothing else.

    Written beside it, fsynced (a rename may reach the disk before the data), renamed (atomic), and the
    directory fsynced (the rename itself must last).
    """
    temporary = path + ".tmp"
    with open_fd(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        write_all(fd, content, 0)
        os.fsync(fd)
    os.rename(temporary, path)
    fsync_directory(os.path.dirname(path) or ".")


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`; a short write is continued, so what fails does so with its errno."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def punch(fd: int, offset: int, size: int) -> bool:
    """Makes that range a hole; False where this kind of file can't have holes.

    Raises:
        OSError: the disk refuses.
    """
    flags = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    if _LIBC.fallocate64(fd, flags, ctypes.c_int64(offset), ctypes.c_int64(size)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
        return False
    raise OSError(number, os.strerror(number))


def sync_file_system(path: str) -> None:
    """Makes durable all that was written to the file system of that path: one wait for any number of files."""
    with open_fd(path, os.O_RDONLY) as fd:
        if _LIBC.syncfs(fd):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def reserve(fd: int, offset: int, size: int) -> None:
    """Reserves room for that range of a file, whose size stays. A failure is ignored: then there may be less room."""
    _LIBC.fallocate64(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(size))


def read_exactly(fd: int, size: int, offset: int, what: str) -> bytes:
    """Reads `size` bytes at `offset`.

    Raises:
        CorruptionError: the file ends before that.
        OSError: the disk refuses.
    """
    data = b""
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise CorruptionError(what, offset + len(data), "the file ends before what it should hold")
        data += more
    return data
