"""What is asked before a store is written: is the directory its, is nobody else writing it, whose store is it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket

import msgspec

from pitfs.errors import PositionMismatchError, StoreError
from pitfs.model.transfer import Hello
from pitfs.storage.files import durable_replace, fsync_directory, storage_error
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.identity import FORMAT, StoreInfo, read_store_info
from pitfs.store.objects.format import CATALOG, LOCK, OBJECTS, PINS, STAGING, STORE_JSON, VERSION
from pitfs.store.pins.directory import HOLDERS, convert_directory


def check_place(path: str) -> None:
    """Refuses to make a store among other files."""
    try:
        names = set(os.listdir(path))
    except FileNotFoundError:
        return
    ours = {LOCK, OBJECTS, STAGING, PINS, HOLDERS, CATALOG, f"{CATALOG}-wal", f"{CATALOG}-shm", f"{CATALOG}-journal"}
    others = sorted(names - ours - {f"{STORE_JSON}.tmp"})
    if STORE_JSON not in names and others:
        raise StoreError(
            f"{path}: not a store (no {STORE_JSON}), but not empty either ({others[0]} is there): "
            f"move that away, or receive into another --root"
        )


def take_lock(store: str) -> int:
    """The descriptor that holds the writer's lock; converts what an older pitfs arranged differently.

    Raises:
        StoreError: another process holds it.
    """
    path = os.path.join(store, LOCK)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except BaseException as error:
        holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
        os.close(fd)
        if not isinstance(error, OSError) or error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise StoreError(
            f"{store}: {holder} is writing this store (it holds {path}): a store has one writer; "
            f"end that one, or wait until it has ended"
        ) from None
    try:
        convert_directory(store)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_sender(root: str, hello: Hello) -> None:
    """Whether the store of its group takes this sender, as far as that can be told without writing it.

    Asked before the sender that is there is ended for it: one that is going to be refused mustn't disturb it.

    Raises:
        PositionMismatchError, StoreError, PitfsError: as opening the store would.
    """
    path = os.path.join(root, hello.group)
    try:
        check_same_group(path, hello)
    except OSError as error:
        raise storage_error(error, path, "opening") from error


def check_same_group(path: str, hello: Hello) -> None:
    """Refuses a sender of another history, or of other volumes."""
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
        had, sent = (
            [f"{v.name} ({v.size_bytes} B, blocks of {v.block_size})" for v in x.volumes]
            for x in (info, hello)
        )
        raise PositionMismatchError(
            f"{path}: has the volumes {', '.join(had)}, production sends {', '.join(sent)}: "
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


def make_store_json(path: str, catalog: Catalog, hello: Hello) -> None:
    """Says whose store it is: the last thing of a new one. Raises StoreError where it was one already."""
    if catalog.meta("mark"):
        raise StoreError(
            f"{path}: has a catalog but no {STORE_JSON}: put that back from another copy of the store"
        )
    fsync_directory(path)  # what a store has is there before what says that it is one
    info = StoreInfo(FORMAT, VERSION, hello.group, hello.history, hello.volumes)
    durable_replace(
        os.path.join(path, STORE_JSON), msgspec.json.format(msgspec.json.encode(info)) + b"\n"
    )
