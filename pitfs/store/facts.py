"""What the catalog knows, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pitfs.model.blockmap import Entry
from pitfs.model.ladder import layer_of
from pitfs.model.transfer import Manifest


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
        snapshot, from_snapshot: ids of the snapshots at its end and start (the patent's fourth, third).
        first_time_ns: time of the first write in it, None if that isn't known.
        granularity_ns: 0 every write can be reached, None snapshots only.
        cause: why.
        journal_rows: entries of its difference journal.
    """

    snapshot: int
    from_snapshot: int
    from_seq: int
    from_time_ns: int
    to_seq: int
    to_time_ns: int
    first_time_ns: int | None
    granularity_ns: int | None
    cause: str
    journal_rows: int

    @property
    def layer(self) -> int:
        """The last layer of the ladder that its difference journal has; NO_LAYER without one."""
        return layer_of(self.granularity_ns)


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """An object as the catalog knows it."""

    name: str
    kind: int
    snapshot: int
    data_bytes: int
    tail_bytes: int
    tail_checksum: int


@dataclass(frozen=True, slots=True)
class Commit:
    """All that one transfer adds to the history; `snapshot` None if nothing was written in it."""

    manifest: Manifest
    snapshot: Snapshot | None
    roots: Sequence[Entry] = ()
    interval: Interval | None = None
    objects: Sequence[ObjectFacts] = ()
    minutes: Mapping[int, int] | None = None


@dataclass(frozen=True, slots=True)
class LayersCommit:
    """What layers make of a committed interval.

    Attributes:
        base, interval: as it was and as it is then.
        objects: new ones, and those that have grown. replaced: name of the index that they take the place of.
    """

    base: Interval
    interval: Interval
    objects: Sequence[ObjectFacts]
    replaced: str | None
    minutes: Mapping[int, int]
