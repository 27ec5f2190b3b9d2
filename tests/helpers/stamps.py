"""Stamped writes: each 512-byte sector says which write put it there, so that an image proves its position.

Write n (1, 2, 3 …) of a seed has an offset, a size and a content that depend on nothing else. So the state
after n writes can be computed, and an image is either exactly such a state or damaged:

    plan = Plan(seed, volume_bytes)
    plan.find(image)            -> n, or AssertionError with the first sector that doesn't fit
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

SECTOR_BYTES: Final = 512
MAX_SECTORS: Final = 40  # sizes 512 B … 20 KiB, 10 KiB on average: the patent's load
HOT_SHARE: Final = 0.3  # of the writes go to the first HOT_PART of the volume
HOT_PART: Final = 0.01
ZERO_EVERY: Final = 16  # one write in 16 is all zeros
_CHUNK: Final = 4096


class Plan:
    """Offsets, sizes and contents of all writes of one seed to one volume."""

    def __init__(self, seed: int, volume_bytes: int) -> None:
        self.seed = seed
        self.sector_count = volume_bytes // SECTOR_BYTES
        self._chunks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def _chunk(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if number not in self._chunks:
            random = np.random.default_rng([self.seed, number])
            sizes = random.integers(1, MAX_SECTORS, _CHUNK, dtype=np.int64)
            limit = self.sector_count - MAX_SECTORS
            firsts = random.integers(0, limit, _CHUNK, dtype=np.int64)
            hot = random.random(_CHUNK) < HOT_SHARE
            firsts[hot] %= max(1, int(limit * HOT_PART))
            self._chunks[number] = (firsts, sizes)
        return self._chunks[number]

    def sectors(self, n: int) -> tuple[int, int]:
        """First sector and count of sectors of write n."""
        firsts, sizes = self._chunk((n - 1) // _CHUNK)
        return int(firsts[(n - 1) % _CHUNK]), int(sizes[(n - 1) % _CHUNK])

    def content(self, n: int) -> bytes:
        first, count = self.sectors(n)
        if is_zero(n):
            return bytes(count * SECTOR_BYTES)
        return self._fill(
            np.full(count, n, np.uint64), np.arange(first, first + count, dtype=np.uint64)
        ).tobytes()

    def _fill(self, stamps: NDArray[np.uint64], sectors: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """(count,) stamps and sectors -> (count, 64) uint64; stamp 0 or a zero write gives zeros."""
        mixed = (stamps * np.uint64(0x9E3779B97F4A7C15)) ^ (sectors * np.uint64(0xC2B2AE3D27D4EB4F))
        tile = np.stack([stamps, sectors, mixed, mixed ^ np.uint64(self.seed)], axis=1)
        tile[(stamps == 0) | (stamps % np.uint64(ZERO_EVERY) == np.uint64(7))] = 0
        return np.tile(tile, (1, SECTOR_BYTES // 32))

    def state(self, n: int) -> NDArray[np.uint64]:
        """(sector_count, 64) uint64: the volume, zeros at first, after n writes."""
        owner = np.zeros(self.sector_count, np.uint64)
        for number in range(-(-n // _CHUNK)):
            firsts, sizes = self._chunk(number)
            count = min(_CHUNK, n - number * _CHUNK)
            pairs = zip(firsts[:count].tolist(), sizes[:count].tolist(), strict=True)
            for index, (first, size) in enumerate(pairs, number * _CHUNK + 1):
                owner[first : first + size] = index
        return self._fill(owner, np.arange(self.sector_count, dtype=np.uint64))

    def find(self, image: bytes | memoryview) -> int:
        """How many writes the image holds, if it is exactly the state after some write.

        Raises:
            AssertionError: it isn't the state after any write.
        """
        found = np.frombuffer(image, np.uint64).reshape(-1, SECTOR_BYTES // 8)
        n = int(found[:, 0].max())
        expected = self.state(n)
        if np.array_equal(found, expected):
            # Zero writes leave no stamp: the greatest n that gives the same bytes can't be told apart.
            return n
        if is_zero(n + 1) and np.array_equal(found, self.state(n + 1)):
            return n + 1
        wrong = np.nonzero((found != expected).any(axis=1))[0]
        sector = int(wrong[0])
        raise AssertionError(
            f"not the state after write {n}: {len(wrong)} sectors differ, the first is {sector}, "
            f"stamped {found[sector, :2].tolist()} instead of {expected[sector, :2].tolist()}"
        )

    def find_at(self, image: bytes | memoryview, n: int) -> int:
        """n if the image is exactly the state after n writes, n + 1 if it is exactly the one after that.

        For who knows what was acknowledged: `find` can't tell a zero write that changed nothing.

        Raises:
            AssertionError: it is neither.
        """
        try:
            self.check(image, n)
        except AssertionError:
            self.check(image, n + 1)
            return n + 1
        return n

    def check(self, image: bytes | memoryview, n: int) -> None:
        """Raises AssertionError unless the image is exactly the state after n writes."""
        found = np.frombuffer(image, np.uint64).reshape(-1, SECTOR_BYTES // 8)
        expected = self.state(n)
        if not np.array_equal(found, expected):
            wrong = np.nonzero((found != expected).any(axis=1))[0]
            sector = int(wrong[0])
            raise AssertionError(
                f"not the state after write {n}: {len(wrong)} of {len(found)} sectors differ, the first is "
                f"{sector}, stamped {found[sector, :2].tolist()} instead of {expected[sector, :2].tolist()}; "
                f"its greatest stamp is {int(found[:, 0].max())}"
            )


def is_zero(n: int) -> bool:
    """Whether write n is all zeros."""
    return n % ZERO_EVERY == 7
