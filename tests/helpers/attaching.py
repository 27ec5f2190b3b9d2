"""A store with disks in it that can be attached, and what is attached of it."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from pitfs.cli.main import main
from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from tests.helpers.processes import run, wait_until
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

MIB = 1 << 20
BEFORE, AFTER = b"monday,100\n" * 300, b"sunday,000\n" * 300


class Disks:
    """The store `path`: at `before` a ledger on each filesystem is BEFORE, at `after` it is AFTER.

    Volumes: `disk` has a GPT, whose second partition has an ext4; `plain` is an ext4; `odd` ends within a sector;
    `wide` begins as a disk with sectors of 4096 bytes does.
    """

    def __init__(self, tmp: Path) -> None:
        (tmp / "tree").mkdir()
        (tmp / "tree" / "ledger.csv").write_bytes(BEFORE)
        disk = tmp / "disk.img"
        disk.write_bytes(bytes(8 * MIB))
        run(["sgdisk", "--new=1:2048:+1M", "--new=2:4096:0", disk])
        make = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-d", tmp / "tree"]
        run([*make, "-E", f"offset={4096 * 512}", disk, "5M"])
        plain = tmp / "plain.img"
        plain.write_bytes(bytes(5 * MIB))
        run([*make, plain])
        wide = bytearray(1 * MIB)
        wide[4096:4104] = b"EFI PART"
        contents = [disk.read_bytes(), plain.read_bytes(), bytes(i % 251 for i in range(10_100)), bytes(wide)]
        names = ("disk", "plain", "odd", "wide")
        volumes = tuple(
            VolumeInfo(name, len(content), 4096) for name, content in zip(names, contents, strict=True)
        )
        self.history = History(5, volumes)
        for image, content in zip(self.history.images, contents, strict=True):
            image[:] = content.ljust(len(image), b"\0")
        self.history.states[0] = list(contents)
        self.history.base = [bytes(image) for image in self.history.images]
        ingest = Ingest(str(tmp / "stores"), self.history.hello)
        ingest_transfer(ingest, self.history.close_interval())
        for volume in (0, 1):
            at = bytes(self.history.images[volume]).index(BEFORE)
            assert at % 4096 == 0 and len(BEFORE) <= 4096
            self.history.write_blocks(volume, at // 4096, [AFTER.ljust(4096, b"\0")])
        self.history.write_blocks(2, 0, [bytes(4096)])
        ingest_transfer(ingest, self.history.close_interval())
        ingest.close()
        self.path = tmp / "stores" / self.history.group
        # A write of the interval's inside has no name but its own; the last one is the snapshot.
        self.before, self.after = (format_instant(self.history.times_ns[seq]) for seq in (0, 3))


@contextmanager
def nothing_left(store: Path) -> Iterator[None]:
    """Takes down what a test has left attached of the store, and fails the test for it."""
    try:
        yield
    finally:
        left = attached(store)
        for each in left:
            for place in each["mountpoints"]:
                subprocess.run(["umount", place], capture_output=True, check=False)
            main(["detach", each["device"]])
        wait_until(lambda: f" {store} " not in Path("/proc/self/mountinfo").read_text(), "its mounts are gone", 5)
    assert left == []


def pitfs(*arguments: str | Path, code: int = 0) -> str:
    """Runs a command in this process. Standard output, or of a failure the one line on standard error."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        ended = main([str(argument) for argument in arguments])
    assert ended == code, err.getvalue()
    if code:
        assert out.getvalue() == "" and err.getvalue().count("\n") == 1, err.getvalue()
    return err.getvalue() if code else out.getvalue().strip()


def attached(store: Path) -> list[dict[str, Any]]:
    """What `attach --list` says of that store."""
    rows: list[dict[str, Any]] = json.loads(pitfs("attach", "--list", "--json"))
    return [row for row in rows if row["store"] == str(store)]
