"""Reading an image: every path gives the same bytes, or an error, never others."""

from __future__ import annotations

import errno
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pitfs.errors import CorruptionError, PitfsError
from pitfs.store.objects.format import VERSION_1, ObjectHeader, ObjectKind, ObjectName
from pitfs.store.objects.pool import Descriptor, ObjectPool
from pitfs.view import view as view_module
from pitfs.view.view import PointInTimeView, ReadBuffer, TableCache
from tests.helpers.fake_store import FakeImageStore, FakeObjects


class PooledObjects(FakeObjects):
    """Objects of which some aren't open: asking for one of these opens it."""

    def __init__(self, objects: FakeObjects) -> None:
        self._fds, objects._fds = objects._fds, {}
        self.cold: set[int] = set()
        self.opened_now: list[int] = []

    def fd(self, number: int) -> Descriptor:
        if number in self.cold:
            self.opened_now.append(number)
            self.cold.remove(number)
        return super().fd(number)

    def opened(self, number: int) -> Descriptor | None:
        return None if number in self.cold else self._fds.get(number)


class ImageStore(FakeImageStore):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.objects: PooledObjects = PooledObjects(self.objects)


def make(size: int = 3_000_001, block_size: int = 4096, **more: Any) -> tuple[PointInTimeView, ImageStore]:
    store = ImageStore(size, block_size, seed=7, **more)
    return PointInTimeView(store, store.resolution, 0), store  # type: ignore[arg-type]


@pytest.mark.parametrize("block_size", [512, 4096, 65536])
@pytest.mark.parametrize("size", [1, 512, 4095, 300_000, 3_000_001])
def test_reads_give_the_image(block_size: int, size: int) -> None:
    view, store = make(size, block_size)
    chance = random.Random(size + block_size)
    buffer = ReadBuffer()
    for _ in range(60):
        offset = chance.randrange(size + 10)
        count = chance.choice([1, 511, 512, 4096, block_size, 100_000, 1 << 20])
        if chance.random() < 0.5:
            offset -= offset % 4096
        expected = store.image[offset : offset + count]
        assert view.read(offset, count, buffer) == expected
        cached = view.try_read_cached(offset, count, buffer)
        assert cached is not None and cached == expected


def test_a_read_at_or_behind_the_end_is_empty() -> None:
    view, _ = make(5000)
    buffer = ReadBuffer()
    assert view.read(5000, 10, buffer) == b""
    assert view.try_read_cached(8192, 4096, buffer) == b""
    assert view.read(0, 0, buffer) == b""
    assert view.try_read_cached(4096, 4096, buffer) in (None, view.read(4096, 4096, buffer))


def test_what_is_not_resolved_yet_is_not_read_inline() -> None:
    view, store = make()
    buffer = ReadBuffer()
    assert view.try_read_cached(0, 4096, buffer) is None
    assert view.try_read_cached(0, 100_000, buffer) is None
    assert store.loads == 0
    view.read(0, 1, buffer)
    assert view.try_read_cached(8192, 4096, buffer) == store.image[8192:12288]
    assert store.loads == 1


@pytest.mark.parametrize("size", [4096, 100_000])
def test_an_object_that_is_not_open_is_not_opened_inline(size: int) -> None:
    view, store = make(zeros=0.0, neighbours=1.0)
    buffer = ReadBuffer()
    view.read(0, 1, buffer)
    store.objects.cold = {2}
    assert view.try_read_cached(0, size, buffer) is None
    assert store.objects.opened_now == []
    assert view.read(0, size, buffer) == store.image[:size]
    assert store.objects.opened_now == [2]
    assert view.try_read_cached(0, size, buffer) == store.image[:size]


def make_pool(path: Path, count: int, limit: int) -> ObjectPool:
    """A pool of `count` objects; byte 4096 of each is its number's."""
    for number in range(count):
        header = ObjectHeader(ObjectKind.SNAPSHOT_BLOCKS, b"h" * 16, number)
        (path / ObjectName(header.kind, number).file).write_bytes(header.encode() + bytes([number]))
    return ObjectPool(str(path), VERSION_1, b"h" * 16, limit)


def test_a_descriptor_is_good_as_long_as_somebody_holds_it(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, 200, limit=4)
    held = pool.fd(2 * 7)
    for _ in range(2):
        for number in range(200):
            assert os.pread(pool.fd(2 * number), 1, 4096) == bytes([number])
    assert pool.opened(2 * 7) is None
    assert os.pread(held, 1, 4096) == bytes([7])
    pool.close()
    assert os.pread(held, 1, 4096) == bytes([7])


def test_no_more_descriptors_stay_open_than_the_limit_says(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, 50, limit=4)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        pool.fd(2 * number)
    assert len(os.listdir("/proc/self/fd")) == before + 4
    assert [number for number in range(50) if pool.opened(2 * number) is not None] == [46, 47, 48, 49]
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_object_that_opens_slowly_keeps_no_other_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(tmp_path, 2, limit=4)
    real, opening, go_on = os.open, threading.Event(), threading.Event()

    def slow(path: str, *more: Any) -> int:
        if path.endswith(ObjectName(ObjectKind.SNAPSHOT_BLOCKS, 0).file) and not opening.is_set():
            opening.set()
            assert go_on.wait(60)
        return real(path, *more)

    monkeypatch.setattr(os, "open", slow)
    with ThreadPoolExecutor(2) as threads:
        try:
            first = threads.submit(pool.fd, 0)
            assert opening.wait(60)
            assert os.pread(threads.submit(pool.fd, 2).result(60), 1, 4096) == b"\1"
            faster = threads.submit(pool.fd, 0).result(60)  # while the first one is still opening it
        finally:
            go_on.set()
        assert first.result(60) is faster is pool.opened(0)
    pool.close()


def test_zeros_replace_what_the_buffer_held() -> None:
    view, store = make(zeros=1.0)
    buffer = ReadBuffer()
    buffer.memory[:] = b"x" * len(buffer.memory)
    assert view.read(100, 1 << 20, buffer) == bytes(1 << 20)
    assert view.try_read_cached(4096, 4096, buffer) == bytes(4096)


def test_a_flipped_bit_is_an_error_for_its_block_only() -> None:
    view, store = make(zeros=0.0, neighbours=1.0)
    buffer = ReadBuffer()
    view.read(0, 1, buffer)
    store.objects.overwrite(2, 5 * 4096 + 77, bytes([store.image[5 * 4096 + 77] ^ 4]))
    for read in (view.read, view.try_read_cached):
        with pytest.raises(CorruptionError, match=r"snapshot-0000000000000001\.blocks.*24576.*block 5 of volume root"):
            read(5 * 4096, 4096, buffer)
        with pytest.raises(CorruptionError, match="block 5 of volume root"):
            read(0, 100_000, buffer)
        assert read(4 * 4096, 4096, buffer) == store.image[4 * 4096 : 5 * 4096]
        assert read(6 * 4096, 90_000, buffer) == store.image[6 * 4096 : 6 * 4096 + 90_000]


def test_an_object_that_ends_too_early_is_an_error() -> None:
    view, store = make(zeros=0.0, neighbours=1.0)
    os.ftruncate(store.objects.fd(2), 4096 + 10 * 4096 + 100)
    buffer = ReadBuffer()
    assert view.read(0, 40_960, buffer) == store.image[:40_960]
    assert view.try_read_cached(40_960, 4096, buffer) is None
    for offset in (40_960, 0):
        with pytest.raises(CorruptionError, match="the object ends"):
            view.read(offset, 100_000, buffer)


def test_errors_of_the_disk_name_object_and_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    view, _ = make(zeros=0.0, neighbours=1.0)
    buffer = ReadBuffer()
    view.read(0, 1, buffer)

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(view_module.os, "preadv", broken)
    for read in (view.read, view.try_read_cached):
        for size in (4096, 100_000):
            with pytest.raises(PitfsError, match=r"objects/snapshot-\w+\.blocks: reading at byte 4096: Input/output"):
                read(0, size, buffer)


@pytest.mark.parametrize("size", [4096, 100_000])
def test_what_would_wait_is_left_to_a_thread(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    view, store = make(zeros=0.0)
    buffer = ReadBuffer()
    view.read(0, 1, buffer)
    real, seen = os.preadv, []

    def cold(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        seen.append(flags)
        if flags:
            raise BlockingIOError(errno.EAGAIN, "cold")
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(view_module.os, "preadv", cold)
    assert view.try_read_cached(0, size, buffer) is None
    assert view.read(0, size, buffer) == store.image[:size]
    assert seen[0] == os.RWF_NOWAIT


def test_a_filesystem_that_can_not_tell_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    view, store = make(zeros=0.0)
    buffer = ReadBuffer()
    view.read(0, 1, buffer)
    asked = []

    def unsupported(*_: Any) -> int:
        asked.append(1)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(view_module.os, "preadv", unsupported)
    for _ in range(5):
        assert view.try_read_cached(0, 4096, buffer) is None
        assert view.try_read_cached(0, 100_000, buffer) is None
    assert len(asked) == 1


def test_a_short_count_from_the_kernel_is_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    view, store = make(zeros=0.0, neighbours=1.0)
    real = os.preadv
    monkeypatch.setattr(
        view_module.os, "preadv", lambda fd, b, o, flags: real(fd, (b[0][: min(len(b[0]), 1000)],), o, flags)
    )
    assert view.read(0, 50_000, ReadBuffer()) == store.image[:50_000]


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.98, 1.0])
def test_data_ranges_cover_all_that_is_not_zero(zeros: float) -> None:
    view, store = make(zeros=zeros)
    image = bytearray(len(store.image))
    last = -1
    for start, end in view.data_ranges():
        assert last < start < end <= len(image)  # ascending, not even touching
        image[start:end] = store.image[start:end]
        last = end
    assert image == store.image


def test_the_table_cache_is_bounded() -> None:
    cache = TableCache(max_bytes=8 * 8192)
    first, second = cache.new_view(), cache.new_view()
    table: Any = (None, None)
    for leaf in range(8):
        cache.put(first + leaf, table)
    cache.put(second, table)
    assert len(cache) == 8
    assert cache.get(first) is None
    assert cache.get(first + 1) is table
    assert cache.get(second) is table
