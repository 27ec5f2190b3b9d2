"""Random histories in stores, and what pruning must leave of them, the naive way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pitfs.model.transfer import VolumeInfo
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG
from pitfs.store.retention.levels import Action, Thin
from pitfs.store.store import Store
from tests.helpers.stores import ingest_transfer, object_files, read_image
from tests.helpers.streams import batch_of, mark_of
from tests.helpers.transfers import History

GRANULARITIES_NS = (0, 0, 0, 10_000_000, 100_000_000, 1_000_000_000, None)
COARSER_NS = (10_000_000_000, 1_000_000_000, 100_000_000, 10_000_000)


@dataclass
class Model:
    """A store, the history that it holds, and which instants it should still give.

    Attributes:
        instants, gone: seqs.
    """

    root: Path
    history: History
    instants: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.path = str(self.root / self.history.group)
        self.random = np.random.default_rng([self.history.seed, 3])

    def receive(self, ingest: Ingest, count: int, max_writes: int = 16) -> None:
        """So many intervals more: streamed, shipped with layers, on a rung, without a journal, behind a gap."""
        history, random = self.history, self.random
        for _ in range(count):
            first = not history.mark
            for _ in range(0 if first else int(random.integers(1, max_writes))):
                history.write()
            if not first and random.random() < 0.4:
                for start in range(0, len(history.open), 8):
                    ingest.write(batch_of(history.open[start : start + 8]))
                ingest.mark(mark_of(history))
                ingest.stream.wait_for_closing()
                continue
            transfer = history.close_interval(
                granularity_ns=GRANULARITIES_NS[int(random.integers(len(GRANULARITIES_NS)))],
                full=bool(not first and random.random() < 0.1),
                before_ns=COARSER_NS[int(random.integers(4)) :],
            )
            ingest_transfer(ingest, transfer)
        self.instants |= history.reachable - self.gone

    def take(self, actions: Sequence[Action], pinned: Sequence[int] = ()) -> int:
        """What these actions leave, before they are applied; returns how many of them the pins allow."""
        allowed = 0
        for action in actions:
            after, before = self._bounds(action)
            if not any(after < seq < before for seq in pinned):
                kept = self._ends(after, before, action.granularity_ns) if isinstance(action, Thin) else set()
                lost = {seq for seq in self.instants if after < seq < before} - kept
                self.instants -= lost
                self.gone |= lost
                allowed += 1
        return allowed

    def _bounds(self, action: Action) -> tuple[int, int]:
        """The seqs between which instants go."""
        catalog = Catalog(os.path.join(self.path, CATALOG))
        try:
            if isinstance(action, Thin):
                interval = catalog.interval_to(action.end_snapshot_id)
                assert interval is not None
                return interval.from_seq, interval.to_seq
            before, after = catalog.snapshot(action.before_id), catalog.snapshot(action.after_id or 0)
            assert before is not None
            return -1 if after is None else after.seq, before.seq
        finally:
            catalog.close()

    def _ends(self, from_seq: int, to_seq: int, granularity_ns: int | None) -> set[int]:
        """The last writes of the granules of an interval, but of its last one."""
        if granularity_ns is None:
            return set()
        times = self.history.times_ns
        last = {times[seq] // granularity_ns: seq for seq in range(from_seq + 1, to_seq + 1)}
        return {seq for granule, seq in last.items() if granule < times[to_seq] // granularity_ns}

    def check(self, images: bool = True) -> None:
        """The store gives these instants, byte for byte, and no others; its lists agree."""
        store = Store.open(self.path)
        try:
            assert instants_of(store) == self.instants
            times = self.history.times_ns
            for seq in sorted(self.instants) if images else ():
                self.check_image(store, seq)
            seconds = {times[seq] // 1_000_000_000: seq for seq in sorted(self.instants)}
            found = [
                state.seq for day in store.days() for minute in store.minutes(day) for state in store.seconds(minute)
            ]
            assert found == list(seconds.values())
        finally:
            store.close()

    def check_image(self, store: Store, seq: int) -> None:
        found = store.at_seq(seq)
        assert (found.seq, found.time_ns) == (seq, self.history.times_ns[seq])
        for volume, wanted in enumerate(self.history.states[seq]):
            assert read_image(store, found, volume) == wanted


def instants_of(store: Store) -> set[int]:
    first, last = store.first(), store.latest()
    assert first is not None and last is not None
    return {store.at_seq(seq).seq for seq in range(first.seq, last.seq + 1)}


def model_of(root: Path, seed: int, count: int = 7, block_size: int | None = None, writes: int = 16) -> Model:
    """A store with so many intervals; nobody has it open."""
    random = np.random.default_rng([seed, 9])
    volumes = []
    for number in range(int(random.integers(1, 3))):
        size = block_size or 512 << int(random.integers(0, 5))
        blocks = int(random.integers(2, 24))
        volumes.append(VolumeInfo(f"v{number}", blocks * size - int(random.integers(0, size)), size))
    history = History(seed, tuple(volumes), step_ns=int(random.choice([3_000_000, 40_000_000, 700_000_000])))
    model = Model(root, history)
    ingest = Ingest(str(root), history.hello)
    model.receive(ingest, count, writes)
    ingest.close()
    return model


def allocated_bytes(store: str) -> int:
    """What a store's objects take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in object_files(store))


def assert_tidy(store: str) -> None:
    """Each object is one that the catalog has, each that it has is there, and nothing waits to be freed."""
    catalog = Catalog(os.path.join(store, CATALOG))
    try:
        files = {path.name for path in object_files(store)}
        listed = {row[0] for row in catalog.rows("SELECT name FROM objects")}
        moved = {row[0] for row in catalog.rows("SELECT name FROM moved")}
        assert files == listed - moved
        assert catalog.removals() == []
    finally:
        catalog.close()
