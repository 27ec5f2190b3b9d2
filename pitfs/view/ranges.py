"""Ranges as arrays and as byte ranges: runs of a mask, coalesced ranges, and pieces of a range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from pitfs.model.blockmap import I64Array


def runs(mask: npt.NDArray[np.bool_]) -> I64Array:
    """[start, end) of each run of true values, shape (n, 2), ascending."""
    return np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)


def joined(pieces: Iterable[I64Array]) -> Iterator[tuple[int, int]]:
    """Coalesces ascending ranges, given in arrays of shape (n, 2); empty ones are left out."""
    start = end = 0
    for piece in pieces:
        for a, b in piece.tolist():
            if a != end:
                if start < end:
                    yield start, end
                start = a
            end = b
    if start < end:
        yield start, end


def cut(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """[start, end) in pieces that end at multiples of `step`."""
    while start < end:
        middle = min(end, start - start % step + step)
        yield start, middle
        start = middle
