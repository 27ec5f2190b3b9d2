"""Which group a state directory belongs to, and which sender of it is running.

`group.json`: JSON of `GroupFile`; written once.

`epoch`: JSON of `Epoch`; replaced at each start of a sender.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from typing import Final

import msgspec

from pitfs.errors import CorruptionError, StoreVersionError, UsageError
from pitfs.model.transfer import VolumeInfo
from pitfs.storage.files import FULL_ERRNOS, durable_replace, storage_error

FORMAT: Final = 1
INSTANCE_BITS: Final = 62  # a number that the link and SQLite take


class GroupFile(msgspec.Struct, frozen=True):
    """The group's identity: `history` is drawn when the state directory is made."""

    format: int
    history: str
    group: str
    volumes: tuple[VolumeInfo, ...]


class Epoch(msgspec.Struct, frozen=True):
    """`epoch` orders the senders of a group, `instance` tells two of one epoch apart. See `Hello`."""

    epoch: int
    instance: int


def next_epoch(state: str, now_ms: int) -> Epoch:
    """The epoch of a sender that starts now, greater than any before it. Durable.

    It follows the clock, so that it is new to the replica even where the state directory was put back or the file is
    damaged. On a full disk it is the one before: sending goes on with that, and gives room.

    Raises:
        PitfsError: the disk refuses.
    """
    path = os.path.join(state, "epoch")
    before = Epoch(0, 0)
    try:
        with suppress(FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError), open(path, "rb") as file:
            before = msgspec.json.decode(file.read(), type=Epoch)
        epoch = Epoch(max(before.epoch + 1, now_ms), secrets.randbits(INSTANCE_BITS))
        durable_replace(path, msgspec.json.encode(epoch))
    except OSError as error:
        if error.errno in FULL_ERRNOS:
            return before
        raise storage_error(error, path, "beginning an epoch") from error
    return epoch


def read_group(state: str) -> GroupFile | None:
    """The group's identity, None for a new state directory. Raises CorruptionError, or StoreVersionError."""
    path = os.path.join(state, "group.json")
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    try:
        group = msgspec.json.decode(content, type=GroupFile)
    except msgspec.DecodeError as error:
        raise CorruptionError(path, 0, str(error)) from error
    if group.format > FORMAT:
        raise StoreVersionError(f"{path}: format {group.format}, this pitfs knows {FORMAT}: use a newer pitfs")
    return group


def open_group(state: str, name: str, volumes: tuple[VolumeInfo, ...]) -> GroupFile:
    """The group's identity; a new one, made durable, if the state directory is new.

    Raises:
        UsageError: the configuration's volumes aren't those that the state was made for.
        CorruptionError, StoreVersionError.
    """
    group = read_group(state)
    if group is None:
        group = GroupFile(FORMAT, secrets.token_hex(16), name, volumes)
        durable_replace(os.path.join(state, "group.json"), msgspec.json.format(msgspec.json.encode(group)))
        return group
    if group.group != name:
        problem = f"is the state of group {group.group!r}, not {name!r}"
        raise UsageError(f"{state}: {problem}: give each group its own `state`")
    known = {volume.name: volume for volume in group.volumes}
    for volume in volumes:
        before = known.get(volume.name, volume)
        if before.size_bytes != volume.size_bytes:
            sizes = f"its backing changed in size from {before.size_bytes} to {volume.size_bytes} bytes"
            raise UsageError(
                f"volume {volume.name!r}: {sizes}: give it its size back, or begin a new group (new `name` and `state`)"
            )
        if before.block_size != volume.block_size:
            problem = f"block_size was {before.block_size} and can't change to {volume.block_size}"
            raise UsageError(f"volume {volume.name!r}: {problem}")
    if group.volumes != volumes:
        raise UsageError(
            f"{state}: was made for volumes {', '.join(known)}: volumes can't be added, removed or reordered; "
            "begin a new group (new `name` and `state`)"
        )
    return group
