"""Group `write`: what an application sees when it writes through the splitter.

Interval closes and shipping are kept out of the runs (`interval = "1h"`, mode snapshot, which streams nothing; a
snapshot between measures): what stands here is the write path. Group `ship` measures it while everything else goes on.
"""

from __future__ import annotations

import functools
import time

from common import Setting, bare_passthrough, interleaved, per_second, preallocate
from report import Measure, compare, note

from tests.helpers.hosts import Production, Replica

VOLUME_BYTES = 1 << 30
QUICK_VOLUME_BYTES = 256 << 20

# name, options of fio, goal
LOADS = (
    ("random writes 4 KiB, depth 16", {"rw": "randwrite", "bs": "4k"}, 0.7),
    ("random writes 10 KiB, depth 16", {"rw": "randwrite", "bs": "10k"}, 0.5),
    ("random writes 4 KiB, fsync each", {"rw": "randwrite", "bs": "4k", "ioengine": "psync", "iodepth": 1,
                                         "fsync": 1}, 0.8),
    ("random writes 4 KiB, depth 1", {"rw": "randwrite", "bs": "4k", "iodepth": 1}, None),
)  # fmt: skip


def run(setting: Setting) -> list[Measure]:
    tmp = setting.workspace
    size = QUICK_VOLUME_BYTES if setting.quick else VOLUME_BYTES
    backing = preallocate(tmp / "pitfs.backing", size)
    bare_backing = preallocate(tmp / "bare.backing", size)
    measures = []
    with (
        Replica(tmp) as replica,
        Production(
            tmp, {"root": backing}, port=replica.port, interval="1h", mode="snapshot", capacity="40GiB"
        ) as production,
        bare_passthrough(bare_backing, tmp / "bare") as bare,
    ):
        note("first full copy …")
        production.snapshot(timeout_s=600)
        for name, options, goal in LOADS:
            given = options | {"runtime": setting.run_s}
            for path in (bare, production.volume()):
                per_second(path, **given | {"runtime": 1})  # warm
            found = interleaved(setting, name, {
                "bare": functools.partial(per_second, bare, **given),
                "pitfs": functools.partial(per_second, production.volume(), **given),
            }, between=lambda: time.sleep(0.5))  # fmt: skip
            measures.append(compare(name, found["pitfs"], found["bare"], "/s", goal))
            production.snapshot(timeout_s=600)
    return measures
