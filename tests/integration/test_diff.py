"""`pitfs diff`, as a user calls it, against the model."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pitfs.cli import diff
from pitfs.cli.main import main
from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from tests.helpers.commands import said
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

VOLUMES = (VolumeInfo("root", 3_300_001, 4096), VolumeInfo("data", 12_345, 512))
PAIRS = ((0, 60), (60, 0), (5, 8), (20, 35), (41, 44), (30, 59), (7, 7))


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    history = History(4, VOLUMES)
    ingest = Ingest(str(tmp_path_factory.mktemp("root")), history.hello)
    for writes, granularity_ns, marks in ((0, 0, ["start"]), (20, 0, []), (15, None, []), (25, 0, ["5m-ago"])):
        for _ in range(writes):
            history.write()
        ingest_transfer(ingest, history.close_interval(granularity_ns, marks))
    history.store = ingest.path  # type: ignore[attr-defined]
    yield history
    ingest.close()


@pytest.fixture
def store(history: History) -> str:
    path: str = history.store  # type: ignore[attr-defined]
    return path


def differing(history: History, one: int, other: int, volume: int) -> list[int]:
    """Blocks that differ."""
    info, images = VOLUMES[volume], (history.states[one][volume], history.states[other][volume])
    starts = range(0, info.size_bytes, info.block_size)
    parts = [[image[start : start + info.block_size] for start in starts] for image in images]
    return [block for block in range(len(starts)) if parts[0][block] != parts[1][block]]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_lines_document_and_bitmap_say_which_blocks_differ(
    store: str, history: History, capsys: pytest.CaptureFixture[str], tmp_path: Path, one: int, other: int
) -> None:
    one, other = (max(seq for seq in history.reachable if seq <= each) for each in (one, other))
    for index, volume in enumerate(VOLUMES):
        words = ["diff", store, f"seq-{one}", f"seq-{other}", volume.name]
        wanted = differing(history, one, other, index)
        assert main(words) == 0
        out, err = capsys.readouterr()
        ranges = [(int(a), int(b)) for a, b in (line.split() for line in out.splitlines())]
        blocks = [at // volume.block_size for a, size in ranges for at in range(a, a + size, volume.block_size)]
        assert blocks == wanted
        changed = sum(size for _, size in ranges)
        assert err.startswith(f"{volume.name}: {changed} of {volume.size_bytes} bytes differ, in {len(ranges)} range")
        document = json.loads(said(capsys, *words, "--json"))
        assert document == {
            "from": format_instant(history.times_ns[one]),
            "to": format_instant(history.times_ns[other]),
            "from_seq": one,
            "to_seq": other,
            "volume": volume.name,
            "block_size": volume.block_size,
            "size_bytes": volume.size_bytes,
            "ranges": [{"offset": start, "size": size} for start, size in ranges],
            "changed_bytes": changed,
        }
        bits = tmp_path / f"{volume.name}.bits"
        assert said(capsys, *words, "--bitmap", str(bits)) == ""
        data = bits.read_bytes()
        assert len(data) == -(-volume.block_count // 8)
        assert [block for block in range(len(data) * 8) if data[block // 8] >> block % 8 & 1] == wanted


def test_what_can_not_be_compared_is_one_line(
    store: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no volume 'swap'" in said(capsys, "diff", store, "start", "latest", "swap", code=2)
    assert "no state answers" in said(capsys, "diff", store, "start", "1999", "root", code=1)
    assert "not a time" in said(capsys, "diff", store, "never", "latest", "root", code=2)
    bits = tmp_path / "bits"
    words = ("diff", store, "start", "latest", "root", "--bitmap")
    said(capsys, *words, str(bits))
    assert f"{bits}: exists" in said(capsys, *words, str(bits), code=2)
    assert str(tmp_path / "no") in said(capsys, *words, str(tmp_path / "no" / "bits"), code=1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(diff, "write_all", full)
    other = tmp_path / "other"
    assert said(capsys, *words, str(other), code=1) == (
        f"pitfs: {other}: No space left on device: write it to another place\n"
    )
    assert not other.exists()


def test_a_terminal_gets_a_header(
    store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = said(capsys, "diff", store, "start", "latest", "root").splitlines()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert said(capsys, "diff", store, "start", "latest", "root").splitlines() == ["offset size", *lines]
