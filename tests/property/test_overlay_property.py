"""Overlays against the naive model: an image is bytes, a write changes some, a crash takes back what wasn't synced."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from pyroaring import BitMap64

from pitfs.errors import CapacityError
from pitfs.model.overlay import HEADER_BYTES, OverlayHeader
from pitfs.storage.overlay_log import OverlayLog
from pitfs.view.overlay import Overlay, Room
from pitfs.view.overlay_view import NotCachedError, OverlayView
from pitfs.view.view import PointInTimeView, ReadBuffer
from tests.helpers.fake_store import FakeImageStore


class Disk:
    """A kept overlay's two files, what is durable of them, and the model of the image.

    Attributes:
        content: what must be read.
        durable: for each block all contents that may be there after a crash.
    """

    def __init__(self, directory: Path, store: FakeImageStore) -> None:
        info = store.volumes[0]
        self.header = OverlayHeader(b"h" * 16, 7, info)
        self.data, self.index = directory / "data", directory / "index"
        self.data.write_bytes(b"")
        os.truncate(self.data, info.size_bytes)
        self.index.write_bytes(self.header.encode())
        self.below = PointInTimeView(store, store.resolution, 0)  # type: ignore[arg-type]
        self.block_size = info.block_size
        self.content = bytearray(store.image)
        self.durable: dict[int, set[bytes]] = {}
        self.unsynced: list[tuple[int, int]] = []
        self.open()

    def open(self, limit_bytes: int | None = None) -> None:
        self.room = Room(limit_bytes)
        self.log = OverlayLog(str(self.index), self.header)
        fd = os.open(self.data, os.O_RDWR)
        self.overlay = Overlay(fd, "overlay", self.block_size, self.room, self.log)
        self.view = OverlayView(self.below, self.overlay)

    def blocks(self, offset: int, size: int) -> range:
        return range(offset // self.block_size, -(-(offset + size) // self.block_size))

    def block(self, number: int) -> bytes:
        return bytes(self.content[number * self.block_size : (number + 1) * self.block_size])

    def write(self, offset: int, data: bytes) -> None:
        for number in self.blocks(offset, len(data)):
            self.durable.setdefault(number, {self.block(number)})
        try:
            self.view.write(offset, data)
        except NotCachedError:
            edges = self.view.read_edges(offset, len(data), ReadBuffer(0))
            write = self.view.prepare(offset, data, edges)
            self.overlay.store(write)
            self.overlay.stored(write)
        self.content[offset : offset + len(data)] = data
        for number in self.blocks(offset, len(data)):
            self.durable[number].add(self.block(number))

    def sync(self) -> None:
        self.overlay.sync(self.overlay.begin_sync())
        self.durable.clear()

    def crash(self, chance: random.Random) -> None:
        """Loses what isn't durable, or not, block by block; the log may have the torn record of a sync under way."""
        if chance.random() < 0.5:
            size = self.index.stat().st_size
            self.overlay.sync(self.overlay.begin_sync())  # the data are there, the record is torn
            torn = self.index.read_bytes()
            self.overlay.close()
            cut = chance.randrange(size, len(torn) + 1)
            kept = bytearray(torn[:cut])
            if cut > size and chance.random() < 0.5:
                kept[chance.randrange(size, cut)] ^= 1
            self.index.write_bytes(kept)
        else:
            present = BitMap64(self.overlay.blocks)
            self.overlay.close()
            logged = OverlayLog(str(self.index), self.header)
            with self.data.open("r+b") as file:
                for number, contents in self.durable.items():
                    if number in logged.blocks:
                        file.seek(number * self.block_size)
                        file.write(chance.choice(sorted(contents)))
                    elif number in present:  # nobody may look at it
                        file.seek(number * self.block_size)
                        file.write(b"?" * len(self.block(number)))
            logged.close()
        self.open()
        found = self.read(0, len(self.content))
        for number in range(self.header.volume.block_count):
            now = found[number * self.block_size :][: self.block_size]
            assert now in self.durable.get(number, {self.block(number)})
        self.content[:] = found
        self.durable.clear()

    def read(self, offset: int, size: int) -> bytes:
        parts, buffer = [], ReadBuffer()
        while size:
            part = bytes(self.view.read(offset, min(size, 1 << 20), buffer))
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)


@pytest.mark.parametrize("block_size", [512, 4096, 65536])
@pytest.mark.parametrize("seed", range(4))
def test_reads_writes_reopening_and_crashes(block_size: int, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed * 100 + block_size)
    size = chance.choice((block_size * 20, 700_001, 2_000_000 + chance.randrange(block_size)))
    disk = Disk(tmp_path, FakeImageStore(size, block_size, seed))
    buffer = ReadBuffer()
    for _ in range(150):
        offset = chance.randrange(size)
        if chance.random() < 0.5:
            offset -= offset % block_size
        length = min(chance.choice((1, 511, 512, 4096, block_size, 3 * block_size, 300_000)), size - offset)
        choice = chance.random()
        if choice < 0.5:
            disk.write(offset, chance.randbytes(length))
        elif choice < 0.9:
            expected = bytes(disk.content[offset : offset + length])
            assert disk.view.read(offset, length, buffer) == expected
            cached = disk.view.try_read_cached(offset, length, buffer)
            assert cached is None or cached == expected
        elif choice < 0.94:
            disk.sync()
        elif choice < 0.97:
            disk.sync()
            disk.overlay.close()
            disk.open()
        else:
            disk.crash(chance)
    disk.sync()
    assert disk.read(0, size) == disk.content
    disk.overlay.close()


@pytest.mark.parametrize("seed", range(3))
def test_room_is_what_the_blocks_take_and_a_full_scratch_keeps_all_of_it(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    disk = Disk(tmp_path, FakeImageStore(1_000_000, 4096, seed))
    disk.room.limit_bytes = 30 * 4096
    refused = 0
    for _ in range(300):
        offset = chance.randrange(1_000_000)
        data = chance.randbytes(min(chance.choice((100, 4096, 20_000)), 1_000_000 - offset))
        try:
            disk.write(offset, data)
        except CapacityError:
            refused += 1
        assert disk.room.used_bytes == len(disk.overlay.blocks) * 4096 <= 30 * 4096
    assert refused and disk.read(0, 1_000_000) == disk.content
    disk.overlay.close()
    assert disk.index.stat().st_size == HEADER_BYTES
