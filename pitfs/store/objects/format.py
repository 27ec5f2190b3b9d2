"""What a store looks like on disk: names, store.json, the header of every object, pointers.

    GROUP/
      store.json                     who it belongs to; written last when a store is made
      catalog.sqlite                 what there is; its commit is the moment anything comes to be
      writer.lock                    held by the process that writes
      objects/snapshot-<s>.map       block map nodes written by snapshot s (8192 bytes each), then its manifest
      objects/snapshot-<s>.blocks    contents of its diff
      objects/journal-<s>-<l>.index  difference journal of the interval that ends at s, layers up to l, then its
                                     sparse index; a finer one replaces it
      objects/journal-<s>.blocks     contents that only this journal has; of a number that no snapshot has:
                                     the log of an open interval (`store.open_interval.wal`)
      staging/                       the transfer under way
      staging/layers-<s>/            layers of a difference journal under way, or put off
      staging/closing-<s>/           what is made of an open interval that was closed
      pins/                          who reads which instants now (`store.pins.pins`); made when one does

<s> is the snapshot's id in 16 hex digits, <l> the number of a layer (see `model.ladder`). Every object begins
with a header of 4096 bytes, little-endian:

    offset size
     0      8   magic            "PITFSOBJ"
     8      4   version          1
    12      2   kind             1 map, 2 snapshot blocks, 3 journal index, 4 journal blocks
    14      2   form             0 hot: the data as they are; others are room for a cold form
    16     16   history          which group's history it belongs to
    32      8   snapshot         id
    40      8   data_bytes       length of the data area, which begins at byte 4096
    48      8   footer_bytes     length of the footer, which follows the data area
    56      8   footer_checksum  xxh3_64 of the footer, 0 if there is none
    64      8   checksum         xxh3_64 of bytes 0..64
    72   4024   zeros            room for the cold form

A pointer (uint64) leads to contents: object << 36 | unit, where a unit is 512 bytes from the start of the
data area and object is 2s for snapshot-<s>.blocks, 2s + 1 for journal-<s>.blocks. In inner nodes of the block
map and in roots it leads to a node: s << 36 | number of the node in snapshot-<s>.map. 0 is zeros.
"""

from __future__ import annotations

import enum
import re
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, StoreVersionError
from pitfs.model.ladder import LAST_LAYER
from pitfs.model.transfer import UNIT_BYTES

VERSION: Final = 1
MAGIC: Final = b"PITFSOBJ"
HEADER_BYTES: Final = 4096
HEADER: Final = struct.Struct("<8sIHH16sQQQQ")
_CHECKSUM: Final = struct.Struct("<Q")
assert HEADER.size == 64

UNIT_BITS: Final = 36
UNIT_MASK: Final = (1 << UNIT_BITS) - 1
MAX_UNITS: Final = 1 << UNIT_BITS  # of one object: 32 TiB
MAX_SNAPSHOT_ID: Final = (1 << (64 - UNIT_BITS - 1)) - 1
MAX_SEQ: Final = (1 << 46) - 1  # what an inode number has room for: 447 years of 5,000 writes a second

STORE_JSON: Final = "store.json"
CATALOG: Final = "catalog.sqlite"
LOCK: Final = "writer.lock"
OBJECTS: Final = "objects"
STAGING: Final = "staging"
PINS: Final = "pins"

class ObjectKind(enum.IntEnum):
    MAP = 1
    SNAPSHOT_BLOCKS = 2
    JOURNAL_INDEX = 3
    JOURNAL_BLOCKS = 4


_FILES: Final = {
    ObjectKind.MAP: "snapshot-{:016x}.map",
    ObjectKind.SNAPSHOT_BLOCKS: "snapshot-{:016x}.blocks",
    ObjectKind.JOURNAL_INDEX: "journal-{:016x}-{}.index",
    ObjectKind.JOURNAL_BLOCKS: "journal-{:016x}.blocks",
}
_NUMBERS: Final = re.compile(r"[a-z]+-(?P<snapshot_id>[0-9a-f]{16})(?:-(?P<layer>[0-9]))?\.[a-z]+")


class ObjectName(NamedTuple):
    """Which object it is. `snapshot_id`: or the id of an open interval, of its log. `layer`: of an index."""

    kind: ObjectKind
    snapshot_id: int
    layer: int = LAST_LAYER

    @property
    def file(self) -> str:
        """Its file's name in objects/."""
        return _FILES[self.kind].format(self.snapshot_id, self.layer)

    @classmethod
    def of_file(cls, file: str) -> ObjectName | None:
        """The object with that file name; None where it is none's."""
        if not (found := _NUMBERS.fullmatch(file)):
            return None
        numbers = int(found["snapshot_id"], 16), int(found["layer"] or LAST_LAYER)
        return next((name for kind in ObjectKind if (name := cls(kind, *numbers)).file == file), None)

    @classmethod
    def of_number(cls, number: int) -> ObjectName:
        """The contents object with that number."""
        return cls(ObjectKind.JOURNAL_BLOCKS if number & 1 else ObjectKind.SNAPSHOT_BLOCKS, number >> 1)

    @property
    def number(self) -> int:
        """Of a contents object, as pointers have it."""
        return 2 * self.snapshot_id + (self.kind is ObjectKind.JOURNAL_BLOCKS)

    def pointer(self, unit: int = 0) -> int:
        """To contents in it."""
        return pointer(self.number, unit)


def pointer(number: int, unit: int) -> int:
    """Pointer to `unit` of the contents object `number`, or node `unit` of the map of snapshot `number`."""
    return number << UNIT_BITS | unit


def pointer_object(value: int) -> int:
    return value >> UNIT_BITS


def pointer_unit(value: int) -> int:
    return value & UNIT_MASK


def data_offset(unit: int) -> int:
    """Byte of a contents object at which `unit` begins."""
    return HEADER_BYTES + unit * UNIT_BYTES


@dataclass(frozen=True, slots=True)
class ObjectHeader:
    """The header of an object; the lengths are 0 while it is being written."""

    kind: ObjectKind
    history: bytes  # 16 bytes
    snapshot_id: int
    data_bytes: int = 0
    footer_bytes: int = 0
    footer_checksum: int = 0

    def encode(self) -> bytes:
        """4096 bytes."""
        head = HEADER.pack(
            MAGIC, VERSION, self.kind, 0, self.history, self.snapshot_id,
            self.data_bytes, self.footer_bytes, self.footer_checksum,
        )  # fmt: skip
        return (head + _CHECKSUM.pack(xxh3_64_intdigest(head))).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def decode(cls, data: bytes, what: str) -> ObjectHeader:
        """The header in the first bytes of an object.

        Raises:
            CorruptionError: it isn't one.
            StoreVersionError: a newer pitfs wrote it, or in a form this one doesn't know.
        """
        if len(data) < HEADER.size + _CHECKSUM.size:
            raise CorruptionError(what, len(data), "the file ends inside its header")
        magic, version, kind, form, history, snapshot_id, data_bytes, footer_bytes, footer_checksum = (
            HEADER.unpack_from(data)
        )
        (checksum,) = _CHECKSUM.unpack_from(data, HEADER.size)
        if magic != MAGIC or checksum != xxh3_64_intdigest(data[: HEADER.size]):
            raise CorruptionError(what, 0, "no header of a pitfs object")
        if version != VERSION or form != 0 or kind not in _FILES:
            raise StoreVersionError(
                f"{what}: object of version {version}, form {form}, kind {kind}; this pitfs knows version "
                f"{VERSION}, form 0: use the pitfs that wrote it, or a newer one"
            )
        return cls(ObjectKind(kind), history, snapshot_id, data_bytes, footer_bytes, footer_checksum)


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """An object as the catalog knows it."""

    name: str
    kind: int
    snapshot_id: int
    data_bytes: int
    footer_bytes: int = 0
    footer_checksum: int = 0
