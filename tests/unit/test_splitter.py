"""The splitter without FUSE: time, marks, a full journal, what a restart finds."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio

from pitfs.errors import CapacityError, UsageError
from pitfs.journal.reader import Interval
from pitfs.model.record import CopyProgress
from pitfs.splitter.startup import VolumeSpec, lock_state, open_splitter
from pitfs.splitter.state import BackingState, Progress, ProgressFile
from pitfs.splitter.volume import NotCachedError
from pitfs.store.store import Store
from tests.helpers.pipeline import Pipeline, service_of
from tests.property.test_whole_way import check_every_seq


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(tmp_path, [200_000], [4096], capacity_bytes=16 << 20)


def fill(pipeline: Pipeline) -> int:
    """Writes until the journal is full; returns the last seq that is journalled."""
    while not pipeline.splitter.state.bypass_cause:
        pipeline.write(0, 0, os.urandom(150_000))
    return pipeline.splitter.state.seq


def test_times_rise_with_seq_though_the_clock_stands_still(pipeline: Pipeline) -> None:
    for _ in range(30):
        pipeline.random_write()
    pipeline.splitter.mark()
    (_, interval) = list(pipeline.items())
    assert isinstance(interval, Interval)
    assert (interval.times[1:] > interval.times[:-1]).all()
    assert interval.mark_time_ns > interval.times[-1]
    pipeline.close()


def test_a_full_journal_begins_a_bypass_and_says_so_in_a_gap(pipeline: Pipeline) -> None:
    pipeline.ship()  # the first copy
    last = fill(pipeline)
    assert "capacity" in pipeline.splitter.state.bypass_cause
    assert pipeline.backings[0].read_bytes() == pipeline.states[-1][0], "writes go on"
    with pytest.raises(CapacityError):
        pipeline.splitter.mark()
    assert not trio.run(service_of(pipeline).resume_journal), "there is no room yet"
    # The mark that was set when it became full lets all of it be shipped, and gives room.
    pipeline.ship()
    pipeline.splitter.checkpoints.write(pipeline.splitter.snapshot_progress())
    pipeline.splitter.journal.sync()
    pipeline.splitter.release(pipeline.reader.location.segment)
    pipeline.splitter.journal.release(pipeline.splitter.releasable_segment)
    assert trio.run(service_of(pipeline).resume_journal)
    # What passed is one step for the replica: the state from which journalling goes on.
    del pipeline.states[last + 1 : -1]
    for _ in range(20):
        pipeline.random_write()
    pipeline.splitter.mark()
    pipeline.ship()
    check_every_seq(pipeline, range(len(pipeline.states)))
    store = Store.open(str(pipeline.tmp / "g"))
    (gap,) = store.gaps()
    assert (gap.from_seq, gap.to_seq) == (last, last + 1) and "capacity" in gap.cause
    store.close()
    pipeline.close()


def test_a_bypass_survives_a_kill_and_production_goes_on(pipeline: Pipeline) -> None:
    pipeline.splitter.copied(CopyProgress(1, 1, 0))
    fill(pipeline)
    pipeline.crash()
    pipeline.start()
    assert "capacity" in pipeline.splitter.state.bypass_cause, "no room yet, and writes aren't to wait for it"
    pipeline.random_write()
    assert pipeline.backings[0].read_bytes() == pipeline.states[-1][0]
    pipeline.close()


def test_a_change_behind_our_back_leads_to_a_copy_with_a_gap(pipeline: Pipeline) -> None:
    pipeline.random_write()
    pipeline.splitter.copied(CopyProgress(1, 1, 0))
    pipeline.splitter.close()
    os.close(pipeline.lock)
    with open(pipeline.backings[0], "r+b") as file:
        file.write(b"somebody else")
    pipeline.start()
    copy = pipeline.splitter.state.copy
    assert copy is not None and "changed while pitfs wasn't running" in copy.cause
    pipeline.close()


def test_closed_in_order_nothing_is_copied_again(pipeline: Pipeline) -> None:
    pipeline.random_write()
    pipeline.splitter.copied(CopyProgress(1, 1, 0))
    pipeline.splitter.close()
    os.close(pipeline.lock)
    pipeline.start()
    assert pipeline.splitter.state.copy is None and pipeline.splitter.state.seq == 1
    pipeline.close()


def test_after_power_loss_everything_is_read_again(pipeline: Pipeline) -> None:
    pipeline.random_write()
    pipeline.splitter.copied(CopyProgress(1, 1, 0))
    pipeline.splitter._boot_id = "the boot before"
    pipeline.splitter.checkpoints.write(pipeline.splitter.snapshot_progress())
    pipeline.crash()
    pipeline.start()
    copy = pipeline.splitter.state.copy
    assert copy is not None and "power was lost" in copy.cause and copy.mark == 3
    pipeline.close()


def marks(pipeline: Pipeline) -> int:
    return pipeline.splitter.state.mark


@pytest.mark.parametrize("restart", ["", "crash", "close"])
def test_an_interval_of_many_blocks_is_closed_by_the_splitter(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, restart: str
) -> None:
    """Whoever ships it builds its difference in memory, and may be away; restarts don't make it longer."""
    monkeypatch.setattr("pitfs.splitter.splitter.MAX_INTERVAL_ROWS", 100)
    for _ in range(3):
        pipeline.write(0, 0, os.urandom(4096 * 30))
    assert marks(pipeline) == 1
    if restart == "crash":
        pipeline.crash()
        pipeline.start()
    elif restart == "close":
        pipeline.splitter.close()
        os.close(pipeline.lock)
        pipeline.start()
    pipeline.write(0, 0, os.urandom(4096 * 30))
    assert marks(pipeline) == 2
    pipeline.write(0, 0, os.urandom(4096 * 30))
    assert marks(pipeline) == 2, "the next one has hardly begun"
    _, interval = pipeline.items()
    assert isinstance(interval, Interval) and len(interval.times) == 4
    pipeline.splitter.mark()
    pipeline.write(0, 0, os.urandom(4096 * 30))
    assert marks(pipeline) == 3, "a mark counts, whoever set it"
    pipeline.close()


def test_an_interval_that_takes_much_of_the_journal_is_closed_by_the_splitter(pipeline: Pipeline) -> None:
    """Else it could not be shipped, and its room not given back, before the journal is full."""
    written = 0
    while marks(pipeline) == 1:
        pipeline.write(0, 0, os.urandom(150_000))
        written += 150_000
    assert abs(written - pipeline.splitter.journal.capacity_bytes // 4) < 400_000
    pipeline.close()


def test_a_second_splitter_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="another 'pitfs protect' is running"):
        lock_state(pipeline.state)
    pipeline.close()


def test_a_backing_that_changed_in_size_is_refused(pipeline: Pipeline) -> None:
    pipeline.close()
    os.truncate(pipeline.backings[0], 300_000)
    with pytest.raises(UsageError, match="changed in size from 200000 to 300000"):
        open_splitter(
            pipeline.state, "g", [VolumeSpec("v0", str(pipeline.backings[0]), 4096)], 16 << 20, False, lambda: 1
        )


def progress(generation: int, seq: int) -> Progress:
    return Progress(generation, False, "boot", "", 1, 2, seq, 4, 5, 6, 0, (BackingState(1, 2),))


def test_a_torn_slot_of_the_progress_leaves_the_one_before(tmp_path: Path) -> None:
    file = ProgressFile(str(tmp_path))
    assert file.read() is None
    file.write(progress(1, 10))
    file.write(progress(2, 20))
    assert file.read() == progress(2, 20)
    with open(file.path, "r+b") as raw:
        raw.seek(20)
        raw.write(b"torn")
    assert file.read() == progress(1, 10)
    file.write(progress(1, 5))  # an older checkpoint that comes late
    assert file.read() == progress(1, 10)
    file.close()


def test_what_is_not_in_memory_is_not_waited_for(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop asks so; nothing of the write has happened then, and it is done on the second try."""
    splitter = pipeline.splitter
    before = splitter.state.seq

    def cold(*_: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", cold)
        for write in ((0, 100, b"x"), (0, 0, b"y" * 4096)):  # an edge to fill; a before-image to keep
            with pytest.raises(NotCachedError):
                splitter.write(*write, may_read=False)
        with pytest.raises(NotCachedError):
            splitter.read(0, 0, 100, may_read=False)
    assert splitter.state.seq == before
    for write in ((0, 100, b"x"), (0, 0, b"y" * 4096)):
        splitter.write(*write, may_read=False)
    assert splitter.read(0, 0, 200, may_read=False)[:200] == b"y" * 200
    size = splitter.volumes[0].size_bytes
    assert len(splitter.read(0, size - 10, 4096, may_read=False)) == 10
    assert splitter.read(0, size + 10, 4096, may_read=False) == splitter.read(0, size + 10, 4096) == b""
    pipeline.close()
