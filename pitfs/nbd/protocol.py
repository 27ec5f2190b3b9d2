"""The server's side of NBD as a state machine without I/O: bytes in, events out, and answers to bytes.

    state          comes from the client         next           meaning
    GREETING       flags                         OPTIONS
    OPTIONS        an option that asks           ASKING         LIST, INFO, GO, EXPORT_NAME, the metadata contexts
                   STARTTLS                      STARTING_TLS
                   ABORT                         CLOSED
                   any other                     OPTIONS        answered here
    ASKING         -                             OPTIONS        the caller answers; of GO and EXPORT_NAME, if there is
                                                 TRANSMISSION   such an export
    STARTING_TLS   -                             OPTIONS        the caller has done the handshake; all before is void
    TRANSMISSION   a request                     TRANSMISSION   an event, or an error that is answered here
                   DISC                          CLOSED

Where TLS is offered it is required: nothing is told before it. What a client may send is limited: 32 KiB for an option,
4 KiB for a name, 32 MiB for a read or for the payload of a write, which is skipped, not kept.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from pitfs.errors import LocalProtocolError, RemoteProtocolError
from pitfs.nbd.negotiation import AskExport, AskList, Close, ExportInfo, Negotiation, Send, StartTls
from pitfs.nbd.wire import (
    CHUNK_MAGIC,
    CLIENT_FLAGS,
    DATA_CHUNK,
    DONE,
    GREETING_MAGIC,
    MAX_OPTION_BYTES,
    MAX_REQUEST_BYTES,
    OPTION,
    OPTION_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE,
    SIMPLE_MAGIC,
    U16,
    ChunkType,
    Command,
    CommandFlag,
    Error,
    ServerFlag,
    chunk,
    error_chunk,
    status_chunk,
)

Buffer = bytes | bytearray | memoryview

# As numbers: of a Flag, ~ leaves only the bits that have names.
_FLAGS: Final = int(ServerFlag.FIXED_NEWSTYLE | ServerFlag.NO_ZEROES)
_WRITES: Final = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
_READS: Final[dict[int, int]] = {
    Command.READ: int(CommandFlag.DF),
    Command.CACHE: 0,
    Command.BLOCK_STATUS: int(CommandFlag.REQ_ONE),
}  # what is served, and the flags that each may have


class NbdState(enum.Enum):
    GREETING = enum.auto()
    OPTIONS = enum.auto()
    ASKING = enum.auto()
    STARTING_TLS = enum.auto()
    TRANSMISSION = enum.auto()
    CLOSED = enum.auto()


class Request(NamedTuple):
    """A valid request, within the export: to be answered by `data`, `failed`, `extents` or `finished`."""

    command: int
    flags: int
    cookie: int
    offset: int
    size: int


Event = Send | AskList | AskExport | StartTls | Close | Request


class NbdProtocol:
    """The server's side of one connection.

    Attributes:
        state: where the conversation stands.
        structured: whether replies to requests are structured; a client without gets simple ones.
    """

    def __init__(self, *, offers_tls: bool) -> None:
        self.state = NbdState.GREETING
        self.structured = False
        self._negotiation = Negotiation(offers_tls=offers_tls)
        self._part = bytearray()  # what came of the unit under way; at most one unit
        self._wanted = CLIENT_FLAGS.size  # bytes that it needs before it can be looked at
        self._skip = 0  # bytes of a write's payload that are still to come
        self._refused_cookie = 0  # of that write
        self._size_bytes = 0

    def greeting(self) -> bytes:
        return GREETING_MAGIC + OPTION_MAGIC + U16.pack(_FLAGS)

    def receive(self, data: Buffer) -> Iterator[Event]:
        """Takes bytes from the client and yields what is complete with them.

        Lazily: `data` mustn't change until the iterator is at its end, and what an event asks for has to be
        answered before the next one is taken.

        Raises:
            RemoteProtocolError: the client broke the protocol; the connection can only be closed.
        """
        view = memoryview(data)
        while len(view) and self.state is not NbdState.CLOSED:
            if self.state in (NbdState.ASKING, NbdState.STARTING_TLS):
                raise LocalProtocolError(f"{self.state.name}: the client's question isn't answered")
            if self._skip:
                count = min(self._skip, len(view))
                view = view[count:]
                self._skip -= count
                if not self._skip:
                    yield self._refusal(self._refused_cookie, Error.EPERM, "the export is read-only")
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
                event = self._read_flags(unit)
            else:
                event = self._read_option(unit)
            if isinstance(event, StartTls) and len(view):
                # Plain text that would be taken for something said within TLS.
                raise RemoteProtocolError("bytes behind STARTTLS")
            if event is not None:
                yield event

    def receive_eof(self) -> None:
        """Tells that the client will send no more.

        Raises:
            RemoteProtocolError: it stopped in the middle of something.
        """
        if self.state is not NbdState.CLOSED and (self._part or self._skip):
            raise RemoteProtocolError("the connection ended in the middle of a request")

    # -------------------------------------------------------------- negotiation

    def answer_list(self, exports: Iterable[tuple[str, str]]) -> bytes:
        """The answer to AskList: names and descriptions."""
        answer = self._negotiation.answer_list(exports)
        self._follow()
        return answer

    def answer_export(self, export: ExportInfo | None, problem: str = "") -> bytes:
        """The answer to AskExport: the export, or None and why not."""
        answer = self._negotiation.answer_export(export, problem)
        self._follow()
        return answer

    def tls_started(self) -> None:
        """The handshake of TLS that StartTls asked for is done."""
        self._negotiation.tls_started()
        self._follow()

    def _follow(self) -> None:
        """The state that the negotiation has led to."""
        negotiation = self._negotiation
        if negotiation.is_over:
            self.state = NbdState.CLOSED
        elif negotiation.chosen is not None:
            self.state, self._wanted = NbdState.TRANSMISSION, REQUEST.size
            self.structured, self._size_bytes = negotiation.structured, negotiation.chosen.size_bytes
        elif negotiation.awaits_tls:
            self.state = NbdState.STARTING_TLS
        else:
            self.state = NbdState.ASKING if negotiation.is_asking else NbdState.OPTIONS

    def _read_flags(self, unit: Buffer) -> Event | None:
        (flags,) = CLIENT_FLAGS.unpack(unit)
        if flags & ~_FLAGS:
            raise RemoteProtocolError(f"the client isn't one of NBD, or of a later one: flags {flags:#x}")
        self._negotiation.no_zeroes = bool(flags & ServerFlag.NO_ZEROES)
        self.state, self._wanted = NbdState.OPTIONS, OPTION.size
        return None

    def _read_option(self, unit: Buffer) -> Event | None:
        magic, option, length = OPTION.unpack_from(unit)
        if magic != OPTION_MAGIC:
            raise RemoteProtocolError(f"an option begins with {bytes(magic)!r}")
        if length > MAX_OPTION_BYTES:
            raise RemoteProtocolError(f"an option of {length} bytes")
        if len(unit) < OPTION.size + length:
            self._part, self._wanted = bytearray(unit), OPTION.size + length
            return None
        self._wanted = OPTION.size
        event = self._negotiation.option(option, memoryview(unit)[OPTION.size :])
        self._follow()
        return event

    # -------------------------------------------------------------- requests

    def _read_request(self, unit: Buffer) -> Event | None:
        magic, flags, command, cookie, offset, size = REQUEST.unpack(unit)
        if magic != REQUEST_MAGIC:
            raise RemoteProtocolError(f"a request begins with {magic:#010x}")
        if command == Command.READ and not flags and 0 < size <= MAX_REQUEST_BYTES:
            if offset + size <= self._size_bytes:  # what nearly all are
                return Request(command, flags, cookie, offset, size)
        elif command == Command.DISC:
            self.state = NbdState.CLOSED
            return Close()
        elif command == Command.WRITE and size:
            if size > MAX_REQUEST_BYTES:
                raise RemoteProtocolError(f"a write of {size} bytes")
            self._skip, self._refused_cookie = size, cookie
            return None
        elif command in _WRITES:
            return self._refusal(cookie, Error.EPERM, "the export is read-only")
        problem = self._problem(command, flags, offset, size)
        if problem:
            return self._refusal(cookie, Error.EINVAL, problem)
        return Request(command, flags, cookie, offset, size)

    def _problem(self, command: int, flags: int, offset: int, size: int) -> str | None:
        allowed = _READS.get(command)
        if allowed is None or (command == Command.BLOCK_STATUS and not self._negotiation.has_status):
            return "no such command here"
        if flags & ~allowed or (flags & CommandFlag.DF and not self.structured):
            return "unknown flags"
        if not size:
            return "nothing is asked for"
        if offset + size > self._size_bytes:
            return f"beyond the end, which is at byte {self._size_bytes}"
        if command == Command.READ and size > MAX_REQUEST_BYTES:
            return f"more than {MAX_REQUEST_BYTES} bytes at once"
        return None

    def is_divisible(self, request: Request) -> bool:
        """Whether a read may be answered in pieces, in any order, each of which may fail; else it is one piece."""
        return self.structured and not request.flags & CommandFlag.DF

    def data_header(self, request: Request, offset: int, size: int) -> bytes:
        """What goes before [offset, offset + size) of a read; of an indivisible one that is all of it.

        The one that reaches the request's end is the reply's last, so it is sent last.
        """
        if not self.structured:
            return SIMPLE.pack(SIMPLE_MAGIC, 0, request.cookie)
        flags = DONE if offset + size == request.offset + request.size else 0
        return DATA_CHUNK.pack(CHUNK_MAGIC, flags, ChunkType.OFFSET_DATA, request.cookie, 8 + size, offset)

    def failed(self, request: Request, error: Error, message: str) -> bytes:
        """The whole reply to a request that failed."""
        return self._refusal(request.cookie, error, message).data

    def failed_at(self, request: Request, error: Error, message: str, offset: int) -> bytes:
        """One of several chunks of a divisible read: from `offset` on there are no data. Not the last one."""
        assert self.structured
        return error_chunk(0, request.cookie, error, message, offset)

    def extents(self, request: Request, extents: Sequence[tuple[int, int]]) -> bytes:
        """The whole reply to BLOCK_STATUS: (bytes, flags) from the request's offset on, at least one."""
        assert extents and self.structured
        return status_chunk(request.cookie, extents)

    def finished(self, request: Request) -> bytes:
        """The last of a reply whose other chunks, if any, have been sent."""
        if self.structured:
            return chunk(DONE, ChunkType.NONE, request.cookie)
        return SIMPLE.pack(SIMPLE_MAGIC, 0, request.cookie)

    def _refusal(self, cookie: int, error: Error, message: str) -> Send:
        if self.structured:
            return Send(error_chunk(DONE, cookie, error, message, None))
        return Send(SIMPLE.pack(SIMPLE_MAGIC, error, cookie))
