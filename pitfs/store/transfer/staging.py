"""The transfer under way: its sections as files, checked as they come, resumable at the last checkpoint.

    staging/progress.json              manifest, lengths, cursor, digests; replaced durably
    staging/diff.rows, positions.rows, journal.rows
    staging/diff.checksums, journal.checksums           xxh3_64 of each block of contents that came
    staging/shared.checksums                            at the end, of those that rows of JOURNAL share (see shared.py)
    staging/snapshot-<s>.blocks, journal-<s>.blocks     with header: they become the objects

Rows are staged as they came: block map and journal index are made of them at the end, so a checkpoint has
nothing but lengths to remember. Digests of rows and checksums are kept, because one that changes on disk could make
another state (contents can't: each block is read against its checksum).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import xxhash

from pitfs.errors import CorruptionError, PositionMismatchError, RemoteProtocolError
from pitfs.model.blockmap import I64Array, U64Array
from pitfs.model.record import block_checksums
from pitfs.model.transfer import (
    DIFF_ENTRY,
    JOURNAL_ENTRY,
    MAX_PAYLOAD_BYTES,
    POSITION,
    TRANSFER_SECTIONS,
    UNIT_BYTES,
    Data,
    End,
    Manifest,
    ResumePoint,
    Section,
    Source,
    TransferKind,
    VolumeInfo,
)
from pitfs.storage.files import durable_replace, read_exactly, write_all
from pitfs.store.objects.format import HEADER_BYTES, ObjectHeader, ObjectKind, object_file
from pitfs.store.transfer.validation import (
    BlockSizes,
    DiffCheck,
    JournalCheck,
    PositionsCheck,
    RowArray,
    refuse,
)

PROGRESS: Final = "progress.json"
MAX_PROGRESS_BYTES: Final = 16 << 20
BATCH_ROWS: Final = 1 << 15  # rows in memory at a time when they are read again: about 1 MiB
ROW_DTYPES: Final = {
    Section.DIFF: np.dtype(DIFF_ENTRY),
    Section.POSITIONS: np.dtype(POSITION),
    Section.JOURNAL: np.dtype(JOURNAL_ENTRY),
}
_CHECKSUM: Final = np.dtype("<u8")
_ROW_FILES: Final = {Section.DIFF: "diff.rows", Section.POSITIONS: "positions.rows", Section.JOURNAL: "journal.rows"}
_CHECKSUM_FILES: Final = {Section.DIFF_BLOCKS: "diff.checksums", Section.JOURNAL_BLOCKS: "journal.checksums"}
_CONTENTS: Final = {
    Section.DIFF_BLOCKS: ObjectKind.SNAPSHOT_BLOCKS,
    Section.JOURNAL_BLOCKS: ObjectKind.JOURNAL_BLOCKS,
}
_ROWS_OF: Final = {Section.DIFF_BLOCKS: Section.DIFF, Section.JOURNAL_BLOCKS: Section.JOURNAL}
_OWN: Final = {Section.DIFF_BLOCKS: Source.FOURTH, Section.JOURNAL_BLOCKS: Source.JOURNAL}
NOT_TAKEN: Final = "they aren't those whose checksums were taken at the splitter"
_OF_LAYERS: Final = frozenset({Section.POSITIONS, Section.JOURNAL, Section.JOURNAL_BLOCKS})


class Progress(msgspec.Struct, frozen=True):
    """What is durable of a staged transfer.

    Attributes:
        lengths: bytes of each section; blocks: of DIFF_BLOCKS and JOURNAL_BLOCKS.
        digests: xxh3_64 of DIFF, POSITIONS, JOURNAL and of the checksums of both contents, up to there.
    """

    manifest: Manifest
    snapshot: int
    lengths: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    cursor: tuple[int, ...] = ()
    blocks: tuple[int, int] = (0, 0)
    digests: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)


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
        directory: where it is staged.
        progress: where it stands; files are cut to its lengths.
        history: 16 bytes.
        volumes: of the group.

    Raises:
        CorruptionError: the files aren't those that the progress was written for.
        RemoteProtocolError: rows that can't be.
        OSError: the disk refuses.
    """

    def __init__(
        self, directory: str, progress: Progress, history: bytes, volumes: Sequence[VolumeInfo]
    ) -> None:
        self.directory = directory
        self.manifest = progress.manifest
        self.snapshot = progress.snapshot
        self._progress = progress
        self._history = history
        self._block_sizes = np.array([volume.block_size for volume in volumes], "<i8")
        self.diff = DiffCheck(volumes, self.manifest)
        self.journal = JournalCheck(volumes, self.manifest)
        self.positions = PositionsCheck(self.manifest)
        self._lengths = dict.fromkeys(TRANSFER_SECTIONS, 0)
        self._blocks = dict.fromkeys(_CONTENTS, 0)  # that have come
        self._sizes = {section: BlockSizes(self._own_sizes(section)) for section in _CONTENTS}
        self._digests = {section: xxhash.xxh3_64() for section in (*_ROW_FILES, *_CONTENTS)}
        self._taken: dict[Section, tuple[xxhash.xxh3_64, int]] = {}  # checksums as found, and as told by End
        self._fds: dict[Section, int] = {}
        self._checksum_fds: dict[Section, int] = {}
        try:
            self._open(progress)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls, directory: str, manifest: Manifest, snapshot: int, history: bytes, volumes: Sequence[VolumeInfo]
    ) -> StagedTransfer:
        """A new one, in a directory with none."""
        for kind in _CONTENTS.values():
            with open(os.path.join(directory, object_file(kind, snapshot)), "wb") as file:
                file.write(ObjectHeader(kind, history, snapshot).encode())
        for name in (*_ROW_FILES.values(), *_CHECKSUM_FILES.values()):
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
        for section, length in zip(TRANSFER_SECTIONS, progress.lengths, strict=True):
            self._fds[section] = self._open_cut(self.path(section), self._base(section) + length)
            self._lengths[section] = length
        for section, count in zip(_CONTENTS, progress.blocks, strict=True):
            path = os.path.join(self.directory, _CHECKSUM_FILES[section])
            self._checksum_fds[section] = self._open_cut(path, count * _CHECKSUM.itemsize)
            self._blocks[section] = count
        for section in _ROW_FILES:
            for rows in self.rows(section, verify=False):
                self._digests[section].update(rows.view(np.uint8).data)
                self._check_rows(section, rows)
        for section, count in zip(_CONTENTS, progress.blocks, strict=True):
            for checksums in self._checksums(section, 0, count):
                self._digests[section].update(checksums.data.cast("B"))
            if self._sizes[section].skip(count) != self._lengths[section]:
                raise CorruptionError(self.path(section), 0, "the staged contents aren't those of the staged rows")
        if any(progress.lengths) and self._digests_now() != progress.digests:
            raise CorruptionError(self.directory, 0, "what is staged isn't what came")

    def _open_cut(self, path: str, end: int) -> int:
        """Opens a staged file and cuts what came after the checkpoint."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size < end:
                raise CorruptionError(path, end, "the staged file is shorter than was acknowledged")
            os.ftruncate(fd, end)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def path(self, section: Section) -> str:
        """Where a section is staged."""
        name = _ROW_FILES.get(section) or object_file(_CONTENTS[section], self.snapshot)
        return os.path.join(self.directory, name)

    def fd(self, section: Section) -> int:
        return self._fds[section]

    @staticmethod
    def _base(section: Section) -> int:
        return HEADER_BYTES if section in _CONTENTS else 0

    @property
    def lengths(self) -> tuple[int, int, int, int, int]:
        """Bytes of each section that have come."""
        one, two, three, four, five = (self._lengths[section] for section in TRANSFER_SECTIONS)
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
        if (section in _OF_LAYERS) != (self.manifest.kind is TransferKind.LAYERS):
            raise refuse(section.name, "it isn't part of such a transfer")
        if section in _CONTENTS:
            self._take_contents(section, payload)
            return
        dtype = ROW_DTYPES[section]
        if len(payload) % dtype.itemsize:
            raise refuse(section.name, "a frame that isn't whole rows")
        self._check_rows(section, np.frombuffer(payload, dtype))
        write_all(self._fds[section], payload, have)
        self._lengths[section] = have + len(payload)
        self._digests[section].update(payload)

    def _check_rows(self, section: Section, rows: np.ndarray[Any, Any]) -> None:
        if section is Section.POSITIONS:
            self.positions.take(rows)
        elif section is Section.DIFF:
            self.diff.take(rows)
        else:
            self.journal.take(rows)

    def _take_contents(self, section: Section, payload: memoryview) -> None:
        """Whole blocks of the next rows that have any; their checksums are taken here."""
        have = self._lengths[section]
        sizes = self._sizes[section].next(len(payload))
        if sizes is None:
            raise refuse(section.name, f"contents at byte {have} that no row named, or that aren't whole blocks")
        if (sizes == sizes[0]).all():
            found = block_checksums(payload, int(sizes[0]))
        else:
            ends = np.cumsum(sizes).tolist()
            found = [
                xxhash.xxh3_64_intdigest(payload[end - size : end])
                for size, end in zip(sizes.tolist(), ends, strict=True)
            ]
        checksums = np.array(found, _CHECKSUM).data.cast("B")
        write_all(self._fds[section], payload, self._base(section) + have)
        write_all(self._checksum_fds[section], checksums, self._blocks[section] * _CHECKSUM.itemsize)
        self._lengths[section] = have + len(payload)
        self._blocks[section] += len(sizes)
        self._digests[section].update(checksums)

    def _own_sizes(self, section: Section) -> Iterator[I64Array | None]:
        """Sizes of the blocks in a section of contents, as its rows name them; None: no more have come yet."""
        first = 0
        while True:
            before = first
            for rows in self.rows(_ROWS_OF[section], first, verify=False):
                first += len(rows)
                yield self._block_sizes[rows["volume"][rows["source"] == _OWN[section]]]
            if first == before:  # else more may have come while these were used
                yield None

    def checkpoint(self, cursor: tuple[int, ...]) -> ResumePoint:
        """Makes all that has come durable, and remembers the cursor with it. Raises OSError."""
        for section, length in zip(TRANSFER_SECTIONS, self._progress.lengths, strict=True):
            if self._lengths[section] != length:
                os.fdatasync(self._fds[section])  # before the progress that counts on it
                if section in _CONTENTS:
                    os.fdatasync(self._checksum_fds[section])
        blocks = self._blocks[Section.DIFF_BLOCKS], self._blocks[Section.JOURNAL_BLOCKS]
        self._save(Progress(self.manifest, self.snapshot, self.lengths, cursor, blocks, self._digests_now()))
        return self.resume_point

    def keep(self) -> None:
        """Makes durable what came since the checkpoint, unless its sender goes on at a cursor. Raises OSError."""
        p = self._progress
        if self.manifest.kind is not TransferKind.FULL and not p.cursor and self.lengths != p.lengths:
            self.checkpoint(())

    def _digests_now(self) -> tuple[int, int, int, int, int]:
        one, two, three, four, five = (digest.intdigest() for digest in self._digests.values())
        return one, two, three, four, five

    def _save(self, progress: Progress) -> None:
        document = msgspec.json.encode(progress)
        digest = xxhash.xxh3_64_hexdigest(document).encode()
        durable_replace(os.path.join(self.directory, PROGRESS), document + b"\n" + digest)
        self._progress = progress

    def finish(self, end: End) -> None:
        """Checks that all is there, and is what the splitter took in.

        Raises:
            RemoteProtocolError: it isn't.
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
        for section, units in (
            (Section.DIFF_BLOCKS, self.diff.units), (Section.JOURNAL_BLOCKS, self.journal.units)
        ):  # fmt: skip
            if lengths[section] != units * UNIT_BYTES:
                raise refuse(section.name, "contents that rows name are missing")
        shared = self.diff.shared, self.journal.shared
        for section, count, taken in zip(_CONTENTS, shared, end.checksums or (None, None), strict=True):
            if taken is None and count:
                raise refuse(section.name, "rows that share contents, without the checksums taken at the splitter")
            digest = self._digests[section].copy()
            self._taken[section] = digest, digest.intdigest() if taken is None else taken
            if not count:
                self.check_shared(section)  # before anything is made of it

    def take_shared(self, section: Section, checksums: U64Array) -> None:
        """After `finish`: those of the contents there that the next rows share, as they were found."""
        self._taken[section][0].update(checksums.data.cast("B"))

    def check_shared(self, section: Section) -> None:
        """Compares those of all contents, and behind them all shared ones, with what was taken at the splitter.

        Raises:
            RemoteProtocolError: they aren't the same.
        """
        digest, taken = self._taken[section]
        if digest.intdigest() != taken:
            raise refuse("contents", NOT_TAKEN)

    def rows(
        self, section: Section, first: int = 0, end: int | None = None, verify: bool = True,
        batch_rows: int = BATCH_ROWS,
    ) -> Iterator[RowArray]:  # fmt: skip
        """The rows of a section from `first` on, before `end`, in bounded batches.

        Args:
            verify: compare all of them (first 0) with the digest of what came, when the last batch was taken.

        Raises:
            CorruptionError: they aren't what came, or are missing.
        """
        dtype, path, digest = ROW_DTYPES[section], self.path(section), xxhash.xxh3_64()
        stop = self._lengths[section] if end is None else end * dtype.itemsize
        for offset in range(first * dtype.itemsize, stop, batch_rows * dtype.itemsize):
            size = min(batch_rows * dtype.itemsize, stop - offset)
            data = read_exactly(self._fds[section], size, offset, path)
            if verify:
                digest.update(data)
            yield np.frombuffer(data, dtype)
        if verify and digest.intdigest() != self._digests[section].intdigest():
            raise CorruptionError(path, 0, "the staged rows aren't those that came")

    def verify(self, section: Section) -> None:
        """Compares what is staged with the digest of what came: rows, or the checksums of contents.

        Raises:
            CorruptionError: it isn't that.
        """
        if section in _ROW_FILES:
            for _ in self.rows(section):
                pass
            return
        digest = xxhash.xxh3_64()
        for checksums in self._checksums(section, 0, self._blocks[section]):
            digest.update(checksums.data.cast("B"))
        if digest.intdigest() != self._digests[section].intdigest():
            path = os.path.join(self.directory, _CHECKSUM_FILES[section])
            raise CorruptionError(path, 0, "the staged checksums aren't those of what came")

    def checksums(self, section: Section, block: int, count: int) -> U64Array:
        """Of `count` blocks of a section of contents from number `block` on."""
        parts = list(self._checksums(section, block, block + count))
        return np.concatenate(parts) if parts else np.zeros(0, _CHECKSUM)

    def _checksums(self, section: Section, first: int, end: int) -> Iterator[U64Array]:
        path = os.path.join(self.directory, _CHECKSUM_FILES[section])
        for start in range(first, end, BATCH_ROWS):
            size = min(BATCH_ROWS, end - start) * _CHECKSUM.itemsize
            data = read_exactly(self._checksum_fds[section], size, start * _CHECKSUM.itemsize, path)
            yield np.frombuffer(data, _CHECKSUM)

    def close(self) -> None:
        for fd in (*self._fds.values(), *self._checksum_fds.values()):
            os.close(fd)
        self._fds.clear()
        self._checksum_fds.clear()
