"""What is said on the splitter's control socket: the requests, and the status that answers each of them."""

from __future__ import annotations

from typing import Final

import msgspec

from pitfs.journal.writer import Location
from pitfs.model.record import CopyProgress


class RunningCopy(msgspec.Struct, frozen=True):
    """The copy under way: its mark, where its COPY_START is, and for a copy of changes the bytes that it copies."""

    mark: int
    location: Location
    changed_bytes: int | None


class SplitterStatus(msgspec.Struct, frozen=True):
    """The splitter's state when it answered.

    Attributes:
        tail: where the journal goes on; lsn: of its last record.
        seq, position_time_ns: position of the last write; time_ns: the last time given to any record.
        mark: the last mark, which is the one just set where a mark was requested.
        now_ns: no later write has a time up to this one, nor has any that bypassed the journal.
        used_bytes, capacity_bytes: of the journal.
        bypass_cause: why writes bypass the journal, empty while they are journalled.
        changed_bytes: what was written meanwhile, None while writes are journalled or where it isn't known.
        waiting_count: writes that wait for room in the journal or for the replica.
        copy: None if none is under way.
        sync: what mode sync does now, for people; None in other modes.
    """

    tail: Location
    lsn: int
    seq: int
    position_time_ns: int
    time_ns: int
    mark: int
    now_ns: int
    used_bytes: int
    capacity_bytes: int
    bypass_cause: str
    changed_bytes: int | None
    waiting_count: int
    copy: RunningCopy | None
    sync: str | None


class ReadStatus(msgspec.Struct, frozen=True, tag=True, tag_field="op"):
    """Changes nothing."""


class SetMark(msgspec.Struct, frozen=True, tag=True, tag_field="op"):
    """Closes the interval at the last write, and names that position if `bookmark` is given."""

    bookmark: str | None = None


class Copied(msgspec.Struct, frozen=True, tag=True, tag_field="op"):
    """The replica durably has the running copy up to there."""

    progress: CopyProgress


class Release(msgspec.Struct, frozen=True, tag=True, tag_field="op"):
    """Segments before `segment` aren't needed for shipping any more.

    Those from `wanted` on are kept nevertheless, as long as there is room.
    """

    segment: int
    wanted: int | None = None


class Rescan(msgspec.Struct, frozen=True, tag=True, tag_field="op"):
    """Begins a complete copy, with a gap before it."""

    cause: str


class Replicated(msgspec.Struct, frozen=True, tag=True, tag_field="op"):
    """Mode sync: the replica durably has every write up to `seq`; or writes can't rely on it, and why."""

    seq: int
    in_step: bool
    cause: str = ""


class WaitForWrites(msgspec.Struct, frozen=True, tag=True, tag_field="op"):
    """Is answered as soon as the journal has a record behind `lsn`, and after a short time in any case."""

    lsn: int


SplitterRequest = ReadStatus | SetMark | Copied | Release | Rescan | Replicated | WaitForWrites
REQUESTS: Final[msgspec.json.Decoder[SplitterRequest]] = msgspec.json.Decoder(SplitterRequest)
