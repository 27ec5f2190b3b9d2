"""How a filesystem on a scratch device is checked: after it has replayed its journal, as after a power cut.

The kernel mounts it once for that, which also ends what was being deleted: a check alone would call both damage. The
mount is in a namespace of its own: however the command ends, nothing stays mounted.
"""

from __future__ import annotations

from typing import Final

from pitfs.fuse.attach.attachments import RUN

# Options for the mount, and the check. An ext4 may be set to halt the machine when it is damaged; an xfs may have its
# twin mounted. A btrfs isn't mounted: older kernels mount no twin of it, and its check knows its log.
_EXT: Final = "errors=remount-ro", ("e2fsck", "-f", "-n")
CHECKS: Final = {
    "ext2": _EXT, "ext3": _EXT, "ext4": _EXT,
    "xfs": ("nouuid", ("xfs_repair", "-n")),
    "btrfs": ("", ("btrfs", "check", "--readonly")),
}  # fmt: skip
_MOUNT: Final = f'mount -t "$0" -o "$1" -- "$2" {RUN} && umount {RUN}'


def check_commands(kind: str, device: str) -> list[tuple[str, list[str]]]:
    """(what it is called, command), to be run in turn; each exits with 0 if all is well. Empty: there is no check."""
    if kind not in CHECKS:
        return []
    options, check = CHECKS[kind]
    mount = ("mount", ["unshare", "--mount", "--", "sh", "-c", _MOUNT, kind, options, device])
    return [*([mount] if options else []), (" ".join(check), [*check, device])]
