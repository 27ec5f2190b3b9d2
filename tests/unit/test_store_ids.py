"""Ids of snapshots and logs: enough for decades, and what happens at their end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pitfs.errors import CapacityError, StoreError
from pitfs.model.transfer import VolumeInfo
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG, STORE_JSON
from pitfs.store.opening import read_store_info
from pitfs.store.store import Store
from tests.helpers.stores import ingest_transfer, object_files, read_image
from tests.helpers.streams import batch_of, mark_of
from tests.helpers.transfers import History

VOLUMES = (VolumeInfo("a", 60_000, 8192), VolumeInfo("b", 50_000, 4096))
LAST_ID = (1 << 33) - 1


@pytest.fixture
def history() -> History:
    return History(3, VOLUMES)


def store_at(root: Path, history: History, next_id: int) -> Ingest:
    """A store with a full copy, that has given all ids before `next_id`."""
    ingest = Ingest(str(root), history.hello)
    ingest_transfer(ingest, history.close_interval())
    ingest.close()
    catalog = Catalog(os.path.join(ingest.path, CATALOG), "write")
    with catalog.changes():
        catalog.delete("meta", "key", "next_snapshot")
        catalog.put("meta", ("next_snapshot", next_id))
    catalog.close()
    return Ingest(str(root), history.hello)


def stream(ingest: Ingest, history: History) -> None:
    """An interval, closed."""
    ingest.write(batch_of([history.write() for _ in range(6)]))
    ingest.mark(mark_of(history))
    ingest.stream.wait_for_closing()


def transfer(ingest: Ingest, history: History) -> None:
    """An interval, with its journal."""
    for _ in range(6):
        history.write()
    ingest_transfer(ingest, history.close_interval())


def assert_exact(ingest: Ingest, history: History) -> None:
    store = Store.open(ingest.path)
    for seq in range(history.at[0] + 1):
        found = store.at_seq(seq)
        assert found.seq == seq
        assert [read_image(store, found, volume) for volume in range(2)] == history.states[seq]
    store.close()


@pytest.mark.parametrize("next_id", [(1 << 27) - 2, (1 << 32) - 3, LAST_ID - 5])
def test_a_store_goes_on_where_78_days_of_short_intervals_would_have_been_the_end(
    tmp_path: Path, history: History, next_id: int
) -> None:
    ingest = store_at(tmp_path, history, next_id)
    stream(ingest, history)
    transfer(ingest, history)
    ingest.close()
    ingest = Ingest(str(tmp_path), history.hello)
    stream(ingest, history)
    assert_exact(ingest, history)
    catalog = Catalog(os.path.join(ingest.path, CATALOG))
    last = catalog.last_snapshot()
    assert last is not None and last.id == next_id + 4
    catalog.close()
    assert {path.parent.name for path in object_files(ingest.path)} >= {"000", f"{(next_id + 4) >> 8 & 0xFFF:03x}"}
    ingest.close()


def test_at_the_end_of_ids_nothing_of_a_stream_is_taken_and_it_says_what_to_do(
    tmp_path: Path, history: History
) -> None:
    ingest = store_at(tmp_path, history, LAST_ID - 2)
    stream(ingest, history)
    before = [path.name for path in object_files(ingest.path)]
    batch = batch_of([history.write()])
    with pytest.raises(CapacityError, match=r"all 8589934591 ids .* given.*: move the store away .*stays readable"):
        ingest.write(batch)
    assert [path.name for path in object_files(ingest.path)] == before
    ingest.close()
    assert_exact(ingest, history)


def test_at_the_end_of_ids_no_transfer_begins_but_layers_still_come(tmp_path: Path, history: History) -> None:
    ingest = store_at(tmp_path, history, LAST_ID)
    for _ in range(6):
        history.write()
    last = history.close_interval()
    layers, last.layers = last.layers, []
    ingest_transfer(ingest, last)
    history.write()
    with pytest.raises(CapacityError, match="all 8589934591 ids"):
        ingest.begin(history.close_interval().manifest)
    assert os.listdir(os.path.join(ingest.path, "staging")) == []
    ingest.close()
    ingest = Ingest(str(tmp_path), history.hello)  # it opens, and what it has can become finer
    for each in layers:
        ingest_transfer(ingest, each)
    welcome = ingest.welcome()
    assert (welcome.seq, welcome.coarse) == (6, ())
    ingest.close()


def test_store_json_says_how_pointers_are_made_up_and_no_other_way_is_believed(
    tmp_path: Path, history: History
) -> None:
    ingest = Ingest(str(tmp_path), history.hello)
    ingest.close()
    path = Path(ingest.path, STORE_JSON)
    document = json.loads(path.read_text())
    assert (document["version"], document["unit_bytes"], document["unit_bits"]) == (2, 4096, 30)
    for change in ({"unit_bits": 31}, {"unit_bytes": 512}, {"unit_bits": 0}):
        path.write_text(json.dumps(document | change))
        with pytest.raises(StoreError, match=r"damaged: units of .* don't fit to its volumes"):
            read_store_info(ingest.path)
    for name in ("unit_bytes", "unit_bits"):
        path.write_text(json.dumps({key: value for key, value in document.items() if key != name}))
        with pytest.raises(StoreError, match="damaged"):
            read_store_info(ingest.path)
