"""Contents that the replica wants, over loopback: asked for and given beside all else, with fakes on both ends."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
import trio

from pitfs.errors import PitfsError
from pitfs.link.sessions import receiver
from pitfs.link.sessions.connect import connect
from pitfs.model.transfer import Checkpoint, Data, End, Hello, Section, Wanted
from tests.helpers.links import HELLO, MANIFEST, FakeIngest, replica

pytestmark = pytest.mark.usefixtures("_soon")


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "LOOK_S", 0.01)
    monkeypatch.setattr(receiver, "RETRY_S", 0.05)


class FakeHealer:
    """Wants what it is told to, and keeps what came."""

    def __init__(self, batches: Sequence[tuple[Wanted, ...]] = ()) -> None:
        self.batches = list(batches)
        self.taken: list[bytes | None] = []
        self.errors: list[Exception] = []  # that `take` raises, one each time
        self.looked = 0
        self.closed = threading.Event()

    def __call__(self, hello: Hello) -> FakeHealer:
        assert hello == HELLO
        return self

    def wanted(self) -> tuple[Wanted, ...]:
        self.looked += 1
        return self.batches[0] if self.batches else ()

    def take(self, contents: Sequence[bytes | None]) -> None:
        if self.errors:
            raise self.errors.pop()
        assert len(contents) == len(self.batches.pop(0))
        self.taken += contents

    def close(self) -> None:
        self.closed.set()

    async def has_taken(self, count: int) -> None:
        with trio.fail_after(10):
            while len(self.taken) < count:
                await trio.sleep(0.01)


def wanted(*blocks: int) -> tuple[Wanted, ...]:
    return tuple(Wanted(0, block, block, 0, 9) for block in blocks)


async def even_ones(asked: Sequence[Wanted]) -> list[bytes | None]:
    """This production has the contents of even blocks."""
    return [None if each.block % 2 else bytes([each.block]) * 512 for each in asked]


def link(port: int, rate: int | None = None):  # type: ignore[no-untyped-def]
    return connect("127.0.0.1", port, tls=None, hello=HELLO, rate_bytes_per_s=rate)


async def test_each_content_is_answered_in_order_beside_a_transfer() -> None:
    healer = FakeHealer([wanted(1, 2), wanted(4)])
    async with replica(FakeIngest, open_healer=healer) as port, link(port) as session:
        session.answer_wants(even_ones)
        await session.begin(MANIFEST)
        await session.send(Data(Section.DIFF, 0, bytes(64)))
        await healer.has_taken(3)
        await session.send(Checkpoint(()))
        await session.finish(End((64, 0, 0, 0, 0)))
    assert healer.taken == [None, bytes([2]) * 512, bytes([4]) * 512]
    with trio.fail_after(5):
        await trio.to_thread.run_sync(healer.closed.wait)


async def test_where_nothing_is_wanted_nothing_is_sent() -> None:
    healer = FakeHealer()
    async with replica(FakeIngest, open_healer=healer) as port, link(port) as session:
        session.answer_wants(even_ones)
        before = session.wire_bytes
        with trio.fail_after(5):
            while healer.looked < 3:
                await trio.sleep(0.01)
        assert session.wire_bytes == before


@pytest.mark.parametrize("side", ["sender", "protocol"])
async def test_a_peer_of_the_first_version_is_asked_nothing(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that sends is old, or the one that receives: both go on as ever."""
    where = {"sender": "sender.VERSIONS", "protocol": "receiver.frames.VERSIONS"}[side]
    monkeypatch.setattr(f"pitfs.link.sessions.{where}", (1,))
    healer = FakeHealer([wanted(2)])
    async with replica(FakeIngest, open_healer=healer) as port, link(port) as session:
        session.answer_wants(even_ones)
        await session.begin(MANIFEST)
        assert (await session.finish(End((0, 0, 0, 0, 0)))).mark == 1
        await trio.sleep(0.1)
    assert healer.looked == 0 and healer.taken == []


async def test_a_production_that_is_not_ready_yet_answers_later() -> None:
    healer = FakeHealer([wanted(2)])
    async with replica(FakeIngest, open_healer=healer) as port, link(port) as session:
        await trio.sleep(0.1)
        assert healer.taken == []
        session.answer_wants(even_ones)
        await healer.has_taken(1)


async def test_while_the_link_is_busy_contents_wait_and_go_at_a_low_rate() -> None:
    """A content of 512 bytes waits an eighth of a second at most; the transfer hardly notices."""
    healer = FakeHealer([wanted(*range(0, 200, 2))])
    chunks = [random.Random(index).randbytes(64 << 10) for index in range(10)]
    async with replica(FakeIngest, open_healer=healer) as port, link(port, rate=400_000) as session:
        session.answer_wants(even_ones)
        await session.begin(MANIFEST)
        begun = trio.current_time()
        for index, chunk in enumerate(chunks):
            await session.send(Data(Section.DIFF_BLOCKS, index * len(chunk), chunk))
        await session.send(Checkpoint(()))
        await session.finish(End((0, 10 * len(chunk), 0, 0, 0)))
        elapsed, besides = trio.current_time() - begun, session.wire_bytes - 10 * len(chunk)
        assert besides < 8 * (elapsed + 2) * 600
        await healer.has_taken(100)
        assert session.wire_bytes - 10 * len(chunk) > 100 * 512


async def test_an_error_of_the_disk_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    healer = FakeHealer([wanted(2)])
    healer.errors = [PitfsError("/s/objects/x: healing: Input/output error")]
    async with replica(FakeIngest, open_healer=healer) as port, link(port) as session:
        session.answer_wants(even_ones)
        await healer.has_taken(1)
        await session.begin(MANIFEST)  # the session lives
    assert "Input/output error" in caplog.text


async def test_what_was_asked_when_the_link_was_cut_is_asked_again() -> None:
    healer = FakeHealer([wanted(2, 4)])

    async def never(asked: Sequence[Wanted]) -> list[bytes | None]:
        await trio.sleep_forever()
        raise AssertionError

    async with replica(FakeIngest, open_healer=healer) as port:
        async with link(port) as session:
            session.answer_wants(never)
            await trio.sleep(0.1)
        assert healer.taken == []
        async with link(port) as session:
            session.answer_wants(even_ones)
            await healer.has_taken(2)


async def test_a_mistake_of_who_finds_contents_ends_the_session_with_its_error() -> None:
    healer = FakeHealer([wanted(2)])

    async def fails(asked: Sequence[Wanted]) -> list[bytes | None]:
        raise ZeroDivisionError

    async with replica(FakeIngest, open_healer=healer) as port, link(port) as session:
        session.answer_wants(fails)
        with trio.fail_after(5):
            while session.failure is None:
                await trio.sleep(0.01)
        assert isinstance(session.failure, ZeroDivisionError)


