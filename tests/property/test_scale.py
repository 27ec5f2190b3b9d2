"""What a start, a reconnect, a mount and a listing do doesn't grow with the history. Counted, not timed.

A store of a million intervals: tools/make-store makes it, and the slow test below measures it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import pytest

from pitfs.cli.main import main
from pitfs.model.transfer import Hello
from pitfs.store import opening
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import VERSION_1, Layout
from pitfs.store.opening import read_store_info
from pitfs.store.store import Store
from pitfs.view.inodes import ROOT_INODE, TIMES_INODE
from pitfs.view.tree import Tree
from tests.helpers.histories import START_NS, long_store
from tests.helpers.hosts import instant_name

SHORT, LONG = 4_200, 20_000  # intervals of a second; both have more than an hour
HOUR_NS = 3600 * 10**9


@dataclass
class Counted:
    """What was touched: steps of SQLite's machine, rows that it passed over, names in directories, and files."""

    steps: int = 0
    scanned_rows: int = 0
    names: int = 0
    largest_directory: int = 0
    files: int = 0
    of_connections: list[apsw.Connection] = field(default_factory=list)

    @contextlib.contextmanager
    def counting(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        listdir, scandir, stat, open_file = os.listdir, os.scandir, os.stat, os.open

        def profile(event: dict[str, Any]) -> None:
            status = event["stmt_status"]
            self.steps += status["SQLITE_STMTSTATUS_VM_STEP"]
            self.scanned_rows += status["SQLITE_STMTSTATUS_FULLSCAN_STEP"]

        def hook(connection: apsw.Connection) -> None:
            connection.trace_v2(apsw.SQLITE_TRACE_PROFILE, profile)

        def listed(directory: Any = ".") -> list[str]:
            found: list[str] = listdir(directory)
            self.names += len(found)
            self.largest_directory = max(self.largest_directory, len(found))
            return found

        def scanned(directory: Any = ".") -> Any:
            listed(directory)
            return scandir(directory)

        def stated(*arguments: Any, **options: Any) -> Any:
            self.files += 1
            return stat(*arguments, **options)

        def opened(*arguments: Any, **options: Any) -> int:
            self.files += 1
            return open_file(*arguments, **options)

        apsw.connection_hooks.append(hook)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, "listdir", listed)
                patch.setattr(os, "scandir", scanned)
                patch.setattr(os, "stat", stated)
                patch.setattr(os, "open", opened)
                yield
        finally:
            apsw.connection_hooks.remove(hook)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("scale")
    return long_store(root / "short", SHORT, 12), long_store(root / "long", LONG, 12)


def start_writing(store: Path) -> None:
    """A receiver that starts, or a sender that comes again."""
    info = read_store_info(str(store))
    ingest = Ingest(str(store.parent), Hello(info.group, info.history, info.volumes))
    welcome = ingest.welcome()
    assert welcome.seq and len(welcome.coarse) == 256
    ingest.close()


def mount(store: Path) -> None:
    """What a mount does at its start, and for the first replies about its root and its times."""
    with contextlib.closing(Store.open(str(store))) as opened:
        latest = opened.latest()
        assert latest is not None
        tree = Tree(opened, lambda: latest.time_ns)
        assert len(list(itertools.islice(tree.listing(ROOT_INODE, 0), 200))) == 200
        name, day, _ = next(tree.listing(TIMES_INODE, 0))
        assert len(name) == len("2026-11-22")
        assert next(tree.listing(day.inode, 0))
        assert tree.lookup(ROOT_INODE, b"5m-ago") and tree.lookup(ROOT_INODE, b"seq-100")


def list_an_hour(store: Path) -> None:
    start_ns = START_NS + 300 * 10**9
    bounds = ["--from", instant_name(start_ns), "--to", instant_name(start_ns + HOUR_NS)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["list", str(store), *bounds]) == 0
    assert printed.getvalue().count("\n") > 2 * 3600


def ask_status(store: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["status", str(store)]) == 0


@pytest.mark.parametrize("work", [start_writing, mount, list_an_hour, ask_status])
def test_it_touches_no_more_in_a_long_history(
    stores: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, work: Callable[[Path], None]
) -> None:
    counted = []
    for store in stores:
        counted.append(Counted())
        with counted[-1].counting(monkeypatch):
            work(store)
    short, long = counted
    assert long.steps <= short.steps * 1.05 + 200, counted
    assert long.scanned_rows <= short.scanned_rows + 20, counted
    assert long.files <= short.files + 20, counted
    assert long.largest_directory <= 1024 and long.names <= 2500, counted


def test_the_objects_of_a_store_of_version_1_are_not_listed_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are all in one directory, and stay there."""
    with monkeypatch.context() as patch:
        patch.setattr(opening, "VERSION", 1)
        patch.setattr(Layout, "of", lambda volumes: VERSION_1)
        store = long_store(tmp_path, 300, 4)
    assert len(list((store / "objects").glob("*.map"))) > 300
    counted = Counted()
    with counted.counting(monkeypatch):
        start_writing(store)
    assert counted.names < 20
