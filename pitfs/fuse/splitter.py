"""The splitter's mount: one writable file for each volume. Translates requests and errors, nothing else.

Mounting it is here as well: the mountpoint before, and the loop devices over its files behind.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Sequence
from typing import Any, Final

import pyfuse3
import trio

from pitfs.errors import CapacityError, UsageError
from pitfs.fuse.handlers import failed, in_thread
from pitfs.fuse.kernel.loop_devices import LoopDevice, kernel_holders, loop_devices, mountpoints_of
from pitfs.fuse.kernel.mountinfo import clear_dead_mount, is_dead, mounted_at
from pitfs.fuse.kernel.processes import processes_opening
from pitfs.splitter.group_commit import GroupCommit
from pitfs.splitter.service import SplitterService
from pitfs.splitter.splitter import NotReadyError, Splitter
from pitfs.splitter.volume import NotCachedError

log = logging.getLogger(__name__)

FILE_SYSTEM: Final = "pitfs-splitter"
FIRST_INODE: Final = pyfuse3.ROOT_INODE + 1  # of volume 0; a handle is the inode
ATTRIBUTES_S: Final = 300.0  # nothing but this mount changes a volume
EDGE_BYTES: Final = 64 << 10  # the largest block: at most that much around a write is read


class SplitterOperations(pyfuse3.Operations):
    """Requests of the kernel on the splitter's mount.

    Args:
        splitter: what writes and reads go to.
        group_commit: what fsync goes to.
        service: what writes wait for: room in the journal (on_full = "block"), or the replica (mode sync).
    """

    supports_dot_lookup = False
    enable_writeback_cache = False  # it would merge writes, and seq and time would be wrong

    def __init__(self, splitter: Splitter, group_commit: GroupCommit, service: SplitterService) -> None:
        super().__init__()
        self._splitter = splitter
        self._group_commit = group_commit
        self._service = service
        self._names = [os.fsencode(volume.name) for volume in splitter.volumes]
        self._sizes = [volume.size_bytes for volume in splitter.volumes]
        self._started_ns = time.time_ns()
        self._waiting = False  # for room in the journal, and the log says so

    # -- the hot path ------------------------------------------------------------------------------------

    async def write(self, fh: Any, off: int, buf: bytes) -> int:
        room = self._sizes[fh - FIRST_INODE] - off
        if len(buf) > room:
            if room <= 0:
                raise pyfuse3.FUSEError(errno.ENOSPC)  # as a block device answers
            buf = buf[:room]
        may_read = False
        while True:
            try:
                self._splitter.write(fh - FIRST_INODE, off, buf, may_read)
                self._waiting = False
                break
            except NotCachedError:
                # A thread reads the blocks around the write from the disk into memory; other requests go on.
                with contextlib.suppress(OSError):  # the write will meet the error as well, and say it
                    await self._read_from_disk(fh, off - EDGE_BYTES, len(buf) + 2 * EDGE_BYTES)
                may_read = True  # they may be out of the cache again
            except NotReadyError as wait:
                await self._make_ready(wait)
            except CapacityError as error:
                if not self._waiting:
                    log.warning("%s; writes wait for it", error)
                self._waiting = True
                if not await self._service.wait_for_room():
                    raise pyfuse3.FUSEError(errno.EIO) from error
            except OSError as error:
                raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
            except Exception as error:
                raise failed("write", error) from None
        if not await self._service.written():
            raise pyfuse3.FUSEError(errno.EIO)
        return len(buf)

    async def _make_ready(self, wait: NotReadyError) -> None:
        try:
            await self._service.make_ready(wait)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        except Exception as error:
            raise failed("write", error) from None

    async def read(self, fh: Any, off: int, size: int) -> bytes:
        try:
            try:
                return self._splitter.read(fh - FIRST_INODE, off, size, may_read=False)
            except NotCachedError:
                return await self._read_from_disk(fh, off, size)
        except OSError as error:
            log.error("%s: read at %d: %s", self._splitter.volumes[fh - FIRST_INODE].path, off, error)
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        except Exception as error:
            raise failed("read", error) from None

    async def _read_from_disk(self, fh: Any, off: int, size: int) -> bytes:
        return await in_thread(self._splitter.read, fh - FIRST_INODE, max(off, 0), size)

    async def fsync(self, fh: Any, datasync: bool) -> None:
        try:
            if not self._group_commit.sync_now():
                # A cancelled handler sends no reply, and its caller would hang.
                with trio.CancelScope(shield=True):
                    await self._group_commit.sync()
        except OSError as error:
            self._splitter.sync_failed(error)
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        except Exception as error:
            raise failed("fsync", error) from None

    # -- names and attributes ----------------------------------------------------------------------------

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.attr_timeout = entry.entry_timeout = ATTRIBUTES_S
        # Constant: only this mount changes a volume, and the kernel drops its cache where mtime changes.
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = self._started_ns
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o700)
            entry.st_nlink = 2
        elif 0 <= inode - FIRST_INODE < len(self._sizes):
            entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o600)
            entry.st_size = self._sizes[inode - FIRST_INODE]
            entry.st_blksize = self._splitter.volumes[inode - FIRST_INODE].block_size
            entry.st_blocks = -(-entry.st_size // 512)
        else:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return entry

    async def getattr(self, inode: Any, ctx: Any = None) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def setattr(self, inode: Any, attr: Any, fields: Any, fh: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        entry = self._attributes(inode)
        if fields.update_size and attr.st_size != entry.st_size:
            raise pyfuse3.FUSEError(errno.EPERM)  # a volume never changes its size
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        return entry  # touch(1) and others set times too: accepted, without effect

    async def lookup(self, parent_inode: Any, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        if parent_inode == pyfuse3.ROOT_INODE and name in self._names:
            return self._attributes(FIRST_INODE + self._names.index(name))
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def opendir(self, inode: Any, ctx: Any) -> Any:
        return inode

    async def readdir(self, fh: Any, start_id: int, token: Any) -> None:
        for index in range(start_id, len(self._names)):
            entry = self._attributes(FIRST_INODE + index)
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(self._names[index]), entry, index + 1):
                return

    async def open(self, inode: Any, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        self._attributes(inode)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    # Left to pyfuse3: forget, release and releasedir, since inodes and handles are computed, not counted;
    # flush, since close(2) promises nothing; fsyncdir; access. It answers ENOSYS, after which the kernel
    # takes them for done.

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        result = pyfuse3.StatvfsData()
        result.f_bsize = result.f_frsize = 4096
        result.f_blocks = sum(self._sizes) // 4096
        result.f_files = len(self._sizes)
        result.f_namemax = 64
        return result


def prepare_mountpoint(mountpoint: str, group: str) -> None:
    """Makes the mountpoint if it is missing, and clears the dead mount of a killed splitter of this group.

    Raises:
        UsageError: it isn't an empty directory, or something else is mounted on it.
    """
    clear_dead_mount(mountpoint, f"fuse.{FILE_SYSTEM}", _source(group))
    if is_dead(mountpoint):
        dead = mounted_at(mountpoint)
        what = f"a dead mount of {dead.source} is there" if dead else "lies on a mount whose program is gone"
        raise UsageError(f"{mountpoint}: mountpoint: {what}: clear it with 'umount -l {mountpoint}'")
    try:
        os.makedirs(mountpoint, exist_ok=True)
    except FileExistsError:
        problem = "not a directory: give one, or a path to make one at"
        raise UsageError(f"{mountpoint}: mountpoint: {problem}") from None
    except OSError as error:
        raise UsageError(f"{mountpoint}: mountpoint: can't be made: {os.strerror(error.errno or 0)}") from error
    present = mounted_at(mountpoint)
    if present is not None:
        raise UsageError(
            f"{mountpoint}: mountpoint: busy: {present.source} is mounted there: unmount it first (umount {mountpoint})"
        )
    if hidden := sorted(os.listdir(mountpoint)):
        problem = f"not empty: {hidden[0]} would be hidden" + (" with all else there" if len(hidden) > 1 else "")
        raise UsageError(f"{mountpoint}: mountpoint: {problem}: give an empty directory, or a path to make one at")


def mount_splitter(operations: pyfuse3.Operations, mountpoint: str, group: str) -> None:
    """Mounts; requests are answered once `pyfuse3.main` runs. Raises UsageError: the kernel refuses."""
    try:
        pyfuse3.init(operations, mountpoint, {f"fsname={_source(group)}", f"subtype={FILE_SYSTEM}"})
    except (RuntimeError, OSError) as error:
        problem = f"can't be mounted: {error}: is /dev/fuse there, and are you root?"
        raise UsageError(f"{mountpoint}: {problem}") from error


def _source(group: str) -> str:
    return f"{FILE_SYSTEM}:{group}"


def attached_loops(mountpoint: str) -> list[LoopDevice]:
    """The loop devices over files of the mount."""
    return [loop for loop in loop_devices() if os.path.dirname(loop.backing) == mountpoint]


def users_of(mountpoint: str, volumes: Sequence[str]) -> list[str]:
    """By whom the mount's volumes are used, one line for each user, and what ends it. The mount itself isn't asked."""
    lines = []
    for loop in attached_loops(mountpoint):
        places, holders = mountpoints_of(loop), kernel_holders(loop.device)
        uses = [f"mounted on {place}" for place in places] + [f"in use by {holder}" for holder in holders]
        steps = [f"umount {place}" for place in places] + [f"losetup -d {loop.device}"]
        lines.append(f"{loop.backing}: {', '.join([loop.device, *uses])}: {', then '.join(steps)}")
    paths = [os.path.join(mountpoint, volume) for volume in volumes]
    lines += [f"{user.path}: {user.how} by {user}" for user in processes_opening(paths, mapped=True)]
    return lines
