"""The digest of a volume: a sum over its blocks, so that replacing a block is a subtraction and an addition. Pure.

    digest = sum of mix(block number, xxh3_64 of the block) mod 2**128, over all blocks but those of zeros

A block whose checksum is that of zeros is one of zeros, on both sides: it adds nothing, as one that was never written.
The last block is padded with zeros.

It notices bits that flipped, blocks in the wrong place, writes that were lost or done twice: a difference of one block
goes unnoticed if the two contents have the same xxh3_64 (1 of 2**64), one of several blocks if their mixes have the
same sum (1 of 2**128). It doesn't stop a forger: who chooses contents finds some for any sum.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.model.group import MAX_VOLUMES

UInt64s = npt.NDArray[np.uint64]

DIGEST_BYTES: Final = 16
# The digest of each volume of a group, big-endian, as they are sent; left out where there are none.
Digests = Annotated[bytes, msgspec.Meta(max_length=MAX_VOLUMES * DIGEST_BYTES)] | msgspec.UnsetType
MAX_STREAMED_DIGESTS: Final = 48  # volumes: a frame MARK has room for no more
MASK: Final = (1 << 128) - 1
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: block 0 isn't mixed to 0
# (shift, factor) steps and the last shift. Stafford's variant 13 of the finaliser of MurmurHash3, as in SplitMix64
# (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014); and that of MurmurHash3 (Appleby).
_SPLITMIX: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), 31
_MURMUR: Final = ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)), 33


def are_digests(digests: Digests, volume_count: int) -> bool:
    """Whether there are none, or one of each volume."""
    return not digests or len(digests) == volume_count * DIGEST_BYTES


def zero_checksum(block_size: int) -> int:
    """xxh3_64 of a block of zeros."""
    return xxh3_64_intdigest(bytes(block_size))


def digest_of(blocks: npt.NDArray[np.int64], checksums: UInt64s) -> int:
    """The sum over these blocks, fewer than 2**32.

    Args:
        checksums: xxh3_64 of each, 0 for one of zeros.
    """
    filled = checksums != 0
    number, checksum = blocks[filled].astype(np.uint64) + _GOLDEN, checksums[filled]
    high = _mixed(checksum ^ _mixed(number, *_SPLITMIX), *_SPLITMIX)
    low = _mixed(checksum + _mixed(number, *_MURMUR), *_MURMUR)
    # In halves: the carry into the upper 64 bits counts.
    low_sum = (int((low >> np.uint64(32)).sum()) << 32) + int((low & np.uint64(0xFFFFFFFF)).sum())
    return ((int(high.sum()) << 64) + low_sum) & MASK


def _mixed(values: UInt64s, steps: tuple[tuple[int, int], ...], last: int) -> UInt64s:
    """A bijection of 64 bits in which each bit depends on all."""
    for shift, factor in steps:
        values = (values ^ values >> np.uint64(shift)) * np.uint64(factor)
    return values ^ values >> np.uint64(last)
