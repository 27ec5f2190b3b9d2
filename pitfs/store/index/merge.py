"""Rows that ascend: several runs merged into one, and one cut where its volume changes. In bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pitfs.errors import PitfsError

Rows = npt.NDArray[np.void]  # of an index, of a transfer's section, or positions
HELD_ROWS = 1 << 12  # of each run before it is read on
BY_BLOCK = ("volume", "block", "seq")


def merged(runs: Sequence[Iterator[Rows]], keys: Sequence[str], out_of_order: PitfsError) -> Iterator[Rows]:
    """Rows of ascending runs as one run, strictly ascending by these fields, in batches.

    Each turn holds at least HELD_ROWS rows of each run, or all that are left of it. The least of the runs' last held
    keys is the limit of the turn: what any run has still to bring comes after its own last held row, so after the
    limit. All held rows up to the limit are therefore complete: they are sorted and given out. The run that set the
    limit is used up by that, so each turn gets on by HELD_ROWS rows, however the runs lie.

    Raises:
        out_of_order: two rows have the same key, or a run doesn't ascend.
    """
    held: list[Rows | None] = [next(run, None) for run in runs]
    last: tuple[int, ...] | None = None
    while True:
        # All of them anew, not the empty one alone: else each turn would look at all runs for the rows of one.
        held = [_filled(rows, run) for rows, run in zip(held, runs, strict=True)]
        limit = min((_key(rows[-1], keys) for rows in held if rows is not None), default=None)
        if limit is None:
            return
        parts = []
        for i, rows in enumerate(held):
            if rows is not None:
                count = _count_until(rows, keys, limit)
                parts.append(rows[:count])
                held[i] = rows[count:]
        batch = np.concatenate(parts)
        batch = batch[np.lexsort([batch[key] for key in reversed(keys)])]
        same = np.logical_and.reduce([batch[key][1:] == batch[key][:-1] for key in keys])
        if same.any() or (last is not None and _key(batch[0], keys) <= last):
            raise out_of_order
        last = _key(batch[-1], keys)
        yield batch


def _key(row: np.void, keys: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(row[key]) for key in keys)


def _filled(held: Rows | None, run: Iterator[Rows]) -> Rows | None:
    """The held rows with as many behind them as are held of a run; None where there are no more."""
    if held is None:
        return None
    parts, count = [held], len(held)
    while count < HELD_ROWS and (more := next(run, None)) is not None:
        parts.append(more)
        count += len(more)
    if not count:
        return None
    return np.concatenate(parts) if len(parts) > 1 else held


def _count_until(rows: Rows, keys: Sequence[str], limit: tuple[int, ...]) -> int:
    """How many of ascending rows aren't after `limit`."""
    until = np.ones(len(rows), dtype=np.bool_)
    for key, value in zip(reversed(keys), reversed(limit), strict=True):
        column = rows[key]
        bound = column.dtype.type(value)
        until = (column < bound) | ((column == bound) & until)
    return int(until.sum())


def by_volume(rows: Rows) -> Iterator[tuple[int, Rows]]:
    """The rows cut where the volume changes, with that volume."""
    volume = rows["volume"]
    for part in np.split(rows, np.flatnonzero(volume[1:] != volume[:-1]) + 1):
        if len(part):
            yield int(part["volume"][0]), part
