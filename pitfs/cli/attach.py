"""`pitfs attach`: makes a block device of a volume at an instant, and the mount that it needs."""

from __future__ import annotations

import argparse
import contextlib
import enum
import os
import sys
from typing import Any, Final

from pitfs.cli.common.output import print_json, state_row, warn
from pitfs.cli.common.parser import add_image, add_json
from pitfs.errors import PitfsError, UsageError
from pitfs.fuse.attach import attachments
from pitfs.fuse.attach.attachments import ScratchOptions, signals_deferred
from pitfs.fuse.attach.images import ImageLoop, image_loops
from pitfs.fuse.kernel import loop_devices
from pitfs.model.position import format_instant

# For the replay of a filesystem's journal, which writes at most what the journal holds: of ext4 mostly up to 1 GiB,
# of xfs up to 2 GiB. Nothing is taken before it is written.
REPLAY_SIZE: Final = "4GiB"
LOW_BYTES: Final = 64 << 20  # free on the scratch's disk: less is worth a warning


class Access(enum.Enum):
    """What the device is for: to look into it after a replay, to write to it, or to read the image as it is."""

    REPLAY = enum.auto()
    SCRATCH = enum.auto()
    PLAIN = enum.auto()


# Options to mount a filesystem with; "": any other. With nouuid an xfs doesn't refuse to be mounted beside its twin,
# and those of PLAIN but ro keep a filesystem from replaying its journal.
MOUNT_OPTIONS: Final = {
    Access.REPLAY: {"": "ro", "xfs": "ro,nouuid"},
    Access.SCRATCH: {"": "", "xfs": "nouuid"},
    Access.PLAIN: {
        "": "ro", "ext3": "ro,noload", "ext4": "ro,noload", "xfs": "ro,norecovery,nouuid",
        "btrfs": "ro,rescue=nologreplay",
    },
}  # fmt: skip


DESCRIPTION: Final = (
    "Makes a loop device over a volume's image, with its partitions, and prints the device. A filesystem on it "
    "replays its journal when it is mounted, as after a power cut: what that writes goes to a file under /var/tmp, and "
    "is thrown away by detach. Nothing of the store changes."
)
EXAMPLES: Final = """\
examples:
  pitfs attach /srv/pitfs/db1 5m-ago root
  mount -o ro /dev/loop1 /mnt/then
  umount /mnt/then
  pitfs detach /dev/loop1

  pitfs attach /srv/pitfs/db1 latest root --scratch --scratch-size 10GiB
  pitfs attach --list"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image(parser, nargs="?")
    access = parser.add_mutually_exclusive_group()
    access.add_argument(
        "--scratch", action="store_true", help="to write to it: as much as there is room for; detach throws it away"
    )
    access.add_argument(
        "--plain", action="store_true",
        help="a read-only device of the image as it is. A filesystem that was in use at that instant may then look "
        "empty or damaged, since its journal isn't replayed",
    )  # fmt: skip
    parser.add_argument(
        "--scratch-dir", metavar="DIR", help="--scratch, and where to (default: a directory under /var/tmp)"
    )
    parser.add_argument("--scratch-size", metavar="SIZE", help="--scratch, and at most so much, such as 10GiB")
    parser.add_argument(
        "--sector-size", metavar="N", type=int, choices=(512, 1024, 2048, 4096),
        help="of the device, in bytes (default: what its partition table needs, else 512)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list what is attached")
    add_json(parser, "the device and all that is known of it")


def run(args: argparse.Namespace) -> int:
    if args.list:
        if args.store is not None:
            raise UsageError("--list takes nothing else: it lists what is attached on this machine")
        _list(args.json)
        return 0
    if args.volume is None:
        raise UsageError("STORE, TIME and VOLUME are needed (or --list): see pitfs attach --help")
    return _attach(args)


def _attach(args: argparse.Namespace) -> int:
    from pitfs.cli.common.times import resolve, volume_index
    from pitfs.store.store import Store
    from pitfs.view.tree import image_name

    access, scratch = _access(args)
    with contextlib.closing(Store.open(args.store)) as store:
        resolution, _ = resolve(store, args.time, args.tz)
        info = store.volumes[volume_index(store, args.volume)]
        group = store.group
    path = os.path.realpath(args.store)
    image = f"{format_instant(resolution.time_ns)}/{image_name(info)}"
    with attachments.attach_lock(), contextlib.ExitStack() as undo:
        undo.callback(signals_deferred()(attachments.unmount_unused))
        with signals_deferred():
            mountpoint = attachments.find_mount(path, image) if scratch is None else None
            if mountpoint is None:
                attachments.unmount_unused()  # a bare `losetup --detach` may have left one over the scratch directory
                mountpoint = attachments.make_mount(path, group, scratch)
        image_path = f"{mountpoint}/{image}"
        sector_size = args.sector_size or loop_devices.sector_size_of(image_path)
        device, missing = attachments.attach_image(
            image_path, undo, read_only=scratch is None, sector_size=sector_size
        )
        made = next((each for each in image_loops() if each.loop.device == device), None)
        if made is None:
            raise PitfsError(f"{device}: another process has detached it: try again")
        attached = _describe(made) | {
            **state_row(resolution),
            "size_bytes": info.size_bytes,
            "sector_size": sector_size,
            "direct_io": loop_devices.has_direct_io(device),
            "filesystems": [{"device": path, "type": kind} for path, kind in loop_devices.filesystems(device)],
        }
        _warn(attached, missing)
        if scratch is not None:
            warn_of_little_room(scratch.directory)
        if args.json:
            print_json(attached)
        else:
            print(device, flush=True)
            _hint(attached, access)
        sys.stdout.flush()  # if this fails nobody knows of the device, so it is undone
        undo.pop_all()
    return 0


def _access(args: argparse.Namespace) -> tuple[Access, ScratchOptions | None]:
    """What is asked for, and where what is written goes; None of a device that can't be written."""
    directory, size = args.scratch_dir, args.scratch_size
    is_scratch = args.scratch or directory is not None or size is not None
    if args.plain:
        if is_scratch:
            raise UsageError("--plain makes a device that can't be written: leave it out, or --scratch-dir and -size")
        return Access.PLAIN, None
    if not is_scratch:
        return Access.REPLAY, ScratchOptions(None, REPLAY_SIZE)
    return Access.SCRATCH, ScratchOptions(directory, size)


def _warn(attached: dict[str, Any], missing: list[str]) -> None:
    device, sector_size = attached["device"], attached["sector_size"]
    rest = attached["size_bytes"] % sector_size
    if rest:
        warn(
            f"{device}: the volume's last {rest} bytes are missing: they don't fill a sector of {sector_size} bytes; "
            f"the image has them: {attached['image']}"
        )
    if missing:
        warn(f"{device}: no nodes for {', '.join(missing)}: nothing makes them in this /dev (a container?)")
    if not attached["direct_io"]:
        warn(f"{device}: without direct I/O: what is read is cached twice")


def warn_of_little_room(directory: str | None) -> None:
    """Warns if what is written to a scratch may find no room; None: where it goes if nothing else was said."""
    directory = directory or os.path.dirname(attachments.SCRATCH)
    disk = os.statvfs(directory)
    free_bytes = disk.f_bavail * disk.f_frsize
    if free_bytes < LOW_BYTES:
        warn(
            f"{directory}: {free_bytes / (1 << 20):.1f} MiB are free: if mounting or writing to the device fails with "
            "an I/O error, it needs more: give another directory with --scratch-dir"
        )


def _hint(attached: dict[str, Any], access: Access) -> None:
    options_of = MOUNT_OPTIONS[access]
    for found in attached["filesystems"]:
        kind = found["type"]
        options = options_of.get(kind, options_of[""])
        warn(f"{kind}; to look into it: mount {f'-o {options} ' if options else ''}{found['device']} DIR")
        if access is Access.PLAIN and options != "ro":
            warn(
                f"that leaves out what its journal holds, which may be minutes old: safe only if the {kind} was "
                "unmounted or frozen at that instant; else attach it without --plain"
            )
    warn(f"{attached['volume']} at {attached['instant']}; to end it: pitfs detach {attached['device']}")


def _describe(image: ImageLoop) -> dict[str, Any]:
    mount = image.mount
    return {
        "device": image.loop.device,
        "store": mount.source if mount else None,
        "instant": image.instant,
        "volume": image.volume,
        "read_only": image.loop.read_only,
        "scratch": mount is not None and not mount.read_only,
        "mountpoint": mount.mountpoint if mount else None,
        "image": image.loop.backing,
        "partitions": loop_devices.partitions(image.loop.device),
        "mountpoints": loop_devices.mountpoints_of(image.loop),
    }


def _list(as_json: bool) -> None:
    rows = [_describe(image) for image in image_loops()]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        kind = "scratch" if row["scratch"] else "read-only" if row["read_only"] else "writable"
        where = f"on {', '.join(row['mountpoints'])}" if row["mountpoints"] else "not mounted"
        store = row["store"] or "(dead mount)"
        print("  ".join((row["device"], store, row["instant"], row["volume"], kind, where)))
