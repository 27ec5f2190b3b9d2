"""Streams a `History` into a store, the naive way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.model.transfer import WRITE, StreamMark, Writes
from tests.helpers.transfers import History, Write


class FakeClock:
    """Seconds that go forward when they are told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def batch_of(writes: Sequence[Write]) -> Writes:
    """Neighbouring writes as a sender puts them out."""
    rows = np.array([(w.time_ns, w.block, len(w.contents), w.volume, 0) for w in writes], WRITE)
    contents = [content for write in writes for content in write.contents]
    sums = b"".join(xxh3_64_intdigest(content).to_bytes(8, "little") for content in contents)
    return Writes(writes[0].seq, rows, b"".join(contents), xxh3_64_intdigest(sums))


def cut_here(history: History, count: int) -> None:
    """What comes as a transfer begins behind the first `count` open writes: these were streamed."""
    streamed, history.open = history.open[:count], history.open[count:]
    if streamed:
        last = streamed[-1]
        history.at = last.seq, last.time_ns
        history.reachable |= {write.seq for write in streamed}


def mark_of(history: History, bookmark: str | None = None) -> StreamMark:
    """The mark at the end of all open writes, which were streamed."""
    cut_here(history, len(history.open))
    history.mark += 1
    history.base = [bytes(image) for image in history.images]
    history.protected_ns = max(history.times_ns[-1], history.protected_ns) + 1_000
    return StreamMark(history.mark, *history.at, history.protected_ns, bookmark)
