"""The shipper where the journal, its disk or the splitter's recycling get in its way.

The splitter, its service and the store are the real ones, in this process; only the processes and the link
between them are missing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from pitfs.errors import CapacityError, LinkError, PitfsError, PositionMismatchError, UsageError
from pitfs.journal.reader import Copy, Interval
from pitfs.model.record import Record, decode_head
from pitfs.model.schedule import Decision
from pitfs.model.transfer import WAITS, Checkpoint, Data, Section
from pitfs.replication.backfill import ERASED, GONE
from pitfs.replication.control.requests import SetBookmark
from pitfs.replication.control.server import ShipperControl
from pitfs.splitter.service import SplitterService
from pitfs.splitter.sync_gate import SyncGate
from pitfs.storage.segment import SegmentReader, list_segments, segment_path
from tests.helpers.shipper import Parts, recovers, stream
from tests.helpers.stores import feed


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    made = Parts(tmp_path)
    yield made
    made.close()


async def test_a_journal_that_fills_before_the_first_copy_is_mended(parts: Parts) -> None:
    parts.fill()
    await parts.locate()
    await recovers(parts)


async def test_a_journal_that_fills_during_the_first_copy_is_mended(parts: Parts) -> None:
    await parts.locate()
    item = await parts.next()
    parts.fill()
    assert isinstance(item, Copy)
    with pytest.raises(LinkError, match="given up"):
        await parts.shipper.full_sync.ship(parts.session, item)
    await parts.locate()
    await recovers(parts)


async def test_what_rests_on_a_copy_that_was_given_up_is_never_sent(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    await parts.locate()
    await parts.ship()
    await parts.client.rescan("to try it")
    parts.write()
    parts.pipeline.splitter.mark("in-the-gap")
    parts.fill()
    assert isinstance(await parts.ship(), Interval), "what came before that copy"
    begun = parts.session.begun
    await recovers(parts)
    assert parts.session.begun == begun + 3, "one copy, one interval and its layers"
    assert parts.shipper.status.lost_cause.startswith("the local journal can't be written")
    assert "bookmark 'in-the-gap' lies in the gap" in caplog.text


async def test_segments_recycled_under_the_search_are_searched_again(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parts.locate()
    await parts.ship()
    splitter = parts.pipeline.splitter
    while splitter.journal.tail.segment < 3:
        parts.write(100_000)
    parts.mark()
    await parts.ship_marked()
    await parts.ship_layers()
    mark = parts.session.welcome.mark
    asked: list[str] = []

    def open_segment(path: str) -> SegmentReader:
        if not asked:  # a segment goes as it is being opened
            splitter.journal.release(splitter.journal.tail.segment)
        asked.append(path)
        return SegmentReader(path)

    monkeypatch.setattr("pitfs.journal.search.SegmentReader", open_segment)
    await parts.locate()
    assert not os.path.exists(asked[0])
    assert splitter.state.mark == mark, "found, without a full sync"
    parts.write()
    parts.mark()
    assert isinstance(await parts.ship(), Interval)
    parts.assert_replica_has_all()


async def test_a_journal_that_is_damaged_where_it_is_searched_leads_to_a_copy(parts: Parts) -> None:
    await parts.locate()
    await parts.ship()
    parts.write()
    parts.mark()
    with open(segment_path(parts.pipeline.splitter.journal.directory, 1), "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 64)
    await parts.locate()
    assert isinstance(await parts.ship(), Copy)
    assert "segment-" in parts.shipper.status.lost_cause
    parts.assert_replica_has_all()


async def test_an_interval_is_durable_here_before_the_replica_hears_of_it(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parts.locate()
    await parts.ship()
    parts.write()
    parts.mark()
    begun = parts.session.begun
    synced: list[tuple[str, int]] = []
    real: Callable[[int], None] = os.fdatasync

    def fdatasync(fd: int) -> None:
        synced.append((os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), parts.session.begun))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    await parts.ship()
    tail = os.path.basename(segment_path(parts.pipeline.splitter.journal.directory, 1))
    assert (tail, begun) in synced, "before `begin`"


async def test_an_interval_whose_journal_cannot_be_made_durable_is_not_sent(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parts.locate()
    await parts.ship()
    parts.write()
    parts.mark()
    begun = parts.session.begun

    def fdatasync(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(PitfsError, match="making the journal durable"):
        await parts.ship()
    assert parts.session.begun == begun


async def test_of_two_that_give_a_name_at_the_same_time_one_is_refused(parts: Parts) -> None:
    control = ShipperControl(parts.shipper, parts.pipeline.state, "g")
    refused = []

    async def name() -> None:
        try:
            await control.handle(SetBookmark("noon"))
        except UsageError as error:
            refused.append(str(error))

    before = parts.pipeline.splitter.state.mark
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(name)
    assert len(refused) == 2 and parts.pipeline.splitter.state.mark == before + 1


async def test_a_name_that_could_not_be_given_can_be_given_later(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = ShipperControl(parts.shipper, parts.pipeline.state, "g")
    parts.fill()
    with pytest.raises(CapacityError, match="capacity"):
        await control.handle(SetBookmark("noon"))
    parts.pipeline.splitter.state.bypass_cause = ""
    await control.handle(SetBookmark("noon"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = parts.pipeline.splitter.state.mark
    monkeypatch.setattr("pitfs.storage.files.os.fsync", full)
    with pytest.raises(CapacityError, match="bookmarks: remembering the bookmark's name: No space left"):
        await control.handle(SetBookmark("later"))
    assert parts.pipeline.splitter.state.mark == before, "not set without its name being kept"


@pytest.mark.parametrize("section", [Section.DIFF, Section.JOURNAL])
async def test_what_was_cut_goes_on_where_it_was_though_the_rate_changed(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, section: Section
) -> None:
    await parts.locate()
    await parts.ship()
    for _ in range(300):
        parts.write()
    parts.mark()
    cut = False

    async def send(frame: Data | Checkpoint) -> None:
        nonlocal cut
        feed(parts.pipeline.ingest, frame)
        if isinstance(frame, Data) and frame.section == section and not cut:
            cut = True
            parts.pipeline.ingest.checkpoint(())
            raise LinkError("cut")

    monkeypatch.setattr(parts.session, "send", send)
    with pytest.raises(LinkError, match="cut"):
        await parts.ship()
    parts.shipper.bandwidth.rates.append(1.0)
    await parts.connect_anew()
    if section is Section.DIFF:
        await parts.ship()
    else:
        await parts.ship_layers()
    assert parts.session.resumed[0].lengths[section - 1] > 0, "it went on where it was"
    parts.assert_replica_has_all()
    assert parts.granularities() == [0]


async def test_a_diff_that_is_due_puts_layers_off(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both journals come all the same, the newest interval's first; nothing of what came is sent again."""
    await parts.locate()
    await parts.ship()
    sent: list[tuple[Section, int]] = []
    real = parts.session.send

    async def send(frame: Data | Checkpoint) -> None:
        await real(frame)
        if isinstance(frame, Data):
            sent.append((frame.section, len(frame.payload)))
            if frame.section is Section.JOURNAL and len(parts.granularities()) == 1:
                parts.write()
                await parts.shipper.mark()

    monkeypatch.setattr(parts.session, "send", send)
    for _ in range(40):
        parts.write()
    parts.mark()
    await parts.ship()
    assert parts.granularities() == [None], "put off"
    await parts.ship(layers=False)
    assert parts.granularities() == [None, None], "the newer diff came first"
    await parts.ship_layers(1)
    assert parts.granularities() == [None, 0], "the newest interval's layers first"
    await parts.ship_layers()
    assert parts.granularities() == [0, 0]
    assert [section for section, _ in sent].count(Section.JOURNAL) == 2, "what was put off wasn't sent again"
    assert parts.pipeline.splitter.releasable_segment == parts.shipper.needed_segment


async def test_journals_are_kept_until_the_room_is_needed(parts: Parts) -> None:
    """What isn't sent within its interval waits; a full journal gives it up rather than let writes pass."""
    await parts.locate()
    await parts.ship()
    for _ in range(3):
        for _ in range(20):
            parts.write()
        parts.mark()
        await parts.ship(layers=False)
    assert parts.granularities() == [None] * 3
    assert [each.seq for each in parts.shipper.backfill.waiting] == [60, 40, 20]
    splitter = parts.pipeline.splitter
    splitter.checkpoints.recovery_segment = splitter.journal.tail.segment + 100  # as after a checkpoint
    first = splitter.journal.tail.segment
    assert splitter.releasable_segment <= first
    while splitter.journal.tail.segment < first + 6:  # more than the journal's capacity
        parts.write(100_000)
        if parts.pipeline.random.random() < 0.1:
            parts.mark()
            await parts.ship_marked()
    assert not splitter.state.bypass_cause
    await parts.ship_marked()
    await parts.ship_layers()
    found = parts.granularities()
    assert found[0] is None and found[-1] == 0
    assert ERASED in parts.causes()[0]
    parts.mark()
    await parts.ship()
    parts.assert_replica_has_all()


async def test_what_the_replica_lacks_is_found_again_after_a_restart(parts: Parts) -> None:
    await parts.locate()
    await parts.ship()
    for _ in range(3):
        for _ in range(10):
            parts.write()
        parts.mark()
        await parts.ship(layers=False)
    parts.restart_shipper()
    await parts.connect_anew()
    assert [each.seq for each in parts.shipper.backfill.waiting] == [30, 20, 10]
    await parts.ship_layers()
    assert parts.granularities() == [0, 0, 0]
    parts.assert_replica_has_all()


async def test_an_interval_that_begins_behind_a_stream_is_found_again_after_a_restart(parts: Parts) -> None:
    """Its first segment needn't have the mark before it."""
    await parts.locate()
    await parts.ship()
    splitter = parts.pipeline.splitter
    parts.write()
    splitter.journal.begin_new_segment()
    await stream(parts)
    parts.write()
    parts.mark()
    await parts.ship(layers=False)
    assert parts.granularities() == [0, None]
    splitter.checkpoints.recovery_segment = splitter.journal.tail.segment  # as after a checkpoint
    splitter.give_back(splitter.releasable_segment)
    assert list_segments(splitter.journal.directory)[0] == 2
    parts.restart_shipper()
    await parts.connect_anew()
    await parts.shipper.backfill.report_lost(parts.session)
    assert [cause for cause in parts.causes() if cause.endswith(WAITS)], parts.causes()
    await parts.ship_layers()
    assert parts.granularities() == [0, 0]
    parts.assert_replica_has_all()


async def test_a_journal_that_is_gone_after_a_restart_is_no_longer_promised(parts: Parts) -> None:
    """And its cause isn't that room was needed, for none was."""
    await parts.locate()
    await parts.ship()
    for _ in range(2):
        parts.write()
        parts.mark()
        await parts.ship(layers=False)
    assert all(cause.endswith(WAITS) for cause in parts.causes())
    splitter = parts.pipeline.splitter
    splitter.journal.begin_new_segment()
    parts.write()
    parts.mark()
    await parts.ship(layers=False)
    splitter.journal.release(splitter.journal.tail.segment)
    parts.restart_shipper()
    await parts.connect_anew()
    await parts.shipper.backfill.report_lost(parts.session)
    await parts.ship_layers()
    assert parts.granularities() == [None, None, 0]
    assert parts.causes()[:2] == [GONE] * 2
    await parts.connect_anew()
    offered = parts.session.begun
    await parts.shipper.backfill.report_lost(parts.session)
    assert parts.session.begun == offered, "it is said once"


async def test_what_is_no_interval_of_the_journal_keeps_its_cause(parts: Parts) -> None:
    """What lies between two copies is an interval for the replica, and coarse for ever."""
    await parts.locate()
    await parts.ship()
    parts.write()
    parts.mark()
    await parts.ship(layers=False)
    parts.write()
    await parts.client.rescan("to try it")
    assert isinstance(await parts.ship(), Interval)
    assert isinstance(await parts.ship(), Copy)
    causes = parts.causes()
    assert causes[-1] == "to try it"
    for _ in range(2):
        parts.restart_shipper()
        await parts.connect_anew()
        await parts.shipper.backfill.report_lost(parts.session)
        await parts.ship_layers()
        assert parts.granularities() == [0, 0, None]
        assert parts.causes()[-1] == "to try it"
    await parts.connect_anew()
    assert parts.shipper.backfill.waiting == [], "it isn't tried again on each connection"


async def test_that_room_was_needed_is_known_after_a_restart_too(parts: Parts) -> None:
    await parts.locate()
    await parts.ship()
    parts.write()
    parts.mark()
    await parts.ship(layers=False)
    splitter, pipeline = parts.pipeline.splitter, parts.pipeline
    splitter.journal.begin_new_segment()
    parts.write()
    parts.mark()
    await parts.ship(layers=False)
    splitter.checkpoints.recovery_segment = splitter.journal.tail.segment  # as after a checkpoint
    splitter.journal.limit_count = 3
    assert splitter.releasable_segment == 2, "though segment 1 is wanted"
    splitter.give_back(splitter.releasable_segment)
    splitter.checkpoints.write(splitter.snapshot_progress())
    pipeline.crash()
    pipeline.start()
    parts.service = SplitterService(pipeline.splitter, SyncGate(holds=False, blocks=False, copying=False))
    parts.restart_shipper()
    await parts.connect_anew()
    await parts.shipper.backfill.report_lost(parts.session)
    await parts.ship_layers()
    assert parts.granularities() == [None, 0]
    assert parts.causes()[0] == ERASED


async def test_a_new_connection_reads_no_more_of_the_journal_for_a_longer_one(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parts.locate()
    await parts.ship()
    parts.pipeline.splitter.journal.limit_count = 40
    for _ in range(20):
        for _ in range(10):
            parts.write()
        parts.mark()
        await parts.ship(layers=False)
        parts.pipeline.splitter.journal.begin_new_segment()
    records: list[Record] = []

    def counted(*arguments: Any) -> Record:
        records.append(decode_head(*arguments))
        return records[-1]

    monkeypatch.setattr("pitfs.storage.segment.decode_head", counted)
    parts.restart_shipper()
    await parts.connect_anew()
    assert len(parts.shipper.backfill.waiting) == 20
    assert len(records) < 60, "some for each of the segments that are wanted, not all"
    await parts.ship_layers()
    records.clear()
    parts.restart_shipper()
    await parts.connect_anew()
    assert parts.shipper.backfill.waiting == []
    assert len(records) < 20
    parts.assert_replica_has_all()


async def test_the_decision_of_status_is_what_was_sent(parts: Parts) -> None:
    await parts.locate()
    await parts.ship()
    for _ in range(20):
        parts.write()
    parts.mark()
    status, bandwidth = parts.shipper.status, parts.shipper.bandwidth
    await parts.ship(layers=False)
    assert status.last_decision is not None and status.last_decision.granularity_ns is None
    assert status.last_decision.reason == parts.causes()[0]
    first_pass = status.first_pass_mark
    bandwidth.measured(1, 1.0, 1.0)
    while parts.shipper.backfill.waiting:
        await parts.ship_layers(1)
        assert status.last_decision.granularity_ns == parts.granularities()[0]
        assert "doesn't fit" in status.last_decision.reason
    assert status.first_pass_mark == first_pass + 1


async def test_mode_snapshot_sends_no_difference_journal(tmp_path: Path) -> None:
    parts = Parts(tmp_path, mode="snapshot")
    await parts.locate()
    await parts.ship()
    parts.write()
    parts.mark()
    await parts.ship()
    assert parts.shipper.status.last_decision == Decision(None, "mode is snapshot")
    assert parts.granularities() == [None] and parts.causes() == ["mode is snapshot"]
    assert parts.shipper.backfill.waiting == []
    parts.close()


async def test_a_mark_of_another_host_is_not_taken_for_ours(parts: Parts) -> None:
    """It has the number of ours, but another position: what waits for ours must not be told that it arrived."""
    await parts.locate()
    await parts.ship()
    parts.write()
    parts.mark()
    await parts.ship()
    ours = parts.session.welcome
    await parts.locate()
    parts.session.welcome = msgspec.structs.replace(ours, time_ns=ours.time_ns + 1)
    with pytest.raises(PositionMismatchError, match="another host with a copy of this state"):
        await parts.locate()
