"""The messages of the splitter's control socket: its requests, and the status that answers each of them."""

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
        seq, position_time_ns: position of the last write.
        mark: the last mark, which is the one just set where a mark was requested.
        now_ns: no later write has a time up to this one, nor has any that bypassed the journal.
        used_bytes, capacity_bytes: of the journal.
        bypass_cause: why writes bypass the journal, empty while they are journalled.
        changed_bytes: what a bypass has written so far; None while writes are journalled or where it isn't known.
        waiting_count: writes that wait for room in the journal or for the replica.
        copy: None if none is under way.
        sync: what mode sync does now, for people; None in other modes.
    """

    tail: Location
    lsn: int
    seq: int
    position_time_ns: int
    mark: int
    now_ns: int
    used_bytes: int
    capacity_bytes: int
    bypass_cause: str
    changed_bytes: int | None
    waiting_count: int
    copy: RunningCopy | None
    sync: str | None


class _Request(msgspec.Struct, frozen=True, tag=True, tag_field="op"):
    """A request; the method of `SplitterClient` that sends it says what it does."""


class ReadStatus(_Request, frozen=True):
    pass


class SetMark(_Request, frozen=True):
    bookmark: str | None


class Copied(_Request, frozen=True):
    progress: CopyProgress


class Release(_Request, frozen=True):
    segment: int
    wanted: int


class Rescan(_Request, frozen=True):
    cause: str


class Replicated(_Request, frozen=True):
    seq: int
    in_step: bool
    cause: str


class WaitForWrites(_Request, frozen=True):
    lsn: int


SplitterRequest = ReadStatus | SetMark | Copied | Release | Rescan | Replicated | WaitForWrites
REQUESTS: Final[msgspec.json.Decoder[SplitterRequest]] = msgspec.json.Decoder(SplitterRequest)
