"""Pins: others see them, they die with their process, and they don't cross with a removal."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pitfs.errors import NoSuchInstantError
from pitfs.model.position import Position
from pitfs.store.ingest import Ingest
from pitfs.store.pins import pin_file
from pitfs.store.pins.pin_file import EVERYTHING, FILE_BYTES, MAX_LISTED, PAGE_BYTES, Unlisted
from pitfs.store.pins.pins import Pins, list_pins, pins_locked
from pitfs.store.store import Resolution, Store
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import random_history, random_transfers

CHILD_S = 60


def files(store: Path) -> list[Path]:
    return sorted(path for path in (store / "pins").iterdir() if path.name != "lock")


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has pinned seq 7 at 700 ns and says so."""
    code = (
        "import sys; from pitfs.store.pins.pins import Pins; pins = Pins(sys.argv[1], 'mount /mnt/db1'); "
        "pins.pin(7, 700); print('held', flush=True); sys.stdin.read(); pins.close()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


class Pruned:
    """A store in which one state is left."""

    path = "/pruned"

    def __init__(self, left: Resolution) -> None:
        self._left = left

    def at_seq(self, seq: int) -> Resolution:
        return self._left


def test_what_is_pinned_is_listed_until_it_is_unpinned(tmp_path: Path) -> None:
    assert list_pins(str(tmp_path)) == []
    with Pins(str(tmp_path), "export /srv/x.img") as pins:
        assert pins.pin(9, 900) and pins.pin(3, 300) and pins.pin(9, 900)
        (found,) = list_pins(str(tmp_path))
        assert (found.pid, found.what, found.unlisted) == (os.getpid(), "export /srv/x.img", None)
        assert found.instants == (Position(3, 300), Position(9, 900))
        assert found.since_ns > 0
        pins.unpin(9)
        pins.unpin(3)
        pins.unpin(4)  # never pinned
        assert list_pins(str(tmp_path))[0].instants == (Position(9, 900),)
        pins.unpin(9)
        assert list_pins(str(tmp_path))[0].instants == ()
    assert list_pins(str(tmp_path)) == []
    assert files(tmp_path) == []


def test_two_processes_pin_the_same_instant(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with Pins(str(tmp_path), "nbd unix:/run/x") as pins:
        pins.pin(7, 700)
        found = list_pins(str(tmp_path))
        assert [(each.pid, each.what) for each in found] == [(other.pid, "mount /mnt/db1"), (os.getpid(), pins.what)]
        assert [each.instants for each in found] == [(Position(7, 700),)] * 2
        pins.unpin(7)
        assert [each.instants for each in list_pins(str(tmp_path))] == [(Position(7, 700),), ()]
        other.communicate("", timeout=CHILD_S)
        assert [each.what for each in list_pins(str(tmp_path))] == ["nbd unix:/run/x"]


@pytest.mark.parametrize("swept_by", ["listing", "pinning"])
def test_a_killed_process_has_pinned_nothing_and_its_file_is_removed(
    tmp_path: Path, other: subprocess.Popen[str], swept_by: str
) -> None:
    other.kill()
    other.wait(CHILD_S)
    assert len(files(tmp_path)) == 1
    if swept_by == "listing":
        assert list_pins(str(tmp_path)) == []
        assert files(tmp_path) == []
    else:
        with Pins(str(tmp_path), "x"):
            assert len(files(tmp_path)) == 1


def test_forked_workers_pin_and_unpin_for_all(tmp_path: Path) -> None:
    with Pins(str(tmp_path), "mount /m") as pins:
        pins.pin(1, 100)
        for pinned, unpinned in ((2, 1), (3, 2)):
            worker = os.fork()
            if worker == 0:
                pins.unpin(unpinned)
                pins.pin(pinned, pinned * 100)
                pins.close()  # a worker's end isn't that of the pins
                os._exit(0)
            assert os.waitpid(worker, 0)[1] == 0
            assert list_pins(str(tmp_path))[0].instants == (Position(pinned, pinned * 100),)


def test_pins_live_as_long_as_one_worker(tmp_path: Path) -> None:
    store, (ready, say_ready), (go_on, say_go_on), (ended, still_there) = str(tmp_path), os.pipe(), os.pipe(), os.pipe()
    minder = os.fork()
    if minder == 0:
        pins = Pins(store, "mount /m")
        if os.fork() == 0:
            pins.pin(2, 200)
            os.close(say_go_on)
            os.write(say_ready, b"w")
            os.read(go_on, 1)
        else:
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    os.kill(minder, signal.SIGKILL)
    os.waitpid(minder, 0)
    assert list_pins(store)[0].instants == (Position(2, 200),)
    os.close(still_there)
    os.close(say_go_on)
    os.read(ended, 1)  # the worker has ended
    assert list_pins(store) == []


def test_more_than_can_be_listed_is_pinned_between_the_least_and_the_greatest(tmp_path: Path) -> None:
    with Pins(str(tmp_path), "x") as pins:
        seqs = range(100_000, 100_000 + MAX_LISTED + 500)
        for seq in seqs:
            pins.pin(seq, seq * 10)
        (found,) = list_pins(str(tmp_path))
        listed = {position.seq for position in found.instants}
        left = [seq for seq in seqs if seq not in listed]
        assert found.unlisted == Unlisted(
            len(left), Position(left[0], left[0] * 10), Position(left[-1], left[-1] * 10)
        )
        assert MAX_LISTED * 9 // 10 < len(found.instants) <= MAX_LISTED
        assert files(tmp_path)[0].stat().st_size == FILE_BYTES
        for seq in seqs:
            pins.unpin(seq)
        (found,) = list_pins(str(tmp_path))
        assert found.instants == () and found.unlisted is None


def test_no_pin_comes_while_a_removal_looks(tmp_path: Path) -> None:
    with Pins(str(tmp_path), "x") as pins:
        with pins_locked(str(tmp_path)) as found:
            assert [each.instants for each in found] == [()]
            assert not pins.pin(1, 100, wait=False)
            thread = threading.Thread(target=pins.pin, args=(1, 100))
            thread.start()
            assert not pins.pin(2, 200, wait=False)  # nor behind a thread that waits
        thread.join(CHILD_S)
        assert pins.pin(2, 200, wait=False)
        assert list_pins(str(tmp_path))[0].instants == (Position(1, 100), Position(2, 200))


def test_an_instant_is_resolved_again_when_it_is_pinned(tmp_path: Path) -> None:
    history = random_history(1)
    ingest = Ingest(str(tmp_path), history.hello)
    for transfer in random_transfers(history, 3):
        ingest_transfer(ingest, transfer)
    store = Store.open(ingest.path)
    latest = store.latest()
    assert latest is not None
    with Pins(ingest.path, "x") as pins:
        assert pins.pinned(store, latest) == latest
        assert list_pins(ingest.path)[0].instants == (Position(latest.seq, latest.time_ns),)
        pins.unpin(latest.seq)
        before = store.first()
        assert before is not None
        with pytest.raises(NoSuchInstantError, match="pruned"):
            pins.pinned(Pruned(before), latest)
        assert list_pins(ingest.path)[0].instants == ()
    store.close()
    ingest.close()
    Ingest(str(tmp_path), history.hello).close()  # opening leaves pins/ alone
    assert (tmp_path / history.hello.group / "pins" / "lock").exists()


def test_the_first_writer_renames_the_directory_of_an_older_store_and_readers_go_on(tmp_path: Path) -> None:
    history = random_history(1)
    ingest = Ingest(str(tmp_path), history.hello)
    ingest.close()
    Pins(ingest.path, "x").close()
    os.rename(os.path.join(ingest.path, "pins"), os.path.join(ingest.path, "holders"))
    with Pins(ingest.path, "before") as before, Pins(ingest.path, "until the writer comes") as until:
        before.pin(1, 100)
        assert not os.path.exists(os.path.join(ingest.path, "pins"))
        assert [each.what for each in list_pins(ingest.path)] == ["before", "until the writer comes"]
        Ingest(str(tmp_path), history.hello).close()
        assert not os.path.exists(os.path.join(ingest.path, "holders"))
        before.pin(2, 200)
        until.close()
        with Pins(ingest.path, "after"), pins_locked(ingest.path) as found:
            assert [each.what for each in found] == ["before", "after"]
            assert found[0].instants == (Position(1, 100), Position(2, 200))
            assert not before.pin(3, 300, wait=False)  # the lock is the same one
        assert before.file is not None
        worker = Pins(ingest.path, "before", os.getppid(), (before.file[0], os.dup(before.file[1])))
        worker.unpin(1)
        worker.close()
        assert list_pins(ingest.path)[0].instants == (Position(2, 200),)
    assert os.listdir(os.path.join(ingest.path, "pins")) == ["lock"]


def test_pins_that_an_older_pitfs_keeps_beside_ours_are_found(tmp_path: Path) -> None:
    Pins(str(tmp_path), "x").close()
    os.rename(tmp_path / "pins", tmp_path / "holders")
    with Pins(str(tmp_path), "older") as older:
        older.pin(1, 100)
        os.mkdir(tmp_path / "pins")
        with Pins(str(tmp_path), "newer"):
            assert {each.what for each in list_pins(str(tmp_path))} == {"older", "newer"}
            with pins_locked(str(tmp_path)) as found:
                assert len(found) == 2 and not older.pin(2, 200, wait=False)
    assert list_pins(str(tmp_path)) == []


@pytest.mark.parametrize("name", ["mkdir", "open", "pwrite"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_reading_goes_on_where_the_store_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, number: int
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, name, refuse)
        with Pins(str(tmp_path), "x") as pins:
            assert pins.pin(1, 100)
            assert pins.unpin(1)
    assert [record.message.count("not pinned: ") for record in caplog.records] == [1]
    assert list_pins(str(tmp_path)) == []


def test_a_pin_that_the_disk_refuses_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Pins(str(tmp_path), "x") as pins, caplog.at_level(logging.WARNING):
        with monkeypatch.context() as patch:
            patch.setattr(pin_file, "write_all", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            assert pins.pin(1, 100) and pins.pin(2, 200)
        assert pins.unpin(1)
        assert pins.pin(3, 300)
        assert list_pins(str(tmp_path))[0].instants == (Position(3, 300),)
    assert [record.message.count("not pinned: No space left") for record in caplog.records] == [1]


@pytest.mark.root
def test_a_read_only_store_is_read_without_pins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = tmp_path / "mounted"
    here.mkdir()
    subprocess.run(["mount", "--bind", tmp_path, here], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", here], check=True)
        with Pins(str(here), "x") as pins:
            assert pins.pin(1, 100) and list_pins(str(here)) == []
        assert "not pinned: Read-only file system" in caplog.text
        with Pins(str(tmp_path), "y") as pins:  # of one that is read-only for others only
            pins.pin(1, 100)
            assert [each.what for each in list_pins(str(here))] == ["y"]
            assert list_pins(str(here))[0].instants == (Position(1, 100),)
    finally:
        subprocess.run(["umount", here], check=True)


@pytest.mark.parametrize("left", [b"", b"PITFSHLD", b"\0" * PAGE_BYTES, b"x" * FILE_BYTES])
def test_what_a_dead_process_left_half_written_is_removed(tmp_path: Path, left: bytes) -> None:
    Pins(str(tmp_path), "x").close()
    (tmp_path / "pins" / "123-abcdef01").write_bytes(left)
    assert list_pins(str(tmp_path)) == []
    assert files(tmp_path) == []


@pytest.mark.parametrize("page", [0, 1, 32])
def test_a_living_process_whose_file_is_unreadable_has_pinned_everything(tmp_path: Path, page: int) -> None:
    with Pins(str(tmp_path), "x") as pins:
        for seq in range(200):
            pins.pin(seq, seq)
        with files(tmp_path)[0].open("r+b") as file:
            file.seek(page * PAGE_BYTES + 10)
            file.write(b"\xff\xff\xff")
        (found,) = list_pins(str(tmp_path))
        assert found.pid == os.getpid()
        assert found.unlisted == EVERYTHING
        with files(tmp_path)[0].open("r+b") as file:
            file.truncate(page * PAGE_BYTES + 10)
        (found,) = list_pins(str(tmp_path))
        assert found.unlisted == EVERYTHING
