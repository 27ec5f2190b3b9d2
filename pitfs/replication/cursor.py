"""The position of the replica in the local journal, and what comes next for it there."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import trio

from pitfs.errors import CorruptionError, LinkError, PositionMismatchError
from pitfs.journal.reader import Copy, Interval, JournalReader
from pitfs.journal.search import Found
from pitfs.journal.writer import Location
from pitfs.model.record import CopyProgress
from pitfs.model.transfer import Welcome
from pitfs.replication.phases import Phase
from pitfs.replication.ports import Session, ShipperSettings
from pitfs.replication.status import ReplicationStatus
from pitfs.splitter.messages import SplitterClient
from pitfs.storage.segment import list_segments

log = logging.getLogger(__name__)

POLL_S: Final = 0.5  # how often the journal is followed between marks, to spread the work of reading it
OLD_COPY: Final = "this state directory is an old copy: put the current one back, or begin a new group"


class JournalCursor:
    """Follows a group's journal for its replica. It decides when only a copy leads on: phase AWAITING_COPY.

    Args:
        release: called with the segment before which nothing is needed for shipping any more.

    Attributes:
        reader: where what comes next begins.
        wake: set when there may be something new; made anew for each wait.
    """

    def __init__(
        self,
        settings: ShipperSettings,
        splitter: SplitterClient,
        status: ReplicationStatus,
        release: Callable[[int], Awaitable[None]],
    ) -> None:
        self._directory, self._hello = settings.journal_directory, settings.hello
        self._splitter, self._status, self._release = splitter, status, release
        self.reader = JournalReader(self._directory, settings.block_sizes)
        self.wake = trio.Event()
        self._damaged_mark, self._damage = 0, ""  # of the last interval whose contents were found damaged

    async def locate(self, welcome: Welcome) -> None:
        """Puts the reader behind what the replica has; where the journal has that no more, a complete copy begins.

        Raises PositionMismatchError where the replica has what this host never had.
        """
        splitter = await self._splitter.status()
        group = self._hello.group
        compared = ("mark", welcome.mark, splitter.mark), ("write", welcome.streamed_seq, splitter.seq)
        for what, there, here in compared:
            if there > here:
                raise PositionMismatchError(
                    f"the replica has {what} {there} of group {group!r}, this host only {here}: {OLD_COPY}"
                )
        if splitter.copy is not None and welcome.mark >= splitter.copy.mark:
            # It was committed, and the acknowledgement was lost.
            await self._splitter.copied(CopyProgress(splitter.copy.mark, len(self._hello.volumes), 0))
        try:
            found = await self._seek(welcome, splitter.tail) if welcome.mark else Found.ERASED
        except CorruptionError as error:
            await self.rescan(str(error))
            return
        seq = welcome.end[0]
        if found is Found.ERASED:
            await self.rescan(
                f"the replica stands behind mark {welcome.mark}, at seq {seq}, which the local journal has no more"
            )
            if welcome.mark == 0:  # it begins with the copy that is under way, or comes now
                self._status.located(self.reader.location)
        elif found is Found.NEVER or self.reader.position != welcome.end:
            raise PositionMismatchError(
                f"the replica has mark {welcome.mark} of group {group!r} at seq {seq}, this host "
                "was never there: another host with a copy of this state has sent it: stop "
                "the one that shouldn't; if this one shall go on, begin a new group"
            )
        else:
            self._status.located(self.reader.location)
            self._status.enter(Phase.WAITING)

    async def _seek(self, welcome: Welcome, tail: Location) -> Found:
        """Behind what the replica has, while the splitter may recycle segments. Raises CorruptionError."""
        while True:
            numbers = await trio.to_thread.run_sync(list_segments, self._directory)
            try:
                if welcome.streamed_seq:
                    return await trio.to_thread.run_sync(self.reader.seek_write, welcome.streamed_seq, tail)
                return await trio.to_thread.run_sync(self.reader.seek_mark, welcome.mark, welcome.seq, tail)
            except CorruptionError:
                # Removed or recycled meanwhile? Then the place is looked for in what is left.
                if numbers[:1] == (await trio.to_thread.run_sync(list_segments, self._directory))[:1]:
                    raise

    async def rescan(self, cause: str, read_from: Location | None = None) -> None:
        """Has a complete copy begun, with a gap before it, unless one is under way; it is what comes next.

        Args:
            read_from: where reading began that led to this.

        Raises:
            LinkError: the one under way has an unreadable beginning; another was begun.
        """
        splitter = await self._splitter.status()
        if splitter.copy is not None and read_from == splitter.copy.location:
            await self.abandon(cause)  # going there once more would lead back here, for ever
        if splitter.copy is None and splitter.bypass_cause:
            # A copy begins at its end, and nothing before is usable: the journal's room is given back.
            location = splitter.tail
            await self._release(location.segment)
        else:
            if splitter.copy is None:
                splitter = await self._splitter.rescan(cause)
                log.error("%s: a full sync follows", cause)
            assert splitter.copy is not None
            location = splitter.copy.location
        self.reader.seek(location, (0, 0))
        self._status.enter(Phase.AWAITING_COPY)

    async def abandon(self, cause: str) -> NoReturn:
        """Begins a copy anew where the journal or the replica has an unusable part of it. Raises LinkError."""
        splitter = await self._splitter.status()
        if splitter.copy is not None or not splitter.bypass_cause:
            log.error("%s: a full sync follows", cause)
            await self._splitter.rescan(cause)
        raise LinkError(f"{cause}: connecting anew for a full sync")

    async def give_up(self, interval: Interval, error: CorruptionError) -> NoReturn:
        """Has a complete copy begun for an interval whose contents are damaged. Raises LinkError.

        On the next connection the replica wants this one again: then it is passed over for the copy, not tried again.
        """
        self._damaged_mark, self._damage = interval.mark, str(error)
        await self.rescan(self._damage)
        raise LinkError(f"{error}: connecting anew for a full sync") from error

    async def next_item(self, session: Session, wait: bool = True) -> Interval | Copy | None:
        """Follows the journal until the next mark or copy; None where there is none yet and it shan't wait.

        A copy that was given up (writes bypassed the journal while it ran) is passed over with all that rests on it:
        another one follows.

        Raises the session's failure.
        """
        is_given_up = False  # the copy that was met last
        while True:
            if session.failure is not None:  # nothing else would tell while there is nothing to send
                raise session.failure
            wake = self.wake = trio.Event()
            splitter = await self._splitter.status()
            read_from = self.reader.location
            try:
                item = await trio.to_thread.run_sync(self.reader.next, splitter.tail)
            except CorruptionError as error:
                await self.rescan(str(error), read_from)
                continue
            if isinstance(item, Copy):
                # Of an attempt that never became durable the number may come again: so the location counts, too.
                running, met = splitter.copy, (item.start.mark, item.location)
                is_given_up = running is None or (running.mark, running.location) != met
                if not is_given_up:
                    return item
            elif isinstance(item, Interval):
                if is_given_up or self._status.phase is Phase.AWAITING_COPY:
                    # It can't be applied: only its room is wanted, for the copy that follows.
                    if item.bookmark is not None:
                        log.error("bookmark %r lies in the gap: the replica won't have it", item.bookmark)
                    await self._release(item.end.segment)
                elif item.mark == self._damaged_mark:
                    await self.rescan(self._damage)
                else:
                    return item
            elif is_given_up and not splitter.bypass_cause and splitter.copy is None:
                # No other copy follows, so that one was completed, and what rests on it isn't for this replica.
                await self.rescan(
                    "the replica stands before a full sync that it had acknowledged (was its store put back "
                    "to an older state?)"
                )
            else:
                self._status.got_through()
                if not wait and not is_given_up:
                    return None
                with trio.move_on_after(POLL_S):
                    await wake.wait()
