"""The transfer under way: its sections as files, checked as they come, resumable at the last checkpoint.

    staging/progress.json              manifest, lengths, cursor, digests of the rows; replaced durably
    staging/diff.rows, positions.rows, journal.rows
    staging/snapshot-<s>.blocks, journal-<s>.blocks     with header: they become the objects

Rows are staged as they came: block map and journal index are made of them at the end, so a checkpoint has
nothing but lengths to remember. A digest of the rows is kept, because a row that changes on disk could make
another state (contents can't: each block is read against the checksum in its row).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import xxhash

from pitfs.errors import CorruptionError, PositionMismatchError, RemoteProtocolError
from pitfs.model.transfer import (
    DIFF_ENTRY,
    JOURNAL_ENTRY,
    MAX_PAYLOAD_BYTES,
    POSITION,
    UNIT_BYTES,
    Data,
    End,
    Manifest,
    ResumePoint,
    Section,
    Source,
    VolumeInfo,
)
from pitfs.storage.files import durable_replace, read_exactly, write_all
from pitfs.store.expected import WINDOW_SLOTS, ExpectedContents, Rows
from pitfs.store.layout import HEADER_BYTES, ObjectHeader, ObjectKind, object_file
from pitfs.store.rows import DiffCheck, JournalCheck, PositionsCheck, RowArray, has_journal, refuse

PROGRESS: Final = "progress.json"
MAX_PROGRESS_BYTES: Final = 16 << 20
BATCH_ROWS: Final = 1 << 15  # rows in memory at a time when they are read again: about 1 MiB
ROW_DTYPES: Final = {
    Section.DIFF: np.dtype(DIFF_ENTRY),
    Section.POSITIONS: np.dtype(POSITION),
    Section.JOURNAL: np.dtype(JOURNAL_ENTRY),
}
_ROW_FILES: Final = {Section.DIFF: "diff.rows", Section.POSITIONS: "positions.rows", Section.JOURNAL: "journal.rows"}
_CONTENTS: Final = {
    Section.DIFF_BLOCKS: ObjectKind.SNAPSHOT_BLOCKS,
    Section.JOURNAL_BLOCKS: ObjectKind.JOURNAL_BLOCKS,
}
_NO_JOURNAL: Final = (Section.DIFF, Section.DIFF_BLOCKS)


class Progress(msgspec.Struct, frozen=True):
    """What is durable of a staged transfer; `digests` are xxh3_64 of DIFF, POSITIONS, JOURNAL up to `lengths`."""

    manifest: Manifest
    snapshot: int
    lengths: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    cursor: tuple[int, ...] = ()
    digests: tuple[int, int, int] = (0, 0, 0)


def read_progress(directory: str) -> Progress | None:
    """What progress.json says; None if there is none or it isn't whole (then nothing can be resumed)."""
    try:
        with open(os.path.join(directory, PROGRESS), "rb") as file:
            document, _, digest = file.read(MAX_PROGRESS_BYTES).rpartition(b"\n")
    except FileNotFoundError:
        return None
    if digest != xxhash.xxh3_64_hexdigest(document).encode():
        return None
    try:
        return msgspec.json.decode(document, type=Progress)
    except msgspec.MsgspecError:
        return None


class StagedTransfer:
    """One transfer in staging/. After an error it is closed and opened again at its last checkpoint.

    Args:
        directory: staging/ of the store.
        progress: where it stands; files are cut to its lengths.
        history: 16 bytes.
        volumes: of the group.

    Raises:
        CorruptionError: the files aren't those that the progress was written for.
        RemoteProtocolError: rows that can't be.
        OSError: the disk refuses.
    """

    def __init__(
        self,
        directory: str,
        progress: Progress,
        history: bytes,
        volumes: Sequence[VolumeInfo],
    ) -> None:
        self.directory = directory
        self.manifest = progress.manifest
        self.snapshot = progress.snapshot
        self._progress = progress
        self._history = history
        self.has_journal = has_journal(self.manifest)
        self.diff = DiffCheck(volumes, self.manifest)
        self.journal = JournalCheck(volumes, self.manifest)
        self.positions = PositionsCheck(self.manifest)
        slot_units = min(volume.block_size for volume in volumes) // UNIT_BYTES
        self._diff_row = 0  # rows of DIFF before it name only contents that have been verified
        self._expected = {
            Section.DIFF_BLOCKS: ExpectedContents(
                "diff contents", slot_units, self._reread_diff, WINDOW_SLOTS
            ),
            Section.JOURNAL_BLOCKS: ExpectedContents(
                "journal contents", slot_units, self._reread_journal, WINDOW_SLOTS
            ),
        }
        self._lengths = dict.fromkeys(Section, 0)
        self._digests = {section: xxhash.xxh3_64() for section in _ROW_FILES}
        self._fds: dict[Section, int] = {}
        try:
            self._open(progress)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls, directory: str, manifest: Manifest, snapshot: int, history: bytes, volumes: Sequence[VolumeInfo]
    ) -> StagedTransfer:
        """A new one, in an empty directory."""
        for kind in _CONTENTS.values():
            with open(os.path.join(directory, object_file(kind, snapshot)), "wb") as file:
                file.write(ObjectHeader(kind, history, snapshot).encode())
        for name in _ROW_FILES.values():
            with open(os.path.join(directory, name), "wb"):
                pass
        staged = cls(directory, Progress(manifest, snapshot), history, volumes)
        try:
            staged._save(Progress(manifest, snapshot))
        except BaseException:
            staged.close()
            raise
        return staged

    def _open(self, progress: Progress) -> None:
        for section, length in zip(Section, progress.lengths, strict=True):
            fd = os.open(self.path(section), os.O_RDWR | os.O_CLOEXEC)
            self._fds[section] = fd
            end = self._base(section) + length
            if os.fstat(fd).st_size < end:
                raise CorruptionError(
                    self.path(section), end, "the staged file is shorter than was acknowledged"
                )
            os.ftruncate(fd, end)
            self._lengths[section] = length
        for section, digest in zip(_ROW_FILES, progress.digests, strict=True):
            for rows in self.rows(section, verify=False):
                self._digests[section].update(rows.view(np.uint8).data)
                self._check_rows(section, rows)
            if progress.lengths[section - 1] and self._digests[section].intdigest() != digest:
                raise CorruptionError(
                    self.path(section), 0, "the staged rows aren't those that were acknowledged"
                )
        for section, expected in self._expected.items():
            expected.resume(self._lengths[section] // UNIT_BYTES)

    def path(self, section: Section) -> str:
        if section in _ROW_FILES:
            return os.path.join(self.directory, _ROW_FILES[section])
        return os.path.join(self.directory, object_file(_CONTENTS[section], self.snapshot))

    def fd(self, section: Section) -> int:
        return self._fds[section]

    @staticmethod
    def _base(section: Section) -> int:
        return HEADER_BYTES if section in _CONTENTS else 0

    @property
    def lengths(self) -> tuple[int, int, int, int, int]:
        """Bytes of each section that have come."""
        one, two, three, four, five = (self._lengths[section] for section in Section)
        return one, two, three, four, five

    @property
    def resume_point(self) -> ResumePoint:
        """What is durable."""
        return ResumePoint(self._progress.lengths, self._progress.cursor)

    def write(self, frame: Data) -> None:
        """Takes the next bytes of a section; those that it already has are passed over.

        Raises:
            PositionMismatchError: bytes are missing before these.
            RemoteProtocolError: they can't be.
            OSError: the disk refuses.
        """
        section, have = frame.section, self._lengths[frame.section]
        if len(frame.payload) > MAX_PAYLOAD_BYTES:
            raise refuse(
                section.name, f"{len(frame.payload)} bytes in one frame, at most {MAX_PAYLOAD_BYTES} may come"
            )
        if frame.offset > have:
            raise PositionMismatchError(
                f"transfer of mark {self.manifest.mark}, {section.name}: bytes {have} to {frame.offset} are "
                f"missing; the sender has to resume at the replica's position"
            )
        payload = memoryview(frame.payload).cast("B")[have - frame.offset :]
        if not payload:
            return
        if section not in _NO_JOURNAL and not self.has_journal:
            raise refuse(section.name, "it isn't part of such a transfer")
        if section in _CONTENTS:
            self._expected[section].verify(payload, have // UNIT_BYTES)
            write_all(self._fds[section], payload, self._base(section) + have)
            self._lengths[section] = have + len(payload)
            return
        dtype = ROW_DTYPES[section]
        if len(payload) % dtype.itemsize:
            raise refuse(section.name, "a frame that isn't whole rows")
        write_all(self._fds[section], payload, have)
        self._lengths[section] = have + len(payload)
        self._digests[section].update(payload)
        named = self._check_rows(section, np.frombuffer(payload, dtype))
        if named is not None:
            contents = Section.DIFF_BLOCKS if section is Section.DIFF else Section.JOURNAL_BLOCKS
            self._expected[contents].add(named)

    def _check_rows(self, section: Section, rows: np.ndarray[Any, Any]) -> Rows | None:
        if section is Section.POSITIONS:
            self.positions.take(rows)
            return None
        return self.diff.take(rows) if section is Section.DIFF else self.journal.take(rows)

    def checkpoint(self, cursor: tuple[int, ...]) -> ResumePoint:
        """Makes all that has come durable, and remembers the cursor with it. Raises OSError."""
        for section, length in zip(Section, self._progress.lengths, strict=True):
            if self._lengths[section] != length:
                os.fdatasync(self._fds[section])  # before the progress that counts on it
        one, two, three = (self._digests[section].intdigest() for section in _ROW_FILES)
        self._save(Progress(self.manifest, self.snapshot, self.lengths, cursor, (one, two, three)))
        return self.resume_point

    def _save(self, progress: Progress) -> None:
        document = msgspec.json.encode(progress)
        digest = xxhash.xxh3_64_hexdigest(document).encode()
        durable_replace(os.path.join(self.directory, PROGRESS), document + b"\n" + digest)
        self._progress = progress

    def finish(self, end: End) -> None:
        """Checks that all is there.

        Raises:
            RemoteProtocolError: it isn't, or the journal names contents that aren't those.
        """
        m, lengths = self.manifest, self._lengths
        if end.lengths != self.lengths:
            raise RemoteProtocolError(
                f"the transfer of mark {m.mark} ends with sections of {end.lengths} bytes, "
                f"{self.lengths} have come"
            )
        if m.diff_count is not None and self.diff.count != m.diff_count:
            raise refuse("diff", f"{self.diff.count} rows, {m.diff_count} announced")
        if self.journal.count != m.journal_count:
            raise refuse("journal", f"{self.journal.count} rows, {m.journal_count} announced")
        if self.positions.count != m.position_count:
            raise refuse("positions", f"{self.positions.count} rows, {m.position_count} announced")
        if lengths[Section.DIFF_BLOCKS] != self.diff.units * UNIT_BYTES:
            raise refuse("diff contents", "contents that rows name are missing")
        for rows in self.rows(Section.JOURNAL, verify=False):
            for source, contents in (
                (Source.FOURTH, Section.DIFF_BLOCKS), (Source.JOURNAL, Section.JOURNAL_BLOCKS),
            ):  # fmt: skip
                units, sizes, _ = self.journal.named(rows, source)
                if len(units) and int((units + sizes).max()) > lengths[contents] // UNIT_BYTES:
                    raise refuse("journal", "contents that rows name are missing")
        if self.has_journal:
            self._expected[Section.DIFF_BLOCKS].finish(self._fourth_rows)
        self._expected[Section.JOURNAL_BLOCKS].finish()

    def rows(self, section: Section, first: int = 0, verify: bool = True) -> Iterator[RowArray]:
        """The rows of a section from `first` on, in bounded batches.

        Args:
            verify: compare all of them (first 0) with the digest of what came, when the last batch was taken.

        Raises:
            CorruptionError: they aren't what came, or are missing.
        """
        dtype, path, digest = ROW_DTYPES[section], self.path(section), xxhash.xxh3_64()
        offset, end = first * dtype.itemsize, self._lengths[section]
        while offset < end:
            size = min(BATCH_ROWS * dtype.itemsize, end - offset)
            data = read_exactly(self._fds[section], size, offset, path)
            if verify:
                digest.update(data)
            yield np.frombuffer(data, dtype)
            offset += size
        if verify and digest.intdigest() != self._digests[section].intdigest():
            raise CorruptionError(path, 0, "the staged rows aren't those that came")

    def _fourth_rows(self) -> Iterator[Rows]:
        for rows in self.rows(Section.JOURNAL, verify=False):
            yield self.journal.named(rows, Source.FOURTH)

    def _reread_journal(self, first_unit: int, end_unit: int) -> Iterator[Rows]:
        for rows in self.rows(Section.JOURNAL, verify=False):
            yield self.journal.named(rows, Source.JOURNAL)

    def _reread_diff(self, first_unit: int, end_unit: int) -> Iterator[Rows]:
        """Places ascend in DIFF: begins where it last had to, ends where it may."""
        if first_unit == 0:
            self._diff_row = 0
        row, before = self._diff_row, True
        for rows in self.rows(Section.DIFF, row, verify=False):
            units, sizes, checksums = self.journal.named(rows, Source.FOURTH)
            if len(units) and units[0] >= end_unit:
                return
            yield units, sizes, checksums
            row += len(rows)
            before = before and (not len(units) or bool(units[-1] < first_unit))
            if before:
                self._diff_row = row

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
