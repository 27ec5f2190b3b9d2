"""The splitter where a disk refuses: nothing that was answered is undone, no failed sync is believed later."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from pitfs.model.record import CopyProgress
from tests.helpers.pipeline import Pipeline, service_of


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(tmp_path, [200_000], [4096], capacity_bytes=16 << 20)


def refuse_once(monkeypatch: pytest.MonkeyPatch, path_part: str) -> None:
    """The next fdatasync of a file with that in its name fails, as a kernel says it: once."""
    real: Callable[[int], None] = os.fdatasync
    said = False

    def fdatasync(fd: int) -> None:
        nonlocal said
        if not said and path_part in os.readlink(f"/proc/self/fd/{fd}"):
            said = True
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)


def test_a_failed_fsync_of_the_journal_is_not_believed_when_it_is_tried_again(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.random_write()
    refuse_once(monkeypatch, "segment-")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            pipeline.splitter.journal.sync()
    pipeline.splitter.journal.begin_new_segment()
    pipeline.splitter.journal.sync()
    pipeline.close()


def test_a_failed_fsync_of_the_backing_stops_checkpoints_until_a_redo(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.random_write()
    before = pipeline.splitter.checkpoints.recovery_segment
    refuse_once(monkeypatch, "backing0")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            pipeline.splitter.checkpoints.write(pipeline.splitter.snapshot_progress())
    assert pipeline.splitter.checkpoints.recovery_segment == before
    pipeline.close()


def test_a_checkpoint_that_ends_after_a_later_one_takes_nothing_back(pipeline: Pipeline) -> None:
    """One in a thread, while the event loop begins a bypass: no other follows, and room would never come again."""
    splitter = pipeline.splitter
    splitter.copied(CopyProgress(1, 1, 0))
    pipeline.random_write()
    earlier = splitter.snapshot_progress()
    splitter.journal.begin_new_segment()
    pipeline.random_write()
    splitter.checkpoints.write(splitter.snapshot_progress())
    later = splitter.checkpoints.recovery_segment
    assert later > earlier.recovery_segment
    splitter.checkpoints.write(earlier)
    assert splitter.checkpoints.recovery_segment == later
    pipeline.close()


def test_a_write_of_a_bypass_is_answered_only_once_the_bypass_is_on_disk(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.splitter.copied(CopyProgress(1, 1, 0))
    pipeline.write(0, 0, b"1" * 4096)
    refuse_once(monkeypatch, "progress")
    pipeline.splitter.sync_failed(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output"):
        pipeline.splitter.checkpoints.settle()
    assert pipeline.splitter.state.bypass_cause
    pipeline.write(0, 0, b"3" * 4096)  # records it first
    pipeline.crash()
    pipeline.start()
    assert pipeline.splitter.state.bypass_cause
    assert pipeline.backings[0].read_bytes() == pipeline.states[-1][0], "the redo undid an answered write"
    pipeline.close()


def test_a_copy_that_was_given_up_does_not_come_back_with_a_restart(pipeline: Pipeline) -> None:
    assert pipeline.splitter.state.copy is not None
    pipeline.splitter.sync_failed(OSError(errno.EIO, "Input/output error"))
    pipeline.splitter.checkpoints.settle()
    pipeline.crash()
    pipeline.start()
    assert pipeline.splitter.state.bypass_cause and pipeline.splitter.state.copy is None
    pipeline.close()


def test_a_checkpoint_never_runs_ahead_of_the_durable_journal(pipeline: Pipeline) -> None:
    pipeline.random_write()
    assert pipeline.splitter.journal.unsynced_bytes
    pipeline.splitter.checkpoints.write(pipeline.splitter.snapshot_progress())
    assert not pipeline.splitter.journal.unsynced_bytes
    pipeline.close()


def test_a_change_after_an_unclean_stop_leads_to_a_copy(pipeline: Pipeline) -> None:
    pipeline.random_write()
    pipeline.splitter.copied(CopyProgress(1, 1, 0))
    pipeline.crash()
    with open(pipeline.backings[0], "r+b") as file:
        file.write(b"somebody else")
    pipeline.start()
    copy = pipeline.splitter.state.copy
    assert copy is not None and "changed while pitfs wasn't running" in copy.cause
    pipeline.close()


def test_the_end_of_a_copy_is_taken_though_the_journal_is_full(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pitfs.errors import CapacityError

    def full(*arguments: object) -> None:
        raise CapacityError("full")

    monkeypatch.setattr(pipeline.splitter.journal, "append", full)
    pipeline.splitter.copied(CopyProgress(1, 0, 5))
    assert pipeline.splitter.volumes[0].copied_block == 0, "without its record it isn't believed"
    pipeline.splitter.copied(CopyProgress(1, 1, 0))
    assert pipeline.splitter.state.copy is None
    monkeypatch.undo()
    pipeline.close()


def test_segments_stay_until_the_progress_on_disk_needs_them_no_more(pipeline: Pipeline) -> None:
    """The running copy ended, but a recovery would begin where the progress on disk says that it began."""
    splitter = pipeline.splitter
    assert splitter.state.copy is not None and splitter.state.copy_location.segment == 1
    while splitter.journal.tail.segment < 3:
        pipeline.write(0, 0, bytes(pipeline.random.bytes(150_000)))
    splitter.checkpoints.write(splitter.snapshot_progress())
    splitter.release(3)
    splitter.copied(CopyProgress(1, 1, 0))
    assert splitter.state.copy is None and splitter.releasable_segment == 1
    splitter.checkpoints.write(splitter.snapshot_progress())
    assert splitter.releasable_segment == 3
    pipeline.close()


def test_journalling_does_not_begin_again_while_the_backing_refuses(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    splitter = pipeline.splitter
    splitter.sync_failed(OSError(errno.EIO, "Input/output error"))
    pipeline.write(0, 0, b"1" * 4096)
    refuse_once(monkeypatch, "backing0")
    assert not trio.run(service_of(pipeline).resume_journal)
    assert splitter.state.bypass_cause and splitter.state.copy is None
    with pytest.raises(OSError, match="Input/output"):
        splitter.sync()
    pipeline.close()


def test_marks_of_an_attempt_to_go_on_are_not_given_again_after_a_restart(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    splitter = pipeline.splitter
    splitter.sync_failed(OSError(errno.EIO, "Input/output error"))
    refuse_once(monkeypatch, "progress")
    assert not trio.run(service_of(pipeline).resume_journal)
    tried = splitter.state.mark
    pipeline.write(0, 0, b"2" * 4096)  # passes
    pipeline.crash()
    pipeline.start()
    assert pipeline.splitter.state.bypass_cause and pipeline.splitter.state.mark == tried
    pipeline.close()
