"""mount.pitfs: the helper that mount(8) calls for `mount -t pitfs`, and fstab lines, and users by hand.

    mount.pitfs STORE MOUNTPOINT [-sfnv] [-N ns] [-o options] [-t type]

`-f` stays in the foreground, as with the helpers of libfuse (for mount(8) it means "fake": `mount -f` of a
pitfs store isn't supported). Imports as little as it can: the daemon is
forked before anything starts threads.
"""

from __future__ import annotations

import argparse
import datetime
import grp
import logging
import os
import pwd
import re
import sys
import zoneinfo
from collections.abc import Callable, Sequence
from typing import Any, Final

from pitfs.cli.main import Parser, fill_standard_descriptors, report
from pitfs.errors import UsageError
from pitfs.fuse.mount.helper import mount_store
from pitfs.fuse.mount.request import MAX_WORKERS, MountRequest
from pitfs.supervision.heap import bound_heap

NAME: Final = "mount.pitfs"

# Of pitfs, without a value; those with one are VALUES.
FLAGS: Final = frozenset(("strict", "allow_other", "scratch_keep"))
# Of mount(8) and fstab: for others, or without meaning for a mount that is read-only and never changes.
IGNORED: Final = frozenset(
    (
        *("defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev"),
        *("rw", "async", "relatime", "strictatime", "lazytime", "nolazytime", "diratime", "loud", "silent"),
        *("mand", "nomand", "iversion", "noiversion", "default_permissions"),
    )
)
IGNORED_PREFIXES: Final = ("x-", "X-", "comment=")
# These go to the kernel as they are.
KERNEL_OPTIONS: Final = frozenset(
    (
        *("ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime", "nodiratime"),
        *("norelatime", "nostrictatime", "sync", "dirsync"),
    )
)
LEAST_PLAIN_BYTES: Final = 65536  # of a size without a unit
REFUSED: Final = {
    "auto_unmount": "an empty directory in place of a dead mount looks like deleted data",
    "max_read": "the kernel's limit is used",
    "remount": "umount and mount again",
    "allow_root": "use allow_other, or uid= for one user",
    "direct_io": "images must be cached for mmap and loop devices",
}

EXAMPLES: Final = """\
options (-o):
  allow_other             others may try; modes decide (set by uid=, gid= and mode=)
  uid=USER gid=GROUP      owner of everything (default root)
  mode=OCTAL              of images (default 0400); directories can be entered by those who may read. Write bits
                          count with scratch= only, where the owner may write if none is given (default 0600)
  tz=ZONE                 of times without Z or offset, such as Europe/Vienna (default UTC)
  strict                  only times whose state can be given exactly lead anywhere
  scratch=DIR             makes images writable: what is written goes to sparse files in DIR, an existing directory
                          that no other mount uses, never to the store; thrown away when the mount ends
  scratch_size=SIZE       what may be written over all (as 10GiB; default: what the disk has); beyond it writes
                          get "No space left on device", reading goes on
  scratch_keep            what was written stays in DIR, and is there again when the same store is mounted with
                          the same scratch= and scratch_keep. What fsync was answered for survives a power cut
  workers=N               processes that serve it (default: one for each core, at most 2)
  and those of mount(8): ro, noatime, nosuid, nodev, noexec, …

examples:
  mount.pitfs /srv/replica/db1 /mnt/db1
  mount -t pitfs -o uid=postgres,tz=Europe/Vienna /srv/replica/db1 /mnt/db1
  losetup --read-only --direct-io=on --find --show /mnt/db1/5m-ago/root.img
  umount /mnt/db1
  mount.pitfs -o scratch=/var/tmp/scratch,scratch_size=10GiB /srv/replica/db1 /mnt/db1
  losetup --direct-io=on --find --show /mnt/db1/5m-ago/root.img

fstab:
  /srv/replica/db1  /mnt/db1  pitfs  nofail,_netdev  0  0

exit codes: 0 the mount answers, 1 failed, 2 wrong use
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `mount.pitfs`."""
    fill_standard_descriptors()
    try:
        try:
            args = _parser().parse_args(argv)
        except SystemExit as stop:  # argparse has said what there is to say
            return stop.code if isinstance(stop.code, int) else 2
        logging.basicConfig(
            level=logging.INFO if args.verbose else logging.WARNING,
            format="mount.pitfs: %(levelname)s: %(message)s",
        )
        bound_heap()  # a heap for each thread that reads took 15 MiB of a worker
        return mount_store(
            parse_options(
                ",".join(args.options),
                store=args.store,
                mountpoint=args.mountpoint,
                foreground=args.foreground,
                sloppy=args.sloppy,
                verbose=args.verbose,
            )
        )
    except BaseException as error:
        return report(error, program=NAME)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=NAME,
        description="Mounts a store: a directory for each instant, in it an image of each volume.",
        epilog=EXAMPLES,
    )
    parser.add_argument("store", metavar="STORE", help="directory of the store")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="directory to mount on")
    parser.add_argument("-o", dest="options", metavar="OPTIONS", action="append", default=[], help="below")
    parser.add_argument("-f", dest="foreground", action="store_true", help="stay in the foreground")
    parser.add_argument("-s", dest="sloppy", action="store_true", help="tolerate unknown options")
    parser.add_argument("-v", dest="verbose", action="store_true", help="say more")
    parser.add_argument("-n", action="store_true", help="no effect (mount(8): don't write mtab)")
    parser.add_argument("-t", metavar="TYPE", help="no effect (mount(8): type)")
    parser.add_argument("-N", metavar="NS", help="no effect (mount(8): namespace, entered already)")
    return parser


def parse_options(
    text: str,
    *,
    store: str,
    mountpoint: str,
    foreground: bool = False,
    sloppy: bool = False,
    verbose: bool = False,
) -> MountRequest:
    """The request that the options of `-o`, separated by commas, ask for.

    Raises:
        UsageError: an option is unknown (unless sloppy), refused, or its value is wrong.
    """
    values: dict[str, Any] = {}
    kernel: list[str] = []
    for option in filter(None, text.split(",")):
        name, has_value, value = option.partition("=")
        if name in VALUES and has_value:
            key, parse = VALUES[name]
            values[key] = parse(value)
            if name in ("uid", "gid", "mode"):  # who gives it to somebody else wants that somebody to get in
                values["allow_other"] = True
        elif option in FLAGS:
            values[option] = True
        elif option in KERNEL_OPTIONS:
            kernel.append(option)
        elif name in REFUSED:
            raise UsageError(f"option {name}: not supported: {REFUSED[name]}")
        elif option not in IGNORED and not option.startswith(IGNORED_PREFIXES) and not sloppy:
            raise UsageError(f"unknown option {option!r}: {NAME} --help lists them")
    _check_scratch_options(values, kernel)
    return MountRequest(
        store, mountpoint, kernel_options=tuple(kernel), foreground=foreground, verbose=verbose, **values
    )


def _check_scratch_options(values: dict[str, Any], kernel: Sequence[str]) -> None:
    """Refuses what doesn't go together; with scratch= the owner may write, without it nobody."""
    mode = values.get("mode", 0o400)
    if "scratch" in values:
        if "ro" in kernel:
            raise UsageError("options ro and scratch= contradict each other: leave one out")
        values["mode"] = mode if mode & 0o222 else mode | 0o200
        if values.setdefault("workers", 1) != 1:
            raise UsageError("option workers=: with scratch= it is one: leave it out")
        return
    for name, option in (("scratch_size_bytes", "scratch_size"), ("scratch_keep", "scratch_keep")):
        if name in values:
            raise UsageError(f"option {option}: goes with scratch=DIR only")
    values["mode"] = mode & 0o444


def _parse_id(option: str, find: Callable[[str], int]) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if re.fullmatch(r"[0-9]{1,10}", value) and int(value) < 2**32 - 1:
            return int(value)
        try:
            return find(value)
        except (KeyError, ValueError):
            what = "user" if option == "uid" else "group"
            raise UsageError(f"option {option}={value}: no such {what}") from None

    return parse


def _parse_mode(value: str) -> int:
    if not re.fullmatch(r"[0-7]{1,4}", value) or int(value, 8) > 0o777:
        raise UsageError(f"option mode={value}: write three octal digits, such as 0440")
    return int(value, 8) & 0o666


def _parse_directory(value: str) -> str:
    if not value:
        raise UsageError("option scratch=: give a directory, such as scratch=/var/tmp/scratch")
    return os.path.abspath(value)


def _parse_size(value: str) -> int:
    from pitfs.config.production import parse_size  # 10 ms that only this option pays

    try:
        size = parse_size(value)
    except ValueError as error:
        raise UsageError(f"option scratch_size={value}: {error}") from None
    if value == str(size) and 0 < size < LEAST_PLAIN_BYTES:  # no unit: what else was meant would fill at once
        raise UsageError(f"option scratch_size={value}: {size} bytes hold next to nothing: say the unit, as {value}GiB")
    if not 0 < size < 2**63:
        raise UsageError(f"option scratch_size={value}: must be more than nothing, and less than 2^63 bytes")
    return size


def _parse_workers(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", value) or not 1 <= int(value) <= MAX_WORKERS:
        raise UsageError(f"option workers={value}: write a number from 1 to {MAX_WORKERS}")
    return int(value)


def parse_zone(value: str) -> datetime.tzinfo:
    """The zone of that name.

    Raises:
        UsageError: there is none.
    """
    if value == "UTC":  # also where no zones are installed
        return datetime.UTC
    try:
        return zoneinfo.ZoneInfo(value)
    except (KeyError, ValueError, OSError):
        raise UsageError(f"time zone {value!r}: unknown: write a name such as Europe/Vienna") from None


VALUES: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "uid": ("uid", _parse_id("uid", lambda name: pwd.getpwnam(name).pw_uid)),
    "gid": ("gid", _parse_id("gid", lambda name: grp.getgrnam(name).gr_gid)),
    "mode": ("mode", _parse_mode),
    "tz": ("zone", parse_zone),
    "scratch": ("scratch", _parse_directory),
    "scratch_size": ("scratch_size_bytes", _parse_size),
    "workers": ("workers", _parse_workers),
}


if __name__ == "__main__":
    sys.exit(main())
