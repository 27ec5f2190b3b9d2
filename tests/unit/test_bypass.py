"""After a full journal: a copy of what changed alone where that is known and leads on, else a complete one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pitfs.errors import CapacityError, LinkError
from pitfs.journal.reader import Copy
from pitfs.model.record import RecordKind
from pitfs.model.transfer import TransferKind
from pitfs.replication.control.server import ShipperControl
from pitfs.splitter import change_bitmap as changes
from pitfs.splitter import splitter
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers.bypass import Bypassing
from tests.helpers.shipper import VOLUME_BYTES

BLOCK = 4096


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Bypassing(tmp_path, monkeypatch)
    yield made
    made.close()


async def begin(parts: Bypassing) -> None:
    """The first copy, and an interval."""
    await parts.locate()
    parts.scatter(5)
    parts.mark()
    await parts.ship_all()
    del parts.session.kinds[:], parts.session.rows[:], parts.session.contents_bytes[:]


def copies(parts: Bypassing) -> list[TransferKind]:
    return [kind for kind in parts.session.kinds if kind in (TransferKind.FULL, TransferKind.CHANGES)]


async def test_only_what_changed_is_copied_and_the_gap_has_cause_and_bounds(parts: Bypassing) -> None:
    await begin(parts)
    parts.scatter(3)  # journalled, not shipped: it goes first
    last = parts.splitter.state.seq, parts.splitter.state.position_time_ns
    parts.full = True
    parts.put(10 * BLOCK, b"1" * BLOCK)
    parts.put(20 * BLOCK + 5, b"2" * BLOCK)  # two blocks
    parts.put(30 * BLOCK, bytes(2 * BLOCK))  # zeros, where something was or not
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.CHANGES]
    at = parts.session.kinds.index(TransferKind.CHANGES)
    assert parts.session.rows[at] == 5 and parts.session.contents_bytes[at] == 3 * BLOCK
    store = Store.open(parts.pipeline.ingest.path)
    (gap,) = store.gaps()
    assert (gap.from_seq, gap.from_time_ns) == last and gap.to_seq == last[0] + 1
    assert gap.cause == "the local journal can't be written: the journal is full"
    store.close()


async def test_status_says_what_changed_and_that_it_is_being_copied(
    parts: Bypassing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await begin(parts)
    parts.full = True
    parts.put(0, b"1" * BLOCK * 3)
    await parts.ship_all()
    status = await ShipperControl(parts.shipper, parts.pipeline.state, "g").status(0)
    assert "the journal is full" in status["passing"]
    assert (status["changed_bytes"], status["copying"], status["copying_bytes"]) == (3 * BLOCK, False, None)
    assert await parts.room()
    parts.put(100_000, b"2" * BLOCK)
    status = await ShipperControl(parts.shipper, parts.pipeline.state, "g").status(0)
    assert status["passing"] is None
    assert (status["changed_bytes"], status["copying"], status["copying_bytes"]) == (None, True, 3 * BLOCK)
    await parts.settle()
    status = await ShipperControl(parts.shipper, parts.pipeline.state, "g").status(0)
    assert (status["changed_bytes"], status["copying"], status["copying_bytes"]) == (None, False, None)
    assert "a full sync of the 12288 bytes that changed follows" in caplog.text


async def test_a_stop_in_order_during_a_bypass_keeps_what_changed(parts: Bypassing) -> None:
    await begin(parts)
    parts.overflow()
    parts.restart(clean=True)
    assert parts.splitter.state.bypass_cause and parts.splitter.state.change_bitmap is not None
    assert not os.path.exists(os.path.join(parts.pipeline.state, changes.FILE)), "it counts once"
    parts.full = True
    parts.scatter(3)
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.CHANGES]


async def test_after_a_kill_during_a_bypass_everything_is_copied(parts: Bypassing) -> None:
    await begin(parts)
    parts.overflow()
    parts.restart(clean=False)
    assert parts.splitter.state.bypass_cause and parts.splitter.state.change_bitmap is None
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.FULL]


async def test_a_kill_after_a_stop_in_order_leaves_nothing_to_be_believed(parts: Bypassing) -> None:
    """The bitmap lacks what passed between the two."""
    await begin(parts)
    parts.overflow()
    path = Path(parts.pipeline.state, changes.FILE)
    parts.restart(clean=True)
    parts.splitter.close()
    os.close(parts.pipeline.lock)
    saved = path.read_bytes()
    parts.pipeline.start()
    parts.full = True
    parts._limit()
    parts.scatter(3)
    path.write_bytes(saved)  # as if its removal had been lost
    parts.restart(clean=False)
    assert parts.splitter.state.change_bitmap is None
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.FULL]


def changed_by_others(parts: Bypassing, path: Path) -> None:
    with open(parts.pipeline.backings[0], "r+b") as file:
        file.write(b"somebody else")
    parts.pipeline.states[-1][0] = b"somebody else" + parts.now[13:]


def one_bit(parts: Bypassing, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_stop(parts: Bypassing, path: Path) -> None:
    kept = changes.ChangeBitmap((1, 2), [changes.BitMap64([7])], 1 << 20)
    changes.save_bitmap(parts.pipeline.state, kept)


def gone(parts: Bypassing, path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [changed_by_others, one_bit, of_another_stop, gone])
async def test_a_bitmap_that_does_not_belong_to_what_is_there_is_never_used(
    parts: Bypassing, harm: Callable[[Bypassing, Path], None]
) -> None:
    await begin(parts)
    parts.overflow()
    parts.splitter.close()
    os.close(parts.pipeline.lock)
    harm(parts, Path(parts.pipeline.state, changes.FILE))
    parts.pipeline.start()
    parts.service._splitter = parts.splitter
    assert parts.splitter.state.bypass_cause and parts.splitter.state.change_bitmap is None
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.FULL]


async def test_a_bitmap_that_cannot_be_kept_does_not_hinder_the_stop(
    parts: Bypassing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await begin(parts)
    parts.overflow()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(splitter, "save_bitmap", full)
        parts.restart(clean=True)
    assert parts.splitter.state.change_bitmap is None
    assert "can't be saved: No space left on device; a full sync follows" in caplog.text


@pytest.mark.parametrize("killed", [False, True])
async def test_a_second_bypass_during_the_copy_is_copied_with_all_before(
    parts: Bypassing, killed: bool
) -> None:
    """The union: the first bitmap, what was journalled beside its copy, and what passed then."""
    await begin(parts)
    parts.overflow()
    assert await parts.room()
    parts.scatter(4)
    parts.mark()
    parts.scatter(2)
    if killed:
        parts.restart(clean=False)
        parts.scatter(2)
    parts.overflow()
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.CHANGES]
    store = Store.open(parts.pipeline.ingest.path)
    assert len(list(store.gaps())) == 1
    store.close()


async def test_a_bypass_in_the_middle_of_the_copy(parts: Bypassing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitfs.replication.full_sync.STRETCH_BYTES", 4 * BLOCK)
    await begin(parts)
    parts.overflow(10)
    assert await parts.room()
    reads = 0

    def during() -> None:
        nonlocal reads
        reads += 1
        parts.full = parts.full or reads == 5
        parts.scatter()

    parts.during = during
    await parts.ship_all()
    parts.during = lambda: None
    assert parts.splitter.state.bypass_cause
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.CHANGES, TransferKind.CHANGES]


async def test_a_kill_during_the_copy_goes_on_with_it(parts: Bypassing) -> None:
    await begin(parts)
    parts.overflow()
    assert await parts.room()
    copying = parts.splitter.volumes[0].copying
    parts.scatter(4)
    preserved = parts.splitter.volumes[0].preserved
    for clean in (False, True):
        parts.restart(clean=clean)
        assert parts.splitter.volumes[0].copying == copying
        assert parts.splitter.volumes[0].preserved == preserved
        assert parts.splitter.state.copy is not None and not parts.splitter.state.bypass_cause
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.CHANGES]


class Killed(BaseException):
    """The process ends here."""


def killed_at(parts: Bypassing, patch: pytest.MonkeyPatch, point: str) -> None:
    """The next time it comes to that point, just before it."""
    journal, progress = parts.splitter.journal, parts.splitter._progress
    append, written = journal.append, progress.write

    def kill(*_: object) -> None:
        raise Killed

    def appending(kind: int, *arguments: object) -> None:
        if point == RecordKind(kind).name:
            raise Killed
        append(kind, *arguments)

    def written_then(*arguments: object) -> None:
        written(*arguments)
        raise Killed

    if point == "sync":
        patch.setattr(journal, "sync", kill)
    elif point == "progress":
        patch.setattr(progress, "write", kill)
    elif point == "after progress":
        patch.setattr(progress, "write", written_then)
    else:
        patch.setattr(journal, "append", appending)


@pytest.mark.parametrize(
    ("point", "kind"),
    [
        ("MARK", TransferKind.FULL), ("COPY_START", TransferKind.FULL), ("COPY_BLOCKS", TransferKind.FULL),
        ("sync", TransferKind.FULL), ("progress", TransferKind.FULL), ("after progress", TransferKind.CHANGES),
    ],
)  # fmt: skip
async def test_a_kill_while_journalling_begins_again(
    parts: Bypassing, monkeypatch: pytest.MonkeyPatch, point: str, kind: TransferKind
) -> None:
    await begin(parts)
    parts.overflow()
    with monkeypatch.context() as patch:
        killed_at(parts, patch, point)
        with pytest.raises(Killed):
            await parts.room()
    parts.restart(clean=False)
    assert bool(parts.splitter.state.bypass_cause) == (kind is TransferKind.FULL)
    parts.scatter(4)
    await parts.connect_anew()
    await parts.settle()
    parts.check()
    assert copies(parts) == [kind]


@pytest.mark.parametrize(("point", "kind"), [("progress", TransferKind.FULL), ("after progress", TransferKind.CHANGES)])
async def test_a_kill_during_a_stop_in_order(
    parts: Bypassing, monkeypatch: pytest.MonkeyPatch, point: str, kind: TransferKind
) -> None:
    await begin(parts)
    parts.overflow()
    with monkeypatch.context() as patch:
        killed_at(parts, patch, point)
        with pytest.raises(Killed):
            parts.splitter.close()
    for file in (parts.splitter.journal, parts.splitter._progress, parts.splitter.volumes[0]):
        file.close()
    os.close(parts.pipeline.lock)
    assert os.path.exists(os.path.join(parts.pipeline.state, changes.FILE))
    parts.pipeline.start()
    parts.service._splitter = parts.splitter
    assert (parts.splitter.state.change_bitmap is None) == (kind is TransferKind.FULL)
    await parts.settle()
    parts.check()
    assert copies(parts) == [kind]


async def test_after_power_loss_during_the_copy_everything_is_copied(parts: Bypassing) -> None:
    await begin(parts)
    parts.overflow()
    parts.splitter._boot_id = "the boot before"
    assert await parts.room()
    parts.scatter(3)
    parts.restart(clean=False)
    assert parts.splitter.state.copy.is_complete
    assert "power was lost" in parts.splitter.state.copy.cause
    await parts.connect_anew()
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.FULL]


async def test_before_images_are_kept_of_what_is_copied_alone(parts: Bypassing) -> None:
    await begin(parts)
    parts.full = True
    parts.put(5 * BLOCK, b"1" * BLOCK)
    assert await parts.room()
    parts.put(4 * BLOCK, b"2" * 3 * BLOCK)
    assert list(parts.splitter.volumes[0].preserved) == [5]
    await parts.settle()
    parts.check()


async def test_a_complete_copy_that_is_given_up_is_followed_by_a_complete_one(parts: Bypassing) -> None:
    await begin(parts)
    await parts.client.rescan("to try it")
    parts.overflow()
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.FULL]


async def test_a_replica_that_stands_elsewhere_gets_a_complete_copy(parts: Bypassing) -> None:
    await begin(parts)
    saved = parts.save_replica()
    parts.scatter(3)
    parts.mark()
    await parts.ship_all()
    parts.overflow()
    await parts.ship_all()
    assert await parts.room()
    parts.splitter.checkpoints.write(parts.splitter.snapshot_progress())
    parts.splitter.release(parts.splitter.journal.tail.segment)
    parts.splitter.journal.release(parts.splitter.releasable_segment)
    parts.restore_replica(saved)
    await parts.connect_anew()
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.FULL]
    assert "hasn't the state that the changed blocks build on" in parts.shipper.status.lost_cause


async def test_a_replica_with_nothing_gets_a_complete_copy(parts: Bypassing, tmp_path: Path) -> None:
    await begin(parts)
    parts.overflow()
    assert await parts.room()
    parts.pipeline.ingest.close()
    (tmp_path / "g").rename(tmp_path / "away")
    parts.pipeline.ingest = Ingest(str(tmp_path), parts.pipeline.hello)
    await parts.connect_anew()
    with pytest.raises(LinkError, match="connecting anew for a full sync"):
        await parts.ship()
    await parts.connect_anew()
    assert isinstance(await parts.ship(), Copy)
    parts.assert_replica_has_all()
    assert copies(parts) == [TransferKind.FULL]


async def test_the_word_of_a_commit_that_is_lost_is_made_good(parts: Bypassing) -> None:
    """The splitter believes that the copy runs, and passes writes again: these don't build on what came before it."""
    await begin(parts)
    parts.overflow()
    assert await parts.room()
    parts.pipeline.reader.seek(parts.splitter.state.copy_location, (0, 0))
    (copy,) = parts.pipeline.items()
    assert isinstance(copy, Copy)
    await parts.ship_all()
    parts.splitter.state.copy = copy.start  # as if it hadn't heard of it
    parts.splitter.state.change_bitmap = changes.ChangeBitmap(
        (copy.start.from_seq, copy.start.from_time_ns), [changes.BitMap64()], 1 << 20
    )
    parts.overflow()
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.CHANGES, TransferKind.FULL]


async def test_beyond_the_limit_everything_is_copied(
    parts: Bypassing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(changes, "UNMEASURED", 1)
    monkeypatch.setattr(splitter, "bitmap_limit_bytes", lambda _: 80)
    await begin(parts)
    parts.full = True
    parts.put(0, b"1")
    assert parts.splitter.state.change_bitmap is not None
    for block in range(0, 40, 2):
        parts.put(block * BLOCK, b"1")
    assert parts.splitter.state.change_bitmap is None
    assert caplog.text.count("the change bitmap takes too much memory") == 1
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.FULL]


async def test_tries_to_go_on_that_fail_lose_nothing_of_what_changed(
    parts: Bypassing, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(parts)
    parts.overflow()
    for refused in ("Kind.COPY_START", "a sync", "the progress"):
        with monkeypatch.context() as patch:
            if refused == "a sync":
                patch.setattr(parts.splitter.journal, "sync", _refuse)
            elif refused == "the progress":
                patch.setattr(parts.splitter._progress, "write", _refuse)
            parts.splitter.journal.release(parts.splitter.releasable_segment)
            parts.full = refused == "Kind.COPY_START"
            assert not await parts.service.resume_journal()
        parts.overflow()
        await parts.ship_all()
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.CHANGES]


async def test_a_bitmap_that_is_dropped_while_a_bypass_ends_is_followed_by_a_full_sync(
    parts: Bypassing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes go on while a segment is made for the journal."""
    await begin(parts)
    parts.overflow()
    begin_new_segment = parts.splitter.journal.begin_new_segment

    def while_it_is_made() -> None:
        parts.splitter.state.change_bitmap._limit_bytes = 0
        monkeypatch.setattr(changes, "UNMEASURED", 1)
        parts.scatter(20)
        assert parts.splitter.state.change_bitmap is None
        begin_new_segment()

    monkeypatch.setattr(parts.splitter.journal, "begin_new_segment", while_it_is_made)
    assert await parts.room()
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.FULL]


def _refuse(*_: object) -> None:
    raise OSError(5, "Input/output error")


async def test_a_write_that_the_backing_refuses_is_read_again(
    parts: Bypassing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal has it, the backing volume a part of it."""
    await begin(parts)
    real, backing = os.pwrite, parts.splitter.volumes[0].fd
    before = parts.now

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if fd != backing:
            return real(fd, data, offset)
        real(fd, data[:1000], offset)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="No space left"):
            parts.splitter.write(0, 50_000, b"x" * 20_000)
    parts.pipeline.states.append([before[:50_000] + b"x" * 1000 + before[51_000:]])
    assert parts.splitter.state.bypass_cause
    parts.at[parts.splitter.state.seq] = before[:50_000] + b"x" * 20_000 + before[70_000:]
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.CHANGES]


async def test_a_journal_that_is_really_full_is_mended_so(parts: Bypassing) -> None:
    await begin(parts)
    while not parts.splitter.state.bypass_cause:
        parts.put(int(parts.pipeline.random.integers(VOLUME_BYTES - 100_000)), os.urandom(100_000))
    parts.scatter(4)
    assert not await parts.room(), "there is none yet"
    await parts.settle()
    parts.check()
    assert copies(parts) == [TransferKind.CHANGES]


async def test_a_start_during_a_bypass_gives_back_what_the_replica_has(parts: Bypassing) -> None:
    """Nothing is left to be shipped, so nothing else would say that there is room."""
    await begin(parts)
    while parts.splitter.journal.tail.segment < 3:
        parts.write(100_000)
    parts.overflow()
    await parts.ship_all()
    parts.restart(clean=True)
    parts.restart_shipper()
    await parts.connect_anew()
    assert await parts.room()
    await parts.settle()
    assert copies(parts) == [TransferKind.CHANGES]
    parts.assert_replica_has_all()


# -- before writes pass ---------------------------------------------------------------------------------


async def test_what_is_wanted_for_backfill_gives_way_before_a_bypass(
    parts: Bypassing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await begin(parts)
    journal = parts.splitter.journal
    while journal.tail.segment < 3:
        parts.write(100_000)
    parts.mark()
    await parts.ship_marked()
    assert parts.shipper.backfill.waiting and parts.splitter.releasable_segment == 1
    first = journal.used_bytes
    while journal.tail.segment < 6:  # of four that there may be; no checkpoint is written meanwhile
        parts.write(100_000)
        assert not parts.splitter.state.bypass_cause
    assert first <= journal.used_bytes <= journal.capacity_bytes
    assert "given up that were kept for backfill" in caplog.text
    parts.mark()
    await parts.ship_all()
    parts.check()


async def test_what_only_a_redo_needs_gives_way_before_a_bypass(parts: Bypassing) -> None:
    """Everything was shipped; segments are needed until the next checkpoint alone, and it comes at once."""
    await begin(parts)
    journal = parts.splitter.journal
    while journal.tail.segment < 4:
        parts.write(100_000)
    parts.mark()
    await parts.ship_all()
    recovery = parts.splitter.checkpoints.recovery_segment
    while journal.tail.segment < 6:
        parts.write(100_000)
        assert not parts.splitter.state.bypass_cause
    assert parts.splitter.checkpoints.recovery_segment > recovery


def test_a_full_journal_without_anything_to_give_up_is_full(parts: Bypassing) -> None:
    parts.splitter._block_when_full = True
    with pytest.raises(CapacityError, match="capacity"):
        while True:
            parts.write(100_000)
    assert not parts.splitter.state.bypass_cause
