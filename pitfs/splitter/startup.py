"""Starting the splitter: open the backing volumes, recover, and decide whether a copy is due."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Final

from pitfs.errors import CapacityError, UsageError
from pitfs.journal.writer import Journal
from pitfs.model.transfer import VolumeInfo
from pitfs.splitter.change_bitmap import bitmap_limit_bytes, load_bitmap, remove_bitmap
from pitfs.splitter.identity import open_group
from pitfs.splitter.recovery import recover
from pitfs.splitter.splitter import Splitter
from pitfs.splitter.state import Progress, ProgressFile, boot_id
from pitfs.splitter.volume import Volume, open_volume
from pitfs.storage.files import FULL_ERRNOS, fsync_directory, storage_error
from pitfs.storage.segment import list_segments

log = logging.getLogger(__name__)

MTIME_MARGIN_NS: Final = 2_000_000_000  # at most, between journalling a write and writing it to the backing volume


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """What the configuration says of a volume."""

    name: str
    backing: str
    block_size: int


def journal_directory(state: str) -> str:
    return os.path.join(state, "journal")


def lock_state(state: str) -> int:
    """Makes the state directory and locks it by the descriptor. Raises UsageError if another splitter has it."""
    try:
        os.makedirs(journal_directory(state), mode=0o700, exist_ok=True)
        fsync_directory(state)
        fd = os.open(os.path.join(state, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in FULL_ERRNOS:
            raise storage_error(error, state, "making the state directory") from error
        raise UsageError(f"{error.filename}: state directory: {os.strerror(error.errno or 0)}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        problem = "another 'pitfs protect' is running with this state: stop it first"
        raise UsageError(f"{state}: {problem}") from error
    return fd


def open_splitter(
    state: str, group: str, specs: list[VolumeSpec], capacity_bytes: int, block_when_full: bool,
    clock_ns: Callable[[], int],
) -> Splitter:  # fmt: skip
    """Brings the group to where writes can be accepted: recovered, redone, and with a copy begun if one is due.

    Args:
        state: directory, locked by `lock_state`.

    Raises:
        UsageError: a backing volume or the state doesn't fit the configuration.
        CorruptionError: the journal is damaged.
        PitfsError: a disk refuses.
    """
    with ExitStack() as opened:  # all of it is closed where the start fails
        splitter = _open(opened, state, group, specs, capacity_bytes, block_when_full, clock_ns)
        opened.pop_all()
    return splitter


def _open(
    opened: ExitStack, state: str, group: str, specs: list[VolumeSpec], capacity_bytes: int, block_when_full: bool,
    clock_ns: Callable[[], int],
) -> Splitter:  # fmt: skip
    """As `open_splitter`; what it opens goes into `opened`."""
    volumes = [
        opened.enter_context(closing(open_volume(spec.name, spec.backing, spec.block_size))) for spec in specs
    ]
    infos = tuple(VolumeInfo(volume.name, volume.size_bytes, volume.block_size) for volume in volumes)
    history = bytes.fromhex(open_group(state, group, infos).history)
    directory = journal_directory(state)
    progress_file = opened.enter_context(closing(ProgressFile(state, begins=not list_segments(directory))))
    progress = progress_file.read()
    boot, limit_bytes = boot_id(), bitmap_limit_bytes(capacity_bytes)
    mtimes_ns = [volume.mtime_ns for volume in volumes]  # before redo changes them
    generation, next_lsn = (progress.generation, progress.checkpoint_lsn + 1) if progress else (0, 1)
    try:
        recovered, tail = recover(directory, history, volumes, progress, limit_bytes)
        journal = opened.enter_context(closing(Journal(directory, history, capacity_bytes, tail, next_lsn)))
        splitter = Splitter(
            volumes, journal, recovered, progress_file, generation, clock_ns, boot, block_when_full
        )
        cause = _copy_cause(progress, boot, volumes, mtimes_ns, recovered.time_ns)
        if progress is not None and progress.bypass_cause:
            # Until there is room for a copy, writes go on bypassing the journal: production doesn't wait for it.
            recovered.bypass_cause, checksum = progress.bypass_cause, progress.change_bitmap_checksum
            if progress.clean and checksum and cause is None:  # nobody else wrote: the bitmap is all that changed
                recovered.change_bitmap = load_bitmap(state, checksum, len(volumes), limit_bytes)
            splitter.checkpoints.write(splitter.snapshot_progress())
            remove_bitmap(state)
        elif cause is not None:
            if cause:
                log.warning("%s: a full sync follows, instants until now stay as they are", cause)
            try:
                splitter.start_copy(cause)
            except CapacityError:  # no segment is ready
                journal.prepare_spare()
                splitter.start_copy(cause)
            splitter.checkpoints.settle()
        else:
            splitter.checkpoints.write(splitter.snapshot_progress())
    except OSError as error:
        raise storage_error(error, error.filename or directory, "starting the splitter") from error
    return splitter


def _copy_cause(
    progress: Progress | None, boot: str, volumes: list[Volume], mtimes_ns: list[int], last_time_ns: int
) -> str | None:
    """Why a full sync must begin now: "" for the first one, None for none.

    Args:
        mtimes_ns: of the backing volumes as they were found.
        last_time_ns: of the last record of the journal.
    """
    if progress is None:
        return ""
    if not progress.clean:
        # The backing volume may have writes that no fsync waited for, and that the journal's disk doesn't have.
        if progress.boot_id != boot:
            return "power was lost on the production host"
        # The splitter wrote to a backing volume only what it had just journalled.
        changed = [mtime_ns > last_time_ns + MTIME_MARGIN_NS for mtime_ns in mtimes_ns]
    else:
        pairs = zip(mtimes_ns, progress.backings, strict=True)
        changed = [mtime_ns != before.mtime_ns for mtime_ns, before in pairs]
    for volume, by_others in zip(volumes, changed, strict=True):
        if by_others:
            return f"{volume.path}: was changed while pitfs wasn't running"
    return None
