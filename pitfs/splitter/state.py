"""The splitter's state, and its checkpoints: what it must know after a crash besides the journal.

The file `progress` has two slots of 16384 bytes, which are written in turn and in place: so it can be written on a
full disk, and a torn write leaves the other slot. A slot is the length of a message (4 bytes, little-endian), its
xxh3_64 (8 bytes), and the message (msgpack of `Progress`). The valid slot with the greater generation counts.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Final

import msgspec
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError
from pitfs.journal.writer import Location
from pitfs.model.record import CopyStart
from pitfs.splitter.change_bitmap import ChangeBitmap
from pitfs.storage.files import closed_on_error, fsync_directory, write_all

NOWHERE: Final = Location(0, 0)
SLOT_BYTES: Final = 16384  # a group's 256 volumes take 40 bytes each; the cause of a bypass names a path
_SLOT: Final = struct.Struct("<IQ")


@dataclass(slots=True)
class SplitterState:
    """What recovery finds, and checkpoints keep.

    Attributes:
        seq, position_time_ns: position of the last write.
        time_ns: the last time given to any record.
        mark: the last mark, which began the open interval.
        interval_blocks, interval_bytes: written in the open interval, and what it takes in the journal.
        copy: the running copy, None if there is none; copy_location: of its COPY_START.
        bypass_cause: why writes bypass the journal; empty while they are journalled.
        change_bitmap: during a bypass and during a copy of changes: what may differ from a state that the replica
            has, or will have from the journal. None then: everything may.
        given_up_seq: writes up to that one that were wanted for backfill were given up, since room was needed.
    """

    seq: int = 0
    position_time_ns: int = 0
    time_ns: int = 0
    mark: int = 0
    interval_blocks: int = 0
    interval_bytes: int = 0
    copy: CopyStart | None = None
    copy_location: Location = NOWHERE
    bypass_cause: str = ""
    change_bitmap: ChangeBitmap | None = None
    given_up_seq: int = 0

    def begin_interval(self, mark: int) -> None:
        """An interval closed, or a copy began: `mark` was journalled."""
        self.mark, self.interval_blocks, self.interval_bytes = mark, 0, 0


class BackingState(msgspec.Struct, frozen=True):
    """A backing volume at a checkpoint: it shows whether somebody wrote it while the splitter was down."""

    size_bytes: int
    mtime_ns: int


class Progress(msgspec.Struct, frozen=True):
    """A checkpoint.

    Attributes:
        clean: the splitter was closed in order, and the backing volumes are as `backings` says.
        boot_id: of the boot that wrote it. If it is another one and not clean, power was lost.
        bypass_cause: why writes bypass the journal; empty while they are journalled.
        checkpoint_segment, checkpoint_lsn: the backing volumes durably have every record up to that lsn;
            that segment holds the records after it.
        seq, position_time_ns, time_ns, mark, interval_blocks, interval_bytes, given_up_seq: as in `SplitterState`.
        copy_segment: where the COPY_START of the running copy is, 0 if none runs.
        change_bitmap_checksum: xxh3_64 of the file with the change bitmap, if it was closed in order during a bypass;
            else 0.
    """

    generation: int
    clean: bool
    boot_id: str
    bypass_cause: str = msgspec.field(name="passing")
    checkpoint_segment: int
    checkpoint_lsn: int
    seq: int
    position_time_ns: int
    time_ns: int
    mark: int
    copy_segment: int
    backings: tuple[BackingState, ...]
    change_bitmap_checksum: int = msgspec.field(default=0, name="changes")
    interval_blocks: int = 0  # these three are missing in checkpoints of older versions
    interval_bytes: int = 0
    given_up_seq: int = 0

    @property
    def recovery_segment(self) -> int:
        """The segment from which a recovery reads: behind the checkpoint, and all of the running copy."""
        return min(self.checkpoint_segment, self.copy_segment or self.checkpoint_segment)


def boot_id() -> str:
    """The kernel's id of this boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


class ProgressFile:
    """The `progress` file of a state directory. One thread of one process writes it at a time.

    Args:
        begins: the journal has no segment yet; else a missing file is damage: taken for a new state directory, the
            journal would be thrown away.

    Raises:
        CorruptionError: it is missing beside a journal, or cut short.
    """

    def __init__(self, state: str, begins: bool = True) -> None:
        self.path = os.path.join(state, "progress")
        if not begins and not os.path.exists(self.path):
            ways_out = "put it back, or move the state directory away to begin anew with a full sync"
            raise CorruptionError(self.path, 0, f"it is missing, and there is a journal: {ways_out}")
        self._generation = 0
        with closed_on_error(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as self.fd:
            size = os.fstat(self.fd).st_size
            if size < 2 * SLOT_BYTES:
                if any(os.pread(self.fd, size, 0)):
                    problem = f"neither slot is valid: {size} bytes of {2 * SLOT_BYTES} are left"
                    raise CorruptionError(self.path, 0, problem)
                write_all(self.fd, bytes(2 * SLOT_BYTES), 0)
                os.fsync(self.fd)
                fsync_directory(state)

    def read(self) -> Progress | None:
        """The newest checkpoint, None if there is none yet. Raises CorruptionError if neither slot is valid."""
        found: list[Progress] = []
        blank = 0
        for slot in (0, 1):
            data = os.pread(self.fd, SLOT_BYTES, slot * SLOT_BYTES)
            size, checksum = _SLOT.unpack_from(data)
            message = data[_SLOT.size : _SLOT.size + size]
            blank += not any(data)
            if size and len(message) == size and xxh3_64_intdigest(message) == checksum:
                found.append(msgspec.msgpack.decode(message, type=Progress))
        if not found and not blank:
            raise CorruptionError(self.path, 0, "neither slot is valid")
        return max(found, key=lambda progress: progress.generation, default=None)

    def write(self, progress: Progress) -> None:
        """Makes `progress` durable in the slot of its generation, unless a later one is there. Raises OSError."""
        message = msgspec.msgpack.encode(progress)
        slot = _SLOT.pack(len(message), xxh3_64_intdigest(message)) + message
        if progress.generation < self._generation:
            return
        write_all(self.fd, slot.ljust(SLOT_BYTES, b"\0"), progress.generation % 2 * SLOT_BYTES)
        os.fdatasync(self.fd)
        self._generation = progress.generation

    def close(self) -> None:
        os.close(self.fd)
