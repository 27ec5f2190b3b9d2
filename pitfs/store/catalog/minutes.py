"""Which seconds have an instant: for each minute since the epoch the bits of its seconds, first second lowest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_SECOND_NS = 1_000_000_000


def add_seconds(minutes: dict[int, int], times_ns: npt.NDArray[np.int64]) -> None:
    """Marks the seconds of these times."""
    for second in np.unique(times_ns // _SECOND_NS).tolist():
        minutes[second // 60] = minutes.get(second // 60, 0) | 1 << second % 60
