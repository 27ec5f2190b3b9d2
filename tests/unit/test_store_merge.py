"""Runs of rows that ascend are merged as they are read: in order, in bounded batches, each row once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pitfs.errors import CorruptionError
from pitfs.store.index import merge
from pitfs.store.index.format import INDEX_ROW
from pitfs.store.index.merge import BY_BLOCK, Rows, by_volume, merged

OUT_OF_ORDER = CorruptionError("runs", 0, "out of order")


def run_of(keys: list[tuple[int, int, int]]) -> Rows:
    return np.array([(*key, 0, 0) for key in keys], INDEX_ROW)


def in_parts(run: Rows, random: np.random.Generator) -> Iterator[Rows]:
    """The run as a reader gives it, in parts of any size, some of them empty."""
    return iter(np.array_split(run, int(random.integers(1, len(run) + 3))))


@pytest.mark.parametrize("seed", range(20))
def test_runs_become_one_in_order_with_few_rows_held(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "HELD_ROWS", 5)
    random = np.random.default_rng(seed)
    numbers = np.unique(random.integers(0, 3 * 20 * 50, 300)).tolist()
    keys = [(number // 1000, number // 50 % 20, number % 50) for number in numbers]
    run_numbers = random.integers(0, 4, len(keys)).tolist()
    runs = [run_of([key for key, run in zip(keys, run_numbers, strict=True) if run == number]) for number in range(5)]
    batches = list(merged([in_parts(run, random) for run in runs], BY_BLOCK, OUT_OF_ORDER))
    assert [tuple(row)[:3] for batch in batches for row in batch.tolist()] == keys
    longest_part = max(len(run) for run in runs)
    assert max(map(len, batches)) <= 5 * (5 + longest_part)


@pytest.mark.parametrize(
    "runs", [[[(0, 1, 2)], [(0, 1, 2)]], [[(0, 1, 2), (0, 1, 2)]], [[(0, 1, 3), (0, 1, 2)] * 9]], ids=str
)
def test_rows_that_came_before_raise_what_the_caller_says(
    runs: list[list[tuple[int, int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "HELD_ROWS", 2)
    with pytest.raises(CorruptionError, match="out of order"):
        list(merged([iter([run_of(run)]) for run in runs], BY_BLOCK, OUT_OF_ORDER))


def test_no_runs_and_empty_runs_give_nothing() -> None:
    assert list(merged([], BY_BLOCK, OUT_OF_ORDER)) == []
    assert list(merged([iter([]), iter([run_of([])])], BY_BLOCK, OUT_OF_ORDER)) == []


def test_rows_are_cut_where_the_volume_changes() -> None:
    rows = run_of([(0, 1, 1), (0, 2, 1), (3, 1, 1), (4, 0, 2)])
    assert [(volume, part["block"].tolist()) for volume, part in by_volume(rows)] == [(0, [1, 2]), (3, [1]), (4, [0])]
    assert list(by_volume(rows[:0])) == []
