"""The maker of long histories against the store: what its formula says is what an image has, in any state."""

from __future__ import annotations

from pathlib import Path

import pytest

from pitfs.model.transfer import VolumeInfo
from pitfs.store.store import Store
from pitfs.view.view import PointInTimeView, ReadBuffer
from tests.helpers.histories import LongHistory, block_contents

SIZE = 512


@pytest.mark.parametrize("way", ["streamed", "open", "transfer"])
def test_each_block_holds_in_each_state_what_the_formula_says(tmp_path: Path, way: str) -> None:
    with LongHistory(tmp_path, VolumeInfo("root", 4096 * SIZE, SIZE)) as history:
        history.full_copy(100)
        history.snapshots(3, blocks_each=2, first_block=200, span=100)
        writes = history.interval(
            700, 256, first_block=1000, stride=2, data_every=3, streamed=way != "transfer", is_open=way == "open"
        )
        store, buffer = Store.open(str(history.path)), ReadBuffer()
        for number in (0, 1, 100, 255, 256, 699):
            seq = writes.seq(number)
            resolution = store.at_seq(seq)
            assert (resolution.seq, resolution.time_ns) == (seq, writes.time_ns(number))
            assert store.at_time(writes.time_ns(number)) == (resolution, True)
            view = PointInTimeView(store, resolution, 0)
            assert view.read(99 * SIZE, SIZE, buffer) == block_contents(0, SIZE)
            for block in range(990, 1520):
                wanted = writes.state(block, seq, SIZE) or bytes(SIZE)
                assert view.read(block * SIZE, SIZE, buffer) == wanted
        store.close()
