"""Group `ship`: the patent's load while everything goes on, 5,000 writes of 10 KB per second for a minute; then
what goes over the wire for recorded loads (see bandwidth.py).

Sizes are multiples of 512 bytes, 2 to 18 KiB, 10 KiB on average, at multiples of 512; 30 % go to a hot
hundredth of an 8 GiB sparse volume. All on one machine: the replica has the same two cores and disk.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path

import bandwidth
from common import Setting, bare_passthrough, fio
from report import Measure, at_most, figure, note, plain

from pitfs.cli.common.shipper import ask_shipper
from pitfs.config.production import load_config
from pitfs.errors import PitfsError
from pitfs.replication.control.requests import ReadStatus
from pitfs.store.store import Store
from tests.helpers.hosts import Mount, Production, Replica, digest, xxhsum
from tests.helpers.loops import free_file
from tests.helpers.processes import cpu_seconds, resident_bytes

VOLUME_BYTES = 8 << 30
WRITES_PER_S = 5000
MEAN_BYTES = 10 << 10
LOAD_S, QUICK_LOAD_S, BARE_LOAD_S = 60, 20, 10
INTERVAL_S = 10
MAX_RESIDENT_MIB = 200
MIB = 1 << 20
LOAD = {
    "rw": "randwrite", "blockalign": 512, "bssplit": "2k/10:6k/20:10k/40:14k/20:18k/10", "direct": 1,
    "iodepth": 16, "random_distribution": "zoned:30/1:70/99",
    "rate": WRITES_PER_S * MEAN_BYTES,  # not rate_iops, which fio multiplies by the smallest size
    "rate_process": "linear",
}  # fmt: skip


class Watch(threading.Thread):
    """Asks for the lag each second while the load runs, and how old the newest instant is that can be read.

    Not by the commands: starting a Python each second would take a tenth of a core from what is measured.

    Attributes:
        ages_s: of the newest readable write; as there are some thousand each second, that is how late they come.
    """

    def __init__(self, production: Production, replica: Replica) -> None:
        super().__init__(daemon=True)
        self.config = load_config(str(production.config))
        self.store = Store.open(str(replica.store()))
        self.lags_s: list[float] = []
        self.ages_s: list[float] = []
        self.problems: list[str] = []
        self.ending = threading.Event()

    def run(self) -> None:
        while not self.ending.wait(1):
            newest = self.store.latest()
            self.ages_s.append(math.inf if newest is None else (time.time_ns() - newest.time_ns) / 1e9)
            try:
                lag = ask_shipper(self.config.path, ReadStatus())["lag_seconds"]
            except PitfsError as error:
                self.problems.append(str(error))
                continue
            self.lags_s.append(math.inf if lag is None else float(lag))


def run(setting: Setting) -> list[Measure]:
    return patents_load(setting) + as_it_comes(setting) + bandwidth.run(setting)


def as_it_comes(setting: Setting) -> list[Measure]:
    """The same load for a shorter time in mode async: how late writes can be read."""
    tmp = setting.workspace / "async"
    tmp.mkdir()
    with (
        Replica(tmp) as replica,
        Production(
            tmp, {"root": VOLUME_BYTES}, port=replica.port, interval=f"{INTERVAL_S}s", mode="async"
        ) as production,
    ):
        production.snapshot(timeout_s=600)
        found = _load(production, replica, QUICK_LOAD_S, WRITES_PER_S)
    return [replace(each, measure=f"mode async: {each.measure}") for each in found if "can be read" in each.measure]


def patents_load(setting: Setting) -> list[Measure]:
    tmp, load_s = setting.workspace, QUICK_LOAD_S if setting.quick else LOAD_S
    note(f"{WRITES_PER_S} writes of 10 KiB per second for {BARE_LOAD_S} s through the bare passthrough …")
    with bare_passthrough(free_file(tmp / "bare.backing", VOLUME_BYTES), tmp / "bare") as path:
        bare_per_s = float(fio(path, **LOAD, runtime=BARE_LOAD_S)["iops"])
    (tmp / "bare.backing").unlink()
    with (
        Replica(tmp) as replica,
        Production(tmp, {"root": VOLUME_BYTES}, port=replica.port, interval=f"{INTERVAL_S}s") as production,
    ):
        note("first full copy of a sparse volume …")
        started = time.monotonic()
        production.snapshot(timeout_s=600)
        measures = [plain("first full copy of 8 GiB sparse", time.monotonic() - started, "s")]
        with Mount(replica.store(), tmp) as mount:
            measures += _load(production, replica, load_s, bare_per_s)
            started = time.monotonic()
            last = production.snapshot(timeout_s=600)
            measures.append(plain("caught up after the load", time.monotonic() - started, "s"))
            note("digests …")
            ours, theirs = digest(replica.store(), last), xxhsum(mount.image(last))
            live = xxhsum(production.volume())
            equal = ours == theirs == live
            measures.append(
                Measure("volume, its image and `pitfs digest` agree", float(equal), "", "", None, 1, equal)
            )
            measures += _granularity(replica)
            measures += _memory(production, replica, mount)
            measures += _disk(production.state, replica.store())
            complaints = production.complaints() + replica.complaints()
            for line in complaints[:10]:
                note(f"logged: {line}")
            measures.append(at_most("lines logged above info", len(complaints), "", 0))
    return measures


def _load(production: Production, replica: Replica, load_s: int, bare_per_s: float) -> list[Measure]:
    note(f"{WRITES_PER_S} writes of 10 KiB per second for {load_s} s …")
    hosts = (("protect", production.pids()), ("receive", replica.pids()))
    before = [cpu_seconds(pids) for _, pids in hosts]
    watch = Watch(production, replica)
    watch.start()
    try:
        report = fio(production.volume(), **LOAD, runtime=load_s)
    finally:
        watch.ending.set()
        watch.join(30)
        watch.store.close()
    for problem in watch.problems:
        note(f"status: {problem}")
    written_gb = report["bw_bytes"] * load_s / 1e9
    cpu = [
        plain(f"CPU of {name}", (cpu_seconds(pids) - start) / written_gb, "s/GB written")
        for (name, pids), start in zip(hosts, before, strict=True)
    ]
    latency = report["clat_ns"]["percentile"]
    worst_lag = max(watch.lags_s, default=math.inf)
    ages = watch.ages_s[1:] or [math.inf]  # not before the load had begun
    return [
        sustained(report["iops"], bare_per_s),
        plain("the patent's load: bytes", report["bw_bytes"] / 1e6, "MB/s"),
        plain("the patent's load: median write", latency["50.000000"] / 1e3, "µs"),
        plain("the patent's load: 99 % of writes within", latency["99.000000"] / 1e3, "µs"),
        plain("the patent's load: longest write", report["clat_ns"]["max"] / 1e6, "ms"),
        at_most("greatest lag of the replica under it", worst_lag / INTERVAL_S, "intervals", 2),
        at_most("a write can be read on the replica after, median", statistics.median(ages), "s", 1),
        at_most("a write can be read on the replica after, at most", max(ages), "s", 1),
        *cpu,
    ]


def sustained(per_s: float, bare_per_s: float) -> Measure:
    """Met if the whole load went through, or all of it that this machine brings through the bare server."""
    goal = 0.98
    share = per_s / min(WRITES_PER_S, bare_per_s)
    against = f"bare pyfuse3 passthrough, the same load: {figure(bare_per_s)} /s"
    return Measure(
        "the patent's load: writes", round(per_s, 1), "/s", against, round(share, 3), goal, share >= goal
    )


def _granularity(replica: Replica) -> list[Measure]:
    intervals = replica.listing()["intervals"]
    every = sum(interval["granularity_ns"] == 0 for interval in intervals)
    for interval in intervals:
        if interval["granularity_ns"] != 0:
            note(f"interval to {interval['to']}: {interval['cause']}")
    return [plain(f"of {len(intervals)} intervals, with every write", every, "")]


def _memory(production: Production, replica: Replica, mount: Mount) -> list[Measure]:
    measures = []
    for name, pids in (("protect", production.pids()), ("receive", replica.pids()), ("mount", mount.pids())):
        found = resident_bytes(pids)
        what = f"memory of {name}, {len(pids)} processes, sum of PSS"
        measures.append(at_most(what, found["pss"] / MIB, "MiB", MAX_RESIDENT_MIB))
        measures.append(plain(f"memory of {name}, sum of RSS", found["rss"] / MIB, "MiB"))
    return measures


def _disk(state: Path, store: Path) -> list[Measure]:
    def used(directory: Path) -> float:
        return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file()) / MIB

    return [
        plain("local journal left on disk", used(state), "MiB"),
        plain("store on disk", used(store), "MiB"),
    ]
