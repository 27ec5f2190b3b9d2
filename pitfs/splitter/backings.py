"""The backing volumes as the running splitter has them: a copy reads the very files that the splitter writes.

A path proves nothing: the configuration may have been edited, or another file put there, since the splitter began. So
each volume is opened through the splitter's own descriptor, and must be the file that the splitter says it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from pitfs.errors import PitfsError, UsageError
from pitfs.model.transfer import VolumeInfo
from pitfs.splitter.control import ControlError
from pitfs.splitter.messages import Backing, SplitterClient
from pitfs.splitter.startup import VolumeSpec
from pitfs.storage.files import closed_on_error, file_identity


class Backings:
    """The backing volumes of a group.

    Args:
        volumes: of the group, in order. configured: what the configuration says of them.
    """

    def __init__(
        self, splitter: SplitterClient, volumes: Sequence[VolumeInfo], configured: Sequence[VolumeSpec]
    ) -> None:
        self._splitter, self._volumes, self._configured = splitter, volumes, configured

    async def check(self) -> None:
        """Raises UsageError where the configuration isn't that of the running splitter, or the splitter's version."""
        await self._running()

    async def open(self, stack: contextlib.ExitStack) -> list[int]:
        """Descriptors for reading, of each volume in order, closed by the stack. Raises as `check`, and OSError."""
        fds = []
        for backing in await self._running():
            fds.append(_open(backing))
            stack.callback(os.close, fds[-1])
        return fds

    async def _running(self) -> list[Backing]:
        try:
            running = [await self._splitter.backing(index) for index in range(len(self._volumes))]
        except ControlError as error:
            raise UsageError(
                f"the running splitter is of another version of pitfs ({error}): restart 'pitfs protect'; until then "
                "nothing is sent"
            ) from error
        configured = [f"{each.name} on {each.backing} in blocks of {each.block_size}" for each in self._configured]
        have = [f"{each.name} on {each.path} in blocks of {each.block_size}" for each in running]
        if configured != have:
            ours = [each for each in configured if each not in have] or configured
            theirs = [each for each in have if each not in configured] or have
            raise UsageError(
                f"the configuration was changed: it has {'; '.join(ours)}, the running splitter {'; '.join(theirs)}: "
                "restart 'pitfs protect', or undo the change; until then nothing is sent"
            )
        return running


def _open(backing: Backing) -> int:
    """Raises PitfsError where it isn't the file that the splitter has, OSError where it can't be opened."""
    # Not by the path: the file may have been renamed or removed meanwhile.
    with closed_on_error(os.open(f"/proc/{backing.pid}/fd/{backing.fd}", os.O_RDONLY | os.O_CLOEXEC)) as fd:
        if file_identity(fd) != backing.identity:
            raise PitfsError(f"{backing.path}: another splitter has it since: it is opened anew")
    return fd
