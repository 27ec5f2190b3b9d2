"""store.json: whose store it is, written last when one is made, and never changed."""

from __future__ import annotations

import os
import re
from typing import Final

import msgspec

from pitfs.errors import StoreError, StoreVersionError
from pitfs.model.transfer import UNIT_BYTES, VolumeInfo
from pitfs.storage.files import storage_error
from pitfs.store.objects.format import CATALOG, MAX_UNITS, OBJECTS, STORE_JSON, VERSION, is_name

FORMAT: Final = "pitfs-store"
MAX_VOLUMES: Final = 1024
_HISTORY: Final = re.compile(r"[0-9a-f]{32}")


class StoreInfo(msgspec.Struct, frozen=True):
    """store.json: whose store it is; never changes."""

    format: str
    version: int
    group: str
    history: str
    volumes: tuple[VolumeInfo, ...]


def check_identity(group: str, history: str, volumes: tuple[VolumeInfo, ...]) -> str | None:
    """What is wrong with a group's description, which comes from a peer or a file and names a directory."""
    if not is_name(group):
        return f"group name {group[:80]!r}: must be 1 to 64 of A-Z a-z 0-9 . _ -"
    if not _HISTORY.fullmatch(history):
        return "history: must be 32 lower-case hex digits"
    if not 1 <= len(volumes) <= MAX_VOLUMES:
        return f"{len(volumes)} volumes: must be 1 to {MAX_VOLUMES}"
    if len({volume.name for volume in volumes}) != len(volumes):
        return "two volumes of the same name"
    for volume in volumes:
        if not is_name(volume.name):
            return f"volume name {volume.name[:80]!r}: must be 1 to 64 of A-Z a-z 0-9 . _ -"
        size = volume.block_size
        if not 512 <= size <= 65536 or size & (size - 1):
            return f"volume {volume.name}: block size {size}: must be a power of two from 512 to 65536"
        if not 0 < volume.size_bytes <= MAX_UNITS * UNIT_BYTES:
            return f"volume {volume.name}: size of {volume.size_bytes} bytes: must be 1 byte to 32 TiB"
    return None


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
    problem = check_identity(info.group, info.history, info.volumes)
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
