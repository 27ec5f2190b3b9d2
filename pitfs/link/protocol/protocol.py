"""The replication protocol as a state machine without I/O: bytes in, frames out, and back.

`LinkState` draws the conversation, `_TRANSITIONS` is it as a table. Both roles walk through the same table.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final

from pitfs.errors import LocalProtocolError, RemoteProtocolError
from pitfs.link.protocol import frames
from pitfs.model.transfer import TRANSFER_SECTIONS, Checkpoint, Durable, Flush, Given, StreamMark, Want


class Role(enum.Enum):
    SENDER = "sender"
    RECEIVER = "receiver"


class LinkState(enum.Enum):
    """The state of the conversation.

        GREETING --HELLO--> ASKED --WELCOME-->  READY  --BEGIN--> BEGINNING --RESUME--> TRANSFER
                              |                  ^  ^                                    |    |
                            REFUSE               |  +--COMMITTED-- ENDING  <----END------+    |
                              v                  +-----PARKED----- PARKING <----PARK----------+
                            CLOSED <--FAULT-- any state after ASKED

    A transfer's DATA and CHECKPOINTs go in TRANSFER. A PROGRESS answers each CHECKPOINT, in TRANSFER, ENDING or
    PARKING; COMMITTED and PARKED come after all PROGRESS.

    The writes of the open interval stream beside this, in any state after ASKED: DATA of WRITES, its DATA of
    WRITE_BLOCKS, then FLUSH; or MARK. A DURABLE answers each FLUSH and MARK, in order. So does the replica's WANT, from
    version 2 on; as many GIVENs as it has contents answer it, and no other WANT comes before the last of them. PING and
    PONG may go either way in any state after GREETING.
    """

    GREETING = enum.auto()
    ASKED = enum.auto()
    READY = enum.auto()
    BEGINNING = enum.auto()
    TRANSFER = enum.auto()
    ENDING = enum.auto()
    PARKING = enum.auto()
    CLOSED = enum.auto()


_S, _F = LinkState, frames.FrameType


def _session(state: LinkState, own: dict[frames.FrameType, LinkState]) -> dict[frames.FrameType, LinkState]:
    """The transitions of a state after ASKED: its own ones, and what may come in all of these."""
    common = dict.fromkeys((_F.PING, _F.PONG, _F.DATA, _F.FLUSH, _F.MARK, _F.DURABLE, _F.WANT, _F.GIVEN), state)
    return common | {_F.FAULT: _S.CLOSED} | own


_TRANSITIONS: Final[dict[LinkState, dict[frames.FrameType, LinkState]]] = {
    _S.GREETING: {_F.HELLO: _S.ASKED},
    _S.ASKED: {_F.WELCOME: _S.READY, _F.REFUSE: _S.CLOSED, _F.PING: _S.ASKED, _F.PONG: _S.ASKED},
    _S.READY: _session(_S.READY, {_F.BEGIN: _S.BEGINNING}),
    _S.BEGINNING: _session(_S.BEGINNING, {_F.RESUME: _S.TRANSFER}),
    _S.TRANSFER: _session(
        _S.TRANSFER,
        {_F.CHECKPOINT: _S.TRANSFER, _F.PROGRESS: _S.TRANSFER, _F.END: _S.ENDING, _F.PARK: _S.PARKING},
    ),
    _S.ENDING: _session(_S.ENDING, {_F.PROGRESS: _S.ENDING, _F.COMMITTED: _S.READY}),
    _S.PARKING: _session(_S.PARKING, {_F.PROGRESS: _S.PARKING, _F.PARKED: _S.READY}),
    _S.CLOSED: {},
}
_OF_SENDER: Final = frozenset(
    {_F.HELLO, _F.BEGIN, _F.DATA, _F.CHECKPOINT, _F.END, _F.PARK, _F.FLUSH, _F.MARK, _F.GIVEN}
)
_MAY_SEND: Final = {
    Role.SENDER: _OF_SENDER | {_F.PING, _F.PONG},
    Role.RECEIVER: frozenset(frames.FrameType) - _OF_SENDER,
}
_OTHER: Final = {Role.SENDER: Role.RECEIVER, Role.RECEIVER: Role.SENDER}

# What else may be at the other end, by its first bytes.
_OTHER_PROTOCOLS: Final = (
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
        state: of the conversation, as this side sees it.
        version: that WELCOME names; 0 before it.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = LinkState.GREETING
        self.version = 0
        self._unsent: list[frames.Buffer] = [frames.PREFACE]
        self._frame = bytearray()  # what came of the preface or frame under way; at most one frame
        self._wanted = len(frames.PREFACE)  # bytes that `_frame` needs before it can be looked at
        self._failed = False
        self._versions: tuple[int, ...] = ()  # that HELLO offers
        self._window_bytes = 0  # the same
        self._checkpoints = 0  # CHECKPOINTs without their PROGRESS
        self._flushes = 0  # FLUSHes and MARKs without their DURABLE
        self._ungiven = 0  # contents of a WANT without their GIVEN
        self._streamed_seq = self._durable_seq = self._last_mark = 0
        self._sent = [0, 0, 0, 0, 0]  # furthest byte of each section that a PROGRESS may name
        self._durable = (0, 0, 0, 0, 0)

    def start(self) -> list[frames.Buffer]:
        """The preface; to be sent before anything else (`send` does so where it wasn't)."""
        unsent, self._unsent = self._unsent, []
        return unsent

    def send(self, frame: frames.Frame) -> list[frames.Buffer]:
        """Turns a frame into buffers to be sent in this order.

        The payload of WireData is passed on without a copy: it must not change until it is sent.

        Raises:
            LocalProtocolError: this frame may not be sent now, or breaks a limit.
        """
        frame_type = frames.TYPE_OF[type(frame)]
        next_state = _TRANSITIONS[self.state].get(frame_type)
        if next_state is None or frame_type not in _MAY_SEND[self.role] or self._is_later(frame_type):
            raise LocalProtocolError(f"{self.role.value} sends {frame_type.name} in state {self.state.name}")
        try:
            buffers = frames.encode(frame)
        except ValueError as error:
            raise LocalProtocolError(f"{frame_type.name}: {error}") from error
        if problem := self._account(frame):
            raise LocalProtocolError(problem)
        self.state = next_state
        return self.start() + buffers

    def receive(self, data: frames.Buffer) -> Iterator[frames.Frame]:
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
            if self._wanted == len(frames.PREFACE):  # no frame is that short
                self._check_preface()
                continue
            if len(self._frame) < self._wanted:
                return
            if self._wanted == frames.HEADER.size:
                self._read_header()  # raises _wanted if there is a body
            if len(self._frame) == self._wanted:
                whole, self._frame, self._wanted = self._frame, bytearray(), frames.HEADER.size
                yield self._read_frame(whole)

    def receive_eof(self) -> None:
        """The peer will send no more.

        Raises:
            RemoteProtocolError: it stopped in the middle of a frame.
        """
        if self._frame:
            raise self._error("the connection ended in the middle of a frame")

    def _check_preface(self) -> None:
        start = bytes(self._frame)
        if not frames.PREFACE.startswith(start):
            words = next((words for first, words in _OTHER_PROTOCOLS if start.startswith(first)), "")
            if not words and any(first.startswith(start) for first, _ in _OTHER_PROTOCOLS):
                return  # the next bytes will say which one
            raise self._error("the peer isn't pitfs" + (f": {words}" if words else ""))
        if start == frames.PREFACE:
            self._frame, self._wanted = bytearray(), frames.HEADER.size

    def _read_header(self) -> None:
        try:
            frame_type, length = frames.read_header(self._frame)
        except ValueError as error:
            raise self._error(str(error)) from None
        if frame_type not in _MAY_SEND[_OTHER[self.role]] or frame_type not in _TRANSITIONS[self.state]:
            raise self._error(f"{frame_type.name} may not come in state {self.state.name}")
        if self._is_later(frame_type):
            raise self._error(f"{frame_type.name} may not come in version {self.version}")
        self._wanted = frames.HEADER.size + length

    def _is_later(self, frame_type: frames.FrameType) -> bool:
        """Whether only a later version than that of this session has it."""
        return self.version < frames.SINCE.get(frame_type, 0)

    def _read_frame(self, whole: bytearray) -> frames.Frame:
        try:
            frame = frames.decode(whole)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors too
            raise self._error(f"{type(error).__name__}: {error}") from None
        if problem := self._account(frame):
            raise self._error(problem)
        self.state = _TRANSITIONS[self.state][frames.TYPE_OF[type(frame)]]
        return frame

    def _account(self, frame: frames.Frame) -> str | None:
        """Compares a frame, sent or received, with those before it; returns the problem if there is one.

        The transitions say which type may come in which state. Numbers must agree, too: an answer needs its question,
        and the receiver can't have more than was sent.
        """
        match frame:
            case frames.Greeting():
                self._versions, self._window_bytes = frame.versions, frame.window_bytes
            case frames.Accept():
                if frame.version not in frames.VERSIONS or frame.version not in self._versions:
                    return f"WELCOME names version {frame.version}, spoken are {frames.VERSIONS} and {self._versions}"
                if frame.window_bytes > self._window_bytes:
                    return f"WELCOME with a window of {frame.window_bytes} bytes, HELLO offers {self._window_bytes}"
                self.version, self._last_mark = frame.version, frame.welcome.mark
            case frames.Resume(point=point):
                self._sent, self._durable, self._checkpoints = list(point.lengths), point.lengths, 0
            case frames.WireData(section=section) if section in TRANSFER_SECTIONS:
                if self.state is not LinkState.TRANSFER:
                    return f"DATA of {section.name} may not come in state {self.state.name}"
                self._sent[section - 1] = max(self._sent[section - 1], frame.offset + frame.raw_length)
            case Checkpoint():
                self._checkpoints += 1
            case frames.Progress(point=point):
                if not self._checkpoints:
                    return "PROGRESS without a CHECKPOINT"
                bounds = zip(self._durable, point.lengths, self._sent, strict=True)
                if self.role is Role.SENDER and any(not low <= at <= high for low, at, high in bounds):
                    return f"PROGRESS to {point.lengths}, sent {tuple(self._sent)}, before {self._durable}"
                self._checkpoints -= 1
                self._durable = point.lengths
            case frames.Committed() | frames.Parked():
                if self._checkpoints:
                    return f"{frames.TYPE_OF[type(frame)].name} with {self._checkpoints} CHECKPOINTs unanswered"
                if isinstance(frame, frames.Committed):
                    self._last_mark = max(self._last_mark, frame.welcome.mark)
            case Flush() | StreamMark():
                self._flushes, self._streamed_seq = self._flushes + 1, frame.seq
                if isinstance(frame, StreamMark):
                    self._last_mark = max(self._last_mark, frame.mark)
            case Durable(seq=seq):
                if not self._flushes:
                    return "DURABLE without a FLUSH or MARK"
                if self.role is Role.SENDER and not self._durable_seq <= seq <= self._streamed_seq:
                    return f"DURABLE to seq {seq}, streamed {self._streamed_seq}, before {self._durable_seq}"
                if self.role is Role.SENDER and frame.mark > self._last_mark:
                    return f"DURABLE to mark {frame.mark}, the last one streamed is {self._last_mark}"
                self._flushes, self._durable_seq = self._flushes - 1, seq
            case Want(contents=contents):
                if self._ungiven:
                    return f"WANT while {self._ungiven} contents of the last one are unanswered"
                self._ungiven = len(contents)
            case Given():
                if not self._ungiven:
                    return "GIVEN without a WANT"
                self._ungiven -= 1
        return None

    def _error(self, problem: str) -> RemoteProtocolError:
        self._failed = True
        self._frame = bytearray()
        return RemoteProtocolError(problem)
