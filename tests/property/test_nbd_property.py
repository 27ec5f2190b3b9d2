"""NBD clients that send nonsense: refused by the protocol, and by a server in which others go on."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pitfs.errors import RemoteProtocolError
from pitfs.model.transfer import VolumeInfo
from pitfs.nbd.negotiation import ExportInfo, ListExports, LookUpExport, StartTls
from pitfs.nbd.protocol import NbdProtocol, Request
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers import nbd
from tests.helpers.nbd import nbd_client, nbd_server
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

NAME = "latest/root"
SIZE = 70 * 4096
EXPORT = ExportInfo(NAME, "fuzzed", SIZE, 4096)
WHOLE = nbd.session(
    NAME,
    nbd.request(nbd.READ, 0, 4096),
    nbd.request(nbd.READ, 100, SIZE - 200, flags=nbd.DF),
    nbd.request(nbd.WRITE, 0, 9) + b"not taken",
    nbd.request(nbd.BLOCK_STATUS, 0, SIZE),
    nbd.request(nbd.CACHE, 4096, 8192),
    nbd.request(nbd.READ, SIZE - 1, 1),
)
SIMPLE = struct.pack(">I", 1) + nbd.option(nbd.EXPORT_NAME, NAME.encode()) + nbd.request(nbd.READ, 0, SIZE)
SESSIONS = (WHOLE, SIMPLE, struct.pack(">I", 3) + nbd.option(nbd.LIST) + nbd.go(NAME, nbd.INFO) + WHOLE[4:])
MAX_HELD_BYTES = 16 + (32 << 10)  # one option


def feed(data: bytes, size: int, tls: bool = False) -> list[Request]:
    """Gives a session to the protocol and answers as a server would; the valid requests in it."""
    protocol, requests = NbdProtocol(offers_tls=tls), []
    for start in range(0, len(data), size):
        for event in protocol.receive(data[start : start + size]):
            if isinstance(event, Request):
                assert event.size > 0 and event.offset + event.size <= SIZE
                requests.append(event)
            elif isinstance(event, ListExports):
                protocol.answer_list([(NAME, "")])
            elif isinstance(event, LookUpExport):
                protocol.answer_export(EXPORT if event.name == NAME else None, "none")
            elif isinstance(event, StartTls):
                protocol.tls_started()
        assert len(protocol._part) <= MAX_HELD_BYTES
    protocol.receive_eof()
    return requests


def mutated(draw: random.Random) -> bytes:
    """A session with bytes changed, cut out, doubled, put in, and numbers made extreme."""
    data = bytearray(draw.choice(SESSIONS))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        match draw.randrange(6):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                data[at] ^= 1 << draw.randrange(8)
            case 2:
                del data[at : at + draw.randint(1, 40)]
                data += b"\0"
            case 3:
                data[at:at] = data[at : at + draw.randint(1, 100)]
            case 4:
                data[at:at] = draw.randbytes(draw.randint(1, 20))
            case 5:
                data[at : at + 4] = draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x02\0\0\1"))
    return bytes(data)


@given(
    data=st.binary(max_size=300),
    after=st.sampled_from([0, 4, len(WHOLE) - 28 * 7 - 9, len(WHOLE) - 28]),
    tls=st.booleans(),
)
def test_random_bytes_raise_nothing_but_remote_protocol_error(data: bytes, after: int, tls: bool) -> None:
    with suppress(RemoteProtocolError):
        feed(WHOLE[:after] + data, 50, tls)


def rounds(seed: int, count: int) -> dict[str, int]:
    draw, outcomes = random.Random(seed), {"refused": 0, "accepted": 0}
    for _ in range(count):
        try:
            feed(mutated(draw), draw.choice((1, 7, 1000)), draw.random() < 0.1)
        except RemoteProtocolError:
            outcomes["refused"] += 1
        else:
            outcomes["accepted"] += 1
    return outcomes


def test_mutated_sessions_raise_nothing_but_remote_protocol_error() -> None:
    outcomes = rounds(20261122, 2_000)
    assert min(outcomes.values()) > 200, outcomes


@pytest.mark.slow
def test_many_mutated_sessions_raise_nothing_but_remote_protocol_error() -> None:
    rounds(20261123, 300_000)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    history = History(1, (VolumeInfo("root", SIZE, 4096),))
    ingest = Ingest(str(tmp_path / "stores"), history.hello)
    ingest_transfer(ingest, history.close_interval())
    ingest.close()
    store = Store.open(ingest.path)
    yield store
    store.close()


async def fuzz_server(store: Store, tmp: Path, seed: int, count: int) -> None:
    draw = random.Random(seed)

    async def attack(path: Path) -> None:
        data, size, reads = mutated(draw), draw.choice((7, 100, 5000)), draw.random() < 0.7
        async with await trio.open_unix_socket(path) as stream, trio.open_nursery() as nursery:

            async def read_on() -> None:
                with suppress(trio.BrokenResourceError):
                    while await stream.receive_some(1 << 16):
                        pass

            if reads:
                nursery.start_soon(read_on)
            with suppress(trio.BrokenResourceError):
                for start in range(0, len(data), size):
                    await stream.send_all(data[start : start + size])
                if draw.random() < 0.7:
                    await stream.send_eof()
                    with trio.move_on_after(0.05):
                        await trio.sleep_forever()
            nursery.cancel_scope.cancel()

    async with nbd_server(store, tmp) as path, nbd_client(path) as steady:
        await steady.open(NAME)
        wanted = (await steady.read(0, SIZE)).whole
        for _ in range(count // 10):
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(attack, path)
            assert (await steady.read(0, SIZE)).whole == wanted


async def test_a_server_outlives_clients_that_send_nonsense(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await fuzz_server(store, tmp_path, 20261122, 200)
    assert "bug in pitfs" not in caplog.text and "doesn't keep to the protocol" in caplog.text


@pytest.mark.slow
async def test_a_server_outlives_many_clients_that_send_nonsense(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await fuzz_server(store, tmp_path, 20261123, 5_000)
    assert "bug in pitfs" not in caplog.text
