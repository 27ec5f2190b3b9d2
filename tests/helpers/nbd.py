"""An NBD client of its own, by the protocol's text: numbers stand here again, so that they check pitfs's."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from pitfs.nbd.exports import Exports
from pitfs.nbd.server import StartTls, serve
from pitfs.store.pins.pins import Pins
from pitfs.store.store import Store
from pitfs.view.tree import Tree

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 2, 3, 5, 6, 7, 8, 9, 10
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
DF, REQ_ONE = 4, 8
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_TLS_REQD, ERR_UNKNOWN = (0x80000000 + number for number in (1, 2, 3, 5, 6))
EPERM, EIO, EINVAL = 1, 5, 22
GREETING = bytes.fromhex("4e42444d41474943 49484156454f5054 0003")
CONTEXT = "base:allocation"


def counted(text: str) -> bytes:
    return struct.pack(">I", len(text.encode())) + text.encode()


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def go(name: str, number: int = GO, infos: tuple[int, ...] = (3,)) -> bytes:
    return option(number, counted(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos))


def meta(name: str, *queries: str, number: int = SET_META) -> bytes:
    return option(number, counted(name) + struct.pack(">I", len(queries)) + b"".join(map(counted, queries)))


def request(command: int, offset: int = 0, size: int = 0, cookie: int = 7, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, size)


def session(name: str, *requests: bytes) -> bytes:
    """All that a client with structured replies and block status sends."""
    opening = struct.pack(">I", 3) + option(STRUCTURED) + meta(name, CONTEXT) + go(name)
    return opening + b"".join(requests) + request(DISC)


@dataclass
class Answer:
    """A whole reply: what came of a read and where, errors with the offset that they name, extents."""

    cookie: int = 0
    data: dict[int, bytes] = field(default_factory=dict)
    errors: list[tuple[int, int | None]] = field(default_factory=list)
    extents: list[tuple[int, int]] = field(default_factory=list)

    @property
    def whole(self) -> bytes:
        """The data of a read that has no hole."""
        assert not self.errors
        at = min(self.data)
        joined = b""
        for offset in sorted(self.data):
            assert offset == at + len(joined), "a gap, or data twice"
            joined += self.data[offset]
        return joined


class Client:
    """A client over a connected stream; every wait is for a whole message."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.structured = False
        self._kept = b""
        self._sizes: dict[int, tuple[int, int]] = {}  # of reads, by cookie

    async def take(self, size: int) -> bytes:
        while len(self._kept) < size:
            more = await self.stream.receive_some(1 << 20)
            if not more:
                raise EOFError
            self._kept += more
        taken, self._kept = self._kept[:size], self._kept[size:]
        return taken

    async def greet(self, flags: int = 3) -> None:
        assert await self.take(18) == GREETING
        await self.stream.send_all(struct.pack(">I", flags))

    async def ask(self, data: bytes) -> list[tuple[int, bytes]]:
        """Sends an option; (type, data) of each reply to it."""
        await self.stream.send_all(data)
        number, replies = struct.unpack_from(">I", data, 8)[0], []
        while not replies or (replies[-1][0] != ACK and not replies[-1][0] >> 31):
            magic, answered, kind, length = struct.unpack(">QIII", await self.take(20))
            assert (magic, answered) == (0x3E889045565A9, number)
            replies.append((kind, await self.take(length)))
        return replies

    async def open(self, name: str, *, structured: bool = True) -> tuple[int, int]:
        """(size, flags) of the export."""
        await self.greet()
        if structured:
            self.structured = True
            assert await self.ask(option(STRUCTURED)) == [(ACK, b"")]
            selected = await self.ask(meta(name, CONTEXT))
            assert selected == [(META, b"\0\0\0\1base:allocation"), (ACK, b"")]
        replies = await self.ask(go(name))
        assert replies[-1] == (ACK, b""), replies[-1][1].decode()
        kind, size, flags = struct.unpack(">HQH", replies[0][1])
        assert kind == 0
        return size, flags

    async def say(self, command: int, offset: int = 0, size: int = 0, cookie: int = 7, flags: int = 0) -> None:
        self._sizes[cookie] = offset, size if command == READ else 0
        await self.stream.send_all(request(command, offset, size, cookie, flags))

    async def answer(self) -> Answer:
        """The next whole reply; of structured ones that are mixed with each other, use `chunk`."""
        if not self.structured:
            magic, error, cookie = struct.unpack(">IIQ", await self.take(16))
            assert magic == 0x67446698
            if error:
                return Answer(cookie, errors=[(error, None)])
            offset, size = self._sizes[cookie]
            return Answer(cookie, {offset: await self.take(size)} if size else {})
        answer, is_last = Answer(), False
        while not is_last:
            cookie, is_last = await self.chunk(answer)
        answer.cookie = cookie
        return answer

    async def chunk(self, answer: Answer) -> tuple[int, bool]:
        """Takes a chunk into the answer; its cookie, and whether it was the last one."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", await self.take(20))
        assert magic == 0x668E33EF and flags in (0, 1)
        payload = await self.take(length)
        match kind:
            case 0:
                assert not payload and flags
            case 1:
                answer.data[struct.unpack_from(">Q", payload)[0]] = payload[8:]
            case 5:
                numbers = struct.unpack(f">{length // 4}I", payload)
                assert numbers[0] == 1
                answer.extents += list(zip(numbers[1::2], numbers[2::2], strict=True))
            case 0x8001 | 0x8002:
                error, text = struct.unpack_from(">IH", payload)
                place = payload[6 + text :]
                answer.errors.append((error, struct.unpack(">Q", place)[0] if kind == 0x8002 else None))
            case _:
                raise AssertionError(f"chunk of type {kind}")
        return cookie, bool(flags)

    async def read(self, offset: int, size: int, flags: int = 0) -> Answer:
        await self.say(READ, offset, size, flags=flags)
        return await self.answer()

    async def is_closed(self) -> bool:
        """Whether the server closes the connection without another word."""
        try:
            return not self._kept and not await self.stream.receive_some(1)
        except trio.BrokenResourceError:
            return True


@asynccontextmanager
async def nbd_server(store: Store, tmp: Path, start_tls: StartTls | None = None) -> AsyncIterator[Path]:
    """A server in this process; the path of its socket."""
    path = tmp / "nbd.sock"
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen(128)
    tree = Tree(store, lambda: 1_800_000_000 * 10**9)
    with Pins(store.path, "serve-nbd test") as holder:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, [trio.SocketListener(listening)], Exports(store, tree, holder), start_tls)
            yield path
            nursery.cancel_scope.cancel()
    path.unlink()


@asynccontextmanager
async def nbd_client(path: Path) -> AsyncIterator[Client]:
    async with await trio.open_unix_socket(path) as stream:
        yield Client(stream)
