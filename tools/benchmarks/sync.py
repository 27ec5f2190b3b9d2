"""Group `sync`: what a write costs that returns when the replica has it durably (mode sync).

Beside mode async on the same kind of volume and link, in turns: what is left is the wait. The delay is the link's
round trip, half of it in each direction, by a proxy in this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common import Setting, fio, preallocate
from report import Measure, compare, note, plain

from tests.helpers.hosts import Production, Replica
from tests.helpers.netlink import Proxy
from tests.helpers.processes import wait_until

VOLUME_BYTES = 256 << 20
ROUND_TRIPS_MS = (0, 1, 10)
DEPTHS = (1, 16)


def run(setting: Setting) -> list[Measure]:
    measures: list[Measure] = []
    (setting.workspace / "sync").mkdir()
    (setting.workspace / "async").mkdir()
    with _pair(setting, "sync") as (sync_volume, sync_proxy), _pair(setting, "async") as (async_volume, async_proxy):
        for round_trip_ms in ROUND_TRIPS_MS:
            for proxy in (sync_proxy, async_proxy):
                proxy.out_delay_s = proxy.back_delay_s = round_trip_ms / 2000
            for depth in DEPTHS:
                name = f"random writes 4 KiB, depth {depth}, round trip {round_trip_ms} ms"
                found: dict[str, list[float]] = {"sync": [], "async": []}
                medians_us = []
                for _ in range(max(3, setting.rounds // 3)):
                    for mode, volume in (("sync", sync_volume), ("async", async_volume)):
                        report = fio(volume, rw="randwrite", bs="4k", iodepth=depth, runtime=setting.run_s)
                        found[mode].append(float(report["iops"]))
                        if mode == "sync":
                            medians_us.append(report["clat_ns"]["percentile"]["50.000000"] / 1e3)
                note(f"{name}: {found}")
                measures.append(compare(name, found["sync"], found["async"], "/s", None, "the same, mode async"))
                measures.append(plain(f"{name}: median", sorted(medians_us)[len(medians_us) // 2], "µs"))
    return measures


@contextmanager
def _pair(setting: Setting, mode: str) -> Iterator[tuple[object, Proxy]]:
    """A production host in this mode, its volume, and the proxy between it and its replica."""
    tmp = setting.workspace / mode
    backing = preallocate(tmp / "backing", VOLUME_BYTES)
    with (
        Replica(tmp) as replica,
        Proxy(replica.port) as proxy,
        Production(tmp, {"root": backing}, port=proxy.port, interval="10s", mode=mode, group=mode) as production,
    ):
        production.snapshot(timeout_s=600)
        if mode == "sync":
            wait_until(lambda: production.status()["sync"] == "in step", "the replica is in step", 60, 0.2)
        yield production.volume(), proxy
