"""What goes from production to replica, as plain values. Pure.

A transfer is a manifest and up to five *sections*, each a stream of bytes that only grows. A transfer that was
interrupted resumes at a checkpoint: the durable length of each section, and the sender's cursor. Where the sender
sets no cursor (INTERVAL, LAYERS), it also keeps what came between its last checkpoint and the cut of the link.

    kind FULL       the complete state at one position (the first full sync, or a rescan after a gap):
                    DIFF has every block that isn't zero, its length isn't known in advance
    kind INTERVAL   what changed in (from_seq, to_seq]; DIFF is the last content of each block written
    kind LAYERS     more of the difference journal (figure 6B) of an interval that the replica has: POSITIONS, JOURNAL
                    and JOURNAL_BLOCKS of one layer of the ladder or of several (see `model.ladder`)
    kind CHANGES    the state at one position behind a gap: DIFF has every block that may differ from the snapshot
                    before, zeros among them, its length isn't known in advance

FULL, CHANGES and INTERVAL lead to the next mark (the first two may skip marks); LAYERS raises the granularity of an
interval before it.

Sections:

    DIFF            DIFF_ENTRY rows, strictly ascending by (volume, block)
    DIFF_BLOCKS     contents of the rows of DIFF with source SNAPSHOT, whole blocks, in the order of DIFF
    POSITIONS       POSITION rows, strictly ascending: the states inside the interval that these layers add
    JOURNAL         JOURNAL_ENTRY rows of all these layers together, in a few runs, each strictly ascending by
                    (volume, block, seq): stretches of the order of writing, the last one first, for the codec
    JOURNAL_BLOCKS  contents of the rows of JOURNAL with source JOURNAL, whole blocks, in the order of JOURNAL

While the link keeps up, the writes of the open interval *stream* beside these transfers:

    WRITES          WRITE rows, consecutive seqs; Data.offset is the seq of the first
    WRITE_BLOCKS    contents of their blocks, whole, in order; Data.offset counts bytes since the connection began

A batch is rows, then their contents, then a Flush. The replica applies it whole, makes it durable, and answers with a
Durable. A StreamMark closes the interval: the replica itself makes a snapshot and an interval at every write of what
was streamed. LAYERS of earlier intervals may go in between; the other kinds begin where the stream ended.

The replica may ask for contents that it has damaged, or no more: a Want names them, a Given answers for each, in order.

`unit` counts 512 bytes, the smallest block size. The replica appends the JOURNAL_BLOCKS of all LAYERS of an interval
to each other, and a `unit` counts from the beginning of the first. A row leaves out what the replica finds by itself:
`unit` is 0 unless the row shares the content of another one, and checksums aren't sent (the End has one of all of
them). All integers are little-endian.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt

from pitfs.model.digest import Digests
from pitfs.model.group import NAME_PATTERN

UNIT_BYTES: Final = 512
MAX_PAYLOAD_BYTES: Final = 1 << 20  # one Data frame; the limit of everything that is held at once
MAX_CHECKPOINT_BYTES: Final = 16 << 20  # a sender checkpoints at least this often
MAX_BATCH_BYTES: Final = 4 << 20  # contents of a batch of streamed writes: a few of the largest writes
MAX_BATCH_ROWS: Final = 32 << 10
MAX_JOURNAL_RUNS: Final = 64  # in JOURNAL: the replica merges them
MAX_NUMBER: Final = (1 << 63) - 1  # the store's catalog and numpy columns are int64
MAX_BOOKMARKS: Final = 4096  # for each transfer; with gaps they fit into BEGIN's limit of 4 MiB
MAX_GAPS: Final = 512
MAX_TEXT_LENGTH: Final = 1000  # of a cause, an identity
MAX_COARSE_INTERVALS: Final = 1024
PRUNED: Final = "retention"  # begins the cause of an interval that was made coarser on purpose
MAX_CONTENT_BYTES: Final = 64 << 10  # the largest block
MAX_WANTED: Final = 256  # contents that one Want asks for: 16 MiB of the largest blocks
WAITS: Final = "until the link is idle"  # ends the cause of an interval whose journal is to be backfilled


# What the fields of a value that comes over the link may be: msgspec checks it when it decodes one.
Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]  # a seq, a time, a count, a length
Mark = Annotated[int, msgspec.Meta(ge=1, le=MAX_NUMBER)]
Digest = Annotated[int, msgspec.Meta(ge=0)]  # 64 bits: msgpack carries no more
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT_LENGTH)]
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Lengths = tuple[Number, Number, Number, Number, Number]  # of the sections of a transfer, 1 … 5
Cursor = Annotated[tuple[Number, ...], msgspec.Meta(max_length=64)]


def awaits_backfill(cause: str) -> bool:
    """Whether more of an interval's difference journal is to come.

    Manifests and catalogs have that as the ending of the interval's cause; it becomes a value here, and nowhere else.
    """
    return cause.endswith(WAITS)


def is_pruned(cause: str) -> bool:
    """Whether retention made an interval as coarse as it is: then it takes no layers any more."""
    return cause.startswith(PRUNED)


class Section(enum.IntEnum):
    DIFF = 1
    DIFF_BLOCKS = 2
    POSITIONS = 3
    JOURNAL = 4
    JOURNAL_BLOCKS = 5
    WRITES = 6
    WRITE_BLOCKS = 7


TRANSFER_SECTIONS: Final = (
    Section.DIFF, Section.DIFF_BLOCKS, Section.POSITIONS, Section.JOURNAL, Section.JOURNAL_BLOCKS,
)  # fmt: skip


class Source(enum.IntEnum):
    """Where the content of a block of the difference journal is (figure 6B)."""

    ZERO = 0  # all zeros, nothing stored
    SNAPSHOT = 1  # the end snapshot (fourth) has it in that block: the next in DIFF_BLOCKS, or what DIFF gave it
    JOURNAL = 2  # only the difference journal has it: the next in JOURNAL_BLOCKS
    SHARED_SNAPSHOT = 3  # that of another block, at `unit` of DIFF_BLOCKS
    SHARED_JOURNAL = 4  # that of another row, at `unit` of JOURNAL_BLOCKS


DIFF_ENTRY: Final = np.dtype(
    [
        ("block", "<u8"),
        ("unit", "<u8"),  # SHARED_SNAPSHOT: where a row before has its content in DIFF_BLOCKS, in units, else 0
        ("volume", "<u2"),  # index into Hello.volumes
        ("source", "<u2"),  # ZERO, SNAPSHOT or SHARED_SNAPSHOT
        ("reserved", "<u4"),
    ]
)
JOURNAL_ENTRY: Final = np.dtype(
    [
        ("block", "<u8"),
        ("seq", "<u8"),
        ("unit", "<u8"),  # SHARED_…: offset in DIFF_BLOCKS, or in JOURNAL_BLOCKS of all transfers, in units, else 0
        ("volume", "<u2"),
        ("source", "<u2"),
        ("reserved", "<u4"),
    ]
)
POSITION: Final = np.dtype([("seq", "<u8"), ("time_ns", "<i8")])
WRITE: Final = np.dtype(
    [
        ("time_ns", "<i8"),
        ("block", "<u8"),  # first
        ("block_count", "<u4"),
        ("volume", "<u2"),
        ("reserved", "<u2"),
    ]
)
ROWS: Final = {
    Section.DIFF: DIFF_ENTRY,
    Section.POSITIONS: POSITION,
    Section.JOURNAL: JOURNAL_ENTRY,
    Section.WRITES: WRITE,
}
assert DIFF_ENTRY.itemsize == 24 and JOURNAL_ENTRY.itemsize == 32 and WRITE.itemsize == 24


class TransferKind(enum.IntEnum):
    FULL = 1
    INTERVAL = 2
    LAYERS = 3
    CHANGES = 4

    @property
    def resumes_at_cursor(self) -> bool:
        """Whether it reads backing volumes: where it goes on only the cursor says that came with a checkpoint."""
        return self in (TransferKind.FULL, TransferKind.CHANGES)


class VolumeInfo(msgspec.Struct, frozen=True):
    """A volume of the group; it never changes, on neither side."""

    name: str
    size_bytes: int
    block_size: int

    @property
    def block_count(self) -> int:
        return -(-self.size_bytes // self.block_size)


class Bookmark(msgspec.Struct, frozen=True):
    name: Name
    seq: Number
    time_ns: Number


class Gap(msgspec.Struct, frozen=True):
    """Instants between two positions that can't be reached, and why; ends exclusive."""

    from_seq: Number
    from_time_ns: Number
    to_seq: Number
    to_time_ns: Number
    cause: Text


class Manifest(msgspec.Struct, frozen=True):
    """What a transfer is, sent before its sections.

    Attributes:
        mark: number of the mark it leads to: 1, 2, 3, … without gaps; the replica takes only the one
            after its last. LAYERS: of the mark at the interval's end.
        from_seq, from_time_ns: position of the snapshot before (equal to `to` for the first full sync).
        to_seq, to_time_ns: position that it leads to. With to_seq == from_seq nothing was written; such a
            transfer only moves protected_through_ns on.
        first_time_ns: time of the first write in it, None if there is none.
        protected_through_ns: time of the mark itself: every write up to it is in.
        granularity_ns: a rung of the ladder, 0 every write, or None, snapshots only (all but LAYERS).
        base_granularity_ns: LAYERS: that of the interval on the replica before; else None.
        cause: why the granularity is what it is, in words.
        diff_count, journal_count, position_count: rows of DIFF, JOURNAL and POSITIONS; None for diff_count
            where not known (FULL, CHANGES).
        base_bytes: LAYERS: bytes of JOURNAL_BLOCKS that the replica has from coarser layers.
        identity: equal exactly if the sections' bytes are equal; a staged transfer resumes only then.
        digests: INTERVAL: of the volumes at the position that it leads to, as production took them.
    """

    mark: Mark
    kind: TransferKind
    from_seq: Number
    from_time_ns: Number
    to_seq: Number
    to_time_ns: Number
    first_time_ns: Number | None
    protected_through_ns: Number
    granularity_ns: Number | None
    cause: Text
    diff_count: Number | None
    journal_count: Number
    position_count: Number
    identity: Text
    base_granularity_ns: Number | None = None
    base_bytes: Number = 0
    bookmarks: Annotated[tuple[Bookmark, ...], msgspec.Meta(max_length=MAX_BOOKMARKS)] = ()
    gaps: Annotated[tuple[Gap, ...], msgspec.Meta(max_length=MAX_GAPS)] = ()
    digests: Digests = msgspec.UNSET


class ResumePoint(msgspec.Struct, frozen=True):
    """How far a transfer is durable on the replica: bytes of each section (1 … 5), and the sender's cursor."""

    lengths: Lengths = (0, 0, 0, 0, 0)
    cursor: Cursor = ()


class Hello(msgspec.Struct, frozen=True):
    """Who the sender is.

    Attributes:
        history: hex, random, made with the group's state: tells apart two groups of the same name.
        epoch: of the sender: greater at each start. The replica accepts the greatest epoch that it knows.
        instance: random, made with the epoch: tells apart two senders that started from copies of one state.
    """

    group: str
    history: str
    volumes: tuple[VolumeInfo, ...]
    epoch: Number = 0
    instance: Number = 0


class CoarseInterval(msgspec.Struct, frozen=True):
    """An interval that the replica doesn't have at every write, and what it has of its difference journal.

    `journal_bytes`: of its JOURNAL_BLOCKS. `awaits_backfill`: its cause says that more will come.
    """

    from_seq: Number
    from_time_ns: Number
    to_seq: Number
    to_time_ns: Number
    granularity_ns: Number | None
    journal_bytes: Number
    awaits_backfill: bool = msgspec.field(default=False, name="waits")


class Welcome(msgspec.Struct, frozen=True):
    """The replica's state: its last committed mark, 0 and zeros if it has none.

    `coarse` (at the start of a session): the newest intervals that could become finer, newest first.
    `streamed_seq`, `streamed_time_ns`: the last write behind that mark that it has durably from a stream, or zeros.
    """

    mark: Number
    seq: Number
    time_ns: Number
    protected_through_ns: Number
    coarse: Annotated[tuple[CoarseInterval, ...], msgspec.Meta(max_length=MAX_COARSE_INTERVALS)] = ()
    streamed_seq: Number = msgspec.field(default=0, name="tail_seq")
    streamed_time_ns: Number = msgspec.field(default=0, name="tail_time_ns")

    @property
    def end(self) -> tuple[int, int]:
        """(seq, time_ns) of the last write that it has durably: the next transfer or batch begins there."""
        return (self.streamed_seq, self.streamed_time_ns) if self.streamed_seq else (self.seq, self.time_ns)


# The frames of one transfer, in order: Begin, (Data | Checkpoint)*, then End or Park.


class Begin(msgspec.Struct, frozen=True):
    manifest: Manifest


class Data(msgspec.Struct, frozen=True):
    """`payload` (at most MAX_PAYLOAD_BYTES) begins at byte `offset` of the section.

    Contents come in whole blocks, after the rows that name them; rows in whole rows.
    """

    section: Section
    offset: int
    payload: bytes | bytearray | memoryview


class Checkpoint(msgspec.Struct, frozen=True):
    """Asks the replica to make what came so far durable and to remember the cursor with it."""

    cursor: Cursor


class End(msgspec.Struct, frozen=True):
    """The transfer is complete; the replica checks these before the commit.

    Attributes:
        lengths: of all sections.
        checksums: of DIFF and of JOURNAL: xxh3_64 of the xxh3_64 (8 bytes each) of the blocks in DIFF_BLOCKS or
            JOURNAL_BLOCKS, then of the blocks that SHARED_… rows share, in the order of the rows. The splitter took
            them. None where blocks were read from the backing volume.
    """

    lengths: Lengths
    checksums: tuple[Digest, Digest] | None = None


class Park(msgspec.Struct, frozen=True):
    """Something else goes first: the replica makes durable what came, and the transfer can be resumed."""

    cursor: Cursor = ()


TransferFrame = Begin | Data | Checkpoint | End | Park


# The stream.


@dataclass(frozen=True, slots=True)
class Writes:
    """A batch of streamed writes, whole.

    Attributes:
        first_seq: of the first row. rows: WRITE[n].
        contents: the blocks of all rows, one behind the other.
        digest: xxh3_64 of the xxh3_64 (8 bytes each) of these blocks, which the splitter took.
    """

    first_seq: int
    rows: npt.NDArray[np.void]
    contents: bytes | bytearray | memoryview
    digest: int


class Flush(msgspec.Struct, frozen=True):
    """Ends a batch, to be made durable and readable. One without rows only moves protected_through_ns on.

    Attributes:
        seq: of the last write streamed so far.
        digest: of the batch, as in Writes.
        protected_through_ns: every write up to this time is in.
    """

    seq: Number
    digest: Digest
    protected_through_ns: Number


class StreamMark(msgspec.Struct, frozen=True):
    """The open interval ends at the last streamed write, (seq, time_ns). If it is empty only the mark moves on."""

    mark: Mark
    seq: Number
    time_ns: Number
    protected_through_ns: Number
    bookmark: Name | None = None
    digests: Digests = msgspec.UNSET


class Durable(msgspec.Struct, frozen=True):
    """The answer to each Flush and StreamMark, and cumulative.

    Attributes:
        seq, time_ns: the last write that survives power loss.
        mark: the last one whose snapshot is committed: a closed interval is built while the stream goes on.
        protected_through_ns: as readers see it.
    """

    seq: Number
    time_ns: Number
    mark: Number
    protected_through_ns: Number


class Wanted(msgspec.Struct, frozen=True, order=True):
    """A content, by its xxh3_64, that a write in (after_seq, through_seq] brought to a block."""

    volume: Number
    block: Number
    checksum: Digest
    after_seq: Number
    through_seq: Number


# Finds contents, in their order; None for what isn't there any more.
FindContents = Callable[[Sequence[Wanted]], Awaitable[Sequence[bytes | None]]]


class Want(msgspec.Struct, frozen=True):
    """The replica asks for contents; for more only when each has its answer."""

    contents: Annotated[tuple[Wanted, ...], msgspec.Meta(min_length=1, max_length=MAX_WANTED)]


class Given(msgspec.Struct, frozen=True):
    """The answer for the next content of a Want; None: production has it no more."""

    content: Annotated[bytes, msgspec.Meta(max_length=MAX_CONTENT_BYTES)] | None
