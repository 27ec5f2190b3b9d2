"""The manifests of what replication sends: of a snapshot diff, of layers, of a cause alone, and of a copy."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

from pitfs.journal.reader import Copy, Interval
from pitfs.model import transfer
from pitfs.model.digest import Digests
from pitfs.model.ladder import granularity_of
from pitfs.model.transfer import Manifest, TransferKind
from pitfs.model.units import format_bytes
from pitfs.replication.interval import PickedLayers, PreparedInterval

FORMAT: Final = 4  # of the sections' rows and order; part of the identity


def waits_cause(size_bytes: int) -> str:
    """The cause of an interval whose difference journal hasn't come as a whole, but will."""
    return f"{format_bytes(size_bytes)} of its difference journal wait {transfer.WAITS}"


def _bounded(cause: str) -> str:
    """A cause as a manifest takes it: that of an error with long paths has more characters."""
    return cause if len(cause) <= transfer.MAX_TEXT_LENGTH else cause[: transfer.MAX_TEXT_LENGTH - 1] + "…"


def _manifest(
    mark: int, kind: TransferKind, base: tuple[int, int], end: tuple[int, int], cause: str, **more: Any
) -> Manifest:
    """Of a transfer between two positions (seq, time_ns) that has no rows and no journal, unless `more` says so."""
    plain: dict[str, Any] = {
        "first_time_ns": None,
        "protected_through_ns": end[1],
        "granularity_ns": None,
        "diff_count": 0,
        "journal_count": 0,
        "position_count": 0,
    }
    return Manifest(mark, kind, *base, *end, cause=_bounded(cause), **(plain | more))


def _of_interval(interval: Interval, kind: TransferKind, cause: str, **more: Any) -> Manifest:
    base, end = (interval.from_seq, interval.from_time_ns), (interval.to_seq, interval.to_time_ns)
    more["first_time_ns"] = int(interval.times[0]) if len(interval.times) else None
    return _manifest(interval.mark, kind, base, end, cause, protected_through_ns=interval.mark_time_ns, **more)


def diff_manifest(
    prepared: PreparedInterval, cause: str, digests: Digests = msgspec.UNSET
) -> Manifest:
    """The manifest of an interval's snapshot diff; `cause`: why it has no more, as far as that is known."""
    interval, entries, name = prepared.interval, prepared.diff.entries, prepared.interval.bookmark
    bookmarks = () if name is None else (transfer.Bookmark(name, interval.to_seq, interval.to_time_ns),)
    return _of_interval(
        interval,
        TransferKind.INTERVAL,
        cause,
        diff_count=len(entries),
        identity=_identity(f"diff {interval.mark}", entries),
        bookmarks=bookmarks,
        digests=digests,
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
        cause,
        granularity_ns=granularity_of(layer),
        base_granularity_ns=granularity_of(base),
        base_bytes=picked.base_bytes,
        journal_count=len(picked.part.entries),
        position_count=len(picked.positions),
        identity=_identity(f"layers {interval.mark} {base} {layer}", picked.part.entries, picked.positions),
    )


def cause_manifest(coarse: transfer.CoarseInterval, cause: str) -> Manifest:
    """The manifest that says why an interval stays as coarse as the replica has it; nothing comes with it."""
    return _manifest(
        1,  # its mark needn't be known: the replica finds the interval by its positions
        TransferKind.LAYERS,
        (coarse.from_seq, coarse.from_time_ns),
        (coarse.to_seq, coarse.to_time_ns),
        cause,
        granularity_ns=coarse.granularity_ns,
        base_granularity_ns=coarse.granularity_ns,
        base_bytes=coarse.journal_bytes,
        identity=_identity(f"cause {coarse.to_seq}"),
    )


def copy_manifest(copy: Copy, history: str, welcome: transfer.Welcome) -> Manifest:
    """The manifest of a copy.

    Args:
        welcome: the replica's position: what lies between that and the copy is a gap.
    """
    start, end, cause = copy.start, (copy.seq, copy.time_ns), _bounded(copy.start.cause)
    before = welcome.end if welcome.mark else end
    gaps = (transfer.Gap(*before, *end, cause),) if welcome.mark else ()
    kind = TransferKind.FULL if start.is_complete else TransferKind.CHANGES
    return _manifest(
        start.mark,
        kind,
        before,
        end,
        cause or "the first full sync",
        diff_count=None,
        identity=f"{FORMAT} {history} {kind.name.lower()} {start.mark}",
        gaps=gaps,
    )


def _identity(what: str, *columns: npt.NDArray[np.void]) -> str:
    identity = xxh3_128(f"{FORMAT} {what}".encode())
    for column in columns:
        identity.update(column.view(np.uint8).data)
    return identity.hexdigest()
