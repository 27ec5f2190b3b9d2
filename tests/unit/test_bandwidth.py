"""The bandwidth benchmark's arithmetic, on a small trace of the splitter in this process; and once for real."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pitfs.model.ladder import LAST_LAYER, NO_LAYER, RUNGS_NS
from pitfs.model.transfer import Data, Section, StreamMark
from tests.helpers.pipeline import Pipeline
from tests.helpers.processes import ROOT, run

BENCHMARKS = ROOT / "tools" / "benchmarks"


@pytest.fixture
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as tools/bench finds it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bandwidth")


@pytest.fixture
def trace(tmp_path: Path, bandwidth: Any) -> Iterator[Any]:
    pipeline = Pipeline(tmp_path, [300_000], [4096], tick_ns=400_000)
    pipeline.splitter.mark()
    first = copy.copy(pipeline.splitter.state)
    for _ in range(3):
        for _ in range(60):
            pipeline.random_write()
        pipeline.splitter.mark()
    traces = importlib.import_module("traces")
    yield traces.read_trace("a trace", Path(pipeline.state), first, pipeline.splitter.journal.tail)
    pipeline.close()


def test_a_trace_is_what_was_written_between_the_marks(trace: Any) -> None:
    assert trace.writes == 180 and [len(interval.times) for interval in trace.intervals] == [60] * 3
    assert trace.written_bytes == sum(len(interval.columns.seq) for interval in trace.intervals) * 4096


def test_the_stream_has_every_write_once_in_order(trace: Any, bandwidth: Any) -> None:
    frames = list(bandwidth.streamed(trace))
    data = {
        section: [f for f in frames if isinstance(f, Data) and f.section is section] for section in Section
    }
    assert sum(len(frame.payload) for frame in data[Section.WRITE_BLOCKS]) == trace.written_bytes
    assert sum(len(frame.payload) for frame in data[Section.WRITES]) == 180 * 24
    assert [frame.mark for frame in frames if isinstance(frame, StreamMark)] == [
        interval.mark for interval in trace.intervals
    ]


def test_finer_rungs_cost_no_less_and_a_reconnect_nothing_but_its_window(trace: Any, bandwidth: Any) -> None:
    whole = bandwidth.prepared(trace, with_journal=True)
    costs = [whole.cost(layer) for layer in (NO_LAYER, *whole.layers())]
    assert [cost.payload_bytes for cost in costs] == sorted(cost.payload_bytes for cost in costs)
    assert (
        costs[0].payload_bytes == bandwidth.prepared(trace, with_journal=False).cost(NO_LAYER).payload_bytes
    )
    broken = whole.cost(LAST_LAYER, reconnect_at=costs[-1].payload_bytes // 2)
    assert broken.payload_bytes == costs[-1].payload_bytes and broken.total_bytes > costs[-1].total_bytes
    assert 0 < costs[-1].rows_bytes < costs[-1].total_bytes and costs[-1].cpu_s > 0


def test_every_way_has_its_figures(trace: Any, bandwidth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bandwidth.GOALS, "a trace", (1e-6, None))
    found = bandwidth.measure(trace)
    names = [each.measure for each in found]
    assert "a trace: diffs only" in names and "a trace: diffs + every write, CPU" in names
    judged = {each.measure for each in found if each.met is False}
    assert judged >= {"a trace: stream of every write", "a trace: diffs + every write"}
    assert not [each for each in bandwidth.measure(trace, quick=True) if each.met is False]


def test_rungs_have_names(bandwidth: Any) -> None:
    names = [bandwidth.rung_name(layer) for layer in range(len(RUNGS_NS))]
    assert names[0] == "diffs + 10,000 ms rung" and names[-2:] == ["diffs + 1 ms rung", "diffs + every write"]


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.loop
@pytest.mark.timeout(600)
def test_traces_are_recorded_and_nothing_is_left() -> None:
    script = (
        "import bandwidth, common;"
        "made = common.workspace(); path = made.__enter__(); measures = bandwidth.run(common.Setting(path, True));"
        "made.__exit__(None, None, None); print(path, *(each.measure for each in measures), sep='\\n')"
    )
    code = f"import sys; sys.path[:0] = [{str(BENCHMARKS)!r}]; {script}"
    # Not in tmp_path: a database's server, which isn't root, has to get there.
    said = run([sys.executable, "-c", code], timeout_s=500).stdout
    assert "SQLite: diffs + every write" in said and "random, hot: stream of every write" in said
    workspace = Path(said.splitlines()[0])
    assert workspace.name.startswith("pitfs-bench-") and not workspace.exists()
    for left in (run(["losetup", "--list"]).stdout, Path("/proc/self/mountinfo").read_text()):
        assert workspace.name not in left
