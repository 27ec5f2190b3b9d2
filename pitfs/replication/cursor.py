"""Where the replica stands in the local journal, and what comes next there for it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from pitfs.config.production import Config
from pitfs.errors import CorruptionError, LinkError, PositionMismatchError
from pitfs.journal.reader import Copy, Interval, JournalReader
from pitfs.journal.writer import Location, segment_bytes_for
from pitfs.link.sessions.connect import SenderSession
from pitfs.model.record import CopyProgress
from pitfs.model.transfer import Hello, Welcome
from pitfs.replication.status import ReplicationStatus
from pitfs.splitter.client import SplitterClient
from pitfs.splitter.messages import SplitterStatus
from pitfs.splitter.startup import journal_directory
from pitfs.storage.segment import list_segments

log = logging.getLogger(__name__)

POLL_S: Final = 0.5  # how often the journal is followed between marks, to spread the work of reading it


class JournalCursor:
    """Follows a group's journal for its replica.

    Args:
        splitter: of its control socket.
        give_back: called with the segment before which nothing is needed for shipping any more.

    Attributes:
        reader: where what comes next begins.
        wake: set when there may be something new; made anew for each wait.
        copy_ahead: what comes next is a complete copy, or nothing that can be used before one.
        damaged: mark of an interval whose contents are damaged here, and how.
    """

    def __init__(
        self,
        config: Config,
        hello: Hello,
        splitter: SplitterClient,
        standing: ReplicationStatus,
        give_back: Callable[[int], Awaitable[None]],
    ) -> None:
        self._config, self._hello, self._splitter, self._standing = config, hello, splitter, standing
        self._give_back = give_back
        self._volumes = hello.volumes
        self.directory = journal_directory(config.group.state)
        self.reader = JournalReader(self.directory, [volume.block_size for volume in hello.volumes])
        self.wake = trio.Event()
        self.copy_ahead = False
        self.damaged = (-1, "")

    def bytes_between(self, start: Location, end: Location) -> int:
        """Of the journal."""
        segment_bytes = segment_bytes_for(self._config.journal.capacity_bytes)
        return (end.segment - start.segment) * segment_bytes + end.offset - start.offset

    async def locate(self, welcome: Welcome) -> None:
        """Puts the reader behind what the replica has; where the journal has that no more, a complete copy begins."""
        self.copy_ahead = False
        status = await self._splitter.status()
        if welcome.mark > status.mark:
            raise PositionMismatchError(
                f"the replica has mark {welcome.mark} of group {self._hello.group!r}, this host only "
                f"{status.mark}: "
                "this state directory is an old copy: put the current one back, or begin a new group"
            )
        if welcome.tail_seq > status.seq:
            raise PositionMismatchError(
                f"the replica has write {welcome.tail_seq} of group {self._hello.group!r}, this host only "
                f"{status.seq}: "
                "this state directory is an old copy: put the current one back, or begin a new group"
            )
        if status.copy is not None and welcome.mark >= status.copy.mark:
            # It was committed, and the word of it was lost.
            await self._splitter.copied(CopyProgress(status.copy.mark, len(self._volumes), 0))
        try:
            if welcome.mark == 0:
                found = await self._skip_to_copy(status)
            else:
                found = await self._seek(welcome, status.tail)
        except CorruptionError as error:
            await self.rescan(str(error))
            return
        at = welcome.end
        if not found:
            await self.rescan(
                f"the replica stands behind mark {welcome.mark}, at seq {at[0]}, which the local journal has no more"
            )
        elif welcome.mark and self.reader.position != at:
            raise PositionMismatchError(
                f"the replica has mark {welcome.mark} of group {self._hello.group!r} and seq {at[0]}, this host "
                f"is there at seq {self.reader.position[0]}: another host with a copy of this state has sent it: stop "
                "the one that shouldn't; if this one shall go on, begin a new group"
            )
        elif self._standing.committed_location is None:
            self._standing.committed_location = self.reader.location

    async def _seek(self, welcome: Welcome, tail: Location) -> bool:
        """As `JournalReader.seek_mark`, while the splitter may give segments back. Raises CorruptionError."""
        while True:
            numbers = await trio.to_thread.run_sync(list_segments, self.directory)
            try:
                return await trio.to_thread.run_sync(
                    self.reader.seek_mark, welcome.mark, tail, welcome.tail_seq
                )
            except CorruptionError:
                # Removed or recycled under our eyes? Then it is looked for in what is left.
                if numbers[:1] == (await trio.to_thread.run_sync(list_segments, self.directory))[:1]:
                    raise

    async def _skip_to_copy(self, status: SplitterStatus) -> bool:
        """For a replica that has nothing: the copy that is under way is what it begins with."""
        self.copy_ahead = True
        if status.copy is None:
            return await self._wait_for_copy(status)
        self.reader.seek(status.copy.location, (0, 0))
        return True

    async def _wait_for_copy(self, status: SplitterStatus) -> bool:
        """Gives the journal's room back while writes pass: a copy begins then, and nothing before it can be used.

        False where writes don't pass.
        """
        if not status.bypass_cause:
            return False
        await self._give_back(status.tail.segment)
        self.reader.seek(status.tail, (0, 0))
        return True

    async def rescan(self, cause: str, read_from: Location | None = None) -> None:
        """Has a complete copy begun, with a gap before it, unless one is under way.

        Args:
            read_from: where reading began that led to this.

        Raises:
            LinkError: the one under way has an unreadable beginning; another was begun.
        """
        self.copy_ahead = True
        status = await self._splitter.status()
        if status.copy is not None and read_from == status.copy.location:
            await self.abandon(cause)  # going there once more would lead back here, for ever
        if status.copy is None:
            if await self._wait_for_copy(status):
                return
            status = await self._splitter.rescan(cause)
            log.error("%s: a complete copy follows", cause)
        assert status.copy is not None
        self.reader.seek(status.copy.location, (0, 0))

    async def next_item(self, session: SenderSession, wait: bool = True) -> Interval | Copy | None:
        """Follows the journal until the next mark or copy; None where there is none yet and it shan't wait.

        Raises the session's failure.
        """
        given_up = False
        while True:
            if session.failure is not None:  # nothing else would tell while there is nothing to send
                raise session.failure
            wake = self.wake = trio.Event()
            status = await self._splitter.status()
            read_from = self.reader.location
            try:
                item = await trio.to_thread.run_sync(self.reader.next, status.tail)
            except CorruptionError as error:
                await self.rescan(str(error), read_from)
                continue
            if isinstance(item, Copy):
                # When writes passed unjournalled. Of an attempt that never became durable the number may come again.
                running = status.copy
                given_up = running is None or (running.mark, running.location) != (item.start.mark, item.location)
            if given_up and item is not None:
                # What rests on it can't be applied either: only its room is wanted, for the copy that follows.
                if isinstance(item, Interval):
                    if item.bookmark is not None:
                        log.error("bookmark %r lies in the gap: the replica won't have it", item.bookmark)
                    await self._give_back(item.end.segment)
                continue
            if isinstance(item, Interval) and item.mark == self.damaged[0]:
                await self.rescan(self.damaged[1])
                continue
            if item is not None:
                return item
            if given_up and not status.bypass_cause and status.copy is None:
                # No other copy follows, so that one was completed, and what rests on it isn't for this replica.
                await self.rescan(
                    "the replica stands before a complete copy that it had acknowledged (was its store put back "
                    "to an older state?)"
                )
                continue
            self._standing.getting_through()
            if not wait and not given_up:
                return None
            with trio.move_on_after(POLL_S):
                await wake.wait()

    async def abandon(self, cause: str) -> None:
        """What the journal or the replica had of this copy can't be used: begins it anew. Raises LinkError."""
        status = await self._splitter.status()
        if status.copy is not None or not status.bypass_cause:
            log.error("%s: a complete copy follows", cause)
            await self._splitter.rescan(cause)
        raise LinkError(f"{cause}: connecting anew for a complete copy")
