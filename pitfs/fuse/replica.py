"""The replica's mount: translates requests to the tree and the view, errors to errno. Nothing else.

Handlers keep no state that an answer hangs on: a file handle is the inode number, and the inode number says
which image of which instant it is. What is in memory is answered inline, data in the page cache are read inline
into one buffer; what may need the disk goes to a thread, so that one slow block doesn't keep the others waiting.

An instant has one seq, however it is named, and so one inode for each volume: the kernel keeps its pages once, for
all names and openings. Two instants are two inodes, also where their blocks are the same: FUSE has no way to say that
pages are shared. Their blocks stand in the same place of an object, whose pages the kernel has once; that is all.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import itertools
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Never, Protocol, Self, TypeVar

import pyfuse3
import trio

from pitfs.fuse.handlers import failed, guard, in_thread
from pitfs.fuse.request_loop import waiting
from pitfs.store.store import Store
from pitfs.view.inodes import ROOT_INODE, EntryType, InodeKind, NoEntryError, TreeEntry, unpack_inode
from pitfs.view.tree import Tree
from pitfs.view.view import MAX_TABLE_CACHE_BYTES, PointInTimeView, ReadBuffer, TableCache

if TYPE_CHECKING:
    from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, ReaddirToken, RequestContext, XAttrNameT

    from pitfs.fuse.mount import MountRequest
    from pitfs.store.pins.pins import Pins

PERMANENT_TIMEOUT_S: Final = 300.0  # what never changes may only be pruned
# The kernel asks for the root on the way of every path; its mtime, which needs the catalog, may be this late.
# Not a timeout of the kernel's: the root of a dead mount would seem alive for as long.
ROOT_LATE_S: Final = 1.0
# But for a moment: of 10,000 paths that ls -l walks each would ask.
ROOT_TIMEOUT_S: Final = 0.05
MAX_VIEWS: Final = 1024  # images with resolved tables at hand; a view is some 300 bytes
MAX_THREADS: Final = 16  # of all processes, cold reads under way: what a disk likes to have queued
MAX_LISTINGS: Final = 16  # begun ones kept at hand; each holds at most a page of the catalog, and of bookmarks
NAME_MAX: Final = 255
USER_ATTRIBUTES: Final = b"user."  # the one namespace of extended attributes that there is

T = TypeVar("T")
Listed = tuple[str, TreeEntry, int]  # name, entry, cookie of what follows
handler = guard({NoEntryError: errno.ENOENT})


class Image(Protocol):
    """A `PointInTimeView`, or what is read like one."""

    def read(self, offset: int, size: int, buffer: ReadBuffer, /) -> memoryview: ...
    def try_read_cached(self, offset: int, size: int, buffer: ReadBuffer, /) -> memoryview | None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Ownership:
    """Who may read: images have `mode`; directories can be read and entered where that can be read."""

    uid: int = 0
    gid: int = 0
    mode: int = 0o400

    @property
    def directory_mode(self) -> int:
        return self.mode & 0o444 | (self.mode & 0o444) >> 2


def opened(request: MountRequest) -> tuple[Store, Tree, Ownership]:
    """What the handlers of a mount like that serve.

    Raises:
        PitfsError: the store can't be opened, or not be shown.
    """
    store = Store.open(request.store)
    try:
        tree = Tree(store, time.time_ns, request.zone, request.strict)
    except BaseException:
        store.close()
        raise
    return store, tree, Ownership(request.uid, request.gid, request.mode)


class Replica(pyfuse3.Operations):
    """pyfuse3 handlers over one store."""

    supports_dot_lookup = False
    holder: Pins | None = None  # that holds what open images show

    def __init__(self, store: Store, tree: Tree, ownership: Ownership) -> None:
        super().__init__()
        self._store = store
        self._tree = tree
        self._ownership = ownership
        self._modes = {
            EntryType.DIRECTORY: stat.S_IFDIR | ownership.directory_mode,
            EntryType.FILE: stat.S_IFREG | ownership.mode,
            EntryType.LINK: stat.S_IFLNK | 0o777,
        }
        self._tables = TableCache()
        self._views: collections.OrderedDict[int, Image] = collections.OrderedDict()
        # One buffer for all inline reads: pyfuse3 sends what a handler returns before any other task runs.
        self._buffer = ReadBuffer()
        self._spare_buffers: list[ReadBuffer] = []
        self._limiter = trio.CapacityLimiter(MAX_THREADS)
        # Listings whose last reply was full, by directory and the cookie to go on from: (what had no room, the
        # rest). One that isn't here any more begins at its cookie again, which takes longer.
        self._listings: dict[tuple[int, int], tuple[Listed, Iterator[Listed]]] = {}
        self._root: pyfuse3.EntryAttributes | None = None
        self._root_until = 0.0
        self._tree_limiter = trio.CapacityLimiter(1)  # the tree isn't made for several threads

    @classmethod
    def for_mount(cls, request: MountRequest) -> Self:
        """The handlers of a mount like that, over a store of their own. Raises as `opened`."""
        made = cls(*opened(request))
        made._tables = TableCache(MAX_TABLE_CACHE_BYTES // request.workers)
        made._limiter = trio.CapacityLimiter(max(MAX_THREADS // request.workers, 1))  # each thread has a MiB's buffer
        return made

    @property
    def history(self) -> str:
        """Which history the store has, 32 hex digits."""
        return self._store.history

    def close(self) -> None:
        """Called when no handler is under way any more."""
        self._store.close()

    # -------------------------------------------------------------- names and attributes

    @handler
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(await self._ask(self._tree.lookup, parent_inode, name))

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        if inode != ROOT_INODE:
            return self._attributes(await self._ask(self._tree.entry, inode))
        if self._root is None or trio.current_time() >= self._root_until:
            self._root = self._attributes(await self._ask(self._tree.entry, inode))
            self._root.attr_timeout = ROOT_TIMEOUT_S
            self._root_until = trio.current_time() + ROOT_LATE_S
        return self._root

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return (await self._ask(self._tree.target, inode)).encode()

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return inode  # the kernel has asked whether it is a directory; that it is gone, readdir says

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        if start_id == 0:  # what was read ahead before is too old
            self._forget_listings(fh)
        await self._ask(self._reply_listing, fh, start_id, token)

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
        # ls -l asks for three others of every entry, unless told that there are none; the kernel before each write.
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
        await self._open_held(inode)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: FileHandleT, off: int, size: int) -> memoryview:  # type: ignore[override]
        # Guarded as the other handlers, but here: one coroutine less on the way of every read.
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
            # Free again at once: nothing runs between this return and pyfuse3's reply.
            if len(self._spare_buffers) < MAX_THREADS:
                self._spare_buffers.append(buffer)

    @handler
    async def release(self, fh: FileHandleT) -> None:
        await self._let_go(fh)

    async def _open_held(self, inode: int) -> None:
        """An image is opened: what it shows stays in the store until `_let_go`, in whichever process that is."""
        if self.holder is None:
            await self._view(inode)
            return
        resolution = await self._ask(self._tree.resolution_of, inode)
        if resolution is None:
            raise NoEntryError
        held = resolution.seq, resolution.time_ns
        if not self.holder.pin(*held, wait=False):
            await in_thread(self.holder.pin, *held, limiter=self._limiter)
        try:
            # It may have been removed before it was held. Asked inline if no thread has the catalog.
            if waiting.count or not self._tree.is_current():
                await in_thread(self._tree.resolution_of, inode, True, limiter=self._tree_limiter)
            await self._view(inode)
        except BaseException:
            await self._let_go(inode)
            raise

    async def _let_go(self, inode: int) -> None:
        seq = unpack_inode(inode)[2]
        if self.holder is not None and not self.holder.unpin(seq, wait=False):
            await in_thread(self.holder.unpin, seq, limiter=self._limiter)

    async def _view(self, inode: int) -> Image:
        if inode not in self._views:
            kind, volume, _ = unpack_inode(inode)
            resolution = await self._ask(self._tree.resolution_of, inode)
            if resolution is None or kind is not InodeKind.IMAGE or volume >= len(self._store.volumes):
                raise NoEntryError
            # Another may have made one meanwhile: which of the two stays doesn't matter.
            self._views[inode] = PointInTimeView(self._store, resolution, volume, self._tables)
            if len(self._views) > MAX_VIEWS:
                self._views.popitem(last=False)
        self._views.move_to_end(inode)
        return self._views[inode]

    async def _ask(self, question: Callable[..., T], inode: int, *args: object) -> T:
        """`question(inode, …)`, one of the tree's: inline where it knows the answer, else in a thread."""
        if self._tree.knows(inode):
            return question(inode, *args)
        return await in_thread(question, inode, *args, limiter=self._tree_limiter)

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

    # -------------------------------------------------------------- everything that would write

    async def _refuse(self, *args: object) -> Never:
        raise pyfuse3.FUSEError(errno.EROFS)

    # The mount is read-only, so the kernel refuses first, unless root remounts it.
    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = _refuse  # type: ignore[assignment]
    link = create = write = setxattr = removexattr = _refuse  # type: ignore[assignment]
