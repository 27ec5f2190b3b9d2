"""Overlays: the bytes of their log, what a torn and a damaged one mean, and what a failing disk does to them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pyroaring import BitMap64
from xxhash import xxh3_64_intdigest

from pitfs.errors import CapacityError, CorruptionError, PitfsError, StoreVersionError
from pitfs.model.overlay import (
    HEADER_BYTES,
    MAX_RUNS,
    RECORD,
    RUN_BYTES,
    OverlayHeader,
    decode_record,
    encode_records,
    runs_of,
    runs_within,
)
from pitfs.model.transfer import VolumeInfo
from pitfs.storage.overlay_log import OverlayLog
from pitfs.view import overlay as overlay_module
from pitfs.view.overlay import Overlay, Room
from pitfs.view.overlay_view import OverlayView
from pitfs.view.view import PointInTimeView, ReadBuffer
from tests.helpers.fake_store import FakeImageStore

GOLDEN = Path(__file__).parents[1] / "golden" / "overlay-log.hex"
SIZE = 1_000_001
HEADER = OverlayHeader(bytes(range(16)), 7, VolumeInfo("root", SIZE, 4096))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "index"
    path.write_bytes(HEADER.encode())
    return path


def append(path: Path, *blocks: list[int]) -> None:
    log = OverlayLog(str(path), HEADER)
    for each in blocks:
        log.append(BitMap64(each))
    log.close()


def blocks_in(path: Path, header: OverlayHeader = HEADER) -> list[int]:
    log = OverlayLog(str(path), header)
    log.close()
    return list(log.blocks)


def test_the_log_has_the_golden_bytes(log: Path) -> None:
    append(log, [0, 1, 2, 244], [100])
    assert log.read_bytes() == bytes.fromhex(GOLDEN.read_text("ascii"))
    assert blocks_in(log) == [0, 1, 2, 100, 244]


def test_runs_are_ascending_and_coalesced() -> None:
    blocks = BitMap64([3, 4, 5, 9, 1 << 40])
    assert runs_of(blocks).tolist() == [[3, 3], [9, 1], [1 << 40, 1]]
    assert runs_of(BitMap64()).shape == (0, 2)
    assert runs_within(blocks, 4, 10) == [(4, 6), (9, 10)]
    assert runs_within(blocks, 6, 9) == []


def test_more_runs_than_a_record_takes_are_several_records() -> None:
    runs = np.column_stack((np.arange(0, 2 * MAX_RUNS + 4, 2), np.ones(MAX_RUNS + 2))).astype(np.uint64)
    records = list(encode_records(runs, 5, 1000))
    assert [len(record) for record in records] == [RECORD.size + n * RUN_BYTES for n in (MAX_RUNS, 2)]
    second = decode_record(records[1], 5, 1000 + len(records[0]), 1 << 20)
    assert second is not None and (second[0] == runs[MAX_RUNS:]).all()


@pytest.mark.parametrize("size", range(1, RECORD.size + 2 * RUN_BYTES))
def test_a_torn_record_is_cut_and_the_next_one_takes_its_place(log: Path, size: int) -> None:
    append(log, [5])
    whole = log.read_bytes()
    append(log, [7, 9])
    os.truncate(log, len(whole) + size)
    assert blocks_in(log) == [5]
    assert log.read_bytes() == whole
    append(log, [8])
    assert blocks_in(log) == [5, 8]


@pytest.mark.parametrize("offset", [HEADER_BYTES, HEADER_BYTES + 5, HEADER_BYTES + 10, HEADER_BYTES + 20])
def test_a_bad_record_before_a_good_one_is_damage(log: Path, offset: int) -> None:
    append(log, [5], [7])
    content = bytearray(log.read_bytes())
    content[offset] ^= 1
    log.write_bytes(content)
    with pytest.raises(CorruptionError, match="a good one behind it"):
        blocks_in(log)


def test_another_images_log_is_refused_and_so_is_a_record_of_one(log: Path, tmp_path: Path) -> None:
    append(log, [5])
    for other in (
        OverlayHeader(bytes(16), 7, VolumeInfo("root", SIZE, 4096)),
        OverlayHeader(HEADER.history, 8, VolumeInfo("root", SIZE, 4096)),
        OverlayHeader(HEADER.history, 7, VolumeInfo("data", SIZE, 4096)),
        OverlayHeader(HEADER.history, 7, VolumeInfo("root", SIZE, 512)),
    ):
        with pytest.raises(CorruptionError, match="another image"):
            blocks_in(log, other)
        foreign = tmp_path / "foreign"
        foreign.write_bytes(other.encode() + log.read_bytes()[HEADER_BYTES:])
        assert blocks_in(foreign, other) == []


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1])
def test_half_a_header_is_damage_and_a_newer_format_is_named(log: Path, size: int) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole[:size])
    with pytest.raises(CorruptionError, match="no header"):
        blocks_in(log)
    newer = bytearray(whole)
    newer[8] = 2
    newer[112:120] = overlay_checksum(bytes(newer[:112]))
    log.write_bytes(newer)
    with pytest.raises(StoreVersionError, match="newer pitfs"):
        blocks_in(log)


def overlay_checksum(head: bytes) -> bytes:
    return xxh3_64_intdigest(head).to_bytes(8, "little")


# ---------------------------------------------------------------- over an image


class Files:
    """`os` as the overlay sees it: some of its calls fail."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}

    def __getattr__(self, name: str) -> object:
        if name in self.failing:

            def fail(*_: object) -> None:
                raise OSError(self.failing[name], os.strerror(self.failing[name]))

            return fail
        return getattr(os, name)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    files = Files()
    monkeypatch.setattr(overlay_module, "os", files)
    monkeypatch.setattr("pitfs.view.overlay_view.os", files)
    monkeypatch.setattr("pitfs.storage.overlay_log.os", files)
    monkeypatch.setattr("pitfs.storage.files.os", files)
    return files


@pytest.fixture
def make(tmp_path: Path, log: Path) -> Iterator[Callable[..., tuple[OverlayView, FakeImageStore]]]:
    overlays = []

    def make(kept: bool = True) -> tuple[OverlayView, FakeImageStore]:
        store = FakeImageStore(SIZE, 4096, seed=1)
        below = PointInTimeView(store, store.resolution, 0)  # type: ignore[arg-type]
        below.read(0, SIZE, ReadBuffer())
        fd = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, SIZE)
        overlay = Overlay(fd, "root at seq 7", 4096, Room(), OverlayLog(str(log), HEADER) if kept else None)
        overlays.append(overlay)
        return OverlayView(below, overlay), store

    yield make
    for overlay in overlays:
        overlay.close()


Make = Callable[..., tuple[OverlayView, FakeImageStore]]


def test_after_a_failed_sync_what_was_written_is_an_error_and_the_rest_of_the_image_is_there(
    make: Make, files: Files
) -> None:
    view, store = make()
    view.write(8192, b"x" * 4096)
    files.failing["fdatasync"] = errno.EIO
    begun = view.overlay.begin_sync()
    with pytest.raises(OSError):
        view.overlay.sync(begun)
    view.overlay.unsynced(begun)
    files.failing.clear()
    buffer = ReadBuffer()
    for attempt in (
        lambda: view.read(8192, 4096, buffer),
        lambda: view.read(0, 65536, buffer),
        lambda: view.try_read_cached(8192, 4096, buffer),
        lambda: view.write(0, b"y"),
        lambda: view.overlay.sync(view.overlay.begin_sync()),
    ):
        with pytest.raises(PitfsError, match="a sync failed"):
            attempt()
    assert view.read(65536, 65536, buffer) == store.image[65536 : 2 * 65536]


def test_a_log_without_room_is_tried_again(make: Make, files: Files, log: Path) -> None:
    view, _ = make()
    view.write(8192, b"x" * 4096)
    files.failing["pwrite"] = errno.ENOSPC
    begun = view.overlay.begin_sync()
    with pytest.raises(CapacityError):
        view.overlay.sync(begun)
    view.overlay.unsynced(begun)
    files.failing.clear()
    assert view.read(8192, 4096, ReadBuffer()) == b"x" * 4096
    view.overlay.sync(view.overlay.begin_sync())
    assert blocks_in(log) == [2]


def test_a_write_that_finds_no_room_changes_nothing(make: Make, files: Files) -> None:
    view, store = make(kept=False)
    files.failing["pwrite"] = errno.ENOSPC
    with pytest.raises(OSError):
        view.write(4000, b"x" * 10_000)
    assert view.overlay.room.used_bytes == 0
    assert view.read(0, SIZE, ReadBuffer()) == store.image


def test_where_the_filesystem_cannot_tell_what_is_cached_reads_wait(make: Make, files: Files) -> None:
    view, _ = make(kept=False)
    view.write(8192, b"x" * 4096)
    buffer = ReadBuffer()
    files.failing["preadv"] = errno.EOPNOTSUPP
    assert view.try_read_cached(8192, 4096, buffer) is None
    files.failing.clear()
    assert view.try_read_cached(8192, 4096, buffer) is None
    assert view.try_read_cached(0, 65536, buffer) is None
    assert view.read(8192, 4096, buffer) == b"x" * 4096


def test_a_damaged_block_below_is_no_harm_once_it_is_written_whole(make: Make) -> None:
    view, store = make(kept=False)
    blocks = [number for number in range(16) if store.pointers[number]]
    damaged = blocks[1]
    pointer = int(store.pointers[damaged])
    store.objects.overwrite(pointer >> 36, (pointer & (1 << 36) - 1) * 512, b"damage")
    buffer = ReadBuffer()
    with pytest.raises(CorruptionError):
        view.write(damaged * 4096 + 1, b"part of it")
    assert view.overlay.room.used_bytes == 0
    view.write(damaged * 4096, b"z" * 4096)
    expected = bytearray(store.image[: 16 * 4096])
    expected[damaged * 4096 : (damaged + 1) * 4096] = b"z" * 4096
    assert view.try_read_cached(0, 16 * 4096, buffer) is None
    assert view.read(0, 16 * 4096, buffer) == expected
    view.write(damaged * 4096 + 1, b"part of it")


def test_an_index_that_grows_too_large_is_a_full_scratch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay_module, "MAX_INDEX_BYTES", 100)
    monkeypatch.setattr(overlay_module, "UNMEASURED_BLOCKS", 64)
    view, _ = make(kept=False)
    with pytest.raises(CapacityError, match="index"):
        for block in range(0, 240, 2):
            view.write(block * 4096, b"x" * 4096)
    assert view.overlay.room.used_bytes == len(view.overlay.blocks) * 4096
