"""Opening a store: store.json says whose it is; what is checked before it is written, and by whom.

store.json is written last when a store is made, and never changed:

    format                   "pitfs-store"
    version                  2; 1: without unit_bytes and unit_bits, objects not in folders
    group, history           name of the group, and which history of it (32 hex digits)
    volumes                  [{"name", "size_bytes", "block_size"}, …]
    unit_bytes, unit_bits    how pointers are made up, see `store.objects.format`
"""

from __future__ import annotations

import fcntl
import glob
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import msgspec

from pitfs.errors import PermissionDeniedError, PositionMismatchError, StoreError, StoreVersionError
from pitfs.model.group import identity_problem
from pitfs.model.transfer import Hello, VolumeInfo
from pitfs.storage.files import (
    closed_on_error,
    durable_replace,
    fsync_directory,
    open_fd,
    reserve,
    storage_error,
)
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.database import REMEDY
from pitfs.store.objects.format import (
    CATALOG,
    CATALOG_LOG,
    CHANGES_LOCK,
    HEAL_LOCK,
    LOCK,
    OBJECTS,
    PINS,
    PRUNE_LOCK,
    RESERVE,
    STAGING,
    STORE_JSON,
    VERSION_1,
    Layout,
)
from pitfs.store.pins.pins import HOLDERS, convert_directory

FORMAT: Final = "pitfs-store"
VERSION: Final = 2
RESERVE_BYTES: Final = 4 << 20


class StoreInfo(msgspec.Struct, frozen=True):
    """store.json: whose store it is; never changes."""

    format: str
    version: int
    group: str
    history: str
    volumes: tuple[VolumeInfo, ...]
    unit_bytes: int = VERSION_1.unit_bytes
    unit_bits: int = VERSION_1.unit_bits

    @property
    def layout(self) -> Layout:
        return Layout(self.unit_bytes, self.unit_bits, has_folders=self.version > 1)


def read_store_info(path: str, parts: Sequence[str] = (CATALOG, OBJECTS)) -> StoreInfo:
    """What store.json of the store at `path` says; `parts`: what must be there besides.

    Raises:
        StoreError: it isn't a store; the message says what is missing.
        StoreVersionError: a newer pitfs wrote it.
    """
    looks = f"a store is a directory ROOT/GROUP that `pitfs receive` made: {STORE_JSON}, {CATALOG}, {OBJECTS}/"
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
    except PermissionError:
        raise PermissionDeniedError(name) from None
    except OSError as error:
        raise storage_error(error, name, "reading") from error
    try:
        head = msgspec.json.decode(data, type=dict)
        if head.get("format") != FORMAT or not isinstance(head.get("version"), int):
            raise StoreError(f"{name}: not of a pitfs store: {looks}")
        if head["version"] > VERSION:
            raise StoreVersionError(
                f"{path}: store of version {head['version']}, this pitfs knows up to {VERSION}: use a newer pitfs"
            )
        info = msgspec.json.decode(data, type=StoreInfo)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreError(f"{name}: damaged: {error}: put it back from another copy of the store") from None
    problem = identity_problem(info.group, info.history, info.volumes)
    if problem is None and info.version > 1 and info.layout != Layout.of(info.volumes):
        problem = f"units of {info.unit_bytes} bytes and {info.unit_bits} bits don't fit to its volumes"
    if problem:
        raise StoreError(f"{name}: damaged: {problem}: put it back from another copy of the store")
    for part in parts:
        if not os.path.exists(os.path.join(path, part)):
            remedy = REMEDY if part == CATALOG else looks
            raise StoreError(f"{path}: not a whole store, it has no {part}: {remedy}")
    return info


def _stores_in(path: str) -> str:
    """A hint where the user named the root instead of a store in it."""
    names = sorted(map(os.path.dirname, glob.glob(f"*/{STORE_JSON}", root_dir=path)))
    return f"; there are stores in it: {', '.join(names[:5])}" if names else ""


def make_store_json(path: str, catalog: Catalog, hello: Hello) -> None:
    """Says whose store it is: the last thing of a new one. Raises StoreError where it was one already."""
    if catalog.meta("mark"):
        raise StoreError(f"{path}: has a catalog but no {STORE_JSON}: put that back from another copy of the store")
    fsync_directory(path)  # what a store has is there before what says that it is one
    layout = Layout.of(hello.volumes)
    info = StoreInfo(
        FORMAT, VERSION, hello.group, hello.history, hello.volumes, layout.unit_bytes, layout.unit_bits
    )  # fmt: skip
    durable_replace(os.path.join(path, STORE_JSON), msgspec.json.format(msgspec.json.encode(info)) + b"\n")


def check_place(path: str) -> None:
    """Refuses to make a store among other files."""
    try:
        names = set(os.listdir(path))
    except FileNotFoundError:
        return
    ours = {LOCK, CHANGES_LOCK, PRUNE_LOCK, HEAL_LOCK, RESERVE, OBJECTS, STAGING, PINS, HOLDERS}
    ours |= {CATALOG_LOG, CATALOG, f"{CATALOG}-wal", f"{CATALOG}-shm", f"{CATALOG}-journal"}
    others = sorted(names - ours - {f"{STORE_JSON}.tmp"})
    if STORE_JSON not in names and others:
        raise StoreError(
            f"{path}: not a store (no {STORE_JSON}), but not empty either ({others[0]} is there): "
            f"move that away, or receive into another --root"
        )


def take_lock(store: str) -> int:
    """The descriptor that holds the writer's lock; converts what an older pitfs arranged differently.

    Raises:
        StoreError: another process holds the lock.
    """
    path = os.path.join(store, LOCK)
    with closed_on_error(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            other = os.pread(fd, 200, 0).decode("utf-8", "replace").replace(f"({CHANGES_LOCK})", "").strip()
            raise StoreError(
                f"{store}: {other or 'another process'} ('pitfs receive', most likely) is writing this store: a store "
                "has one writer; end that one, or wait until it has ended"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()} ({CHANGES_LOCK})\n".encode(), 0)
        convert_directory(store)
    return fd


@contextmanager
def changes_locked(store: str) -> Iterator[None]:
    """Excludes, until the block ends, all others that change intervals which are there, or look for leftovers.

    Those are layers, a removal, and the recovery of what was cut off. Whoever only adds what is newer than all others
    needs no lock: nothing removes the last snapshot, or what is behind it. Taken before `pins_locked` and before a
    transaction of the catalog.
    """
    with open_fd(os.path.join(store, CHANGES_LOCK), os.O_RDWR | os.O_CREAT) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


def knows_changes_lock(store: str) -> bool:
    """Whether who writes the store, if anybody does, takes the changes' lock: `take_lock` says so since it does."""
    with suppress(FileNotFoundError), open_fd(os.path.join(store, LOCK), os.O_RDONLY) as fd:
        if CHANGES_LOCK.encode() not in os.pread(fd, 200, 0):
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


def free_bytes(path: str) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def make_reserve(store: str) -> None:
    """Sets room aside, as long as there is plenty, for what gives room back on a full disk."""
    path = os.path.join(store, RESERVE)
    if not os.path.exists(path) and free_bytes(store) > 16 * RESERVE_BYTES:
        with suppress(OSError), open_fd(path, os.O_RDWR | os.O_CREAT) as fd:
            reserve(fd, 0, RESERVE_BYTES)


def give_up_reserve(store: str) -> None:
    """Gives that room to whoever needs it now, where there is little else."""
    if free_bytes(store) <= 16 * RESERVE_BYTES:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(store, RESERVE))


def check_sender(root: str, hello: Hello) -> None:
    """Refuses a sender of another history, or of other volumes, than the store of its group has.

    Asked before the session that is there is ended for the sender, too: one that will be refused mustn't disturb it.

    Raises:
        PositionMismatchError, StoreError, PitfsError: as opening the store would.
    """
    path = os.path.join(root, hello.group)
    if not os.path.exists(os.path.join(path, STORE_JSON)):
        return
    info = read_store_info(path)
    if info.history != hello.history:
        raise PositionMismatchError(
            f"{path}: has history {info.history[:8]}… of group {info.group}, production sends "
            f"history {hello.history[:8]}…: its state was made anew, or it is another group of that "
            f"name; move this store away (it stays readable) and a new one is made, or receive into "
            f"another --root"
        )
    if info.volumes != hello.volumes:
        has, sends = (
            ", ".join(f"{v.name} ({v.size_bytes} B, blocks of {v.block_size})" for v in side.volumes)
            for side in (info, hello)
        )
        raise PositionMismatchError(
            f"{path}: has the volumes {has}, production sends {sends}: "
            f"volumes can't change within a history; put production's configuration back, or give it a "
            f"new state and this store a new place"
        )


def check_epoch(path: str, catalog: Catalog, hello: Hello) -> None:
    """Refuses a sender that was superseded: two with copies of one state would take turns otherwise."""
    epoch, instance = catalog.meta("epoch"), catalog.meta("instance")
    if hello.epoch < epoch or (hello.epoch == epoch and hello.instance != instance and epoch):
        raise PositionMismatchError(
            f"{path}: another production host sends group {hello.group} with a copy of this one's state "
            f"(epoch {epoch}, this one has {hello.epoch}): stop the one that shouldn't; restarting `pitfs "
            f"protect` here takes over"
        )
