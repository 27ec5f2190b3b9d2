"""The replica's store isn't the one that production knows: newer, damaged, of another history, an old copy.

It is refused with what to do, production's writes go on, and what can be mended is made whole again.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from tests.helpers.hosts import Mount, Production, Replica, digest, instant_ns, xxhsum
from tests.helpers.processes import pitfs_command, run, wait_until
from tests.helpers.refusals import refused, status_of

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]
MIB = 1 << 20


def write(production: Production, number: int) -> bytes:
    """Writes one block, durable; the volume's whole content after it."""
    fd = os.open(production.volume(), os.O_RDWR)
    try:
        os.pwrite(fd, bytes([number]) * 4096, number * 8192)
        os.fsync(fd)
    finally:
        os.close(fd)
    return production.volume().read_bytes()


def snapshot_fails(production: Production, *words: str) -> None:
    begun = time.monotonic()
    refused([*pitfs_command(), "snapshot", production.config], 1, "not on the replica yet", *words)
    assert time.monotonic() - begun < 15


def refusals_said(production: Production) -> list[str]:
    return [line for line in production.logged().splitlines() if "not replicating" in line]


def test_a_newer_or_damaged_store_is_refused_and_taken_again_when_it_is_put_back(tmp_path: Path) -> None:
    with (
        Replica(tmp_path) as replica,
        Production(tmp_path, {"root": MIB}, port=replica.port, interval="60s") as production,
    ):
        write(production, 1)
        production.snapshot()
        info, catalog = replica.store() / "store.json", replica.store() / "catalog.sqlite"
        for path, damage, words in (
            (
                info,
                info.read_bytes().replace(b'"version": 2', b'"version": 9'),
                ("store of version 9", "newer pitfs"),
            ),
            (catalog, b"this is no database" * 1000, (f"{catalog}: damaged", "pitfs check STORE --rebuild")),
        ):
            replica.terminate()
            good = path.read_bytes()
            path.write_bytes(damage)
            replica.start()
            write(production, 2)
            snapshot_fails(production, *words)
            assert path.read_bytes() == damage, "what is refused is left as it is"
            assert words[0] in status_of(production)["link"]
            replica.terminate()
            path.write_bytes(good)
            replica.start()
            last = production.snapshot()
            assert digest(replica.store(), last) == xxhsum(production.volume())
        assert replica.listing()["gaps"] == []
        said = refusals_said(production)
        assert sum("store of version 9" in line for line in said) == 1
        assert sum("damaged at byte" in line for line in said) == 1, "\n".join(said)
        assert "Traceback" not in production.logged() + replica.logged()


def test_a_store_of_another_history_is_refused_until_it_is_moved_away_and_stays_readable(
    tmp_path: Path,
) -> None:
    with (
        Replica(tmp_path) as replica,
        Production(tmp_path, {"root": MIB}, port=replica.port, interval="60s") as production,
    ):
        write(production, 1)
        before = production.snapshot()
        content = production.volume().read_bytes()
        production.terminate()
        shutil.rmtree(production.state)
        production.restart()
        content_2 = write(production, 2)
        production.wait_for_shipper()
        snapshot_fails(production, f"{replica.store()}: has history", "its state was made anew",
                       "move this store away")  # fmt: skip
        assert digest(replica.store(), before) == xxhsum_of(tmp_path, content)
        replica.store().rename(tmp_path / "aside")
        last = production.snapshot()
        assert digest(replica.store(), last) == xxhsum_of(tmp_path, content_2)
        assert digest(tmp_path / "aside", before) == xxhsum_of(tmp_path, content)
        assert len(refusals_said(production)) == 1, production.logged()
        assert "Traceback" not in production.logged() + replica.logged()


def xxhsum_of(tmp: Path, content: bytes) -> str:
    (tmp / "expected").write_bytes(content)
    return xxhsum(tmp / "expected")


@pytest.mark.parametrize("journal_has_it", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_replica_restored_from_an_old_copy_is_noticed_and_made_whole(
    tmp_path: Path, journal_has_it: bool
) -> None:
    """Where the local journal still has what is missing it is sent again, else a full sync with a gap."""
    with (
        Replica(tmp_path) as replica,
        Production(
            tmp_path, {"root": 4 * MIB}, port=replica.port, interval="60s", capacity="16MiB"
        ) as production,
    ):
        states = {}
        for number in (1, 2):
            content = write(production, number)
            states[production.snapshot()] = content
        replica.terminate()
        shutil.copytree(replica.store(), tmp_path / "old")
        replica.start()
        lost = {}
        for number in (3, 4):
            content = write(production, number)
            if not journal_has_it:
                push_out_of_journal(production)
            lost[production.snapshot()] = production.volume().read_bytes()
        replica.terminate()
        shutil.rmtree(replica.store())
        (tmp_path / "old").rename(replica.store())
        replica.start()
        content = write(production, 5)
        production.wait_for_shipper()
        states[snapshot_outside_of_the_gap(production)] = content
        listing = replica.listing()
        if journal_has_it:
            states |= lost
            assert listing["gaps"] == []
        else:
            (gap,) = listing["gaps"]
            assert "which the local journal has no more" in gap["cause"]
            assert gap["from"] == sorted(states)[1]
            assert instant_ns(gap["to"]) > instant_ns(max(lost)), "what is lost lies within the gap"
            assert [line for line in production.complaints() if "a full sync follows" in line]
        content = write(production, 6)
        states[production.snapshot()] = content
        with Mount(replica.store(), tmp_path) as mount:
            for instant, content in states.items():
                assert mount.image(instant).read_bytes() == content, instant
        assert "Traceback" not in production.logged() + replica.logged()


def push_out_of_journal(production: Production) -> None:
    """Writes until what came before has left the local journal, in intervals that fit into it."""
    first = min(production.state.glob("journal/segment-*"), default=None)
    assert first is not None, list(production.state.glob("journal/*"))
    fd = os.open(production.volume(), os.O_RDWR)
    try:
        for number in range(48):
            os.pwrite(fd, os.urandom(1 << 17), (number % 16 + 8) << 17)
    finally:
        os.close(fd)
    production.snapshot()
    wait_until(lambda: not first.exists(), f"{first} is released", 10)


def snapshot_outside_of_the_gap(production: Production) -> str:
    """One that was set before production noticed lies in the gap, and says so."""
    done = run([*pitfs_command(), "snapshot", production.config], accept=(0, 1))
    if done.returncode == 0:
        return done.stdout.strip()
    assert "lies in a gap" in done.stderr and "take another" in done.stderr and done.stderr.count("\n") == 1
    return production.snapshot()
