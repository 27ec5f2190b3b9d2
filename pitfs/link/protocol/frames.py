"""The frames of the link: format, limits and checks in one place. No I/O.

Each side begins with an 8-byte preface, then sends frames:

    length    u32   bytes of the body
    type      u8    FrameType
    flags     u8    DATA: Encoding of the payload; else 0
    reserved  u16   0
    checksum  u64   xxh3_64 of the 8 bytes above and the body

All integers are little-endian. The body of DATA is fixed: section u8, 3 zero bytes, raw length u32, offset
u64, payload (as long as the raw length says; in the stream at most some KiB longer). All other bodies are msgpack:
maps with the field names of the structs here and in model/transfer.py; unknown keys are ignored, so that a later
version can add some. HELLO is the same in all versions; what follows is of the version that WELCOME names.

The types of the structs' fields carry their limits, and msgspec checks them when it decodes a body. It doesn't check
what it encodes, so `encode` decodes each control frame again: a mistake of ours is found here, not by the peer.

There is no frame that deletes or rewrites anything: GIVEN has what the replica asked for, by its checksum.
"""

from __future__ import annotations

import enum
import struct
from typing import Annotated, Final, NamedTuple

import msgspec
import xxhash

from pitfs.model import transfer
from pitfs.model.group import identity_problem
from pitfs.model.ladder import is_rung
from pitfs.model.window import MIN_WINDOW_BYTES, check_window

PREFACE: Final = b"\x89pitfs\r\n"
VERSIONS: Final = (2, 1)  # that this program speaks, best first; 1: no WANT
MAX_MESSAGE_LENGTH: Final = 4000
MAX_GROWTH_BYTES: Final = 4 << 10  # of a payload that turned out not to shrink: some bytes for each block of zstd
HEADER: Final = struct.Struct("<IBBHQ")
DATA_PREFIX: Final = struct.Struct("<B3sIQ")
assert len(PREFACE) == 8 and HEADER.size == 16 and DATA_PREFIX.size == 16

Buffer = bytes | bytearray | memoryview
Versions = Annotated[tuple[transfer.Number, ...], msgspec.Meta(min_length=1, max_length=64)]


class Encoding(enum.IntEnum):
    """How the payload of a DATA frame is encoded: see codec/payloads.py."""

    RAW = 0
    STREAM = 1  # the next blocks of the connection's zstd stream
    COLUMNS = 2  # the same, of rows turned into columns


class Greeting(msgspec.Struct, frozen=True):
    """HELLO: the versions that the sender speaks, and who it is; hello is None if no version is common.

    `window_bytes`: how far back its codec can refer.
    """

    versions: Versions
    hello: transfer.Hello | None
    window_bytes: int = MIN_WINDOW_BYTES


class Accept(msgspec.Struct, frozen=True):
    """WELCOME: the version chosen, the replica's state, and the window: that of HELLO or a smaller one."""

    version: transfer.Number
    welcome: transfer.Welcome
    window_bytes: int = MIN_WINDOW_BYTES


class _Refusal(msgspec.Struct, frozen=True):
    """`code` is one of `sessions/failures.py`, `message` is for people."""

    code: Annotated[str, msgspec.Meta(pattern=r"\A[a-z-]{1,32}\Z")]
    message: Annotated[str, msgspec.Meta(max_length=MAX_MESSAGE_LENGTH)]
    retryable: bool


class Refuse(_Refusal, frozen=True):
    """REFUSE: no session."""


class Fault(_Refusal, frozen=True):
    """FAULT: the receiver ends the session."""


class _Durability(msgspec.Struct, frozen=True):
    """What is durable of a transfer."""

    point: transfer.ResumePoint


class Resume(_Durability, frozen=True):
    """RESUME, the answer to BEGIN: what came of this transfer in earlier sessions."""


class Progress(_Durability, frozen=True):
    """PROGRESS, one answer for each CHECKPOINT, in order."""


class Parked(_Durability, frozen=True):
    """PARKED, the answer to PARK."""


class Committed(msgspec.Struct, frozen=True):
    """COMMITTED, the answer to END: the replica's state now."""

    welcome: transfer.Welcome


class Ping(msgspec.Struct, frozen=True):
    token: transfer.Number


class Pong(msgspec.Struct, frozen=True):
    token: transfer.Number


class WireData(NamedTuple):
    """DATA as it stands on the wire; `raw_length` is the length of the payload once decoded."""

    section: transfer.Section
    offset: int
    raw_length: int
    encoding: Encoding
    payload: Buffer


Frame = (
    Greeting | Accept | Refuse | Fault | Ping | Pong | WireData
    | transfer.Begin | Resume | transfer.Checkpoint | Progress | transfer.End | Committed | transfer.Park | Parked
    | transfer.Flush | transfer.StreamMark | transfer.Durable | transfer.Want | transfer.Given
)  # fmt: skip


class FrameType(enum.IntEnum):
    """Each type: its number, the value that it carries, and its longest body, known before a byte of it is kept.

    HELLO and BEGIN hold as many volumes, bookmarks and gaps as their limits allow; the others are a few numbers or one
    message.
    """

    body: type[Frame]
    max_body_bytes: int

    def __new__(cls, number: int, body: type[Frame], max_body_bytes: int) -> FrameType:
        member = int.__new__(cls, number)
        member._value_ = number
        member.body, member.max_body_bytes = body, max_body_bytes
        return member

    HELLO = 1, Greeting, 64 << 10
    WELCOME = 2, Accept, 64 << 10  # 256 intervals that could become finer take 20 KiB
    REFUSE = 3, Refuse, 16 << 10
    BEGIN = 4, transfer.Begin, 4 << 20
    RESUME = 5, Resume, 4 << 10
    DATA = 6, WireData, DATA_PREFIX.size + transfer.MAX_PAYLOAD_BYTES + MAX_GROWTH_BYTES
    CHECKPOINT = 7, transfer.Checkpoint, 4 << 10
    PROGRESS = 8, Progress, 4 << 10
    END = 9, transfer.End, 1 << 10
    COMMITTED = 10, Committed, 1 << 10
    PING = 11, Ping, 64
    PONG = 12, Pong, 64
    FAULT = 13, Fault, 16 << 10
    PARK = 14, transfer.Park, 4 << 10
    PARKED = 15, Parked, 4 << 10
    FLUSH = 16, transfer.Flush, 256
    MARK = 17, transfer.StreamMark, 1 << 10
    DURABLE = 18, transfer.Durable, 256
    WANT = 19, transfer.Want, 32 << 10
    GIVEN = 20, transfer.Given, transfer.MAX_CONTENT_BYTES + 64


_TYPES: Final[dict[int, FrameType]] = {frame_type.value: frame_type for frame_type in FrameType}
SINCE: Final = {FrameType.WANT: 2, FrameType.GIVEN: 2}  # the version that brought a type, if not the first
TYPE_OF: Final[dict[type, FrameType]] = {frame_type.body: frame_type for frame_type in FrameType}


class _GreetingBody(msgspec.Struct, frozen=True):
    """HELLO as it is read: what depends on the version stays undecoded until one is chosen."""

    versions: Versions
    hello: msgspec.Raw
    window_bytes: int = MIN_WINDOW_BYTES


_DECODERS: Final[dict[FrameType, msgspec.msgpack.Decoder[Frame]]] = {
    frame_type: msgspec.msgpack.Decoder(frame_type.body)
    for frame_type in FrameType
    if frame_type not in (FrameType.HELLO, FrameType.DATA)
}
_GREETING_DECODER: Final = msgspec.msgpack.Decoder(_GreetingBody)
_HELLO_DECODER: Final = msgspec.msgpack.Decoder(transfer.Hello)
_ENCODER: Final = msgspec.msgpack.Encoder()


def common_version(versions: tuple[int, ...]) -> int | None:
    """The best version that we and a peer with these versions speak."""
    return next((version for version in VERSIONS if version in versions), None)


def encode(frame: Frame) -> list[Buffer]:
    """Encodes one frame; the payload of WireData is passed on, not copied.

    Raises:
        ValueError: the frame breaks a limit.
    """
    frame_type = TYPE_OF[type(frame)]
    if isinstance(frame, WireData):
        _check_data(frame)
        prefix = DATA_PREFIX.pack(frame.section, b"\0\0\0", frame.raw_length, frame.offset)
        return [_header(frame_type, frame.encoding, prefix, frame.payload) + prefix, frame.payload]
    try:
        body = _ENCODER.encode(frame)
    except OverflowError as error:
        raise ValueError(str(error)) from None
    _check_length(frame_type, len(body))
    _decode_body(frame_type, body)
    return [_header(frame_type, 0, body) + body]


def _header(frame_type: FrameType, flags: int, prefix: bytes, payload: Buffer = b"") -> bytes:
    """The header of a body in two parts."""
    start = struct.pack("<IBBH", len(prefix) + len(payload), frame_type, flags, 0)
    return start + _checksum(start + prefix, payload).to_bytes(8, "little")


def _checksum(start: Buffer, rest: Buffer) -> int:
    hasher = xxhash.xxh3_64(start)
    hasher.update(rest)
    return hasher.intdigest()


def _check_length(frame_type: FrameType, length: int) -> None:
    if length > frame_type.max_body_bytes:
        raise ValueError(f"{frame_type.name} of {length} bytes, limit {frame_type.max_body_bytes}")
    if frame_type is FrameType.DATA and length < DATA_PREFIX.size:
        raise ValueError(f"DATA of {length} bytes is too short")


def read_header(header: Buffer) -> tuple[FrameType, int]:
    """Reads and checks a header before anything of its body is kept.

    Returns:
        type and length of the body.

    Raises:
        ValueError: unknown type or flags, or the body is longer (or shorter) than this type may be.
    """
    length, type_number, flags, reserved, _ = HEADER.unpack_from(header)
    if (frame_type := _TYPES.get(type_number)) is None:
        raise ValueError(f"unknown frame type {type_number}")
    if reserved or flags > (max(Encoding) if frame_type is FrameType.DATA else 0):
        raise ValueError(f"{frame_type.name} with unknown flags {flags}, {reserved}")
    _check_length(frame_type, length)
    return frame_type, length


def decode(frame: bytearray) -> Frame:
    """Decodes a whole frame (header and body) whose header `read_header` accepted.

    The payload of WireData is a view of `frame`, which must not be changed afterwards.

    Raises:
        ValueError: wrong checksum, not msgpack, wrong types, a limit broken.
    """
    _, type_number, flags, _, checksum = HEADER.unpack_from(frame)
    view = memoryview(frame).toreadonly()
    body = view[HEADER.size :]
    if _checksum(view[:8], body) != checksum:
        raise ValueError(f"{_TYPES[type_number].name} with a wrong checksum")
    if type_number != FrameType.DATA:
        return _decode_body(_TYPES[type_number], body)
    section, zeros, raw_length, offset = DATA_PREFIX.unpack_from(body)
    if zeros != b"\0\0\0":
        raise ValueError("DATA with reserved bytes that aren't zero")
    data = WireData(transfer.Section(section), offset, raw_length, Encoding(flags), body[DATA_PREFIX.size :])
    _check_data(data)
    return data


def _decode_body(frame_type: FrameType, body: Buffer) -> Frame:
    """Decodes the body of a control frame, and checks what the types of its fields can't say.

    Raises:
        ValueError: as `decode`.
    """
    frame = _decode_greeting(body) if frame_type is FrameType.HELLO else _DECODERS[frame_type].decode(body)
    match frame:
        case Greeting(window_bytes=window_bytes) | Accept(window_bytes=window_bytes):
            try:
                check_window(window_bytes)
            except ValueError as error:
                raise ValueError(f"window of {window_bytes} bytes: {error}") from None
    match frame:
        case Accept(welcome=welcome):
            for each in welcome.coarse:
                if each.granularity_ns is not None and not (each.granularity_ns and is_rung(each.granularity_ns)):
                    raise ValueError(f"granularity {each.granularity_ns} ns is none that can become finer")
                if each.to_seq < each.from_seq or each.to_time_ns < each.from_time_ns:
                    raise ValueError("an interval goes back")
        case transfer.Begin(manifest=manifest):
            if manifest.to_seq < manifest.from_seq or manifest.to_time_ns < manifest.from_time_ns:
                raise ValueError("manifest goes back")
    return frame


def _decode_greeting(body: Buffer) -> Greeting:
    greeting = _GREETING_DECODER.decode(body)
    if common_version(greeting.versions) is None:
        return Greeting(greeting.versions, None)
    hello = _HELLO_DECODER.decode(greeting.hello)
    if problem := identity_problem(hello.group, hello.history, hello.volumes):
        raise ValueError(problem)
    return Greeting(greeting.versions, hello, greeting.window_bytes)


def _check_data(data: WireData) -> None:
    length = len(data.payload)
    if isinstance(data.payload, memoryview) and (data.payload.itemsize != 1 or not data.payload.c_contiguous):
        raise ValueError("DATA payload isn't a contiguous view of bytes")
    growth = 0 if data.encoding is Encoding.RAW else MAX_GROWTH_BYTES
    if data.raw_length > transfer.MAX_PAYLOAD_BYTES or length > data.raw_length + growth:
        raise ValueError(f"DATA of {length} bytes for {data.raw_length}, limit {transfer.MAX_PAYLOAD_BYTES}")
    if data.encoding is Encoding.RAW and length != data.raw_length:
        raise ValueError(f"raw DATA of {length} bytes says {data.raw_length}")
    if data.encoding is Encoding.COLUMNS and data.section not in transfer.ROWS:
        raise ValueError(f"DATA of {data.section.name} in columns")
    if not 0 <= data.offset <= transfer.MAX_NUMBER - data.raw_length:
        raise ValueError(f"DATA at offset {data.offset}")
