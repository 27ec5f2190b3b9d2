"""A mount that several processes serve: the same bytes from each, and nobody waits for one that is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pitfs.errors import PitfsError, UsageError
from pitfs.fuse.mount.workers import decode_failure, encode_failure
from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.pins.pins import list_pins
from tests.helpers.hosts import Mount
from tests.helpers.loops import is_mounted
from tests.helpers.processes import cpu_seconds, wait_until
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

pytestmark = pytest.mark.fuse

SIZE = 2_200_000


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, History]]:
    """A store with 40 instants, nothing of which the tests here change."""
    root = tmp_path_factory.mktemp("replica")
    history = History(3, (VolumeInfo("root", SIZE, 4096),))
    ingest = Ingest(str(root), history.hello)
    for writes in (0, 20, 20):
        for _ in range(writes):
            history.write()
        ingest_transfer(ingest, history.close_interval(0))
    ingest.close()
    return root / history.group, history


class SlowMount(Mount):
    """One that reads in threads, `wait_s` each; what it says goes to the log."""

    def __init__(self, store: Path, tmp: Path, wait_s: float, options: str = "workers=2") -> None:
        super().__init__(store, tmp, options=options)
        self.begun = tmp / "begun"
        self.command = [sys.executable, "-m", "tests.helpers.slow_mount", str(wait_s), str(self.begun)]

    def wait_for_reads(self, count: int) -> None:
        wait_until(lambda: self.begun.stat().st_size >= count, f"{count} reads have begun", 10)


def image_of(mount: Mount, history: History, seq: int) -> Path:
    return mount.image(format_instant(history.times_ns[seq]))


def test_several_readers_get_the_exact_bytes_from_several_processes(
    history: tuple[Path, History], tmp_path: Path
) -> None:
    store, model = history

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(6):
            seq = chance.randrange(41)
            expected = model.states[seq][0]
            with image_of(mount, model, seq).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                for _ in range(40):
                    start, size = chance.randrange(SIZE), chance.choice((1, 4096, 70_000, 1 << 20))
                    assert os.pread(file.fileno(), size, start) == expected[start : start + size]

    with Mount(store, tmp_path, options="workers=3") as mount:
        assert len(mount.workers()) == 3
        before = {pid: cpu_seconds([pid]) for pid in mount.workers()}
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(read, range(6)))
        assert sum(cpu_seconds([pid]) > before[pid] for pid in before) >= 2
        assert len(os.listdir(mount.path)) == 3 + 3
        mount.unmount()
        assert mount.complaints() == []


def test_one_process_serves_as_well(history: tuple[Path, History], tmp_path: Path) -> None:
    store, model = history
    with SlowMount(store, tmp_path, 0.002, options="workers=1") as mount:
        (worker,) = mount.workers()
        assert image_of(mount, model, 7).read_bytes() == model.states[7][0]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: mount.workers() not in ([], [worker]), "another takes its place", 10)
        assert image_of(mount, model, 8).read_bytes() == model.states[8][0]
        assert [f"worker {worker} ended by SIGKILL" in line for line in mount.complaints()] == [True]
        mount.unmount()


def test_a_result_is_taken_though_another_process_was_faster_with_the_next_request(
    history: tuple[Path, History], tmp_path: Path
) -> None:
    """Where each process has a request already another one wakes all; those that find nothing to read any more would
    wait there for the next, which doesn't come before these are answered."""
    store, model = history
    expected = model.states[30][0]
    readers, rounds = 4, 100
    with SlowMount(store, tmp_path, 0.003) as mount:
        gate = threading.Barrier(readers + 1, timeout=20)
        answers: list[bool] = []

        def read(number: int) -> None:
            file = os.open(image_of(mount, model, 30), os.O_RDONLY | os.O_DIRECT)
            for round_ in range(rounds):
                gate.wait()
                time.sleep(number * 0.0005)
                start = (round_ * readers + number) * 4096
                answers.append(os.pread(file, 4096, start) == expected[start : start + 4096])
                gate.wait()
            os.close(file)

        threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(readers)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(2 * rounds):
                gate.wait()  # breaks after 20 s
        except threading.BrokenBarrierError:
            mount.kill()  # whoever hangs ends
            raise
        for thread in threads:
            thread.join(20)
        assert answers == [True] * (readers * rounds)


def test_who_waits_for_a_killed_worker_gets_an_error_and_the_mount_goes_on(
    history: tuple[Path, History], tmp_path: Path
) -> None:
    store, model = history
    with SlowMount(store, tmp_path, 60) as mount, ThreadPoolExecutor(2) as pool:
        files = [os.open(image_of(mount, model, 5), os.O_RDONLY | os.O_DIRECT) for _ in range(2)]
        workers = mount.workers()
        waiting: list[Future[bytes]] = []
        for number, file in enumerate(files):
            waiting.append(pool.submit(os.pread, file, 4096, number * 4096))
        mount.wait_for_reads(2)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        for each in waiting:
            with pytest.raises(OSError) as caught:
                each.result(20)
            assert caught.value.errno in (errno.ECONNABORTED, errno.EIO, errno.ENOTCONN)
        wait_until(lambda: len(set(mount.workers()) - set(workers)) == 2, "others take their places", 10)
        assert not set(mount.workers()) & set(workers)
        assert is_mounted(mount.path) and os.readlink(mount.path / "latest")
        for file in files:
            os.close(file)
        assert sorted(line.split("worker ")[1].split(":")[0] for line in mount.complaints()) == sorted(
            f"{pid} ended by SIGKILL" for pid in workers
        )
        os.kill(mount.supervisor(), signal.SIGTERM)
        wait_until(lambda: not is_mounted(mount.path), "SIGTERM unmounts", 10)
        wait_until(lambda: not mount.pids(), "all end", 10)


def test_an_open_image_is_held_until_it_is_closed_whichever_process_is_asked(
    history: tuple[Path, History], tmp_path: Path
) -> None:
    store, model = history

    def held_now() -> list[list[int]]:
        return [[position.seq for position in holder.instants] for holder in list_pins(str(store))]

    with Mount(store, tmp_path, options="workers=3") as mount:
        assert held_now() == [[]]
        (pins,) = list_pins(str(store))
        assert (pins.pid, pins.what) == (mount.supervisor(), f"mount {mount.path}")
        files = [os.open(image_of(mount, model, seq), os.O_RDONLY) for seq in (3, 8, 3, 40) for _ in range(5)]
        assert held_now() == [[3, 8, 40]]
        counted_by = mount.workers()  # none of them: what is held is in the file
        for pid in counted_by:
            os.kill(pid, signal.SIGKILL)
        # One that is still dying could take a release along.
        wait_until(lambda: not set(counted_by) & set(mount.pids()), "they are gone", 10)
        for file in files[1:]:
            with contextlib.suppress(OSError):
                os.close(file)
        # closing doesn't wait for the mount
        wait_until(lambda: held_now() == [[3]], "what is closed isn't held", 10)
        os.close(files[0])
        wait_until(lambda: held_now() == [[]], "nothing is held", 10)
        mount.unmount()
        assert list_pins(str(store)) == [] and os.listdir(store / "pins") == ["lock"]


def test_another_store_in_the_same_place_is_not_taken_for_the_one_that_was_mounted(tmp_path: Path) -> None:
    """Inode numbers say seq and volume: the kernel would have cached pages of the one in images of the other."""
    stores = []
    for seed in (3, 4):
        history = History(seed, (VolumeInfo("root", 40_000, 4096),))
        ingest = Ingest(str(tmp_path / str(seed)), history.hello)
        ingest_transfer(ingest, history.close_interval(0))
        ingest.close()
        stores.append((tmp_path / str(seed) / history.group, history.states[0][0]))
    (store, content), (other, other_content) = stores
    assert content != other_content
    with Mount(store, tmp_path, options="workers=1") as mount:
        image = next(iter(mount.path.glob("2*Z"))) / "root.img"
        assert image.read_bytes() == content
        store.rename(tmp_path / "away")
        other.rename(store)
        os.kill(mount.workers()[0], signal.SIGKILL)
        with contextlib.suppress(OSError):
            assert image.read_bytes() == content
            with image.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert file.read(40_000) == content
        wait_until(lambda: not mount.pids(), "the mount ends", 10)
        assert "is another one now than when it was mounted" in mount.logged()


def test_a_signal_during_a_read_lets_it_finish(history: tuple[Path, History], tmp_path: Path) -> None:
    store, model = history
    with SlowMount(store, tmp_path, 0.7) as mount, ThreadPoolExecutor(1) as pool:
        file = os.open(image_of(mount, model, 5), os.O_RDONLY | os.O_DIRECT)
        answer = pool.submit(os.pread, file, 4096, 0)
        mount.wait_for_reads(1)
        os.kill(mount.supervisor(), signal.SIGTERM)
        assert answer.result(20) == model.states[5][0][:4096]
        with contextlib.suppress(OSError):  # the mount is gone
            os.close(file)
        wait_until(lambda: not mount.pids(), "all end", 10)
        assert not is_mounted(mount.path) and mount.complaints() == []


def test_what_a_process_says_to_another_keeps_message_and_exit_code() -> None:
    for error, code in ((PitfsError("no more ädges"), 1), (UsageError("so not"), 2), (OSError(5, "disk"), 1),
                        (PitfsError("no file of bytes as \udcff"), 1)):  # fmt: skip
        again = decode_failure(encode_failure(error))
        assert (str(again), again.exit_code) == (str(error), code)
    assert "a bug in pitfs" in str(decode_failure(encode_failure(ZeroDivisionError("x"))))


def test_the_foreground_tells_why_the_store_can_not_be_served(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "store").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "pitfs.cli.mount", "-f", tmp_path / "store", tmp_path / "place"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "not a store" in done.stderr and not is_mounted(tmp_path / "place")


SLOW_START = """
import os, signal, time
from pitfs.fuse.mount import workers
from pitfs.fuse.mount.request import MountRequest

class Supervisor(workers.WorkerSupervisor):
    def _work(self):
        time.sleep(0.1 if self._workers else 0.5)  # the second one is quicker
        self._send(workers.READY)
        time.sleep(60)

workers.fuse_descriptor = lambda: 0
reader, writer = os.pipe()
supervisor = Supervisor(MountRequest("store", "mountpoint", workers=2), writer)
supervisor._fork(lambda: time.sleep(0.2))  # as the process that tries whether the store can be opened
start, parent = time.monotonic(), os.getpid()
if os.fork() == 0:
    os.close(writer)
    print(os.read(reader, 100).decode(), time.monotonic() - start, flush=True)
    os.kill(parent, signal.SIGTERM)
    os._exit(0)
supervisor.serve(None)
"""


def test_the_mount_is_ready_when_all_workers_are_and_not_before() -> None:
    done = subprocess.run([sys.executable, "-c", SLOW_START], capture_output=True, text=True, check=True, timeout=30)
    word, after_s = done.stdout.split()
    assert word == "ready" and 0.5 <= float(after_s) < 10
