"""Traces for the bandwidth benchmark: what real loads write, recorded through the real splitter.

Each trace has a splitter of its own (its process, its FUSE mount; a loop device with direct I/O and ext4 over it
where the load wants files) and no shipper: marks are set by the bench, and the local journal keeps everything.
It is then read back as the shipper reads it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio
from common import Setting, fio
from report import note

from pitfs.journal.reader import Interval, JournalReader
from pitfs.journal.search import Found
from pitfs.journal.writer import Location
from pitfs.model.record import CopyProgress
from pitfs.model.transfer import VolumeInfo
from pitfs.splitter.identity import read_group
from pitfs.splitter.messages import SplitterClient, SplitterStatus
from pitfs.splitter.startup import journal_directory
from pitfs.supervision.minder import SPLITTER
from tests.helpers import postgresql
from tests.helpers.hosts import Production, free_port
from tests.helpers.load import running
from tests.helpers.loops import LoopDevice, MountedFilesystem
from tests.helpers.processes import Daemon, HostError, run

INTERVALS, INTERVAL_S = 4, 10.0
QUICK_INTERVALS, QUICK_INTERVAL_S = 3, 1.5
SYNC_S: Final = 1.0  # as often files are synced that nobody syncs: else the kernel keeps them for 30 s
PAUSE_S: Final = 0.006  # between two files
CAPACITY: Final = "10GiB"
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Trace:
    """What was recorded: closed intervals, whose contents stand in the local journal.

    Attributes:
        name: for people.
        directory: the local journal's.
    """

    name: str
    directory: str
    volumes: tuple[VolumeInfo, ...]
    intervals: tuple[Interval, ...]

    @property
    def block_sizes(self) -> list[int]:
        return [volume.block_size for volume in self.volumes]

    @property
    def writes(self) -> int:
        return sum(len(interval.times) for interval in self.intervals)

    @property
    def written_bytes(self) -> int:
        """The blocks of all writes: what continuous replication without compression ships."""
        return sum(len(interval.columns.seq) for interval in self.intervals) * self.volumes[0].block_size


class Recorder(Production):
    """A group whose splitter runs alone: nothing closes intervals, ships or gives segments back but who asks."""

    stdin = subprocess.PIPE  # it ends when this closes

    def __init__(self, tmp: Path, size_bytes: int) -> None:
        super().__init__(tmp, {"root": size_bytes}, port=free_port(), capacity=CAPACITY)
        self.command = [sys.executable, "-m", SPLITTER.module, str(self.config)]
        self.name = "the splitter"

    def ask(self, request: Callable[[SplitterClient], Awaitable[SplitterStatus]]) -> SplitterStatus:
        async def connected() -> SplitterStatus:
            splitter = await SplitterClient.open(str(self.state))
            try:
                return await request(splitter)
            finally:
                await splitter.aclose()

        return trio.run(connected)

    def end_copy(self) -> None:
        """Says that the first full copy has arrived: else blocks would be kept for it."""
        copy = self.ask(SplitterClient.status).copy
        assert copy is not None
        self.ask(lambda splitter: splitter.copied(CopyProgress(copy.mark, 1, 0)))

    def clean_up(self) -> None:
        super().clean_up()
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()


# A load is entered when the volume or the directory is there, makes what it works on, and yields while it works;
# the recording begins then. `duration_s` is how long that will be.
Load = Callable[[Path, Setting, float], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A trace to record. `on_ext4`: the load works in a filesystem, else on the volume itself.

    `missing`: why it can't be recorded here, empty if it can.
    """

    name: str
    size_bytes: int
    on_ext4: bool
    load: Load
    missing: Callable[[], str] = lambda: ""


@contextlib.contextmanager
def sqlite(directory: Path, setting: Setting, duration_s: float) -> Iterator[None]:
    script = str(Path(__file__).with_name("updates.py"))
    rows = 20_000 if setting.quick else 200_000
    command = [sys.executable, script, str(directory), str(rows), "1000"]
    with Daemon(command, setting.workspace / "updates.log", "the load of SQLite") as load:
        yield
        load.terminate()


@contextlib.contextmanager
def trees(directory: Path, setting: Setting, duration_s: float) -> Iterator[None]:
    """One load copies a tree again and again over its earlier copies, the other goes through a large one once."""
    sources = {"again": Path(sysconfig.get_path("stdlib")), "once": Path("/usr/share")}
    with contextlib.ExitStack() as stack:
        for name, source in sources.items():
            (directory / name).mkdir()
            stack.enter_context(
                running("tree", directory / name, "--source", source, "--pause", str(PAUSE_S))
            )
        yield


@contextlib.contextmanager
def random_once(volume: Path, setting: Setting, duration_s: float) -> Iterator[None]:
    with _fio(volume, duration_s, rw="write", bs="128k", rate="8m"):
        yield


@contextlib.contextmanager
def random_hot(volume: Path, setting: Setting, duration_s: float) -> Iterator[None]:
    with _fio(volume, duration_s, rw="randwrite", bs="8k", rate="8m"):
        yield


@contextlib.contextmanager
def _fio(volume: Path, duration_s: float, **options: Any) -> Iterator[None]:
    """fio beside the caller, with data that doesn't shrink."""
    failures: list[HostError] = []

    def work() -> None:
        try:
            fio(volume, **options, runtime=round(duration_s) + 1)
        except HostError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def pgbench(directory: Path, setting: Setting, duration_s: float) -> Iterator[None]:
    """A fresh cluster; fsync on, as it comes but for a checkpoint each 30 s."""
    settings = {"fsync": "on", "checkpoint_timeout": "30s"}
    with postgresql.Cluster(directory / "cluster", setting.workspace / "postgresql.log", settings) as cluster:
        scale = "1" if setting.quick else "10"
        cluster.run("pgbench", "--initialize", f"--scale={scale}", "--quiet")
        bench = cluster.start("pgbench", "--client=4", f"--time={round(duration_s) + 1}", "--rate=800")
        try:
            yield
            cluster.wait(bench, "pgbench")
        finally:
            bench.kill()
            bench.wait(30)


KINDS: Final = (
    Kind("SQLite", 512 * MIB, True, sqlite),
    Kind("PostgreSQL", 1024 * MIB, True, pgbench, postgresql.missing),
    Kind("trees of files", 2048 * MIB, True, trees),
    Kind("random, once", 1024 * MIB, False, random_once),
    Kind("random, hot", 48 * MIB, False, random_hot),
)


@contextlib.contextmanager
def recorded(kind: Kind, setting: Setting) -> Iterator[Trace]:
    """Records a trace; its journal is there as long as the context.

    Raises:
        HostError: the splitter or the load failed.
    """
    tmp = setting.workspace / "trace"
    tmp.mkdir()
    os.chmod(setting.workspace, 0o711)  # a database's server runs as a user of its own
    try:
        with Recorder(tmp, kind.size_bytes) as recorder:
            recorder.end_copy()
            first = _record(kind, setting, recorder)
            status = recorder.ask(SplitterClient.status)
            if status.bypass_cause:
                raise HostError(f"{kind.name}: {status.bypass_cause}: not everything is in the journal")
            recorder.terminate()
        yield read_trace(kind.name, recorder.state, first, status.tail)
    finally:
        shutil.rmtree(tmp)


def _record(kind: Kind, setting: Setting, recorder: Recorder) -> SplitterStatus:
    """Runs the load and closes its intervals; the number of the mark that the first one begins at."""
    count = QUICK_INTERVALS if setting.quick else INTERVALS
    interval_s = QUICK_INTERVAL_S if setting.quick else INTERVAL_S
    with contextlib.ExitStack() as stack:
        place = recorder.volume()
        if kind.on_ext4:
            device = stack.enter_context(LoopDevice(place))
            run(["mkfs.ext4", "-q", "-F", device])
            place = stack.enter_context(
                MountedFilesystem(device, recorder.mountpoint.parent / "live", "ext4")
            )
        with kind.load(place, setting, count * interval_s):
            note(f"{kind.name}: recording {count} intervals of {interval_s:g} s …")
            if kind.on_ext4:
                run(["sync", "-f", place])
            first = recorder.ask(SplitterClient.mark)
            start = time.monotonic()
            for number in range(1, count + 1):
                while (left_s := start + number * interval_s - time.monotonic()) > 0:
                    time.sleep(min(left_s, SYNC_S))
                    if kind.on_ext4:
                        run(["sync", "-f", place])
                recorder.ask(SplitterClient.mark)
    return first


def read_trace(name: str, state: Path, first: SplitterStatus, until: Location) -> Trace:
    """The intervals that the journal has behind the mark that was set then.

    Raises:
        HostError: it has none.
    """
    group = read_group(str(state))
    assert group is not None
    directory = journal_directory(str(state))
    reader = JournalReader(directory, [volume.block_size for volume in group.volumes])
    try:
        if reader.seek_mark(first.mark, first.seq, until) is not Found.THERE:
            raise HostError(f"{directory}: mark {first.mark} isn't in the journal")
        intervals = []
        while isinstance(item := reader.next(until), Interval):
            intervals.append(item)
    finally:
        reader.close()
    return Trace(name, directory, group.volumes, tuple(intervals))
