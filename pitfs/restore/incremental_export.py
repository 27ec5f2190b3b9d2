"""`pitfs export --from`: brings an earlier export to another instant by writing only what differs.

Before anything is written, every block that will be is read: it must be what it was at the instant that FILE is said
to hold, or what it is to become (by its checksum: what isn't so is refused, what is so is overwritten all the same).
Blocks that don't differ aren't read: --verify reads them all.

While it is under way FILE holds neither image. So that nobody takes it for one, its first 512 bytes (a sector, which
a disk writes whole or not at all) say so. They come first, and what belongs there comes last, each synced:

    offset size, little-endian
     0      8    magic     "PITFSUPD"
     8      8    version   1
    16     16    history   of the store
    32     64    volume    its name, padded with zeros
    96     16    seq and time_ns of one instant
   112     16    the same of the other
   128    376    zeros
   504      8    checksum  xxh3_64 of bytes 0..504

Whoever finds them there can only go on between the same two instants, in either direction; what was cut off may be half
a block, so nothing is read first then. A volume of less than
512 bytes is written in one go.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.cli.progress import progress
from pitfs.errors import CapacityError, PitfsError, UsageError
from pitfs.model.position import Position
from pitfs.storage.files import FULL_ERRNOS, punch, read_exactly, write_all
from pitfs.view.ranges import runs
from pitfs.view.view import ReadBuffer

if TYPE_CHECKING:
    from pitfs.store.store import Resolution, Store
    from pitfs.view.differences import BoolArray, Difference, DifferingLeaf

MAGIC: Final = b"PITFSUPD"
VERSION: Final = 1
MARKER: Final = struct.Struct("<8sQ16s64sqqqq")
_CHECKSUM: Final = struct.Struct("<Q")
MARKER_BYTES: Final = 512
READ_BYTES: Final = 1 << 20
assert MARKER.size == 128


@dataclass(frozen=True, slots=True)
class Marker:
    """Between which instants of which volume a file is."""

    history: bytes  # 16
    volume: str
    one: Position
    other: Position

    def encode(self) -> bytes:
        """512 bytes."""
        positions = self.one.seq, self.one.time_ns, self.other.seq, self.other.time_ns
        body = MARKER.pack(MAGIC, VERSION, self.history, self.volume.encode(), *positions)
        body = body.ljust(MARKER_BYTES - _CHECKSUM.size, b"\0")
        return body + _CHECKSUM.pack(xxh3_64_intdigest(body))

    @classmethod
    def decode(cls, data: bytes) -> Marker | None:
        """None if that is no marker."""
        body = data[: MARKER_BYTES - _CHECKSUM.size]
        if len(data) < MARKER_BYTES or not data.startswith(MAGIC):
            return None
        if _CHECKSUM.unpack_from(data, len(body))[0] != xxh3_64_intdigest(body):
            return None
        _, version, history, volume, *positions = MARKER.unpack_from(data)
        if version != VERSION:
            return None
        name = volume.rstrip(b"\0").decode("utf-8", "replace")
        return cls(history, name, Position(*positions[:2]), Position(*positions[2:]))


def bring(store: Store, one: Resolution, other: Resolution, volume: int, path: str) -> int:
    """Makes of a file or block device that holds a volume at `one` the volume at `other`; durable when it returns.

    Returns:
        bytes that differed.

    Raises:
        UsageError: it is of another size, in use, or between two other instants; nothing was written.
        PitfsError: it isn't what it is said to be: nothing was written. Or the disk refuses: it says so.
        CorruptionError: of the store: as before.
    """
    from pitfs.view.differences import Difference

    difference = Difference(store, one, other, volume)
    info = store.volumes[volume]
    fd = _open(path, info.size_bytes)
    try:
        marker = Marker(
            bytes.fromhex(store.history), info.name, Position(one.seq, one.time_ns), Position(other.seq, other.time_ns)
        )
        found = Marker.decode(os.pread(fd, MARKER_BYTES, 0))
        if found is not None:
            _check_marker(found, marker, store, path)
        changed_bytes = _check(difference, fd, path, found is not None)
        if changed_bytes or found is not None:
            _write(difference, fd, marker)
        return changed_bytes
    except OSError as error:
        kind = CapacityError if error.errno in FULL_ERRNOS else PitfsError
        raise kind(f"{path}: {os.strerror(error.errno or 0)}: mend that, and run it again: it goes on") from error
    finally:
        os.close(fd)


def _open(path: str, size_bytes: int) -> int:
    """Opens it so that no other export has it, nor, as far as the kernel can tell, anybody else for writing."""
    from pitfs.splitter.backing import written_by_others

    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UsageError(f"{path}: neither a regular file nor a block device")
        if stat.S_ISREG(mode) and written_by_others(path):
            raise UsageError(f"{path}: in use: see who writes it with fuser -v {path}, and stop that first")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if stat.S_ISBLK(mode) else 0))
    except FileNotFoundError:
        raise UsageError(f"{path}: not there: --from is for an export that is; leave it out for a new one") from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UsageError(f"{path}: in use (mounted, or part of something): unmount it first") from None
        raise
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.lseek(fd, 0, os.SEEK_END)
        if size < size_bytes or (stat.S_ISREG(mode) and size != size_bytes):
            raise UsageError(f"{path}: {size} bytes, the volume has {size_bytes}: not an export of it")
    except BlockingIOError:
        os.close(fd)
        raise UsageError(f"{path}: another export writes it: wait for its end") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_marker(found: Marker, wanted: Marker, store: Store, path: str) -> None:
    """Raises UsageError where an update was interrupted that this one can't finish."""
    if (found.history, found.volume) != (wanted.history, wanted.volume):
        raise UsageError(
            f"{path}: an update of it from another store or volume ({found.volume}) was interrupted: finish that, or "
            "export the whole image with --force"
        )
    if {found.one, found.other} != {wanted.one, wanted.other}:
        raise UsageError(
            f"{path}: an update of it was interrupted: finish it first: pitfs export {store.path} "
            f"{found.other.instant} {found.volume} {path} --from {found.one.instant}"
        )


def _check(difference: Difference, fd: int, path: str, resumed: bool) -> int:
    """Reads what will be overwritten. Returns the bytes that differ.

    Args:
        resumed: nothing is looked at: it was before it began, and all of it will be written; what a power cut left may
            be half of a block.
    """
    changed_bytes, size_bytes, block_size = 0, difference.size_bytes, difference.block_size
    for leaf in _followed(difference, "check"):
        for first, last in _cut(leaf.differs, block_size):
            offset = (leaf.first + first) * block_size
            size = min((last - first) * block_size, size_bytes - offset)
            changed_bytes += size
            if resumed:
                continue
            data = memoryview(read_exactly(fd, size, offset, path).ljust((last - first) * block_size, b"\0"))
            blocks = [data[i : i + block_size] for i in range(0, len(data), block_size)]
            sums = np.array(list(map(xxh3_64_intdigest, blocks)), np.uint64)
            good = (sums == leaf.one[first:last]) | (sums == leaf.other[first:last])
            if not good.all():
                raise _untrue(path, offset + int(np.flatnonzero(~good)[0]) * block_size)
    first_bytes = min(block_size, size_bytes)
    if changed_bytes and not resumed:  # the first block is written also where it doesn't differ
        found = os.pread(fd, first_bytes, 0)
        if all(found != view.read(0, first_bytes, ReadBuffer(first_bytes)) for view in difference.views):
            raise _untrue(path, 0)
    return changed_bytes


def _followed(difference: Difference, title: str) -> Iterator[DifferingLeaf]:
    """The leaves, with progress."""
    with progress(title, difference.size_bytes) as advance:
        position = 0
        for leaf in difference.leaves():
            yield leaf
            end = min((leaf.first + len(leaf.differs)) * difference.block_size, difference.size_bytes)
            advance(end - position)
            position = end


def _untrue(path: str, at: int) -> PitfsError:
    return PitfsError(
        f"{path}: byte {at} isn't what the volume had there at --from: it was exported at another instant, or written "
        "to since: nothing was changed; say the right instant, or export the whole image with --force"
    )


def _write(difference: Difference, fd: int, marker: Marker) -> None:
    """Writes what differs, the first sector last."""
    size_bytes, block_size = difference.size_bytes, difference.block_size
    marker_bytes = MARKER_BYTES if size_bytes >= MARKER_BYTES else 0
    view, buffer = difference.views[1], ReadBuffer(READ_BYTES)
    if marker_bytes:
        write_all(fd, marker.encode(), 0)
        os.fsync(fd)
    for leaf in _followed(difference, "export"):
        for is_zeros, first, last in _pieces(leaf, block_size):
            offset = (leaf.first + first) * block_size
            end = min((leaf.first + last) * block_size, size_bytes)
            offset = max(offset, marker_bytes)
            if offset < end and not (is_zeros and punch(fd, offset, end - offset)):
                write_all(fd, view.read(offset, end - offset, buffer), offset)
    os.fsync(fd)
    if marker_bytes:
        write_all(fd, view.read(0, MARKER_BYTES, buffer), 0)
        os.fsync(fd)


def _pieces(leaf: DifferingLeaf, block_size: int) -> Iterator[tuple[bool, int, int]]:
    """(whether they become zeros, first, end) of runs of blocks that differ, small enough to be read at once."""
    for is_zeros in (True, False):
        for first, last in _cut(leaf.differs & (leaf.zeros == is_zeros), block_size):
            yield is_zeros, first, last


def _cut(mask: BoolArray, block_size: int) -> Iterator[tuple[int, int]]:
    step = READ_BYTES // block_size
    for first, last in runs(mask).tolist():
        for start in range(first, last, step):
            yield start, min(start + step, last)
