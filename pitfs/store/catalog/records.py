"""What the catalog knows, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from pitfs.model.blockmap import MapEntry
from pitfs.model.ladder import layer_of
from pitfs.model.position import Position
from pitfs.model.transfer import Manifest
from pitfs.store.objects.format import ObjectKind, ObjectName, ObjectRecord

_SECOND_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The complete state at one position."""

    id: int
    seq: int
    time_ns: int
    mark: int


@dataclass(frozen=True, slots=True)
class Interval:
    """What lies between two neighbouring snapshots, (from_seq, to_seq].

    Attributes:
        end_snapshot_id, base_snapshot_id: of the snapshots at its end and start (the patent's fourth and third).
        first_time_ns: time of the first write in it, None if that isn't known.
        granularity_ns: 0 every write can be reached, None snapshots only.
        cause: why.
        journal_rows: entries of its difference journal.
    """

    end_snapshot_id: int
    base_snapshot_id: int
    from_seq: int
    from_time_ns: int
    to_seq: int
    to_time_ns: int
    first_time_ns: int | None
    granularity_ns: int | None
    cause: str
    journal_rows: int

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Positions of its base and end snapshots."""
        return self.from_seq, self.from_time_ns, self.to_seq, self.to_time_ns

    @property
    def layer(self) -> int:
        """The last layer of the ladder that its difference journal has; NO_LAYER without one."""
        return layer_of(self.granularity_ns)

    def at(self, position: Position | None) -> Resolution | None:
        """The state at a position in it."""
        if position is None:
            return None
        return Resolution(
            position.seq, position.time_ns, self.granularity_ns, self.base_snapshot_id, self.end_snapshot_id
        )


@dataclass(frozen=True, slots=True)
class Commit:
    """All that one transfer, or the closing of an open interval, adds to the history.

    Attributes:
        snapshot: None if nothing was written in it.
        open_interval_id: of the open interval that it takes the place of.
    """

    manifest: Manifest
    snapshot: Snapshot | None
    roots: Sequence[MapEntry] = ()
    interval: Interval | None = None
    objects: Sequence[ObjectRecord] = ()
    minutes: Mapping[int, int] = field(default_factory=dict)
    open_interval_id: int | None = None


@dataclass(frozen=True, slots=True)
class SortedRun:
    """A readable part of an open interval: rows and positions of writes first_seq to to_seq (that one is in).

    Attributes:
        open_interval_id: of the open interval in whose write-ahead log it is.
        level: how often it was merged.
        sparse_index_offset, …_bytes, …_checksum: of the sparse index of its chunks (`store.index.format`).
    """

    open_interval_id: int
    first_seq: int
    first_time_ns: int
    to_seq: int
    level: int
    row_count: int
    sparse_index_offset: int
    sparse_index_bytes: int
    sparse_index_checksum: int


@dataclass(frozen=True, slots=True)
class OpenInterval:
    """The open interval as far as it is readable; or one that was closed and isn't a snapshot yet.

    Attributes:
        id: of its write-ahead log, journal-<id>.blocks: a snapshot's id that no snapshot will have.
        end_snapshot_id: of the snapshot that is made of it once it is closed.
        base_snapshot_id: of the snapshot where it begins, which may still be made of the open interval before.
        to_seq, to_time_ns: the last readable write; where it begins if there is none.
        wal_end: byte of the log up to which all is durable and in sorted runs.
        mark: at its end, 0 while it is open; then also protected_through_ns and bookmark.
        runs: all that is readable, by seq.
    """

    id: int
    end_snapshot_id: int
    base_snapshot_id: int
    from_seq: int
    from_time_ns: int
    to_seq: int
    to_time_ns: int
    first_time_ns: int | None
    wal_end: int
    mark: int = 0
    protected_through_ns: int = 0
    bookmark: str | None = None
    runs: tuple[SortedRun, ...] = ()

    @property
    def wal(self) -> ObjectName:
        return ObjectName(ObjectKind.JOURNAL_BLOCKS, self.id)

    @property
    def interval(self) -> Interval:
        """As it is listed."""
        return Interval(
            self.end_snapshot_id, self.base_snapshot_id, self.from_seq, self.from_time_ns,
            self.to_seq, self.to_time_ns, self.first_time_ns, 0, "streaming",
            sum(run.row_count for run in self.runs),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Resolution:
    """A reachable state, and where to read it from; a key for caches.

    Attributes:
        seq, time_ns: its position.
        granularity_ns: of the interval that it is in, or that it ends: 0 every write, None snapshots only.
        base_snapshot_id: of the snapshot whose block map has what the journal doesn't (the patent's third); while that
            snapshot is built, of the open interval that it is built from.
        end_snapshot_id: of the snapshot at the interval's end (the fourth), whose difference journal comes first; None
            where the state is a snapshot itself.
    """

    seq: int
    time_ns: int
    granularity_ns: int | None
    base_snapshot_id: int
    end_snapshot_id: int | None

    @property
    def kind(self) -> str:
        """As users see it."""
        return "snapshot" if self.end_snapshot_id is None else "intermediary"


def add_seconds(minutes: dict[int, int], times_ns: npt.NDArray[np.int64]) -> None:
    """Marks the seconds of these times: bits of the seconds of each minute since the epoch, first second lowest."""
    for second in np.unique(times_ns // _SECOND_NS).tolist():
        minutes[second // 60] = minutes.get(second // 60, 0) | 1 << second % 60
