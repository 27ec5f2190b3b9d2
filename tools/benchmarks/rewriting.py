"""The writes of the interval that the read benchmarks look into: a tenth of the volume, part of it again and again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

WRITE_BYTES: Final = 10 << 10  # the patent's load: 10 KB on average, so blocks are covered by halves, too
REWRITTEN: Final = 0.1  # of the volume, at the end of the interval
# Most go anywhere in the volume, the others to its first hundredth, which is so written again and again.
HOT_VOLUME, HOT_WRITES = 0.01, 0.3


@dataclass(frozen=True, slots=True)
class Rewriting:
    """Random writes in their order, each of WRITE_BYTES; `offsets`: int64 [writes], multiples of WRITE_BYTES."""

    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, size_bytes: int, seed: int) -> Rewriting:
        """As many as leave REWRITTEN of a volume of that size written."""
        places = size_bytes // WRITE_BYTES
        hot = max(1, int(places * HOT_VOLUME))
        # Of the cold places, written at random, the share 1 - exp(-writes / places) is written at least once.
        cold_share = (REWRITTEN - HOT_VOLUME) / (1 - HOT_VOLUME)
        cold_writes = int(-np.log1p(-cold_share) * (places - hot))
        count = int(cold_writes / (1 - HOT_WRITES))
        random = np.random.default_rng(seed)
        chosen = np.where(
            random.random(count) < HOT_WRITES,
            random.integers(0, hot, count),
            random.integers(hot, places, count),
        )
        return cls(chosen.astype(np.int64) * WRITE_BYTES)

    @property
    def written_bytes(self) -> int:
        """What is written at least once."""
        return len(np.unique(self.offsets)) * WRITE_BYTES

    def first_half(self) -> Rewriting:
        return Rewriting(self.offsets[: len(self.offsets) // 2])

    def parts(self, count: int) -> Iterator[NDArray[np.int64]]:
        """The offsets in that many runs of about the same length, in order."""
        yield from np.array_split(self.offsets, count)

    def write(self, volume: Path) -> None:
        """All of them, with random bytes, one after the other; then fsync."""
        descriptor = os.open(volume, os.O_RDWR)
        try:
            for offset in self.offsets.tolist():
                os.pwrite(descriptor, os.urandom(WRITE_BYTES), offset)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
