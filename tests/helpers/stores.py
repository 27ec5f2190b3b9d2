"""Feeds transfers to a store, and reads images the plain way: block by block, every checksum compared."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError
from pitfs.model.transfer import Begin, Checkpoint, Data, Park, ResumePoint, TransferFrame, Welcome
from pitfs.store.ingest import Ingest
from pitfs.store.store import Resolution, Store
from tests.helpers.transfers import Transfer


def object_files(store: str | os.PathLike[str], pattern: str = "*") -> list[Path]:
    """Files of objects, whatever folder they are in, by name."""
    found = [path for path in Path(store, "objects").rglob(pattern) if path.is_file()]
    return sorted(found, key=lambda path: path.name)


def feed(ingest: Ingest, frame: TransferFrame) -> ResumePoint | Welcome | None:
    """Gives one frame to the method that takes it."""
    if isinstance(frame, Begin):
        return ingest.begin(frame.manifest)
    if isinstance(frame, Data):
        ingest.data(frame)
        return None
    if isinstance(frame, Checkpoint):
        return ingest.checkpoint(frame.cursor)
    if isinstance(frame, Park):
        return ingest.park(frame.cursor)
    return ingest.end(frame)


def ingest_transfer(ingest: Ingest, transfer: Transfer, seed: int = 0) -> Welcome:
    """The whole of it, layers too, in frames of random sizes, from where the store resumes."""
    random = np.random.default_rng([seed, transfer.manifest.mark])
    for each in (transfer, *transfer.layers):
        resumed = ingest.begin(each.manifest)
        for frame in each.frames(random, resumed.lengths, interleave=bool(random.integers(2))):
            if not isinstance(frame, Begin):
                feed(ingest, frame)
    return ingest.welcome()


def read_image(store: Store, resolution: Resolution, volume: int) -> bytes:
    """A volume at an instant.

    Raises:
        CorruptionError: a block isn't what its checksum says.
    """
    info = store.volumes[volume]
    image = bytearray()
    for leaf in range(-(-info.block_count // 512)):
        pointers, checksums = store.leaf(resolution, volume, leaf)
        count = min(512, info.block_count - leaf * 512)
        for pointer, checksum in zip(pointers[:count].tolist(), checksums[:count].tolist(), strict=True):
            if not pointer:
                image += bytes(info.block_size)
                continue
            layout = store.objects.layout
            fd = store.objects.fd(layout.object_of(pointer))
            offset = layout.offset_of(pointer)
            block = os.pread(fd, info.block_size, fd.base + offset)
            if xxh3_64_intdigest(block) != checksum:
                raise CorruptionError(str(layout.object_of(pointer)), offset, "a block")
            image += block
    return bytes(image[: info.size_bytes])
