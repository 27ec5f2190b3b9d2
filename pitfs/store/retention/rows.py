"""What the catalog says of snapshots that go: their rows, and those of their intervals, go; one interval is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pitfs.errors import StoreError
from pitfs.model.position import SECOND_NS
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Interval, Snapshot


def removed_journals(catalog: Catalog, after_id: int, before_id: int) -> list[str]:
    """Names of the objects of difference journals between two snapshots."""
    first, end = (f"journal-{each + 1:016x}" for each in (after_id, before_id))
    return [name for (name,) in catalog.rows("SELECT name FROM objects WHERE name >= ? AND name < ?", (first, end))]


def join_intervals(catalog: Catalog, after_id: int, before_id: int, cause: str) -> None:
    """Removes all snapshots between two, or with `after_id` 0 all before `before_id`, which becomes the first.

    Their bookmarks and digests go with them, and all difference journals between the two. Within `Catalog.changes`.

    Raises:
        StoreError: one of the two isn't there.
    """
    after, before = catalog.snapshot(after_id), catalog.snapshot(before_id)
    if before is None or (after is None and after_id):
        raise StoreError(f"{catalog.path}: snapshot {before_id} or {after_id} isn't there any more: plan anew")
    joined = None if after is None else _joined(catalog, after, before, cause)
    ids = _keys(catalog, "snapshots", "id", "id > ? AND id < ?", after_id, before_id)
    for snapshot_id in ids:
        for table, name in (("snapshots", "id"), ("roots", "snapshot"), ("digests", "snapshot")):
            catalog.delete(table, name, snapshot_id)
    for snapshot_id in _keys(catalog, "intervals", "snapshot", "snapshot > ? AND snapshot <= ?", after_id, before_id):
        catalog.delete("intervals", "snapshot", snapshot_id)
    if joined is not None:
        catalog.put_interval(joined)
    for name in removed_journals(catalog, after_id, before_id):
        catalog.delete("objects", "name", name)
    from_ns = after.time_ns if after is not None else -SECOND_NS
    for name in _keys(catalog, "bookmarks", "name", "time_ns > ? AND time_ns < ?", from_ns, before.time_ns):
        catalog.delete("bookmarks", "name", name)
    if after is None:
        for gap_id in _keys(catalog, "gaps", "id", "to_time_ns <= ?", before.time_ns):
            catalog.delete("gaps", "id", gap_id)
    catalog.clear_seconds(from_ns, before.time_ns)


def _keys(catalog: Catalog, table: str, key: str, condition: str, *bindings: int) -> Iterator[Any]:
    return (row[0] for row in catalog.rows(f"SELECT {key} FROM {table} WHERE {condition}", bindings))


def _joined(catalog: Catalog, after: Snapshot, before: Snapshot, cause: str) -> Interval:
    """The interval from one snapshot to another."""
    first = catalog.interval_from(after.id)
    if first is None:
        raise StoreError(f"{catalog.path}: no interval begins at snapshot {after.id}: run `pitfs check`")
    positions = after.seq, after.time_ns, before.seq, before.time_ns
    return Interval(before.id, after.id, *positions, first.first_time_ns, None, cause, 0)
