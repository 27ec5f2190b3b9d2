"""What is committed of an object never changes: not one byte, whatever comes later."""

from __future__ import annotations

from pathlib import Path

from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import OBJECTS, ObjectHeader, ObjectKind
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

VOLUMES = (VolumeInfo("root", 300_000, 1024), VolumeInfo("data", 5_000, 512))


def objects(ingest: Ingest) -> dict[str, bytes]:
    files = (file for file in (Path(ingest.path) / OBJECTS).rglob("*") if file.is_file())
    return {file.name: file.read_bytes() for file in files}


def test_further_layers_change_no_byte_of_the_contents_that_are_there(tmp_path: Path) -> None:
    history = History(7, VOLUMES)
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    for _ in range(300):
        history.write()
    transfer = history.close_interval(0, before_ns=(10_000_000_000, 1_000_000_000, 100_000_000))
    layers, transfer.layers = transfer.layers, []
    ingest_transfer(ingest, transfer)
    grown = 0
    for each in layers:
        before = objects(ingest)
        ingest_transfer(ingest, each)
        after = objects(ingest)
        for name, data in before.items():
            assert after.get(name, data)[: len(data)] == data, name
            grown += len(after.get(name, data)) > len(data)
    assert grown >= 2
    files = objects(ingest).items()
    (contents,) = (data for name, data in files if name.startswith("journal-") and name.endswith(".blocks"))
    header = ObjectHeader.decode(contents, "")
    assert (header.kind, header.data_bytes) == (ObjectKind.JOURNAL_BLOCKS, 0), "its length is the catalog's to say"
    ingest.close()
