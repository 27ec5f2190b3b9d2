"""What building and picking an interval's difference takes for each block written: MAX_INTERVAL_ROWS relies on it."""

from __future__ import annotations

import tracemalloc

import numpy as np

from pitfs.journal.reader import Interval
from pitfs.journal.writer import Location
from pitfs.model.difference import Columns
from pitfs.model.ladder import LAST_LAYER, NO_LAYER
from pitfs.model.schedule import MAX_INTERVAL_ROWS
from pitfs.model.transfer import VolumeInfo
from pitfs.replication.interval import pick_layers, prepare
from pitfs.replication.manifests import layers_manifest

ROWS = 200_000


class Source:
    """Contents that are told apart by their first bytes."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    def read(self, rows: np.ndarray) -> bytearray:
        return bytearray(np.repeat(self._words[rows], 64).tobytes())

    def close(self) -> None:
        """Nothing is open."""


def test_an_interval_is_closed_early_before_its_difference_takes_more_than_160_mib() -> None:
    random = np.random.default_rng(1)
    seq = np.arange(1, ROWS + 1)
    words = random.integers(1, ROWS, ROWS).astype("<u8")  # half of them come again
    columns = Columns(np.zeros(ROWS, "<u2"), random.integers(0, ROWS, ROWS), seq, words * np.uint64(0x9E3779B97F4A7C15))
    interval = Interval(
        1, 10**18 + ROWS * 1000, None, 0, 10**18, ROWS, 10**18 + ROWS * 1000, columns,
        np.ones(ROWS, "<i8"), seq * 600, 10**18 + seq * 1000, Location(1, 0), Location(2, 0),
    )  # fmt: skip
    tracemalloc.start()
    try:
        volumes = (VolumeInfo("root", ROWS * 512, 512),)
        prepared = prepare(interval, volumes, Source(words), True)
        layers_manifest(pick_layers(prepared, NO_LAYER, LAST_LAYER, 0), "")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / ROWS * MAX_INTERVAL_ROWS < 160 << 20
