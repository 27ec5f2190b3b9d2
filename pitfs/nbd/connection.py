"""One connection of a client: the negotiation, then its requests.

What is in memory is answered at once, in the order of the requests. What may need the disk is read in
threads, several requests at a time, and answered as it comes. If a client doesn't read the replies, the
server waits for it: at most `MAX_REQUESTS` of its requests are under way. What they hold in memory is bounded
whatever their size, since a large read is answered in pieces.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Final, TypeVar

import trio

from pitfs.errors import CorruptionError, PitfsError, RemoteProtocolError
from pitfs.nbd.exports import Export, Exports, NoSuchExportError
from pitfs.nbd.negotiation import Close, ListExports, LookUpExport, NbdState, Send, StartTls
from pitfs.nbd.protocol import Buffer, Event, NbdProtocol, Request
from pitfs.nbd.stream import SocketStream, TlsStream, WrappedStream
from pitfs.nbd.wire import HOLE_AND_ZERO, Command, CommandFlag
from pitfs.view.ranges import cut
from pitfs.view.view import PointInTimeView, ReadBuffer

MAX_REQUESTS: Final = 16  # under way for one connection: what a disk likes to have queued
MAX_THREADS: Final = 16  # cold reads under way, of all connections
PIECE_BYTES: Final = 256 << 10  # read, verified and sent at once: 60 us from memory; nbdcopy's own size
SMALL_BYTES: Final = 64 << 10
MAX_LARGE: Final = 4  # pieces larger than that under way for one connection
MAX_EXTENTS: Final = 16 << 10  # of one answer; the client asks again from where they end
MAX_SPARE_BUFFERS: Final = 16
REPLY_BYTES: Final = 32 << 10  # a reply costs, beside its data, as much time as this many bytes of data
MAX_UNYIELDED_BYTES: Final = 1 << 20  # sent from memory before other connections get their turn

NO_DATA: Final = "damaged, or the disk failed: the server's log has the details"

T = TypeVar("T")
log = logging.getLogger(__name__)


class SharedResources:
    """What all connections of a server share."""

    def __init__(self, exports: Exports) -> None:
        self.exports = exports
        self.readers = trio.CapacityLimiter(MAX_THREADS)
        self._lookups = trio.CapacityLimiter(1)  # exports are for one thread at a time
        self._spare: list[ReadBuffer] = []

    async def query(self, function: Callable[..., T], *args: object) -> T:
        """Calls a method of the exports in a thread."""
        return await trio.to_thread.run_sync(function, *args, limiter=self._lookups)

    def acquire_buffer(self) -> ReadBuffer:
        return self._spare.pop() if self._spare else ReadBuffer(PIECE_BYTES)

    def release_buffer(self, buffer: ReadBuffer) -> None:
        if len(self._spare) < MAX_SPARE_BUFFERS:
            self._spare.append(buffer)


class Connection:
    """Serves one client: `negotiate`, then `serve`, and `release` in any case.

    The first two raise RemoteProtocolError if the client breaks the protocol, and OSError or
    trio.BrokenResourceError if the connection breaks.
    """

    def __init__(self, stream: SocketStream, peer: str, shared: SharedResources, *, offers_tls: bool) -> None:
        self._stream: SocketStream | WrappedStream = stream
        self._peer = peer
        self._shared = shared
        self._protocol = NbdProtocol(offers_tls=offers_tls)
        self._events: Iterator[Event] = iter(())
        self._sending = trio.Lock()  # one reply, or chunk of one, after the other
        self._slots = trio.Semaphore(MAX_REQUESTS)
        self._large = trio.Semaphore(MAX_LARGE)
        self._opened: Export | None = None
        self._view: PointInTimeView  # that is served, and by which tasks: of `serve`
        self._nursery: trio.Nursery
        self._unyielded_bytes = 0
        self._broken: Exception | None = None  # why a task of `serve` ended the connection

    async def _next(self) -> Event | None:
        """The client's next event; None at the end of the connection."""
        while (event := next(self._events, None)) is None:
            if self._protocol.state is NbdState.CLOSED:
                return None
            data = await self._stream.receive()
            if not data:
                self._protocol.receive_eof()
                return None
            self._events = self._protocol.receive(data)
        return event

    async def _send(self, header: bytes, data: Buffer = b"") -> None:
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            await self._stream.send(header, data)
        finally:
            self._sending.release()
        await self._yield_if_due(len(data))

    async def _yield_if_due(self, size: int) -> None:
        """Gives other connections their turn now and then: what is in memory is sent without a pause."""
        self._unyielded_bytes += size + REPLY_BYTES
        if self._unyielded_bytes > MAX_UNYIELDED_BYTES:
            self._unyielded_bytes = 0
            await trio.lowlevel.checkpoint()

    # -------------------------------------------------------------- negotiation

    async def negotiate(self, start_tls: Callable[[], Awaitable[TlsStream]] | None) -> Export | None:
        """The export that the client opens; None if it leaves first.

        Args:
            start_tls: puts TLS over the socket once the client wants it; raises PitfsError.

        Raises:
            PitfsError: TLS or reading the store fails.
        """
        await self._send(self._protocol.greeting())
        while (event := await self._next()) is not None:
            match event:
                case Send(data):
                    await self._send(data)
                case Close(data):
                    with contextlib.suppress(OSError, trio.BrokenResourceError):  # it may have closed already
                        await self._send(data)
                case ListExports():
                    listed = await self._shared.query(self._shared.exports.listed)
                    await self._send(self._protocol.answer_list(listed))
                case LookUpExport():
                    await self._answer_lookup(event.name, event.opens)
                    if self._opened is not None:
                        return self._opened
                case StartTls(data):
                    assert start_tls is not None
                    await self._send(data)
                    self._stream = WrappedStream(await start_tls())
                    self._protocol.tls_started()
        return None

    async def _answer_lookup(self, name: str, opens: bool) -> None:
        export, problem = None, ""
        try:
            export = await self._shared.query(partial(self._shared.exports.find, name, opens=opens))
        except NoSuchExportError as error:
            problem = str(error)
            log.info("%s: %s", self._peer, error)
        except PitfsError as error:
            problem = f"{name!r}: can't be opened: the server's log has the details"
            log.error("%s: %r: %s", self._peer, name, error)
        self._opened = export if opens else None
        await self._send(self._protocol.answer_export(export.info if export else None, problem))

    async def release(self) -> None:
        """Unpins the instant of the opened export."""
        if self._opened is not None:
            with trio.CancelScope(shield=True):
                await self._shared.query(self._shared.exports.close, self._opened)

    # -------------------------------------------------------------- requests

    async def serve(self, view: PointInTimeView) -> None:
        """Answers requests until the client leaves."""
        self._view = view
        async with trio.open_nursery() as self._nursery:
            try:
                await self._take_requests()
            except (RemoteProtocolError, OSError, trio.BrokenResourceError) as error:
                self._break(error)
        if self._broken is not None:
            raise self._broken

    def _break(self, error: Exception) -> None:
        self._broken = self._broken or error
        self._nursery.cancel_scope.cancel()

    async def _take_requests(self) -> None:
        while (event := await self._next()) is not None:
            if isinstance(event, Request):
                done = 0
                if event.command == Command.READ:
                    done = await self._send_cached(event)
                if done < event.size:
                    await self._slots.acquire()
                    self._nursery.start_soon(self._perform, event, done)
            elif isinstance(event, Send):
                await self._send(event.data)

    async def _send_cached(self, request: Request) -> int:
        """Sends the beginning of a read as far as it is in memory; returns how many bytes that is."""
        offset, end = request.offset, request.offset + request.size
        if offset // PIECE_BYTES != (end - 1) // PIECE_BYTES and not self._protocol.is_divisible(request):
            return 0  # several pieces in one chunk: once the first is sent none may fail
        buffer = self._shared.acquire_buffer()
        try:
            while offset < end:
                size = min(PIECE_BYTES - offset % PIECE_BYTES, end - offset)
                data = self._view.try_read_cached(offset, size, buffer)
                if data is None:
                    break
                await self._send(self._protocol.data_header(request, offset, size), data)
                offset += size
        except PitfsError:  # `_perform` meets it again, and answers it
            pass
        finally:
            self._shared.release_buffer(buffer)
        return offset - request.offset

    async def _perform(self, request: Request, done: int) -> None:
        """Answers a request; of a read `done` bytes have been sent."""
        async with self._large if request.size > SMALL_BYTES else contextlib.nullcontext():
            buffer = self._shared.acquire_buffer()
            try:
                await self._answer(request, done, buffer)
            except (OSError, trio.BrokenResourceError) as error:
                self._break(error)
            finally:
                self._shared.release_buffer(buffer)
                self._slots.release()

    async def _answer(self, request: Request, done: int, buffer: ReadBuffer) -> None:
        end = request.offset + request.size
        try:
            if request.command == Command.BLOCK_STATUS:
                limit = 1 if request.flags & CommandFlag.REQ_ONE else MAX_EXTENTS
                query = partial(_extents, self._view, request.offset, end, limit)
                extents = await trio.to_thread.run_sync(query, limiter=self._shared.readers)
                await self._send(self._protocol.extents(request, extents))
            elif request.command == Command.CACHE:
                await self._read_all(request, buffer)
                await self._send(self._protocol.finished(request))
            elif not self._protocol.is_divisible(request):
                await self._send_whole(request, buffer)
            elif not await self._send_pieces(request, request.offset + done, end, PIECE_BYTES, buffer):
                await self._send(self._protocol.finished(request))
        except PitfsError as error:
            log.error("%s: %s", self._peer, error)
            await self._send(self._protocol.failed(request.cookie, errno.EIO, NO_DATA))

    async def _send_pieces(
        self, request: Request, offset: int, end: int, step: int, buffer: ReadBuffer
    ) -> bool:
        """Sends [offset, end) of a read as one chunk for each `step` bytes, of data or an error.

        A damaged piece is sent block by block, so that only the damaged blocks of it are errors.

        Returns:
            whether the last chunk has data: then it was the reply's last.
        """
        has_end = False
        for start, stop in cut(offset, end, step):
            try:
                data = await self._read(start, stop - start, buffer)
            except PitfsError as error:
                if isinstance(error, CorruptionError) and step > self._view.block_size:
                    has_end = await self._send_pieces(request, start, stop, self._view.block_size, buffer)
                    continue
                log.error("%s: %s", self._peer, error)
                await self._send(self._protocol.failed(request.cookie, errno.EIO, NO_DATA, start))
                has_end = False
            else:
                await self._send(self._protocol.data_header(request, start, stop - start), data)
                has_end = True
        return has_end

    async def _send_whole(self, request: Request, buffer: ReadBuffer) -> None:
        """Answers a read with one header for all its data, so that all must be verified before the header.

        A large one isn't kept but read twice: the first time to verify it, the second time to send it.
        """
        data = await self._read_all(request, buffer)
        header = self._protocol.data_header(request, request.offset, request.size)
        if len(data) == request.size:
            await self._send(header, data)
            return
        async with self._sending:
            for start, stop in cut(request.offset, request.offset + request.size, PIECE_BYTES):
                try:
                    data = await self._read(start, stop - start, buffer)
                except PitfsError as error:  # only the end of the connection can show it to the client
                    self._break(PitfsError(f"in the middle of a reply: {error}"))
                    return
                await self._stream.send(header, data)
                header = b""

    async def _read_all(self, request: Request, buffer: ReadBuffer) -> Buffer:
        """Reads all pieces of a request: they are verified and in memory then. Returns the last one."""
        data: Buffer = b""
        for start, stop in cut(request.offset, request.offset + request.size, PIECE_BYTES):
            data = await self._read(start, stop - start, buffer)
        return data

    async def _read(self, offset: int, size: int, buffer: ReadBuffer) -> memoryview:
        data = self._view.try_read_cached(offset, size, buffer)
        if data is None:
            read, limiter = self._view.read, self._shared.readers
            return await trio.to_thread.run_sync(read, offset, size, buffer, limiter=limiter)
        await self._yield_if_due(size)
        return data


def _extents(view: PointInTimeView, start: int, end: int, limit: int) -> list[tuple[int, int]]:
    """(bytes, flags) from `start` on, with and without data in turns."""
    extents: list[tuple[int, int]] = []
    at = start
    for low, high in view.data_ranges(start, end):
        if low > at:
            extents.append((low - at, HOLE_AND_ZERO))
        extents.append((high - low, 0))
        at = high
        if len(extents) >= limit:
            return extents[:limit]
    if at < end:
        extents.append((end - at, HOLE_AND_ZERO))
    return extents
