"""The scratch directory, and the handlers over it without a mount: order of writes, group commit, a slow disk."""

from __future__ import annotations

import errno
import os
import random
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio

from pitfs.errors import CapacityError, PitfsError, UsageError
from pitfs.fuse.kernel.init_flags import HANDLE_KILLPRIV_V2, with_flag
from pitfs.fuse.replica import Ownership
from pitfs.fuse.scratch import INLINE_WRITE_NS, ScratchReplica
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from pitfs.view import scratch as scratch_module
from pitfs.view.inodes import InodeKind, pack_inode
from pitfs.view.scratch import PREFIX, ScratchDirectory
from pitfs.view.tree import Tree
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

VOLUMES = (VolumeInfo("root", 300_000, 65536), VolumeInfo("data", 5_000, 512))
ROOT = pack_inode(InodeKind.IMAGE, 0, 0)


def stored(history: str = "0" * 32) -> Any:
    """As much of a store as a scratch asks for."""
    return types.SimpleNamespace(history=history, volumes=VOLUMES)


# ---------------------------------------------------------------- the directory


def test_what_a_crash_left_is_removed_and_other_files_stay(tmp_path: Path) -> None:
    name = f"{'0' * 32}.7.root"
    for left in (PREFIX + "ab3_xyz7", "notes", "pitfs-scratch-notes.txt", PREFIX + "2026-plans"):
        (tmp_path / left).touch()
    (tmp_path / f"{PREFIX}folder_1").mkdir()
    for kept in (f"{name}.data", f"{'0' * 32}.8.data.index.tmp"):
        (tmp_path / kept).touch()
    ScratchDirectory(str(tmp_path), stored()).close()
    assert PREFIX + "ab3_xyz7" not in os.listdir(tmp_path) and len(os.listdir(tmp_path)) == 6
    ScratchDirectory(str(tmp_path), stored(), keep=True).close()  # begun, and never finished
    left_alone = [PREFIX + "2026-plans", PREFIX + "folder_1", "notes", "pitfs-scratch-notes.txt"]
    assert sorted(os.listdir(tmp_path)) == left_alone


def test_a_kept_overlay_is_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    scratch = ScratchDirectory(str(tmp_path), stored(), keep=True)
    scratch.make(7, 0)
    scratch.close()
    data = tmp_path / f"{'0' * 32}.7.root.data"
    with pytest.raises(UsageError, match="another store"):
        ScratchDirectory(str(tmp_path), stored("1" * 32), keep=True)
    other = stored()
    other.volumes = (VolumeInfo("other", 300_000, 65536),)
    with pytest.raises(UsageError, match="has a volume root"):
        ScratchDirectory(str(tmp_path), other, keep=True)
    other.volumes = (VolumeInfo("root", 300_000, 4096),)
    with pytest.raises(PitfsError, match="remove both files"):
        ScratchDirectory(str(tmp_path), other, keep=True)
    os.truncate(data, 299_999)
    with pytest.raises(PitfsError, match="remove both files"):
        ScratchDirectory(str(tmp_path), stored(), keep=True)
    os.truncate(data, 300_000)
    ScratchDirectory(str(tmp_path), stored(), keep=True).close()


def test_the_lock_is_waited_for_a_little_and_then_refused(tmp_path: Path) -> None:
    first = ScratchDirectory(str(tmp_path), stored())
    waits: list[float] = []
    with pytest.raises(UsageError, match="another mount uses it"):
        ScratchDirectory(str(tmp_path), stored(), sleep=waits.append)
    assert sum(waits) == pytest.approx(scratch_module.LOCK_WAIT_S, abs=0.1)

    def end_the_first(_: float) -> None:
        first.close()

    ScratchDirectory(str(tmp_path), stored(), sleep=end_the_first).close()


def test_so_many_images_are_written_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_module, "MAX_OVERLAYS", 2)
    scratch = ScratchDirectory(str(tmp_path), stored(), keep=True)
    scratch.make(1, 0)
    scratch.make(1, 1)
    with pytest.raises(CapacityError):
        scratch.make(2, 0)
    scratch.close()


# ---------------------------------------------------------------- the handlers


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A store's path, and the image of its first volume at its only instant."""
    root = tmp_path_factory.mktemp("stores")
    made = History(3, VOLUMES)
    ingest = Ingest(str(root), made.hello)
    ingest_transfer(ingest, made.close_interval(0, []))
    ingest.close()
    return root / made.group, made.states[0][0]


@pytest.fixture
def handlers(history: tuple[Path, bytes], tmp_path: Path) -> Iterator[ScratchReplica]:
    store = Store.open(str(history[0]))
    scratch = ScratchDirectory(str(tmp_path), store, keep=True)
    handlers = ScratchReplica(store, Tree(store, lambda: 0), Ownership(mode=0o600), scratch)
    yield handlers
    handlers.close()


async def read_all(handlers: ScratchReplica) -> bytes:
    return bytes(await handlers.read(ROOT, 0, VOLUMES[0].size_bytes))


@pytest.mark.parametrize("average_ns", [0.0, 1e18], ids=["quick disk", "slow disk"])
def test_writes_into_one_block_at_a_time_are_all_there(
    handlers: ScratchReplica, history: tuple[Path, bytes], average_ns: float
) -> None:
    """The first of them copies the block up: it mustn't take back what the others have written."""
    content = bytearray(history[1])
    pieces = [(offset, bytes([offset // 3000 % 255 + 1]) * 2000) for offset in range(0, 298_000, 3000)]
    random.Random(1).shuffle(pieces)

    async def write(offset: int, data: bytes) -> None:
        assert await handlers.write(ROOT, offset, data) == len(data)

    async def main() -> None:
        handlers._average_ns = average_ns
        async with trio.open_nursery() as nursery:
            for offset, data in pieces:
                content[offset : offset + len(data)] = data
                nursery.start_soon(write, offset, data)
        assert await read_all(handlers) == content

    trio.run(main)


def test_a_disk_that_is_quick_again_is_written_inline_again(handlers: ScratchReplica) -> None:
    async def main() -> None:
        handlers._average_ns = 2.0 * INLINE_WRITE_NS
        for _ in range(100):
            await handlers.write(ROOT, 0, b"x")
        assert handlers._average_ns < INLINE_WRITE_NS

    trio.run(main)


def test_fsyncs_that_wait_share_one(handlers: ScratchReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        await handlers.write(ROOT, 0, b"x" * 65536)
        overlay = handlers._overlay(ROOT)
        assert overlay is not None
        begun = []
        real = overlay.begin_sync
        monkeypatch.setattr(overlay, "begin_sync", lambda: begun.append(1) or real())
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(handlers.fsync, ROOT, False)
        assert len(begun) == 1 and overlay.synced_writes == overlay.writes == 1
        await handlers.write(ROOT, 0, b"y")
        await handlers.fsync(ROOT, True)
        assert len(begun) == 2

    trio.run(main)


def test_an_fsync_that_fails_is_an_error_and_so_are_all_after_it(
    handlers: ScratchReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def main() -> None:
        await handlers.write(ROOT, 0, b"x" * 65536)
        monkeypatch.setattr(os, "fdatasync", fail)
        for _ in range(2):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await handlers.fsync(ROOT, False)
            assert caught.value.errno == errno.EIO
            monkeypatch.undo()
        with pytest.raises(pyfuse3.FUSEError):
            await read_all(handlers)

    trio.run(main)


# ---------------------------------------------------------------- INIT


def test_the_flag_is_given_only_where_it_was_offered_and_to_nothing_else() -> None:
    def request(opcode: int, flags: int) -> bytes:
        return b"".join(
            n.to_bytes(4, "little") for n in (104, opcode, *[0] * 8, 7, 39, 1 << 17, flags, *[0] * 12)
        )

    def reply(error: int = 0) -> bytes:
        return b"".join(n.to_bytes(4, "little") for n in (80, error, 2, 0, 7, 38, 1 << 17, 5, *[0] * 12))

    offered = request(26, HANDLE_KILLPRIV_V2 | 1)
    changed = with_flag(offered, reply())
    assert changed[28:32] == (HANDLE_KILLPRIV_V2 | 5).to_bytes(4, "little")
    assert changed[:28] + changed[32:] == reply()[:28] + reply()[32:]
    assert with_flag(request(26, 1), reply()) == reply()
    assert with_flag(request(3, HANDLE_KILLPRIV_V2), reply()) == reply()
    assert with_flag(offered, reply(1)) == reply(1)
    assert with_flag(offered, reply()[:16]) == reply()[:16]
