"""Incremental export: brings an earlier export to another instant by writing only what differs.

Every block that will be overwritten is read first: it must hold what it held at the instant that FILE is said to
hold, or already what it is to become (by its checksum). Else nothing is written. Blocks that do not differ are not
read; `verify` reads them all.

While the update is under way FILE holds neither image. A marker says so in its first 512 bytes (a sector, which a disk
writes whole or not). It is written first, and the image's bytes in its place last; each write is synced:

    offset size, little-endian
     0      8    magic     "PITFSUPD"
     8      8    version   1
    16     16    history   of the store
    32     64    volume    its name, padded with zeros
    96     16    seq and time_ns of one instant
   112     16    the same of the other
   128    376    zeros
   504      8    checksum  xxh3_64 of bytes 0..504

An update that finds a marker can only go on between the same two instants, in either direction. It checks nothing
first, since a power cut may have left half a block. A volume of less than 512 bytes is written in one go.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.errors import PitfsError, UsageError
from pitfs.model.position import Position
from pitfs.restore.digest import READ_BYTES, Progress, image_digest, verify_copy
from pitfs.restore.export import open_target
from pitfs.storage.files import disk_errors, punch, read_exactly, write_all
from pitfs.store.store import Resolution, Store
from pitfs.view.differences import BoolArray, Difference, DifferingLeaf
from pitfs.view.ranges import cut, runs
from pitfs.view.view import ReadBuffer

MAGIC: Final = b"PITFSUPD"
VERSION: Final = 1
MARKER: Final = struct.Struct("<8sQ16s64sqqqq376x")
CHECKSUM: Final = struct.Struct("<Q")
MARKER_BYTES: Final = 512
assert MARKER.size + CHECKSUM.size == MARKER_BYTES


@dataclass(frozen=True, slots=True)
class Marker:
    """The volume, and the two instants between which the file is."""

    history: bytes  # 16
    volume: str
    from_position: Position
    to_position: Position

    def encode(self) -> bytes:
        """512 bytes."""
        start, end = self.from_position, self.to_position
        positions = start.seq, start.time_ns, end.seq, end.time_ns
        body = MARKER.pack(MAGIC, VERSION, self.history, self.volume.encode(), *positions)
        return body + CHECKSUM.pack(xxh3_64_intdigest(body))

    @classmethod
    def decode(cls, data: bytes) -> Marker | None:
        """None if the data are no marker."""
        body = data[: MARKER.size]
        if len(data) < MARKER_BYTES or CHECKSUM.unpack_from(data, MARKER.size)[0] != xxh3_64_intdigest(body):
            return None
        magic, version, history, volume, *positions = MARKER.unpack(body)
        if (magic, version) != (MAGIC, VERSION):
            return None
        name = volume.rstrip(b"\0").decode("utf-8", "replace")
        return cls(history, name, Position(*positions[:2]), Position(*positions[2:]))


def incremental_export(
    store: Store, from_state: Resolution, to_state: Resolution, volume: int, path: str,
    *, verify: bool, progress: Progress,
) -> int:  # fmt: skip
    """Writes what differs into a file or block device that holds the volume at `from_state`; durable when it returns.

    Args:
        verify: compare the digest of the whole file afterwards.

    Returns:
        bytes that differed.

    Raises:
        UsageError: it is of another size, in use, or between two other instants; nothing was written.
        PitfsError: it does not hold that image: nothing was written. Or the disk fails: the message says so.
        CorruptionError: an object of the store, or the file, is damaged.
    """
    difference = Difference(store, from_state, to_state, volume)
    info = store.volumes[volume]
    positions = (Position(state.seq, state.time_ns) for state in (from_state, to_state))
    marker = Marker(bytes.fromhex(store.history), info.name, *positions)
    with disk_errors(path, "mend that, and run it again: it goes on"):
        if not os.path.exists(path):
            raise UsageError(f"{path}: not there: --from needs an earlier export; leave it out for a new one")
        with open_target(path) as (fd, size_bytes):
            is_file = stat.S_ISREG(os.fstat(fd).st_mode)
            if size_bytes < info.size_bytes or (is_file and size_bytes != info.size_bytes):
                raise UsageError(f"{path}: {size_bytes} bytes, the volume has {info.size_bytes}: not an export of it")
            found = Marker.decode(os.pread(fd, MARKER_BYTES, 0))
            if found is not None:
                _check_marker(found, marker, store, path)
            changed_bytes = _check_target(difference, fd, path, found is not None, progress)
            if changed_bytes or found is not None:
                _write_changes(difference, fd, marker, progress)
            if verify:
                digest = image_digest(difference.views[1], progress, "digest")
                verify_copy(fd, path, info.size_bytes, digest, progress)
    return changed_bytes


def _check_marker(found: Marker, wanted: Marker, store: Store, path: str) -> None:
    """Raises UsageError where an update was interrupted that this one can't finish."""
    if (found.history, found.volume) != (wanted.history, wanted.volume):
        raise UsageError(
            f"{path}: an update of it from another store or volume ({found.volume}) was interrupted: finish that, or "
            "export the whole image with --force"
        )
    if {found.from_position, found.to_position} != {wanted.from_position, wanted.to_position}:
        raise UsageError(
            f"{path}: an update of it was interrupted: finish it first: pitfs export {store.path} "
            f"{found.to_position.instant} {found.volume} {path} --from {found.from_position.instant}"
        )


def _check_target(difference: Difference, fd: int, path: str, resumed: bool, progress: Progress) -> int:
    """Reads what will be overwritten. Returns the bytes that differ.

    Args:
        resumed: only counts them. The check was done before the update began, and a power cut may have left half a
            block.
    """
    changed_bytes, size_bytes, block_size = 0, difference.size_bytes, difference.block_size
    for leaf in _with_progress(difference, progress, "check"):
        for first, last in _runs(leaf.differs, block_size):
            offset = (leaf.first + first) * block_size
            size = min((last - first) * block_size, size_bytes - offset)
            changed_bytes += size
            if resumed:
                continue
            data = memoryview(read_exactly(fd, size, offset, path).ljust((last - first) * block_size, b"\0"))
            blocks = [data[i : i + block_size] for i in range(0, len(data), block_size)]
            sums = np.array(list(map(xxh3_64_intdigest, blocks)), np.uint64)
            good = (sums == leaf.from_checksums[first:last]) | (sums == leaf.to_checksums[first:last])
            if not good.all():
                raise _other_image(path, offset + int(np.flatnonzero(~good)[0]) * block_size)
    first_bytes = min(block_size, size_bytes)
    if changed_bytes and not resumed:  # the marker overwrites the first block also where it does not differ
        found = os.pread(fd, first_bytes, 0)
        if all(found != view.read(0, first_bytes, ReadBuffer(first_bytes)) for view in difference.views):
            raise _other_image(path, 0)
    return changed_bytes


def _with_progress(difference: Difference, progress: Progress, title: str) -> Iterator[DifferingLeaf]:
    with progress(title, difference.size_bytes) as reached:
        for leaf in difference.leaves():
            yield leaf
            reached(min((leaf.first + len(leaf.differs)) * difference.block_size, difference.size_bytes))


def _other_image(path: str, offset: int) -> PitfsError:
    return PitfsError(
        f"{path}: byte {offset} isn't what the volume had there at --from: it was exported at another instant, or "
        "written to since: nothing was changed; say the right instant, or export the whole image with --force"
    )


def _write_changes(difference: Difference, fd: int, marker: Marker, progress: Progress) -> None:
    """Writes what differs, the first sector last."""
    size_bytes, block_size = difference.size_bytes, difference.block_size
    marker_bytes = MARKER_BYTES if size_bytes >= MARKER_BYTES else 0
    view, buffer = difference.views[1], ReadBuffer(READ_BYTES)
    if marker_bytes:
        write_all(fd, marker.encode(), 0)
        os.fsync(fd)
    for leaf in _with_progress(difference, progress, "export"):
        for is_zeros in (True, False):
            for first, last in _runs(leaf.differs & (leaf.to_zeros == is_zeros), block_size):
                offset = max((leaf.first + first) * block_size, marker_bytes)
                end = min((leaf.first + last) * block_size, size_bytes)
                if offset < end and not (is_zeros and punch(fd, offset, end - offset)):
                    write_all(fd, view.read(offset, end - offset, buffer), offset)
    os.fsync(fd)
    if marker_bytes:
        write_all(fd, view.read(0, MARKER_BYTES, buffer), 0)
        os.fsync(fd)


def _runs(mask: BoolArray, block_size: int) -> Iterator[tuple[int, int]]:
    """[first, last) of each run of true values, in pieces that are small enough to be read at once."""
    for first, last in runs(mask).tolist():
        yield from cut(first, last, READ_BYTES // block_size)
