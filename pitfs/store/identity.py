"""store.json: whose store it is, written last when one is made, and never changed."""

from __future__ import annotations

import os
from typing import Final

import msgspec

from pitfs.errors import StoreError, StoreVersionError
from pitfs.model.group import identity_problem
from pitfs.model.transfer import VolumeInfo
from pitfs.storage.files import storage_error
from pitfs.store.objects.format import CATALOG, OBJECTS, STORE_JSON, VERSION

FORMAT: Final = "pitfs-store"


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
