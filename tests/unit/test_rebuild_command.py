"""`pitfs check --rebuild`, as users meet it."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from pitfs.cli.main import main
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG, CATALOG_LOG
from tests.helpers.stores import ingest_transfer, object_files
from tests.helpers.transfers import History


@pytest.fixture
def store(tmp_path: Path) -> Path:
    history = History(5, (VolumeInfo("a", 9_000, 1024),))
    with closing(Ingest(str(tmp_path), history.hello)) as ingest:
        for _ in range(3):
            ingest_transfer(ingest, history.close_interval())
            history.write()
    return tmp_path / "db1"


def test_a_store_without_its_catalog_says_what_to_do_and_that_helps(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", str(store)]) == 0
    listed = capsys.readouterr().out
    (store / CATALOG).unlink()
    assert main(["list", str(store)]) == 2
    assert "pitfs check STORE --rebuild" in capsys.readouterr().err
    assert main(["check", str(store), "--rebuild"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{store}: 3 snapshots, 2 intervals, 0 bookmarks, 0 gaps: nothing is missing\n"
    assert main(["list", str(store)]) == 0
    assert capsys.readouterr().out == listed
    assert main(["check", str(store), "--data"]) == 0


def test_what_is_missing_is_said_and_the_catalog_of_before_is_kept(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / CATALOG_LOG).unlink()
    object_files(store, "snapshot-*2.map")[0].unlink()
    before = (store / CATALOG).read_bytes()
    assert main(["check", str(store), "--rebuild"]) == 1
    said = capsys.readouterr()
    assert "block map is lost or damaged: instants after 20" in said.err and "no instant between" in said.err
    assert "what is missing is said above (2 lines)\nthe catalog of before is " in said.out
    (kept,) = store.glob(f"{CATALOG}.2*Z")
    assert kept.read_bytes() == before


def test_wrong_use(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(store), "--rebuild", "--data"]) == 0
    assert main(["check", str(store.parent / "none"), "--rebuild"]) == 2
    history = History(5, (VolumeInfo("a", 9_000, 1024),))
    capsys.readouterr()
    with closing(Ingest(str(store.parent), history.hello)):
        assert main(["check", str(store), "--rebuild"]) != 0
    printed = capsys.readouterr().err
    assert f"pid {os.getpid()}" in printed and "pitfs receive" in printed and ".lock" not in printed
