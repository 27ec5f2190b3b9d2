"""What a sequential reader of cold data asks for before it needs it."""

from __future__ import annotations

import itertools
import random

import numpy as np

from pitfs.model.transfer import UNIT_BYTES
from pitfs.store.objects.format import HEADER_BYTES, VERSION_1
from pitfs.view.readahead import AHEAD_BYTES, GAP_BYTES, LEAST_BYTES, NEVER, Sequence, ranges_of

MIB = 1 << 20
SIZE = 64 * MIB


def test_ranges_cover_every_block_once_and_join_what_is_near() -> None:
    chance = random.Random(5)
    for units in (1, 8, 128):
        places = sorted({(chance.randrange(1, 4), chance.randrange(400) * units) for _ in range(150)})
        pointers = [number << VERSION_1.unit_bits | unit for number, unit in places] + [0, 0]
        chance.shuffle(pointers)
        found = list(ranges_of(np.array(pointers, np.uint64), units, VERSION_1))
        assert found == sorted(found)
        covered = {}
        for number, position, size in found:
            for byte in range(position, position + size, units * UNIT_BYTES):
                assert covered.setdefault((number, byte), True)
        assert {(number, HEADER_BYTES + unit * UNIT_BYTES) for number, unit in places} <= set(covered)
        for (number, position, size), (other, behind, _) in itertools.pairwise(found):
            assert number != other or behind - (position + size) > GAP_BYTES
    assert list(ranges_of(np.zeros(512, np.uint64), 8, VERSION_1)) == []


def test_the_second_read_in_a_row_prefetches_and_each_byte_is_prefetched_once() -> None:
    sequence = Sequence(SIZE)
    assert sequence.next(0, MIB) == (0, MIB)
    assert sequence.prefetch_from == NEVER
    asked = sequence.next(MIB, MIB)
    assert asked == (MIB, 2 * MIB + AHEAD_BYTES)
    while sequence.prefetch_from < SIZE:
        start, end = sequence.next(sequence.prefetch_from, MIB)
        assert start == asked[1] and end - start <= AHEAD_BYTES
        asked = start, end
    assert asked[1] == SIZE


def test_overtaking_requests_are_still_a_sequence() -> None:
    sequence = Sequence(SIZE)
    sequence.next(MIB, MIB)
    assert sequence.next(0, MIB)[1] == MIB + AHEAD_BYTES


def test_reads_here_and_there_or_small_ones_prefetch_only_themselves() -> None:
    sequence = Sequence(SIZE)
    for offset in (0, 20 * MIB, 50 * MIB, 30 * MIB, 0):
        assert sequence.next(offset, MIB) == (offset, offset + MIB)
    for offset in range(0, MIB, 4096):
        assert sequence.next(offset, LEAST_BYTES - 1) == (offset, offset + LEAST_BYTES - 1)
    sequence.next(MIB, MIB)
    sequence.next(2 * MIB, MIB)
    assert sequence.prefetch_from < SIZE
    assert sequence.next(40 * MIB, MIB) == (40 * MIB, 41 * MIB)  # somewhere else
    assert sequence.prefetch_from == NEVER


def test_nothing_behind_the_end_is_prefetched() -> None:
    sequence = Sequence(SIZE)
    for offset in range(SIZE - 4 * MIB, SIZE, MIB):
        start, end = sequence.next(offset, 2 * MIB)
        assert offset <= start <= end <= SIZE
