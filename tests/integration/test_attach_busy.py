"""Filesystems that are busy all the time, attached plainly: their journals are replayed, so nothing is missing."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pitfs.cli import attach
from pitfs.cli.main import main
from tests.helpers.attaching import nothing_left, pitfs
from tests.helpers.hosts import Production, Replica, digest
from tests.helpers.loops import LoopDevice, MountedFilesystem, force_unmount
from tests.helpers.processes import pitfs_command, run

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.loop, pytest.mark.timeout(180)]

MIB = 1 << 20
SIZES = {"ext4": 64 * MIB, "xfs": 300 * MIB, "btrfs": 128 * MIB}
# A small journal is filled many times over, so what is journalled again and again is so through all checkpoints.
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-J", "size=4"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
COMMITS = 800


@dataclass
class Busy:
    """What a busy filesystem has on it: files and rows, all of them synced."""

    directory: Path
    names: list[str] = field(default_factory=list)
    rows: int = 0


@contextlib.contextmanager
def busy_filesystem(directory: Path) -> Iterator[Busy]:
    """Rows in WAL mode, each committed with an fsync, and now and then a small file that is synced.

    The database is open as long as the context, since closing it would remove its log.
    """
    busy = Busy(directory)
    with contextlib.closing(sqlite3.connect(directory / "rows.db", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE rows (n INTEGER PRIMARY KEY, payload BLOB)")
        for busy.rows in range(1, COMMITS + 1):
            database.execute("INSERT INTO rows VALUES (?, ?)", (busy.rows, payload(busy.rows)))
            if busy.rows % 10 == 0:
                busy.names.append(f"file-{busy.rows}")
                with open(directory / busy.names[-1], "wb") as file:
                    file.write(payload(busy.rows))
                    file.flush()
                    os.fsync(file.fileno())
        yield busy


def payload(number: int) -> bytes:
    return bytes([number % 251]) * 1500


def missing(busy: Busy, then: Path, tmp: Path) -> list[str]:
    """What the filesystem mounted at `then` lacks, or has in another way."""
    lacks = []
    for number, name in enumerate(busy.names, 1):
        try:
            if (then / name).read_bytes() != payload(number * 10):
                lacks.append(f"{name} is another")
        except OSError as error:
            lacks.append(str(error))
    copy = tmp / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    try:
        for name in ("rows.db", "rows.db-wal"):
            shutil.copy(then / name, copy)
        with contextlib.closing(sqlite3.connect(copy / "rows.db")) as database:
            lacks += [row[0] for row in database.execute("PRAGMA integrity_check") if row != ("ok",)]
            (found,) = database.execute("SELECT count(*) FROM rows").fetchone()
            lacks += [f"{found} of {busy.rows} rows"] if found != busy.rows else []
    except (OSError, sqlite3.DatabaseError) as error:
        lacks.append(str(error))
    return lacks


def lacking_when_attached(busy: Busy, tmp: Path, *arguments: str | Path) -> tuple[list[str], str]:
    """What is missing once the instant is attached, and mounted as attach says; and all that attach says."""
    done = run([*pitfs_command(), "attach", *arguments])
    device = done.stdout.strip()
    (options,) = re.findall(rf"mount -o (\S+) {device} DIR", done.stderr)
    try:
        mount = ["mount", "-o", options, device, tmp / "then"]
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        return mounted.stderr.splitlines() + missing(busy, tmp / "then", tmp), done.stderr
    finally:
        force_unmount(tmp / "then")
        pitfs("detach", device)


def check_a_replay_without_room(tmp: Path, store: Path, instant: str) -> None:
    """Mounting fails with an error, and attach has said before what that means."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        patch.setattr(attach, "REPLAY_SIZE", "8KiB")
        patch.setattr(attach, "LOW_BYTES", 1 << 62)
        with redirect_stdout(io.StringIO()) as device:
            assert main(["attach", str(store), instant, "root"]) == 0
    words = r"/var/tmp: [\d.]+ MiB are free: if mounting or writing to the device fails with an I/O error"
    assert re.search(words, said.getvalue())
    run(["mount", "-o", "ro", device.getvalue().strip(), tmp / "then"], accept=(32,))
    pitfs("detach", device.getvalue().strip())


@pytest.mark.parametrize("kind", SIZES)
def test_nothing_is_missing_in_a_busy_filesystem(kind: str, tmp_path: Path) -> None:
    (tmp_path / "then").mkdir()
    with (
        Replica(tmp_path) as replica,
        Production(tmp_path, {"root": SIZES[kind]}, port=replica.port, rate="10Gbit") as production,
        contextlib.ExitStack() as live,
    ):
        device = live.enter_context(LoopDevice(production.volume()))
        run([*MAKE[kind], device])
        mounted = live.enter_context(MountedFilesystem(device, tmp_path / "live", kind))
        busy = live.enter_context(busy_filesystem(mounted))
        instant = production.snapshot()
        before = digest(replica.store(), instant)
        if kind == "btrfs":  # takes two devices of one id for one filesystem: production's is unmounted first
            live.close()
            run(["btrfs", "device", "scan", "--forget", device], accept=(0, 1))
        with nothing_left(replica.store()):
            lacks, said = lacking_when_attached(busy, tmp_path, replica.store(), instant, "root")
            assert lacks == [] and "may be minutes old" not in said
            if kind == "ext4":  # the files are in blocks that it journals again before each checkpoint
                lacks, said = lacking_when_attached(busy, tmp_path, replica.store(), instant, "root", "--plain")
                assert lacks != [] and "may be minutes old: safe only if the ext4 was unmounted or frozen" in said
                check_a_replay_without_room(tmp_path, replica.store(), instant)
        assert digest(replica.store(), instant) == before
