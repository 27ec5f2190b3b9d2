"""The digest of a whole image: xxh3_128 in hex, as `xxhsum -H2` prints it for a copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from xxhash import xxh3_128

from pitfs.errors import CorruptionError, PitfsError
from pitfs.view.view import PointInTimeView, ReadBuffer

# Shows how far long work is: (title, total bytes) -> a block in which the bytes done so far are reported.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
READ_BYTES: Final = 1 << 20  # read, verified and hashed while it is in the processor's cache


def image_digest(view: PointInTimeView, progress: Progress, title: str) -> str:
    """The digest of an image; every block is verified on the way."""
    buffer = ReadBuffer(READ_BYTES)
    state = xxh3_128()
    with progress(title, view.size_bytes) as reached:
        for offset in range(0, view.size_bytes, READ_BYTES):
            data = view.read(offset, READ_BYTES, buffer)
            state.update(data)
            reached(offset + len(data))
    return state.hexdigest()


def verify_copy(fd: int, path: str, size_bytes: int, digest: str, progress: Progress) -> None:
    """Reads the copy of an image from the disk, not from the page cache, and compares its digest.

    Raises:
        CorruptionError: it differs.
        PitfsError: it is shorter than the image.
    """
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    state = xxh3_128()
    buffer = memoryview(bytearray(READ_BYTES))
    offset = 0
    with progress("verify", size_bytes) as reached:
        while offset < size_bytes:
            count = os.preadv(fd, [buffer[: size_bytes - offset]], offset)
            if count == 0:
                raise PitfsError(f"{path}: ends at byte {offset} while it is verified: who changed it?")
            state.update(buffer[:count])
            offset += count
            reached(offset)
    if state.hexdigest() != digest:
        raise CorruptionError(
            path, 0, f"digest {state.hexdigest()}, the image has {digest}: export the whole image with --force"
        )
