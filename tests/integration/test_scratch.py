"""Writable images, mounted for real: what is written is there, the store and every other mount unchanged."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from tests.helpers.hosts import Mount, digest
from tests.helpers.processes import run
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

pytestmark = pytest.mark.fuse

VOLUMES = (VolumeInfo("root", 2_200_000, 4096), VolumeInfo("data", 12_345, 512))
SEQ = 7  # an instant between two snapshots


class Stored:
    """A store, and the model of what must be in it."""

    def __init__(self, root: Path) -> None:
        history = History(3, VOLUMES)
        ingest = Ingest(str(root), history.hello)
        for writes in (0, 20, 15):
            for _ in range(writes):
                history.write()
            ingest_transfer(ingest, history.close_interval(0, []))
        ingest.close()
        self.path = root / history.group
        self.states = history.states
        self.instant = format_instant(history.times_ns[SEQ])
        self.time_ns = history.times_ns[SEQ]

    def image(self, volume: int) -> bytes:
        return self.states[SEQ][volume]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def mount(stored: Stored, scratch: Path, tmp_path: Path) -> Iterator[Mount]:
    with Mount(stored.path, tmp_path, options=f"scratch={scratch}") as mount:
        yield mount


def write_randomly(image: Path, content: bytearray, seed: int, count: int = 60) -> None:
    """Random writes to the file and to the model of it."""
    chance = random.Random(seed)
    with image.open("r+b", buffering=0) as file:
        for _ in range(count):
            offset = chance.randrange(len(content))
            data = chance.randbytes(
                min(chance.choice((1, 100, 512, 4096, 5000, 200_000)), len(content) - offset)
            )
            file.seek(offset)
            assert file.write(data) == len(data)
            content[offset : offset + len(data)] = data


def test_what_is_written_is_there_and_nothing_else_changes(
    stored: Stored, mount: Mount, scratch: Path, tmp_path: Path
) -> None:
    before = [digest(stored.path, stored.instant, info.name) for info in VOLUMES]
    for index, info in enumerate(VOLUMES):
        image, content = mount.image(stored.instant, info.name), bytearray(stored.image(index))
        assert stat.S_IMODE(image.stat().st_mode) == 0o600
        assert image.stat().st_mtime_ns == stored.time_ns
        write_randomly(image, content, seed=index)
        assert image.read_bytes() == content
        run(["dd", f"if={image}", f"of={tmp_path / 'copy'}", "bs=64k", "iflag=direct"])
        assert (tmp_path / "copy").read_bytes() == content
        assert image.stat().st_mtime_ns > stored.time_ns
    with Mount(stored.path, tmp_path, name="beside") as beside:
        for index, info in enumerate(VOLUMES):
            assert beside.image(stored.instant, info.name).read_bytes() == stored.image(index)
    assert [digest(stored.path, stored.instant, info.name) for info in VOLUMES] == before
    assert os.listdir(scratch) == []
    mount.unmount()
    mount.start()
    assert mount.image(stored.instant).read_bytes() == stored.image(0)
