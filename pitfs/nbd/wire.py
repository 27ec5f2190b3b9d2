"""The bytes of NBD as a server of read-only exports speaks it: numbers, headers, chunks. Big-endian throughout.

    greeting        "NBDMAGIC" "IHAVEOPT" u16 flags; the client answers with u32 flags
    option          "IHAVEOPT" u32 option u32 length, data
    option reply    u64 OPTION_REPLY_MAGIC u32 option u32 type u32 length, data
    request         u32 REQUEST_MAGIC u16 flags u16 command u64 cookie u64 offset u32 size
    simple reply    u32 SIMPLE_MAGIC u32 error u64 cookie; for a read without error its data
    chunk           u32 CHUNK_MAGIC u16 flags u16 type u64 cookie u32 length, payload: of a structured reply

The protocol's text is doc/proto.md of github.com/NetworkBlockDevice/nbd, whose names stand here without NBD_. Its
errors have the numbers of Linux: those of `errno`.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

GREETING_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF

OPTION: Final = struct.Struct(">8sII")
OPTION_REPLY: Final = struct.Struct(">QIII")
REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE: Final = struct.Struct(">IIQ")
CHUNK: Final = struct.Struct(">IHHQI")
DATA_CHUNK: Final = struct.Struct(">IHHQIQ")  # a chunk's header and the offset before its data
ERROR: Final = struct.Struct(">IH")
SIZE_AND_FLAGS: Final = struct.Struct(">QH")  # of an export
U64: Final = struct.Struct(">Q")
U32: Final = struct.Struct(">I")
U16: Final = struct.Struct(">H")
sizes = [each.size for each in (OPTION, OPTION_REPLY, REQUEST, SIMPLE, CHUNK)]
assert sizes == [16, 20, 28, 16, 20]

MAX_NAME_BYTES: Final = 4096  # the protocol's limit for any text
MAX_OPTION_BYTES: Final = 32 << 10  # of an option's data: a name and some queries
MAX_REQUEST_BYTES: Final = 32 << 20  # the protocol's default for what one request may read or write
ZEROES_BYTES: Final = 124  # behind the answer to EXPORT_NAME, unless both sides have NO_ZEROES
FIXED_NEWSTYLE: Final = 1  # flags of the greeting, and of the client's answer to it
NO_ZEROES: Final = 2
CONTEXT: Final = "base:allocation"
CONTEXT_ID: Final = 1


class Option(enum.IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(enum.IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6


class ExportFlag(enum.IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10


class Command(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    DF = 1 << 2  # of a read: all in one chunk
    REQ_ONE = 1 << 3  # of BLOCK_STATUS: one extent


class ChunkType(enum.IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    BLOCK_STATUS = 5
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


DONE: Final = 1  # flag of a structured reply's last chunk
HOLE_AND_ZERO: Final = 1 | 2  # base:allocation of what has no data; 0 of what has


def option_reply(option: int, kind: Reply, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def text(data: memoryview) -> str | None:
    """A text that fills the data; None if it is too long or not UTF-8."""
    if len(data) > MAX_NAME_BYTES:
        return None
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        return None


def counted(text: str) -> bytes:
    """A text behind its length in bytes, u32."""
    data = text.encode()
    return U32.pack(len(data)) + data


def counted_text(data: memoryview) -> tuple[str | None, memoryview]:
    """A text behind its length, and what follows it; None if there is no valid one."""
    if len(data) < U32.size:
        return None, data
    end = U32.size + U32.unpack_from(data)[0]
    return (text(data[U32.size : end]), data[end:]) if end <= len(data) else (None, data)


def infos(size_bytes: int, flags: ExportFlag, block_size: int, name: str, description: str) -> list[bytes]:
    """The data of the INFO replies that describe an export: its kind (u16), and what belongs to that."""
    preferred = max(block_size, 4096)  # any read is answered; whole blocks are read fastest
    return [
        U16.pack(0) + SIZE_AND_FLAGS.pack(size_bytes, flags),
        struct.pack(">HIII", 3, 1, preferred, MAX_REQUEST_BYTES),  # block sizes: least, preferred, greatest
        U16.pack(1) + name.encode(),
        U16.pack(2) + description.encode(),
    ]


def chunk(flags: int, kind: ChunkType, cookie: int, payload: bytes = b"") -> bytes:
    return CHUNK.pack(CHUNK_MAGIC, flags, kind, cookie, len(payload)) + payload
