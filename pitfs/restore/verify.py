"""Compares the image of a snapshot with the digest that production took of the volume there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from pitfs.errors import CorruptionError
from pitfs.model.digest import MASK, digest_of, zero_checksum
from pitfs.model.record import block_checksums
from pitfs.restore.digest import READ_BYTES, Progress
from pitfs.store.catalog.records import Snapshot
from pitfs.store.pins.pins import Pins
from pitfs.store.store import Store
from pitfs.view.view import PointInTimeView, ReadBuffer

PORTION_BYTES: Final = 16 << 20  # of which the checksums are gathered


@dataclass(frozen=True, slots=True)
class Verified:
    """What became of a volume.

    `snapshot`: that was compared, None without a digest; `problem`: empty if it is equal. `is_unreadable`: damaged.
    """

    volume: str
    snapshot: Snapshot | None
    problem: str
    is_unreadable: bool = False


def verify_volume(store: Store, pins: Pins, volume: int, time_ns: int, progress: Progress) -> Verified:
    """Compares a volume at the newest snapshot not after that time that has a digest.

    Raises PitfsError: it can't be read (but for damage, which is a problem).
    """
    name = store.volumes[volume].name
    found = store.digest(volume, time_ns)
    if found is None:
        return Verified(name, None, "no snapshot up to then has one: none was sent, or it was pruned")
    snapshot, expected = found
    resolution = pins.pinned(store, store.at_seq(snapshot.seq))
    try:
        digest = volume_digest(PointInTimeView(store, resolution, volume), progress, f"verify {name}")
    except CorruptionError as error:
        return Verified(name, snapshot, str(error), is_unreadable=True)
    finally:
        pins.unpin(resolution.seq)
    return Verified(name, snapshot, "" if digest == expected else f"digest {digest:032x}, production's {expected:032x}")


def volume_digest(view: PointInTimeView, progress: Progress, title: str) -> int:
    """`model.digest` of an image, of the contents as they are on the disk.

    Raises:
        CorruptionError: a block doesn't match the checksum of its pointer either.
    """
    buffer, size, total = ReadBuffer(READ_BYTES), view.block_size, 0
    zeros = zero_checksum(size)
    with progress(title, view.size_bytes) as reached:
        for start, end in view.data_ranges():
            for first in range(start, end, PORTION_BYTES):
                found = list[int]()
                for offset in range(first, min(first + PORTION_BYTES, end), READ_BYTES):
                    data = view.read(offset, min(READ_BYTES, end - offset), buffer)
                    rest = bytes(-len(data) % size)  # of the last block of the volume: padded with zeros
                    found += block_checksums(bytes(data) + rest if rest else data, size)
                    reached(offset + len(data))
                checksums = np.array(found, dtype=np.uint64)
                checksums[checksums == zeros] = 0
                total += digest_of(first // size + np.arange(len(found)), checksums)
    return total & MASK
