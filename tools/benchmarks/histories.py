"""Group `histories`: what a long history costs: snapshots, an interval of 10,000,000 writes, listings, memory.

Each function makes the stores that it needs, fast and by formula (tests/helpers/histories.py), mounts them as a
user does and measures through the mount.
"""

from __future__ import annotations

import functools
import os
import random
import statistics
import subprocess
import time
from pathlib import Path

from common import Setting, bytes_per_second, interleaved, per_second
from memory import MountMemory
from report import Measure, at_most, compare, note

from pitfs.model.transfer import VolumeInfo
from tests.helpers.histories import LongHistory, StrewnWrites
from tests.helpers.hosts import Mount, instant_name
from tests.helpers.processes import HostError

BLOCK = 4096
SHORT_INTERVAL, LONG_INTERVAL, QUICK_LONG_INTERVAL = 10**4, 10**7, 10**6
SNAPSHOTS, QUICK_SNAPSHOTS = 10_000, 1_000
BEFORE, QUICK_BEFORE = 1_000, 200  # snapshots before and after the instant that is read
VOLUME_BYTES, QUICK_VOLUME_BYTES = 1 << 30, 256 << 20
STREWN = 16  # blocks that each of these snapshots wrote
SMALL_BLOCK = 512  # of the volume with the intervals
MOUNTS = 9  # fresh ones, for the first byte of the first instant that is named there
INSTANTS = 10  # named in each

CHANCE = random.Random(1)

FIRST_BYTE_MS, FIRST_BYTE_RATIO, LIST_S, SAME = 20.0, 2.0, 0.5, 0.95


def run(setting: Setting) -> list[Measure]:
    memory = MountMemory()
    with memory.watching():
        measures = rows(setting, memory)
    return measures + memory.measures()


def rows(setting: Setting, memory: MountMemory) -> list[Measure]:
    """All rows but those of the memory that is taken meanwhile."""
    return [row for part in (same_image, first_byte, listings) for row in part(setting, memory)]


def same_image(setting: Setting, memory: MountMemory) -> list[Measure]:
    """The image of an instant with 1,000 snapshots before and after it, against one with 1: as many blocks strewn."""
    size = QUICK_VOLUME_BYTES if setting.quick else VOLUME_BYTES
    many = QUICK_BEFORE if setting.quick else BEFORE
    blocks = size // BLOCK

    def make(name: str, count: int) -> tuple[Path, str]:
        note(f"a store with {count} snapshots before and after an interval …")
        root = setting.workspace / name
        with LongHistory(root, VolumeInfo("root", size, BLOCK)) as history:
            history.full_copy(blocks)
            history.snapshots(count, STREWN * many // count)
            writes = history.interval(blocks // 8, blocks // 8, stride=8, data_every=1)
            history.snapshots(count, STREWN * many // count)
            return history.path, instant_name(writes.time_ns(writes.count // 2))

    (one, one_name), (long, long_name) = make("one", 1), make("many", many)
    tmp = setting.workspace
    with Mount(one, tmp, name="one.mount") as first, Mount(long, tmp, name="many.mount") as second:
        image, same = second.image(long_name), first.image(one_name)
        sequential = {"direct": 0, "ioengine": "psync", "iodepth": 1, "rw": "read", "bs": "1M", "time_based": 0}
        at_random = {"rw": "randread", "bs": "4k", "runtime": setting.run_s}
        measures = []
        for load, options, rate, scale, unit in (
            ("sequential, buffered", sequential, bytes_per_second, 1e6, "MB/s"),
            ("random 4 KiB, depth 16", at_random, per_second, 1, "/s"),
            ("random 4 KiB, depth 1", at_random | {"iodepth": 1}, per_second, 1, "/s"),
        ):
            rate(same, **options)  # warm what is below
            rate(image, **options)
            name = f"{load}, {many} snapshots before and after"
            found = interleaved(setting, name, {
                "1": functools.partial(rate, same, **options), "many": functools.partial(rate, image, **options),
            })  # fmt: skip
            scaled = {side: [value / scale for value in values] for side, values in found.items()}
            measures.append(compare(name, scaled["many"], scaled["1"], unit, SAME, "with 1 snapshot"))
            memory.sample()
    return measures


def first_byte(setting: Setting, memory: MountMemory) -> list[Measure]:
    """open and a read of 4 KiB by the name of an instant never named before, warm files below."""
    count = QUICK_LONG_INTERVAL if setting.quick else LONG_INTERVAL
    intervals = [_interval(setting.workspace, each) for each in (SHORT_INTERVAL, count)]
    rounds = [
        [_first_bytes(store, writes, setting, memory) for store, writes in intervals] for _ in range(MOUNTS)
    ]
    measures = []
    for what, part in (("the first after mounting", slice(1)), ("further ones", slice(1, None))):
        other, value = (statistics.median(ms for each in rounds for ms in each[i][part]) for i in range(2))
        name = f"first byte of an instant in an interval of {count:,} writes, {what}"
        measures.append(at_most(name, value, "ms", FIRST_BYTE_MS))
        ratio = round(value / other, 2)
        measures.append(
            Measure(
                f"{name}, against {SHORT_INTERVAL:,} writes", round(value, 2), "ms",
                f"goal: at most; {other:.2f} ms", ratio, FIRST_BYTE_RATIO, ratio <= FIRST_BYTE_RATIO,
            )
        )  # fmt: skip
    return measures


def _first_bytes(store: Path, writes: StrewnWrites, setting: Setting, memory: MountMemory) -> list[float]:
    """In ms: of the first instant after mounting, and of those named after it."""
    found = []
    with Mount(store, setting.workspace, name=f"bytes-{writes.count}.mount") as mount:
        for _ in range(INSTANTS):
            image = mount.image(instant_name(writes.time_ns(CHANCE.randrange(writes.count))))
            offset = CHANCE.randrange(writes.span * SMALL_BLOCK // BLOCK) * BLOCK
            begun = time.perf_counter()
            fd = os.open(image, os.O_RDONLY)
            data = os.pread(fd, BLOCK, offset)
            found.append((time.perf_counter() - begun) * 1000)
            os.close(fd)
            if len(data) != BLOCK:
                raise HostError(f"{image}: {len(data)} bytes at {offset}")
        memory.sample()
    return found


@functools.cache
def _interval(workspace: Path, count: int) -> tuple[Path, StrewnWrites]:
    note(f"an interval of {count:,} writes …")
    with LongHistory(workspace / f"interval-{count}", VolumeInfo("root", 1 << 30, SMALL_BLOCK)) as history:
        history.full_copy(1 << 20)  # so that there is something to read where the interval hasn't written, too
        return history.path, history.interval(count, 1 << 20, data_every=16)


def listings(setting: Setting, memory: MountMemory) -> list[Measure]:
    """`ls` of a mount with 10,000 snapshots, and of days, minutes and seconds with 10,000,000 writes behind them."""
    count = QUICK_SNAPSHOTS if setting.quick else SNAPSHOTS
    writes_count = QUICK_LONG_INTERVAL if setting.quick else LONG_INTERVAL
    note(f"{count} snapshots …")
    with LongHistory(setting.workspace / "snapshots", VolumeInfo("root", 1 << 30, 512)) as history:
        history.full_copy()
        history.snapshots(count)
        store = history.path
    measures = []
    for command in (["ls"], ["ls", "-l"]):
        name = f"{' '.join(command)} of a mount with {count:,} snapshots"
        measures.append(_listing(setting, store, name, command, (), memory))
    store, writes = _interval(setting.workspace, writes_count)
    middle = instant_name(writes.time_ns(writes_count // 2))
    day, minute = middle[:10], f"{middle[11:13]}-{middle[14:16]}"
    for what, parts in (("times/", ()), ("times/DAY", (day,)), ("times/DAY/MINUTE", (day, minute))):
        name = f"ls of {what} with {writes_count:,} writes"
        measures.append(_listing(setting, store, name, ["ls"], ("times", *parts), memory))
    return measures


def _listing(
    setting: Setting, store: Path, name: str, command: list[str], below: tuple[str, ...], memory: MountMemory
) -> Measure:  # fmt: skip
    """The median of a listing as the first thing after mounting."""
    found = []
    for _ in range(3 if setting.quick else 5):
        with Mount(store, setting.workspace, name="listing.mount") as mount:
            begun = time.perf_counter()
            subprocess.run([*command, mount.path.joinpath(*below)], stdout=subprocess.DEVNULL, check=True)
            found.append(time.perf_counter() - begun)
            memory.sample()
    return at_most(name, statistics.median(found), "s", LIST_S)
