"""Damage that readers meet is remembered: once for each place, bounded, never an error of its own."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from pitfs.cli.main import main
from pitfs.errors import CorruptionError
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.objects import damage
from pitfs.store.objects.damage import Damage, DamageLog
from pitfs.store.store import Store
from pitfs.view.view import PointInTimeView, ReadBuffer
from tests.helpers.stores import ingest_transfer, object_files
from tests.helpers.transfers import History


@pytest.fixture
def store_path(tmp_path: Path) -> str:
    history = History(7, (VolumeInfo("root", 30_000, 512),))
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    for _ in range(30):
        history.write()
    ingest_transfer(ingest, history.close_interval(0))
    ingest.close()
    return ingest.path


def places(count: int) -> list[Damage]:
    return [Damage("journal-1.blocks", 512 * place, 512, "content", 0, place, 1 << 63, 4, 7) for place in range(count)]


def test_a_place_is_remembered_once_whoever_meets_it(tmp_path: Path) -> None:
    found = places(20)
    threads = [
        threading.Thread(target=lambda: [DamageLog(str(tmp_path)).note(each) for each in found]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known = DamageLog(str(tmp_path)).known()
    assert sorted(known, key=lambda each: each.offset) == found


def test_what_is_replaced_stays_and_a_line_that_was_cut_or_changed_is_passed_over(tmp_path: Path) -> None:
    log = DamageLog(str(tmp_path))
    log.replace(places(3))
    assert log.known() == places(3)
    data = Path(log.path).read_bytes()
    Path(log.path).write_bytes(data[:40].replace(b"journal", b"jOurnal") + data[40:-9])
    assert log.known() == places(3)[1:2]
    log.note(places(3)[0])
    assert log.known() == [places(3)[1], places(3)[0]]
    log.update(lambda known: known[1:])
    assert log.known() == places(1)


def test_it_is_bounded_and_no_error_where_the_store_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage, "MAX_PLACES", 5)
    log = DamageLog(str(tmp_path))
    for each in places(8):
        log.note(each)
    assert log.known() == places(5)
    DamageLog(str(tmp_path / "not there")).note(places(1)[0])
    monkeypatch.setattr(os, "open", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(30, "read-only")))
    log.note(Damage("other", 0, 0, "missing"))
    assert log.known() == places(5)


@pytest.mark.parametrize(
    ("pattern", "offset", "kind"),
    [("snapshot-*2.blocks", 4096, "content"), ("snapshot-*2.map", 4096, "node"), ("snapshot-*2.map", 9, "header"),
     ("journal-*2-*.index", 4100, "index"), ("snapshot-*2.blocks", None, "missing")],
)  # fmt: skip
def test_a_reader_remembers_what_it_meets_and_status_says_so(
    store_path: str, capsys: pytest.CaptureFixture[str], pattern: str, offset: int | None, kind: str
) -> None:
    (path,) = object_files(store_path, pattern)
    if offset is None:
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)
    store = Store.open(store_path)
    for seq in range(31):
        for _ in range(2):
            try:
                view = PointInTimeView(store, store.at_seq(seq), 0)
                view.read(0, view.size_bytes, ReadBuffer())
            except CorruptionError:
                continue
    store.close()
    known = DamageLog(store_path).known()
    assert {(each.object, each.kind) for each in known} == {(path.name, kind)}
    assert len(known) == len({each.place for each in known})
    assert main(["status", store_path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["damaged"] == len(known)
    assert main(["status", store_path]) == 0
    assert "pitfs check" in capsys.readouterr().out
