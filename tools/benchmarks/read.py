"""Group `read`: images against a flat file of the same bytes, and against what else serves historical images.

All on one volume of random data, at an instant inside an interval in which a tenth of it was rewritten; the files
below every server are in the page cache, what the kernel had cached of the served file itself is dropped before each
run. The bare server gets the readahead that pitfs gives its own mount, so that the figures compare servers; the
other peers are taken as they come (the kernel's 128 KiB).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import export
import histories
import scratch
from common import Setting, bytes_per_second, per_second, preallocate, readahead
from memory import MountMemory
from peers import BARE, BORG, CHAIN, PEERS, RAW, RESTIC, Peer
from report import Measure, compare, note, plain
from rewriting import Rewriting

from tests.helpers.hosts import Mount, Production, Replica, ask
from tests.helpers.loops import LoopDevice
from tests.helpers.processes import HostError
from tests.helpers.processes import run as command

VOLUME_BYTES: Final = 2 << 30
QUICK_VOLUME_BYTES: Final = 512 << 20
ROUNDS, QUICK_ROUNDS = 5, 3
SLOW_ROUNDS, QUICK_SLOW_ROUNDS = 3, 2  # of peers that are
SLOW_RUN_S: Final = 4  # they don't get through the volume in any sensible time
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Load:
    """One way to read, with options of fio. `goals`: the least ratio by the name of the peer, None for no goal."""

    name: str
    options: Mapping[str, Any]
    rate: Callable[..., float]
    unit: str
    goals: Mapping[str, float | None]
    scale: float = 1
    on_loop: bool = False


SEQUENTIAL: Final = {"ioengine": "psync", "iodepth": 1, "rw": "read", "bs": "1M", "time_based": 0}
RANDOM: Final = {"rw": "randread", "bs": "4k"}
LOADS: Final = (
    Load("sequential read, buffered", SEQUENTIAL | {"direct": 0}, bytes_per_second, "MB/s",
         {BARE: 0.8, RAW: None, CHAIN: 3, BORG: 8, RESTIC: 8}, 1e6),
    Load("random reads 4 KiB, depth 1", RANDOM | {"iodepth": 1}, per_second, "/s",
         {BARE: 1.0, RAW: 1.0, CHAIN: None, BORG: 60, RESTIC: 60}),
    Load("random reads 4 KiB, depth 16", RANDOM, per_second, "/s", {BARE: 1.0, RAW: 1.0, CHAIN: 1.5}),
    Load("loop device, sequential read 1 MiB", SEQUENTIAL, bytes_per_second, "MB/s", {BARE: 0.8}, 1e6, True),
    Load("loop device, random reads 4 KiB, depth 16", RANDOM, per_second, "/s", {BARE: 0.8}, on_loop=True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scene:
    """What all rows are measured on.

    Attributes:
        store: with two snapshots and the interval between them.
        instant: in the middle of that interval, by writes.
        flat: a file with the volume's content then.
        rewriting: the writes from the older snapshot to the instant.
    """

    store: Path
    instant: str
    flat: Path
    rewriting: Rewriting


def run(setting: Setting) -> list[Measure]:
    setting = dataclasses.replace(setting, most_rounds=QUICK_ROUNDS if setting.quick else ROUNDS)
    memory = MountMemory()
    with memory.watching():
        scene = prepare(setting)
        measures = _measure(setting, scene)
        measures += scratch.measures(setting, scene.store, scene.instant, scene.flat)
        measures += export.measures(setting, scene.store, scene.instant, scene.flat)
        shutil.rmtree(scene.store)
        scene.flat.unlink()
        measures += histories.rows(setting, memory)
    return measures + memory.measures()


def prepare(setting: Setting) -> Scene:
    """Replicates a volume over loopback, rewrites a tenth of it between two snapshots, ends both hosts."""
    tmp = setting.workspace
    size = QUICK_VOLUME_BYTES if setting.quick else VOLUME_BYTES
    rewriting = Rewriting.of(size, 1)
    backing = preallocate(tmp / "pitfs.backing", size)
    with (
        Replica(tmp) as replica,
        Production(tmp, {"root": backing}, port=replica.port, interval="1h", capacity="20GiB") as production,
    ):
        note(f"first full copy of {size // MIB} MiB, then {len(rewriting.offsets):,} writes to "
             f"{rewriting.written_bytes / size:.1%} of it …")  # fmt: skip
        first = production.snapshot(timeout_s=600)
        rewriting.write(production.volume())
        last = production.snapshot(timeout_s=600)
        production.terminate()
        replica.terminate()
    store = replica.store()
    backing.unlink()  # the rest wants to stay in memory
    shutil.rmtree(production.state)
    # Its writes may be split on their way: the middle is found by their numbers.
    ends = [ask("resolve", store, name, "--json")["seq"] for name in (first, last)]
    found = ask("resolve", store, f"seq-{sum(ends) // 2}", "--json")
    if found["kind"] != "intermediary":
        raise HostError(f"the instant to read isn't between two snapshots: {found}")
    flat = tmp / "flat"
    with Mount(store, tmp) as mount:
        command(["cp", "--sparse=never", mount.image(found["instant"]), flat], timeout_s=600)
    os.sync()
    return Scene(store, found["instant"], flat, rewriting.first_half())


def _measure(setting: Setting, scene: Scene) -> list[Measure]:
    tmp = setting.workspace
    with contextlib.ExitStack() as stack:
        mount = stack.enter_context(Mount(scene.store, tmp))
        candidates = [Candidate("pitfs", mount.image(scene.instant))]
        for peer in PEERS:
            if missing := peer.missing():
                note(f"{peer.name} is left out: {missing}")
                continue
            note(f"preparing {peer.name} …")
            directory = tmp / f"peer-{PEERS.index(peer)}"
            directory.mkdir()
            stack.callback(shutil.rmtree, directory)
            served = stack.enter_context(peer.serve(directory, scene.flat, scene.rewriting))
            candidates.append(Candidate(peer.name, served, peer))
        kib = readahead(mount.path)
        for candidate in candidates:
            if candidate.name == BARE:
                readahead(candidate.path.parent, kib)
        os.sync()
        warm(tmp)
        measures = [plain("readahead of the mount and of the bare server", kib, "KiB")]
        for load in LOADS:
            taking_part = [each for each in candidates if each.name in {"pitfs", *load.goals}]
            with _on_loops(taking_part) if load.on_loop else contextlib.nullcontext(taking_part) as readers:
                measures += _compare(setting, load, readers)
    return measures


@dataclass(slots=True)
class Candidate:
    """Who is measured, with a file or device to read; `values`: one for each round that it took part in."""

    name: str
    path: Path
    peer: Peer | None = None
    values: list[float] = field(default_factory=list)

    @property
    def slow(self) -> bool:
        return self.peer is not None and self.peer.slow


@contextlib.contextmanager
def _on_loops(candidates: list[Candidate]) -> Iterator[list[Candidate]]:
    """The same, read through loop devices with direct I/O."""
    with contextlib.ExitStack() as stack:
        yield [
            Candidate(each.name, stack.enter_context(LoopDevice(each.path, read_only=True)), each.peer)
            for each in candidates
        ]


def _compare(setting: Setting, load: Load, candidates: list[Candidate]) -> list[Measure]:
    """Round after round, so that what drifts drifts for all; slow ones take part in the first rounds only."""
    rounds, slow_rounds = setting.rounds, QUICK_SLOW_ROUNDS if setting.quick else SLOW_ROUNDS
    for each in candidates:
        each.values = []
        _once(setting, load, each)  # what a server keeps, it has then
    for number in range(rounds):
        for each in candidates:
            if not each.slow or number < slow_rounds:
                each.values.append(_once(setting, load, each))
        note(f"{load.name}, round {number + 1} of {rounds}: "
             + ", ".join(f"{each.name} {each.values[-1]:,.0f}" for each in candidates))  # fmt: skip
    own = candidates[0].values
    return [
        compare(load.name, own[: len(each.values)], each.values, load.unit, load.goals[each.name], each.name)
        for each in candidates[1:]
    ]


def _once(setting: Setting, load: Load, candidate: Candidate) -> float:
    run_s = SLOW_RUN_S if candidate.slow or load.options["rw"] == "read" else setting.run_s
    rate = load.rate(candidate.path, **load.options, runtime=run_s) / load.scale
    drop_cached(candidate.path)  # fio did before the run; now so that it doesn't push others' files out
    return rate


def drop_cached(path: Path) -> None:
    """Takes the file's or device's own pages from the page cache, and leaves those below it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def warm(directory: Path) -> None:
    """Reads all files below that aren't served by somebody into the page cache."""
    device = directory.stat().st_dev
    for path, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if os.lstat(Path(path, name)).st_dev == device]
        for file in (Path(path, name) for name in names):
            if file.lstat().st_dev == device:
                with file.open("rb", buffering=0) as opened:
                    while opened.read(MIB):
                        pass
