"""Streamed writes over sender and receiver, beside transfers, with an ingest that only remembers."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import trio

from pitfs.errors import CapacityError, LinkError
from pitfs.link.sessions.connect import connect
from pitfs.model.transfer import (
    WRITE,
    Checkpoint,
    Data,
    Durable,
    End,
    Flush,
    Hello,
    Section,
    StreamMark,
    Welcome,
    Writes,
)
from tests.helpers.links import HELLO, MANIFEST, FakeIngest, replica


def batch(first_seq: int, count: int, size: int) -> Writes:
    rows = np.zeros(count, WRITE)
    rows["time_ns"], rows["block_count"] = np.arange(count) + first_seq * 10, size // 512 // count
    return Writes(first_seq, rows, np.random.default_rng(first_seq).bytes(size), 7)


class Replica:
    """Ingests that are kept, and what a sender was told."""

    def __init__(self, fail_at: dict[str, Exception] | None = None) -> None:
        self.ingest = FakeIngest(HELLO, Welcome(3, 9, 50, 60), fail_at or {})
        self.durable: list[Durable] = []

    def open(self, hello: Hello) -> FakeIngest:
        return self.ingest

    def session(self, port: int):  # type: ignore[no-untyped-def]
        return connect("127.0.0.1", port, tls=None, hello=HELLO, rate_bytes_per_s=None)


async def test_batches_arrive_whole_and_in_order_and_each_is_answered() -> None:
    there = Replica()
    sent = [batch(10, 3, 4608), batch(13, 1, 2_500_096), batch(14, 2, 1024)]
    async with replica(there.open) as port, there.session(port) as session:
        session.on_durable = there.durable.append
        for writes in sent:
            await session.stream(writes, Flush(writes.first_seq + len(writes.rows) - 1, 7, 1000))
        await session.stream(None, Flush(15, 0, 2000))
        await session.stream_mark(StreamMark(4, 15, 141, 3000, "noon"))
        await session.wait_durable()
    seqs = [each.seq for each in there.durable]
    assert len(seqs) == 5 and seqs == sorted(seqs), "each is answered, those that came together with one word"
    assert (seqs[-1], there.durable[-1].protected_through_ns) == (15, 3000)
    assert there.durable[-1].mark == 4 and there.ingest.marks == [StreamMark(4, 15, 141, 3000, "noon")]
    for got, writes in zip(there.ingest.batches, sent, strict=True):
        assert bytes(got.contents) == writes.contents and (got.rows == writes.rows).all()
        assert (got.first_seq, got.digest) == (writes.first_seq, 7)


async def test_a_transfer_and_a_stream_go_side_by_side() -> None:
    there = Replica()
    block = bytes(range(256)) * 16
    async with replica(there.open) as port, there.session(port) as session:
        session.on_durable = there.durable.append
        await session.begin(MANIFEST)
        for number in range(20):
            await session.send(Data(Section.DIFF_BLOCKS, number * 4096, block))
            await session.stream(batch(10 + number, 1, 512), Flush(10 + number, 7, 0))
            if number == 10:
                await session.send(Checkpoint((1,)))
        welcome = await session.finish(End((0, 20 * 4096, 0, 0, 0)))
        await session.wait_durable()
    assert welcome.mark == 4 and bytes(there.ingest.sections[1]) == block * 20
    assert len(there.ingest.batches) == 20 and there.durable[-1].seq == 29


async def test_no_more_is_under_way_than_the_window_says() -> None:
    there = Replica()
    hold = there.ingest.hold_flush = threading.Event()
    async with replica(there.open) as port, there.session(port) as session:
        await session.stream(batch(10, 1, 100_352), Flush(10, 7, 0), 150_000)
        with trio.move_on_after(0.3) as scope:
            await session.stream(batch(11, 1, 100_352), Flush(11, 7, 0), 150_000)
        assert scope.cancelled_caught
        hold.set()
        await session.stream(batch(11, 1, 100_352), Flush(11, 7, 0), 150_000)
        await session.wait_durable()
    assert [writes.first_seq for writes in there.ingest.batches] == [10, 11]


async def test_a_full_replica_ends_the_stream_with_its_word() -> None:
    there = Replica({"write": CapacityError("db1: no room")})
    async with replica(there.open) as port:
        with pytest.raises(CapacityError, match="db1: no room"):
            async with there.session(port) as session:
                await session.stream(batch(10, 1, 512), Flush(10, 7, 0))
                await session.wait_durable()


async def test_a_mark_within_a_batch_is_a_mistake() -> None:
    there = Replica()
    async with replica(there.open) as port:
        with pytest.raises(LinkError, match="MARK within a batch"):
            async with there.session(port) as session:
                await session._put(Data(Section.WRITES, 10, batch(10, 1, 512).rows.tobytes()))
                await session.stream_mark(StreamMark(4, 10, 100, 100))
                await session.wait_durable()


async def test_flushes_that_came_together_are_made_durable_once() -> None:
    there = Replica()
    hold = there.ingest.hold_flush = threading.Event()
    async with replica(there.open) as port, there.session(port) as session:
        session.on_durable = there.durable.append
        await session.stream(batch(10, 1, 512), Flush(10, 7, 0))
        while "write" not in there.ingest.calls:
            await trio.sleep(0.001)
        for seq in range(11, 19):  # while the first is under way
            await session.stream(batch(seq, 1, 512), Flush(seq, 7, 0))
        await trio.sleep(0.1)  # for them to be there: else the count below proves less, nothing wrong
        hold.set()
        await session.wait_durable()
    assert [each.seq for each in there.durable][-1] == 18 and len(there.durable) == 9
    assert there.ingest.calls.count("flush") < 9
