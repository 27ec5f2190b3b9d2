"""Whatever comes between, what the replica lists is exactly the naive model, and in the end it has all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pitfs.model.transfer import TransferKind
from tests.helpers.bypass import Bypassing

STEPS = 40


def race(parts: Bypassing) -> None:
    """Writes around a read of a running copy; now and then the journal fills, or has room again."""
    random = parts.pipeline.random
    parts.scatter(int(random.integers(3)))
    if random.random() < 0.02:
        parts.full = not parts.full


async def step(parts: Bypassing, saved: list[Path]) -> None:
    """One thing that happens."""
    random = parts.pipeline.random
    match int(random.integers(12)):
        case 0 | 1 | 2:
            parts.scatter(int(random.integers(1, 8)))
        case 3:
            if not parts.splitter.state.bypass_cause:
                parts.mark()
        case 4:
            parts.overflow(int(random.integers(1, 6)))
        case 5 | 6:
            await parts.room()
        case 7 | 8:
            parts.during = lambda: race(parts)
            await parts.ship_all()
            parts.during = lambda: None
        case 9:
            parts.restart(clean=random.random() < 0.7)
            await parts.connect_anew()
        case 10:
            await parts.connect_anew()
            parts.splitter.checkpoints.write(parts.splitter.snapshot_progress())
            parts.splitter.journal.release(parts.splitter.releasable_segment)
        case 11:
            if not saved:
                saved.append(parts.save_replica())
            elif random.random() < 0.3:
                parts.restore_replica(saved.pop())
                await parts.connect_anew()


@pytest.mark.parametrize("seed", range(24))
async def test_no_order_of_full_journals_stops_and_copies_leads_astray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("pitfs.replication.full_sync.STRETCH_BYTES", 65536)
    parts = Bypassing(tmp_path, monkeypatch, seed)
    await parts.locate()
    if seed % 2:
        await parts.ship_all()
    saved: list[Path] = []
    for _ in range(STEPS):
        await step(parts, saved)
    await parts.settle()
    parts.check()
    parts.close()


async def test_these_orders_have_copies_of_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The property above is about something."""
    kinds: list[TransferKind] = []
    for seed in range(8):
        with monkeypatch.context() as patch:
            parts = Bypassing(tmp_path / str(seed), patch, seed)
            await parts.locate()
            await parts.ship_all()
            saved: list[Path] = []
            for _ in range(STEPS):
                await step(parts, saved)
            kinds += parts.session.kinds
            parts.close()
    assert kinds.count(TransferKind.CHANGES) > 5 and kinds.count(TransferKind.FULL) > 6
