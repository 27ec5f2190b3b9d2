"""mount.pitfs: the helper that mount(8) calls for `mount -t pitfs`, and fstab lines, and users by hand.

    mount.pitfs STORE MOUNTPOINT [-sfnv] [-N ns] [-o options] [-t type]

`-f` stays in the foreground, as with the helpers of libfuse (for mount(8) it means "fake": `mount -f` of a
pitfs store isn't supported). Imports as little as it can: the daemon is forked before anything starts threads.
"""

from __future__ import annotations

import argparse
import grp
import logging
import os
import pwd
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from pitfs.cli.common.parser import Parser, add_store, run_helper
from pitfs.cli.common.times import parse_zone
from pitfs.errors import UsageError
from pitfs.fuse.mount.helper import mount_store
from pitfs.fuse.mount.request import MAX_WORKERS, MountRequest
from pitfs.supervision.heap import bound_heap

NAME: Final = "mount.pitfs"

# Options of pitfs without a value; those with one are VALUES.
FLAGS: Final = frozenset(("strict", "allow_other", "scratch_keep"))
# Options of mount(8) and fstab that concern others, or mean nothing for a read-only mount that never changes.
IGNORED: Final = {
    "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev",
    "rw", "async", "relatime", "strictatime", "lazytime", "nolazytime", "diratime", "loud", "silent",
    "mand", "nomand", "iversion", "noiversion", "default_permissions",
}  # fmt: skip
IGNORED_PREFIXES: Final = ("x-", "X-", "comment=")
# These go to the kernel as they are.
KERNEL_OPTIONS: Final = {
    "ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime", "nodiratime",
    "norelatime", "nostrictatime", "sync", "dirsync",
}  # fmt: skip
LEAST_PLAIN_BYTES: Final = 65536  # of a size without a unit: less would fill at once, so a unit was forgotten
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
  mode=OCTAL              of images (default 0400); who may read them may enter the directories. Write bits
                          count with scratch= only, where the owner may write if none is given (default 0600)
  tz=ZONE                 of times without Z or offset, such as Europe/Vienna (default UTC)
  strict                  only times whose exact state is available have an entry
  scratch=DIR             makes images writable: writes go to sparse files in DIR, never to the store, and are
                          thrown away when the mount ends. DIR exists, and no other mount uses it
  scratch_size=SIZE       limit of all that is written (as 10GiB; default: what the disk has); beyond it writes
                          get "No space left on device", reading goes on
  scratch_keep            what was written stays in DIR, and is there again when the same store is mounted with
                          the same scratch= and scratch_keep. What was synced with fsync survives a power cut
  workers=N               processes that serve it (default: one for each core, at most 2)
  and those of mount(8): ro, noatime, nosuid, nodev, noexec, … (rw means nothing without scratch=: a warning says so)

examples:
  mount.pitfs /srv/pitfs/db1 /mnt/db1
  mount -t pitfs -o uid=postgres,tz=Europe/Vienna /srv/pitfs/db1 /mnt/db1
  losetup --read-only --direct-io=on --find --show /mnt/db1/5m-ago/root.img
  umount /mnt/db1
  mount.pitfs -o scratch=/var/tmp/scratch,scratch_size=10GiB /srv/pitfs/db1 /mnt/db1
  losetup --direct-io=on --find --show /mnt/db1/5m-ago/root.img

fstab:
  /srv/pitfs/db1  /mnt/db1  pitfs  nofail,_netdev  0  0

exit codes: 0 the mount answers, 1 failed, 2 wrong use
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `mount.pitfs`."""
    return run_helper(_parser(), _mount, argv)


def _mount(args: argparse.Namespace) -> int:
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="mount.pitfs: %(levelname)s: %(message)s")
    bound_heap()  # a heap for each thread that reads took 15 MiB of a worker
    given = {name: getattr(args, name) for name in ("store", "mountpoint", "foreground", "verbose")}
    options = ",".join(args.options)
    request = parse_options(options, sloppy=args.sloppy, **given)
    if request.scratch is None and _wants_to_write(options):
        print(
            f"{NAME}: WARNING: source write-protected, mounted read-only: scratch=DIR makes images writable",
            file=sys.stderr,
        )
    return mount_store(request)


def _wants_to_write(options: str) -> bool:
    """Whether the user said rw. mount(8) passes it whenever ro isn't given: then its own command line tells."""
    if "rw" not in options.split(","):
        return False
    try:
        with open(f"/proc/{os.getppid()}/cmdline", encoding="utf-8", errors="surrogateescape") as file:
            words = file.read().split("\0")
    except OSError:
        return True
    if os.path.basename(words[0]) != "mount" or not {"-w", "--rw", "--read-write"}.isdisjoint(words):
        return True
    return any("rw" in re.split("[,=]", word.removeprefix("-o")) for word in words)


def _parser() -> Parser:
    parser = Parser(
        prog=NAME,
        description="Mounts a store: a directory for each instant, in it an image of each volume.",
        epilog=EXAMPLES,
    )
    add_store(parser)
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="directory to mount on")
    parser.add_argument("-o", dest="options", metavar="OPTIONS", action="append", default=[], help="below")
    parser.add_argument("-f", dest="foreground", action="store_true", help="stay in the foreground")
    parser.add_argument("-s", dest="sloppy", action="store_true", help="tolerate unknown options")
    parser.add_argument("-v", dest="verbose", action="store_true", help="say more")
    parser.add_argument("-n", action="store_true", help="no effect (mount(8): don't write mtab)")
    parser.add_argument("-t", metavar="TYPE", help="no effect (mount(8): type)")
    parser.add_argument("-N", metavar="NS", help="no effect (mount(8): namespace, entered already)")
    return parser


def parse_options(text: str, *, sloppy: bool = False, **request: Any) -> MountRequest:
    """The request that the options of `-o`, separated by commas, ask for.

    Args:
        sloppy: ignore unknown options.
        request: the fields of the request that no option sets.

    Raises:
        UsageError: an option is unknown, refused, or has an invalid value.
    """
    values: dict[str, Any] = {}
    kernel: list[str] = []
    for option in filter(None, text.split(",")):
        name, has_value, value = option.partition("=")
        if name in VALUES and has_value:
            key, parse = VALUES[name]
            try:
                values[key] = parse(value)
            except ValueError as error:
                raise UsageError(f"option {option}: {error}") from None
            if name in ("uid", "gid", "mode"):  # the files are for somebody else, who must be able to enter
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
    return MountRequest(kernel_options=tuple(kernel), **request, **values)


def _check_scratch_options(values: dict[str, Any], kernel: Sequence[str]) -> None:
    """Refuses options that exclude each other. With scratch= the owner may write, without it nobody."""
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


def _id_of(kind: str, find: Callable[[str], int]) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if re.fullmatch(r"[0-9]{1,10}", value) and int(value) < 2**32 - 1:
            return int(value)
        try:
            return find(value)
        except (KeyError, ValueError):
            raise ValueError(f"no such {kind}") from None

    return parse


def _parse_mode(value: str) -> int:
    if not re.fullmatch(r"[0-7]{1,4}", value) or int(value, 8) > 0o777:
        raise ValueError("write three octal digits, such as 0440")
    return int(value, 8) & 0o666


def _parse_directory(value: str) -> str:
    if not value:
        raise ValueError("give a directory, such as scratch=/var/tmp/scratch")
    return os.path.abspath(value)


def _parse_size(value: str) -> int:
    from pitfs.config.quantities import parse_size  # 10 ms that only this option pays

    size = parse_size(value)
    if value == str(size) and 0 < size < LEAST_PLAIN_BYTES:
        raise ValueError(f"{size} bytes hold next to nothing: say the unit, as {value}GiB")
    if not 0 < size < 2**63:
        raise ValueError("must be more than nothing, and less than 2^63 bytes")
    return size


def _parse_workers(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", value) or not 1 <= int(value) <= MAX_WORKERS:
        raise ValueError(f"write a number from 1 to {MAX_WORKERS}")
    return int(value)


VALUES: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "uid": ("uid", _id_of("user", lambda name: pwd.getpwnam(name).pw_uid)),
    "gid": ("gid", _id_of("group", lambda name: grp.getgrnam(name).gr_gid)),
    "mode": ("mode", _parse_mode),
    "tz": ("zone", parse_zone),
    "scratch": ("scratch", _parse_directory),
    "scratch_size": ("scratch_size_bytes", _parse_size),
    "workers": ("workers", _parse_workers),
}


if __name__ == "__main__":
    sys.exit(main())
