"""What the splitter must know after a crash besides the journal: the group's identity and its progress.

`group.json`: format, history, volumes; written once.

`epoch`: of the sender and which one it is (JSON of `Epoch`); replaced at each start of it.

`changes`: see `production.changes`.

`progress`: two slots of 16384 bytes, written in turn in place, so that it can be written on a full disk and
a torn write leaves the other slot. A slot is the length of a message (4 bytes, little-endian), its xxh3_64
(8 bytes), and the message (msgpack of `Progress`); the valid slot with the greater generation counts.
"""

from __future__ import annotations

import os
import secrets
import struct
import threading
from typing import Final

import msgspec
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, StoreVersionError, UsageError
from pitfs.model.transfer import VolumeInfo
from pitfs.storage.files import FULL_ERRNOS, durable_replace, fsync_directory, storage_error, write_all

FORMAT: Final = 1
INSTANCE_BITS: Final = 62  # a number that the link and SQLite take
SLOT_BYTES: Final = 16384  # a group's 256 volumes take 40 bytes each; the cause of passing names a path
_SLOT: Final = struct.Struct("<IQ")


class GroupFile(msgspec.Struct, frozen=True):
    format: int
    history: str
    group: str
    volumes: tuple[VolumeInfo, ...]


class Epoch(msgspec.Struct, frozen=True):
    """See `Hello`."""

    epoch: int
    instance: int


def next_epoch(state: str, now_ms: int) -> Epoch:
    """The epoch of a sender that starts now: greater than any before it. Durable.

    By the clock, so that a state put back, or a damaged file, doesn't go back behind what the replica knows.
    On a full disk the one before it: sending, which gives room, goes on with that.

    Raises:
        PitfsError: the disk refuses.
    """
    path = os.path.join(state, "epoch")
    before = Epoch(0, 0)
    try:
        try:
            with open(path, "rb") as file:
                before = msgspec.json.decode(file.read(), type=Epoch)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            pass  # the first one, or as good as that
        epoch = Epoch(max(before.epoch + 1, now_ms), secrets.randbits(INSTANCE_BITS))
        durable_replace(path, msgspec.json.encode(epoch))
    except OSError as error:
        if error.errno in FULL_ERRNOS:
            return before
        raise storage_error(error, path, "beginning an epoch") from error
    return epoch


class BackingState(msgspec.Struct, frozen=True):
    """What tells whether a backing volume was written while the splitter was down."""

    size_bytes: int
    mtime_ns: int


class Progress(msgspec.Struct, frozen=True):
    """Where the splitter stands.

    Attributes:
        clean: closed in order; the backing volumes are then as `backings` says.
        boot_id: of the boot that wrote it: another one and not clean means that power was lost.
        passing: why writes pass without being journalled; empty while they are journalled.
        checkpoint_segment, checkpoint_lsn: the backing volumes durably have every record up to that lsn;
            that segment holds the records after it.
        seq, position_time_ns: position of the last write at the checkpoint.
        time_ns: the last time given to a record at the checkpoint.
        mark: the last mark at the checkpoint.
        copy_segment: where the COPY_START of the running copy is, 0 if none runs.
        changes: clean and passing: xxh3_64 of the file `changes`, which has what changed since passing began; else 0.
    """

    generation: int
    clean: bool
    boot_id: str
    passing: str
    checkpoint_segment: int
    checkpoint_lsn: int
    seq: int
    position_time_ns: int
    time_ns: int
    mark: int
    copy_segment: int
    backings: tuple[BackingState, ...]
    changes: int = 0


def boot_id() -> str:
    """The kernel's id of this boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def read_group(state: str) -> GroupFile | None:
    """The group's identity, None if the state has never been made.

    Raises:
        CorruptionError, StoreVersionError.
    """
    path = os.path.join(state, "group.json")
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    try:
        group = msgspec.json.decode(content, type=GroupFile)
    except msgspec.DecodeError as error:
        raise CorruptionError(path, 0, str(error)) from error
    if group.format > FORMAT:
        raise StoreVersionError(
            f"{path}: format {group.format}, this pitfs knows {FORMAT}: use a newer pitfs"
        )
    return group


def open_group(state: str, name: str, volumes: tuple[VolumeInfo, ...]) -> GroupFile:
    """The group's identity; made and made durable if the state is new.

    Raises:
        UsageError: the configuration's volumes aren't those that the state was made for.
        CorruptionError, StoreVersionError.
    """
    group = read_group(state)
    if group is None:
        group = GroupFile(FORMAT, secrets.token_hex(16), name, volumes)
        durable_replace(os.path.join(state, "group.json"), msgspec.json.format(msgspec.json.encode(group)))
        return group
    if group.group != name:
        raise UsageError(
            f"{state}: is the state of group {group.group!r}, not {name!r}: give each group its own `state`"
        )
    known = {volume.name: volume for volume in group.volumes}
    for volume in volumes:
        before = known.get(volume.name)
        if before is not None and before.size_bytes != volume.size_bytes:
            raise UsageError(
                f"volume {volume.name!r}: its backing changed in size from {before.size_bytes} to "
                f"{volume.size_bytes} bytes: give it its size back, or begin a new group (new `name` and `state`)"
            )
        if before is not None and before.block_size != volume.block_size:
            raise UsageError(
                f"volume {volume.name!r}: block_size was {before.block_size} and can't change to {volume.block_size}"
            )
    if group.volumes != volumes:
        raise UsageError(
            f"{state}: was made for volumes {', '.join(known)}: volumes can't be added, removed or reordered; "
            "begin a new group (new `name` and `state`)"
        )
    return group


class ProgressFile:
    """The `progress` file of a state directory. One process writes it at a time.

    Args:
        begins: the journal has no segment yet; else a missing file is damage.

    Raises:
        CorruptionError: it is missing beside a journal, or cut short.
    """

    def __init__(self, state: str, begins: bool = True) -> None:
        self.path = os.path.join(state, "progress")
        if not begins and not os.path.exists(self.path):  # taken for new, the journal would be thrown away
            raise CorruptionError(
                self.path,
                0,
                "it is missing, and there is a journal: put it back, or move the state directory away "
                "to begin anew with a full copy",
            )
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._generation = 0
        size = os.fstat(self.fd).st_size
        if size < 2 * SLOT_BYTES:
            if any(os.pread(self.fd, size, 0)):  # taken for new, the journal would be thrown away
                os.close(self.fd)
                raise CorruptionError(
                    self.path, 0, f"neither slot is valid: {size} bytes of {2 * SLOT_BYTES} are left"
                )
            write_all(self.fd, bytes(2 * SLOT_BYTES), 0)
            os.fsync(self.fd)
            fsync_directory(state)

    def read(self) -> Progress | None:
        """The newest progress, None if none was written yet.

        Raises:
            CorruptionError: both slots were written and neither is valid.
        """
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
        """Makes `progress` durable in the slot of its generation, unless a later one is. Raises OSError."""
        message = msgspec.msgpack.encode(progress)
        slot = _SLOT.pack(len(message), xxh3_64_intdigest(message)) + message
        with self._lock:  # a checkpoint's thread and the event loop may both come here
            if progress.generation < self._generation:
                return
            write_all(self.fd, slot.ljust(SLOT_BYTES, b"\0"), progress.generation % 2 * SLOT_BYTES)
            os.fdatasync(self.fd)
            self._generation = progress.generation

    def close(self) -> None:
        os.close(self.fd)
