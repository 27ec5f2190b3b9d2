"""The digest of a volume: its golden values, that it follows changes, and what it notices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from pitfs.model.digest import MASK, digest_of, zero_checksum

M64 = (1 << 64) - 1


def naive_mix(block: int, checksum: int) -> int:
    """Written out, of Python's numbers."""
    golden = 0x9E3779B97F4A7C15

    def splitmix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
        x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
        return x ^ x >> 31

    def murmur(x: int) -> int:
        x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & M64
        x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & M64
        return x ^ x >> 33

    number = block + golden & M64
    return splitmix(checksum ^ splitmix(number)) << 64 | murmur(checksum + murmur(number) & M64)


def digest(pairs: dict[int, int]) -> int:
    blocks, checksums = np.array(list(pairs), dtype=np.int64), np.array(list(pairs.values()), dtype=np.uint64)
    return digest_of(blocks, checksums)


checksums = st.dictionaries(st.integers(0, 1 << 40), st.integers(0, M64), max_size=40)


@given(checksums)
def test_is_the_sum_of_the_mixes_of_blocks_that_are_not_zeros(pairs: dict[int, int]) -> None:
    expected = sum(naive_mix(block, checksum) for block, checksum in pairs.items() if checksum)
    assert digest(pairs) == expected & MASK


@given(checksums, checksums)
def test_a_block_is_replaced_by_a_subtraction_and_an_addition(before: dict[int, int], changed: dict[int, int]) -> None:
    replaced = {block: before.get(block, 0) for block in changed}
    assert (digest(before) - digest(replaced) + digest(changed)) & MASK == digest(before | changed)


def test_the_carry_between_its_halves_counts() -> None:
    pairs = {block: block * 7919 + 1 for block in range(10_000)}
    assert digest(pairs) == sum(naive_mix(*pair) for pair in pairs.items()) & MASK


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({}, "00000000000000000000000000000000"),
        ({0: 1}, "9e0160293a33aaf78d82751399f55d54"),
        ({1: 0, 7: zero_checksum(4096)}, "a02115436b0e297436c23c4442d503ad"),
        ({block: xxh3_64_intdigest(bytes([block])) for block in range(256)}, "963f7e191affb8e75731923dae35d84c"),
    ],
)
def test_golden_values(pairs: dict[int, int], expected: str) -> None:
    assert f"{digest(pairs):032x}" == expected


def test_notices_blocks_that_were_exchanged_moved_or_doubled() -> None:
    pairs = {block: xxh3_64_intdigest(bytes([block])) for block in range(64)}
    others = [
        pairs | {3: pairs[4], 4: pairs[3]},
        {block + 1: checksum for block, checksum in pairs.items()},
        pairs | {64: pairs[0]},
        pairs | {5: 0},
        pairs | {5: pairs[5] ^ 1},
    ]
    assert len({digest(each) for each in [pairs, *others]}) == 6
