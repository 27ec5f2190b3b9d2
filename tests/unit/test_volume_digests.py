"""When production knows the digests of its volumes, and when it had better say nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from pitfs.journal import checksum_files, digests
from pitfs.journal.reader import Interval, JournalReader
from pitfs.model.transfer import Checkpoint, Data
from pitfs.replication import full_sync, shipper
from pitfs.replication.control.requests import TakeSnapshot
from pitfs.replication.control.server import ShipperControl
from tests.helpers.digesting import Digesting
from tests.helpers.shipper import VOLUME_BYTES


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("pitfs.replication.full_sync.STRETCH_BYTES", 65536)
    monkeypatch.setattr("pitfs.replication.full_sync.CHECKPOINT_BYTES", 65536)
    monkeypatch.setattr("pitfs.replication.sending.BATCH_BYTES", 65536)
    made = Digesting(tmp_path, monkeypatch, 1)
    yield made
    made.check_digests()
    made.close()


async def begin(parts: Digesting) -> None:
    await parts.locate()
    await parts.ship_all()
    parts.scatter(5)
    parts.mark()
    await parts.ship_all()


def has_digest(parts: Digesting) -> bool:
    """Of the last position."""
    parts.check_digests()
    return parts.splitter.state.seq in parts.seen


async def test_the_first_mark_behind_the_first_copy_has_them(parts: Digesting) -> None:
    await begin(parts)
    assert has_digest(parts)


async def test_files_that_are_ahead_after_a_kill_give_none_until_all_was_applied_again(
    parts: Digesting, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(parts)
    saved = parts.save_replica()
    monkeypatch.setattr(digests, "SAVE_S", 1e9)
    parts.shipper.digests._save_s = 1e18
    middle = 0
    for _ in range(2):
        parts.scatter(20)
        parts.mark()
        await parts.ship_all()
        middle = middle or parts.splitter.state.seq
    parts.kill_shipper(power_loss=False)
    parts.restore_replica(saved)
    parts.seen.clear()
    await parts.connect_anew()
    await parts.ship_all()
    assert has_digest(parts) and middle not in parts.seen


@pytest.mark.parametrize("power_loss", [False, True])
async def test_what_the_files_lack_is_taken_from_the_journal(parts: Digesting, power_loss: bool) -> None:
    await begin(parts)
    parts.shipper.digests._save_s = 1e18
    for _ in range(3):
        parts.scatter(20)
        parts.mark()
        await parts.ship_all()
    parts.kill_shipper(power_loss)
    await parts.connect_anew()
    parts.scatter(1)
    parts.mark()
    await parts.ship_all()
    assert has_digest(parts)


async def unknown(parts: Digesting) -> None:
    """As after an upgrade: the replica has all, and there are no files."""
    await begin(parts)
    parts.kill_shipper(power_loss=False)
    shutil.rmtree(parts.directory)
    await parts.connect_anew()


async def finish_reading(parts: Digesting) -> None:
    parts.read_some(30)
    for _ in range(2):
        parts.mark()
        await parts.ship_all()
        parts.read_some(1)


async def test_what_was_read_in_the_background_counts_once_all_writes_up_to_then_are_applied(parts: Digesting) -> None:
    await unknown(parts)
    seqs = []
    for _ in range(2):
        parts.scatter(20)
        parts.mark()
        seqs.append(parts.splitter.state.seq)
    parts.scatter(20)
    parts.read_some(20)
    await parts.ship_one()
    parts.read_some(1)
    await parts.ship_one()
    assert not set(seqs) & parts.seen
    parts.mark()
    await parts.ship_one()
    assert has_digest(parts) and not set(seqs) & parts.seen


@pytest.mark.parametrize("meanwhile", [False, True])
async def test_what_was_read_while_writes_bypass_the_journal_is_left_out(parts: Digesting, meanwhile: bool) -> None:
    await unknown(parts)
    parts.scatter(20)
    for _ in range(3):
        parts.mark()
    if meanwhile:
        parts.during = parts.overflow
        parts.read_some(1)
        parts.during = lambda: None
    else:
        parts.read_some(1)
        parts.overflow(20)
    parts.read_some(20)
    await parts.ship_one()
    parts.read_some(20)
    await parts.ship_one()
    await parts.ship_one()
    await parts.settle()
    parts.read_some(20)
    parts.scatter(1)
    parts.mark()
    await parts.ship_all()
    assert has_digest(parts)


async def test_what_is_applied_while_a_stretch_is_read_isnt_undone(parts: Digesting) -> None:
    await unknown(parts)
    volume, kept = parts.pipeline.volumes[0], parts.shipper.digests

    def read(index: int, block: int, limit_bytes: int) -> tuple[int, bytearray] | None:
        fds = [each.fd for each in parts.splitter.volumes]
        stretch = full_sync.read_stretch([volume], fds, index, block, limit_bytes)
        if block == 0 and not parts.splitter.state.mark > mark:
            parts.put(0, b"new" * 1000)
            parts.mark()
            following = parts.shipper.cursor.reader
            with contextlib.closing(JournalReader(following.directory, following.block_sizes)) as reader:
                reader.seek(following.location, following.position)
                interval = reader.next(parts.splitter.journal.tail)
            assert isinstance(interval, Interval)
            kept.of_interval(interval, np.arange(1))
            kept._apply()
        return stretch

    mark = parts.splitter.state.mark
    for _ in range(20):
        kept.fill(read, lambda: parts.splitter.state.seq)
    await parts.ship_all()
    await finish_reading(parts)
    assert has_digest(parts)


async def test_a_copy_that_another_process_began_is_read_once_more(
    parts: Digesting, caplog: pytest.LogCaptureFixture
) -> None:
    await begin(parts)
    parts.put(0, parts.pipeline.random.bytes(VOLUME_BYTES))
    await parts.client.rescan("to try it")
    await parts.ship_one()
    send, left = parts.session.send, 10

    async def cut(frame: Data | Checkpoint) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise ConnectionError
        await send(frame)

    parts.session.send = cut  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        await parts.ship_all()
    parts.scatter(5)
    parts.kill_shipper(power_loss=False)
    await parts.connect_anew()
    await parts.ship_all()
    parts.scatter(2)
    parts.mark()
    await parts.ship_all()
    assert parts.session.resumed[0].cursor and not has_digest(parts)
    assert "a copy builds on what isn't known here" in caplog.text
    await finish_reading(parts)
    assert has_digest(parts)


async def test_a_copy_of_changes_keeps_them(parts: Digesting, caplog: pytest.LogCaptureFixture) -> None:
    await begin(parts)
    parts.overflow(20)
    await parts.settle()
    assert has_digest(parts) and "no digests" not in caplog.text


async def test_a_full_disk_ends_them_and_not_the_shipping(
    parts: Digesting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await begin(parts)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checksum_files, "write_all", full)
        parts.scatter(3)
        parts.mark()
        await parts.ship_all()
    parts.assert_replica_has_all()
    assert not has_digest(parts)
    assert "no digests until the volumes were read in the background: [Errno 28]" in caplog.text
    await finish_reading(parts)
    assert has_digest(parts)


async def test_a_snapshot_that_somebody_takes_has_them_and_a_bookmark(
    parts: Digesting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "EVERY_S", 600.0)
    await begin(parts)
    parts.scatter(1)
    parts.mark()
    await parts.ship_all()
    assert not has_digest(parts)
    parts.scatter(1)
    with trio.move_on_after(0.05):  # it waits for what comes next
        await ShipperControl(parts.shipper, parts.pipeline.state, "g").handle(TakeSnapshot())
    await parts.ship_all()
    assert has_digest(parts)
    parts.scatter(1)
    parts.splitter.mark("named")
    await parts.ship_all()
    assert has_digest(parts)


async def test_the_shipper_reads_in_the_background_by_itself(
    parts: Digesting, monkeypatch: pytest.MonkeyPatch
) -> None:
    await unknown(parts)
    monkeypatch.setattr(shipper, "FILL_S", 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.shipper.tend_digests)
        with trio.fail_after(20):
            while parts.shipper.digests._filling != (0, 74):
                await trio.sleep(0.01)
            parts.mark()
            await parts.ship_all()
            while parts.shipper.digests.needs_reading:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    parts.mark()
    await parts.ship_all()
    assert has_digest(parts)
