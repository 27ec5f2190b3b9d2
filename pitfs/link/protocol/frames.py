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

There is no frame that deletes or rewrites anything.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

import msgspec
import xxhash

from pitfs.link.protocol import checks
from pitfs.model.transfer import (
    MAX_PAYLOAD_BYTES,
    ROWS,
    Begin,
    Checkpoint,
    Durable,
    End,
    Flush,
    Hello,
    Park,
    ResumePoint,
    Section,
    StreamMark,
    Welcome,
)
from pitfs.model.window import MIN_WINDOW_BYTES

PREFACE: Final = b"\x89pitfs\r\n"
VERSIONS: Final = (1,)  # that this program speaks, best first
MAX_GROWTH_BYTES: Final = 4 << 10  # of a payload that turned out not to shrink: some bytes for each block of zstd
HEADER: Final = struct.Struct("<IBBHQ")
DATA_PREFIX: Final = struct.Struct("<B3sIQ")
assert len(PREFACE) == 8 and HEADER.size == 16 and DATA_PREFIX.size == 16

Buffer = bytes | bytearray | memoryview


class FrameType(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    BEGIN = 4
    RESUME = 5
    DATA = 6
    CHECKPOINT = 7
    PROGRESS = 8
    END = 9
    COMMITTED = 10
    PING = 11
    PONG = 12
    FAULT = 13
    PARK = 14
    PARKED = 15
    FLUSH = 16
    MARK = 17
    DURABLE = 18


class Encoding(enum.IntEnum):
    """How the payload of a DATA frame is encoded: see codec.py."""

    RAW = 0
    STREAM = 1  # the next blocks of the connection's zstd stream
    COLUMNS = 2  # the same, of rows turned into columns


class Greeting(msgspec.Struct, frozen=True):
    """HELLO: the versions that the sender speaks, and who it is; hello is None if no version is common.

    `window_bytes`: how far back its codec can refer.
    """

    versions: tuple[int, ...]
    hello: Hello | None
    window_bytes: int = MIN_WINDOW_BYTES


class Accept(msgspec.Struct, frozen=True):
    """WELCOME: the version chosen, where the replica stands, and the window: that of HELLO or a smaller one."""

    version: int
    welcome: Welcome
    window_bytes: int = MIN_WINDOW_BYTES


class Refuse(msgspec.Struct, frozen=True):
    """REFUSE: no session; `code` is one of errors in `failures`, `message` is for people."""

    code: str
    message: str
    retryable: bool


class Fault(msgspec.Struct, frozen=True):
    """FAULT: the receiver ends the session."""

    code: str
    message: str
    retryable: bool


class Resume(msgspec.Struct, frozen=True):
    """RESUME, the answer to BEGIN: what is durable of this transfer already."""

    point: ResumePoint


class Progress(msgspec.Struct, frozen=True):
    """PROGRESS, one answer for each CHECKPOINT, in order."""

    point: ResumePoint


class Committed(msgspec.Struct, frozen=True):
    """COMMITTED, the answer to END: where the replica stands now."""

    welcome: Welcome


class Parked(msgspec.Struct, frozen=True):
    """PARKED, the answer to PARK: what is durable of the transfer that was put off."""

    point: ResumePoint


class Ping(msgspec.Struct, frozen=True):
    token: int


class Pong(msgspec.Struct, frozen=True):
    token: int


class WireData(NamedTuple):
    """DATA as it stands on the wire; `raw_length` is the length of the payload once decoded."""

    section: Section
    offset: int
    raw_length: int
    encoding: Encoding
    payload: Buffer


Frame = (
    Greeting
    | Accept
    | Refuse
    | Begin
    | Resume
    | WireData
    | Checkpoint
    | Progress
    | End
    | Committed
    | Park
    | Parked
    | Flush
    | StreamMark
    | Durable
    | Ping
    | Pong
    | Fault
)

KINDS: Final[dict[type, FrameType]] = {
    Greeting: FrameType.HELLO,
    Accept: FrameType.WELCOME,
    Refuse: FrameType.REFUSE,
    Begin: FrameType.BEGIN,
    Resume: FrameType.RESUME,
    WireData: FrameType.DATA,
    Checkpoint: FrameType.CHECKPOINT,
    Progress: FrameType.PROGRESS,
    End: FrameType.END,
    Committed: FrameType.COMMITTED,
    Ping: FrameType.PING,
    Pong: FrameType.PONG,
    Fault: FrameType.FAULT,
    Park: FrameType.PARK,
    Parked: FrameType.PARKED,
    Flush: FrameType.FLUSH,
    StreamMark: FrameType.MARK,
    Durable: FrameType.DURABLE,
}

# Longest body of each type. HELLO and BEGIN hold as many volumes, bookmarks and gaps as `checks` allows; the
# others are a few numbers or one message. Known before a byte of the body is kept.
MAX_BODY_BYTES: Final[dict[FrameType, int]] = {
    FrameType.HELLO: 64 << 10,
    FrameType.WELCOME: 64 << 10,  # 256 intervals that could become finer take 20 KiB
    FrameType.PARK: 4 << 10,
    FrameType.PARKED: 4 << 10,
    FrameType.REFUSE: 16 << 10,
    FrameType.BEGIN: 4 << 20,
    FrameType.RESUME: 4 << 10,
    FrameType.DATA: DATA_PREFIX.size + MAX_PAYLOAD_BYTES + MAX_GROWTH_BYTES,
    FrameType.CHECKPOINT: 4 << 10,
    FrameType.PROGRESS: 4 << 10,
    FrameType.END: 1 << 10,
    FrameType.COMMITTED: 1 << 10,
    FrameType.PING: 64,
    FrameType.PONG: 64,
    FrameType.FAULT: 16 << 10,
    FrameType.FLUSH: 256,
    FrameType.MARK: 1 << 10,
    FrameType.DURABLE: 256,
}


class _GreetingBody(msgspec.Struct, frozen=True):
    """HELLO as it is read: versions first, what is of a version stays unread until one is chosen."""

    versions: tuple[int, ...]
    hello: msgspec.Raw
    window_bytes: int = MIN_WINDOW_BYTES


_DECODERS: Final[dict[FrameType, msgspec.msgpack.Decoder[Frame]]] = {
    frame_type: msgspec.msgpack.Decoder(body_class)
    for body_class, frame_type in KINDS.items()
    if body_class not in (WireData, Greeting)
}
_GREETING_DECODER: Final = msgspec.msgpack.Decoder(_GreetingBody)
_HELLO_DECODER: Final = msgspec.msgpack.Decoder(Hello)
_ENCODER: Final = msgspec.msgpack.Encoder()


def common_version(versions: tuple[int, ...]) -> int | None:
    """The best version that we and a peer with these versions speak."""
    return next((version for version in VERSIONS if version in versions), None)


def encode(frame: Frame) -> list[Buffer]:
    """Encodes one frame; the payload of WireData is passed on, not copied.

    Raises:
        ValueError: the frame breaks a limit.
    """
    frame_type = KINDS[type(frame)]
    if isinstance(frame, WireData):
        _check_data(frame)
        prefix = DATA_PREFIX.pack(frame.section, b"\0\0\0", frame.raw_length, frame.offset)
        start = _start(frame_type, frame.encoding, DATA_PREFIX.size + len(frame.payload))
        hasher = xxhash.xxh3_64(start + prefix)
        hasher.update(frame.payload)
        return [start + hasher.intdigest().to_bytes(8, "little") + prefix, frame.payload]
    checks.check(frame)
    body = _ENCODER.encode(frame)
    if len(body) > MAX_BODY_BYTES[frame_type]:
        raise ValueError(f"{frame_type.name} of {len(body)} bytes, limit {MAX_BODY_BYTES[frame_type]}")
    start = _start(frame_type, 0, len(body))
    return [start + xxhash.xxh3_64_intdigest(start + body).to_bytes(8, "little") + body]


def _start(frame_type: FrameType, flags: int, length: int) -> bytes:
    return struct.pack("<IBBH", length, frame_type, flags, 0)


def read_header(header: Buffer) -> tuple[FrameType, int]:
    """Reads and checks a header before anything of its body is kept.

    Returns:
        type and length of the body.

    Raises:
        ValueError: unknown type or flags, or the body is longer (or shorter) than this type may be.
    """
    length, type_number, flags, reserved, _ = HEADER.unpack_from(header)
    try:
        frame_type = FrameType(type_number)
    except ValueError:
        raise ValueError(f"unknown frame type {type_number}") from None
    if reserved or flags > (max(Encoding) if frame_type is FrameType.DATA else 0):
        raise ValueError(f"{frame_type.name} with unknown flags {flags}, {reserved}")
    if length > MAX_BODY_BYTES[frame_type]:
        raise ValueError(f"{frame_type.name} of {length} bytes, limit {MAX_BODY_BYTES[frame_type]}")
    if frame_type is FrameType.DATA and length < DATA_PREFIX.size:
        raise ValueError(f"DATA of {length} bytes is too short")
    return frame_type, length


def decode(frame: bytearray) -> Frame:
    """Decodes a whole frame (header and body) whose header `read_header` accepted.

    The payload of WireData is a view of `frame`, which must not be changed afterwards.

    Raises:
        ValueError: wrong checksum, not msgpack, wrong types, a limit broken.
    """
    _, type_number, flags, _, checksum = HEADER.unpack_from(frame)
    view = memoryview(frame).toreadonly()
    hasher = xxhash.xxh3_64(view[:8])
    hasher.update(view[HEADER.size :])
    if hasher.intdigest() != checksum:
        raise ValueError(f"{FrameType(type_number).name} with a wrong checksum")
    body = view[HEADER.size :]
    if type_number == FrameType.DATA:
        section, zeros, raw_length, offset = DATA_PREFIX.unpack_from(body)
        if zeros != b"\0\0\0":
            raise ValueError("DATA with reserved bytes that aren't zero")
        data = WireData(Section(section), offset, raw_length, Encoding(flags), body[DATA_PREFIX.size :])
        _check_data(data)
        return data
    decoded: Frame
    if type_number == FrameType.HELLO:
        decoded = _decode_greeting(body)
    else:
        decoded = _DECODERS[FrameType(type_number)].decode(body)
    checks.check(decoded)
    return decoded


def _decode_greeting(body: memoryview) -> Greeting:
    greeting = _GREETING_DECODER.decode(body)
    if common_version(greeting.versions) is None:
        return Greeting(greeting.versions, None)
    return Greeting(greeting.versions, _HELLO_DECODER.decode(greeting.hello), greeting.window_bytes)


def _check_data(data: WireData) -> None:
    length = len(data.payload)
    if isinstance(data.payload, memoryview) and (data.payload.itemsize != 1 or not data.payload.c_contiguous):
        raise ValueError("DATA payload isn't a contiguous view of bytes")
    growth = 0 if data.encoding is Encoding.RAW else MAX_GROWTH_BYTES
    if data.raw_length > MAX_PAYLOAD_BYTES or length > data.raw_length + growth:
        raise ValueError(f"DATA of {length} bytes for {data.raw_length}, limit {MAX_PAYLOAD_BYTES}")
    if data.encoding is Encoding.RAW and length != data.raw_length:
        raise ValueError(f"raw DATA of {length} bytes says {data.raw_length}")
    if data.encoding is Encoding.COLUMNS and data.section not in ROWS:
        raise ValueError(f"DATA of {data.section.name} in columns")
    if not 0 <= data.offset <= checks.MAX_NUMBER - data.raw_length:
        raise ValueError(f"DATA at offset {data.offset}")
