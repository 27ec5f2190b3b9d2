"""The execution of retention: its actions, in batches, beside a receiver and readers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from pitfs.model.retention import Action


@dataclass(frozen=True, slots=True)
class Progress:
    """How far `Pruner.apply` has come.

    Attributes:
        done: actions that were executed. skipped: those that a pin forbade, or whose interval is another by now.
        freed_bytes: on the disk.
    """

    done: int = 0
    skipped: int = 0
    freed_bytes: int = 0


class Pruner(AbstractContextManager["Pruner"]):
    """Opens a store for changes, beside a receiver that may be running; one at a time.

    Args:
        path: of the store.

    Raises:
        StoreError: it isn't a store, another pruner is at work, or it is on a read-only file system.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the store back."""

    def foretell(self, action: Action) -> int:
        """Bytes on the disk that it frees; changes nothing."""
        raise NotImplementedError

    def apply(self, actions: Iterable[Action], progress: Callable[[Progress], None] = lambda _: None) -> Progress:
        """Executes actions, in their order but for some that need room on a full disk.

        Args:
            actions: are taken as they are needed, batch by batch.
            progress: is told how far it has come, after each batch.

        Raises:
            PitfsError: the disk refuses. What was done until then stays so.
        """
        raise NotImplementedError
