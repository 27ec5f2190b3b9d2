"""The messages of the shipper's control socket: the requests of `pitfs snapshot`, `bookmark` and `status`."""

from __future__ import annotations

from typing import Final

import msgspec

SNAPSHOT_GRACE_S: Final = 10.0  # how long `pitfs snapshot` waits for a link that is down


class TakeSnapshot(msgspec.Struct, frozen=True, tag="snapshot", tag_field="op"):
    """Closes the interval at the last write, and waits until the replica has it. Answered by SnapshotTaken."""


class SnapshotTaken(msgspec.Struct, frozen=True):
    """Printed by `pitfs snapshot --json`."""

    instant: str
    seq: int
    mark: int


class SetBookmark(msgspec.Struct, frozen=True, tag="bookmark", tag_field="op"):
    """Names the position of the last write. Answered by BookmarkSet."""

    name: str


class BookmarkSet(msgspec.Struct, frozen=True):
    """Printed by `pitfs bookmark --json`."""

    name: str
    instant: str
    seq: int


class ReadStatus(msgspec.Struct, frozen=True, tag="status", tag_field="op"):
    """Answered by what `pitfs status --json` prints."""


ShipperRequest = TakeSnapshot | SetBookmark | ReadStatus
REQUESTS: Final[msgspec.json.Decoder[ShipperRequest]] = msgspec.json.Decoder(ShipperRequest)
