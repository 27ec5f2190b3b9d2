"""Damage that no checksum of a store tells of."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.model.blockmap import CHECKSUMS, FANOUT, FANOUT_BITS, NODE_BYTES, POINTERS, tree_depth
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind, ObjectName
from pitfs.store.store import Store


def flip_with_checksums(path: str, snapshot_id: int, volume: int, block: int) -> None:
    """Flips a bit of a block at a snapshot; leaf, inner nodes and the catalog's root are made to fit."""
    store, catalog = Store.open(path), Catalog(os.path.join(path, "catalog.sqlite"), "write")
    info, layout = store.volumes[volume], store.objects.layout
    roots = catalog.roots(snapshot_id)
    pointer, above = roots[volume].pointer, list[tuple[Path, int, int]]()  # file and offset of each node, and the slot
    for level in reversed(range(tree_depth(info.block_count))):
        file = Path(store.objects.path_of(ObjectName(ObjectKind.MAP, layout.object_of(pointer))))
        offset, slot = HEADER_BYTES + layout.unit_of(pointer) * NODE_BYTES, block >> FANOUT_BITS * level & FANOUT - 1
        above.append((file, offset, slot))
        node = np.frombuffer(file.read_bytes()[offset : offset + NODE_BYTES], "<u8").reshape(2, FANOUT)
        pointer = node[POINTERS, slot].item()
    assert pointer, "a block of zeros can't be flipped"
    content = Path(store.objects.path_of(ObjectName.of_number(layout.object_of(pointer))))
    data, at = bytearray(content.read_bytes()), layout.offset_of(pointer)
    data[at + 17] ^= 4
    content.write_bytes(data)
    checksum = xxh3_64_intdigest(data[at : at + info.block_size])
    for file, offset, slot in reversed(above):
        data = bytearray(file.read_bytes())
        np.frombuffer(data, "<u8", 2 * FANOUT, offset).reshape(2, FANOUT)[CHECKSUMS, slot] = checksum
        checksum = xxh3_64_intdigest(data[offset : offset + NODE_BYTES])
        file.write_bytes(data)
    with catalog.changes():
        catalog.delete("roots", "snapshot", snapshot_id)
        for index, root in enumerate(roots):
            row = snapshot_id, index, root.pointer, checksum if index == volume else root.checksum
            catalog.put("roots", row)
    catalog.close()
    store.close()
