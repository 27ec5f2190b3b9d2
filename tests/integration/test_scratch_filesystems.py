"""Filesystems that were never unmounted, writable on the replica: journal replay, a database, fsck afterwards."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest

from tests.helpers.filesystems import MAKE
from tests.helpers.hosts import Mount, Production, Replica, digest, xxhsum
from tests.helpers.load import running
from tests.helpers.loops import LoopDevice, MountedFilesystem
from tests.helpers.processes import run

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]

MIB = 1 << 20
SIZES = {"ext4": 32 * MIB, "xfs": 300 * MIB, "btrfs": 128 * MIB}
CHECK = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "--readonly"]}
ROWS = 50


def insert(directory: Path, first: int, count: int) -> sqlite3.Connection:
    """Rows in WAL mode, each committed; the connection stays open, so the log isn't written back."""
    connection = sqlite3.connect(directory / "rows.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE IF NOT EXISTS rows (n INTEGER PRIMARY KEY, payload BLOB)")
    for n in range(first, first + count):
        connection.execute("INSERT INTO rows VALUES (?, ?)", (n, bytes([n % 251]) * 1000))
    return connection


def rows(directory: Path) -> int:
    with contextlib.closing(sqlite3.connect(directory / "rows.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = connection.execute("SELECT n, payload FROM rows ORDER BY n").fetchall()
    assert found == [(n, bytes([n % 251]) * 1000) for n in range(len(found))]
    return len(found)


def use(kind: str, image: Path, tmp: Path) -> None:
    """Mounts the image read-write, goes on with the database, writes files; the filesystem is whole then."""
    options = ["nouuid"] if kind == "xfs" else []  # that of production is mounted beside it
    with LoopDevice(image) as device:
        with MountedFilesystem(device, tmp / f"{kind}.writable", kind, options) as directory:
            assert rows(directory) == ROWS
            insert(directory, ROWS, ROWS).close()
            assert rows(directory) == 2 * ROWS
            (directory / "new").write_bytes(os.urandom(3 * MIB))
            (directory / "file").unlink()
        run([*CHECK[kind], device])
        with MountedFilesystem(device, tmp / f"{kind}.writable", kind, options) as directory:
            assert rows(directory) == 2 * ROWS and (directory / "new").stat().st_size == 3 * MIB
        if kind == "btrfs":
            run(["btrfs", "device", "scan", "--forget", device], accept=(0, 1))


def test_filesystems_replay_their_journals_and_are_written_while_replication_goes_on(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with (
        contextlib.ExitStack() as stack,
        Replica(tmp_path) as replica,
        Production(tmp_path, SIZES, port=replica.port, rate="10Gbit") as production,
    ):
        live = {}
        for kind in SIZES:
            device = stack.enter_context(LoopDevice(production.volume(kind)))
            run([*MAKE[kind], device])
            live[kind] = stack.enter_context(MountedFilesystem(device, tmp_path / kind, kind))
            (live[kind] / "file").write_bytes(os.urandom(MIB))
            run(["sync", "-f", live[kind]])
            stack.callback(insert(live[kind], 0, ROWS).close)
            (live[kind] / "unsynced").write_bytes(os.urandom(MIB))
        instant = production.snapshot()
        with Mount(replica.store(), tmp_path, options=f"scratch={tmp_path / 'scratch'}") as mount:
            before = {kind: xxhsum(mount.image(instant, kind)) for kind in SIZES}
            with running("sqlite", live["ext4"], tmp_path / "log", "--journal", "DELETE", "--rate", "100"):
                for kind in ("ext4", "xfs"):
                    use(kind, mount.image(instant, kind), tmp_path)
                later = production.snapshot()
            assert later > instant
            stack.close()  # btrfs takes two devices of one id for one filesystem: production's is unmounted first
            use("btrfs", mount.image(instant, "btrfs"), tmp_path)
            assert xxhsum(mount.image(instant, "ext4")) != before["ext4"]
            assert mount.complaints() == []
        assert {kind: digest(replica.store(), instant, kind) for kind in SIZES} == before
        assert os.listdir(tmp_path / "scratch") == []
