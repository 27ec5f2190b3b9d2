"""A link that is cut at any byte, falls silent, loses answers or is slow: the store ends up the same."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from pitfs.link.stream import Timeouts
from pitfs.production import copying
from tests.helpers.linked import FRAME_BYTES, linked
from tests.helpers.netlink import Proxy
from tests.helpers.pipeline import Pipeline

CUTS = 200
QUICK = Timeouts(connect_s=5, ping_s=0.1, dead_s=0.5)


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first copy with many checkpoints."""
    monkeypatch.setattr(copying, "STRETCH_BYTES", 2 * FRAME_BYTES)
    monkeypatch.setattr(copying, "CHECKPOINT_BYTES", 4 * FRAME_BYTES)


def cutting(count: int, below_bytes: int, seed: int) -> Callable[[], int | None]:
    """So many connections end at a random byte, those after them don't."""
    random_ = random.Random(seed)
    cuts = iter([random_.randrange(below_bytes) for _ in range(count)])
    return lambda: next(cuts, None)


async def converse(tmp: Path, monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> tuple[int, int]:
    """A first copy and eight intervals with all their layers; bytes of payload sent, and connections made."""
    pipeline = Pipeline(tmp, [300_000, 90_001], [4096, 512], seed=5, tick_ns=3_000_000, filled=True)
    for _ in range(8):
        for _ in range(40):
            pipeline.random_write()
        pipeline.splitter.mark()
    async with linked(pipeline, monkeypatch, proxy=proxy) as both:
        await both.arrived()
        sent, connections = both.payload_bytes, len(both.sessions)
        both.assert_every_write_is_there()
    pipeline.ingest.close()
    pipeline.crash()
    return sent, connections


async def test_a_link_that_never_lives_long_gets_a_long_transfer_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came before a cut isn't sent again, though no checkpoint was due."""
    pipeline = Pipeline(tmp_path, [300_000], [4096], seed=1)
    proxy = Proxy(0)
    async with linked(pipeline, monkeypatch, proxy=proxy) as both:
        await both.arrived()
        proxy.next_cut = lambda: 10 * FRAME_BYTES
        proxy.cut()
        pipeline.write(0, 0, pipeline.random.bytes(300_000))
        both.mark()
        await both.arrived()
        assert len(both.sessions) > 300_000 // (10 * FRAME_BYTES)
        both.assert_every_write_is_there()
    pipeline.crash()


@pytest.mark.usefixtures("small_steps")
async def test_cut_at_200_random_bytes_the_store_ends_up_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed_bytes, connections = await converse(tmp_path / "whole", monkeypatch, Proxy(0))
    assert connections == 1
    proxy = Proxy(0, cutting(CUTS, 4 * FRAME_BYTES, 1))
    sent_bytes, connections = await converse(tmp_path / "cut", monkeypatch, proxy)
    print(needed_bytes, sent_bytes, connections, proxy.cuts, proxy.connections)
    assert proxy.cuts == CUTS
