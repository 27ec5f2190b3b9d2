"""Where the splitter stands, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pitfs.journal.writer import Location
from pitfs.model.record import CopyStart
from pitfs.splitter.change_bitmap import ChangeBitmap

NOWHERE: Final = Location(0, 0)


@dataclass(slots=True)
class SplitterState:
    """Where the splitter stands; what recovery gives it and checkpoints keep.

    Attributes:
        seq, position_time_ns: position of the last write.
        time_ns: the last time given to any record.
        mark: the last mark.
        copy: the running copy, None if there is none; copy_location: where its COPY_START is.
        bypass_cause: why writes aren't journalled, empty while they are.
        change_bitmap: while writes bypass the journal, or a copy of changes runs: what may differ from a state
            that the replica has, or will have from the journal; None: anything may.
    """

    seq: int = 0
    position_time_ns: int = 0
    time_ns: int = 0
    mark: int = 0
    copy: CopyStart | None = None
    copy_location: Location = NOWHERE
    bypass_cause: str = ""
    change_bitmap: ChangeBitmap | None = None


@dataclass(frozen=True, slots=True)
class Marked:
    """A mark that was set: its number, the position that it ends at, and where the journal goes on."""

    mark: int
    seq: int
    position_time_ns: int
    time_ns: int
    tail: Location
