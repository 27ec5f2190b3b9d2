"""Group `ship`, second part: what goes over the wire for what a load writes, on recorded traces.

Each way to replicate a trace encodes the frames that it would send, in order, through one connection's codec;
nothing is sent. Compared are: every write as it is (`continuous raw`), every write through the codec (the
stream), snapshot diffs only, and diffs with the layers of the difference journal up to each rung.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from common import Setting
from report import Measure, at_most, figure, note, plain
from traces import KINDS, Trace, recorded

from pitfs.journal.reader import BlockSource, JournalReader
from pitfs.journal.stream_reader import next_chunk
from pitfs.link.codec.payloads import PayloadEncoder
from pitfs.link.protocol.batches import BatchCutter
from pitfs.link.protocol.frames import Frame, WireData, encode
from pitfs.model.ladder import LAST_LAYER, NO_LAYER, RUNGS_NS
from pitfs.model.transfer import (
    Begin,
    Data,
    Flush,
    ResumePoint,
    Section,
    StreamMark,
    TransferFrame,
)
from pitfs.replication.interval import PreparedInterval, diff_frames, layers_frames, pick_layers, prepare
from pitfs.replication.manifests import diff_manifest, layers_manifest

ROWS: Final = frozenset({Section.DIFF, Section.POSITIONS, Section.JOURNAL, Section.WRITES})
BATCH_BYTES: Final = 1 << 20  # contents of a streamed batch: small ones, as on a link that keeps up
# Of a trace at every write: of continuous raw, and of "diffs only, same codec".
GOALS: Final = {
    "SQLite": (0.05, None),
    "PostgreSQL": (0.05, 1.2),
    "trees of files": (0.25, 1.2),
    "random, once": (1.02, None),
    "random, hot": (1.02, None),
}
METADATA_GOAL: Final = 12.0  # bytes per write
MB: Final = 1e6
STREAM, DIFFS, EVERY = "stream of every write", "diffs only", "diffs + every write"
WHOLE: Final = (STREAM, EVERY)  # the ways by which every instant arrives

Sent = TransferFrame | Flush | StreamMark


class Wire:
    """A connection that counts. The codec is behind `_encode` alone."""

    def __init__(self) -> None:
        self._encoder = PayloadEncoder()
        self.total_bytes = self.rows_bytes = self.payload_bytes = 0

    def send(self, frame: Sent) -> None:
        on_wire = self._encode(frame)
        self.total_bytes += sum(map(len, encode(on_wire)))
        if isinstance(frame, Data) and isinstance(on_wire, WireData):
            self.payload_bytes += len(frame.payload)
            self.rows_bytes += len(on_wire.payload) if frame.section in ROWS else 0

    def _encode(self, frame: Sent) -> Frame:
        return self._encoder.encode(frame, self._encoder.wants(frame)) if isinstance(frame, Data) else frame


@dataclass(frozen=True, slots=True)
class Cost:
    """What a way costs.

    Attributes:
        total_bytes: of all frames. rows_bytes: of the rows in them.
        payload_bytes: of rows and contents before the codec.
        cpu_s: of preparing and encoding.
    """

    total_bytes: int
    rows_bytes: int
    payload_bytes: int
    cpu_s: float


def cost(frames: Iterable[Sent], reconnect_at: int | None = None) -> Cost:
    """Encodes all frames. `reconnect_at`: payload bytes after which the connection is another one."""
    start = time.process_time()
    wire, before = Wire(), None
    for frame in frames:
        if before is None and reconnect_at is not None and wire.payload_bytes >= reconnect_at:
            before, wire = wire, Wire()
        wire.send(frame)
    ended = [wire] if before is None else [before, wire]
    return Cost(
        sum(each.total_bytes for each in ended),
        sum(each.rows_bytes for each in ended),
        sum(each.payload_bytes for each in ended),
        time.process_time() - start,
    )


def streamed(trace: Trace) -> Iterator[Sent]:
    """Every write in order, in batches, as the shipper streams them."""
    reader, cutter = JournalReader(trace.directory, trace.block_sizes), BatchCutter()
    first, last = trace.intervals[0], trace.intervals[-1]
    reader.seek(first.start, (first.from_seq, first.from_time_ns))
    with contextlib.closing(reader):
        while (piece := next_chunk(reader, last.end, BATCH_BYTES)) is not None:
            if piece.writes is not None:
                yield from cutter.cut(piece.writes)
                seq, time_ns = piece.position
                yield Flush(seq, piece.writes.digest, time_ns)
            if piece.mark is not None:
                yield piece.mark


@dataclass(frozen=True, slots=True)
class Prepared:
    """A trace's intervals ready to go. `cpu_s`: what that took, with the journal or without."""

    trace: Trace
    intervals: tuple[PreparedInterval, ...]
    cpu_s: float

    def transfers(self, layer: int) -> Iterator[Sent]:
        """Each interval's diff, then its layers up to and with that one."""
        for each in self.intervals:
            with contextlib.closing(each.source):
                yield Begin(diff_manifest(each, ""))
                yield from diff_frames(each, ResumePoint())
                if layer != NO_LAYER and each.journal is not None:
                    picked = pick_layers(each, NO_LAYER, layer, 0)
                    yield Begin(layers_manifest(picked, ""))
                    yield from layers_frames(picked, ResumePoint())

    def cost(self, layer: int, reconnect_at: int | None = None) -> Cost:
        """Of sending that, with what preparing took."""
        found = cost(self.transfers(layer), reconnect_at)
        return replace(found, cpu_s=found.cpu_s + self.cpu_s)

    def layers(self) -> list[int]:
        """Those that a position comes with: coarser rungs than the intervals have none."""
        found = np.unique(np.concatenate([each.position_layers for each in self.intervals]))
        return [int(layer) for layer in found]


def prepared(trace: Trace, with_journal: bool) -> Prepared:
    start, intervals = time.process_time(), []
    for interval in trace.intervals:
        with contextlib.closing(BlockSource(trace.directory, interval, trace.block_sizes)) as source:
            intervals.append(prepare(interval, trace.volumes, source, with_journal))
    return Prepared(trace, tuple(intervals), time.process_time() - start)


def run(setting: Setting) -> list[Measure]:
    """Records each trace that can be, and measures it."""
    measures: list[Measure] = []
    for kind in KINDS:
        if missing := kind.missing():
            note(f"{kind.name}: left out: {missing}")
            continue
        with recorded(kind, setting) as trace:
            note(f"{kind.name}: {figure(trace.written_bytes / MB)} MB in {trace.writes:,} writes; encoding …")
            measures += measure(trace, setting.quick)
    return measures


def measure(trace: Trace, quick: bool = False) -> list[Measure]:
    """All figures of a trace.

    Args:
        quick: without goals for bytes: a window has to fill before it helps, and that takes some data.
    """
    whole = prepared(trace, with_journal=True)
    ways = {
        STREAM: cost(streamed(trace)),
        DIFFS: prepared(trace, with_journal=False).cost(NO_LAYER),
        **{rung_name(layer): whole.cost(layer) for layer in whole.layers()},
    }
    diffs, every, raw_bytes = ways[DIFFS].total_bytes, ways[EVERY], trace.written_bytes
    broken = whole.cost(LAST_LAYER, reconnect_at=every.payload_bytes // 2)
    raw_goal, diff_goal = (None, None) if quick else GOALS.get(trace.name, (None, None))
    found = [plain(f"continuous raw, {trace.writes:,} writes", raw_bytes / MB, "MB")]
    for way, spent in ways.items():
        goal = raw_goal if way in WHOLE else None
        found.append(share(way, spent.total_bytes, "continuous raw", raw_bytes, goal))
    for way in WHOLE:
        found.append(share(way, ways[way].total_bytes, DIFFS, diffs, diff_goal))
    lost_bytes = broken.total_bytes - every.total_bytes
    found.append(share("what a reconnect half-way adds", lost_bytes, EVERY, every.total_bytes))
    for way in WHOLE:
        per_write = ways[way].rows_bytes / trace.writes
        found.append(at_most(f"{way}, metadata", per_write, "bytes/write", METADATA_GOAL))
    for way, spent in ways.items():
        found.append(plain(f"{way}, CPU", spent.cpu_s / (raw_bytes / 1e9), "s/GB written"))
    return [replace(each, measure=f"{trace.name}: {each.measure}") for each in found]


def rung_name(layer: int) -> str:
    """What is sent with the layers up to and with that one."""
    rung_ns = RUNGS_NS[layer]
    if rung_ns == 0:
        return EVERY
    return f"diffs + {rung_ns // 10**6:,} ms rung"


def share(measure: str, value: int, against: str, other: int, goal: float | None = None) -> Measure:
    """Bytes, less is better; the ratio is to `other` bytes."""
    ratio = round(value / other, 4)
    met = None if goal is None else ratio <= goal
    return Measure(
        measure, round(value / MB, 3), "MB", f"{against}: {figure(other / MB)} MB", ratio, goal, met
    )
