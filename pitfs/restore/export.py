"""Writes an image to a file or block device at full speed.

Into a file: under FILE.partial (locked), made durable, then renamed, so FILE is never half an image. Zeros are holes.
Into a block device: in place, with the zeros, since the device may hold anything. It is opened exclusively. A device
larger than the volume keeps what is behind the volume's end, as with dd.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import stat
from collections.abc import Iterator
from typing import Final

from xxhash import xxh3_128

from pitfs.errors import CapacityError, UsageError
from pitfs.restore.digest import READ_BYTES, Progress, verify_copy
from pitfs.storage.exclusive import open_exclusively, written_by_others
from pitfs.storage.files import FULL_ERRNOS, closed_on_error, disk_errors, fsync_directory, write_all
from pitfs.view.ranges import cut
from pitfs.view.view import PointInTimeView, ReadBuffer

# Written back on the way: else the page cache fills with it and the end is one long fsync.
WRITEBACK_BYTES: Final = 64 << 20
PARTIAL: Final = ".partial"


def export(view: PointInTimeView, path: str, *, replace: bool, verify: bool, progress: Progress) -> None:
    """Writes the image to a new file or over a block device; durable when it returns.

    Args:
        replace: whether a file that exists is replaced.
        verify: read the copy from the disk and compare its digest.

    Raises:
        UsageError: the target exists, is in use, too small, or of another type; it is as it was.
        CapacityError, PitfsError: the disk is full or fails; a file is as it was.
        CorruptionError: an object of the store, or the copy, is damaged.
    """
    with disk_errors(path, "write it to another place"):
        if os.path.isfile(path):
            if not replace:
                raise UsageError(f"{path}: exists: give another name, or --force to replace it")
            if written_by_others(path):
                raise UsageError(
                    f"{path}: in use: the program that writes it (see fuser -v {path}) would write the old file: "
                    "stop it first"
                )
        if os.path.isfile(path) or not os.path.exists(path):
            _export_to_file(view, path, verify, progress)
            return
        with open_target(path) as (fd, size_bytes):
            if size_bytes < view.size_bytes:
                raise UsageError(f"{path}: {size_bytes} bytes, the volume has {view.size_bytes}: too small")
            _write(view, fd, path, progress, sparse=False, verify=verify)


@contextlib.contextmanager
def open_target(path: str) -> Iterator[tuple[int, int]]:
    """An existing file or device that is overwritten in place: (descriptor, size in bytes).

    Raises:
        UsageError: it is in use, or of another type.
        OSError: it is missing, or the system refuses.
    """
    try:
        fd, size_bytes = open_exclusively(path, path)
    except BlockingIOError as error:
        problem = f"another program writes it (see fuser -v {path}): stop it first"
        if error.errno == errno.EBUSY:
            problem = "it is mounted, or part of something: unmount it first"
        raise UsageError(f"{path}: in use: {problem}") from None
    try:
        yield fd, size_bytes
    finally:
        os.close(fd)


def _export_to_file(view: PointInTimeView, path: str, verify: bool, progress: Progress) -> None:
    path = os.path.realpath(path)  # the target of a symbolic link is replaced, not the link
    partial = path + PARTIAL
    fd = _open_partial(partial)
    try:
        try:
            os.ftruncate(fd, 0)
            _set_size(fd, partial, view.size_bytes)
            with _needed_said(view, path):
                _write(view, fd, partial, progress, sparse=True, verify=verify)  # durable before the name
            os.rename(partial, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise
        fsync_directory(os.path.dirname(path))
    finally:
        os.close(fd)


@contextlib.contextmanager
def _needed_said(view: PointInTimeView, path: str) -> Iterator[None]:
    """Raises CapacityError where the disk is full: with how much there must be room for."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_ERRNOS:
            raise
        needed_bytes = sum(end - start for start, end in view.data_ranges())
        problem = f"{os.strerror(error.errno)}: the image has {needed_bytes} bytes that aren't zeros"
        raise CapacityError(f"{path}: {problem}: write it to another place") from error


def _set_size(fd: int, partial: str, size_bytes: int) -> None:
    """Raises UsageError: the file system has no files of that size."""
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise UsageError(
            f"{os.path.dirname(partial)}: its file system has no files of {size_bytes} bytes (ext4: less than 16 TiB): "
            "export to another one (xfs, btrfs), or to a block device"
        ) from None


def _open_partial(partial: str) -> int:
    """Opens and locks the file that becomes the image: only one export writes, renames or removes it.

    Raises:
        UsageError: another export writes it, something else has its name, or no file can be made there.
    """
    not_regular = f"{partial}: not a regular file: remove it, export writes there first"
    try:
        # Without O_TRUNC: it may be another export's. Not through a link: its target isn't ours to overwrite.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(partial, flags, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise UsageError(not_regular) from None
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EROFS):
            raise
        raise UsageError(
            f"{os.path.dirname(partial)}: no file can be made there ({os.strerror(error.errno)}): export to another "
            "directory, or to a loop device over the file"
        ) from error
    with closed_on_error(fd):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(not_regular)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(fd), os.lstat(partial))
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:  # or the other has just ended, and renamed or removed what was opened here
            raise UsageError(f"{partial}: another export writes it: wait for its end, or give another name")
        os.fchmod(fd, 0o600)  # for the owner alone, as in the mount: an image holds all data of a system
    return fd


def _write(view: PointInTimeView, fd: int, path: str, progress: Progress, *, sparse: bool, verify: bool) -> None:
    """Writes the image (sparse: without its zeros), makes it durable, and compares it if asked for."""
    buffer = ReadBuffer(READ_BYTES)
    state = xxh3_128()
    zeros = memoryview(bytes(READ_BYTES))
    written = flushed = 0
    with progress("export", view.size_bytes) as reached:
        for start, end, is_data in _pieces(view, cut_holes=verify or not sparse):
            if is_data or verify or not sparse:
                data = view.read(start, end - start, buffer) if is_data else zeros[: end - start]
                if verify:
                    state.update(data)
                if is_data or not sparse:
                    write_all(fd, data, start)
                    written += len(data)
            if written - flushed >= WRITEBACK_BYTES:
                os.posix_fadvise(fd, 0, start, os.POSIX_FADV_DONTNEED)  # writes dirty pages, drops clean ones
                flushed = written
            reached(end)
    os.fsync(fd)
    if verify:
        verify_copy(fd, path, view.size_bytes, state.hexdigest(), progress)


def _pieces(view: PointInTimeView, cut_holes: bool) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether there is data) of the whole image, in order; data in pieces of at most READ_BYTES.

    cut_holes: False: each hole is one piece, however large: there may be TiB of them.
    """
    position, hole_bytes = 0, READ_BYTES if cut_holes else max(view.size_bytes, 1)
    for start, end in itertools.chain(view.data_ranges(), [(view.size_bytes, view.size_bytes)]):
        yield from ((a, b, False) for a, b in cut(position, start, hole_bytes))
        yield from ((a, b, True) for a, b in cut(start, end, READ_BYTES))
        position = end
