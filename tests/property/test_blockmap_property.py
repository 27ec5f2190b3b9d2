"""The block map against a plain dictionary, over generations that share nodes."""

from __future__ import annotations

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from pitfs.model.blockmap import (
    EMPTY,
    FANOUT,
    BlockMap,
    MapBuilder,
    MapEntry,
    Node,
    tree_depth,
)


class Nodes:
    """Nodes in memory; a wrong checksum is a failure, as is one that changes later."""

    def __init__(self) -> None:
        self.nodes: list[bytes] = []

    def emit(self, node: Node) -> int:
        self.nodes.append(node.tobytes())
        return len(self.nodes)

    def load(self, pointer: int, checksum: int) -> Node:
        data = self.nodes[pointer - 1]
        assert xxh3_64_intdigest(data) == checksum
        return np.frombuffer(data, "<u8").reshape(2, FANOUT)


def as_dictionary(nodes: Nodes, root: MapEntry, block_count: int) -> dict[int, tuple[int, int]]:
    found = {}
    for leaf_index in range(-(-block_count // FANOUT)):
        leaf = BlockMap(root, block_count, nodes.load).leaf(leaf_index)
        for slot in np.flatnonzero(leaf[0]).tolist():
            found[leaf_index * FANOUT + slot] = (int(leaf[0, slot]), int(leaf[1, slot]))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_each_generation_keeps_its_own_state(seed: int) -> None:
    random = np.random.default_rng(seed)
    block_count = int(random.choice([1, 511, 512, 513, 5_000, 262_144, 262_145, 600_000]))
    nodes, root, model = Nodes(), EMPTY, dict[int, tuple[int, int]]()
    generations = []
    for _ in range(6):
        builder = MapBuilder(block_count, root, nodes.load, nodes.emit)
        count = int(random.integers(0, min(block_count, 3_000) + 1))
        blocks = np.unique(random.integers(0, block_count, count)).astype("<i8")
        pointers = random.integers(1, 1 << 63, len(blocks)).astype("<u8")
        checksums = random.integers(0, 1 << 63, len(blocks)).astype("<u8")
        zeros = random.random(len(blocks)) < 0.3
        pointers[zeros] = checksums[zeros] = 0
        for part in np.array_split(np.arange(len(blocks)), int(random.integers(1, 9))):
            builder.update(blocks[part], pointers[part], checksums[part])
        root = builder.finish()
        model = model | {
            block: (pointer, checksum)
            for block, pointer, checksum in zip(
                blocks.tolist(), pointers.tolist(), checksums.tolist(), strict=True
            )
        }
        model = {block: entry for block, entry in model.items() if entry[0]}
        generations.append((root, dict(model)))
    for generation, wanted in generations:
        assert as_dictionary(nodes, generation, block_count) == wanted
        used = sorted({block // FANOUT for block in wanted})
        for first in range(-(-block_count // FANOUT) + 2):
            later = next((leaf for leaf in used if leaf >= first), None)
            assert BlockMap(generation, block_count, nodes.load).next_leaf(first) == later


def test_the_next_leaf_of_a_huge_volume_is_found_by_two_paths_at_most() -> None:
    nodes, block_count = Nodes(), 1 << 36
    builder = MapBuilder(block_count, EMPTY, nodes.load, nodes.emit)
    blocks = np.array([3, 1 << 27, (1 << 36) - 1], "<i8")
    builder.update(blocks, np.array([1, 2, 3], "<u8"), np.array([4, 5, 6], "<u8"))
    root, reads = builder.finish(), list[int]()

    def load(pointer: int, checksum: int) -> Node:
        reads.append(pointer)
        return nodes.load(pointer, checksum)

    tree = BlockMap(root, block_count, load)
    leaves, first = [], tree.next_leaf(0)
    while first is not None:
        leaves.append(first)
        first = tree.next_leaf(first + 1)
    assert leaves == (blocks // FANOUT).tolist()
    assert len(reads) <= 4 * 2 * tree_depth(block_count)


@pytest.mark.parametrize("seed", range(8))
def test_differences_are_found_in_the_leaves_that_have_them(seed: int) -> None:
    random = np.random.default_rng(seed)
    nodes, block_count = Nodes(), 512 * 600
    roots, entries = [], []
    base, table = EMPTY, dict[int, int]()
    for _ in range(3):  # generations, each on the one before
        blocks = np.unique(random.integers(0, block_count, 12))
        values = random.integers(0, 3, len(blocks)).astype("<u8")
        builder = MapBuilder(block_count, base, nodes.load, nodes.emit)
        builder.update(blocks, values, values)
        base, table = builder.finish(), table | dict(zip(blocks.tolist(), values.tolist(), strict=True))
        roots.append(base)
        entries.append(table)
    for one in range(3):
        for other in range(3):
            both = entries[one].keys() | entries[other].keys()
            wanted = {b // FANOUT for b in both if entries[one].get(b, 0) != entries[other].get(b, 0)}
            found, first, reads = set[int](), 0, list[int]()

            def load(pointer: int, checksum: int, reads: list[int] = reads) -> Node:
                reads.append(pointer)
                return nodes.load(pointer, checksum)

            trees = [BlockMap(roots[each], block_count, load) for each in (one, other)]
            while (leaf := trees[0].next_difference(trees[1], first)) is not None:
                assert leaf >= first
                found.add(leaf)
                first = leaf + 1
            # The same nodes may stand at two places: then a leaf may differ by its place alone.
            assert wanted <= found
            assert len(reads) <= (len(found) + 1) * 4 * (tree_depth(block_count) - 1)


def test_one_block_makes_one_node_for_each_level_and_shares_the_rest() -> None:
    nodes, block_count = Nodes(), 300_000
    every = np.arange(block_count, dtype="<i8")
    builder = MapBuilder(block_count, EMPTY, nodes.load, nodes.emit)
    builder.update(every, every.astype("<u8") + 1, every.astype("<u8"))
    root = builder.finish()
    before = len(nodes.nodes)
    assert before == 586 + 2 + 1
    builder = MapBuilder(block_count, root, nodes.load, nodes.emit)
    builder.update(every[1000:1001], np.array([7], "<u8"), np.array([8], "<u8"))
    builder.finish()
    assert len(nodes.nodes) == before + tree_depth(block_count) == before + 3


def test_a_map_of_which_all_blocks_become_zeros_is_empty_again() -> None:
    nodes, blocks = Nodes(), np.array([5, 600, 262_143], "<i8")
    builder = MapBuilder(262_144, EMPTY, nodes.load, nodes.emit)
    builder.update(blocks, np.array([1, 2, 3], "<u8"), np.array([4, 5, 6], "<u8"))
    root = builder.finish()
    assert root != EMPTY
    builder = MapBuilder(262_144, root, nodes.load, nodes.emit)
    builder.update(blocks, np.zeros(3, "<u8"), np.zeros(3, "<u8"))
    assert builder.finish() == EMPTY


def test_nothing_updated_is_the_same_map() -> None:
    root = MapEntry(5, 6)
    assert MapBuilder(10, root, Nodes().load, Nodes().emit).finish() == root


@pytest.mark.parametrize(
    ("block_count", "depth"), [(1, 1), (512, 1), (513, 2), (512**2, 2), (512**2 + 1, 3), (2**36, 4)]
)
def test_depth_follows_from_the_block_count(block_count: int, depth: int) -> None:
    assert tree_depth(block_count) == depth
