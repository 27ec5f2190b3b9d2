"""What fails halfway leaves no descriptor open."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pitfs.errors import PitfsError
from pitfs.model.transfer import VolumeInfo
from pitfs.splitter import startup
from pitfs.splitter.startup import VolumeSpec, lock_state, open_splitter
from pitfs.store.ingest import Ingest
from pitfs.view import scratch as scratch_module
from pitfs.view.scratch import ScratchDirectory
from tests.helpers.stores import ingest_transfer
from tests.helpers.streams import batch_of, mark_of
from tests.helpers.transfers import History

VOLUMES = (VolumeInfo("root", 9_000, 1024), VolumeInfo("data", 5_000, 512))


def descriptors() -> list[str]:
    """What the open descriptors lead to."""
    gc.collect()
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sorted(os.readlink(link) for link in links if os.path.lexists(link))


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def start(tmp_path: Path, *backings: str) -> None:
    specs = [VolumeSpec(backing, str(tmp_path / backing), 4096) for backing in backings]
    ticks = itertools.count(1_700_000_000_000_000_000)
    open_splitter(str(tmp_path / "state"), "g", specs, 64 << 20, False, lambda: next(ticks))


@pytest.mark.parametrize("fails", ["a later backing", "group", "progress", "recovery", "journal", "copy"])
def test_a_splitter_that_cannot_start_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    for backing in ("a", "b"):
        (tmp_path / backing).write_bytes(bytes(8192))
    lock = lock_state(str(tmp_path / "state"))
    before, later = descriptors(), "missing" if fails == "a later backing" else "b"
    if later == "b":
        target: tuple[Any, str] = {
            "group": (startup, "open_group"),
            "progress": (startup.ProgressFile, "read"),
            "recovery": (startup, "recover"),
            "journal": (startup, "Journal"),
            "copy": (startup.Splitter, "start_copy"),
        }[fails]
        monkeypatch.setattr(*target, full)
    with pytest.raises((PitfsError, OSError)):
        start(tmp_path, "a", later)
    assert descriptors() == before
    os.close(lock)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["ftruncate", "fsync", "durable_replace", "OverlayLog"])
def test_an_overlay_that_cannot_be_made_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, name: str
) -> None:
    store: Any = types.SimpleNamespace(history="0" * 32, volumes=VOLUMES)
    scratch = ScratchDirectory(str(tmp_path), store, keep=keep)
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os if hasattr(os, name) else scratch_module, name, full)
        if keep or name == "ftruncate":
            with pytest.raises(OSError, match="No space"):
                scratch.make(7, 0)
            assert descriptors() == before
    scratch.close()


def fails_at(call: int) -> Callable[..., int]:
    """os.open, where that call of it fails."""
    calls, real = itertools.count(), os.open

    def opens(path: Any, *args: Any, **kwargs: Any) -> int:
        if next(calls) == call:
            full()
        return real(path, *args, **kwargs)

    return opens


def test_a_closing_that_cannot_open_a_file_leaves_none_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(5, VOLUMES)
    before = descriptors()
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    ingest.write(batch_of([history.write() for _ in range(9)]))
    ingest.stream.publish()
    mark = mark_of(history)
    monkeypatch.setattr("pitfs.store.open_interval.closing.Closing.start", lambda self: None)
    ingest.mark(mark)
    closing = ingest.stream._closing
    assert closing is not None
    for call in itertools.count():
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fails_at(call))
            try:
                closing.run()
                break
            except PitfsError as error:
                assert "No space left" in str(error)
        ours = [path for path in descriptors() if "staging" in path]
        assert ours == [], f"open number {call}"
    assert call >= 8
    monkeypatch.setattr("pitfs.store.open_interval.closing.Closing.join", lambda self: None)
    ingest.close()
    assert descriptors() == before
