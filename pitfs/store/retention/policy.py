"""A store's policy: retention.json in its directory, replaced whole.

    version                          1
    steps                            as `store.retention.levels.parse_steps` reads them; "": it keeps everything
    bookmarks                        an age as `store.retention.levels.parse_age` reads it, or null
    max_size_bytes, min_free_bytes   or null
"""

from __future__ import annotations

import os
from typing import Final

import msgspec

from pitfs.errors import StoreError, StoreVersionError
from pitfs.storage.files import FULL_ERRNOS, durable_replace, storage_error
from pitfs.store.opening import give_up_reserve
from pitfs.store.retention.levels import Policy, format_age, format_steps, parse_age, parse_steps

RETENTION_JSON: Final = "retention.json"
VERSION: Final = 1


class _File(msgspec.Struct, frozen=True):
    version: int
    steps: str = ""
    bookmarks: str | None = None
    max_size_bytes: int | None = None
    min_free_bytes: int | None = None


def load_policy(store: str) -> Policy | None:
    """The policy of a store; None where none has been set.

    Raises:
        StoreVersionError: a newer pitfs set it. StoreError, UsageError: it is damaged. PitfsError: the disk refuses.
    """
    path = os.path.join(store, RETENTION_JSON)
    try:
        with open(path, "rb") as file:
            found = msgspec.json.decode(file.read(1 << 16), type=_File)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error(error, path, "reading the policy") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: damaged: {error}: remove it and set the policy again (pitfs retention)") from None
    if found.version > VERSION:
        raise StoreVersionError(f"{path}: version {found.version}, this pitfs knows {VERSION}: use a newer pitfs")
    steps = parse_steps(found.steps) if found.steps else ()
    bookmarks_ns = None if found.bookmarks is None else parse_age(found.bookmarks)
    return Policy(steps, bookmarks_ns, found.max_size_bytes, found.min_free_bytes)


def save_policy(store: str, policy: Policy) -> None:
    """Sets the policy of a store, on a full disk with its reserve. Raises PitfsError where the disk refuses."""
    bookmarks = None if policy.bookmarks_ns is None else format_age(policy.bookmarks_ns)
    file = _File(VERSION, format_steps(policy.steps), bookmarks, policy.max_size_bytes, policy.min_free_bytes)
    path = os.path.join(store, RETENTION_JSON)
    data = msgspec.json.format(msgspec.json.encode(file)) + b"\n"
    try:
        try:
            durable_replace(path, data)
        except OSError as error:
            if error.errno not in FULL_ERRNOS:
                raise
            give_up_reserve(store)  # without a policy nothing is pruned, and the disk stays full
            durable_replace(path, data)
    except OSError as error:
        raise storage_error(error, path, "writing the policy") from error
