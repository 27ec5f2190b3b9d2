"""The server's side of NBD as a state machine without I/O: bytes in, events out, and answers to bytes.

The first half of a connection is its `Negotiation`, whose `NbdState` draws the states of both halves; this is
what cuts the client's bytes into units, and the second half, the requests.

Where TLS is offered it is required. What a client may send is limited: 32 KiB for an option, 4 KiB for a
name, 32 MiB for a read or for the payload of a write, which is skipped, not kept.
"""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from pitfs.errors import LocalProtocolError, RemoteProtocolError
from pitfs.nbd import wire
from pitfs.nbd.negotiation import Answer, Close, ExportInfo, NbdState, Negotiation, Send, StartTls
from pitfs.nbd.wire import CHUNK_MAGIC, DATA_CHUNK, ChunkType, Command, CommandFlag

Buffer = bytes | bytearray | memoryview

_CALLERS_TURN: Final = (NbdState.LISTING, NbdState.LOOKUP, NbdState.TLS_HANDSHAKE)
_WRITES: Final = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
_READS: Final[dict[int, int]] = {
    Command.READ: int(CommandFlag.DF),
    Command.CACHE: 0,
    Command.BLOCK_STATUS: int(CommandFlag.REQ_ONE),
}  # what is served, and the flags that each may have


class Request(NamedTuple):
    """A valid request, within the export; see `data_header`, `failed`, `extents`, `finished`."""

    command: int
    flags: int
    cookie: int
    offset: int
    size: int


Event = Answer | Request


class NbdProtocol(Negotiation):
    """The server's side of one connection."""

    def __init__(self, *, offers_tls: bool) -> None:
        super().__init__(offers_tls=offers_tls)
        self._part = bytearray()  # what came of the unit under way; at most one unit
        self._wanted = wire.U32.size  # the flags: bytes that the unit needs before it can be looked at
        self._skip = 0  # bytes of a write's payload that are still to come
        self._refused_cookie = 0  # of that write
        self._size_bytes = 0

    def greeting(self) -> bytes:
        return wire.GREETING_MAGIC + wire.OPTION_MAGIC + wire.U16.pack(wire.FIXED_NEWSTYLE | wire.NO_ZEROES)

    def receive(self, data: Buffer) -> Iterator[Event]:
        """Takes bytes from the client and yields what is complete with them.

        The iterator is lazy: `data` mustn't change until it is at its end, and the caller has to answer an
        event before it takes the next one.

        Raises:
            RemoteProtocolError: the client broke the protocol; the connection can only be closed.
        """
        view = memoryview(data)
        while len(view) and self.state is not NbdState.CLOSED:
            if self.state in _CALLERS_TURN:
                raise LocalProtocolError(f"{self.state.name}: the client's option isn't answered")
            if self._skip:
                count = min(self._skip, len(view))
                view = view[count:]
                self._skip -= count
                if not self._skip:
                    yield Send(self.failed(self._refused_cookie, errno.EPERM, "the export is read-only"))
                continue
            taken = view[: self._wanted - len(self._part)]
            view = view[len(taken) :]
            unit: Buffer = taken
            if self._part or len(taken) < self._wanted:
                self._part += taken
                if len(self._part) < self._wanted:
                    return
                unit, self._part = self._part, bytearray()
            if self.state is NbdState.TRANSMISSION:
                event = self._read_request(unit)
            elif self.state is NbdState.GREETING:
                self.answer_flags(*wire.U32.unpack(unit))
                self._wanted, event = wire.OPTION.size, None
            else:
                event = self._read_option(unit)
            if isinstance(event, StartTls) and len(view):
                # Plain text, which would count as received through TLS.
                raise RemoteProtocolError("bytes behind STARTTLS")
            if event is not None:
                yield event

    def receive_eof(self) -> None:
        """To be called when the client has ended its side of the connection.

        Raises:
            RemoteProtocolError: it did so in the middle of an option or request.
        """
        if self.state is not NbdState.CLOSED and (self._part or self._skip):
            raise RemoteProtocolError("the connection ended in the middle of a request")

    def _read_option(self, unit: Buffer) -> Event | None:
        magic, option, length = wire.OPTION.unpack_from(unit)
        if magic != wire.OPTION_MAGIC:
            raise RemoteProtocolError(f"an option begins with {bytes(magic)!r}")
        if length > wire.MAX_OPTION_BYTES:
            raise RemoteProtocolError(f"an option of {length} bytes")
        if len(unit) < wire.OPTION.size + length:
            self._part, self._wanted = bytearray(unit), wire.OPTION.size + length
            return None
        self._wanted = wire.OPTION.size
        return self.answer_option(option, memoryview(unit)[wire.OPTION.size :])

    def answer_export(self, export: ExportInfo | None, problem: str = "") -> bytes:
        answer = super().answer_export(export, problem)
        if export is not None and self.state is NbdState.TRANSMISSION:
            self._wanted, self._size_bytes = wire.REQUEST.size, export.size_bytes
        return answer

    # -------------------------------------------------------------- requests

    def _read_request(self, unit: Buffer) -> Event | None:
        magic, flags, command, cookie, offset, size = wire.REQUEST.unpack(unit)
        if magic != wire.REQUEST_MAGIC:
            raise RemoteProtocolError(f"a request begins with {magic:#010x}")
        if command == Command.READ and not flags and 0 < size <= wire.MAX_REQUEST_BYTES:
            if offset + size <= self._size_bytes:  # what nearly all are
                return Request(command, flags, cookie, offset, size)
        elif command == Command.DISC:
            self.move(NbdState.TRANSMISSION, NbdState.CLOSED)
            return Close()
        elif command == Command.WRITE and size:
            if size > wire.MAX_REQUEST_BYTES:
                raise RemoteProtocolError(f"a write of {size} bytes")
            self._skip, self._refused_cookie = size, cookie
            return None
        elif command in _WRITES:
            return Send(self.failed(cookie, errno.EPERM, "the export is read-only"))
        problem = self._problem(command, flags, offset, size)
        if problem:
            return Send(self.failed(cookie, errno.EINVAL, problem))
        return Request(command, flags, cookie, offset, size)

    def _problem(self, command: int, flags: int, offset: int, size: int) -> str | None:
        allowed = _READS.get(command)
        if allowed is None or (command == Command.BLOCK_STATUS and not self.has_status):
            return "no such command here"
        if flags & ~allowed or (flags & CommandFlag.DF and not self.structured):
            return "unknown flags"
        if not size:
            return "no bytes requested"
        if offset + size > self._size_bytes:
            return f"beyond the end, which is at byte {self._size_bytes}"
        if command == Command.READ and size > wire.MAX_REQUEST_BYTES:
            return f"more than {wire.MAX_REQUEST_BYTES} bytes at once"
        return None

    def is_divisible(self, request: Request) -> bool:
        """Whether the reply may be several chunks, in any order, each of which may fail; else it is one."""
        return self.structured and not request.flags & CommandFlag.DF

    def data_header(self, request: Request, offset: int, size: int) -> bytes:
        """The header before [offset, offset + size) of a read; an indivisible read has one for all of it.

        The chunk that reaches the request's end says that it is the last one: it must be sent last.
        """
        if not self.structured:
            return wire.SIMPLE.pack(wire.SIMPLE_MAGIC, 0, request.cookie)
        flags = wire.DONE if offset + size == request.offset + request.size else 0
        return DATA_CHUNK.pack(CHUNK_MAGIC, flags, ChunkType.OFFSET_DATA, request.cookie, 8 + size, offset)

    def failed(self, cookie: int, error: int, message: str, offset: int | None = None) -> bytes:
        """The whole reply to a request that failed.

        With an offset it is a chunk of a divisible read, and never the last: there are no data from there on.
        """
        if not self.structured:
            return wire.SIMPLE.pack(wire.SIMPLE_MAGIC, error, cookie)
        data = message.encode()[: wire.MAX_NAME_BYTES]
        payload = wire.ERROR.pack(error, len(data)) + data
        if offset is None:
            return wire.chunk(wire.DONE, ChunkType.ERROR, cookie, payload)
        return wire.chunk(0, ChunkType.ERROR_OFFSET, cookie, payload + wire.U64.pack(offset))

    def extents(self, request: Request, extents: Sequence[tuple[int, int]]) -> bytes:
        """The whole reply to BLOCK_STATUS: (bytes, flags) from the request's offset on, at least one."""
        assert extents and self.structured
        numbers = (wire.CONTEXT_ID, *itertools.chain.from_iterable(extents))
        payload = struct.pack(f">{len(numbers)}I", *numbers)
        return wire.chunk(wire.DONE, ChunkType.BLOCK_STATUS, request.cookie, payload)

    def finished(self, request: Request) -> bytes:
        """The last chunk of a reply whose other chunks, if any, have been sent."""
        if self.structured:
            return wire.chunk(wire.DONE, ChunkType.NONE, request.cookie)
        return wire.SIMPLE.pack(wire.SIMPLE_MAGIC, 0, request.cookie)
