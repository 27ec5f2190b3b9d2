"""What a store looks like on disk: names, store.json, the header of every object, pointers.

    GROUP/
      store.json                     who it belongs to; written last when a store is made
      catalog.sqlite                 what there is; its commit is the moment anything comes to be
      catalog.log                    the same, appended: the catalog can be made again of it (`store.catalog.log`)
      writer.lock                    held by the process that writes
      changes.lock                   held while intervals that are there are changed (`store.opening.changes_locked`)
      prune.lock                     held by the process that prunes
      reserve                        room without content that pruning has on a full disk
      heal.lock                      held while damage is healed as soon as it is known (`store.check.heal`)
      objects/hhhh/hhh/              a folder of objects: see below
          snapshot-<s>.map           block map nodes written by snapshot s (8192 bytes each), then its manifest
          snapshot-<s>.blocks        contents of its diff
          journal-<s>-<l>.index      difference journal of the interval that ends at s, layers up to l, then its
                                     sparse index; a finer one replaces it
          journal-<s>.blocks         contents that only this journal has; of a number that no snapshot has:
                                     the log of an open interval (`store.open_interval.wal`)
      staging/                       the transfer under way
      staging/layers-<s>/            layers of a difference journal under way, or put off
      staging/closing-<s>/           what is made of an open interval that was closed
      pins/                          who reads which instants now (`store.pins.pins`); made when one does

<s> is the snapshot's id in 16 hex digits, <l> the number of a layer (see `model.ladder`). An interval takes two ids,
one for its snapshot and one for its log, or one where it wasn't streamed. 256 ids share a folder: its path is the
digits of the id before the last two, four and three of them (0x12345 is in 0000/123/). So a folder of objects has some
1,000 names, and each folder above it at most 8,192. In a store of version 1 all objects are in objects/ itself.

Behind the end of a map, or of contents, there may be parts of others, whose snapshots were removed: the table `moved`
of the catalog says which, and where (`store.retention.moving`).

Every object begins with a header of 4096 bytes, little-endian:

    offset size
     0      8   magic            "PITFSOBJ"
     8      4   version          1
    12      2   kind             1 map, 2 snapshot blocks, 3 journal index, 4 journal blocks
    14      2   form             0 hot: the data as they are; others are room for a cold form
    16     16   history          which group's history it belongs to
    32      8   snapshot         id
    40      8   data_bytes       length of the data area, which begins at byte 4096; 0 of journal-<s>.blocks, which
                                 grow by layers: the catalog has it (those made before have a length of then)
    48      8   footer_bytes     length of the footer, which follows the data area
    56      8   footer_checksum  xxh3_64 of the footer, 0 if there is none
    64      8   checksum         xxh3_64 of bytes 0..64
    72   4024   zeros            room for the cold form

A pointer (uint64) leads to contents: object << unit_bits | unit, where a unit is unit_bytes from the start of the
data area and object is 2s for snapshot-<s>.blocks, 2s + 1 for journal-<s>.blocks. In inner nodes of the block
map and in roots it leads to a node: s << unit_bits | number of the node in snapshot-<s>.map. 0 is zeros.

store.json says what unit_bytes and unit_bits are. They are chosen when the store is made (`Layout.of`): unit_bytes is
the smallest block size of the group, and unit_bits as few as hold a copy of all its volumes, but at least 30. What is
left is for ids: 2**33 of a group of up to 4 TiB in blocks of 4 KiB, which is 136 years of intervals of one second, half
of that for each doubling of its size. A store of version 1 has units of 512 bytes and 36 bits of them, which leaves
2**27 ids.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, StoreVersionError
from pitfs.model.ladder import LAST_LAYER
from pitfs.model.transfer import UNIT_BYTES, VolumeInfo

OBJECT_VERSION: Final = 1
MAGIC: Final = b"PITFSOBJ"
HEADER_BYTES: Final = 4096
HEADER: Final = struct.Struct("<8sIHH16sQQQQ")
_CHECKSUM: Final = struct.Struct("<Q")
assert HEADER.size == 64

MIN_UNIT_BITS: Final = 30  # with fewer the log of a small group's open interval would soon be full
MAX_SEQ: Final = (1 << 46) - 1  # what an inode number has room for: 447 years of 5,000 writes a second

STORE_JSON: Final = "store.json"
CATALOG: Final = "catalog.sqlite"
CATALOG_LOG: Final = "catalog.log"
LOCK: Final = "writer.lock"
CHANGES_LOCK: Final = "changes.lock"
PRUNE_LOCK: Final = "prune.lock"
RESERVE: Final = "reserve"
HEAL_LOCK: Final = "heal.lock"
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


@dataclass(frozen=True, slots=True)
class Layout:
    """How a store's pointers are made up, and where in objects/ its objects are. It never changes.

    Attributes:
        unit_bytes: of a unit. unit_bits: of a pointer, for the unit; the others are for the object.
        has_folders: whether objects are in folders.
    """

    unit_bytes: int
    unit_bits: int
    has_folders: bool = True

    @classmethod
    def of(cls, volumes: Sequence[VolumeInfo]) -> Layout:
        """That of a new store for a group of these volumes."""
        unit_bytes = min(volume.block_size for volume in volumes)
        unit_count = sum(volume.block_count * volume.block_size for volume in volumes) // unit_bytes
        return cls(unit_bytes, max(MIN_UNIT_BITS, (unit_count - 1).bit_length()))

    @property
    def max_units(self) -> int:
        """How many one object can have."""
        return 1 << self.unit_bits

    @property
    def max_snapshot_id(self) -> int:
        return (1 << (64 - self.unit_bits - 1)) - 1

    @property
    def wire_units(self) -> int:
        """How many of the wire's units (512 bytes) one of these has."""
        return self.unit_bytes // UNIT_BYTES

    def pointer(self, name: ObjectName, unit: int = 0) -> int:
        """To contents in an object."""
        return name.number << self.unit_bits | unit

    def node_pointer(self, snapshot_id: int, number: int) -> int:
        """To a node in the map of a snapshot."""
        return snapshot_id << self.unit_bits | number

    def object_of(self, pointer: int) -> int:
        """Number of the contents object; of a pointer to a node the snapshot's id."""
        return pointer >> self.unit_bits

    def unit_of(self, pointer: int) -> int:
        """The unit, or the number of the node."""
        return pointer & (1 << self.unit_bits) - 1

    def offset_of(self, pointer: int) -> int:
        """Byte of a contents object to which it leads."""
        return HEADER_BYTES + self.unit_of(pointer) * self.unit_bytes

    def path_of(self, file: str) -> str:
        """Where in objects/ the object with that file name is."""
        if not self.has_folders:
            return file
        digits = file.partition("-")[2]
        return f"{digits[7:11]}/{digits[11:14]}/{file}"


VERSION_1: Final = Layout(UNIT_BYTES, 36, has_folders=False)


@dataclass(frozen=True, slots=True)
class ObjectHeader:
    """The header of an object, written once; data_bytes is 0 of contents of a journal and of a log."""

    kind: ObjectKind
    history: bytes  # 16 bytes
    snapshot_id: int
    data_bytes: int = 0
    footer_bytes: int = 0
    footer_checksum: int = 0

    def encode(self) -> bytes:
        """4096 bytes."""
        head = HEADER.pack(
            MAGIC, OBJECT_VERSION, self.kind, 0, self.history, self.snapshot_id,
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
        if version != OBJECT_VERSION or form != 0 or kind not in _FILES:
            raise StoreVersionError(
                f"{what}: object of version {version}, form {form}, kind {kind}; this pitfs knows version "
                f"{OBJECT_VERSION}, form 0: use the pitfs that wrote it, or a newer one"
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
