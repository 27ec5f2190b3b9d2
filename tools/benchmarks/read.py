"""Group `read`: reading the image of an instant between two snapshots, against a flat file of the same bytes.

The bare server gets the readahead that pitfs gives its own mount, so that the figures compare servers.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from common import (
    Setting,
    bare_passthrough,
    bytes_per_second,
    fio,
    interleaved,
    per_second,
    preallocate,
    readahead,
)
from report import Measure, compare, note, plain

from tests.helpers.hosts import Mount, Production, Replica, ask
from tests.helpers.processes import HostError
from tests.helpers.processes import run as command

VOLUME_BYTES = 512 << 20
QUICK_VOLUME_BYTES = 256 << 20


def run(setting: Setting) -> list[Measure]:
    tmp = setting.workspace
    size = QUICK_VOLUME_BYTES if setting.quick else VOLUME_BYTES
    backing = preallocate(tmp / "pitfs.backing", size)
    with Replica(tmp) as replica:
        with Production(
            tmp, {"root": backing}, port=replica.port, interval="1h", capacity="20GiB"
        ) as production:
            note("first full copy, then an interval of the patent's load …")
            first = production.snapshot(timeout_s=600)
            # A tenth of the volume is written, a third of that again: the blocks of an instant in the
            # middle are strewn over the third snapshot, the fourth and the difference journal.
            fio(production.volume(), rw="randwrite", bs="10k", time_based=0, io_size=size // 10,
                random_distribution="zoned:30/1:70/99")  # fmt: skip
            last = production.snapshot(timeout_s=600)
            production.terminate()
        with Mount(replica.store(), tmp) as mount:
            ends = [ask("resolve", replica.store(), name, "--json")["seq"] for name in (first, last)]
            found = ask("resolve", replica.store(), f"seq-{sum(ends) // 2}", "--json")
            if found["kind"] != "intermediary":
                raise HostError(f"the instant to read isn't between two snapshots: {found}")
            image = mount.image(found["instant"])
            flat = tmp / "flat"
            command(["cp", "--sparse=never", image, flat], timeout_s=600)
            os.sync()
            with bare_passthrough(flat, tmp / "bare") as bare:
                kib = readahead(mount.path)
                readahead(bare.parent, kib)
                measures = [plain("readahead of both mounts", kib, "KiB")]
                return measures + _measure(setting, image, bare)


def _measure(setting: Setting, image: Path, bare: Path) -> list[Measure]:
    measures = []
    # `invalidate` (fio's default) drops the file's own cached pages before each run, on both sides.
    once = {"direct": 0, "ioengine": "psync", "iodepth": 1, "rw": "read", "bs": "1M", "time_based": 0}
    direct = once | {"direct": 1}
    random = {"rw": "randread", "bs": "4k", "runtime": setting.run_s}
    loads = (
        ("sequential read, buffered", once, bytes_per_second, 1e6, "MB/s", 0.4),
        ("sequential read 1 MiB, direct", direct, bytes_per_second, 1e6, "MB/s", None),
        ("random reads 4 KiB, depth 16", random, per_second, 1, "/s", 0.5),
        ("random reads 4 KiB, depth 1", random | {"iodepth": 1}, per_second, 1, "/s", None),
    )  # fmt: skip
    for name, options, rate, scale, unit, goal in loads:
        rate(bare, **options)  # warm what is below
        rate(image, **options)
        found = interleaved(setting, name, {
            "bare": functools.partial(rate, bare, **options),
            "pitfs": functools.partial(rate, image, **options),
        })  # fmt: skip
        scaled = {side: [value / scale for value in values] for side, values in found.items()}
        measures.append(compare(name, scaled["pitfs"], scaled["bare"], unit, goal))
    return measures
