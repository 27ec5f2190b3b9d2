"""Placeholder until the removal of snapshots is there."""

from __future__ import annotations

from pitfs.store.transfer.writable_store import WritableStore


class Removal:
    def __init__(self, store: WritableStore, after_id: int | None, before_id: int, cause: str = "") -> None:
        raise NotImplementedError

    def foretell(self) -> int:
        raise NotImplementedError

    def change(self) -> None:
        raise NotImplementedError

    def free(self) -> int:
        raise NotImplementedError
