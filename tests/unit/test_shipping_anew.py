"""The shipper where the replica went back, the journal can't be read, or the link ends without a word."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Union, get_args

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pitfs.errors import LinkError, PitfsError, PositionMismatchError
from pitfs.journal.reader import Copy, Interval
from pitfs.link.protocol.frames import encode
from pitfs.model.transfer import MAX_TEXT_LENGTH, Begin, Checkpoint, Data, End, Welcome
from pitfs.replication import manifests
from pitfs.replication.status import InGapError
from pitfs.splitter.control import ControlError
from pitfs.splitter.messages import Backings, ReadBacking, SplitterRequest
from pitfs.storage.segment import segment_path
from tests.helpers.shipper import MARGIN_S, VOLUME_BYTES, Parts, recovers


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    made = Parts(tmp_path)
    yield made
    made.close()


async def ship_interval(parts: Parts, length: int = 5000) -> None:
    parts.write(length)
    parts.mark()
    assert isinstance(await parts.ship(), Interval)


def unreadable(monkeypatch: pytest.MonkeyPatch, path: str, call: str, number: int) -> None:
    """Reads of that file by os.`call` fail from now on."""
    real: Callable[..., Any] = getattr(os, call)

    def failing(fd: int, *rest: Any) -> Any:
        if os.readlink(f"/proc/self/fd/{fd}") == path:
            raise OSError(number, os.strerror(number))
        return real(fd, *rest)

    monkeypatch.setattr(os, call, failing)


async def three_segments(parts: Parts) -> str:
    """A replica that has the first copy, and an interval over three segments for it; path of the second one."""
    await parts.locate()
    await parts.ship()
    while parts.pipeline.splitter.journal.tail.segment < 3:
        parts.write(100_000)
    parts.mark()
    return segment_path(parts.pipeline.splitter.journal.directory, 2)


# -- a replica that was put back ------------------------------------------------------------------------


async def test_a_replica_from_before_a_completed_copy_gets_another_one(parts: Parts) -> None:
    await parts.locate()
    await parts.ship()
    saved = parts.save_replica()
    await ship_interval(parts)
    await parts.client.rescan("to try it")
    assert isinstance(await parts.ship(), Interval), "what came before that copy"
    assert isinstance(await parts.ship(), Copy)
    await ship_interval(parts)
    parts.restore_replica(saved)
    await parts.connect_anew()
    for _ in range(2):
        assert isinstance(await parts.ship(), Interval), (
            "the journal still leads on from there, up to the copy"
        )
    await recovers(parts)
    assert "a full sync that it had acknowledged" in parts.shipper.status.lost_cause


# -- the word of a commit that is lost --------------------------------------------------------------------


async def test_a_mark_in_the_gap_is_said_to_be_so_though_the_copys_commit_was_not_heard(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parts.locate()
    await parts.ship()
    parts.write()
    in_gap = (await parts.shipper.mark()).mark
    parts.pipeline.splitter.start_copy("to try it")
    parts.shipper.cursor.reader.seek(parts.pipeline.splitter.state.copy_location, (0, 0))
    finish = parts.session.finish

    async def cut(end: End) -> Welcome:
        await finish(end)
        raise LinkError("it closed the connection")

    monkeypatch.setattr(parts.session, "finish", cut)
    with pytest.raises(LinkError):
        await parts.ship()
    await parts.connect_anew()
    assert parts.pipeline.splitter.state.copy is None, "the replica's mark said that it was committed"
    with trio.fail_after(MARGIN_S), pytest.raises(InGapError, match="to try it"):
        await parts.shipper.status.wait_committed(in_gap, 0)


# -- a journal that can't be read -------------------------------------------------------------------------


async def test_a_bad_sector_under_a_record_leads_to_a_copy(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable(monkeypatch, await three_segments(parts), "pread", errno.EIO)
    await recovers(parts)
    lost = parts.shipper.status.lost_cause
    assert "segment-" in lost and lost.endswith("damaged at byte 4096: it can't be read: Input/output error")


async def test_a_bad_sector_under_contents_leads_to_a_copy(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable(monkeypatch, await three_segments(parts), "preadv", errno.EIO)
    mark = parts.pipeline.splitter.state.mark
    with pytest.raises(LinkError, match="it can't be read: Input/output error: connecting anew"):
        await parts.ship()
    await parts.connect_anew()
    await recovers(parts)
    assert parts.pipeline.splitter.state.mark == mark + 3, (
        "closed, copied once, and the interval after that"
    )


async def test_a_segment_that_is_missing_leads_to_a_copy(parts: Parts) -> None:
    os.unlink(await three_segments(parts))
    await recovers(parts)
    assert "No such file or directory" in parts.shipper.status.lost_cause


@pytest.mark.parametrize("call", ["pread", "preadv"])
async def test_a_process_without_memory_has_no_damaged_journal(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = await three_segments(parts)
    mark = parts.pipeline.splitter.state.mark
    with monkeypatch.context() as patch:
        unreadable(patch, path, call, errno.ENOMEM)
        with pytest.raises(PitfsError, match=f"{path}: reading the journal: Cannot allocate memory"):
            await parts.ship()
    await parts.connect_anew()
    await parts.ship_marked()
    assert parts.pipeline.splitter.state.mark == mark, "without a full sync"
    parts.assert_replica_has_all()


async def test_a_copy_whose_beginning_is_damaged_is_begun_anew(parts: Parts) -> None:
    await parts.locate()
    await parts.ship()
    await parts.client.rescan("to try it")
    splitter = parts.pipeline.splitter
    first, place = splitter.state.mark, splitter.state.copy_location
    with open(segment_path(splitter.journal.directory, place.segment), "r+b") as file:
        file.seek(place.offset)
        file.write(b"\xff" * 64)
    assert isinstance(await parts.ship(), Interval), "what came before that copy"
    with pytest.raises(LinkError, match="connecting anew for a full sync"):
        await parts.next()
    await parts.connect_anew()
    item = await parts.ship()
    assert isinstance(item, Copy) and item.start.mark > first
    parts.assert_replica_has_all()


async def test_a_backing_volume_that_cannot_be_read_is_said_and_tried_again(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = parts.shipper.status

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/backing")

    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as patch:
            patch.setattr("pitfs.splitter.messages._open", refuse)
            nursery.start_soon(parts.shipper.run)
            with pytest.raises(PitfsError, match="/backing: reading: Input/output error"):
                await status.wait_committed(1, MARGIN_S)
        await status.wait_committed(1, MARGIN_S)
        nursery.cancel_scope.cancel()
    parts.assert_replica_has_all()


async def test_a_copy_reads_what_the_splitter_writes_whatever_lies_at_its_path(parts: Parts) -> None:
    backing = parts.pipeline.backings[0]
    backing.rename(backing.with_name("away"))
    backing.write_bytes(b"of somebody else".ljust(VOLUME_BYTES, b"!"))
    await parts.locate()
    assert isinstance(await parts.ship(), Copy)
    parts.assert_replica_has_all()


@pytest.mark.parametrize("change", [{"backing": "/elsewhere"}, {"block_size": 512}, {"name": "other"}, None])
async def test_a_configuration_that_is_not_the_running_splitters_is_refused(
    parts: Parts, change: dict[str, Any] | None
) -> None:
    """It is read anew by a shipper that starts again, and may have been edited since the splitter began."""
    (spec,) = parts.pipeline.specs
    configured = (spec, spec) if change is None else (dataclasses.replace(spec, **change),)
    parts.use_configuration(configured)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.shipper.run)
        with pytest.raises(PitfsError, match=r"\Athe configuration was changed: .*restart 'pitfs protect'") as caught:
            await parts.shipper.status.wait_committed(1, MARGIN_S)
        nursery.cancel_scope.cancel()
    assert "\n" not in str(caught.value) and spec.backing in str(caught.value)
    assert parts.session.begun == 0


async def test_a_change_that_is_undone_lets_the_shipper_go_on(parts: Parts) -> None:
    """And one that comes later, for the next start, doesn't stop it."""
    (spec,) = parts.pipeline.specs
    files: list[list[Any]] = [[spec, dataclasses.replace(spec, name="added")], [spec], []]
    backings = Backings(parts.shipper.splitter, parts.pipeline.volumes, lambda: files.pop(0))
    with pytest.raises(PitfsError, match=r"changed: the file has added on [^;]*: restart"):
        await backings.check()
    for _ in range(3):
        await backings.check()
    assert files == [[]], "it isn't read again"


async def test_a_splitter_of_an_older_version_is_said_to_be_so(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [each for each in get_args(SplitterRequest) if each is not ReadBacking]
    old = msgspec.json.Decoder(Union[tuple(requests)])  # noqa: UP007

    def decode(line: bytes) -> Any:
        try:
            return old.decode(line)
        except msgspec.DecodeError as error:  # as `control.serve` answers
            raise ControlError(f"not a request: {error}") from error

    monkeypatch.setattr("tests.helpers.channel.REQUESTS", SimpleNamespace(decode=decode))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.shipper.run)
        with pytest.raises(PitfsError, match=r"of another version of pitfs .*: restart 'pitfs protect'"):
            await parts.shipper.status.wait_committed(1, MARGIN_S)
        nursery.cancel_scope.cancel()


# -- the session ------------------------------------------------------------------------------------------


async def test_a_link_that_fails_while_there_is_nothing_to_send_ends_the_waiting(parts: Parts) -> None:
    await parts.locate()
    await parts.ship()
    caught = []

    async def follow() -> None:
        with pytest.raises(LinkError) as error:
            await parts.next()
        caught.append(error.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        parts.session.failure = LinkError("nothing heard from it for 20 s")
        parts.shipper.cursor.wake.set()
    assert caught == [parts.session.failure]


async def test_a_peers_word_alone_makes_nothing_be_copied_again(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parts.locate()
    mark = parts.pipeline.splitter.state.mark

    async def faulty(frame: Data | Checkpoint) -> None:
        parts.session.failure = PositionMismatchError("here: I don't believe you")
        raise parts.session.failure

    monkeypatch.setattr(parts.session, "send", faulty)
    with pytest.raises(PositionMismatchError, match="I don't believe you"):
        await parts.ship()
    await parts.connect_anew()
    assert isinstance(await parts.ship(), Copy)
    assert parts.pipeline.splitter.state.mark == mark, "the same copy"
    parts.assert_replica_has_all()


async def test_a_cause_of_any_length_can_be_sent(parts: Parts) -> None:
    await parts.locate()
    await parts.ship()
    for cause in ("x" * 4000, "x" * MAX_TEXT_LENGTH):
        await parts.client.rescan(cause)
        assert isinstance(await parts.ship(), Interval)
        item = await parts.next()
        assert isinstance(item, Copy)
        manifest = manifests.copy_manifest(item, parts.pipeline.hello.history, parts.session.welcome)
        encode(Begin(manifest))
        assert len(manifest.cause) == MAX_TEXT_LENGTH and manifest.gaps[0].cause == manifest.cause
        assert manifest.cause.endswith("…") == (len(cause) > MAX_TEXT_LENGTH)
        await parts.shipper.full_sync.ship(parts.session, item)


# -- long intervals ---------------------------------------------------------------------------------------


async def test_an_interval_that_was_closed_early_has_only_its_own_time_to_be_sent_in(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipper = parts.shipper
    shipper.bandwidth.measured(10**6, 1.0, 1.0)  # 2 MB in the whole interval of 2 s, next to nothing in a microsecond
    await parts.locate()
    await parts.ship()
    fitted = []
    for most_blocks in (3, 1 << 19):
        for room in ("splitter.splitter", "replication.shipper"):
            monkeypatch.setattr(f"pitfs.{room}.MAX_INTERVAL_ROWS", most_blocks)
        for _ in range(4):
            parts.write(4096)
        if most_blocks > 3:
            parts.mark()
        await parts.ship(layers=False)
        fitted.append(shipper.fitted)
    assert fitted == [False, True]
