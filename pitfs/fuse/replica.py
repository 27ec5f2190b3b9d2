"""The replica's mount: translates requests to the tree and the view, errors to errno. Nothing else.

No answer depends on what a handler keeps: a file handle is the inode number, and the inode number says which
image of which instant it is. What is in memory is answered inline; data in the page cache are read inline
into one buffer. What may need the disk goes to a thread, so that one slow block doesn't hold up the other
requests.

An instant has one seq, however it is named, and so one inode for each volume: the kernel keeps its pages
once, for all names and openings. Two instants are two inodes even where their blocks are equal, since FUSE
has no way to share pages between inodes. Equal blocks are stored in one place of an object, though, whose
pages the kernel has once.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import functools
import itertools
import os
import stat
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Never, ParamSpec, TypeVar

import pyfuse3
import trio

from pitfs.fuse.handlers import blocked_handlers, failed, in_thread
from pitfs.view.inodes import ROOT_INODE, EntryType, InodeKind, NoEntryError, TreeEntry, unpack_inode
from pitfs.view.tree import Tree
from pitfs.view.view import MAX_TABLE_CACHE_BYTES, PointInTimeView, ReadBuffer, TableCache

if TYPE_CHECKING:
    from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, ReaddirToken, RequestContext, XAttrNameT

    from pitfs.store.pins.pins import Pins
    from pitfs.store.store import Store
    from pitfs.view.overlay_view import OverlayView

    Image = PointInTimeView | OverlayView

PERMANENT_TIMEOUT_S: Final = 300.0  # what never changes may only be pruned
# Each path begins at the root, and the root's mtime needs the catalog: it may be this old. This isn't the
# kernel's timeout, since the root of a dead mount would seem alive for as long.
ROOT_MAX_AGE_S: Final = 1.0
ROOT_TIMEOUT_S: Final = 0.05  # the kernel's: ls -l of 10,000 paths would ask for the root with each
MAX_VIEWS: Final = 1024  # images with resolved tables at hand; a view is some 300 bytes
MAX_THREADS: Final = 16  # of all processes, cold reads under way: what a disk likes to have queued
MAX_LISTINGS: Final = 16  # that were begun; each holds at most a page of the catalog, and of bookmarks
NAME_MAX: Final = 255
USER_ATTRIBUTES: Final = b"user."  # the one namespace of extended attributes that there is

P = ParamSpec("P")
T = TypeVar("T")
Listed = tuple[str, TreeEntry, int]  # name, entry, cookie of what follows


def handler(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Decorator of each handler: lets only `FUSEError` out. Other errors would end pyfuse3's main loop."""

    @functools.wraps(function)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await function(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except NoEntryError:
            raise pyfuse3.FUSEError(errno.ENOENT) from None
        except Exception as error:
            raise failed(function.__name__, error) from error

    return guarded


@dataclasses.dataclass(frozen=True, slots=True)
class Ownership:
    """Who may read: images have `mode`; who may read these may list and enter directories."""

    uid: int = 0
    gid: int = 0
    mode: int = 0o400


class Replica(pyfuse3.Operations):
    """pyfuse3 handlers over one store.

    Args:
        workers: processes that serve the mount; they share the limits of caches and threads.

    Attributes:
        history: which history the store has, 32 hex digits.
        refusal: errno of requests that would change the tree.
    """

    supports_dot_lookup = False
    refusal = errno.EROFS
    pins: Pins | None = None  # that keep what open images show

    def __init__(self, store: Store, tree: Tree, ownership: Ownership, workers: int = 1) -> None:
        super().__init__()
        self.history = store.history
        self._store = store
        self._tree = tree
        self._ownership = ownership
        readable = ownership.mode & 0o444
        self._modes = {
            EntryType.DIRECTORY: stat.S_IFDIR | readable | readable >> 2,
            EntryType.FILE: stat.S_IFREG | ownership.mode,
            EntryType.LINK: stat.S_IFLNK | 0o777,
        }
        self._tables = TableCache(MAX_TABLE_CACHE_BYTES // workers)
        self._views: collections.OrderedDict[int, Image] = collections.OrderedDict()
        # One buffer for all inline reads: pyfuse3 sends what a handler returns before any other task runs.
        self._buffer = ReadBuffer()
        self._spare_buffers: list[ReadBuffer] = []
        self._limiter = trio.CapacityLimiter(max(MAX_THREADS // workers, 1))  # each thread has a MiB's buffer
        # Listings whose last reply was full, by directory and the cookie to go on from: (what had no room, the
        # rest). A listing that was dropped from here is begun anew at its cookie, which takes longer.
        self._listings: dict[tuple[int, int], tuple[Listed, Iterator[Listed]]] = {}
        self._root: pyfuse3.EntryAttributes | None = None
        self._root_until = 0.0
        self._tree_limiter = trio.CapacityLimiter(1)  # the tree isn't made for several threads

    def close(self) -> None:
        """To be called when no handler is under way any more."""
        self._store.close()

    # -------------------------------------------------------------- names and attributes

    @handler
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(await self._query(self._tree.lookup, parent_inode, name))

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        if inode != ROOT_INODE:
            return self._attributes(await self._query(self._tree.entry, inode))
        if self._root is None or trio.current_time() >= self._root_until:
            self._root = self._attributes(await self._query(self._tree.entry, inode))
            self._root.attr_timeout = ROOT_TIMEOUT_S
            self._root_until = trio.current_time() + ROOT_MAX_AGE_S
        return self._root

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return (await self._query(self._tree.target, inode)).encode()

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return inode  # the kernel knows that it is a directory; readdir says if it is gone

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        if start_id == 0:  # what is left of an earlier listing may be out of date
            self._forget_listings(fh)
        await self._query(self._reply_listing, fh, start_id, token)

    def _reply_listing(self, inode: int, start: int, token: ReaddirToken) -> None:
        first, rest = self._listings.pop((inode, start), (None, None))
        rest = self._tree.listing(inode, start) if rest is None else rest
        reached = start
        for each in itertools.chain((first,) if first else (), rest):
            name, entry, cookie = each
            if not pyfuse3.readdir_reply(token, name.encode(), self._attributes(entry), cookie):
                if len(self._listings) >= MAX_LISTINGS:
                    self._listings.clear()
                self._listings[inode, reached] = each, rest
                return
            reached = cookie

    def _forget_listings(self, inode: int) -> None:
        for key in list(self._listings):  # a copy: a thread may be adding one
            if key[0] == inode:
                self._listings.pop(key, None)

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        self._forget_listings(fh)

    @handler
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_blocks = sum(-(-volume.size_bytes // 4096) for volume in self._store.volumes)
        answer.f_files = len(self._store.volumes)
        answer.f_bfree = answer.f_bavail = answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = NAME_MAX
        return answer

    @handler
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        # ls -l tries three others on each entry until one is unsupported, the kernel one before each write.
        if not name.startswith(USER_ATTRIBUTES):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        value = (await in_thread(self._tree.attributes_of, inode, limiter=self._tree_limiter)).get(name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return list(await in_thread(self._tree.attributes_of, inode, limiter=self._tree_limiter))

    # -------------------------------------------------------------- images

    @handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise pyfuse3.FUSEError(errno.EROFS)
        await self._pin(inode)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: FileHandleT, off: int, size: int) -> memoryview:  # type: ignore[override]
        # Guarded as by `handler`, but within: a decorator would cost each read another coroutine.
        try:
            view = self._views.get(fh)
            if view is not None:
                data = view.try_read_cached(off, size, self._buffer)
                if data is not None:
                    return data
        except Exception as error:
            raise failed("read", error) from error
        return await self._read_in_thread(fh, off, size)

    @handler
    async def _read_in_thread(self, fh: FileHandleT, off: int, size: int) -> memoryview:
        view = await self._view(fh)
        buffer = self._spare_buffers.pop() if self._spare_buffers else ReadBuffer()
        try:
            return await in_thread(view.read, off, size, buffer, limiter=self._limiter)
        finally:
            # It can be used again at once: nothing runs between this return and pyfuse3's reply.
            if len(self._spare_buffers) < MAX_THREADS:
                self._spare_buffers.append(buffer)

    @handler
    async def release(self, fh: FileHandleT) -> None:
        await self._unpin(fh)

    async def _pin(self, inode: int) -> None:
        """Keeps what an image shows in the store until `_unpin`, which may come in another worker."""
        if self.pins is None:
            await self._view(inode)
            return
        resolution = await self._query(self._tree.resolution_of, inode)
        if resolution is None:
            raise NoEntryError
        pinned = resolution.seq, resolution.time_ns
        if not self.pins.pin(*pinned, wait=False):
            await in_thread(self.pins.pin, *pinned, limiter=self._limiter)
        try:
            # It may have been pruned before it was pinned. Inline only if no thread may be using the catalog.
            if blocked_handlers.count or not self._tree.is_current():
                await in_thread(self._tree.resolution_of, inode, True, limiter=self._tree_limiter)
            await self._view(inode)
        except BaseException:
            await self._unpin(inode)
            raise

    async def _unpin(self, inode: int) -> None:
        seq = unpack_inode(inode)[2]
        if self.pins is not None and not self.pins.unpin(seq, wait=False):
            await in_thread(self.pins.unpin, seq, limiter=self._limiter)

    async def _view(self, inode: int) -> Image:
        if inode not in self._views:
            kind, volume, _ = unpack_inode(inode)
            resolution = await self._query(self._tree.resolution_of, inode)
            if resolution is None or kind is not InodeKind.IMAGE or volume >= len(self._store.volumes):
                raise NoEntryError
            # Another handler may have made one meanwhile: it doesn't matter which of the two stays.
            self._views[inode] = PointInTimeView(self._store, resolution, volume, self._tables)
            if len(self._views) > MAX_VIEWS:
                self._views.popitem(last=False)
        self._views.move_to_end(inode)
        return self._views[inode]

    async def _query(self, query: Callable[..., T], inode: int, *args: object) -> T:
        """`query(inode, …)` of the tree: inline where the tree has the answer in memory, else in a thread."""
        if self._tree.knows(inode):
            return query(inode, *args)
        return await in_thread(query, inode, *args, limiter=self._tree_limiter)

    def _attributes(self, entry: TreeEntry) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = entry.inode
        attributes.st_mode = self._modes[entry.type]
        attributes.st_nlink = entry.nlink
        attributes.st_uid, attributes.st_gid = self._ownership.uid, self._ownership.gid
        attributes.st_size = entry.size
        attributes.st_blocks = -(-entry.size // 512)
        attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = entry.mtime_ns
        timeout = PERMANENT_TIMEOUT_S if entry.permanent else 0.0
        attributes.entry_timeout = attributes.attr_timeout = timeout
        return attributes

    # -------------------------------------------------------------- requests that would write

    async def _refuse(self, *args: object) -> Never:
        raise pyfuse3.FUSEError(self.refusal)

    # The mount is read-only, so the kernel refuses first, unless root remounts it.
    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = _refuse  # type: ignore[assignment]
    link = create = write = setxattr = removexattr = _refuse  # type: ignore[assignment]
