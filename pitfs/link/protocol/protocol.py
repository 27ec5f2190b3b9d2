"""The replication protocol as a state machine without I/O: bytes in, frames out, and back.

    state       frame       from        next        meaning
    GREETING    HELLO       sender      ASKED       who I am
    ASKED       WELCOME     receiver    READY       where the replica stands
                REFUSE      receiver    CLOSED
    READY       BEGIN       sender      BEGINNING   a transfer
    BEGINNING   RESUME      receiver    TRANSFER    what is durable of it already
    TRANSFER    DATA        sender      TRANSFER
                CHECKPOINT  sender      TRANSFER    make it durable
                PROGRESS    receiver    TRANSFER    it is; one for each CHECKPOINT
                END         sender      ENDING
                PARK        sender      PARKING     make it durable; something else goes first
    ENDING      PROGRESS    receiver    ENDING
                COMMITTED   receiver    READY       only after all PROGRESS
    PARKING     PROGRESS    receiver    PARKING
                PARKED      receiver    READY       only after all PROGRESS

PING and PONG may go either way after HELLO; FAULT from the receiver after WELCOME closes. The table is of the
conversation, so both roles walk through the same one.

Beside it the stream of the open interval's writes goes, whatever the state, from WELCOME on: DATA of WRITES, its DATA
of WRITE_BLOCKS, then FLUSH; or MARK. DURABLE of the receiver answers each FLUSH and MARK, in order.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final

from pitfs.errors import LocalProtocolError, RemoteProtocolError
from pitfs.link.protocol.frames import (
    HEADER,
    PREFACE,
    TYPE_OF,
    VERSIONS,
    Accept,
    Buffer,
    Committed,
    Frame,
    FrameType,
    Greeting,
    Progress,
    Resume,
    WireData,
    decode,
    encode,
    read_header,
)
from pitfs.model.transfer import TRANSFER_SECTIONS, Durable, Flush, StreamMark


class Role(enum.Enum):
    SENDER = "sender"
    RECEIVER = "receiver"


class LinkState(enum.Enum):
    GREETING = enum.auto()
    ASKED = enum.auto()
    READY = enum.auto()
    BEGINNING = enum.auto()
    TRANSFER = enum.auto()
    ENDING = enum.auto()
    PARKING = enum.auto()
    CLOSED = enum.auto()


_ALIVE: Final = (FrameType.PING, FrameType.PONG)
_TABLE: Final[dict[LinkState, dict[FrameType, LinkState]]] = {
    LinkState.GREETING: {FrameType.HELLO: LinkState.ASKED},
    LinkState.ASKED: {FrameType.WELCOME: LinkState.READY, FrameType.REFUSE: LinkState.CLOSED},
    LinkState.READY: {FrameType.BEGIN: LinkState.BEGINNING, FrameType.FAULT: LinkState.CLOSED},
    LinkState.BEGINNING: {FrameType.RESUME: LinkState.TRANSFER, FrameType.FAULT: LinkState.CLOSED},
    LinkState.TRANSFER: {
        FrameType.DATA: LinkState.TRANSFER,
        FrameType.CHECKPOINT: LinkState.TRANSFER,
        FrameType.PROGRESS: LinkState.TRANSFER,
        FrameType.END: LinkState.ENDING,
        FrameType.PARK: LinkState.PARKING,
        FrameType.FAULT: LinkState.CLOSED,
    },
    LinkState.ENDING: {
        FrameType.PROGRESS: LinkState.ENDING,
        FrameType.COMMITTED: LinkState.READY,
        FrameType.FAULT: LinkState.CLOSED,
    },
    LinkState.PARKING: {
        FrameType.PROGRESS: LinkState.PARKING,
        FrameType.PARKED: LinkState.READY,
        FrameType.FAULT: LinkState.CLOSED,
    },
    LinkState.CLOSED: {},
}
_STREAM: Final = (FrameType.DATA, FrameType.FLUSH, FrameType.MARK, FrameType.DURABLE)
for _state, _moves in _TABLE.items():
    if _state not in (LinkState.GREETING, LinkState.CLOSED):
        _moves.update(dict.fromkeys(_ALIVE, _state))
    if _state not in (LinkState.GREETING, LinkState.ASKED, LinkState.CLOSED):
        _moves.update(dict.fromkeys(_STREAM, _state))

_MAY_SEND: Final = {
    Role.SENDER: frozenset(
        {
            FrameType.HELLO,
            FrameType.BEGIN,
            FrameType.DATA,
            FrameType.CHECKPOINT,
            FrameType.END,
            FrameType.PARK,
            FrameType.FLUSH,
            FrameType.MARK,
            *_ALIVE,
        }
    ),
    Role.RECEIVER: frozenset(
        {
            FrameType.WELCOME,
            FrameType.REFUSE,
            FrameType.RESUME,
            FrameType.PROGRESS,
            FrameType.COMMITTED,
            FrameType.PARKED,
            FrameType.FAULT,
            FrameType.DURABLE,
            *_ALIVE,
        }
    ),
}
_OTHER: Final = {Role.SENDER: Role.RECEIVER, Role.RECEIVER: Role.SENDER}

# What else answers on a port, by its first bytes.
_STRANGERS: Final = (
    (b"\x16\x03", "it speaks TLS and this side doesn't: give both sides certificates, or neither"),
    (b"\x15\x03", "it speaks TLS and this side doesn't: give both sides certificates, or neither"),
    (b"HTTP/", "it is a web server"),
    (b"GET ", "it is a web client"),
    (b"POST ", "it is a web client"),
    (b"SSH-", "it speaks SSH"),
)


class LinkProtocol:
    """One side of one connection.

    Attributes:
        role: which side this is.
        state: where the conversation stands, as this side sees it.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = LinkState.GREETING
        self._prefaced = False
        self._expect_preface = True
        self._frame = bytearray()  # what came of the preface or frame under way; at most one frame
        self._wanted = len(PREFACE)  # bytes that `_frame` needs before it can be looked at
        self._failed = False
        self._window_bytes = 0  # that HELLO offers
        self._checkpoints = 0  # CHECKPOINTs without their PROGRESS
        self._flushes = 0  # FLUSHes and MARKs without their DURABLE
        self._streamed_seq = self._durable_seq = self._known_mark = 0
        self._ends = [0, 0, 0, 0, 0]  # furthest byte of each section that a PROGRESS may name
        self._durable = (0, 0, 0, 0, 0)

    def start(self) -> list[Buffer]:
        """The preface; to be sent before anything else (`send` does so where it wasn't)."""
        if self._prefaced:
            return []
        self._prefaced = True
        return [PREFACE]

    def send(self, frame: Frame) -> list[Buffer]:
        """Turns a frame into buffers to be sent in this order.

        The payload of WireData is passed on without a copy: it must not change until it is sent.

        Raises:
            LocalProtocolError: this frame may not be sent now, or breaks a limit.
        """
        frame_type = TYPE_OF[type(frame)]
        next_state = _TABLE[self.state].get(frame_type)
        if next_state is None or frame_type not in _MAY_SEND[self.role]:
            raise LocalProtocolError(f"{self.role.value} sends {frame_type.name} in state {self.state.name}")
        try:
            buffers = encode(frame)
        except ValueError as error:
            raise LocalProtocolError(f"{frame_type.name}: {error}") from error
        problem = self._follow(frame_type, frame)
        if problem:
            raise LocalProtocolError(problem)
        self.state = next_state
        return self.start() + buffers

    def receive(self, data: Buffer) -> Iterator[Frame]:
        """Takes bytes from the peer and yields the frames that are complete with them.

        The iterator has to be run to its end; frames before a bad one are yielded before the error.

        Raises:
            RemoteProtocolError: the peer broke the protocol; the connection can only be closed.
        """
        if self._failed:
            raise RemoteProtocolError("the peer broke the protocol before")
        view = memoryview(data)
        while len(view) and self.state is not LinkState.CLOSED:
            taken = view[: self._wanted - len(self._frame)]
            self._frame += taken
            view = view[len(taken) :]
            if self._expect_preface:
                self._check_preface()
                continue
            if len(self._frame) < self._wanted:
                return
            if self._wanted == HEADER.size:
                self._read_header()  # raises _wanted if there is a body
            if len(self._frame) == self._wanted:
                whole, self._frame, self._wanted = self._frame, bytearray(), HEADER.size
                yield self._read_frame(whole)

    def receive_eof(self) -> None:
        """Tells that the peer will send no more.

        Raises:
            RemoteProtocolError: it stopped in the middle of a frame.
        """
        if self._frame:
            raise self._error("the connection ended in the middle of a frame")

    def _check_preface(self) -> None:
        start = bytes(self._frame)
        if not PREFACE.startswith(start):
            words = next((words for sign, words in _STRANGERS if start.startswith(sign)), "")
            if not words and any(sign.startswith(start) for sign, _ in _STRANGERS):
                return  # a byte more or two tell which stranger
            raise self._error("the peer isn't pitfs" + (f": {words}" if words else ""))
        if start == PREFACE:
            self._expect_preface = False
            self._frame, self._wanted = bytearray(), HEADER.size

    def _read_header(self) -> None:
        try:
            frame_type, length = read_header(self._frame)
        except ValueError as error:
            raise self._error(str(error)) from None
        if frame_type not in _MAY_SEND[_OTHER[self.role]] or frame_type not in _TABLE[self.state]:
            raise self._error(f"{frame_type.name} may not come in state {self.state.name}")
        self._wanted = HEADER.size + length

    def _read_frame(self, whole: bytearray) -> Frame:
        try:
            frame = decode(whole)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors too
            raise self._error(f"{type(error).__name__}: {error}") from None
        frame_type = TYPE_OF[type(frame)]
        problem = self._follow(frame_type, frame)
        if problem:
            raise self._error(problem)
        self.state = _TABLE[self.state][frame_type]
        return frame

    def _follow(self, frame_type: FrameType, frame: Frame) -> str | None:
        """Checks what the table can't say, for both directions; returns the problem if there is one."""
        if isinstance(frame, Accept | Committed | StreamMark):
            mark = frame.mark if isinstance(frame, StreamMark) else frame.welcome.mark
            self._known_mark = max(self._known_mark, mark)
        match frame:
            case Accept(version=version) if version not in VERSIONS:
                return f"WELCOME names version {version}, spoken are {VERSIONS}"
            case Greeting(window_bytes=window_bytes):
                self._window_bytes = window_bytes
            case Accept(window_bytes=window_bytes) if window_bytes > self._window_bytes:
                return f"WELCOME with a window of {window_bytes} bytes, HELLO offers {self._window_bytes}"
            case Resume(point=point):
                self._ends, self._durable, self._checkpoints = list(point.lengths), point.lengths, 0
            case WireData(section=section) if section in TRANSFER_SECTIONS:
                if self.state is not LinkState.TRANSFER:
                    return f"DATA of {section.name} may not come in state {self.state.name}"
                index = section - 1
                self._ends[index] = max(self._ends[index], frame.offset + frame.raw_length)
            case Progress(point=point):
                if not self._checkpoints:
                    return "PROGRESS without a CHECKPOINT"
                bounds = zip(self._durable, point.lengths, self._ends, strict=True)
                if self.role is Role.SENDER and any(not low <= at <= high for low, at, high in bounds):
                    return f"PROGRESS to {point.lengths}, sent {tuple(self._ends)}, before {self._durable}"
                self._checkpoints -= 1
                self._durable = point.lengths
            case _ if frame_type is FrameType.CHECKPOINT:
                self._checkpoints += 1
            case Flush(seq=seq) | StreamMark(seq=seq):
                self._flushes, self._streamed_seq = self._flushes + 1, seq
            case Durable(seq=seq):
                if not self._flushes:
                    return "DURABLE without a FLUSH or MARK"
                if self.role is Role.SENDER and not self._durable_seq <= seq <= self._streamed_seq:
                    return f"DURABLE to seq {seq}, streamed {self._streamed_seq}, before {self._durable_seq}"
                if self.role is Role.SENDER and frame.mark > self._known_mark:
                    return f"DURABLE to mark {frame.mark}, the last one streamed is {self._known_mark}"
                self._flushes, self._durable_seq = self._flushes - 1, seq
            case _ if frame_type in (FrameType.COMMITTED, FrameType.PARKED) and self._checkpoints:
                return f"{frame_type.name} with {self._checkpoints} CHECKPOINTs unanswered"
        return None

    def _error(self, problem: str) -> RemoteProtocolError:
        self._failed = True
        self._frame = bytearray()
        return RemoteProtocolError(problem)
