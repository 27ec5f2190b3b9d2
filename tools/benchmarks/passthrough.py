"""The bare pyfuse3 passthrough that all figures are compared with: one file, no journal, no checks.

    python passthrough.py BACKING MOUNTPOINT      serves MOUNTPOINT/root, prints `ready`, ends with umount

Each write is one os.pwrite inline, each fsync one os.fdatasync, each read one os.pread: the least that any
FUSE server in Python can do, so what pitfs costs beyond it is pitfs's own.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import pyfuse3
import trio

NAME = b"root"
FILE_INODE = pyfuse3.InodeT(pyfuse3.ROOT_INODE + 1)


class Passthrough(pyfuse3.Operations):
    """One directory with one file of the backing's size."""

    enable_writeback_cache = False
    supports_dot_lookup = False

    def __init__(self, backing: str) -> None:
        super().__init__()
        self.descriptor = os.open(backing, os.O_RDWR)
        self.size_bytes = os.fstat(self.descriptor).st_size
        self.started_ns = os.fstat(self.descriptor).st_mtime_ns

    def _attributes(self, inode: pyfuse3.InodeT) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = 300
        entry.st_mode = stat.S_IFDIR | 0o700 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o600
        entry.st_nlink = 1
        entry.st_uid = entry.st_gid = 0
        entry.st_size = 0 if inode == pyfuse3.ROOT_INODE else self.size_bytes
        entry.st_blksize, entry.st_blocks = 4096, entry.st_size // 512
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self.started_ns
        return entry

    async def getattr(self, inode, ctx=None):  # type: ignore[no-untyped-def]
        return self._attributes(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):  # type: ignore[no-untyped-def]
        return self._attributes(inode)

    async def lookup(self, parent_inode, name, ctx=None):  # type: ignore[no-untyped-def]
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FILE_INODE)

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
        return os.pread(self.descriptor, size, off)

    async def write(self, fh, off, buf):  # type: ignore[no-untyped-def]
        return os.pwrite(self.descriptor, buf, off)

    async def fsync(self, fh, datasync):  # type: ignore[no-untyped-def]
        os.fdatasync(self.descriptor)

    async def flush(self, fh):  # type: ignore[no-untyped-def]
        return

    async def release(self, fh):  # type: ignore[no-untyped-def]
        return


async def serve() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        print("ready", flush=True)


def main() -> None:
    backing, mountpoint = sys.argv[1:]
    pyfuse3.init(Passthrough(backing), mountpoint, {"fsname=bare", "subtype=passthrough"})
    try:
        trio.run(serve)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
