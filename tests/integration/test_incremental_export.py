"""`pitfs export --from`: an earlier export is updated to another instant, or refused; a mix is no image."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pitfs.cli.common.progress import progress
from pitfs.model.position import Position, format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.restore import incremental_export as updating
from pitfs.restore.incremental_export import Marker
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers.commands import said
from tests.helpers.loops import LoopDevice
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

VOLUMES = (
    VolumeInfo("root", 3_300_001, 4096),
    VolumeInfo("data", 12_345, 512),
    VolumeInfo("tiny", 300, 512),
    VolumeInfo("large", 10 * 65536, 65536),
)
SEQS = (0, 8, 20, 35, 44, 60)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    history = History(4, VOLUMES)
    ingest = Ingest(str(tmp_path_factory.mktemp("root")), history.hello)
    for writes in (0, 20, 15, 25):
        for _ in range(writes):
            history.write()
        ingest_transfer(ingest, history.close_interval())
    history.store = ingest.path  # type: ignore[attr-defined]
    yield history
    ingest.close()


@pytest.fixture
def update(
    history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    def run(one: int, other: int, volume: str = "root", *more: str, file: Path | None = None, code: int = 0) -> str:
        path: str = history.store  # type: ignore[attr-defined]
        words = ("export", path, f"seq-{other}", volume, str(file or tmp_path / "out.img"), "--from", f"seq-{one}")
        return said(capsys, *words, *more, code=code)

    return run


class Cut(BaseException):
    """The end of a process, as far as the file sees it."""


def cut_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """The process ends after so many writes to the file."""
    real, left = updating.write_all, [writes]

    def write(*arguments: Any) -> None:
        if not left[0]:
            raise Cut
        left[0] -= 1
        real(*arguments)

    monkeypatch.setattr(updating, "write_all", write)
    monkeypatch.setattr(updating, "punch", lambda *_: False)


def test_the_file_is_updated_forwards_and_backwards(
    history: History, tmp_path: Path, update: Callable[..., str]
) -> None:
    file = tmp_path / "out.img"
    for index, volume in enumerate(VOLUMES):
        file.write_bytes(history.states[SEQS[0]][index])
        for one, other in (*itertools.pairwise(SEQS), (60, 20), (20, 20), (20, 0)):
            update(one, other, volume.name, *(["--verify"] if one == 60 else []))
            assert file.read_bytes() == history.states[other][index]


def test_only_what_differs_is_written_and_zeros_become_holes(
    history: History, tmp_path: Path, update: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, written = tmp_path / "out.img", [0]
    one, other = history.states[0][0], history.states[60][0]
    file.write_bytes(one)
    real = updating.write_all

    def count(fd: int, data: Any, offset: int) -> None:
        written[0] += len(data)
        real(fd, data, offset)

    monkeypatch.setattr(updating, "write_all", count)
    update(0, 60)
    blocks = [(one[a : a + 4096], other[a : a + 4096]) for a in range(0, len(one), 4096)]
    changed = [after for before, after in blocks if before != after]
    assert 0 < written[0] <= sum(len(after) for after in changed if any(after)) + 2 * 512
    assert file.read_bytes() == other
    zeros = sum(len(after) for after in changed if not any(after))
    assert zeros and file.stat().st_blocks * 512 <= len(one) + 4095 - zeros


@pytest.mark.parametrize("writes", range(6))
def test_an_update_that_was_cut_off_is_no_image_and_can_be_finished_in_either_direction(
    history: History, tmp_path: Path, update: Callable[..., str], monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    file, one, other = tmp_path / "out.img", history.states[0][0], history.states[60][0]
    file.write_bytes(one)
    with monkeypatch.context() as patch:
        cut_after(patch, writes)
        with pytest.raises(Cut):
            updated(history, 0, 60, str(file))
    if not writes:
        assert file.read_bytes() == one
        return
    assert file.read_bytes()[:8] == b"PITFSUPD"
    if writes == 3:  # the power failed in the middle of a block
        at = next(at for at in range(8192, len(one), 4096) if one[at : at + 4096] != other[at : at + 4096])
        with file.open("r+b") as opened:
            opened.seek(at + 512)
            opened.write(b"torn" * 128)
    marker = Marker.decode(file.read_bytes()[:512])
    assert marker is not None and marker.volume == "root"
    assert marker.from_position == Position(0, history.times_ns[0])
    assert marker.to_position == Position(60, history.times_ns[60])
    said_line = update(0, 20, code=2)
    to, start = format_instant(history.times_ns[60]), format_instant(history.times_ns[0])
    assert f"interrupted: finish it first: pitfs export {history.store} {to} root {file} --from {start}\n" in said_line  # type: ignore[attr-defined]
    if writes % 2:
        update(0, 60, "root", "--verify")
        assert file.read_bytes() == other
    else:
        update(60, 0)
        assert file.read_bytes() == one


def updated(history: History, one: int, other: int, path: str) -> int:
    store = Store.open(history.store)  # type: ignore[attr-defined]
    try:
        return updating.incremental_export(
            store, store.at_seq(one), store.at_seq(other), 0, path, verify=False, progress=progress
        )
    finally:
        store.close()


def test_what_is_not_the_image_that_it_is_said_to_be_is_not_touched(
    history: History, tmp_path: Path, update: Callable[..., str]
) -> None:
    file = tmp_path / "out.img"
    image = history.states[20][0]
    file.write_bytes(image)
    assert "isn't what the volume had there at --from" in update(0, 60, code=1)
    assert file.read_bytes() == image
    size = VOLUMES[0].size_bytes
    differing = next(a for a in range(4096, size, 4096) if history.states[60][0][a : a + 4096] != image[a : a + 4096])
    for at in (0, differing + 100):
        changed = bytearray(image)
        changed[at] ^= 1
        file.write_bytes(changed)
        assert f"{file}: byte {at - at % 4096} isn't what" in update(20, 60, code=1)
        assert file.read_bytes() == changed
    same = next(a for a in range(4096, size, 4096) if history.states[60][0][a : a + 4096] == image[a : a + 4096])
    changed = bytearray(image)
    changed[same] ^= 1
    file.write_bytes(changed)
    assert "digest" in update(20, 60, "root", "--verify", code=1)  # what doesn't differ only --verify reads


def test_wrong_use_is_one_line(
    history: History, tmp_path: Path, update: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.img"
    assert f"{file}: not there" in update(0, 60, code=2)
    file.write_bytes(bytes(100))
    assert "100 bytes, the volume has 3300001: not an export of it" in update(0, 60, code=2)
    file.write_bytes(bytes(VOLUMES[0].size_bytes + 1))
    assert "not an export of it" in update(0, 60, code=2)
    assert "neither a regular file nor a block device" in update(0, 60, file=tmp_path, code=2)
    file.write_bytes(history.states[0][0])
    with file.open("r+b"):
        assert "in use" in update(0, 60, code=2)
    other = Marker(b"h" * 16, "root", Position(0, 0), Position(60, 0)).encode()
    file.write_bytes(other + history.states[0][0][512:])
    assert "another store or volume (root) was interrupted" in update(0, 60, code=2)
    assert file.read_bytes()[:512] == other


def test_a_full_disk_is_one_line_and_it_goes_on_afterwards(
    history: History, tmp_path: Path, update: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.img"
    file.write_bytes(history.states[0][0])
    real, left = updating.write_all, [3]

    def full(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "full")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(updating, "write_all", full)
        assert f"{file}: No space left on device: mend that" in update(0, 60, code=1)
    update(0, 60)
    assert file.read_bytes() == history.states[60][0]


@pytest.mark.loop
def test_a_device_is_updated_too(history: History, tmp_path: Path, update: Callable[..., str]) -> None:
    backing = tmp_path / "backing"
    rest = os.urandom((4 << 20) - VOLUMES[0].size_bytes)
    backing.write_bytes(history.states[0][0] + rest)
    with LoopDevice(backing) as device:
        update(0, 60, "root", "--verify", file=device)
        update(60, 20, file=device)
    assert backing.read_bytes() == history.states[20][0] + rest


def test_the_marker_is_the_one_that_is_written_down() -> None:
    marker = Marker(bytes(range(16)), "root", Position(1, 2), Position(3, 4))
    data = marker.encode()
    assert len(data) == 512 and Marker.decode(data) == marker
    assert data[:16] == b"PITFSUPD\1\0\0\0\0\0\0\0"
    assert data[16:37] == bytes(range(16)) + b"root\0"
    assert [int.from_bytes(data[at : at + 8], "little") for at in (96, 104, 112, 120)] == [1, 2, 3, 4]
    for at in (3, 40, 100, 300, 510):
        assert Marker.decode(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) is None
    assert Marker.decode(data[:511]) is None
