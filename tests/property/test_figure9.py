"""What a store keeps of an interval's contents is what figure 9 allows, whichever way it came.

Random overwrites of a hot set, a third of which repeat the end content, zeros or each other. A naive model says which
contents have to be stored: of each block the last one, unless it is zeros, the base snapshot's of that block or stored
already; of the writes before it those that are neither zeros, nor the block's last content, nor stored already.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing as closing_source
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitfs.errors import CorruptionError
from pitfs.journal.reader import BlockSource, Interval
from pitfs.model.difference import Transfer
from pitfs.model.ladder import LAST_LAYER, NO_LAYER
from pitfs.model.transfer import VolumeInfo
from pitfs.replication.interval import diff_frames, layers_frames, pick_layers, prepare
from pitfs.replication.manifests import diff_manifest, layers_manifest
from pitfs.splitter.startup import journal_directory
from pitfs.store.catalog import database
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind, ObjectName
from pitfs.store.open_interval import closing, contents
from pitfs.store.store import Store
from tests.helpers import shipper
from tests.helpers.pipeline import Pipeline
from tests.helpers.stores import feed, ingest_transfer, object_files, read_image
from tests.helpers.streams import batch_of, mark_of
from tests.helpers.transfers import History

Overwrite = tuple[int, int, bytes]  # volume, block, content
VOLUMES = (VolumeInfo("v0", 160 * 1024, 1024), VolumeInfo("v1", 70 * 4096, 4096))


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    monkeypatch.setattr(database, "DURABLE", "OFF")
    monkeypatch.setattr(database, "NOT_DURABLE", "OFF")


def hot_set(seed: int, count: int, base: Sequence[bytes]) -> list[Overwrite]:
    """Overwrites of a hot set of blocks. A third are what comes last to their block, zeros, or what came elsewhere."""
    random = np.random.default_rng(seed)
    made: list[Overwrite] = []
    for _ in range(count):
        volume = int(random.integers(len(VOLUMES)))
        info = VOLUMES[volume]
        made.append((volume, int(info.block_count * random.random() ** 3), random.bytes(info.block_size)))
    last = {(volume, block): number for number, (volume, block, _) in enumerate(made)}
    for number, (volume, block, _) in enumerate(made):
        choice, size = random.random(), VOLUMES[volume].block_size
        if choice < 0.11:
            content = made[last[volume, block]][2]
        elif choice < 0.18:
            content = bytes(size)
        elif choice < 0.2:
            content = base[volume][block * size : (block + 1) * size]
        elif choice < 0.33:
            content = made[int(random.integers(count))][2]
        else:
            continue
        if len(content) == size:
            made[number] = volume, block, content
    return made


def allowed(writes: Sequence[Overwrite], base: Sequence[bytes] | None) -> tuple[int, int]:
    """Bytes of contents that belong to the end snapshot, and to the journal alone; `base` where it is known."""
    last = {(volume, block): content for volume, block, content in writes}
    stored: set[bytes] = set()
    for (volume, block), content in last.items():
        at = block * len(content)
        if any(content) and (base is None or base[volume][at : at + len(content)] != content):
            stored.add(content)
    of_snapshot = sum(map(len, stored))
    for volume, block, content in writes:
        if any(content) and content != last[volume, block]:
            stored.add(content)
    return of_snapshot, sum(map(len, stored)) - of_snapshot


def stored(path: str, snapshot_id: int) -> tuple[int, int]:
    """Bytes of contents in the two objects of an interval, as they are on the disk."""
    names = (ObjectName(kind, snapshot_id) for kind in (ObjectKind.SNAPSHOT_BLOCKS, ObjectKind.JOURNAL_BLOCKS))
    files = [object_files(path, name.file) for name in names]
    one, two = (found[0].stat().st_size - HEADER_BYTES if found else 0 for found in files)
    return one, two


def only_interval(ingest: Ingest) -> int:
    """Id of the end snapshot of the store's interval, which is at every write."""
    store = Store.open(ingest.path)
    (interval,) = store.intervals()
    store.close()
    assert interval.granularity_ns == 0
    return interval.end_snapshot_id


def stream(tmp_path: Path, seed: int, count: int) -> tuple[Ingest, History, list[Overwrite]]:
    """An interval of overwrites streamed into a store, and closed."""
    history = History(seed, VOLUMES)
    writes = hot_set(seed, count, history.base)
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    made = [history.write_blocks(volume, block, [content]) for volume, block, content in writes]
    for start in range(0, count, 97):
        ingest.write(batch_of(made[start : start + 97]))
        ingest.publish()
    ingest.mark(mark_of(history))
    ingest.stream.wait_for_closing()
    return ingest, history, writes


def check_images(path: str, history: History, step: int) -> None:
    store = Store.open(path)
    for seq in (*range(1, len(history.states), step), len(history.states) - 1):
        for volume in range(len(VOLUMES)):
            assert read_image(store, store.at_seq(seq), volume) == history.states[seq][volume]
    store.close()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_streamed_takes_the_room_that_figure_9_allows(tmp_path: Path, seed: int) -> None:
    ingest, history, writes = stream(tmp_path, seed, 1_200)
    base = [image[: info.size_bytes] for image, info in zip(history.states[0], VOLUMES, strict=True)]
    assert stored(ingest.path, only_interval(ingest)) == allowed(writes, base)
    check_images(ingest.path, history, 61)
    ingest.close()


def ship(pipeline: Pipeline, layers: Sequence[int]) -> None:
    """All that waits; an interval's layers up to each of these in a transfer of their own."""
    for item in pipeline.items():
        if not isinstance(item, Interval):
            pipeline.ship_copy(item)
            continue
        with closing_source(BlockSource(journal_directory(pipeline.state), item, pipeline.block_sizes)) as source:
            prepared = prepare(item, pipeline.volumes, source, True)
            for frame in diff_frames(prepared, pipeline.ingest.begin(diff_manifest(prepared, ""))):
                feed(pipeline.ingest, frame)
            earlier: list[Transfer] = []
            base, base_bytes = NO_LAYER, 0
            for layer in layers:
                picked = pick_layers(prepared, base, layer, base_bytes, earlier)
                for frame in layers_frames(picked, pipeline.ingest.begin(layers_manifest(picked, ""))):
                    feed(pipeline.ingest, frame)
                earlier.append((base, layer, base_bytes))
                base, base_bytes = layer, picked.end_bytes


@pytest.mark.parametrize("layers", [(LAST_LAYER,), (2, LAST_LAYER), (0, 2, 5, LAST_LAYER)])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_shipped_takes_the_room_that_figure_9_allows(
    tmp_path: Path, seed: int, layers: tuple[int, ...]
) -> None:
    """In one transfer of all layers, or layer by layer as there is room."""
    sizes, block_sizes = [v.size_bytes for v in VOLUMES], [v.block_size for v in VOLUMES]
    pipeline = Pipeline(tmp_path, sizes, block_sizes, seed=seed, tick_ns=9_000_000)
    writes = hot_set(seed, 1_200, pipeline.states[0])
    for volume, block, content in writes:
        pipeline.write(volume, block * len(content), content)
    pipeline.splitter.mark()
    ship(pipeline, layers)
    assert stored(pipeline.ingest.path, only_interval(pipeline.ingest)) == allowed(writes, None)
    store = Store.open(pipeline.ingest.path)
    for seq in (*range(1, 1_200, 61), 1_200):
        for volume in range(len(VOLUMES)):
            assert read_image(store, store.at_seq(seq), volume) == pipeline.states[seq][volume]
    store.close()
    pipeline.close()


def test_a_table_that_is_full_takes_room_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MAX_BUCKETS", 16)
    ingest, history, writes = stream(tmp_path, 5, 1_200)
    base = [image[: info.size_bytes] for image, info in zip(history.states[0], VOLUMES, strict=True)]
    end = {(volume, block): content for volume, block, content in writes}
    each = [c for volume, block, c in writes if any(c) and c != end[volume, block]]
    of_snapshot, of_journal = stored(ingest.path, only_interval(ingest))
    assert of_snapshot >= allowed(writes, base)[0]
    assert allowed(writes, base)[1] < of_journal <= sum(map(len, each)), "what its block ends with isn't stored again"
    check_images(ingest.path, history, 61)
    ingest.close()


def test_contents_with_equal_checksums_are_stored_each_where_their_bytes_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a checksum said nothing: all of them fall together."""
    real = closing.Deduplication.store

    def blind(self: contents.Deduplication, pointers: Any, units: Any, checksums: Any, writer: Any) -> Any:
        return real(self, pointers, units, np.full_like(checksums, 7), writer)

    monkeypatch.setattr(closing.Deduplication, "store", blind)
    ingest, history, _ = stream(tmp_path, 6, 300)
    check_images(ingest.path, history, 17)
    ingest.close()


@pytest.mark.parametrize("damage", ["cut", "a directory"])
def test_an_older_object_that_is_damaged_ends_no_closing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """What a block had before is only compared."""
    history = History(8, VOLUMES)
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    ingest.close()
    ingest = Ingest(str(tmp_path), history.hello)  # which has no object open
    before = history.states[0][1]
    block = next(block for block in range(70) if len(set(before[block * 4096 : (block + 1) * 4096])) > 4)
    ingest.write(batch_of([history.write_blocks(1, block, [before[block * 4096 : (block + 1) * 4096]])]))
    (base,) = object_files(ingest.path, "snapshot-*.blocks")
    if damage == "cut":
        os.truncate(base, HEADER_BYTES)
    else:
        base.unlink()
        base.mkdir()
    ingest.mark(mark_of(history))
    ingest.stream.wait_for_closing()
    assert "stored once more" in caplog.text
    assert stored(ingest.path, only_interval(ingest)) == (4096, 0)
    ingest.close()


def test_damage_in_the_log_ends_no_closing_and_is_an_error_of_its_block_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history = History(8, VOLUMES)
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    good, bad = (np.random.default_rng(seed).bytes(4096) for seed in (1, 2))
    ingest.write(batch_of([history.write_blocks(1, block, [c]) for block, c in ((3, bad), (3, good), (9, good))]))
    ingest.publish()
    (wal,) = object_files(ingest.path, "journal-*.blocks")
    data = wal.read_bytes()
    assert data.count(bad) == 1
    wal.write_bytes(data.replace(bad, bad[:-1] + bytes([bad[-1] ^ 1])))
    ingest.mark(mark_of(history))
    ingest.stream.wait_for_closing()
    assert "1 contents of the log don't match their checksums" in caplog.text
    store = Store.open(ingest.path)
    for seq in (2, 3):
        assert read_image(store, store.at_seq(seq), 1) == history.states[seq][1]
    with pytest.raises(CorruptionError):
        read_image(store, store.at_seq(1), 1)
    store.close()
    ingest.close()


async def test_layers_that_are_backfilled_one_by_one_bring_each_content_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """By the shipper: what goes again after a connection that broke is the same."""
    monkeypatch.setattr(shipper, "Pipeline", partial(Pipeline, tick_ns=9_000_000))
    parts = shipper.Parts(tmp_path)
    await parts.locate()
    await parts.ship()
    random = np.random.default_rng(3)
    pool = [random.bytes(4096) for _ in range(60)]
    writes: list[Overwrite] = [(0, int(random.integers(5)), pool[int(random.integers(60))]) for _ in range(400)]
    for volume, block, content in writes:
        parts.pipeline.write(volume, block * 4096, content)
    parts.mark()
    await parts.ship(layers=False)
    parts.shipper.bandwidth.measured(1, 1.0, 1.0)
    await parts.ship_layers(1)
    await parts.connect_anew()
    while parts.shipper.backfill.waiting:
        await parts.ship_layers(1)
    assert parts.session.begun >= 2
    assert stored(parts.pipeline.ingest.path, only_interval(parts.pipeline.ingest)) == allowed(writes, None)
    parts.assert_replica_has_all()
    parts.close()
