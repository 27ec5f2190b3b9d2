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
from pitfs.model.schedule import Decision
from pitfs.model.transfer import WAITS, Checkpoint, Data, Section
from pitfs.replication.backfill import ERASED
from pitfs.replication.control import ShipperControl
from pitfs.replication.requests import SetBookmark
from pitfs.storage.segment import SegmentReader, segment_path
from tests.helpers.shipper import Parts, recovers
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
        if not asked:  # the first segment goes as it is being opened
            splitter.journal.release(splitter.journal.tail.segment)
        asked.append(path)
        return SegmentReader(path)

    monkeypatch.setattr("pitfs.journal.reader.SegmentReader", open_segment)
    await parts.locate()
    first = segment_path(splitter.journal.directory, 1)
    assert asked[0] == first and asked[1] > first and splitter.state.mark == mark, "found, without a complete copy"
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
    assert [each.mark for each in parts.shipper.backfill.waiting] == [4, 3, 2]
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
    assert [each.mark for each in parts.shipper.backfill.waiting] == [4, 3, 2]
    await parts.ship_layers()
    assert parts.granularities() == [0, 0, 0]
    parts.assert_replica_has_all()


async def test_a_journal_that_is_gone_after_a_restart_is_no_longer_promised(parts: Parts) -> None:
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
    assert parts.shipper.backfill.waiting == []
    await parts.shipper.backfill.report_lost(parts.session)
    assert parts.granularities() == [None] * 3
    assert parts.causes() == [ERASED] * 3
    await parts.connect_anew()
    offered = parts.session.begun
    await parts.shipper.backfill.report_lost(parts.session)
    assert parts.session.begun == offered, "it is said once"


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
    bandwidth.rates.append(1.0)
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
