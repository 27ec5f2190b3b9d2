"""A store of one volume with an ext4 on it and a SQLite database in that, and two of its writes broke them.

The writes are those that a database and a file in use get: pages of real transactions, blocks of a ledger. Two of them
are a bad controller's: one loses the inode of a file, one goes over a page of the database's table.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path
from typing import Final

import numpy as np

from pitfs.model.position import format_instant
from pitfs.model.transfer import (
    DIFF_ENTRY,
    Data,
    End,
    Hello,
    Manifest,
    Section,
    Source,
    StreamMark,
    TransferKind,
    VolumeInfo,
)
from pitfs.store.ingest import Ingest
from tests.helpers.histories import unsynced
from tests.helpers.loops import free_file
from tests.helpers.processes import run
from tests.helpers.streams import batch_of
from tests.helpers.transfers import START_NS, Write

BLOCK: Final = 4096
SIZE: Final = 8 << 20
STEP_NS: Final = 5_000_000
ROWS: Final = 400
BATCH: Final = 256
# Exits with 0 if the database is well: the way to it is that of a restore.
CHECK_DATABASE: Final = """\
import os, sqlite3, subprocess, sys, tempfile
with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
    out = os.path.join(place, "db")
    subprocess.run(["debugfs", "-R", f"dump /db {out}", sys.argv[1]], check=True, capture_output=True)
    try:
        found = sqlite3.connect(out).execute("PRAGMA integrity_check").fetchall()
    except sqlite3.DatabaseError:
        sys.exit(1)
sys.exit(found != [("ok",)])
"""
DATABASE_COMMAND: Final = [sys.executable, "-c", CHECK_DATABASE]
FILESYSTEM_COMMAND: Final = ["e2fsck", "-f", "-n"]


@dataclass(frozen=True, slots=True)
class BrokenDisk:
    """The store: volume `root`, writes 1 to `last`; write `filesystem` broke the ext4, `database` the SQLite."""

    path: Path
    last: int
    filesystem: int
    database: int

    def instant(self, seq: int) -> str:
        return format_instant(START_NS + seq * STEP_NS)


def broken_disk(tmp: Path, last: int, filesystem: int, database: int) -> BrokenDisk:
    """Makes it, in tmp/db1: a closed interval of three quarters and an open one, with every write."""
    image = tmp / "root.img"
    _make_image(tmp, image)
    pages = blocks_of(image, "/db")
    broken = {
        filesystem: _without_ledger(image),
        database: (pages[len(pages) // 2], np.random.default_rng(1).bytes(BLOCK)),
    }
    ledger, transactions = _ledger(image), _transactions(tmp / "tree" / "db", pages, but=broken[database][0])
    usual = (next(transactions if seq % 4 == 0 else ledger) for seq in count(1))
    writes = (
        Write(seq, START_NS + seq * STEP_NS, 0, block, [content])
        for seq, (block, content) in enumerate((broken.get(seq, each) for seq, each in enumerate(usual, 1)), 1)
    )
    with received(tmp, {"root": image}) as ingest:
        at = 0
        for end in (last * 3 // 4, last):
            while at < end:
                ingest.write(batch_of(list(islice(writes, min(BATCH, end - at)))))
                at += min(BATCH, end - at)
            if end < last:
                ingest.mark(StreamMark(2, at, START_NS + at * STEP_NS, START_NS + at * STEP_NS))
        ingest.publish()
        ingest.stream.wait_for_closing()
    return BrokenDisk(tmp / "db1", last, filesystem, database)


@contextlib.contextmanager
def received(tmp: Path, images: dict[str, Path]) -> Iterator[Ingest]:
    """A store in tmp/db1 whose first snapshot has these images, to be written on."""
    volumes = tuple(VolumeInfo(name, image.stat().st_size, BLOCK) for name, image in images.items())
    with unsynced(), contextlib.closing(Ingest(str(tmp), Hello("db1", "b0".rjust(32, "0"), volumes))) as ingest:
        _full_copy(ingest, [image.read_bytes() for image in images.values()])
        yield ingest


def _make_image(tmp: Path, image: Path) -> None:
    """An ext4 with a database and a ledger."""
    tree = tmp / "tree"
    tree.mkdir()
    with contextlib.closing(sqlite3.connect(tree / "db")) as database:
        database.execute(f"PRAGMA page_size = {BLOCK}")
        database.execute("CREATE TABLE rows (n INTEGER PRIMARY KEY, content BLOB)")
        database.executemany("INSERT INTO rows VALUES (?, zeroblob(500))", ((n,) for n in range(ROWS)))
        database.commit()
    (tree / "ledger").write_bytes(b"monday,100".ljust(BLOCK) * 64)
    free_file(image, SIZE)
    run(["mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-d", tree, image])


def blocks_of(image: Path, name: str) -> list[int]:
    return [int(block) for block in run(["debugfs", "-R", f"blocks {name}", image]).stdout.split()]


def _without_ledger(image: Path) -> tuple[int, bytes]:
    """A block of the inode table with the ledger's inode lost."""
    said = run(["debugfs", "-R", "imap /ledger", image]).stdout
    match = re.search(r"located at block (\d+), offset 0x([0-9a-f]+)", said)
    assert match is not None
    block, offset = int(match[1]), int(match[2], 16)
    content = bytearray(image.read_bytes()[block * BLOCK : (block + 1) * BLOCK])
    content[offset : offset + 256] = bytes(256)
    return block, bytes(content)


def _ledger(image: Path) -> Iterator[tuple[int, bytes]]:
    """Writes to the ledger, block by block, without an end."""
    for number, block in enumerate(cycle(blocks_of(image, "/ledger"))):
        yield block, f"{number},100".encode().ljust(BLOCK)


def _transactions(database: Path, blocks: list[int], but: int) -> Iterator[tuple[int, bytes]]:
    """The pages that one transaction after the other changes, without an end; but that block is never written."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        before = database.read_bytes()
        for number in count(1):
            connection.execute(
                "UPDATE rows SET content = ? WHERE n = ?", (number.to_bytes(4, "big") * 125, number * 7 % ROWS)
            )
            now = database.read_bytes()
            for page, block in enumerate(blocks):
                content = now[page * BLOCK : (page + 1) * BLOCK]
                if block != but and content != before[page * BLOCK : (page + 1) * BLOCK]:
                    yield block, content
            before = now


def _full_copy(ingest: Ingest, images: list[bytes]) -> None:
    """The state before the first write."""
    contents = {
        (volume, start // BLOCK): image[start : start + BLOCK]
        for volume, image in enumerate(images)
        for start in range(0, len(image), BLOCK)
        if image[start : start + BLOCK] != bytes(BLOCK)
    }
    rows = np.zeros(len(contents), DIFF_ENTRY)
    rows["volume"], rows["block"] = np.array(list(contents)).T
    rows["source"] = Source.SNAPSHOT
    ingest.begin(
        Manifest(
            mark=1, kind=TransferKind.FULL, from_seq=0, from_time_ns=START_NS, to_seq=0, to_time_ns=START_NS,
            first_time_ns=None, protected_through_ns=START_NS, granularity_ns=None, cause="", diff_count=None,
            journal_count=0, position_count=0, identity="full copy",
        )
    )  # fmt: skip
    for start in range(0, len(rows), BATCH):
        part = slice(start, start + BATCH)
        ingest.data(Data(Section.DIFF, start * rows.itemsize, rows[part].tobytes()))
        ingest.data(Data(Section.DIFF_BLOCKS, start * BLOCK, b"".join(list(contents.values())[part])))
    ingest.end(End((rows.nbytes, len(rows) * BLOCK, 0, 0, 0)))
