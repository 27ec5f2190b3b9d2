"""Whether what production sends leads on from where the store is; a mismatch says how the two agree again."""

from __future__ import annotations

from pitfs.errors import CapacityError, PositionMismatchError
from pitfs.model.transfer import Manifest, TransferKind, is_pruned
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Interval
from pitfs.store.objects.format import Layout, ObjectKind, ObjectName


def mismatch(path: str, problem: str, lasts: str = "") -> PositionMismatchError:
    """The error for production; `lasts`: what to do where a new session doesn't help."""
    hint = "begin the session anew, so that production learns where the store stands"
    return PositionMismatchError(f"{path}: {problem}: {hint}" + (f"; {lasts}" if lasts else ""))


def no_more_ids(path: str, layout: Layout) -> CapacityError:
    """The error for production, before anything of a transfer or a stream is taken."""
    return CapacityError(
        f"{path}: all {layout.max_snapshot_id} ids of the store's snapshots and logs have been given, it can take no "
        "more: move the store away (it stays readable) and a new one is made, with a full sync"
    )


def check_follows(path: str, manifest: Manifest, mark: int, seq: int, time_ns: int) -> None:
    """Whether a snapshot's transfer leads on from that mark, and from the position of the last write.

    Raises:
        PositionMismatchError: it doesn't.
    """
    m = manifest
    # Before a full sync, or changes, another one may have been given up, whose mark is skipped.
    skips = m.kind in (TransferKind.FULL, TransferKind.CHANGES) and m.mark > mark
    if m.mark != mark + 1 and not skips:
        raise mismatch(path, f"production sends mark {m.mark}, the store has {mark} and takes {mark + 1}")
    if mark == 0 and m.kind is not TransferKind.FULL:
        raise mismatch(path, "the store is empty and takes a full sync first")
    if m.kind is TransferKind.FULL:
        if mark and (m.to_seq <= seq or m.to_time_ns <= time_ns):
            raise mismatch(path, f"a full sync at seq {m.to_seq}, the store is at {seq} already")
    elif (m.from_seq, m.from_time_ns) != (seq, time_ns):
        raise mismatch(
            path,
            f"production sends what follows seq {m.from_seq} at {m.from_time_ns} ns, the store is at seq {seq} at "
            f"{time_ns} ns",
            "if this lasts the store was restored from an older or another copy, and a new one is needed",
        )


def interval_of(catalog: Catalog, manifest: Manifest) -> Interval:
    """The interval that the layers belong to, as the store has it.

    Raises:
        PositionMismatchError: it isn't there, was pruned, or isn't at the granularity that they build on.
    """
    m = manifest
    snapshot = catalog.snapshot_at_seq(m.to_seq)
    interval = catalog.interval_to(snapshot.id) if snapshot else None
    if interval is None or interval.bounds != (m.from_seq, m.from_time_ns, m.to_seq, m.to_time_ns):
        raise mismatch(
            catalog.path,
            f"production sends layers of the interval from seq {m.from_seq} to {m.to_seq}, which the store doesn't "
            "have",
        )
    if is_pruned(interval.cause):
        raise mismatch(catalog.path, f"the interval to seq {m.to_seq} was pruned, it takes no layers: {interval.cause}")
    has = interval.granularity_ns, journal_bytes(catalog, interval)
    if has != (m.base_granularity_ns, m.base_bytes):
        raise mismatch(
            catalog.path,
            f"production sends layers that build on granularity {m.base_granularity_ns} and {m.base_bytes} bytes, the "
            f"interval to seq {m.to_seq} has {has[0]} and {has[1]}",
        )
    return interval


def journal_bytes(catalog: Catalog, interval: Interval) -> int:
    """How many bytes of JOURNAL_BLOCKS the interval has."""
    blocks = catalog.object(ObjectName(ObjectKind.JOURNAL_BLOCKS, interval.end_snapshot_id).file)
    return blocks.data_bytes if blocks else 0
