"""Whatever comes between, each digest that arrives is that of the naive model."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from pitfs.errors import LinkError
from pitfs.replication.phases import Phase
from tests.helpers.digesting import Digesting

STEPS = 50

async def step(parts: Digesting, saved: list[Path]) -> None:
    """One thing that happens."""
    random, status = parts.pipeline.random, parts.shipper.status
    match int(random.integers(20)):
        case 0 | 1 | 2:
            parts.scatter(int(random.integers(1, 8)))
        case 3 | 4:
            if not parts.splitter.state.bypass_cause:
                parts.mark()
        case 5:
            if random.random() < 0.4:
                parts.overflow(int(random.integers(1, 6)))
        case 6:
            await parts.room()
        case 7 | 8 | 9:
            parts.during = lambda: parts.scatter(int(random.integers(3)))
            await parts.ship_all()
            parts.during = lambda: None
        case 10:
            if random.random() < 0.3:
                parts.restart(clean=random.random() < 0.7)
            await parts.connect_anew()
        case 11:
            parts.kill_shipper(random.random() < 0.5)
            await parts.connect_anew()
        case 12:
            parts.restart_shipper()  # in order
            await parts.connect_anew()
        case 13:
            if not saved:
                saved.append(parts.save_replica())
            elif random.random() < 0.3:
                parts.restore_replica(saved.pop())
                await parts.connect_anew()
        case 14:
            if status.phase is Phase.WAITING and parts.session.welcome.mark:
                await parts.ship_all()
                if parts.shipper.status.phase is Phase.WAITING and not parts.splitter.state.bypass_cause:
                    await stream_some(parts)
        case 15:
            parts.during = lambda: parts.scatter(int(random.integers(3)))
            parts.read_some(int(random.integers(8)))
            parts.during = lambda: None
        case 16 | 17:
            await parts.ship_cut_off()
            if random.random() < 0.5:
                parts.kill_shipper(random.random() < 0.5)
            await parts.connect_anew()
        case 18:
            for _ in range(3):
                parts.scatter(2)
                if not parts.splitter.state.bypass_cause:
                    parts.mark()
            with contextlib.suppress(LinkError):
                await parts.ship_one()
        case 19:  # as before an upgrade
            parts.kill_shipper(False)
            shutil.rmtree(parts.directory, ignore_errors=True)
            await parts.connect_anew()
            if random.random() < 0.7:
                parts.read_some(8)


async def stream_some(parts: Digesting) -> None:
    """Streams writes and marks, and leaves the stream somewhere."""
    shipper = parts.shipper
    shipper.stream.begin(parts.session)
    for _ in range(int(parts.pipeline.random.integers(1, 5))):
        parts.scatter(2)
        if parts.pipeline.random.random() < 0.5 and not parts.splitter.state.bypass_cause:
            parts.mark()
        if await shipper.stream.pump(60.0):
            break
    await shipper.stream.finish()
    shipper.status.enter(Phase.WAITING)


@pytest.mark.parametrize("seed", range(12))
async def test_each_digest_that_arrives_is_that_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("pitfs.replication.full_sync.STRETCH_BYTES", 65536)
    monkeypatch.setattr("pitfs.replication.full_sync.CHECKPOINT_BYTES", 65536)
    monkeypatch.setattr("pitfs.replication.sending.BATCH_BYTES", 65536)
    parts = Digesting(tmp_path, monkeypatch, seed)
    await parts.locate()
    if seed % 2:
        await parts.ship_all()
    saved: list[Path] = []
    for _ in range(STEPS):
        await step(parts, saved)
        parts.check_digests()
    await parts.settle()
    parts.read_some(20)
    for _ in range(2):
        parts.scatter(1)
        parts.mark()
        await parts.ship_all()
        parts.read_some(20)
    parts.check_digests()
    assert parts.splitter.state.seq in parts.seen
    parts.close()
