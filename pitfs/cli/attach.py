"""`pitfs attach`: a volume at an instant as a block device, with whatever that needs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from pitfs.cli.resolve import TIME_HELP, print_json, resolve, volume_index
from pitfs.errors import PitfsError, UsageError
from pitfs.model.position import format_instant

if TYPE_CHECKING:
    from pitfs.fuse.attach.images import ImageLoop

NAME: Final = "attach"
HEAD_BYTES: Final = 8192  # in which partition tables say of what size sectors are

# What keeps a filesystem from replaying its journal, or from minding its twin that is mounted as well.
READ_ONLY: Final = {
    "ext2": "ro", "ext3": "ro,noload", "ext4": "ro,noload", "xfs": "ro,norecovery,nouuid",
    "btrfs": "ro,rescue=nologreplay",
}  # fmt: skip
WRITABLE: Final = {"xfs": "nouuid"}


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        NAME,
        help="a volume at an instant as a block device",
        description="Makes a loop device over a volume's image, with its partitions, and prints the device. The "
        "store is mounted for it if it isn't. Read-only, unless --scratch.",
        epilog="""\
examples:
  pitfs attach /srv/replica/db1 5m-ago root
  mount -o ro,noload /dev/loop1 /mnt/then
  umount /mnt/then
  pitfs detach /dev/loop1

  pitfs attach /srv/replica/db1 latest root --scratch --scratch-size 10GiB
  pitfs attach --list""",
    )
    parser.add_argument("store", metavar="STORE", nargs="?", help="directory of the store")
    parser.add_argument("time", metavar="TIME", nargs="?", help=TIME_HELP)
    parser.add_argument("volume", metavar="VOLUME", nargs="?", help="name of the volume")
    parser.add_argument("--tz", metavar="ZONE", default="UTC", help="zone of times without one (default UTC)")
    parser.add_argument(
        "--scratch", action="store_true", help="writable: what is written goes beside the store and is thrown away"
    )
    parser.add_argument(
        "--scratch-dir", metavar="DIR", help="--scratch, and where to (default: a directory under /var/tmp)"
    )
    parser.add_argument("--scratch-size", metavar="SIZE", help="--scratch, and at most so much, such as 10GiB")
    parser.add_argument(
        "--sector-size", metavar="N", type=int, choices=(512, 1024, 2048, 4096),
        help="of the device, in bytes (default: what its partition table needs, else 512)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="what is attached")
    parser.add_argument("--json", action="store_true", help="the device and all that is known of it")


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
    from pitfs.fuse.attach import attachments
    from pitfs.fuse.attach.images import image_loops
    from pitfs.fuse.kernel import loop_devices
    from pitfs.store.store import Store
    from pitfs.view.tree import image_name

    scratch = None
    if args.scratch or args.scratch_dir is not None or args.scratch_size is not None:
        scratch = _scratch(args.scratch_dir, args.scratch_size)
    store = Store.open(args.store)
    try:
        resolution, _ = resolve(store, args.time, args.tz)
        info = store.volumes[volume_index(store, args.volume)]
        group = store.group
    finally:
        store.close()
    path = os.path.realpath(args.store)
    image = f"{format_instant(resolution.time_ns)}/{image_name(info)}"
    with attachments.attach_lock(), contextlib.ExitStack() as undo:
        undo.callback(_undo)
        with attachments.signals_deferred():
            place = attachments.find_mount(path, image) if scratch is None else None
            if place is None:
                attachments.unmount_unused()  # what a bare `losetup --detach` left may have the scratch directory
                place = attachments.make_mount(path, group, scratch)
        sector_size = args.sector_size or _sector_size(f"{place}/{image}")
        with attachments.signals_deferred():
            device = loop_devices.attach(f"{place}/{image}", read_only=scratch is None, sector_size=sector_size)
            undo.callback(_detach, device)
        missing = loop_devices.wait_for_partitions(device)
        made = next((each for each in image_loops() if each.loop.device == device), None)
        if made is None:
            raise PitfsError(f"{device}: somebody else has detached it: try again")
        described = _describe(made) | {
            "seq": resolution.seq,
            "size_bytes": info.size_bytes,
            "sector_size": sector_size,
            "direct_io": loop_devices.has_direct_io(device),
            "filesystems": _filesystems(device),
        }
        _warn(described, missing)
        if args.json:
            print_json(described)
        else:
            print(device, flush=True)
            _hint(described)
        sys.stdout.flush()  # a device that nobody was told of isn't left
        undo.pop_all()
    return 0


def _scratch(directory: str | None, size: str | None) -> Any:
    from pitfs.fuse.attach.attachments import ScratchOptions

    for value in (directory, size):
        if value is not None and "," in value:
            raise UsageError(f"{value}: holds a comma, which an option of a mount can't: choose another")
    return ScratchOptions(os.path.realpath(directory) if directory is not None else None, size)


def _sector_size(image: str) -> int:
    from pitfs.fuse.kernel.loop_devices import SECTOR_BYTES, sector_size_for

    try:
        with open(image, "rb", buffering=0) as file:
            return sector_size_for(file.read(HEAD_BYTES))
    except OSError:  # damaged there; the rest may be what somebody needs
        return SECTOR_BYTES


def _detach(device: str) -> None:
    from pitfs.fuse.attach.attachments import signals_deferred
    from pitfs.fuse.kernel.loop_devices import detach, loop_of

    with signals_deferred():
        loop = loop_of(device)
        if loop is not None:
            detach(loop)


def _undo() -> None:
    from pitfs.fuse.attach.attachments import signals_deferred, unmount_unused

    with signals_deferred():
        unmount_unused()


def _filesystems(device: str) -> list[dict[str, str]]:
    """Which filesystem there is on the device, or on which of its partitions."""
    from pitfs.fuse.kernel.loop_devices import filesystem_on, partitions

    found = []
    for path in partitions(device) or [device]:
        kind = filesystem_on(path)
        if kind:
            found.append({"device": path, "type": kind})
    return found


def _warn(described: dict[str, Any], missing: list[str]) -> None:
    device, sector_size = described["device"], described["sector_size"]
    tail = described["size_bytes"] % sector_size
    if tail:
        _say(
            f"{device}: the volume's last {tail} bytes are missing: they don't fill a sector of {sector_size} bytes; "
            f"the image has them: {described['image']}"
        )
    if missing:
        _say(f"{device}: no nodes for {', '.join(missing)}: nothing makes them in this /dev (a container?)")
    if not described["direct_io"]:
        _say(f"{device}: without direct I/O: what is read is cached twice")


def _hint(described: dict[str, Any]) -> None:
    scratch = described["scratch"]
    for found in described["filesystems"]:
        options = WRITABLE.get(found["type"]) if scratch else READ_ONLY.get(found["type"], "ro")
        how = f"-o {options} " if options else ""
        _say(f"{found['type']}; to look into it: mount {how}{found['device']} DIR")
    _say(f"{described['volume']} at {described['instant']}; to end it: pitfs detach {described['device']}")


def _say(text: str) -> None:
    print(f"pitfs: {text}", file=sys.stderr)


# ------------------------------------------------------------------ the list


def _describe(image: ImageLoop) -> dict[str, Any]:
    from pitfs.fuse.kernel.loop_devices import mountpoints_of, partitions

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
        "partitions": partitions(image.loop.device),
        "mountpoints": mountpoints_of(image.loop),
    }


def _list(as_json: bool) -> None:
    from pitfs.fuse.attach.images import image_loops

    rows = [_describe(image) for image in image_loops()]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        kind = "scratch" if row["scratch"] else "read-only" if row["read_only"] else "writable"
        where = f"on {', '.join(row['mountpoints'])}" if row["mountpoints"] else "not mounted"
        store = row["store"] or "(dead mount)"
        print("  ".join((row["device"], store, row["instant"], row["volume"], kind, where)))
