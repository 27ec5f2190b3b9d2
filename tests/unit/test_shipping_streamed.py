"""The shipper where it streamed: what the replica has then, and how it goes on from there."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pitfs.journal.reader import Interval
from pitfs.model.transfer import Flush, Writes
from pitfs.store.open_interval.closing import Closing
from tests.helpers.shipper import Parts, stream


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    made = Parts(tmp_path)
    yield made
    made.close()


async def test_a_diff_behind_a_stream_that_is_cut_off_is_sent_on_the_next_connection(parts: Parts) -> None:
    await parts.locate()
    await parts.ship()
    await stream(parts)
    parts.write()
    parts.mark()
    interval = await parts.next()
    assert isinstance(interval, Interval)
    session = parts.session
    send, parts.session.send = parts.session.send, cut  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        await parts.shipper.ship_interval(session, interval)
    parts.session.send = send  # type: ignore[method-assign]
    await parts.connect_anew()
    assert isinstance(await parts.ship(), Interval)
    parts.assert_replica_has_all()


async def cut(frame: object) -> None:
    raise ConnectionError


async def test_during_a_bypass_the_replica_isnt_told_that_it_has_all(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the last state that was journalled would be given for any time until the copy comes."""
    await parts.locate()
    await parts.ship()
    await stream(parts, leave=False)
    parts.fill()
    bypass_ns = parts.pipeline.splitter.state.time_ns
    shipper, flushed = parts.shipper, parts.session.flushed
    for _ in range(2):
        monkeypatch.setattr("pitfs.replication.stream.PULSE_S", 0.0)
        await shipper.stream.pump(60.0)
    assert flushed[-1].seq == parts.pipeline.splitter.state.seq
    assert flushed[-1].protected_through_ns <= bypass_ns
    assert parts.pipeline.ingest.welcome().protected_through_ns <= bypass_ns


async def test_what_is_streamed_gives_its_room_back_on_the_way(parts: Parts) -> None:
    """Not at the end of a turn: behind a link that was down for long that may be the whole journal."""
    await parts.locate()
    await parts.ship()
    shipper, splitter, session = parts.shipper, parts.pipeline.splitter, parts.session
    while splitter.journal.tail.segment < 3:
        parts.write(100_000)
    shipper.stream.begin(session)
    released, sent = [], session.stream

    async def stream_and_look(writes: Writes | None, flush: Flush, window_bytes: int = 0) -> None:
        released.append(splitter._released_segment)
        await sent(writes, flush, window_bytes)

    session.stream = stream_and_look  # type: ignore[method-assign]
    await shipper.stream.pump(60.0)
    assert released[-1] >= 2


async def test_who_leaves_a_stream_knows_that_its_marks_are_committed(parts: Parts) -> None:
    """Else nobody would hear of it before the next interval: a snapshot that waits for it would wait for that."""
    await parts.locate()
    await parts.ship()
    await stream(parts, leave=False)
    parts.mark()
    run, gate = Closing.run, threading.Event()

    def slow(self: Closing) -> None:
        gate.wait(30)
        run(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Closing, "run", slow)
        await parts.shipper.stream.pump(60.0)
        assert parts.shipper.status.committed is not None
        assert parts.shipper.status.committed.mark == 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts.shipper.stream.finish)
            gate.set()
    assert parts.shipper.status.committed.mark == 2


async def test_a_window_that_is_too_small_for_a_long_link_is_not_taken_for_its_rate(
    parts: Parts, autojump_clock: trio.testing.MockClock
) -> None:
    """Answers take 3 s: window / 3 s is measured again and again, and the window must not shrink with it."""
    await parts.locate()
    await parts.ship()
    shipper, session = parts.shipper, parts.session
    stream_ = shipper.stream
    shipper.stream.begin(session)
    real, windows = session.stream, []

    async def far(writes: Writes | None, flush: Flush, window_bytes: int = 0) -> None:
        await trio.sleep(3)
        await real(writes, flush, window_bytes)
        windows.append(window_bytes)
        shipper.bandwidth.intakes.clear()
        shipper.bandwidth.measured(window_bytes, 3.0, 3.0)  # all that goes in that time

    session.stream = far  # type: ignore[method-assign]
    for _ in range(12):
        parts.write()
        await stream_.pump(math.inf)
    assert windows[-1] >= windows[1] > 1 << 20
