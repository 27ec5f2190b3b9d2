"""The ladder: which instants of an interval, and which of its writes' contents, each granularity needs. Pure.

On a rung of g ns an interval can give the state at the end of each granule, [i·g, (i+1)·g) since the epoch, but
the last, whose end is after the interval's. So of each block only the last content within a granule is needed. Each
rung divides the one before: what a rung needs, finer ones need too, and a *layer* is what it adds to the coarser.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Layers = npt.NDArray[np.uint8]
_MS: Final = 1_000_000
RUNGS_NS: Final = (
    10_000 * _MS, 5_000 * _MS, 1_000 * _MS, 500 * _MS, 100 * _MS, 50 * _MS, 10 * _MS, 5 * _MS, _MS, 0,
)  # fmt: skip
NO_LAYER: Final = -1  # before the first: snapshots only
LAST_LAYER: Final = len(RUNGS_NS) - 1  # what only every write needs


def layers_of(
    times_ns: npt.NDArray[np.int64], followed: npt.NDArray[np.bool_], to_time_ns: int
) -> Layers:
    """The layer that each row comes with.

    Args:
        times_ns: int64[n], rows in the order of writing, those of a block (or of all, for positions) together.
        followed: whether the next row is one of these that comes later.
        to_time_ns: where the interval ends.
    """
    layers = np.full(len(times_ns), LAST_LAYER, dtype=np.uint8)
    for layer in range(LAST_LAYER - 1, -1, -1):
        rung_ns = RUNGS_NS[layer]
        granule = times_ns // rung_ns
        last = ~followed
        last[:-1] |= granule[1:] != granule[:-1]
        needed = last & (granule < to_time_ns // rung_ns)
        if not needed.any():
            break  # then coarser rungs need nothing, too
        layers[needed] = layer
    return layers


def layers_of_positions(times_ns: npt.NDArray[np.int64], to_time_ns: int) -> Layers:
    """The layer that the state after each write of an interval comes with; `times_ns` strictly ascends."""
    return layers_of(times_ns, np.arange(1, len(times_ns) + 1) < len(times_ns), to_time_ns)


def layer_of(granularity_ns: int | None) -> int:
    """The last layer that this granularity has."""
    return NO_LAYER if granularity_ns is None else RUNGS_NS.index(granularity_ns)


def granularity_of(layer: int) -> int | None:
    """What an interval has that has the layers up to this one."""
    return None if layer == NO_LAYER else RUNGS_NS[layer]


def is_rung(granularity_ns: int) -> bool:
    return granularity_ns in RUNGS_NS
