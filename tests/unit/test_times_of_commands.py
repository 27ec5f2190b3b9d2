"""What commands make of a TIME: a bookmark that reads as a time, and what is proposed for what says none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pitfs.cli.common.times import resolve
from pitfs.cli.main import main
from pitfs.errors import NoSuchInstantError, UsageError
from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

NAMES = ("before-upgrade", "latest", "seq-0", "2026-11-22", "yesterday")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """One of an older production, which took any name."""
    history = History(5, (VolumeInfo("root", 40_000, 4096),))
    with contextlib.closing(Ingest(str(tmp_path), history.hello)) as ingest:
        ingest_transfer(ingest, history.close_interval())
        for name in (*NAMES, ""):
            for _ in range(3):
                history.write()
            ingest_transfer(ingest, history.close_interval(0, [name] if name else []))
    with contextlib.closing(Store.open(str(tmp_path / "db1"))) as opened:
        yield opened


def test_bookmarks_of_an_older_production_are_kept_and_reached_by_their_place(store: Store) -> None:
    assert [each.name for each in store.bookmarks()] == list(NAMES)
    for number, name in enumerate(NAMES, 1):
        assert resolve(store, f"bookmarks/{name}")[0].seq == 3 * number


def test_a_time_that_is_a_bookmarks_name_too_is_said_to_be_both(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve(store, "seq-0")[0].seq == 0
    assert "bookmark of that name is bookmarks/seq-0" in capsys.readouterr().err
    assert resolve(store, "latest")[0].seq == 18
    assert "bookmark of that name is bookmarks/latest" in capsys.readouterr().err
    resolve(store, "seq-1")
    resolve(store, "before-upgrade")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("before-upgrad", "did you mean before-upgrade?"),
        ("lates", "did you mean latest?"),
        ("seq_0", "did you mean seq-0?"),
        ("today", "did you mean 20"),
        ("zzzz", "rite for example 2026-11-22T23:54:00Z"),
    ],
)
def test_what_is_no_time_gets_the_nearest_that_there_is(store: Store, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(store, text)
    assert words in str(caught.value)
    assert "is not a time" in str(caught.value) and "rite for example" in str(caught.value)


def test_a_time_of_day_is_proposed_on_a_day_that_the_store_has(store: Store) -> None:
    day = format_instant(store.protected_through_ns())[:10]
    with pytest.raises(UsageError, match=f"did you mean {day}T00:00"):
        resolve(store, "00:00")


def test_a_misspelt_bookmark_in_its_directory_gets_the_nearest(store: Store) -> None:
    with pytest.raises(NoSuchInstantError, match="did you mean bookmarks/before-upgrade"):
        resolve(store, "bookmarks/before-upgrad")


@pytest.mark.parametrize("name", ["latest", "seq-12", "2026-11-22", "5m-ago", "yesterday"])
def test_bookmark_refuses_a_name_that_reads_as_a_time(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bookmark", os.fspath(tmp_path / "none.toml"), name]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"pitfs: bookmark '{name}': reads as a time") and line.count("\n") == 1
