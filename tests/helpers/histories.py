"""Stores of any length and size, made fast through the store's own ways in: streams and transfers.

    with LongHistory(tmp, VolumeInfo("root", 2 << 30, 4096)) as history:     # group "long", a store in tmp/long
        history.full_copy(block_count=10_000)          # snapshot 1: so many blocks at the start have data
        history.snapshots(1_000, blocks_each=16)       # each with some strewn blocks
        writes = history.interval(10**7, span=1 << 20) # one interval, every write of it an instant
        history.snapshots(1_000)
        history.seconds(60); history.unchanged(10**6)  # a second each; the latter take hardly any room or time
    history.path                                       # what Store.open, pitfs and mount.pitfs take

What a block holds follows from the write that wrote it, so any state can be checked without having kept it:
`block_contents(seq, size)`. Nothing grows with the number of writes but the store. Without syncs, unless asked for:
what is made here needn't survive a power loss.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from unittest import mock

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.model.blockmap import MapEntry
from pitfs.model.record import block_checksums
from pitfs.model.transfer import (
    DIFF_ENTRY,
    JOURNAL_ENTRY,
    POSITION,
    WRITE,
    Data,
    End,
    Hello,
    Manifest,
    Section,
    Source,
    StreamMark,
    TransferKind,
    VolumeInfo,
    Writes,
)
from pitfs.store.catalog import database
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Commit, Interval, Snapshot
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG, OBJECTS, Layout, ObjectKind, ObjectName, ObjectRecord
from pitfs.store.opening import read_store_info

START_NS: Final = 1_763_855_640_000_000_000
STEP_NS: Final = 1_000_000  # between writes: 10**7 take not quite three hours
SNAPSHOT_STEP_NS: Final = 1_000_000_000
BATCH_BYTES: Final = 4 << 20
BATCH_ROWS: Final = 32 << 10
BATCH_COMMITS: Final = 4096

I64 = npt.NDArray[np.int64]


@contextmanager
def unsynced() -> Iterator[None]:
    """The store's syncs do nothing in it: of this process, and of all its stores."""
    with ExitStack() as stack:
        for name in ("fsync", "fdatasync"):
            stack.enter_context(mock.patch.object(os, name, _no_sync))
        for name in ("DURABLE", "NOT_DURABLE"):
            stack.enter_context(mock.patch.object(database, name, "OFF"))
        yield


def _no_sync(fd: int) -> None:
    """In the place of os.fsync."""


def block_contents(seq: int, size: int) -> bytes:
    """What write `seq` put into a block, where it isn't zeros; 0: what the full copy put there."""
    return (2 * seq + 1).to_bytes(8, "little") * (size // 8)


def _contents(seqs: I64, size: int) -> memoryview:
    """`block_contents` of each, one behind the other."""
    return np.repeat((2 * seqs + 1).astype("<u8"), size // 8).data.cast("B")


@dataclass(frozen=True, slots=True)
class StrewnWrites:
    """Writes of one block each, all blocks of a stretch over and over, in an order that is none for the eye.

    Write i (from 0 on) goes to block `first_block` + (i * odd mod `span`) * `stride`; `span` is a power of two.
    Every `data_every`th write (by i) has contents, the others zeros.
    """

    count: int
    from_seq: int
    from_time_ns: int
    first_block: int
    span: int
    stride: int
    data_every: int

    _ODD = 0x9E3779B97F4A7C15 | 1

    def seq(self, number: int) -> int:
        return self.from_seq + 1 + number

    def time_ns(self, number: int) -> int:
        return self.from_time_ns + STEP_NS * (1 + number)

    def blocks(self, numbers: I64) -> I64:
        """The block that each of these writes goes to."""
        return self.first_block + numbers % self.span * (self._ODD % self.span) % self.span * self.stride

    def numbers(self, block: int) -> range:
        """Writes that go to that block, ascending."""
        place, beside = divmod(block - self.first_block, self.stride)
        if beside or not 0 <= place < self.span:
            return range(0)
        return range(place * pow(self._ODD, -1, self.span) % self.span, self.count, self.span)

    def has_data(self, numbers: I64) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = numbers % self.data_every == 0
        return found

    def state(self, block: int, seq: int, size: int) -> bytes | None:
        """What that block holds after write `seq`; None if none of these writes has written it by then."""
        numbers = [number for number in self.numbers(block) if self.seq(number) <= seq]
        if not numbers:
            return None
        last = numbers[-1]
        return block_contents(self.seq(last), size) if last % self.data_every == 0 else bytes(size)

    def sorted_batches(self, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[I64, I64, npt.NDArray[np.bool_]]]:
        """(block, number of the write, is it the block's last) of all writes, ascending by (block, number)."""
        rounds = -(-self.count // self.span)
        inverse = pow(self._ODD, -1, self.span)
        step = max(1, batch_rows // rounds)
        for start in range(0, self.span, step):
            places = np.arange(start, min(start + step, self.span), dtype=np.int64)
            firsts = places * inverse % self.span  # below 2**62, as span is at most 2**31
            numbers = (firsts[:, None] + np.arange(rounds, dtype=np.int64) * self.span).ravel()
            blocks = self.first_block + np.repeat(places, rounds) * self.stride
            there = numbers < self.count
            numbers, blocks = numbers[there], blocks[there]
            if len(numbers):
                yield blocks, numbers, np.append(blocks[1:] != blocks[:-1], True)


class LongHistory:
    """One group with one volume, and its store, which is written through `Ingest`.

    Args:
        root: directory of the stores.
        synced: whether the store makes durable what it has, as it does in earnest.

    Attributes:
        path: of the store. seq, time_ns: where the history ends.
    """

    def __init__(self, root: Path, volume: VolumeInfo, *, group: str = "long", synced: bool = False) -> None:
        self.volume = volume
        self.hello = Hello(group, "5ca1e".rjust(32, "0"), (volume,))
        self.seq, self.time_ns, self._mark = 0, START_NS, 0
        self._random = np.random.default_rng(1)
        self._stack = ExitStack()
        if not synced:
            self._stack.enter_context(unsynced())
        root.mkdir(exist_ok=True)
        self.ingest = Ingest(str(root), self.hello)
        self.path = Path(self.ingest.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        self.ingest.close()
        self._stack.close()

    # Ways in

    def full_copy(self, block_count: int = 0, first_block: int = 0) -> None:
        """The first snapshot: so many blocks from `first_block` on have data, all others are zeros."""
        blocks = np.arange(first_block, first_block + block_count, dtype=np.int64)
        self._diff(TransferKind.FULL, self.seq, self.time_ns, [blocks])

    def snapshots(self, count: int, blocks_each: int = 1, first_block: int = 0, span: int | None = None) -> None:
        """Snapshots without journals, a second apart, each with a write to every one of some strewn blocks."""
        span = self.volume.block_count - first_block if span is None else span
        for _ in range(count):
            blocks = first_block + np.unique(self._random.integers(0, span, blocks_each))
            self._diff(TransferKind.INTERVAL, self.seq + len(blocks), self.time_ns + SNAPSHOT_STEP_NS, [blocks])

    def interval(
        self, count: int, span: int, first_block: int = 0, stride: int = 1, data_every: int = 16, *,
        streamed: bool = True, is_open: bool = False,
    ) -> StrewnWrites:  # fmt: skip
        """An interval at every write.

        Args:
            count, span, first_block, stride, data_every: see StrewnWrites.
            streamed: as production streams it; else as a transfer of the diff, then one of the journal.
            is_open: leave it open.
        """
        assert span & (span - 1) == 0 and first_block + (span - 1) * stride < self.volume.block_count
        writes = StrewnWrites(count, self.seq, self.time_ns, first_block, span, stride, data_every)
        if streamed:
            self._stream(writes, is_open)
        else:
            self._transfer(writes)
        return writes

    def seconds(self, count: int, writes_each: int = 4) -> None:
        """Streamed intervals, a second apart, each with some writes in its first milliseconds."""
        for number in range(count):
            begun_ns = self.time_ns
            self.interval(writes_each, 1, first_block=number % self.volume.block_count, data_every=1)
            self.time_ns = begun_ns + SNAPSHOT_STEP_NS

    def unchanged(self, count: int) -> None:
        """Snapshots a second apart that changed nothing: thousands in a second, with no room on the disk but rows.

        As many rows and names as if they had been streamed, at two ids each. But the files of their objects are empty,
        since no reader opens them: the roots of a block map that nothing changed are those before it.
        """
        catalog, layout = Catalog(str(self.path / CATALOG), "write"), self.ingest_layout
        last = catalog.last_snapshot()
        assert last is not None
        roots, base_id, snapshot_id = catalog.roots(last.id), last.id, catalog.next_snapshot_id() + 1
        for start in range(0, count, BATCH_COMMITS):
            with catalog.changes():
                for _ in range(start, min(start + BATCH_COMMITS, count)):
                    catalog.commit(self._unchanged(base_id, snapshot_id, roots, layout))
                    base_id, snapshot_id = snapshot_id, snapshot_id + 2
        catalog.close()

    def mark(self) -> None:
        """Closes the open interval, and waits until it has become a snapshot."""
        self._mark += 1
        self.ingest.mark(StreamMark(self._mark, self.seq, self.time_ns, self.time_ns))
        self.wait()

    def wait(self) -> None:
        """Until no closing is under way."""
        self.ingest.stream.wait_for_closing()

    # How they go

    @property
    def ingest_layout(self) -> Layout:
        return read_store_info(str(self.path)).layout

    def _unchanged(self, base_id: int, snapshot_id: int, roots: list[MapEntry], layout: Layout) -> Commit:
        self._mark += 1
        from_seq, from_ns, cause = self.seq, self.time_ns, "snapshots only"
        to_ns = from_ns + SNAPSHOT_STEP_NS
        manifest = self._manifest(TransferKind.INTERVAL, from_seq + 1, to_ns, 0)
        self.seq, self.time_ns = from_seq + 1, to_ns
        snapshot = Snapshot(snapshot_id, self.seq, to_ns, self._mark)
        interval = Interval(
            snapshot_id, base_id, from_seq, from_ns, self.seq, to_ns, manifest.first_time_ns, None, cause, 0
        )  # fmt: skip
        objects = []
        for kind in (ObjectKind.MAP, ObjectKind.SNAPSHOT_BLOCKS):
            file = ObjectName(kind, snapshot_id).file
            objects.append(ObjectRecord(file, kind, snapshot_id, 0))
            path = self.path / OBJECTS / layout.path_of(file)
            if snapshot_id & 0xFF < 2:
                path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        minutes = {to_ns // 60_000_000_000: 1 << to_ns // 1_000_000_000 % 60}
        return Commit(manifest, snapshot, roots, interval, objects, minutes)

    def _manifest(self, kind: TransferKind, to_seq: int, to_time_ns: int, diff_count: int | None) -> Manifest:
        return Manifest(
            mark=self._mark, kind=kind, from_seq=self.seq, from_time_ns=self.time_ns, to_seq=to_seq,
            to_time_ns=to_time_ns, first_time_ns=None if to_seq == self.seq else self.time_ns + 1,
            protected_through_ns=to_time_ns, granularity_ns=None, cause="snapshots only", diff_count=diff_count,
            journal_count=0, position_count=0, identity=f"{kind} {self._mark}",
        )  # fmt: skip

    def _diff(self, kind: TransferKind, to_seq: int, to_time_ns: int, batches: list[I64]) -> None:
        """A transfer whose rows all have data."""
        self._mark += 1
        ingest, size = self.ingest, self.volume.block_size
        diff_count = None if kind is TransferKind.FULL else sum(map(len, batches))
        ingest.begin(self._manifest(kind, to_seq, to_time_ns, diff_count))
        rows_bytes = contents_bytes = 0
        for blocks in batches:
            for part in np.array_split(blocks, -(-len(blocks) * size // (1 << 20)) or 1):
                if len(part):
                    rows = np.zeros(len(part), DIFF_ENTRY)
                    rows["block"], rows["source"] = part, Source.SNAPSHOT
                    ingest.data(Data(Section.DIFF, rows_bytes, rows.tobytes()))
                    rows_bytes += rows.nbytes
                    contents = _contents(np.full(len(part), to_seq, np.int64), size)
                    ingest.data(Data(Section.DIFF_BLOCKS, contents_bytes, contents))
                    contents_bytes += len(contents)
        ingest.end(End((rows_bytes, contents_bytes, 0, 0, 0)))
        self.seq, self.time_ns = to_seq, to_time_ns

    def _stream(self, writes: StrewnWrites, is_open: bool) -> None:
        size = self.volume.block_size
        step = min(BATCH_ROWS, BATCH_BYTES // size)
        zero_checksum = xxh3_64_intdigest(bytes(size))
        for start in range(0, writes.count, step):
            numbers = np.arange(start, min(start + step, writes.count), dtype=np.int64)
            data = writes.has_data(numbers)
            seqs = writes.from_seq + 1 + numbers
            rows = np.zeros(len(numbers), WRITE)
            rows["block"], rows["block_count"] = writes.blocks(numbers), 1
            rows["time_ns"] = writes.from_time_ns + STEP_NS * (1 + numbers)
            contents = np.zeros((len(numbers), size // 8), "<u8")
            contents[data] = (2 * seqs[data] + 1).astype("<u8")[:, None]
            checksums = np.full(len(numbers), zero_checksum, "<u8")
            checksums[data] = block_checksums(contents[data].data.cast("B"), size)
            digest = xxh3_64_intdigest(checksums.data.cast("B"))
            self.ingest.write(Writes(int(seqs[0]), rows, contents.data.cast("B"), digest))
            self.seq, self.time_ns = int(seqs[-1]), int(rows["time_ns"][-1])
        if is_open:
            self.ingest.publish()
        else:
            self.mark()

    def _transfer(self, writes: StrewnWrites) -> None:
        """The diff, then all layers at once."""
        from_seq, from_ns = self.seq, self.time_ns
        to_seq, to_ns = from_seq + writes.count, from_ns + STEP_NS * writes.count
        self._mark += 1
        manifest = self._manifest(TransferKind.INTERVAL, to_seq, to_ns, min(writes.span, writes.count))
        sections = _Sections(self.ingest, self.volume.block_size)
        self.ingest.begin(manifest)
        for blocks, numbers, is_last in writes.sorted_batches():
            sections.diff(blocks[is_last], from_seq + 1 + numbers[is_last], writes.has_data(numbers[is_last]))
        self.ingest.end(End(sections.lengths))
        sections = _Sections(self.ingest, self.volume.block_size)
        layers = {
            "kind": TransferKind.LAYERS, "granularity_ns": 0, "base_granularity_ns": None, "diff_count": 0, "cause": "",
            "journal_count": writes.count, "position_count": writes.count, "identity": f"layers {self._mark}",
        }  # fmt: skip
        self.ingest.begin(Manifest(**{name: getattr(manifest, name) for name in manifest.__struct_fields__} | layers))
        for start in range(0, writes.count, BATCH_ROWS):
            numbers = np.arange(start, min(start + BATCH_ROWS, writes.count), dtype=np.int64)
            sections.positions(from_seq + 1 + numbers, from_ns + STEP_NS * (1 + numbers))
        for blocks, numbers, is_last in writes.sorted_batches():
            sections.journal(blocks, from_seq + 1 + numbers, writes.has_data(numbers), is_last)
        self.ingest.end(End(sections.lengths))
        self.seq, self.time_ns = to_seq, to_ns


class _Sections:
    """Feeds sections to a transfer that has begun, with checkpoints as a sender makes them."""

    def __init__(self, ingest: Ingest, block_size: int) -> None:
        self._ingest, self._size = ingest, block_size
        self._lengths = [0] * 5
        self._since = 0

    @property
    def lengths(self) -> tuple[int, int, int, int, int]:
        one, two, three, four, five = self._lengths
        return one, two, three, four, five

    def _put(self, section: Section, data: memoryview) -> None:
        """In frames of at most a MiB; these are whole rows and blocks, as their sizes divide it."""
        for start in range(0, len(data), 1 << 20):
            part = data[start : start + (1 << 20)]
            self._ingest.data(Data(section, self._lengths[section - 1], part))
            self._lengths[section - 1] += len(part)
            self._since += len(part)
        if self._since >= 16 << 20:
            self._since = 0
            self._ingest.checkpoint(())

    def diff(self, blocks: I64, seqs: I64, data: npt.NDArray[np.bool_]) -> None:
        for part in np.array_split(np.arange(len(blocks)), -(-len(blocks) // BATCH_ROWS)):
            rows = np.zeros(len(part), DIFF_ENTRY)
            rows["block"] = blocks[part]
            rows["source"] = np.where(data[part], Source.SNAPSHOT, Source.ZERO)
            self._put(Section.DIFF, memoryview(rows.tobytes()))
        self._put(Section.DIFF_BLOCKS, _contents(seqs[data], self._size))

    def positions(self, seqs: I64, times_ns: I64) -> None:
        rows = np.zeros(len(seqs), POSITION)
        rows["seq"], rows["time_ns"] = seqs, times_ns
        self._put(Section.POSITIONS, memoryview(rows.tobytes()))

    def journal(self, blocks: I64, seqs: I64, data: npt.NDArray[np.bool_], is_last: npt.NDArray[np.bool_]) -> None:
        rows = np.zeros(len(blocks), JOURNAL_ENTRY)
        rows["block"], rows["seq"] = blocks, seqs
        rows["source"] = np.where(data, np.where(is_last, Source.SNAPSHOT, Source.JOURNAL), Source.ZERO)
        self._put(Section.JOURNAL, memoryview(rows.tobytes()))
        own = data & ~is_last
        self._put(Section.JOURNAL_BLOCKS, _contents(seqs[own], self._size))


def long_store(root: Path, intervals: int, recent: int = 4000) -> Path:
    """A store of a long history of one-second intervals: see tools/make-store."""
    first = recent // 4
    with LongHistory(root, VolumeInfo("root", 1 << 20, 4096)) as history:
        history.full_copy(128)
        history.seconds(first)
        history.unchanged(intervals - first - recent)
        history.seconds(recent)
        return history.path
