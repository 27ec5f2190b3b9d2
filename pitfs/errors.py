"""The errors of pitfs: whose fault, whether a retry can help, and the exit code.

Every error that a user, a peer, a full disk or a damaged file can cause is a `PitfsError` and reaches
the user as one line: what is wrong, where, what to do. Anything else is a mistake of ours.
"""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USAGE = 2


class PitfsError(Exception):
    """Base of all expected errors; `str()` of it is the line for the user.

    Attributes:
        exit_code: 1 failed, 2 wrong use (INTERFACE: exit codes).
        retryable: whether the same attempt may succeed later without anybody changing anything.
    """

    exit_code = EXIT_FAILED
    retryable = False


class UsageError(PitfsError):
    """What was asked for can't be meant: a wrong option, name, path or configuration."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """The configuration is wrong; names the file and the key or line."""

    def __init__(self, path: str, where: str, problem: str) -> None:
        super().__init__(f"{path}: {where}: {problem}" if where else f"{path}: {problem}")
        self.path, self.where, self.problem = path, where, problem


class PermissionDeniedError(PitfsError):
    """This user may not read or ask what is there; it says nothing about whether it is there or runs."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path}: permission denied: run it as root, or as the owner")


class NoSuchInstantError(PitfsError):
    """No reachable state answers to that time (before the first, after protected-through, in a gap)."""


class CorruptionError(PitfsError):
    """Bytes on disk aren't those that were written.

    Attributes:
        what: the file or object.
        offset: byte offset in it where the damage was found.
    """

    def __init__(self, what: str, offset: int, problem: str) -> None:
        super().__init__(f"{what}: damaged at byte {offset}: {problem}")
        self.what, self.offset, self.problem = what, offset, problem


class PositionMismatchError(PitfsError):
    """Production and replica don't agree on where they stand; nothing is applied."""


class CapacityError(PitfsError):
    """A disk or a configured limit is full; goes on by itself when there is room."""

    retryable = True


class DiskFullError(CapacityError):
    """A disk is full. `ended`: the line for a program that doesn't go on, but ends."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}: make room on that file system; pitfs goes on by itself")
        self.ended = f"{problem}: make room on that file system, then try again"


class StoreError(PitfsError):
    """The directory isn't a usable store."""

    exit_code = EXIT_USAGE


class StoreVersionError(StoreError):
    """The store was written by a newer pitfs."""


class LinkError(PitfsError):
    """The link to the peer doesn't work; trying again may help."""

    retryable = True


class LinkRefusedError(LinkError):
    """The peer (or its certificate) was refused, by us or by it; somebody has to change something."""

    retryable = False


class LocalProtocolError(Exception):
    """We used the protocol wrongly: a mistake of ours."""


class RemoteProtocolError(LinkError):
    """The peer sent something that the protocol forbids; the session is ended."""
