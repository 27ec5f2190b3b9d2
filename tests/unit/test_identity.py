"""The epoch of a sender: greater at each start, whatever happened to the file or the clock."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pitfs.splitter.identity import Epoch, next_epoch


def test_it_grows_by_the_clock_and_without_it(tmp_path: Path) -> None:
    first = next_epoch(str(tmp_path), 1000)
    assert first.epoch == 1000
    assert [next_epoch(str(tmp_path), now).epoch for now in (1000, 5, 2000)] == [1001, 1002, 2000]
    (tmp_path / "epoch").write_bytes(b"\xff\x00")
    assert next_epoch(str(tmp_path), 3000).epoch == 3000
    assert len({next_epoch(str(tmp_path), 1).instance for _ in range(5)}) == 5


def test_on_a_full_disk_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = next_epoch(str(tmp_path), 1000)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert next_epoch(str(tmp_path), 2000) == before
        (tmp_path / "epoch").unlink()
        assert next_epoch(str(tmp_path), 2000) == Epoch(0, 0)
