"""Streamed writes as frames and back: whole batches only, within their limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitfs.errors import RemoteProtocolError
from pitfs.link.protocol.batches import BatchCutter, BatchJoiner
from pitfs.model.transfer import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ROWS,
    MAX_PAYLOAD_BYTES,
    WRITE,
    Data,
    Flush,
    Section,
    Writes,
)


def batch(first_seq: int, count: int, contents: bytes) -> Writes:
    rows = np.zeros(count, WRITE)
    rows["time_ns"] = np.arange(count) + first_seq
    rows["block_count"] = 1
    return Writes(first_seq, rows, contents, first_seq)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2 * MAX_PAYLOAD_BYTES + 5)), max_size=5))
def test_what_is_cut_is_joined_again(shapes: list[tuple[int, int]]) -> None:
    cutter, joiner, seq = BatchCutter(), BatchJoiner(), 1
    for count, size in shapes:
        sent = batch(seq, count, bytes([seq % 256]) * size)
        frames = list(cutter.cut(sent))
        assert all(len(frame.payload) <= MAX_PAYLOAD_BYTES for frame in frames)
        for frame in frames:
            joiner.take(frame)
        assert joiner.is_open
        seq += count
        got = joiner.finish(Flush(seq - 1, sent.digest, 0))
        assert got is not None and not joiner.is_open
        assert (got.first_seq, got.digest, bytes(got.contents)) == (sent.first_seq, sent.digest, sent.contents)
        assert (got.rows == sent.rows).all()
        assert joiner.finish(Flush(seq - 1, 0, 0)) is None  # time goes on, nothing was written


ROWS = batch(1, 2, b"").rows.tobytes()


@pytest.mark.parametrize(
    "frames",
    [
        [Data(Section.WRITE_BLOCKS, 0, b"x")],
        [Data(Section.WRITES, 1, b"")],
        [Data(Section.WRITES, 1, ROWS[:-1])],
        [Data(Section.WRITES, 1, ROWS), Data(Section.WRITES, 3, ROWS)],
        [Data(Section.WRITES, 1, ROWS), Data(Section.WRITE_BLOCKS, 1, b"x")],
        [Data(Section.WRITES, 1, bytes(WRITE.itemsize * (MAX_BATCH_ROWS + 1)))],
    ],
)
def test_frames_that_make_no_batch_are_refused(frames: list[Data]) -> None:
    joiner = BatchJoiner()
    with pytest.raises(RemoteProtocolError):
        for frame in frames:
            joiner.take(frame)


def test_a_batch_that_never_ends_is_refused_before_it_takes_memory() -> None:
    joiner, payload = BatchJoiner(), bytes(MAX_PAYLOAD_BYTES)
    joiner.take(Data(Section.WRITES, 1, ROWS))
    with pytest.raises(RemoteProtocolError, match="a batch of more than"):
        for number in range(MAX_BATCH_BYTES // MAX_PAYLOAD_BYTES + 1):
            joiner.take(Data(Section.WRITE_BLOCKS, number * MAX_PAYLOAD_BYTES, payload))


def test_a_flush_of_another_write_is_refused() -> None:
    joiner = BatchJoiner()
    joiner.take(Data(Section.WRITES, 1, ROWS))
    with pytest.raises(RemoteProtocolError, match="FLUSH names seq 3, the batch ends with 2"):
        joiner.finish(Flush(3, 0, 0))
