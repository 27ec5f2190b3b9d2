"""What the catalog says of snapshots that go: their rows, and those of their intervals, go; one interval is left."""

from __future__ import annotations

from pitfs.errors import StoreError
from pitfs.model.position import SECOND_NS
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Interval


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
    first = catalog.interval_from(after_id)
    if before is None or (after_id and (after is None or first is None)):
        raise StoreError(f"{catalog.path}: snapshot {before_id} or {after_id} isn't there any more: plan anew")
    ids, times_ns = (after_id, before_id), (-SECOND_NS if after is None else after.time_ns, before.time_ns)
    between = "{0} > ? AND {0} < ?".format
    for table, key, condition, bounds in (
        ("snapshots", "id", between("id"), ids),
        ("roots", "snapshot", between("snapshot"), ids),
        ("digests", "snapshot", between("snapshot"), ids),
        ("intervals", "snapshot", "snapshot > ? AND snapshot <= ?", ids),
        ("bookmarks", "name", between("time_ns"), times_ns),
        *([("gaps", "id", "to_time_ns BETWEEN ? AND ?", (-SECOND_NS, before.time_ns))] if after is None else []),
    ):
        for (value,) in catalog.rows(f"SELECT {key} FROM {table} WHERE {condition}", bounds):
            catalog.delete(table, key, value)
    for name in removed_journals(catalog, after_id, before_id):
        catalog.delete("objects", "name", name)
    if after is not None and first is not None:
        positions = after.seq, after.time_ns, before.seq, before.time_ns
        catalog.put_interval(Interval(before_id, after_id, *positions, first.first_time_ns, None, cause, 0))
    catalog.clear_seconds(*times_ns)
