"""No question to the catalog, and no change of it, looks at all of a history."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from pitfs.cli.main import main
from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG
from pitfs.store.store import Store
from pitfs.view.inodes import BOOKMARKS_INODE, ROOT_INODE, TIMES_INODE
from pitfs.view.tree import Tree
from tests.helpers.stores import ingest_transfer
from tests.helpers.streams import FakeClock, batch_of, mark_of
from tests.helpers.transfers import History

OF_OPEN_INTERVALS = ("pieces", "tails")  # tables that have the one or two open intervals


@pytest.fixture
def asked() -> Iterator[set[str]]:
    """Every statement that is run meanwhile."""
    statements: set[str] = set()

    def note(cursor: apsw.Cursor, sql: str, bindings: Any) -> bool:
        statements.add(sql)
        return True

    def trace(connection: apsw.Connection) -> None:
        connection.exec_trace = note

    apsw.connection_hooks.append(trace)
    yield statements
    apsw.connection_hooks.remove(trace)


def use_everything(root: Path) -> Path:
    """A store written in all ways, and asked for all that there is to ask; its catalog."""
    history, clock = History(5, (VolumeInfo("a", 9_000, 1024), VolumeInfo("b", 5_000, 512))), FakeClock()
    ingest = Ingest(str(root), history.hello, clock)
    ingest_transfer(ingest, history.close_interval())
    for number in range(3):
        for _ in range(6):
            history.write()
        ingest_transfer(ingest, history.close_interval(bookmarks=(f"b{number}",), before_ns=(50_000_000,)))
        ingest.write(batch_of([history.write() for _ in range(4)]))
        ingest.flush(history.times_ns[-1])
        ingest.mark(mark_of(history))
        ingest.stream.wait_for_closing()
    ingest.write(batch_of([history.write()]))
    ingest.close()
    ingest = Ingest(str(root), history.hello, clock)
    ingest.welcome()
    ingest.close()
    store = Store.open(ingest.path)
    for seq in range(len(history.states)):
        store.at_seq(seq)
        store.at_time(history.times_ns[seq])
    store.first(), list(store.newest_snapshots()), list(store.open_intervals()), store.last_gap()
    tree = Tree(store, lambda: history.times_ns[-1])
    listed: list[tuple[str, Any, int]] = []
    for inode in (ROOT_INODE, BOOKMARKS_INODE, TIMES_INODE):
        listed += tree.listing(inode, 0)
    for name, entry, _ in listed:
        if len(name) == len("2026-11-22"):
            minutes = list(tree.listing(entry.inode, 0))
            for _, minute, _ in minutes:
                list(tree.listing(minute.inode, 0))
    tree.lookup(ROOT_INODE, format_instant(history.times_ns[3]).encode())
    store.close()
    assert main(["list", ingest.path, "--from", "seq-3", "--json"]) == 0
    assert main(["status", ingest.path]) == 0
    return Path(ingest.path, CATALOG)


def whole_tables(connection: apsw.Connection, sql: str) -> list[str]:
    """Steps of a statement that go through a table or an index from its beginning to its end."""
    found = []
    for _, _, _, step in connection.execute(f"EXPLAIN QUERY PLAN {sql}", [1] * sql.count("?")):
        if step.startswith("SCAN") and step.split()[1] not in OF_OPEN_INTERVALS:
            # In the order of an index, and without a condition but that of the index: it ends at the limit.
            is_ended = " LIMIT " in sql and (" WHERE " not in sql or "USING INDEX intervals_coarse" in step)
            found += [] if is_ended else [step]
        if "TEMP B-TREE" in step:
            found.append(step)
    return found


def test_no_statement_goes_through_a_whole_table(tmp_path: Path, asked: set[str]) -> None:
    catalog = use_everything(tmp_path)
    connection = apsw.Connection(str(catalog), flags=apsw.SQLITE_OPEN_READONLY)
    statements = {sql for sql in asked if sql.split()[0] in ("SELECT", "DELETE")}
    # A new log of the catalog begins with all of it, once, and when it has grown to twice that.
    statements -= {sql for sql in statements if len(sql.split()) == 4 or "sqlite_master" in sql}
    assert len(statements) > 25
    assert {table for table in ("snapshots", "intervals", "objects", "gaps", "minutes", "roots", "bookmarks", "meta")
            if not any(f"FROM {table} " in sql for sql in statements)} == set()  # fmt: skip
    for sql in sorted(statements):
        assert whole_tables(connection, sql) == [], sql
    for sql in ("SELECT * FROM snapshots WHERE mark = ? LIMIT 1", "SELECT count(*) FROM objects",
                "SELECT * FROM gaps ORDER BY cause LIMIT 1", "DELETE FROM objects WHERE snapshot = ?"):  # fmt: skip
        assert whole_tables(connection, sql), "it would be noticed"
    connection.close()
