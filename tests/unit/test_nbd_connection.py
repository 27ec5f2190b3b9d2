"""A server in this process: reads however they are asked for, damage, clients that are slow, silent or too many."""

from __future__ import annotations

import os
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from pitfs.model.transfer import VolumeInfo
from pitfs.nbd.connection import MAX_REQUESTS, PIECE_BYTES
from pitfs.nbd.server import HANDSHAKE_S, MAX_CONNECTIONS
from pitfs.store.ingest import Ingest
from pitfs.store.pins.pins import list_pins
from pitfs.store.store import Store
from pitfs.view.view import PointInTimeView, ReadBuffer
from tests.helpers import nbd
from tests.helpers.nbd import Client, nbd_client, nbd_server
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

BLOCKS = 300  # more than a piece has
ROOT = VolumeInfo("root", BLOCKS * 4096 - 1000, 4096)
SMALL = VolumeInfo("small", 10_000, 512)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[History, str]:
    history = History(3, (ROOT, SMALL))
    ingest = Ingest(str(tmp_path_factory.mktemp("stores")), history.hello)
    ingest_transfer(ingest, history.close_interval(None, ["start"]))
    for _ in range(8):
        history.write()
    ingest_transfer(ingest, history.close_interval(0, []))
    ingest.close()
    return history, ingest.path


@pytest.fixture
def store(history: tuple[History, str]) -> Iterator[Store]:
    store = Store.open(history[1])
    yield store
    store.close()


@pytest.fixture
def image(history: tuple[History, str]) -> bytes:
    return history[0].states[-1][0]


@pytest.mark.parametrize("structured", [True, False])
async def test_reads_of_any_offset_and_size_are_those_of_the_image(
    store: Store, tmp_path: Path, image: bytes, structured: bool
) -> None:
    async with nbd_server(store, tmp_path) as path, nbd_client(path) as client:
        flags = 0x583 if structured else 0x503
        assert await client.open("latest/root", structured=structured) == (ROOT.size_bytes, flags)
        for offset, size in (
            (0, 1), (0, 4096), (4095, 2), (1000, 100_000), (PIECE_BYTES - 1, 2), (0, len(image)),
            (len(image) - 1, 1), (777, len(image) - 777),
        ):  # fmt: skip
            assert (await client.read(offset, size)).whole == image[offset : offset + size]
        if structured:
            answer = await client.read(5, len(image) - 5, nbd.DF)
            assert answer.data == {5: image[5:]}  # one chunk
        await client.say(nbd.CACHE, 0, len(image))
        assert (await client.answer()).errors == []
        assert (await client.read(len(image) - 10, 11)).errors == [(nbd.EINVAL, None)]


async def test_each_name_leads_to_its_instant_and_stays_there(
    store: Store, tmp_path: Path, history: tuple[History, str]
) -> None:
    made, _ = history
    async with nbd_server(store, tmp_path) as path:
        for name, seq in (
            ("latest/root", 8), ("seq-5/root", 5), ("bookmarks/start/root", 0),
            ("times/2025-11-22/23-54/23-54-00/root", 8), ("2025-11-22T23:54:00Z/root", 0),
        ):  # fmt: skip
            async with nbd_client(path) as client:
                await client.open(name)
                assert (await client.read(0, ROOT.size_bytes)).whole == made.states[seq][0]
                (holder,) = [each for each in list_pins(store.path) if each.instants]
                assert [position.seq for position in holder.instants] == [seq]
        with trio.fail_after(5):
            while any(each.instants for each in list_pins(store.path)):
                await trio.testing.wait_all_tasks_blocked(0.01)
        async with nbd_client(path) as client:
            await client.greet()
            for name in ("", "root", "latest", "latest/", "latest/swap", "latest/root.img", "/latest/root",
                         "../latest/root", "seq-99/root", "bookmarks/none/root", "bookmarks/root", "times/root",
                         "x" * 5000):  # fmt: skip
                ((kind, text),) = await client.ask(nbd.go(name))
                assert kind == (nbd.ERR_UNKNOWN if len(name) <= 4096 else nbd.ERR_INVALID)
                assert repr(name) in text.decode() or kind == nbd.ERR_INVALID
            listed = await client.ask(nbd.option(nbd.LIST))
            assert len(listed) == 2 * 3 + 1  # latest and two snapshots, of two volumes
            assert any(b"latest/small" in data for _, data in listed)


async def test_block_status_is_where_the_image_has_data(store: Store, tmp_path: Path) -> None:
    latest = store.latest()
    assert latest is not None
    ranges = list(PointInTimeView(store, latest, 0).data_ranges())
    async with nbd_server(store, tmp_path) as path, nbd_client(path) as client:
        await client.open("latest/root")

        async def extents(offset: int, size: int, flags: int = 0) -> list[tuple[int, int]]:
            await client.say(nbd.BLOCK_STATUS, offset, size, flags=flags)
            return (await client.answer()).extents

        found, at = [], 0
        for length, flags in await extents(0, ROOT.size_bytes):
            if not flags:
                found.append((at, at + length))
            at += length
        assert found == ranges and at == ROOT.size_bytes and len(ranges) > 10
        assert sum(length for length, _ in await extents(5000, 100_000)) == 100_000
        low, high = ranges[1]
        assert await extents(low, 1 << 20, nbd.REQ_ONE) == [(high - low, 0)]
        assert await extents(low, 100) == [(100, 0)]
        assert await extents(high, 10) == [(10, 3)]


async def test_a_damaged_block_is_an_error_for_its_range_and_the_rest_is_readable(
    store: Store, tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = os.preadv
    latest = store.latest()
    assert latest is not None
    low, high = next((a, b) for a, b in PointInTimeView(store, latest, 0).data_ranges() if b - a >= 3 * 4096)
    damaged = image[low + 4096 : low + 8192]

    def preadv(fd: int, buffers: tuple[memoryview, ...], offset: int, flags: int = 0) -> int:
        count = read(fd, buffers, offset, flags)
        at = bytes(buffers[0][:count]).find(damaged)
        if at >= 0:
            buffers[0][at] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    async with nbd_server(store, tmp_path) as path, nbd_client(path) as client:
        await client.open("latest/root")
        answer = await client.read(low, high - low)
        assert answer.errors == [(nbd.EIO, low + 4096)]
        for offset, data in answer.data.items():
            assert data == image[offset : offset + len(data)]
        assert sum(map(len, answer.data.values())) == high - low - 4096
        assert (await client.read(low + 5000, 1)).errors == [(nbd.EIO, low + 5000)]
        assert (await client.read(low, high - low, nbd.DF)).errors == [(nbd.EIO, None)]
        assert (await client.read(0, ROOT.size_bytes, nbd.DF)).errors == [(nbd.EIO, None)]
        await client.say(nbd.CACHE, low, high - low)
        assert (await client.answer()).errors == [(nbd.EIO, None)]
        assert (await client.read(low + 8192, high - low - 8192)).whole == image[low + 8192 : high]
        async with nbd_client(path) as old:
            await old.open("latest/root", structured=False)
            assert (await old.read(low, high - low)).errors == [(nbd.EIO, None)]
            assert (await old.read(low, 4096)).whole == image[low : low + 4096]
    assert "doesn't match its checksum" in caplog.text and "bug in pitfs" not in caplog.text


class SlowDisk:
    """Nothing is cached, and each read waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: list[int] = []
        self.let = {offset * 4096: threading.Event() for offset in range(BLOCKS)}
        real = PointInTimeView.read

        def read(view: PointInTimeView, offset: int, size: int, buffer: ReadBuffer) -> memoryview:
            self.waiting.append(offset)
            assert self.let[offset].wait(10)
            return real(view, offset, size, buffer)

        monkeypatch.setattr(PointInTimeView, "try_read_cached", lambda *args: None)
        monkeypatch.setattr(PointInTimeView, "read", read)

    async def has_waiting(self, count: int) -> None:
        with trio.fail_after(10):
            while len(self.waiting) < count:
                await trio.sleep(0.005)


async def test_cold_reads_are_under_way_together_and_answered_as_they_come(
    store: Store, tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    async with nbd_server(store, tmp_path) as path, nbd_client(path) as client:
        await client.open("latest/root")
        for number in range(MAX_REQUESTS + 5):
            await client.say(nbd.READ, number * 4096, 4096, cookie=number)
        await disk.has_waiting(MAX_REQUESTS)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert sorted(disk.waiting) == [number * 4096 for number in range(MAX_REQUESTS)]  # and no more
        for number in (9, 3):
            disk.let[number * 4096].set()
            answer = await client.answer()
            assert (answer.cookie, answer.whole) == (number, image[number * 4096 : number * 4096 + 4096])
        for event in disk.let.values():
            event.set()
        assert {(await client.answer()).cookie for _ in range(MAX_REQUESTS + 3)} == {*range(MAX_REQUESTS + 5)} - {9, 3}


async def test_a_goodbye_waits_for_what_is_under_way(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    async with nbd_server(store, tmp_path) as path, nbd_client(path) as client:
        await client.open("latest/root")
        await client.say(nbd.READ, 0, 4096)
        await client.stream.send_all(nbd.request(nbd.DISC))
        await disk.has_waiting(1)
        disk.let[0].set()
        assert len((await client.answer()).whole) == 4096
        assert await client.is_closed()


async def test_a_client_that_does_not_read_is_waited_for_and_holds_little(
    store: Store, tmp_path: Path, image: bytes
) -> None:
    """It asks for 200 MB; what it doesn't take isn't read, and others are served."""
    async with nbd_server(store, tmp_path) as path, nbd_client(path) as slow, nbd_client(path) as other:
        await slow.open("latest/root")
        await other.open("latest/root")
        await other.read(0, len(image))
        count = 200 * 10**6 // len(image)
        tracemalloc.start()
        try:
            for number in range(count):
                await slow.say(nbd.READ, 0, len(image), cookie=number)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert (await other.read(0, len(image))).whole == image
            assert tracemalloc.get_traced_memory()[1] < (2 + MAX_REQUESTS) * (PIECE_BYTES + 200_000)
        finally:
            tracemalloc.stop()
        for _ in range(3):
            assert (await slow.answer()).whole == image


async def test_further_clients_than_there_may_be_are_closed_and_idle_ones_cost_little(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with nbd_server(store, tmp_path) as path:
        streams = [await trio.open_unix_socket(path) for _ in range(200)]
        clients = [Client(stream) for stream in streams]
        for client in clients[:MAX_CONNECTIONS]:
            await client.open("latest/small")
        for client in clients[MAX_CONNECTIONS:]:
            assert await client.is_closed()
        assert caplog.text.count("64 clients are connected already") == 1
        await streams[0].aclose()
        with trio.fail_after(5):
            while True:
                async with nbd_client(path) as late:
                    try:
                        await late.open("latest/small")
                        break
                    except (EOFError, trio.BrokenResourceError):
                        await trio.sleep(0.01)
        for stream in streams:
            await stream.aclose()


async def test_a_client_that_opens_nothing_is_closed_and_one_that_did_may_be_silent(
    store: Store, tmp_path: Path, mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with nbd_server(store, tmp_path) as path, nbd_client(path) as silent, nbd_client(path) as other:
        await silent.greet()
        await other.open("latest/small")
        mock_clock.jump(HANDSHAKE_S + 1)
        assert await silent.is_closed()
        assert "opened no export within 30 s" in caplog.text
        mock_clock.jump(10**7)
        assert (await other.read(0, 100)).errors == []


async def test_a_mistake_of_ours_ends_one_connection_and_no_other(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = PointInTimeView.try_read_cached

    def fails_at_7(view: PointInTimeView, offset: int, size: int, buffer: ReadBuffer) -> memoryview | None:
        if offset == 7:
            raise ZeroDivisionError
        return real(view, offset, size, buffer)

    monkeypatch.setattr(PointInTimeView, "try_read_cached", fails_at_7)
    async with nbd_server(store, tmp_path) as path, nbd_client(path) as client, nbd_client(path) as other:
        await client.open("latest/small")
        await other.open("latest/small")
        await client.say(nbd.READ, 7, 1)
        assert await client.is_closed()
        assert "a bug in pitfs" in caplog.text
        assert (await other.read(8, 1)).errors == []
        async with nbd_client(path) as again:
            await again.open("latest/small")
