"""`pitfs export` to a new file against `cp` of a flat copy on the same filesystem, both from memory.

An export returns when the file would survive a power cut; cp doesn't wait for the disk at all. So the row with the goal
gives cp that too (`sync FILE`); the one beside it doesn't. cp copies inside the kernel and compares no checksums.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from common import Setting, interleaved
from report import Measure, compare

from tests.helpers.processes import pitfs_command, run

GOAL: Final = 0.7
CP: Final = ("cp", "--sparse=never", "--reflink=never")  # a copy of the bytes, whatever the filesystem


def measures(setting: Setting, store: Path, instant: str, flat: Path, volume: str = "root") -> list[Measure]:
    """Two rows for one image of a store.

    Args:
        flat: a file with the same bytes.
    """
    target, size_mb = setting.workspace / "exported", flat.stat().st_size / 1e6

    def rate(*commands: list[str]) -> float:
        start = time.monotonic()
        for words in commands:
            run(words, timeout_s=600)
        return size_mb / (time.monotonic() - start)

    def make_room() -> None:
        target.unlink(missing_ok=True)
        run(["sync", "--file-system", setting.workspace], timeout_s=600)

    exported = [*pitfs_command(), "export", str(store), instant, volume, str(target)]
    copied = [*CP, str(flat), str(target)]
    synced, unsynced = "cp of a flat copy, then sync", "cp of a flat copy, in memory only"
    rate([*pitfs_command(), "digest", str(store), instant, volume])  # warm
    rate(["dd", f"if={flat}", "of=/dev/null", "bs=1M"])
    rates = interleaved(setting, "export", {
        "pitfs": lambda: rate(exported),
        synced: lambda: rate(copied, ["sync", str(target)]),
        unsynced: lambda: rate(copied),
    }, between=make_room)  # fmt: skip
    make_room()
    return [
        compare("export to a file, durable", rates["pitfs"], rates[synced], "MB/s", GOAL, synced),
        compare("export to a file, durable", rates["pitfs"], rates[unsynced], "MB/s", None, unsynced),
    ]
