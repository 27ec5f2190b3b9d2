"""Writable images against a bare pyfuse3 writer, and what reading costs beside and after the writes."""

from __future__ import annotations

import functools
from pathlib import Path

from common import Setting, bare_passthrough, interleaved, per_second
from report import Measure, compare

from tests.helpers.hosts import Mount
from tests.helpers.processes import run as command

WRITES = {"rw": "randwrite", "bs": "4k"}
READS = {"rw": "randread", "bs": "4k"}
GOAL = 0.7
READ_GOAL = 0.9  # of what one process does for the same image, read-only: but for the rounds' own differences as fast


def measures(setting: Setting, store: Path, instant: str, flat: Path, volume: str = "root") -> list[Measure]:
    """Rows of figures for one image of a store that nobody writes.

    Args:
        flat: a file with the same bytes, not written to.
    """
    tmp = setting.workspace
    written = tmp / "bare-writer.backing"
    command(["cp", "--sparse=never", flat, written], timeout_s=600)
    directory = tmp / "scratch"
    directory.mkdir()
    found: list[Measure] = []
    with (
        bare_passthrough(written, tmp / "bare-writer") as bare,
        Mount(store, tmp, name="read-only", options="workers=1") as read_only,
        Mount(store, tmp, name="writable", options=f"scratch={directory}") as writable,
    ):
        image, below = writable.image(instant, volume), read_only.image(instant, volume)

        def row(name: str, options: dict[str, object], other: Path, goal: float, against: str) -> None:
            given = options | {"runtime": setting.run_s}
            for path in (other, image):
                per_second(path, **given | {"runtime": 1})  # warm
            rates = interleaved(setting, name, {
                against: functools.partial(per_second, other, **given),
                "pitfs": functools.partial(per_second, image, **given),
            })  # fmt: skip
            found.append(compare(name, rates["pitfs"], rates[against], "/s", goal, against))

        plain = "the same, mounted read-only, workers=1"
        row("scratch: random reads 4 KiB of an image not written, depth 16", READS, below, READ_GOAL, plain)
        row("scratch: random writes 4 KiB, depth 16", WRITES, bare, GOAL, "bare pyfuse3 writer")
        row("scratch: random reads 4 KiB after the writes, depth 16", READS, below, READ_GOAL, plain)
    written.unlink()
    directory.rmdir()
    return found
