"""The scratch directory: the overlays of the writable images of one mount.

Without `keep` an overlay is a file without a name, so it vanishes when the mount's process ends, however it ends.
With `keep` the overlay of a volume's image after write `seq` of a history is two files, and the next mount finds them:

    HISTORY.SEQ.VOLUME.data      the blocks, each at its place in the image; the volume's size, sparse
    HISTORY.SEQ.VOLUME.index     the log of which blocks are there (model/overlay.py)

The index is made last, and is durable, so data without an index are left of a start that was cut short. The mount
that uses the directory locks it (flock). Other files in it are left alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from typing import Final

from pitfs.errors import CapacityError, CorruptionError, PitfsError, UsageError
from pitfs.model.overlay import OverlayHeader
from pitfs.storage.files import closed_on_error, durable_replace, storage_error
from pitfs.storage.overlay_log import OverlayLog
from pitfs.store.store import Store
from pitfs.view.overlay import Overlay, Room

log = logging.getLogger(__name__)

MAX_OVERLAYS: Final = 256  # each holds a descriptor or two
LOCK_WAIT_S: Final = 3.0  # a mount that has just ended may still be closing its overlays
LOCK_POLL_S: Final = 0.05
PREFIX: Final = ".pitfs-scratch-"  # of a file that is about to lose its name
_REMOVE: Final = "remove both files of this overlay, and its image is as it was at the instant"
_NAMELESS: Final = re.compile(re.escape(PREFIX) + "[a-z0-9_]{8}")  # as tempfile makes them
_NAME: Final = re.compile(r"([0-9a-f]{32})\.([0-9]{1,14})\.([A-Za-z0-9._-]{1,64})\.(data|index|index\.tmp)")


class ScratchDirectory:
    """The overlays over a store's images.

    Args:
        directory: exists, and no other mount uses it.
        limit_bytes: of blocks written, over all overlays; None: as much as the disk has.
        keep: overlays stay when the mount ends, and those that stayed are opened.
        sleep: waits for that many seconds.

    Raises:
        UsageError: the directory is missing, in use, not writable, or another store's.
        CorruptionError, PitfsError: a kept overlay can't be read.
    """

    def __init__(
        self, directory: str, store: Store, limit_bytes: int | None = None, keep: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.keep = keep
        self.room = Room(limit_bytes)
        self._history = bytes.fromhex(store.history)
        self._volumes = store.volumes
        self._overlays: dict[tuple[int, int], Overlay] = {}
        self._lock = _lock(directory, sleep)
        try:
            self._tidy()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise storage_error(error, directory, "reading the scratch") from error
            raise

    def get(self, seq: int, volume: int) -> Overlay | None:
        """The overlay of that image, None before its first write."""
        return self._overlays.get((seq, volume))

    def make(self, seq: int, volume: int) -> Overlay:
        """Makes the overlay of an image that has none; waits for the disk.

        Raises:
            CapacityError: there are too many already.
            OSError: the disk refuses.
        """
        if len(self._overlays) >= MAX_OVERLAYS:
            raise CapacityError(f"{MAX_OVERLAYS} images are written already, the limit of a mount")
        header = OverlayHeader(self._history, seq, self._volumes[volume])
        if not self.keep:
            with tempfile.TemporaryFile(prefix=PREFIX, dir=self.directory) as file:
                os.ftruncate(file.fileno(), header.volume.size_bytes)
                overlay = self._overlay(header, os.dup(file.fileno()), None)
        else:
            base = self._base(header)
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with closed_on_error(os.open(base + ".data", flags, 0o600)) as fd:
                os.ftruncate(fd, header.volume.size_bytes)
                os.fsync(fd)
                durable_replace(base + ".index", header.encode())  # makes the data's directory entry durable, too
                overlay = self._overlay(header, fd, OverlayLog(base + ".index", header))
        self._overlays[seq, volume] = overlay
        return overlay

    def free_bytes(self) -> int:
        """Room for more blocks."""
        disk = os.statvfs(self.directory)
        free = disk.f_bavail * disk.f_frsize
        if self.room.limit_bytes is not None:
            free = min(free, self.room.limit_bytes - self.room.used_bytes)
        return max(free, 0)

    def close(self) -> None:
        """Makes kept overlays durable and closes all; logs what can't be made durable."""
        for overlay in self._overlays.values():
            if self.keep and overlay.synced_writes < overlay.writes:
                try:
                    overlay.sync(overlay.begin_sync())
                except (OSError, PitfsError) as error:
                    log.error("%s: what was written since the last fsync is lost: %s", overlay.name, error)
            overlay.close()
        self._overlays.clear()
        os.close(self._lock)

    # -------------------------------------------------------------- inside

    def _base(self, header: OverlayHeader) -> str:
        return os.path.join(self.directory, f"{header.history.hex()}.{header.seq}.{header.volume.name}")

    def _overlay(self, header: OverlayHeader, fd: int, log: OverlayLog | None) -> Overlay:
        name = f"{self.directory}: {header.volume.name} at seq {header.seq}"
        return Overlay(fd, name, header.volume.block_size, self.room, log)

    def _tidy(self) -> None:
        """Removes leftovers of dead mounts; with `keep`, opens what is kept."""
        kept: dict[tuple[int, str], set[str]] = {}
        for name in os.listdir(self.directory):
            match = _NAME.fullmatch(name)
            if _NAMELESS.fullmatch(name) and os.path.isfile(os.path.join(self.directory, name)):
                os.unlink(os.path.join(self.directory, name))
            elif match is None or not self.keep:
                continue
            elif bytes.fromhex(match[1]) != self._history:
                problem = f"{name} is of another store: give each store a directory of its own"
                raise _unusable(self.directory, problem)
            else:
                kept.setdefault((int(match[2]), match[3]), set()).add(match[4])
        for (seq, name), kinds in sorted(kept.items()):
            self._open_kept(seq, name, kinds)

    def _open_kept(self, seq: int, name: str, kinds: set[str]) -> None:
        volume = next((index for index, info in enumerate(self._volumes) if info.name == name), None)
        if volume is None:
            raise _unusable(self.directory, f"has a volume {name}, the store hasn't: it is another store's")
        header = OverlayHeader(self._history, seq, self._volumes[volume])
        base = self._base(header)
        if "index" not in kinds:
            for kind in kinds:
                os.unlink(f"{base}.{kind}")
            return
        if len(self._overlays) >= MAX_OVERLAYS:
            problem = f"has more than {MAX_OVERLAYS} overlays: remove those that aren't needed"
            raise _unusable(self.directory, problem)
        if "index.tmp" in kinds:
            os.unlink(f"{base}.index.tmp")
        try:
            with closed_on_error(os.open(f"{base}.data", os.O_RDWR | os.O_CLOEXEC)) as fd:
                if os.fstat(fd).st_size != header.volume.size_bytes:
                    problem = f"isn't of the volume's {header.volume.size_bytes} bytes"
                    raise CorruptionError(f"{base}.data", 0, problem)
                self._overlays[seq, volume] = self._overlay(header, fd, OverlayLog(f"{base}.index", header))
        except FileNotFoundError:
            raise PitfsError(f"{base}.data: missing, but {base}.index is there: {_REMOVE}") from None
        except CorruptionError as error:
            raise PitfsError(f"{error}: {_REMOVE}") from error


def _lock(directory: str, sleep: Callable[[float], None]) -> int:
    """The descriptor that holds the directory's lock. Raises UsageError."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(directory, f"{error.strerror}: give an existing directory") from None
    with closed_on_error(fd):
        for _ in range(1 + round(LOCK_WAIT_S / LOCK_POLL_S)):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                sleep(LOCK_POLL_S)
            except OSError as error:
                raise _unusable(directory, f"can't be locked: {error.strerror}") from None
        else:
            raise _unusable(directory, "another mount uses it: give each mount a directory of its own")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise _unusable(directory, "can't be written")
    return fd


def _unusable(directory: str, problem: str) -> UsageError:
    return UsageError(f"{directory}: scratch: {problem}")
