"""What a copy holds of before-images is bounded, however much is overwritten while it runs; and the copy is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pitfs.journal.reader import Copy
from pitfs.journal.writer import Location
from pitfs.model.transfer import DIFF_ENTRY, Data, ResumePoint, Section, Source
from pitfs.replication import full_sync
from pitfs.replication.full_sync import copy_frames
from pitfs.splitter.startup import journal_directory
from tests.helpers.pipeline import Pipeline

SIZES, BLOCK_SIZES = [1 << 20, 300_000], [512, 4096]
STRETCH_BYTES, MOST = 64 << 10, 300


@pytest.mark.parametrize("seed", range(4))
def test_what_is_held_of_before_images_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(full_sync, "STRETCH_BYTES", STRETCH_BYTES)
    monkeypatch.setattr(full_sync, "MAX_HELD_IMAGES", MOST, raising=False)
    held: list[int] = []

    class Watched(full_sync._BeforeImages):
        def follow(self, until: Location, *under_way: tuple[int, int]) -> None:
            super().follow(until, *under_way)
            held.append(sum(len(rows) for rows in self._stretches.values()) // full_sync._PRESERVED.itemsize)

    monkeypatch.setattr(full_sync, "_BeforeImages", Watched)
    pipeline = Pipeline(tmp_path, SIZES, BLOCK_SIZES, capacity_bytes=64 << 20, seed=seed, filled=seed % 2 == 0)
    (copy,) = pipeline.items()
    assert isinstance(copy, Copy)
    before, images = pipeline.states[-1], [bytearray(size + 4096) for size in SIZES]

    def tail() -> Location:
        for _ in range(60):
            pipeline.random_write()
        return pipeline.splitter.journal.tail

    fds = [volume.fd for volume in pipeline.splitter.volumes]
    rows = np.zeros(0, DIFF_ENTRY)
    for _ in range(200):
        pipeline.random_write()
    for frame in copy_frames(journal_directory(pipeline.state), pipeline.volumes, fds, copy, ResumePoint(), tail):
        if isinstance(frame, Data) and frame.section is Section.DIFF:
            rows = np.frombuffer(bytes(frame.payload), DIFF_ENTRY)
            rows = rows[rows["source"] == int(Source.SNAPSHOT)]
        elif isinstance(frame, Data):
            at = 0
            for row in rows:
                size = BLOCK_SIZES[row["volume"]]
                start = int(row["block"]) * size
                images[row["volume"]][start : start + size] = frame.payload[at : at + size]
                at += size
    assert [bytes(image[:size]) for image, size in zip(images, SIZES, strict=True)] == before
    most_of_a_stretch = STRETCH_BYTES // min(BLOCK_SIZES)
    assert max(held) <= MOST + most_of_a_stretch, held
    assert len(held) > 10
    pipeline.close()
