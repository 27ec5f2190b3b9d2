"""Group `granularity`: a link that carries a fifth of what is written for a while, and what becomes of the instants.

Production and replica stand in network namespaces of their own, TLS between them, over a veth pair of a held rate.
Quiet, then a peak of five times what the link carries of data that don't compress, overwriting a hot set so that the
snapshot diffs fit, then quiet until every write can be reached again.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import trustme
from common import Setting
from granularity_plot import Moment, Picture
from report import Measure, at_most, note, plain

from pitfs.cli.common.shipper import ask_shipper
from pitfs.config.production import load_config
from pitfs.errors import PitfsError
from pitfs.model.ladder import RUNGS_NS
from pitfs.replication.control.requests import ReadStatus
from pitfs.store.store import Store
from tests.helpers.hosts import Production, Replica, instant_ns
from tests.helpers.links import Files, issue
from tests.helpers.netlink import REPLICA_ADDRESS, Wire, probe_wire, wire_bytes
from tests.helpers.processes import HostError

LINK_BYTES_PER_S = 2_200_000  # of the wire, packets with their headers
RATE, RATE_BYTES_PER_S = "16Mbit", 2_000_000  # what pitfs may use of it
PEAK_FACTOR = 5
QUIET_BYTES_PER_S = 160_000
UNIT_BYTES = 16 << 10  # of each write
VOLUME_BYTES = 64 << 20
HOT_UNITS = 128  # what the peak overwrites
SKEW = 4  # the higher, the more writes go to a few of them
SAMPLE_S = 0.25
CALM_S, QUICK_CALM_S = 10, 4
PEAK_S, QUICK_PEAK_S = 20, 8
INTERVAL_S, QUICK_INTERVAL_S = 5, 2
CAUGHT_UP_S = 240
# Of an interval's room its contents certainly have: of the rest are headers, rows, and the turns between transfers.
FILL, TURNS_S = 0.9, 0.3


def run(setting: Setting) -> list[Measure]:
    reason = probe_wire()
    if reason is not None:
        raise HostError(f"no link of adjustable rate can be made: {reason}")
    tmp = setting.workspace
    interval_s = QUICK_INTERVAL_S if setting.quick else INTERVAL_S
    authority = trustme.CA()
    theirs = issue(tmp, "replica", authority, REPLICA_ADDRESS)
    ours = issue(tmp, "production", authority, "production.example")
    with (
        Wire(LINK_BYTES_PER_S) as wire,
        Replica(
            tmp, 7420, host=REPLICA_ADDRESS, within=wire.within_replica, tls=_options(theirs)
        ) as replica,
        Production(
            tmp, {"root": VOLUME_BYTES}, port=7420, host=REPLICA_ADDRESS, within=wire.within_production,
            tls=_lines(ours), interval=f"{interval_s}s", rate=RATE, capacity="2GiB",
        ) as production,
    ):  # fmt: skip
        production.snapshot()
        with watched(production, replica) as watch, Load(production.volume()) as load:
            peak = _play(setting, load, watch)
            watch.wait_for_every_write()
        measures = _measure(watch, load, peak, interval_s)
        measures += _listed(replica)
        for line in (production.complaints() + replica.complaints())[:10]:
            note(f"logged: {line}")
    if setting.plot is not None:
        begun = watch.moments[0].time_ns
        picture = Picture(
            watch.moments, load.per_second(begun), [(t - begun) / 1e9 for t in peak], interval_s,
            LINK_BYTES_PER_S, RATE_BYTES_PER_S,
        )  # fmt: skip
        setting.plot.write_text(picture.svg())
        note(f"drawn: {setting.plot}")
    return measures


def _options(files: Files) -> list[str]:
    return [word for key in ("certificate", "key", "authority") for word in (f"--{key}", getattr(files, key))]


def _lines(files: Files) -> list[str]:
    return [f'{key} = "{getattr(files, key)}"' for key in ("certificate", "key", "authority")]


def _play(setting: Setting, load: Load, watch: Watch) -> tuple[int, int]:
    """The load; when its peak began and ended, in nanoseconds UTC."""
    calm_s, peak_s = (QUICK_CALM_S, QUICK_PEAK_S) if setting.quick else (CALM_S, PEAK_S)
    peak_bytes_per_s = PEAK_FACTOR * LINK_BYTES_PER_S
    note(f"quiet for {calm_s} s, then {peak_bytes_per_s / 1e6:g} MB/s for {peak_s} s, then quiet …")
    load.go(QUIET_BYTES_PER_S, calm_s, VOLUME_BYTES // UNIT_BYTES, 1)
    begun = time.time_ns()
    load.go(peak_bytes_per_s, peak_s, HOT_UNITS, SKEW)
    ended = time.time_ns()
    load.go_on(QUIET_BYTES_PER_S, VOLUME_BYTES // UNIT_BYTES)
    watch.peak_ended.set()
    note("until everything is there …")
    return begun, ended


class Load:
    """Writes of UNIT_BYTES that nothing compresses; `writes` has (time_ns, unit) of each."""

    def __init__(self, volume: Path) -> None:
        self._volume = volume
        self._random = np.random.default_rng(1)
        self._buffer = mmap.mmap(-1, UNIT_BYTES)  # aligned, as O_DIRECT wants
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.writes: list[tuple[int, int]] = []

    def __enter__(self) -> Load:
        self._fd = os.open(self._volume, os.O_RDWR | os.O_DIRECT)
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join(30)
        os.close(self._fd)

    def go(self, bytes_per_s: float, seconds: float, units: int, skew: int) -> None:
        """Writes that for so long."""
        begun = time.monotonic()
        for number in itertools.count():
            due = begun + number * UNIT_BYTES / bytes_per_s
            if due >= begun + seconds or self._ending.is_set():
                return
            if (early := due - time.monotonic()) > 0:
                time.sleep(early)
            unit = int(units * self._random.random() ** skew)
            self._buffer[:] = self._random.bytes(UNIT_BYTES)
            os.pwritev(self._fd, [self._buffer], unit * UNIT_BYTES)
            self.writes.append((time.time_ns(), unit))

    def go_on(self, bytes_per_s: float, units: int) -> None:
        """Until the end of the context."""
        self._thread = threading.Thread(target=self.go, args=(bytes_per_s, 1e9, units, 1), daemon=True)
        self._thread.start()

    def per_second(self, begun_ns: int) -> list[tuple[int, float]]:
        """(time_ns, bytes per second) of each second with writes, counted from `begun_ns`."""
        times = np.array([time_ns for time_ns, _ in self.writes]) - begun_ns
        seconds, counts = np.unique(times // 10**9, return_counts=True)
        return [(begun_ns + int(s) * 10**9, float(n) * UNIT_BYTES) for s, n in zip(seconds, counts, strict=True)]

    def rung_that_fits(self, from_ns: int, to_ns: int, room_bytes: float) -> int | None:
        """The finest rung whose contents, with those of the diff, certainly fit into that room."""
        writes = [(t, unit) for t, unit in self.writes if from_ns < t <= to_ns]
        for rung_ns in reversed(RUNGS_NS):
            contents = {(t // max(rung_ns, 1), unit) for t, unit in writes} if rung_ns else writes
            if len(contents) * UNIT_BYTES <= room_bytes:
                return rung_ns
        return None


@dataclass
class Watch:
    """Looks at both hosts each SAMPLE_S."""

    production: Production
    replica: Replica
    moments: list[Moment] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    peak_ended: threading.Event = field(default_factory=threading.Event)

    def look(self, ending: threading.Event) -> None:
        config = load_config(str(self.production.config))
        process = self.production.process
        assert process is not None
        store = Store.open(str(self.replica.store()))
        try:
            while not ending.wait(SAMPLE_S):
                try:
                    status = ask_shipper(config.path, ReadStatus())
                    sent = wire_bytes(process.pid)
                except (PitfsError, HostError) as error:
                    self.problems.append(str(error))
                    continue
                seen = tuple((each.from_time_ns, each.to_time_ns, each.granularity_ns) for each in store.intervals())
                lag_s, behind = status["lag_seconds"] or 0.0, status["lag_intervals"]
                self.moments.append(Moment(time.time_ns(), sent, lag_s, behind, seen))
        finally:
            store.close()

    def wait_for_every_write(self) -> None:
        """Until all intervals are at every write and the replica has all that is marked.

        Raises:
            HostError: they aren't within CAUGHT_UP_S.
        """
        deadline = time.monotonic() + CAUGHT_UP_S
        since = time.time_ns()
        while True:
            last = self.moments[-1]
            arrived = bool(last.intervals) and last.intervals[-1][1] > since
            if arrived and all(granularity_ns == 0 for _, _, granularity_ns in last.intervals):
                return
            if time.monotonic() > deadline:
                raise HostError(f"not at every write again within {CAUGHT_UP_S} s")
            time.sleep(SAMPLE_S)


@contextlib.contextmanager
def watched(production: Production, replica: Replica) -> Iterator[Watch]:
    watch, ending = Watch(production, replica), threading.Event()
    thread = threading.Thread(target=watch.look, args=(ending,), daemon=True)
    thread.start()
    try:
        while not watch.moments:
            if not thread.is_alive():
                raise HostError("nothing can be watched")
            time.sleep(SAMPLE_S)
        yield watch
    finally:
        ending.set()
        thread.join(30)


def _measure(watch: Watch, load: Load, peak: tuple[int, int], interval_s: float) -> list[Measure]:
    moments = watch.moments
    for problem in watch.problems[:5]:
        note(f"watching: {problem}")
    during = [each for each in moments if peak[0] <= each.time_ns <= peak[1] + interval_s * 1e9]
    most = most_sent(moments, interval_s)
    budget = RATE_BYTES_PER_S * interval_s
    coarse = [each for each in moments if each.time_ns > peak[1] and any(i[2] != 0 for i in each.intervals)]
    back_s = ((coarse[-1].time_ns if coarse else peak[1]) - peak[1]) / 1e9
    written = len([1 for time_ns, _ in load.writes if time_ns <= peak[1]]) * UNIT_BYTES
    room_bytes = FILL * RATE_BYTES_PER_S * (interval_s - TURNS_S)
    worst, too_coarse, fallen = _fallen(moments, load, interval_s, room_bytes)
    return [
        plain("the peak's load", sum(peak[0] <= t <= peak[1] for t, _ in load.writes) * UNIT_BYTES
              / (peak[1] - peak[0]) * 1e3, "MB/s"),
        _share("most sent within an interval, packets with their headers", most / 1e6, "MB",
               f"rate × interval: {budget / 1e6:.1f} MB", most / budget, 1.05),
        at_most("the replica behind, during the peak", max(each.lag_intervals for each in during), "intervals", 2),
        at_most("the replica behind, during the peak", max(each.lag_s for each in during) / interval_s,
                "times the interval", 2),
        plain("intervals whose granularity fell", fallen, ""),
        plain("coarsest of these, once the link had had its time", -1 if worst is None else worst / 1e6, "ms"),
        at_most("intervals coarser than what fits", too_coarse, "", 0),
        _share("every write again, after the peak", back_s, "s",
               f"all that was written, at the rate: {written / RATE_BYTES_PER_S - (peak[1] - peak[0]) / 1e9:.1f} s",
               back_s / (written / RATE_BYTES_PER_S - (peak[1] - peak[0]) / 1e9), 1.5),
    ]  # fmt: skip


def _share(measure: str, value: float, unit: str, against: str, ratio: float, goal: float) -> Measure:
    """A ratio that may be at most so much."""
    return Measure(measure, round(value, 2), unit, against, round(ratio, 3), goal, ratio <= goal)


def most_sent(moments: Sequence[Moment], interval_s: float) -> int:
    """The most bytes that crossed the wire within any time of that length."""
    times = np.array([each.time_ns for each in moments]) / 1e9
    sent = np.array([each.sent_bytes for each in moments], dtype=float)
    ends = np.interp(times + interval_s, times, sent)
    return int((ends - sent)[times + interval_s <= times[-1]].max())


def _fallen(
    moments: Sequence[Moment], load: Load, interval_s: float, room_bytes: float
) -> tuple[int | None, int, int]:
    """Of the intervals that weren't at every write when their time on the link was over (with the next one's end, or
    when that arrived): the coarsest, how many were coarser than what fits into that room, how many there were."""
    reached: dict[tuple[int, int], int | None] = {}
    for moment in moments:
        newest = moment.intervals[-1:]
        in_time = [each for each in moment.intervals if moment.time_ns <= each[1] + interval_s * 1e9]
        reached |= {(from_ns, to_ns): g for from_ns, to_ns, g in (*in_time, *newest)}
    fallen = {each: g for each, g in reached.items() if g != 0}
    coarser = 0
    for (from_ns, to_ns), granularity_ns in fallen.items():
        # One that begins where a stream was left has what is left of the time: the stream has used the rest.
        share = min(1.0, (to_ns - from_ns) / (interval_s * 1e9))
        fits = load.rung_that_fits(from_ns, to_ns, room_bytes * share)
        if fits is not None and (granularity_ns is None or granularity_ns > fits):
            coarser += 1
            note(f"interval to {to_ns}: {granularity_ns} ns, {fits} ns would have fitted")
    rungs = [RUNGS_NS[0] * 10 if g is None else g for g in fallen.values()]
    worst = max(rungs, default=0)
    return None if worst > RUNGS_NS[0] else worst, coarser, len(fallen)


def _listed(replica: Replica) -> list[Measure]:
    """As `pitfs list --json` says at the end."""
    listing = replica.listing()
    assert all(instant_ns(each["from"]) < instant_ns(each["to"]) for each in listing["intervals"])
    coarse = sum(each["granularity_ns"] != 0 for each in listing["intervals"])
    return [
        at_most(f"of {len(listing['intervals'])} intervals in the end not at every write", coarse, "", 0),
        at_most("gaps", len(listing["gaps"]), "", 0),
    ]
