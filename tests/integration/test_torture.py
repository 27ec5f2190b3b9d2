"""Everything at once: kills, cuts, rates and modes in random order under load; what the replica shows is never wrong.

Real processes with a proxy between them. Each phase has a mode; things happen to it at random; then all is let be, and
must come together by itself: no gap, every instant exact. The seed decides what happens, not when it meets what.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from tests.helpers.checks import check_image, last_acknowledged
from tests.helpers.hosts import Mount, Production, Replica, ask, digest, instant_name, instant_ns, xxhsum
from tests.helpers.load import EXIT_IO_ERROR, WRITE, read_log
from tests.helpers.loops import free_file
from tests.helpers.netlink import Proxy
from tests.helpers.processes import ROOT, HostError, wait_until
from tests.helpers.stamps import Plan

VOLUME_BYTES: Final = 4 << 20
RATES: Final = (30e3, 300e3, 3e6, None)  # bytes per second of the link; the load writes some 2 MB/s
MODES: Final = ("dynamic", "async", "sync", "snapshot")
SAMPLES: Final = 12  # instants looked at after each phase
QUIET_S: Final = 60.0  # for all to come together again


class Torture:
    """One run.

    Args:
        tmp: for everything. seed: decides what happens.
    """

    def __init__(self, tmp: Path, seed: int) -> None:
        self.tmp, self.random, self.plan = tmp, random.Random(seed), Plan(seed, VOLUME_BYTES)
        self.log = tmp / "log"
        self.seed = seed
        self.backing = free_file(tmp / "backing", VOLUME_BYTES)
        self.next_write = 1
        self.happened: list[str] = []

    def run(self, phases: int) -> None:
        with Replica(self.tmp) as self.replica, Proxy(self.replica.port) as self.proxy:
            try:
                for number in range(phases):
                    self.phase(number)
            except BaseException as error:
                error.add_note(f"seed {self.seed}, after {'; '.join(self.happened)}")
                raise

    # -- a phase -----------------------------------------------------------------------------------------

    def phase(self, number: int) -> None:
        random_ = self.random
        mode = random_.choice(MODES) if number else "dynamic"
        interval = random_.choice(("300ms", "1s", "5s", "1h"))
        self.say(f"phase {number}: mode {mode}, interval {interval}")
        production = Production(
            self.tmp, {"root": self.backing}, port=self.proxy.port, interval=interval, mode=mode, capacity="256MiB"
        )
        with production:
            if not number:
                production.snapshot()
            with Mount(self.replica.store(), self.tmp) as mount:
                with self.load(production):
                    for _ in range(random_.randrange(2, 6)):
                        time.sleep(random_.uniform(0.0, 1.2))
                        self.do_something(production)
                        if random_.random() < 0.5:
                            check_image(mount.image("latest"), self.plan)
                    time.sleep(random_.uniform(0.0, 0.5))
                    if mode == "sync" and random_.random() < 0.7:
                        self.lose_production(production)
                self.quiet(production, mode)
                self.check(production, mount)
                assert mount.complaints() == []
            for daemon in (production, self.replica):
                assert "Traceback" not in daemon.logged(), daemon.logged()

    def say(self, what: str) -> None:
        self.happened.append(what)
        print(f"{time.time():.3f} {what}", file=sys.stderr)

    @contextmanager
    def load(self, production: Production) -> Iterator[None]:
        self.volume = production.volume()
        self.writer = self.start_load()
        try:
            yield
        finally:
            self.end_load()

    def start_load(self) -> subprocess.Popen[bytes]:
        options = ["--seed", str(self.seed), "--first", str(self.next_write), "--rate", "200", "--fsync-every", "25"]
        command = [sys.executable, "-m", "tests.helpers.load", "stamped", str(self.volume), str(self.log)]
        return subprocess.Popen([*command, *options, "--direct"], cwd=ROOT)

    def end_load(self) -> None:
        """Asks it to end, and finds out which write was the last."""
        if self.writer.poll() is None:
            self.writer.terminate()
        assert self.writer.wait(60) in (0, EXIT_IO_ERROR, -signal.SIGTERM)  # the last where it was only just starting
        self.next_write = last_acknowledged(self.log) + 1

    def write_again(self, production: Production) -> None:
        """After the splitter was killed: the write under way may have been the last that is in."""
        acknowledged = last_acknowledged(self.log)
        found = self.plan.find_at(production.volume().read_bytes(), acknowledged)
        if found > acknowledged:
            begun = int(read_log(self.log)["done_ns"][-1])
            row = np.array([(found, WRITE, begun, begun + 60 * 10**9)], read_log(self.log).dtype)
            with self.log.open("ab") as file:
                file.write(row.tobytes())
        self.next_write = found + 1
        self.writer = self.start_load()

    # -- what happens ------------------------------------------------------------------------------------

    def do_something(self, production: Production) -> None:
        what = self.random.choice([
            self.kill_shipper, self.kill_shipper, self.kill_splitter, self.kill_all, self.kill_receiver, self.cut,
            self.cut, self.silence, self.change_rate, self.change_rate, self.refuse, self.mark, self.stop_receiver,
        ])  # fmt: skip
        self.say(what.__name__)
        what(production)

    def kill_part(self, production: Production, comm: str) -> None:
        for pid in production.pids(comm):
            os.kill(pid, signal.SIGKILL)

    def kill_shipper(self, production: Production) -> None:
        self.kill_part(production, "pitfs-shipper")

    def kill_splitter(self, production: Production) -> None:
        self.kill_part(production, "pitfs-splitter")
        assert self.writer.wait(30) == EXIT_IO_ERROR
        wait_until(lambda: self.is_there() and self.answers(production), "the splitter is there again", 40, 0.2)
        self.write_again(production)

    def is_there(self) -> bool:
        try:
            return self.volume.exists()
        except OSError:  # the mount of the dead one
            return False

    @staticmethod
    def answers(production: Production) -> bool:
        try:
            production.status()
        except HostError:
            return False
        return True

    def kill_all(self, production: Production) -> None:
        production.kill()
        assert self.writer.wait(30) == EXIT_IO_ERROR
        production.restart()
        self.write_again(production)

    def kill_receiver(self, production: Production) -> None:
        self.replica.kill()
        time.sleep(self.random.uniform(0.0, 0.5))
        self.replica.start()

    def stop_receiver(self, production: Production) -> None:
        self.replica.terminate()
        time.sleep(self.random.uniform(0.0, 0.5))
        self.replica.start()

    def cut(self, production: Production) -> None:
        self.proxy.next_cut = self.next_cut if self.random.random() < 0.7 else lambda: None
        self.proxy.cut()

    def next_cut(self) -> int | None:
        return self.random.choice([None, self.random.randrange(100, 1_000_000)])

    def silence(self, production: Production) -> None:
        self.proxy.silence()

    def change_rate(self, production: Production) -> None:
        self.proxy.rate_bytes_per_s = self.random.choice(RATES)

    def refuse(self, production: Production) -> None:
        self.proxy.refusing = True
        self.proxy.cut()
        time.sleep(self.random.uniform(0.0, 1.5))
        self.proxy.refusing = False

    def mark(self, production: Production) -> None:
        try:
            production.bookmark(f"b{time.time_ns()}")
        except HostError as error:  # its shipper may just have been killed
            self.say(str(error).splitlines()[-1])

    def lose_production(self, production: Production) -> None:
        """Mode sync: what was acknowledged while in step is on the replica, whatever becomes of production."""
        self.heal()
        wait_until(lambda: self.answers(production), "the shipper answers", 40, 0.2)
        wait_until(lambda: production.status()["sync"] == "in step", "in step", QUIET_S, 0.1)
        time.sleep(0.3)
        production.kill()
        assert self.writer.wait(30) == EXIT_IO_ERROR
        acknowledged, store = last_acknowledged(self.log), self.replica.store()
        wait_until(lambda: ask("resolve", store, "latest", "--json")["seq"] >= acknowledged, "all is there", 20, 0.2)
        self.say(f"lost production behind write {acknowledged}")
        production.restart()
        self.write_again(production)

    # -- what must hold ----------------------------------------------------------------------------------

    def heal(self) -> None:
        self.proxy.rate_bytes_per_s, self.proxy.next_cut, self.proxy.refusing = None, lambda: None, False

    def quiet(self, production: Production, mode: str) -> None:
        """All comes together by itself."""
        self.heal()
        self.say("quiet")
        wait_until(lambda: self.answers(production), "the shipper answers", 40, 0.2)
        snapshot = self.eventually(production.snapshot)
        assert snapshot
        wait_until(lambda: production.status()["backfill_intervals"] == 0, "nothing waits", QUIET_S, 0.2)
        streams = mode in ("async", "sync")
        if streams:
            wait_until(lambda: production.status()["shipping"] == "streaming", "it streams", QUIET_S, 0.2)
        if mode == "sync":
            wait_until(lambda: production.status()["sync"] == "in step", "in step", QUIET_S, 0.2)

    @staticmethod
    def eventually(call: Callable[[], str]) -> str:
        deadline = time.monotonic() + QUIET_S
        while True:
            try:
                return call()
            except HostError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def check(self, production: Production, mount: Mount) -> None:
        last, store = production.snapshot(), self.replica.store()
        listing = self.replica.listing()
        assert listing["gaps"] == [], listing["gaps"]
        snapshots, intervals = listing["snapshots"], listing["intervals"]
        instants = [snapshot["instant"] for snapshot in snapshots]
        assert instants == sorted(set(instants)) and instants[-1] == last
        assert [interval["to"] for interval in intervals] == instants[1:]
        assert [interval["from"] for interval in intervals] == instants[:-1]
        assert [each["to_seq"] for each in intervals] == [each["seq"] for each in snapshots[1:]]
        assert digest(store, last) == xxhsum(production.volume())
        seq = check_image(mount.image(last), self.plan)
        assert seq == last_acknowledged(self.log) == production.status()["seq"]
        rows = read_log(self.log)
        rows = rows[rows["kind"] == WRITE]
        for snapshot in self.random.sample(snapshots, min(SAMPLES, len(snapshots))):
            assert check_image(mount.image(snapshot["instant"]), self.plan) == snapshot["seq"]
        first_ns, last_ns = instant_ns(instants[0]), instant_ns(last)
        for _ in range(SAMPLES):
            time_ns = self.random.randrange(first_ns, last_ns)
            seq = check_image(mount.image(instant_name(time_ns)), self.plan)
            begun = int(rows["n"][rows["begun_ns"] <= time_ns].max(initial=0))
            acknowledged = int(rows["n"][rows["done_ns"] <= time_ns].max(initial=0))
            (interval,) = [
                each for each in intervals if instant_ns(each["from"]) <= time_ns < instant_ns(each["to"])
            ]
            assert seq <= max(begun, acknowledged + 1), (time_ns, interval)
            if interval["granularity_ns"] == 0:
                assert seq >= acknowledged, (time_ns, interval)
            else:
                assert interval["from_seq"] <= seq, (time_ns, interval)


@pytest.mark.fuse
@pytest.mark.timeout(180)
def test_whatever_happens_the_replica_comes_back_and_is_never_wrong(tmp_path: Path) -> None:
    Torture(tmp_path, 1).run(2)


@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2, 7))
def test_for_longer(tmp_path: Path, seed: int) -> None:
    Torture(tmp_path, seed).run(8)
