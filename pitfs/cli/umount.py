"""umount.pitfs: the helper that umount(8) calls for a store's mount. Names who uses one that is busy.

    umount.pitfs MOUNTPOINT [-flnrv] [-N ns] [-t type]

umount(8) finds it by the entry `helper=pitfs` that mount.pitfs leaves in libmount's table (/run/mount/utab), not by
the type: to be fast it asks statfs(2), which says "fuse" for all of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from pitfs.cli.common.parser import Parser, run_helper

NAME: Final = "umount.pitfs"
FAILED: Final = 32  # the exit code of umount(8) where the kernel refuses
MAX_NAMED: Final = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `umount.pitfs`; returns the exit code of umount(8)."""
    parser = Parser(prog=NAME, description="Ends the mount of a store, or says who uses it. Called by umount(8).")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="where the store is mounted")
    for option, meaning in (
        ("-f", "force"), ("-l", "lazily: its users keep it"), ("-n", "don't write mtab"),
        ("-r", "read-only if it's busy"), ("-v", "say more"),
    ):  # fmt: skip
        parser.add_argument(option, dest="options", action="append_const", const=option, help=meaning)
    parser.add_argument("-t", metavar="TYPE", help="no effect (umount(8): type)")
    parser.add_argument("-N", metavar="NS", help="no effect (umount(8): namespace, entered already)")
    return run_helper(parser, _unmount, argv)


def _unmount(args: argparse.Namespace) -> int:
    done = subprocess.run(
        ["umount", "--internal-only", *(args.options or ()), "--", args.mountpoint], stderr=subprocess.PIPE,
        check=False, text=True, errors="surrogateescape", env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip
    message = done.stderr.strip()
    if done.returncode == FAILED and "busy" in message:
        message = busy_line(os.path.realpath(args.mountpoint)) or message
    if message:
        print(message.encode(errors="backslashreplace").decode(), file=sys.stderr)
    return done.returncode


def busy_line(mountpoint: str) -> str:
    """One line: who uses the mount, and what to do; empty if nobody is found."""
    from pitfs.fuse.attach.images import image_loops
    from pitfs.fuse.kernel.loop_devices import mountpoints_of
    from pitfs.fuse.kernel.processes import processes_below

    who, what = [], []
    for image in image_loops():
        if image.mount is not None and image.mount.mountpoint == mountpoint:
            places = mountpoints_of(image.loop)
            mounted = f", mounted on {', '.join(places)}" if places else ""
            who.append(f"{image.loop.device} ({image.instant}/{image.volume}.img{mounted})")
            what += [f"umount {' '.join(places)}"] if places else []
            what.append(f"pitfs detach {image.loop.device}")
    processes = processes_below(mountpoint)
    for user in processes:
        below = os.path.relpath(user.path, mountpoint)
        who.append(f"{user} ({user.how}{'' if below == '.' else f': {below}'})")
    if processes:
        what.append("end the process" if len(processes) == 1 else "end the processes")
    if not who:
        return ""
    more = f" and {len(who) - MAX_NAMED} more" if len(who) > MAX_NAMED else ""
    advice = ", then ".join(what[: 2 * MAX_NAMED])
    return f"umount: {mountpoint}: busy, held by {', '.join(who[:MAX_NAMED])}{more}: {advice}"


if __name__ == "__main__":
    sys.exit(main())
