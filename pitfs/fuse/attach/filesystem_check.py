"""How the check of a filesystem is run on a scratch device, where it may replay its journal first.

The check of an image that was in use begins as after a power cut: the kernel mounts it once, which replays the journal
and ends what was being deleted; e2fsck -n and xfs_repair -n alone would call that damage. The mount is in a namespace
of its own: however the command ends, nothing stays mounted.
"""

from __future__ import annotations

from typing import Final

from pitfs.fuse.attach.attachments import RUN

_E2FSCK: Final = ("e2fsck", "-f", "-n")
CHECKS: Final = {
    "ext2": _E2FSCK, "ext3": _E2FSCK, "ext4": _E2FSCK,
    "xfs": ("xfs_repair", "-n"),
    "btrfs": ("btrfs", "check", "--readonly"),
}  # fmt: skip
# A damaged ext4 may be set to halt the machine; an xfs may have its twin mounted. A btrfs is checked as it is: of that,
# older kernels mount no twin.
_REPLAY: Final = dict.fromkeys(("ext2", "ext3", "ext4"), "errors=remount-ro") | {"xfs": "nouuid"}
_MOUNT: Final = f'mount -t "$0" -o "$1" -- "$2" {RUN} && umount {RUN}'


def check_commands(kind: str, device: str) -> list[tuple[str, list[str]]]:
    """(what it is called, command) one after the other; each fails unless it exits with 0. Empty: there is no check."""
    if kind not in CHECKS:
        return []
    commands = [(" ".join(CHECKS[kind]), [*CHECKS[kind], device])]
    if kind in _REPLAY:
        mount = ["unshare", "--mount", "--", "sh", "-c", _MOUNT, kind, _REPLAY[kind], device]
        commands.insert(0, (f"mount -o {_REPLAY[kind]}", mount))
    return commands
