"""A link that is cut at any byte, falls silent, loses answers or is slow: the store ends up the same."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from pitfs.link.sessions.receiver import Limits
from pitfs.link.sessions.sender import SenderSession
from pitfs.link.transport.streams import Timeouts
from pitfs.model.transfer import End, Welcome
from pitfs.replication import full_sync
from tests.helpers.linked import FRAME_BYTES, Linked, linked
from tests.helpers.netlink import Proxy
from tests.helpers.pipeline import Pipeline

CUTS = 200
WAYS = [False, True]  # whether the open interval is streamed
QUICK = Timeouts(connect_s=5, ping_s=0.1, dead_s=0.5)


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first copy with many checkpoints."""
    monkeypatch.setattr(full_sync, "STRETCH_BYTES", FRAME_BYTES)
    monkeypatch.setattr(full_sync, "CHECKPOINT_BYTES", FRAME_BYTES)


def cutting(count: int, below_bytes: int, seed: int) -> Callable[[], int | None]:
    """So many connections end at a random byte, those after them don't."""
    random_ = random.Random(seed)
    cuts = iter([random_.randrange(below_bytes) for _ in range(count)])
    return lambda: next(cuts, None)


async def converse(tmp: Path, monkeypatch: pytest.MonkeyPatch, proxy: Proxy, streams: bool) -> tuple[int, int]:
    """A first copy and eight intervals with every write; bytes that crossed to the replica, and connections made."""
    pipeline = Pipeline(tmp, [120_000, 30_001], [4096, 512], seed=5, tick_ns=3_000_000, filled=True)
    for _ in range(12):
        for _ in range(60):
            pipeline.random_write()
        pipeline.splitter.mark()
    async with linked(pipeline, monkeypatch, proxy=proxy, streams=streams) as both:
        await both.arrived()
        crossed, connections = both.proxy.out_bytes, len(both.sessions)
        both.assert_every_write_is_there()
    pipeline.ingest.close()
    pipeline.crash()
    return crossed, connections


@pytest.mark.parametrize("streams", WAYS)
async def test_a_link_that_never_lives_long_gets_a_long_transfer_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    """What came before a cut isn't sent again, though no checkpoint was due."""
    pipeline = Pipeline(tmp_path, [300_000], [4096], seed=1)
    proxy = Proxy(0)
    async with linked(pipeline, monkeypatch, proxy=proxy, streams=streams) as both:
        await both.arrived()
        proxy.next_cut = lambda: 10 * FRAME_BYTES
        proxy.cut()
        for at in range(0, 300_000, 20_000):
            pipeline.write(0, at, pipeline.random.bytes(20_000))
        both.mark()
        await both.arrived()
        assert len(both.sessions) > 300_000 // (10 * FRAME_BYTES)
        both.assert_every_write_is_there()
    pipeline.crash()


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("streams", WAYS)
async def test_cut_at_200_random_bytes_the_store_ends_up_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    whole_bytes, connections = await converse(tmp_path / "whole", monkeypatch, Proxy(0), streams)
    assert connections == 1
    proxy = Proxy(0, cutting(CUTS, 3 * FRAME_BYTES, 1))
    crossed_bytes, _ = await converse(tmp_path / "cut", monkeypatch, proxy, streams)
    assert proxy.cuts == CUTS < proxy.connections
    again_bytes = (crossed_bytes - whole_bytes) / CUTS
    # Of each connection its greeting and what was cut of a frame, or of a batch, in which a write isn't divided.
    assert 0 < again_bytes < (2 if streams else 1) * FRAME_BYTES


@asynccontextmanager
async def quiet_pair(tmp: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> AsyncIterator[Linked]:
    """Both sides with a first copy and an interval behind them."""
    pipeline = Pipeline(tmp, [100_000], [4096], seed=3)
    async with linked(pipeline, monkeypatch, **given) as both:
        both.write(5)
        both.mark()
        await both.arrived()
        yield both
        both.assert_every_write_is_there()
    pipeline.crash()


async def failed(both: Linked, words: str) -> None:
    """Until a connection failed with that cause."""
    with trio.fail_after(10):
        while words not in str(both.shipper.status.link_error):
            await both.shipper.status.changed.wait()


async def committed(both: Linked, mark: int) -> None:
    """Until the replica has that mark, whether production knows or not."""
    with trio.fail_after(10):
        while True:
            store = both.store()
            try:
                if len(list(store.snapshots())) > mark - 1:
                    return
            finally:
                store.close()
            await trio.sleep(0.02)


@pytest.mark.parametrize("reset", [False, True])
async def test_an_interval_whose_acknowledgement_was_lost_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    finish = SenderSession.finish
    async with quiet_pair(tmp_path, monkeypatch, timeouts=QUICK) as both:

        async def finish_unheard(session: SenderSession, end: End) -> Welcome:
            both.proxy.mute = True
            return await finish(session, end)

        monkeypatch.setattr(SenderSession, "finish", finish_unheard)
        both.pipeline.write(0, 0, both.pipeline.random.bytes(50_000))
        both.mark()
        await committed(both, 3)
        if reset:
            both.proxy.cut()
        else:
            await failed(both, "nothing heard from it for 0.5 s")
        assert both.sessions[-1].payload_bytes > 50_000
        known = len(both.sessions)
        monkeypatch.setattr(SenderSession, "finish", finish)
        both.proxy.mute = False
        await both.arrived()
        assert sum(session.payload_bytes for session in both.sessions[known:]) < 50_000
        assert both.pipeline.splitter.state.mark == 3


async def test_a_half_open_connection_is_found_and_another_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither side hears of its end; the replica would wait much longer than production."""
    patient = Limits(timeouts=Timeouts(dead_s=1000))
    async with quiet_pair(tmp_path, monkeypatch, timeouts=QUICK, limits=patient) as both:
        both.proxy.silence()
        both.write(5)
        both.mark()
        await failed(both, "nothing heard from it for 0.5 s")
        await both.arrived()
        assert len(both.sessions) == 2


async def test_while_the_link_is_silent_writes_go_on_and_everything_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with quiet_pair(tmp_path, monkeypatch, timeouts=QUICK) as both:
        both.proxy.silent = True
        for _ in range(3):
            both.write(5)
            both.mark()
            both.proxy.cut()
            await failed(both, "no answer" if both.proxy.connections > 2 else "reset by peer")
        both.proxy.silent = False
        both.proxy.cut()
        await both.arrived()


async def test_a_link_slower_than_its_time_outs_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each frame takes as long as a dead peer may be silent, and each byte waits a while on its way."""
    async with quiet_pair(tmp_path, monkeypatch, timeouts=QUICK, limits=Limits(timeouts=QUICK)) as both:
        both.proxy.out_delay_s = both.proxy.back_delay_s = 0.1
        both.proxy.rate_bytes_per_s = FRAME_BYTES / QUICK.dead_s
        both.pipeline.write(0, 0, both.pipeline.random.bytes(5 * FRAME_BYTES))
        both.mark()
        await both.arrived()
        assert len(both.sessions) == 1


@pytest.mark.usefixtures("small_steps")
async def test_the_first_copy_goes_on_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(tmp_path, [400_000], [4096], seed=2, filled=True)
    proxy = Proxy(0, lambda: 10 * FRAME_BYTES)
    async with linked(pipeline, monkeypatch, proxy=proxy) as both:
        with trio.fail_after(20):
            while both.shipper.status.committed is None or not both.shipper.status.committed.mark:
                both.write()  # meanwhile: what it overwrites has to be kept for the copy
                await trio.sleep(0.01)
        both.mark()
        await both.arrived()
        assert proxy.cuts >= 400_000 // (10 * FRAME_BYTES), "no connection carries a copy from its beginning to its end"
        both.assert_every_write_is_there()
    pipeline.crash()
