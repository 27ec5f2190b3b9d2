"""A gap whose row or index is damaged is an error where gaps are asked for: it is never missing in silence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from pitfs.errors import CorruptionError
from pitfs.model.transfer import Gap, VolumeInfo
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """Of a store with three gaps."""
    history = History(5, (VolumeInfo("a", 9_000, 1024),))
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    for _ in range(3):
        history.write()
        ingest_transfer(ingest, history.close_interval())
        history.write()
        ingest_transfer(ingest, history.close_interval(full=True))
    ingest.close()
    opened = Catalog(os.path.join(ingest.path, CATALOG))
    yield opened
    opened.close()


def damage(catalog: Catalog, column: str, value: object, gap: int) -> None:
    with apsw.Connection(catalog.path) as db:
        db.execute(f"UPDATE gaps SET {column} = ? WHERE id = ?", (value, gap))


def test_gaps_are_found_from_any_time(catalog: Catalog) -> None:
    gaps = list(catalog.gaps())
    assert len(gaps) == 3 and catalog.last_gap() == gaps[-1]
    ends_ns = {gap.from_time_ns for gap in gaps} | {gap.to_time_ns for gap in gaps}
    times_ns = sorted(end_ns + step for end_ns in ends_ns for step in (-1, 0, 1))
    for from_ns in times_ns:
        assert list(catalog.gaps(from_ns)) == [gap for gap in gaps if gap.to_time_ns >= from_ns]
        for to_ns in (time_ns for time_ns in times_ns if time_ns > from_ns):
            expected = any(gap.from_time_ns < to_ns and gap.to_time_ns > from_ns for gap in gaps)
            assert catalog.has_gap(from_ns, to_ns) == expected


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    ("column", "value"),
    [("from_seq", 7), ("from_time_ns", 5), ("to_seq", 1), ("to_time_ns", 9), ("to_time_ns", 1 << 61), ("cause", "x")],
)
def test_a_damaged_gap_is_an_error(catalog: Catalog, column: str, value: object, number: int) -> None:
    gap: Gap = list(catalog.gaps())[number - 1]
    damage(catalog, column, value, number)
    with pytest.raises(CorruptionError):
        catalog.has_gap(gap.from_time_ns, gap.to_time_ns)
    with pytest.raises(CorruptionError):
        list(catalog.gaps(gap.from_time_ns))
    with pytest.raises(CorruptionError):
        list(catalog.gaps())
    if number == 3:
        with pytest.raises(CorruptionError):
            catalog.last_gap()


def test_a_damaged_row_of_an_object_is_an_error_where_files_are_looked_for(catalog: Catalog) -> None:
    with apsw.Connection(catalog.path) as db:
        ((name,),) = list(db.execute("SELECT name FROM objects LIMIT 1"))
        db.execute("UPDATE objects SET data_bytes = data_bytes + 1 WHERE name = ?", (name,))
    with pytest.raises(CorruptionError):
        catalog.unknown_objects([name])
