"""`pitfs export`: writes an image to a file or block device at full speed.

Into a file: under FILE.partial (locked), made durable, then renamed, so FILE is never half an image; zeros are holes.
One that exists is only replaced with --force. Into a block device: in place, zeros included, since what the
device holds now isn't known; it must be at least as large as the volume, not mounted and not otherwise in use
(opened with O_EXCL). What is behind the volume's end on a larger device stays as it is, as with dd.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from xxhash import xxh3_128

from pitfs.cli.resolve import add_store_and_time, resolve, volume_index
from pitfs.errors import CapacityError, CorruptionError, PitfsError, UsageError
from pitfs.model.position import format_instant
from pitfs.storage.files import fsync_directory, write_all

if TYPE_CHECKING:
    from pitfs.store.store import Resolution, Store
    from pitfs.view.view import PointInTimeView

NAME: Final = "export"
READ_BYTES: Final = 1 << 20
# Written back as it goes on: else the page cache fills with it and the end is one long fsync.
WRITEBACK_BYTES: Final = 64 << 20
PARTIAL: Final = ".partial"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        NAME,
        help="write a volume at an instant to a file or device",
        description="Writes a volume's image to FILE: a regular file (sparse; complete or not there) "
        "or a block device at least as large. Every block is verified against its checksum on the way.",
        epilog="""\
examples:
  pitfs export /srv/replica/db1 latest root /srv/restore/root.img
  pitfs export /srv/replica/db1 5m-ago root /dev/vg0/root --verify
  pitfs export /srv/replica/db1 latest root /srv/restore/root.img --from 2026-11-22T23-54-00.123456789Z""",
    )
    add_store_and_time(parser)
    parser.add_argument("volume", metavar="VOLUME", help="name of the volume")
    parser.add_argument("file", metavar="FILE", help="file to make, or block device to overwrite")
    parser.add_argument("--verify", action="store_true", help="read FILE again and compare its digest")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--force", action="store_true", help="replace FILE if it exists")
    existing.add_argument(
        "--from",
        dest="from_time",
        metavar="TIME1",
        help="FILE holds the image at TIME1, an earlier or later one: write only what differs. That is checked first "
        "against what is there; with --verify the whole of FILE is compared afterwards. Interrupted, FILE is no image "
        "until the same command has been run again",
    )


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.holding import open_held
    from pitfs.splitter.backing import written_by_others
    from pitfs.view.view import PointInTimeView

    with open_held(args.store, f"export {os.path.realpath(args.file)}") as (store, holder):
        resolution = holder.pinned(store, resolve(store, args.time, args.tz)[0])
        volume = volume_index(store, args.volume)
        view = PointInTimeView(store, resolution, volume)
        if args.from_time is not None:
            one = holder.pinned(store, resolve(store, args.from_time, args.tz)[0])
            return _bring(store, one, view, args)
        try:
            mode = os.stat(args.file).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        else:
            if stat.S_ISREG(mode) and not args.force:
                raise UsageError(f"{args.file}: exists: give another name, or --force to replace it")
            if stat.S_ISREG(mode) and written_by_others(args.file):
                raise UsageError(
                    f"{args.file}: in use: whoever writes it (see fuser -v {args.file}) would go on with the old file: "
                    "stop that first"
                )
        try:
            if stat.S_ISBLK(mode):
                _export_to_device(view, args.file, args.verify)
            elif stat.S_ISREG(mode):
                _export_to_file(view, args.file, args.verify)
            else:
                raise UsageError(f"{args.file}: neither a regular file nor a block device")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CapacityError(f"{args.file}: no room for the image: make room there") from error
            raise
    print(
        f"{args.file}: {args.volume} at {format_instant(resolution.time_ns)}, {view.size_bytes} bytes"
        + (", verified" if args.verify else ""),
        file=sys.stderr,
    )
    return 0


def _bring(store: Store, one: Resolution, view: PointInTimeView, args: argparse.Namespace) -> int:
    """`--from`: FILE holds the volume at `one`."""
    from pitfs.cli.digest import image_digest
    from pitfs.cli.progress import progress
    from pitfs.restore.incremental_export import bring

    changed_bytes = bring(store, one, view.resolution, view.volume, args.file)
    if args.verify:
        with progress("digest", view.size_bytes) as advance:
            digest = image_digest(view, advance)
        fd = os.open(args.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _verify(fd, args.file, view.size_bytes, digest)
        finally:
            os.close(fd)
    print(
        f"{args.file}: {args.volume} at {format_instant(view.resolution.time_ns)}, {changed_bytes} of "
        f"{view.size_bytes} bytes differed" + (", verified" if args.verify else ""),
        file=sys.stderr,
    )
    return 0


def _export_to_file(view: PointInTimeView, path: str, verify: bool) -> None:
    path = os.path.realpath(path)  # of a symbolic link the target is replaced, not the link
    partial = path + PARTIAL
    fd = _open_partial(partial)
    try:
        try:
            os.ftruncate(fd, 0)
            _set_size(fd, partial, view.size_bytes)
            digest = _write(view, fd, sparse=True, hashed=verify)
            os.fsync(fd)  # data before the name
            if verify:
                _verify(fd, partial, view.size_bytes, digest)
            os.rename(partial, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise
        fsync_directory(os.path.dirname(path))
    finally:
        os.close(fd)


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
    """The file that becomes the image, locked: only one export writes it, renames it or removes it.

    Raises:
        UsageError: another export writes it, something else has its name, or no file can be made there.
    """
    try:
        # Not O_TRUNC: it may be another export's. Nor through a link: its target isn't ours to overwrite.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(partial, flags, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise UsageError(f"{partial}: not a regular file: remove it, export writes there first") from None
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EROFS):
            raise
        raise UsageError(
            f"{os.path.dirname(partial)}: no file can be made there ({os.strerror(error.errno)}): export to another "
            "directory, or to a loop device over the file"
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"{partial}: not a regular file: remove it, export writes there first")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(fd), os.lstat(partial))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:  # or the other has just ended, and renamed or removed what was opened here
            raise UsageError(f"{partial}: another export writes it: wait for its end, or give another name")
        os.fchmod(fd, 0o600)  # images hold the whole system's data: for the owner only, as in the mount
    except BaseException:
        os.close(fd)
        raise
    return fd


def _export_to_device(view: PointInTimeView, path: str, verify: bool) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)  # O_EXCL: refused while mounted or in use
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UsageError(f"{path}: in use (mounted, or part of something): unmount it first") from None
        raise
    try:
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        if size_bytes < view.size_bytes:
            raise UsageError(f"{path}: {size_bytes} bytes, the volume has {view.size_bytes}: too small")
        digest = _write(view, fd, sparse=False, hashed=verify)
        os.fsync(fd)
        if verify:
            _verify(fd, path, view.size_bytes, digest)
    finally:
        os.close(fd)


def _write(view: PointInTimeView, fd: int, *, sparse: bool, hashed: bool) -> str:
    """Writes the image (sparse: without its zeros); returns its xxh3_128 if asked for, else nothing."""
    from pitfs.cli.progress import progress
    from pitfs.view.view import ReadBuffer

    buffer = ReadBuffer(READ_BYTES)
    state = xxh3_128()
    zeros = bytes(READ_BYTES)
    written = flushed = 0
    with progress("export", view.size_bytes) as advance:
        for start, end, is_data in _pieces(view, READ_BYTES, cut_holes=hashed or not sparse):
            if not (is_data or hashed) and sparse:
                advance(end - start)
                continue
            data = view.read(start, end - start, buffer) if is_data else memoryview(zeros)[: end - start]
            if hashed:
                state.update(data)
            if is_data or not sparse:
                write_all(fd, data, start)
                written += len(data)
            if written - flushed >= WRITEBACK_BYTES:
                _start_writeback(fd, start)
                flushed = written
            advance(end - start)
    return state.hexdigest() if hashed else ""


def _pieces(view: PointInTimeView, max_bytes: int, cut_holes: bool) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether there is data) of the whole image, in order, no piece larger than `max_bytes`.

    cut_holes: False: holes in one piece each, however large: there may be TiB of them.
    """
    position, max_hole_bytes = 0, max_bytes if cut_holes else view.size_bytes
    for start, end in view.data_ranges():
        yield from _cut(position, start, False, max_hole_bytes)
        yield from _cut(start, end, True, max_bytes)
        position = end
    yield from _cut(position, view.size_bytes, False, max_hole_bytes)


def _cut(start: int, end: int, is_data: bool, max_bytes: int) -> Iterator[tuple[int, int, bool]]:
    while start < end:
        middle = min(end, start - start % max_bytes + max_bytes)
        yield start, middle, is_data
        start = middle


def _start_writeback(fd: int, offset: int) -> None:
    """DONTNEED starts writing dirty pages of what is done and lets go of the clean ones."""
    os.posix_fadvise(fd, 0, offset, os.POSIX_FADV_DONTNEED)


def _verify(fd: int, path: str, size_bytes: int, digest: str) -> None:
    """Reads what was written back from the disk, not from the page cache, and compares.

    Raises:
        CorruptionError: it isn't what was written.
    """
    from pitfs.cli.progress import progress

    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    state = xxh3_128()
    buffer = memoryview(bytearray(READ_BYTES))
    offset = 0
    with progress("verify", size_bytes) as advance:
        while offset < size_bytes:
            count = os.preadv(fd, [buffer[: size_bytes - offset]], offset)
            if count == 0:
                raise PitfsError(f"{path}: ends at byte {offset} while it is verified: who changed it?")
            state.update(buffer[:count])
            advance(count)
            offset += count
    if state.hexdigest() != digest:
        raise CorruptionError(
            path, 0, f"digest {state.hexdigest()}, the image has {digest}: export the whole image with --force"
        )
