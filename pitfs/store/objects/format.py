"""What a store looks like on disk: names, store.json, the header of every object, pointers.

    GROUP/
      store.json                     who it belongs to; written last when a store is made
      catalog.sqlite                 what there is; its commit is the moment anything comes to be
      writer.lock                    held by the process that writes
      objects/snapshot-<s>.map       block map nodes written by snapshot s (8192 bytes each), then facts
      objects/snapshot-<s>.blocks    contents of its diff
      objects/journal-<s>-<l>.index  difference journal of the interval that ends at s, layers up to l, then its
                                     fence table; a finer one replaces it
      objects/journal-<s>.blocks     contents that only this journal has; of a number that no snapshot has:
                                     the log of a tail (see `store.taillog`)
      staging/                       the transfer under way
      staging/layers-<s>/            layers of a difference journal under way, or put off
      staging/closing-<s>/           what is made of a tail that was closed
      holders/                       who reads which instants now (see `store.holders`); made when one does

<s> is the snapshot's id in 16 hex digits, <l> the number of a layer (see `model.ladder`). Every object begins
with a header of 4096 bytes, little-endian:

    offset size
     0      8   magic          "PITFSOBJ"
     8      4   version        1
    12      2   kind           1 map, 2 snapshot blocks, 3 journal index, 4 journal blocks
    14      2   form           0 hot: the data stand as they are; others are room for a cold form
    16     16   history        which group's history it belongs to
    32      8   snapshot       id
    40      8   data_bytes     length of the data area, which begins at byte 4096
    48      8   tail_bytes     length of what stands behind the data area
    56      8   tail_checksum  xxh3_64 of it, 0 if there is none
    64      8   checksum       xxh3_64 of bytes 0..64
    72   4024   zeros          room for the cold form

A pointer (uint64) leads to contents: object << 36 | unit, where a unit is 512 bytes from the start of the
data area and object is 2s for snapshot-<s>.blocks, 2s + 1 for journal-<s>.blocks. In inner nodes of the block
map and in roots it leads to a node: s << 36 | number of the node in snapshot-<s>.map. 0 is zeros.
"""

from __future__ import annotations

import enum
import os
import re
import struct
from dataclasses import dataclass
from typing import Final

import msgspec
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, StoreError, StoreVersionError
from pitfs.model.group import identity_problem
from pitfs.model.ladder import LAST_LAYER
from pitfs.model.transfer import UNIT_BYTES, VolumeInfo
from pitfs.storage.files import storage_error

FORMAT: Final = "pitfs-store"
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
HOLDERS: Final = "holders"

_OBJECT_NAME: Final = re.compile(
    r"snapshot-[0-9a-f]{16}\.(?:map|blocks)|journal-(?P<blocks>[0-9a-f]{16})\.blocks"
    r"|journal-(?P<index>[0-9a-f]{16})-(?P<layer>[0-9])\.index"
)


class ObjectKind(enum.IntEnum):
    MAP = 1
    SNAPSHOT_BLOCKS = 2
    JOURNAL_INDEX = 3
    JOURNAL_BLOCKS = 4


_NAMES: Final = {
    ObjectKind.MAP: "snapshot-{:016x}.map",
    ObjectKind.SNAPSHOT_BLOCKS: "snapshot-{:016x}.blocks",
    ObjectKind.JOURNAL_INDEX: "journal-{:016x}-{}.index",
    ObjectKind.JOURNAL_BLOCKS: "journal-{:016x}.blocks",
}


def object_file(kind: ObjectKind, snapshot: int, layer: int = LAST_LAYER) -> str:
    """File name of an object in objects/; `layer`: of an index."""
    return _NAMES[kind].format(snapshot, layer)


def is_object_file(name: str) -> bool:
    return _OBJECT_NAME.fullmatch(name) is not None


def index_of(name: str) -> tuple[int, int] | None:
    """(snapshot id, layer) where that is the name of a journal's index."""
    found = _OBJECT_NAME.fullmatch(name)
    return (int(found["index"], 16), int(found["layer"])) if found and found["index"] else None


def journal_blocks_of(name: str) -> int | None:
    """Snapshot id, or id of a tail, where that is the name of a journal's contents."""
    found = _OBJECT_NAME.fullmatch(name)
    return int(found["blocks"], 16) if found and found["blocks"] else None


def contents_object(snapshot: int, kind: ObjectKind) -> int:
    """Number of a contents object as it stands in pointers."""
    return 2 * snapshot + (kind is ObjectKind.JOURNAL_BLOCKS)


def contents_kind(number: int) -> tuple[ObjectKind, int]:
    """(kind, snapshot id) of the contents object with that number."""
    return (ObjectKind.JOURNAL_BLOCKS if number & 1 else ObjectKind.SNAPSHOT_BLOCKS), number >> 1


def pointer(number: int, unit: int) -> int:
    """Pointer to `unit` of the contents object `number`, or node `unit` of the map of snapshot `number`."""
    return number << UNIT_BITS | unit


def pointer_object(value: int) -> int:
    return value >> UNIT_BITS


def pointer_unit(value: int) -> int:
    return value & UNIT_MASK


def data_offset(unit: int) -> int:
    """Byte in a contents object where `unit` stands."""
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
        magic, version, kind, form, history, snapshot, data_bytes, tail_bytes, tail_checksum = (
            HEADER.unpack_from(data)
        )
        (checksum,) = _CHECKSUM.unpack_from(data, HEADER.size)
        if magic != MAGIC or checksum != xxh3_64_intdigest(data[: HEADER.size]):
            raise CorruptionError(what, 0, "no header of a pitfs object")
        if version != VERSION or form != 0 or kind not in _NAMES:
            raise StoreVersionError(
                f"{what}: object of version {version}, form {form}, kind {kind}; this pitfs knows version "
                f"{VERSION}, form 0: use the pitfs that wrote it, or a newer one"
            )
        return cls(ObjectKind(kind), history, snapshot, data_bytes, tail_bytes, tail_checksum)


class StoreInfo(msgspec.Struct, frozen=True):
    """store.json: whose store it is; never changes."""

    format: str
    version: int
    group: str
    history: str
    volumes: tuple[VolumeInfo, ...]


def read_store_info(path: str) -> StoreInfo:
    """What store.json of the store at `path` says.

    Raises:
        StoreError: it isn't a store; the message says what is missing.
        StoreVersionError: a newer pitfs wrote it.
    """
    looks = (
        f"a store is a directory ROOT/GROUP that `pitfs receive` made: {STORE_JSON}, {CATALOG}, {OBJECTS}/"
    )
    name = os.path.join(path, STORE_JSON)
    try:
        with open(name, "rb") as file:
            data = file.read(1 << 20)
    except FileNotFoundError:
        if not os.path.isdir(path):
            raise StoreError(f"{path}: no such directory: {looks}") from None
        raise StoreError(f"{path}: not a store, it has no {STORE_JSON}: {looks}{_stores_in(path)}") from None
    except NotADirectoryError:
        raise StoreError(f"{path}: not a directory: {looks}") from None
    except OSError as error:
        raise storage_error(error, name, "reading") from error
    try:
        head = msgspec.json.decode(data, type=dict)
        if head.get("format") != FORMAT or not isinstance(head.get("version"), int):
            raise StoreError(f"{name}: not of a pitfs store: {looks}")
        if head["version"] > VERSION:
            raise StoreVersionError(
                f"{path}: store of version {head['version']}, this pitfs knows up to {VERSION}: "
                f"use a newer pitfs"
            )
        info = msgspec.json.decode(data, type=StoreInfo)
    except msgspec.MsgspecError as error:
        raise StoreError(f"{name}: damaged: {error}: put it back from another copy of the store") from None
    problem = identity_problem(info.group, info.history, info.volumes)
    if problem:
        raise StoreError(f"{name}: damaged: {problem}: put it back from another copy of the store")
    for part in (CATALOG, OBJECTS):
        if not os.path.exists(os.path.join(path, part)):
            raise StoreError(f"{path}: not a whole store, it has no {part}: {looks}")
    return info


def _stores_in(path: str) -> str:
    """A hint where the user named the root instead of a store in it."""
    try:
        names = sorted(
            entry.name for entry in os.scandir(path) if os.path.exists(os.path.join(entry.path, STORE_JSON))
        )
    except OSError:
        return ""
    return f"; there are stores in it: {', '.join(names[:5])}" if names else ""
