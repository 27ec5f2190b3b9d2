"""The manifests of what replication sends: of a snapshot diff, of layers, of a cause alone, and of a copy."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

from pitfs.journal.reader import Copy, Interval
from pitfs.model.ladder import granularity_of
from pitfs.model.schedule import megabytes
from pitfs.model.transfer import WAITS, Bookmark, Gap, Manifest, TransferKind, Welcome
from pitfs.replication.interval import PickedLayers, PreparedInterval

FORMAT: Final = 4  # of the sections' rows and order; part of the identity
MAX_CAUSE_LENGTH: Final = 1000  # characters: what the link's manifest takes; errors with long paths have more


def waits_cause(size_bytes: int) -> str:
    """The cause of an interval whose difference journal hasn't come as a whole, but will."""
    return f"{megabytes(size_bytes)} MB of its difference journal wait {WAITS}"


def _manifest(
    mark: int, kind: TransferKind, base: tuple[int, int], end: tuple[int, int], **more: Any
) -> Manifest:
    """Of a transfer between two positions (seq, time_ns) that has no rows and no journal, unless `more` says so."""
    plain = {
        "first_time_ns": None,
        "protected_through_ns": end[1],
        "granularity_ns": None,
        "diff_count": 0,
        "journal_count": 0,
        "position_count": 0,
    }
    return Manifest(
        mark=mark,
        kind=kind,
        from_seq=base[0],
        from_time_ns=base[1],
        to_seq=end[0],
        to_time_ns=end[1],
        **(plain | more),
    )


def _of_interval(interval: Interval, kind: TransferKind, **more: Any) -> Manifest:
    return _manifest(
        interval.mark,
        kind,
        (interval.from_seq, interval.from_time_ns),
        (interval.to_seq, interval.to_time_ns),
        first_time_ns=int(interval.times[0]) if len(interval.times) else None,
        protected_through_ns=interval.mark_time_ns,
        **more,
    )


def diff_manifest(prepared: PreparedInterval, cause: str) -> Manifest:
    """The manifest of an interval's snapshot diff; `cause`: why it has no more, as far as that is known."""
    interval, entries = prepared.interval, prepared.diff.entries
    bookmarks: tuple[Bookmark, ...] = ()
    if interval.bookmark is not None:
        bookmarks = (Bookmark(interval.bookmark, interval.to_seq, interval.to_time_ns),)
    return _of_interval(
        interval,
        TransferKind.INTERVAL,
        diff_count=len(entries),
        identity=_identity(f"diff {interval.mark}", entries),
        cause=cause,
        bookmarks=bookmarks,
    )


def layers_manifest(picked: PickedLayers, cause: str) -> Manifest:
    """The manifest of layers; the same for the same ones: only its cause is new.

    Args:
        cause: why no finer ones come with it, empty for the last.
    """
    interval, base, layer = picked.prepared.interval, picked.base, picked.layer
    return _of_interval(
        interval,
        TransferKind.LAYERS,
        granularity_ns=granularity_of(layer),
        base_granularity_ns=granularity_of(base),
        base_bytes=picked.base_bytes,
        journal_count=len(picked.part.entries),
        position_count=len(picked.positions),
        identity=_identity(f"layers {interval.mark} {base} {layer}", picked.part.entries, picked.positions),
        cause=cause,
    )


def cause_manifest(
    mark: int, base: tuple[int, int], end: tuple[int, int], layer: int, base_bytes: int, cause: str
) -> Manifest:
    """The manifest that says why an interval stays at the granularity that it has; nothing comes with it.

    Args:
        layer, base_bytes: the last layer, and what of JOURNAL_BLOCKS, that the replica has.
    """
    granularity_ns = granularity_of(layer)
    return _manifest(
        mark,
        TransferKind.LAYERS,
        base,
        end,
        granularity_ns=granularity_ns,
        base_granularity_ns=granularity_ns,
        base_bytes=base_bytes,
        identity=_identity(f"cause {mark}"),
        cause=cause,
    )


def leads_on(copy: Copy, welcome: Welcome) -> bool:
    """Whether the replica, which is at that position, can take the copy: one of changes builds on one state alone."""
    start = copy.start
    return start.is_complete or (welcome.mark > 0 and welcome.end == (start.from_seq, start.from_time_ns))


def copy_manifest(copy: Copy, history: str, welcome: Welcome) -> Manifest:
    """The manifest of a copy.

    Args:
        welcome: the replica's position: what lies between that and the copy is a gap.
    """
    start = copy.start
    cause = start.cause
    if len(cause) > MAX_CAUSE_LENGTH:
        cause = cause[: MAX_CAUSE_LENGTH - 1] + "…"
    before = welcome.end if welcome.mark else (copy.seq, copy.time_ns)
    gaps = (Gap(*before, copy.seq, copy.time_ns, cause),) if welcome.mark else ()
    return _manifest(
        start.mark,
        TransferKind.FULL if start.is_complete else TransferKind.CHANGES,
        before,
        (copy.seq, copy.time_ns),
        diff_count=None,
        identity=f"{FORMAT} {history} {'full' if start.is_complete else 'changes'} {start.mark}",
        cause=cause or "the first full copy",
        gaps=gaps,
    )


def _identity(what: str, *columns: npt.NDArray[np.void]) -> str:
    identity = xxh3_128(f"{FORMAT} {what}".encode())
    for column in columns:
        if len(column):
            identity.update(column.view(np.uint8).data)
    return identity.hexdigest()
