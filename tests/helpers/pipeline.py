"""The whole way without processes: splitter → local journal → interval → store, beside a naive model."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pitfs.journal.reader import BlockSource, Copy, Interval, JournalReader
from pitfs.journal.writer import Location
from pitfs.model.ladder import NO_LAYER
from pitfs.model.record import CopyProgress
from pitfs.model.schedule import StepKind, Waiting, next_step
from pitfs.model.transfer import Hello, Manifest, ResumePoint, TransferFrame, VolumeInfo
from pitfs.replication.full_sync import copy_frames
from pitfs.replication.interval import diff_frames, layers_frames, pick_layers, prepare
from pitfs.replication.manifests import copy_manifest, diff_manifest, layers_manifest
from pitfs.splitter.identity import read_group
from pitfs.splitter.service import SplitterService
from pitfs.splitter.splitter import NotReadyError, Splitter
from pitfs.splitter.startup import VolumeSpec, journal_directory, lock_state, open_splitter
from pitfs.splitter.sync_gate import SyncGate
from pitfs.store.ingest import Ingest
from tests.helpers.stores import feed


def make_ready(action: Callable[[], None]) -> None:
    """Does it, and first what a disk must do for it, as the service does."""
    while True:
        try:
            return action()
        except NotReadyError as wait:
            wait.make_ready()


def service_of(pipeline: Pipeline) -> SplitterService:
    return SplitterService(pipeline.splitter, SyncGate(holds=False, blocks=False, copying=False))


@dataclass
class Pipeline:
    """A group in a temporary directory. `states[seq]` is the naive model: the volumes' bytes after write seq.

    The clock is a counter: it stands still now and then, as real ones do. `filled`: the backings are full of noise.
    """

    tmp: Path
    sizes: list[int]
    block_sizes: list[int]
    capacity_bytes: int = 64 << 20
    seed: int = 0
    tick_ns: int = 7
    filled: bool = False
    states: list[list[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.tmp.mkdir(exist_ok=True)
        self.backings = [self.tmp / f"backing{index}" for index in range(len(self.sizes))]
        for path, size in zip(self.backings, self.sizes, strict=True):
            content = bytearray(size)
            at = int(self.random.integers(size))
            content[at : at + 5000] = self.random.bytes(min(5000, size - at))
            if self.filled:
                content[:] = self.random.bytes(size)
            path.write_bytes(content)
        ticks = itertools.count(1_700_000_000_000_000_000, self.tick_ns)
        self._clock = lambda: next(ticks) // 50 * 50
        self.state = str(self.tmp / "state")
        self.start()
        self.states.append([path.read_bytes() for path in self.backings])
        group = read_group(self.state)
        assert group is not None
        self.hello = Hello("g", group.history, group.volumes)
        self.ingest = Ingest(str(self.tmp), self.hello)
        self.reader = JournalReader(journal_directory(self.state), self.block_sizes)
        self.reader.seek(Location(1, 4096), (0, 0))

    @property
    def volumes(self) -> tuple[VolumeInfo, ...]:
        return self.hello.volumes

    def start(self) -> None:
        self.lock = lock_state(self.state)
        self.splitter: Splitter = open_splitter(
            self.state, "g", self.specs, self.capacity_bytes, False, self._clock
        )

    @property
    def specs(self) -> list[VolumeSpec]:
        """As a configuration has the volumes."""
        backings = enumerate(zip(self.backings, self.block_sizes, strict=True))
        return [VolumeSpec(f"v{index}", str(path), size) for index, (path, size) in backings]

    def crash(self) -> None:
        """As kill -9: descriptors go, nothing is closed in order."""
        os.close(self.lock)
        time_ns = self.splitter.state.time_ns  # as a real clock would have left them
        for path in self.backings:
            os.utime(path, ns=(time_ns, time_ns))
        self.splitter.journal.close()
        self.splitter._progress.close()
        for volume in self.splitter.volumes:
            volume.close()

    def write(self, volume: int, offset: int, data: bytes) -> None:
        make_ready(lambda: self.splitter.write(volume, offset, data))
        after = list(self.states[-1])
        after[volume] = after[volume][:offset] + data + after[volume][offset + len(data) :]
        self.states.append(after)

    def random_write(self) -> None:
        """Unaligned, overlapping, crossing blocks, all zero, or the same content again."""
        random = self.random
        volume = int(random.integers(len(self.sizes)))
        size = self.sizes[volume]
        offset = (
            int(random.integers(size)) if random.random() < 0.7 else int(random.integers(min(size, 4000)))
        )
        if random.random() < 0.4:
            offset -= offset % self.block_sizes[volume]
        length = min(
            size - offset, int(random.choice([1, 100, 512, 4096, 10_000, self.block_sizes[volume] * 3]))
        )
        kind = random.random()
        now = self.states[-1][volume]
        if kind < 0.15:
            data = bytes(length)
        elif kind < 0.3:
            data = now[offset : offset + length]
        elif kind < 0.45:
            data = (b"again" * (length // 5 + 1))[:length]
        else:
            data = random.bytes(length)
        self.write(volume, offset, data)

    def items(self) -> Iterator[Interval | Copy]:
        while (item := self.reader.next(self.splitter.journal.tail)) is not None:
            yield item

    def ship(self, rate_bytes_per_s: float | None = None) -> list[Manifest]:
        """Ships everything that is marked; returns the manifests."""
        shipped = []
        for item in self.items():
            if isinstance(item, Copy):
                self.ship_copy(item)
            else:
                shipped.append(self.ship_interval(item, rate_bytes_per_s))
        return shipped

    def ship_copy(self, copy: Copy) -> None:
        resume = self.ingest.begin(copy_manifest(copy, self.hello.history, self.ingest.welcome()))
        for frame in self.copy_frames(copy, resume):
            feed(self.ingest, frame)
        self.splitter.copied(CopyProgress(copy.start.mark, len(self.sizes), 0))

    def copy_frames(self, copy: Copy, resume: ResumePoint) -> Iterator[TransferFrame]:
        fds = [volume.fd for volume in self.splitter.volumes]
        return copy_frames(
            journal_directory(self.state),
            self.volumes,
            fds,
            copy,
            resume,
            lambda: self.splitter.journal.tail,
        )

    def ship_interval(self, interval: Interval, rate_bytes_per_s: float | None) -> Manifest:
        """Its diff, then the layers that fit; the last manifest."""
        source = BlockSource(journal_directory(self.state), interval, self.block_sizes)
        prepared = prepare(interval, self.volumes, source, True)
        room_bytes = None if rate_bytes_per_s is None else rate_bytes_per_s - prepared.diff_bytes  # of a second
        waiting = [] if prepared.journal is None else [Waiting(interval.to_seq, NO_LAYER, prepared.rung_bytes)]
        step = next_step(diff_due=False, waiting=waiting, room_bytes=room_bytes)
        reason = step.decision.reason
        manifest = diff_manifest(prepared, reason)
        self._feed(diff_frames(prepared, self.ingest.begin(manifest)))
        if step.kind is StepKind.LAYERS and step.fits:
            picked = pick_layers(prepared, NO_LAYER, step.layer, 0)
            manifest = layers_manifest(picked, reason)
            self._feed(layers_frames(picked, self.ingest.begin(manifest)))
        source.close()
        return manifest

    def _feed(self, frames: Iterator[TransferFrame]) -> None:
        for frame in frames:
            feed(self.ingest, frame)

    def close(self) -> None:
        self.reader.close()
        self.ingest.close()
        self.crash()
