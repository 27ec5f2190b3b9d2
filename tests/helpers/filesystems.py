"""A real filesystem on a loop device over the splitter, under load; and what its images must be like.

Used for each kind: `protected_filesystem` runs the load and closes the last interval, `check_instants` takes
images of random instants out of the mount, replays their journal (nothing else), and checks them.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import sysconfig
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.helpers.hosts import Mount, Production, Replica, instant_name
from tests.helpers.load import read_log, row_payload, running
from tests.helpers.loops import LoopDevice, MountedFilesystem
from tests.helpers.processes import run

DATABASES = ("WAL", "DELETE")
SOURCE = Path(sysconfig.get_path("purelib")) / "pip"
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


@dataclass(slots=True)
class Scenario:
    """What a run leaves: both hosts, and the time of the load's begin and end (UTC ns)."""

    kind: str
    tmp: Path
    replica: Replica
    production: Production
    from_ns: int = 0
    to_ns: int = 0
    last: str = ""  # instant of the last snapshot
    tree: Path = field(default_factory=Path)  # the live tree as it was at `last`

    def log(self, journal: str) -> Path:
        return self.tmp / f"{journal}.log"


@contextlib.contextmanager
def protected_filesystem(kind: str, tmp: Path, size_bytes: int, load_s: float) -> Iterator[Scenario]:
    """mkfs, mount, copy and change files, commit rows in WAL and rollback mode; then a last snapshot."""
    with (
        Replica(tmp) as replica,
        Production(tmp, {"root": size_bytes}, port=replica.port, interval="2s", rate="10Gbit") as production,
        LoopDevice(production.volume()) as device,
    ):
        run([*MAKE[kind], device])
        scenario = Scenario(kind, tmp, replica, production)
        with MountedFilesystem(device, tmp / "live", kind) as live:
            (live / "files").mkdir()
            scenario.from_ns = time.time_ns()
            with (
                running("tree", live / "files", "--source", SOURCE),
                running("sqlite", live, scenario.log("WAL"), "--journal", "WAL", "--rate", "200"),
                running("sqlite", live, scenario.log("DELETE"), "--journal", "DELETE", "--rate", "100"),
            ):
                time.sleep(load_s)
            scenario.to_ns = time.time_ns()
            run(["sync", "-f", live])
            scenario.tree = tmp / "tree"
            shutil.copytree(live / "files", scenario.tree)
        scenario.last = production.snapshot()
        yield scenario


def check_instants(scenario: Scenario, count: int, seed: int = 1) -> None:
    """Random instants of the load, and the last snapshot: repaired by replay alone, clean, rows exact."""
    random_ = random.Random(seed)
    times = sorted(random_.randrange(scenario.from_ns, scenario.to_ns) for _ in range(count))
    found = 0
    with Mount(scenario.replica.store(), scenario.tmp) as mount:
        for time_ns in times:
            image = copy_out(mount.image(instant_name(time_ns)), scenario.tmp / "image")
            databases = replay_and_check(scenario.kind, image, scenario.tmp)
            for journal in DATABASES:
                found += check_rows(databases / f"{journal}.db", scenario.log(journal), time_ns)
        image = copy_out(mount.image(scenario.last), scenario.tmp / "image")
        replay_and_check(scenario.kind, image, scenario.tmp)
        check_tree(scenario, image)
    assert found > count, f"only {found} rows in {count} instants: the load did nothing"


def copy_out(image: Path, target: Path) -> Path:
    """Copies an image as a user does."""
    run(["cp", "--sparse=always", image, target])
    return target


def replay_and_check(kind: str, image: Path, tmp: Path) -> Path:
    """Journal replay, then the filesystem's own check; a directory with the databases in it."""
    out = tmp / "databases"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if kind == "ext4":
        run(["e2fsck", "-y", "-E", "journal_only", image], accept=(0, 1))
        run(["e2fsck", "-f", "-n", image])
        for name in database_files():
            run(["debugfs", "-R", f"dump -p /{name} {out / name}", image])
            if (out / name).exists() and not (out / name).stat().st_size and not name.endswith(".db"):
                (out / name).unlink()
        return out
    if kind == "btrfs":
        run(["btrfs", "check", "--readonly", image])
    with LoopDevice(image) as device:
        options = ["nouuid"] if kind == "xfs" else []  # copies of one filesystem share their id
        with MountedFilesystem(device, tmp / "replayed", kind, options) as mounted:
            for name in database_files():
                if (mounted / name).exists():
                    shutil.copy(mounted / name, out)
        if kind == "xfs":
            run(["xfs_repair", "-n", device])
        else:
            run(["btrfs", "check", "--readonly", device])
            run(["btrfs", "device", "scan", "--forget", device], accept=(0, 1))
    return out


def database_files() -> Sequence[str]:
    return [f"{name}.db{end}" for name in DATABASES for end in ("", "-wal", "-journal")]


def check_rows(database: Path, log: Path, time_ns: int) -> int:
    """The rows are exactly those acknowledged by then, plus at most the one under way; how many."""
    log_rows = read_log(log)
    acknowledged = int(np.searchsorted(log_rows["done_ns"], time_ns, side="right"))
    begun = int(np.searchsorted(log_rows["begun_ns"], time_ns, side="right"))
    if not database.exists() or not database.stat().st_size:
        assert acknowledged == 0, f"{database.name}: gone, though {acknowledged} rows were acknowledged"
        return 0
    connection = sqlite3.connect(database)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], database.name
        if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'rows'").fetchall():
            assert acknowledged == 0, f"{database.name}: no table, {acknowledged} rows acknowledged"
            return 0
        rows = connection.execute("SELECT n, payload, checksum FROM rows ORDER BY n").fetchall()
    finally:
        connection.close()
    count = len(rows)
    assert acknowledged <= count <= max(begun, acknowledged + 1) <= acknowledged + 1, (
        f"{database.name} at {instant_name(time_ns)}: {count} rows, {acknowledged} done, {begun} begun"
    )
    assert [row[0] for row in rows] == list(range(1, count + 1))
    for n, payload, checksum in rows:
        assert payload == row_payload(n) and checksum == zlib.crc32(payload), f"{database.name}: row {n}"
    return count


def check_tree(scenario: Scenario, image: Path) -> None:
    """The last snapshot has the same files as the live filesystem had."""
    with (
        LoopDevice(image) as device,
        MountedFilesystem(
            device, scenario.tmp / "last", scenario.kind, ["nouuid"] if scenario.kind == "xfs" else []
        ) as mounted,
    ):
        assert sum(len(files) for _, _, files in os.walk(scenario.tree)) > 50
        run(["diff", "-r", "--no-dereference", scenario.tree, mounted / "files"])
