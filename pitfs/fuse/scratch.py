"""The replica's mount with writable images: writes go to overlays in the scratch directory, never to the store.

Writes go to the page cache inline, as the splitter's do. A write that needs bytes from the disk first (an
image's first write, or the rest of a block that is written in part) gets them in a thread. One process serves
such a mount, since the table of written blocks is in its memory.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from pitfs.errors import CapacityError
from pitfs.fuse.handlers import failed, holding, in_thread
from pitfs.fuse.replica import Ownership, Replica, handler
from pitfs.storage.files import FULL_ERRNOS
from pitfs.view.inodes import EntryType, InodeKind, TreeEntry, unpack_inode
from pitfs.view.overlay import Overlay, Write
from pitfs.view.overlay_view import NotCachedError, OverlayView
from pitfs.view.scratch import ScratchDirectory
from pitfs.view.tree import Tree
from pitfs.view.view import PointInTimeView, ReadBuffer

if TYPE_CHECKING:
    from pyfuse3 import FileHandleT, FlagT, InodeT, RequestContext, SetattrFields

    from pitfs.fuse.replica import Image
    from pitfs.store.store import Store

log = logging.getLogger(__name__)

# Writes that take less than this on average are done in the event loop: they go to the page cache.
INLINE_WRITE_NS: Final = 1_000_000
FULL_LOG_S: Final = 60.0  # between two lines in the log about a full scratch


class ScratchReplica(Replica):
    """pyfuse3 handlers over one store and its scratch."""

    refusal = errno.EPERM  # images can be written, the tree itself stays as it is

    def __init__(self, store: Store, tree: Tree, ownership: Ownership, scratch: ScratchDirectory) -> None:
        super().__init__(store, tree, ownership)
        self._scratch = scratch
        self._writable: dict[int, OverlayView] = {}  # of each overlay; the scratch limits how many there are
        self._create_lock = trio.Lock()
        self._write_locks: dict[int, trio.Lock] = {}
        self._sync_locks: dict[int, trio.Lock] = {}
        self._full_log_at = 0.0
        self._average_ns = 0.0  # that writes take: a moving average, each new one counts for an eighth
        self._slow_writes = 0  # under way; meanwhile none is done inline: they must keep their order

    def close(self) -> None:
        self._scratch.close()
        super().close()

    # -------------------------------------------------------------- images

    @handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_TRUNC:
            raise self._fixed_size(inode)
        await self._pin(inode)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def _view(self, inode: int) -> Image:
        view = self._writable.get(inode)
        if view is None:
            below = await super()._view(inode)
            overlay = self._overlay(inode)
            if overlay is None or not isinstance(below, PointInTimeView):
                return below
            self._writable[inode] = view = OverlayView(below, overlay)
        self._views[inode] = view
        return view

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:  # type: ignore[override]
        # Guarded as by `handler`, but within: a decorator would cost each write another coroutine.
        view = self._writable.get(fh)
        if (
            view is None
            or self._slow_writes
            or self._average_ns >= INLINE_WRITE_NS
            or off + len(buf) > view.size_bytes
        ):
            return await self._write_slowly(fh, off, buf)
        try:
            start_ns = time.monotonic_ns()
            view.write(off, buf)
            self._average_ns += (time.monotonic_ns() - start_ns - self._average_ns) / 8
        except NotCachedError:
            return await self._write_slowly(fh, off, buf)
        except Exception as error:
            raise self._write_failed(error) from error
        return len(buf)

    @handler
    async def _write_slowly(self, inode: int, offset: int, data: bytes) -> int:
        """Does what can't be done inline: the first write of an image, one that needs bytes from the disk,
        one beyond the end, and all writes while the scratch's disk is slow."""
        view = await self._writable_view(inode)
        data = data[: max(view.size_bytes - offset, 0)]
        if not data:
            raise pyfuse3.FUSEError(errno.ENOSPC)  # as a block device answers
        self._slow_writes += 1
        try:
            edges = b"", b""
            if view.has_edges(offset, len(data)):
                edges = await in_thread(
                    view.read_edges, offset, len(data), ReadBuffer(0), limiter=self._limiter
                )
            async with holding(self._write_locks.setdefault(inode, trio.Lock())):
                await self._store_write(view, view.prepare(offset, data, edges))
        except Exception as error:
            raise self._write_failed(error) from error
        finally:
            self._slow_writes -= 1
        return len(data)

    async def _store_write(self, view: OverlayView, write: Write) -> None:
        def timed() -> int:
            start_ns = time.monotonic_ns()
            view.overlay.store(write)
            return time.monotonic_ns() - start_ns

        try:
            is_quick = self._average_ns < INLINE_WRITE_NS
            took_ns = timed() if is_quick else await in_thread(timed, limiter=self._limiter)
        except BaseException:
            view.overlay.not_stored(write)
            raise
        view.overlay.stored(write)
        self._average_ns += (took_ns - self._average_ns) / 8

    async def _writable_view(self, inode: int) -> OverlayView:
        async with holding(self._create_lock):
            view = await self._view(inode)
            if not isinstance(view, OverlayView):
                _, volume, seq = unpack_inode(inode)
                try:
                    await in_thread(self._scratch.make, seq, volume, limiter=self._limiter)
                except (OSError, CapacityError) as error:
                    raise self._write_failed(error) from error
                view = await self._view(inode)
            assert isinstance(view, OverlayView)
            return view

    def _write_failed(self, error: Exception) -> pyfuse3.FUSEError:
        if isinstance(error, CapacityError) or (isinstance(error, OSError) and error.errno in FULL_ERRNOS):
            if time.monotonic() >= self._full_log_at:
                log.warning("%s: the scratch is full: %s: writes get ENOSPC", self._scratch.directory, error)
                self._full_log_at = time.monotonic() + FULL_LOG_S
            return pyfuse3.FUSEError(errno.ENOSPC)
        return failed("write", error)

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        overlay = self._overlay(fh)
        if overlay is None:
            return
        writes = overlay.writes
        async with holding(self._sync_locks.setdefault(fh, trio.Lock())):
            if overlay.synced_writes >= writes and not overlay.failed:
                return  # another fsync, begun after these writes, has made them durable
            begun = overlay.begin_sync()
            try:
                await in_thread(overlay.sync, begun, limiter=self._limiter)
            except BaseException as error:
                overlay.unsynced(begun)
                if isinstance(error, CapacityError):
                    raise self._write_failed(error) from error
                raise

    def _overlay(self, inode: int) -> Overlay | None:
        kind, volume, seq = unpack_inode(inode)
        return self._scratch.get(seq, volume) if kind is InodeKind.IMAGE else None

    # -------------------------------------------------------------- attributes

    def _attributes(self, entry: TreeEntry) -> pyfuse3.EntryAttributes:
        attributes = super()._attributes(entry)
        if entry.type is EntryType.FILE:
            overlay = self._overlay(entry.inode)
            if overlay is not None and (mtime_ns := overlay.mtime_ns) is not None:
                attributes.st_mtime_ns = attributes.st_ctime_ns = mtime_ns  # the kernel asks again after each write
        return attributes

    @handler
    async def setattr(  # type: ignore[override]
        self,
        inode: InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> pyfuse3.EntryAttributes:
        entry = self._attributes(await self._query(self._tree.entry, inode))
        if fields.update_size and attr.st_size != entry.st_size:
            raise self._fixed_size(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        return entry  # touch(1) and others set times too: accepted, without effect

    def _fixed_size(self, inode: int) -> pyfuse3.FUSEError:
        """An image never changes its size: a truncation (dd without conv=notrunc) would lose its content."""
        log.info("inode %d: truncating an image is refused (dd: conv=notrunc)", inode)
        return pyfuse3.FUSEError(errno.EPERM)

    @handler
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        answer = await super().statfs(ctx)
        free = await in_thread(self._scratch.free_bytes, limiter=self._limiter)
        answer.f_bfree = answer.f_bavail = free // answer.f_frsize
        return answer
