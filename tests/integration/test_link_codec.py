"""The codec on a connection: one stream each, its window agreed on, and stepping back where it holds things up."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import trio

from pitfs.link.codec.adaptive import AdaptiveCompression
from pitfs.link.sessions.connect import Limits, SenderSession, connect
from pitfs.model.transfer import JOURNAL_ENTRY, Checkpoint, Data, End, Hello, Section
from tests.helpers.links import HELLO, MANIFEST, FakeIngest, replica

MIB = 1 << 20
TEXT = (
    random.Random(5).randbytes(MIB // 2).hex().encode()
)  # shrinks to a half, and to nothing the second time


@dataclass
class Opener:
    made: list[FakeIngest] = field(default_factory=list)

    def __call__(self, hello: Hello) -> FakeIngest:
        self.made.append(FakeIngest(hello))
        return self.made[-1]


@asynccontextmanager
async def link(
    port: int, *, group: str = "db1", rate: int | None = None, window: int = 32 * MIB
) -> AsyncIterator[SenderSession]:
    async with connect(
        "127.0.0.1", port, tls=None, hello=hello_of(group), rate_bytes_per_s=rate, window_bytes=window
    ) as session:
        yield session


def hello_of(group: str) -> Hello:
    return Hello(group, HELLO.history, HELLO.volumes)


async def ship(session: SenderSession, *payloads: bytes) -> int:
    """One transfer of contents; returns the bytes that it took on the wire."""
    before = session.wire_bytes
    await session.begin(MANIFEST)
    offset = 0
    for payload in payloads:
        await session.send(Data(Section.DIFF_BLOCKS, offset, payload))
        await session.send(Checkpoint(()))
        offset += len(payload)
    await session.finish(End((0, offset, 0, 0, 0)))
    return session.wire_bytes - before


async def test_the_stream_goes_on_from_one_transfer_to_the_next() -> None:
    async with replica(Opener()) as port, link(port) as session:
        first, second = await ship(session, TEXT), await ship(session, TEXT)
        assert 0.5 * MIB < first < 0.7 * MIB and second < 0.02 * MIB


async def test_after_a_reconnect_it_begins_anew_on_both_sides() -> None:
    opener = Opener()
    async with replica(opener) as port:
        for _ in range(2):
            async with link(port) as session:
                assert await ship(session, TEXT) > 0.5 * MIB
                assert await ship(session, TEXT) < 0.02 * MIB
    assert [bytes(ingest.sections[1]) for ingest in opener.made] == [TEXT] * 2


async def test_a_connection_that_breaks_within_a_transfer_leaves_nothing_to_the_next() -> None:
    opener = Opener()
    async with replica(opener) as port:
        async with link(port) as session:
            await session.begin(MANIFEST)
            await session.send(Data(Section.DIFF_BLOCKS, 0, TEXT))
            await session.send(Checkpoint(()))
            while not session.durable.lengths[1]:
                await trio.sleep(0.001)
            await session.connection.stream.aclose()
        async with link(port) as session:
            await session.begin(MANIFEST)
            await session.send(Data(Section.DIFF_BLOCKS, 0, TEXT))
            await session.finish(End((0, len(TEXT), 0, 0, 0)))
    assert bytes(opener.made[-1].sections[1]) == TEXT


@pytest.mark.parametrize(("ours", "theirs", "agreed"), [(8, 32, 8), (32, 2, 2), (1, 1, 1), (128, 128, 128)])
async def test_the_smaller_window_of_both_sides_is_used(ours: int, theirs: int, agreed: int) -> None:
    opener = Opener()
    limits = Limits(window_bytes=theirs * MIB)
    async with replica(opener, limits=limits) as port, link(port, window=ours * MIB) as session:
        assert session.window_bytes == agreed * MIB
        others = [random.Random(seed).randbytes(MIB // 2).hex().encode() for seed in range(3)]
        await ship(session, TEXT, *others)
        assert (await ship(session, TEXT) < 0.02 * MIB) is (agreed > 4)
    assert bytes(opener.made[0].sections[1]) == TEXT


async def test_connections_beside_the_first_get_smaller_windows_until_it_is_gone() -> None:
    async with replica(Opener()) as port, AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(link(port, group=f"g{index}")) for index in range(3)]
        assert [session.window_bytes // MIB for session in sessions] == [32, 16, 8]
        async with link(port, group="g0") as again:  # takes over: the older one's window is free then
            assert again.window_bytes == 16 * MIB


async def test_rows_cost_little_and_arrive_as_they_were() -> None:
    rows = np.zeros(10_000, JOURNAL_ENTRY)
    rows["block"], rows["seq"] = np.arange(10_000) * 3, np.random.default_rng(1).integers(1, 1 << 16, 10_000)
    opener = Opener()
    async with replica(opener) as port, link(port) as session:
        await session.begin(MANIFEST)
        for start in range(0, len(rows), 1000):
            part = rows[start : start + 1000]
            await session.send(Data(Section.JOURNAL, start * rows.itemsize, part.tobytes()))
        await session.finish(End((0, 0, 0, rows.nbytes, 0)))
        assert session.wire_bytes < 4 * len(rows)
    assert bytes(opener.made[0].sections[3]) == rows.tobytes()


class ChosenCompression(AdaptiveCompression):
    """Compresses or not as the test chooses, and records what it observes."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = True
        self.seen: list[tuple[int, float, float, float]] = []
        self.link_bytes_per_s = 0.0

    @property
    def compresses(self) -> bool:
        return self.chosen

    def observe(
        self, payload_bytes: int, *, idle_s: float, encode_s: float, room_s: float, link_bytes_per_s: float
    ) -> None:
        self.seen.append((payload_bytes, idle_s, encode_s, room_s))
        self.link_bytes_per_s = link_bytes_per_s


async def test_while_it_steps_back_everything_goes_raw_and_then_the_stream_goes_on() -> None:
    opener = Opener()
    async with replica(opener) as port, link(port) as session:
        compression = session.compression = ChosenCompression()
        sizes = []
        for compression.chosen in (True, False, True):
            sizes.append(await ship(session, TEXT))
        assert sizes[0] < 0.7 * MIB < MIB < sizes[1] and sizes[2] < 0.02 * MIB
        assert sum(payload_bytes for payload_bytes, *_ in compression.seen) == 3 * MIB
        assert all(min(times) >= 0 for _, *times in compression.seen)
        assert sum(encode_s for _, _, encode_s, _ in compression.seen) > 0
        assert compression.link_bytes_per_s > 10 * MIB  # loopback


async def test_a_slow_link_shows_as_waiting_for_room_and_a_slow_caller_as_idle() -> None:
    async with replica(Opener()) as port, link(port, rate=8 * MIB) as session:
        compression = session.compression = ChosenCompression()
        await ship(session, *[random.Random(seed).randbytes(MIB) for seed in range(16)])
        await trio.sleep(0.2)  # not to wait for something: it is what is measured
        await ship(session, TEXT)
        assert sum(room_s for *_, room_s in compression.seen) > 0.5
        assert sum(idle_s for _, idle_s, *_ in compression.seen) > 0.2


async def test_the_configured_rate_keeps_it_from_stepping_back() -> None:
    async with replica(Opener()) as port:
        async with link(port, rate=100 * MIB) as session:
            cap = session.compression.cap_bytes_per_s
            assert cap is not None and 90 * MIB < cap <= 100 * MIB, "less what packets' headers take"
        async with link(port) as session:
            assert session.compression.cap_bytes_per_s is None
