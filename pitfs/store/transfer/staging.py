"""The transfer under way: its sections are checked as they come, and it resumes at the last checkpoint.

    staging/progress.json              manifest, lengths, cursor, digests; replaced durably
    staging/diff.rows, positions.rows, journal.rows
    staging/diff.checksums, journal.checksums           xxh3_64 of each block of contents that came
    staging/shared.checksums                            at the end, of those that rows of JOURNAL share
    staging/snapshot-<s>.blocks, journal-<s>.blocks     contents; at the end they get their header and are the objects

How it resumes:

1. A checkpoint syncs what grew, then replaces progress.json with the lengths, the digests and the sender's cursor.
   What progress.json says is therefore durable. It is small, since block map and index are made at the end alone.
2. Whoever goes on (after an error, or a new start) opens the files, cuts them to these lengths, reads the rows again
   through their checks, and compares the digests. The checks are then as they were at the checkpoint.
3. The sender is told the lengths and its cursor, and sends from there. Bytes that are there already are skipped, bytes
   behind a hole are refused.
4. A transfer with another manifest, or files that aren't what progress.json says, begins anew.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Final

import msgspec
import xxhash

from pitfs.errors import CorruptionError, PositionMismatchError, RemoteProtocolError
from pitfs.model import transfer as wire
from pitfs.storage.files import durable_replace
from pitfs.store.objects.format import ObjectKind, ObjectName
from pitfs.store.transfer.sections import StagedContents, StagedRows
from pitfs.store.transfer.validation import DiffCheck, JournalCheck, PositionsCheck, refuse
from pitfs.store.transfer.writable_store import WritableStore

PROGRESS: Final = "progress.json"
MAX_PROGRESS_BYTES: Final = 16 << 20
_OF_LAYERS: Final = frozenset({wire.Section.POSITIONS, wire.Section.JOURNAL, wire.Section.JOURNAL_BLOCKS})
Five = tuple[int, int, int, int, int]


class Progress(msgspec.Struct, frozen=True):
    """What is durable of a staged transfer.

    Attributes:
        lengths: bytes of each section; blocks: of DIFF_BLOCKS and JOURNAL_BLOCKS.
        digests: xxh3_64 of DIFF, POSITIONS, JOURNAL and of the checksums of both contents, up to there.
    """

    manifest: wire.Manifest
    snapshot_id: int = msgspec.field(name="snapshot")
    lengths: Five = (0, 0, 0, 0, 0)
    cursor: tuple[int, ...] = ()
    blocks: tuple[int, int] = (0, 0)
    digests: Five = (0, 0, 0, 0, 0)


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
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


class StagedTransfer:
    """One transfer in staging/. After an error it is closed, and opened again at its last checkpoint.

    Args:
        directory: where it is staged.
        progress: how far it has come; files are cut to its lengths.

    Attributes:
        diff, positions, journal, diff_blocks, journal_blocks: its sections.
        runs: of JOURNAL, as far as its rows tell.

    Raises:
        CorruptionError: the files aren't those that the progress was written for.
        RemoteProtocolError: rows are invalid.
        OSError: the disk refuses.
    """

    def __init__(self, directory: str, progress: Progress, store: WritableStore) -> None:
        self.directory, self.manifest, self.snapshot_id = directory, progress.manifest, progress.snapshot_id
        self._progress = progress
        lengths, blocks = progress.lengths, progress.blocks
        checked = store.volumes, self.manifest, store.layout
        diff, journal = DiffCheck(*checked), JournalCheck(*checked)
        self.runs = journal.runs
        with ExitStack() as opened:
            self.diff = StagedRows(directory, wire.Section.DIFF, lengths[0], diff)
            opened.callback(self.diff.close)
            name = ObjectName(ObjectKind.SNAPSHOT_BLOCKS, self.snapshot_id)
            self.diff_blocks = StagedContents(name, lengths[1], blocks[0], self.diff, diff, store)
            opened.callback(self.diff_blocks.close)
            self.positions = StagedRows(directory, wire.Section.POSITIONS, lengths[2], PositionsCheck(self.manifest))
            opened.callback(self.positions.close)
            self.journal = StagedRows(directory, wire.Section.JOURNAL, lengths[3], journal)
            opened.callback(self.journal.close)
            name = ObjectName(ObjectKind.JOURNAL_BLOCKS, self.snapshot_id)
            self.journal_blocks = StagedContents(name, lengths[4], blocks[1], self.journal, journal, store)
            opened.callback(self.journal_blocks.close)
            sections = self.diff, self.diff_blocks, self.positions, self.journal, self.journal_blocks
            self._sections: dict[wire.Section, StagedRows | StagedContents] = dict(
                zip(wire.TRANSFER_SECTIONS, sections, strict=True)
            )
            for section in self._sections.values():
                section.replay()
            if any(lengths) and self._digests() != progress.digests:
                raise CorruptionError(directory, 0, "what is staged isn't what came")
            self._opened = opened.pop_all()

    @classmethod
    def create(cls, directory: str, manifest: wire.Manifest, snapshot_id: int, store: WritableStore) -> StagedTransfer:
        """A new one, in a directory that has none."""
        staged = cls(directory, Progress(manifest, snapshot_id), store)
        with ExitStack() as failed:
            failed.callback(staged.close)
            staged._save(staged._progress)
            failed.pop_all()
        return staged

    @classmethod
    def resume(
        cls, directory: str, manifest: wire.Manifest, snapshot_id: int, store: WritableStore
    ) -> StagedTransfer | None:
        """The one that is staged there, up to its checkpoint; None if there is none from which its sender can go on.

        Raises:
            CorruptionError, RemoteProtocolError, FileNotFoundError: it isn't what came.
        """
        progress = read_progress(directory)
        if progress is None or progress.snapshot_id != snapshot_id:
            return None
        # Why it is no finer may have changed since, and digests may have been due: the manifest that came last says it.
        if msgspec.structs.replace(progress.manifest, cause=manifest.cause, digests=manifest.digests) != manifest:
            return None
        if manifest.kind.resumes_at_cursor and not progress.cursor and any(progress.lengths):
            return None  # an earlier version kept that: its sender couldn't go on
        return cls(directory, msgspec.structs.replace(progress, manifest=manifest), store)

    @property
    def lengths(self) -> Five:
        """Bytes of each section that have come."""
        lengths: Five = msgspec.convert([section.length for section in self._sections.values()], Five)
        return lengths

    @property
    def resume_point(self) -> wire.ResumePoint:
        """What is durable."""
        return wire.ResumePoint(self._progress.lengths, self._progress.cursor)

    def write(self, frame: wire.Data) -> None:
        """Takes the next bytes of a section; those that it already has are passed over.

        Raises:
            PositionMismatchError: bytes are missing before these.
            RemoteProtocolError: they are invalid.
            OSError: the disk refuses.
        """
        section = self._sections[frame.section]
        if len(frame.payload) > wire.MAX_PAYLOAD_BYTES:
            problem = f"{len(frame.payload)} bytes in one frame, at most {wire.MAX_PAYLOAD_BYTES} may come"
            raise refuse(frame.section.name, problem)
        if frame.offset > section.length:
            raise PositionMismatchError(
                f"transfer of mark {self.manifest.mark}, {frame.section.name}: bytes {section.length} to "
                f"{frame.offset} are missing; the sender has to resume at the replica's position"
            )
        payload = memoryview(frame.payload).cast("B")[section.length - frame.offset :]
        if not payload:
            return
        if (frame.section in _OF_LAYERS) != (self.manifest.kind is wire.TransferKind.LAYERS):
            raise refuse(frame.section.name, "it isn't part of such a transfer")
        section.take(payload)

    def checkpoint(self, cursor: tuple[int, ...]) -> wire.ResumePoint:
        """Makes all that has come durable, and remembers the cursor with it. Raises OSError."""
        for section in self._sections.values():
            section.sync()  # before the progress that counts on it
        blocks = self.diff_blocks.checksums.count, self.journal_blocks.checksums.count
        self._save(Progress(self.manifest, self.snapshot_id, self.lengths, cursor, blocks, self._digests()))
        return self.resume_point

    def keep(self) -> None:
        """Makes durable what came since the checkpoint, unless its sender goes on at a cursor. Raises OSError."""
        p = self._progress
        if not self.manifest.kind.resumes_at_cursor and not p.cursor and self.lengths != p.lengths:
            self.checkpoint(())

    def _digests(self) -> Five:
        rows, contents = (self.diff, self.positions, self.journal), (self.diff_blocks, self.journal_blocks)
        arrays = *rows, *(each.checksums for each in contents)
        digests: Five = msgspec.convert([array.digest.intdigest() for array in arrays], Five)
        return digests

    def _save(self, progress: Progress) -> None:
        document = msgspec.json.encode(progress)
        digest = xxhash.xxh3_64_hexdigest(document).encode()
        durable_replace(os.path.join(self.directory, PROGRESS), document + b"\n" + digest)
        self._progress = progress

    def finish(self, end: wire.End) -> None:
        """Checks that all is there, and is what the splitter took in. Raises RemoteProtocolError: it isn't."""
        m = self.manifest
        if end.lengths != self.lengths:
            raise RemoteProtocolError(
                f"the transfer of mark {m.mark} ends with sections of {end.lengths} bytes, {self.lengths} have come"
            )
        self.diff.finish(m.diff_count)
        self.journal.finish(m.journal_count)
        self.positions.finish(m.position_count)
        diff_taken, journal_taken = end.checksums or (None, None)
        self.diff_blocks.finish(diff_taken)
        self.journal_blocks.finish(journal_taken)

    def close(self) -> None:
        self._opened.close()
