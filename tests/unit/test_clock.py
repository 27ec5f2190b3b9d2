"""A clock that jumps: order is by seq, times only rise, every state is where its time says, and the log says why."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from pitfs.splitter.service import SplitterService
from pitfs.splitter.sync_gate import SyncGate
from pitfs.store.store import Store
from tests.helpers.pipeline import Pipeline
from tests.property.test_whole_way import check_every_seq

HOUR_NS = 3600 * 10**9
TEN_YEARS_NS = 3653 * 24 * HOUR_NS


def jumping(pipeline: Pipeline) -> Callable[[int], None]:
    """Replaces its clock by one that ticks by 1 ms; what is called makes it jump."""
    offset_ns = [0]
    ticks = itertools.count(1_800_000_000_000_000_000, 1_000_000)
    pipeline.splitter._clock_ns = lambda: next(ticks) + offset_ns[0]

    def jump(by_ns: int) -> None:
        offset_ns[0] += by_ns

    return jump


async def test_a_clock_that_jumps_leaves_every_state_where_its_time_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(tmp_path, [100_000], [4096], seed=8)
    service = SplitterService(pipeline.splitter, SyncGate(holds=False, blocks=False, copying=False))
    jump = jumping(pipeline)
    lines = []
    for by_ns in (0, -HOUR_NS, HOUR_NS, TEN_YEARS_NS, -TEN_YEARS_NS):
        jump(by_ns)
        for _ in range(2):
            for _ in range(5):
                pipeline.random_write()
            pipeline.splitter.mark()
            await service._keep()
        pipeline.ship()
        lines.append(sum("the clock is" in line for line in caplog.messages))
    assert lines == [0, 1, 1, 1, 2], "once for each time that it went back"
    assert "3600 s behind" in caplog.text
    check_every_seq(pipeline, range(len(pipeline.states)))
    store = Store.open(str(tmp_path / "g"))
    times = [store.at_seq(seq).time_ns for seq in range(len(pipeline.states))]
    assert times == sorted(set(times)) and times[-1] - times[1] > TEN_YEARS_NS
    for seq, time_ns in enumerate(times[1:], 1):
        assert store.at_time(time_ns)[0].seq == seq
        assert store.at_time(time_ns - 1)[0].seq == seq - 1
    assert list(store.gaps()) == [] and {interval.granularity_ns for interval in store.intervals()} == {0}
    store.close()
    pipeline.close()
