"""`pitfs verify`: equal, different, and without a digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pitfs.cli.main import main
from pitfs.journal import digests
from pitfs.journal.reader import Interval
from pitfs.model.position import format_instant
from pitfs.splitter.service import SplitterService
from pitfs.splitter.sync_gate import SyncGate
from pitfs.store.objects.format import ObjectKind, ObjectName
from pitfs.store.store import Store
from tests.helpers.channel import client_of
from tests.helpers.commands import said
from tests.helpers.forging import flip_with_checksums
from tests.helpers.pipeline import Pipeline
from tests.helpers.shipper import Here, Parts, settings_of

SIZES = [4_000_001, 70_001, 100_000]  # the first one has a map of two levels, the last one stays all zeros
BLOCKS = [4096, 512, 1024]


class Volumes(Parts):
    """Three of them, on a shipper."""

    def __init__(self, tmp: Path) -> None:
        self.pipeline = Pipeline(tmp, SIZES, BLOCKS, capacity_bytes=16 << 20)
        self.service = SplitterService(self.pipeline.splitter, SyncGate(holds=False, blocks=False, copying=False))
        self.session = Here(self.pipeline.ingest)
        self.client = client_of(lambda: self.service)
        self._settings = settings_of(self.pipeline)
        self.shipper = self._new_shipper()

    async def interval(self) -> None:
        """With writes to the first block, the last one, and over the border of two leaves."""
        for volume, size in enumerate(SIZES[:2]):
            for at in (0, size - 3, min(size, 512 * BLOCKS[volume]) - 700):
                self.pipeline.write(volume, at, self.pipeline.random.bytes(min(1400, size - at)))
        self.mark()
        assert isinstance(await self.ship(), Interval)

    @property
    def path(self) -> str:
        return self.pipeline.ingest.path


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(digests, "EVERY_S", 0.0)
    made = Volumes(tmp_path)
    made.pipeline.write(2, 0, bytes(SIZES[2]))
    yield made
    made.close()


async def begin(parts: Volumes) -> None:
    await parts.locate()
    await parts.ship()
    await parts.interval()


async def test_what_the_replica_has_is_what_production_had(parts: Volumes, capsys: pytest.CaptureFixture[str]) -> None:
    await begin(parts)
    await parts.interval()
    instant = last_instant(parts)
    lines = said(capsys, "verify", parts.path, "latest").splitlines()
    assert lines == [f"v{index}: equal at {instant}" for index in range(3)]
    (row,) = json.loads(said(capsys, "verify", parts.path, "latest", "v1", "--json"))["volumes"]
    assert row == {
        "volume": "v1", "problem": None, "result": "equal", "before_s": 0.0, "instant": instant,
        "seq": parts.pipeline.splitter.state.seq,
    }  # fmt: skip


async def test_what_was_streamed_is_verified_at_its_mark(parts: Volumes, capsys: pytest.CaptureFixture[str]) -> None:
    await begin(parts)
    shipper, pipeline = parts.shipper, parts.pipeline
    shipper.stream.begin(parts.session)
    pipeline.write(0, 5, b"streamed" * 1000)
    parts.mark()
    seq = pipeline.splitter.state.seq
    pipeline.write(0, 77_000, b"behind the mark" * 1000)
    await shipper.stream.pump(60.0)
    pipeline.ingest.stream.wait_for_closing()
    pipeline.ingest.stream.publish()
    rows = json.loads(said(capsys, "verify", parts.path, "latest", "--json"))["volumes"]
    assert [row["result"] for row in rows] == ["equal"] * 3
    assert {row["seq"] for row in rows} == {seq} and all(row["before_s"] > 0 for row in rows)


@pytest.mark.parametrize(("volume", "block"), [(0, 0), (0, SIZES[0] // 4096), (0, 512), (1, 0), (1, SIZES[1] // 512)])
async def test_a_flipped_bit_is_found_though_all_checksums_fit(
    parts: Volumes, capsys: pytest.CaptureFixture[str], volume: int, block: int
) -> None:
    await begin(parts)
    store = Store.open(parts.path)
    snapshot = next(store.newest_snapshots())
    store.close()
    flip_with_checksums(parts.path, snapshot.id, volume, block)
    said(capsys, "digest", parts.path, "latest", f"v{volume}")  # no checksum tells
    lines = found(capsys, "verify", parts.path, "latest").splitlines()
    assert [line.split()[1] for line in lines] == ["DIFFERS" if index == volume else "equal" for index in range(3)]


async def test_a_bit_that_a_checksum_tells_of_is_unreadable(parts: Volumes, capsys: pytest.CaptureFixture[str]) -> None:
    await begin(parts)
    store = Store.open(parts.path)
    snapshot = next(store.newest_snapshots())
    path = Path(store.objects.path_of(ObjectName(ObjectKind.SNAPSHOT_BLOCKS, snapshot.id)))
    store.close()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    said(capsys, "verify", parts.path, "latest", "v0")
    line = found(capsys, "verify", parts.path, "latest", "v1")
    assert "UNREADABLE at " in line and "doesn't match its checksum" in line
    (row,) = json.loads(found(capsys, "verify", parts.path, "latest", "v1", "--json"))["volumes"]
    assert row["result"] == "unreadable"


async def test_without_a_digest_it_says_so(parts: Volumes, capsys: pytest.CaptureFixture[str]) -> None:
    await parts.locate()
    await parts.ship()
    assert found(capsys, "verify", parts.path, "latest", "v0").startswith("v0: no digest: ")
    instant = last_instant(parts)
    await parts.interval()
    assert "no digest" in found(capsys, "verify", parts.path, instant, "v0")


async def test_it_says_how_far_before_the_time_the_snapshot_is(
    parts: Volumes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(parts)
    instant = last_instant(parts)
    parts.shipper.digests._due_s = 1e12
    await parts.interval()
    line = said(capsys, "verify", parts.path, "latest", "v0")
    assert line == f"v0: equal at {instant}, 0.0 s before the time that was given\n"


async def test_volumes_that_are_more_than_a_mark_can_carry(parts: Volumes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "MAX_STREAMED_DIGESTS", 2)
    await begin(parts)
    parts.shipper.stream.begin(parts.session)
    parts.pipeline.write(0, 5, b"streamed")
    parts.mark()
    await parts.shipper.stream.pump(60.0)
    parts.pipeline.ingest.stream.wait_for_closing()
    store = Store.open(parts.path)
    newest, before = list(store.newest_snapshots())[:2]
    digest = store.digest(0, newest.time_ns)
    assert digest is not None and digest[0].id == before.id
    store.close()


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that ends with 1."""
    capsys.readouterr()
    assert main(list(arguments)) == 1
    return capsys.readouterr().out


def last_instant(parts: Volumes) -> str:
    store = Store.open(parts.path)
    try:
        return format_instant(next(store.newest_snapshots()).time_ns)
    finally:
        store.close()
