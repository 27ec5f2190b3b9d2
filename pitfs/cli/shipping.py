"""Joins production and link: what the local journal holds goes to the replica, mark by mark."""

from __future__ import annotations

import logging
import os
from typing import Any, Final

import trio

from pitfs.cli.backfill import Backfill
from pitfs.cli.budget import Budget
from pitfs.cli.sending import payload_bytes_for, send
from pitfs.cli.standing import Standing
from pitfs.config import Config
from pitfs.errors import CorruptionError, LinkError, PitfsError, PositionMismatchError
from pitfs.link.stream import address_text
from pitfs.link.tls import LinkContext
from pitfs.link.transport import SenderSession, connect
from pitfs.model import schedule
from pitfs.model.position import format_instant
from pitfs.model.schedule import next_step
from pitfs.model.transfer import Hello, ResumePoint, VolumeInfo, Welcome
from pitfs.production import copying, shipment
from pitfs.production.control import Connection
from pitfs.production.journal import Location, segment_bytes_for
from pitfs.production.reader import BlockSource, Copy, Interval, JournalReader, make_durable
from pitfs.production.start import journal_directory
from pitfs.storage.files import storage_error
from pitfs.storage.segment import list_segments

log = logging.getLogger(__name__)

POLL_S: Final = 0.5  # how often the journal is followed between marks, to spread the work of reading it
MAX_INTERVAL_ROWS: Final = 1 << 20  # blocks written: building the difference takes some 300 B of RAM for each
WATCH_S: Final = 2.0  # how often that is looked at: seldom for the splitter, often for what may be written


class Shipper:
    """Ships a group.

    Args:
        config: of the group.
        hello: who we are.
        splitter: connection to the splitter's control socket.
        tls: for the link, None on loopback without TLS.
    """

    def __init__(self, config: Config, hello: Hello, splitter: Connection, tls: LinkContext | None) -> None:
        self._config = config
        self._hello = hello
        self._volumes: tuple[VolumeInfo, ...] = hello.volumes
        self._splitter = splitter
        self._tls = tls
        self._directory = journal_directory(config.group.state)
        self._reader = JournalReader(self._directory, [volume.block_size for volume in self._volumes])
        self._wake = trio.Event()
        self._durable_segment = 0  # segments before it were made durable before they were shipped
        self._needed_segment = 0  # what stands before it has been shipped, but for what is wanted for backfill
        self._damaged = (-1, "")  # mark of an interval whose contents are damaged here, and how
        self._last_mark, self._marked_at = -1, Location(0, 0)  # as `watch` saw it
        self._early: set[int] = set()  # marks to be shipped that `watch` set; as few as fit into the journal
        self.standing = Standing(address_text(config.replication.host, config.replication.port))
        self._budget = Budget(config.replication, self.standing)
        self._backfill = Backfill(self._directory, self._volumes, self.standing)

    # -- marks -------------------------------------------------------------------------------------------

    async def mark(self, bookmark: str | None = None) -> dict[str, Any]:
        """Closes the interval now. Raises CapacityError while writes pass unjournalled."""
        reply = await self._splitter.request("mark", bookmark=bookmark)
        self._wake.set()
        return reply

    async def tick(self) -> None:
        """Closes an interval each `interval`, for ever."""
        while True:
            interval_s = self._config.replication.interval_ns / 1e9
            self._budget.tick_at = trio.current_time() + interval_s
            await trio.sleep(interval_s)
            try:
                await self.mark()
            except PitfsError as error:
                log.debug("no mark: %s", error)

    async def watch(self) -> None:
        """Closes an interval early that would take too much memory to ship, for ever."""
        while True:
            try:
                await self._close_large()
            except PitfsError as error:
                log.debug("no mark: %s", error)
            await trio.sleep(WATCH_S)

    async def _close_large(self) -> None:
        """Closes the interval where it may have more than MAX_INTERVAL_ROWS.

        Told by the journal's bytes (each row has its block there), not by what the reader has seen: that one
        stands still while something is sent or the link is down, just when an interval grows. What was written
        while the shipper was away can't be split any more: a mark only ever stands at the tail.
        """
        tail, splitter = await self._tail()
        smallest = min(volume.block_size for volume in self._volumes)
        if splitter["mark"] != self._last_mark:  # whoever set it
            self._last_mark, self._marked_at = splitter["mark"], tail
            self._wake.set()
        elif self._bytes_between(self._marked_at, tail) > MAX_INTERVAL_ROWS * smallest:
            self._early.add((await self.mark())["mark"])

    def _bytes_between(self, start: Location, end: Location) -> int:
        segment_bytes = segment_bytes_for(self._config.journal.capacity_bytes)
        return (end.segment - start.segment) * segment_bytes + end.offset - start.offset

    # -- the link ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ships for ever; reconnects with backoff."""
        while True:
            try:
                await self._connect()
            except PitfsError as error:
                self.standing.link_down(error)
            except OSError as error:  # where no complete copy would help: it reads the same
                where = error.filename or f"{self._hello.group}: a backing volume or the journal"
                self.standing.link_down(storage_error(error, where, "reading"))
            await self.standing.back_off()

    async def _connect(self) -> None:
        replication = self._config.replication
        async with connect(
            replication.host,
            replication.port,
            tls=self._tls,
            hello=self._hello,
            rate_bytes_per_s=replication.rate_bytes_per_s,
            queue_bytes=4 * payload_bytes_for(self._budget.rate),
        ) as session:
            log.debug("connected to %s, which has mark %d", session.peer, session.welcome.mark)
            self.standing.connected = True
            session.on_progress = self.standing.getting_through
            self.standing.arrived(session.welcome, None)
            await self._locate(session.welcome)
            while True:
                await self._go_on(session)

    async def _go_on(self, session: SenderSession) -> None:
        """One turn: the next diff or copy; else layers of a journal that waits; else it is waited for something."""
        item = await self._next_item(session, wait=not self._backfill.waiting)
        if isinstance(item, Copy):
            await self._ship_copy(session, item)
        elif isinstance(item, Interval):
            await self._ship_interval(session, item)
        else:
            await self._ship_layers(session)

    async def _tail(self) -> tuple[Location, dict[str, Any]]:
        reply = await self._splitter.request("tail")
        return Location(reply["segment"], reply["offset"]), reply

    async def _locate(self, welcome: Welcome) -> None:
        """Puts the reader behind the replica's last mark, or has a complete copy begun where that is gone."""
        tail, splitter = await self._tail()
        if welcome.mark > splitter["mark"]:
            raise PositionMismatchError(
                f"the replica has mark {welcome.mark} of group {self._hello.group!r}, this host only "
                f"{splitter['mark']}: "
                "this state directory is an old copy: put the current one back, or begin a new group"
            )
        if splitter["copy_mark"] is not None and welcome.mark >= splitter["copy_mark"]:
            # It was committed, and the word of it was lost.
            await self._splitter.request(
                "copied", mark=splitter["copy_mark"], volume=len(self._volumes), block=0
            )
        try:
            if welcome.mark == 0:
                found = await self._skip_to_copy(splitter)
            else:
                found = await self._seek(welcome.mark, tail)
        except CorruptionError as error:
            await self._rescan(str(error))
            return
        if not found:
            await self._rescan(
                f"the replica stands at mark {welcome.mark}, which the local journal has no more"
            )
        elif welcome.mark and self._reader.position != (welcome.seq, welcome.time_ns):
            raise PositionMismatchError(
                f"the replica has mark {welcome.mark} of group {self._hello.group!r} at seq {welcome.seq}, this host "
                f"at seq {self._reader.position[0]}: another host with a copy of this state has sent it: stop the one "
                "that shouldn't; if this one shall go on, begin a new group"
            )
        else:
            if self.standing.committed_location is None:
                self.standing.committed_location = self._reader.location
            if self._config.replication.mode != "snapshot":
                self._backfill.restore(welcome.coarse, list(self._reader.seen))

    async def _seek(self, mark: int, tail: Location) -> bool:
        """As `JournalReader.seek_mark`, while the splitter may give segments back. Raises CorruptionError."""
        while True:
            numbers = await trio.to_thread.run_sync(list_segments, self._directory)
            try:
                return await trio.to_thread.run_sync(self._reader.seek_mark, mark, tail)
            except CorruptionError:
                # Removed or recycled under our eyes? Then it is looked for in what is left.
                if numbers[:1] == (await trio.to_thread.run_sync(list_segments, self._directory))[:1]:
                    raise

    async def _skip_to_copy(self, splitter: dict[str, Any]) -> bool:
        """For a replica that has nothing: the copy that is under way is what it begins with."""
        if splitter["copy_mark"] is None:
            return await self._wait_for_copy(splitter)
        self._reader.seek(Location(splitter["copy_segment"], splitter["copy_offset"]), (0, 0))
        return True

    async def _wait_for_copy(self, splitter: dict[str, Any]) -> bool:
        """Gives the journal's room back while writes pass: a copy begins then, and nothing before it can be used.

        False where writes don't pass.
        """
        if not splitter["passing"]:
            return False
        await self._give_back(splitter["segment"])
        self._reader.seek(Location(splitter["segment"], splitter["offset"]), (0, 0))
        return True

    async def _rescan(self, cause: str, read_from: Location | None = None) -> None:
        """Has a complete copy begun, with a gap before it, unless one is under way.

        Args:
            read_from: where reading began that led to this.

        Raises:
            LinkError: the one under way has an unreadable beginning; another was begun.
        """
        _, reply = await self._tail()
        if reply["copy_mark"] is not None and read_from == Location(
            reply["copy_segment"], reply["copy_offset"]
        ):
            await self._abandon(cause)  # going there once more would lead back here, for ever
        if reply["copy_mark"] is None:
            if await self._wait_for_copy(reply):
                return
            reply = await self._splitter.request("rescan", cause=cause)
            log.error("%s: a complete copy follows", cause)
        self._reader.seek(Location(reply["copy_segment"], reply["copy_offset"]), (0, 0))

    async def _next_item(self, session: SenderSession, wait: bool = True) -> Interval | Copy | None:
        """Follows the journal until the next mark or copy; None where there is none yet and it shan't wait.

        Raises the session's failure.
        """
        given_up = False
        while True:
            if session.failure is not None:  # nothing else would tell while there is nothing to send
                raise session.failure
            wake = self._wake = trio.Event()
            tail, splitter = await self._tail()
            read_from = self._reader.location
            try:
                item = await trio.to_thread.run_sync(self._reader.next, tail)
            except CorruptionError as error:
                await self._rescan(str(error), read_from)
                continue
            if isinstance(item, Copy):
                # When writes passed unjournalled. Of an attempt that never became durable the number may come again.
                running = Location(splitter["copy_segment"], splitter["copy_offset"])
                given_up = splitter["copy_mark"] != item.start.mark or item.location != running
            if given_up and item is not None:
                # What rests on it can't be applied either: only its room is wanted, for the copy that follows.
                if isinstance(item, Interval):
                    if item.bookmark is not None:
                        log.error("bookmark %r lies in the gap: the replica won't have it", item.bookmark)
                    await self._give_back(item.end.segment)
                continue
            if isinstance(item, Interval) and item.mark == self._damaged[0]:
                await self._rescan(self._damaged[1])
                continue
            if item is not None:
                return item
            if given_up and not splitter["passing"] and splitter["copy_mark"] is None:
                # No other copy follows, so that one was completed, and what rests on it isn't for this replica.
                await self._rescan(
                    "the replica stands before a complete copy that it had acknowledged (was its store put back "
                    "to an older state?)"
                )
                continue
            self.standing.getting_through()
            if not wait and not given_up:
                return None
            with trio.move_on_after(POLL_S):
                await wake.wait()

    # -- transfers ---------------------------------------------------------------------------------------

    async def _ship_copy(self, session: SenderSession, copy: Copy) -> None:
        before = session.welcome.mark
        if not shipment.leads_on(copy, session.welcome):
            await self._abandon("the replica hasn't the state that the changed blocks build on")
        manifest = shipment.copy_manifest(copy, self._hello.history, session.welcome)
        resume = await session.begin(manifest)
        self.standing.begun()
        # Now, not when the word of the commit comes: that may be lost, and the marks before are so in any case.
        self.standing.lost = (before, copy.start.mark, copy.start.cause)
        behind = f" behind {resume.lengths[1]} bytes" if resume.cursor else ""
        log.info("%s begins, mark %d%s", copy.what, copy.start.mark, behind)
        fds = [os.open(volume.backing, os.O_RDONLY | os.O_CLOEXEC) for volume in self._config.volumes]

        def tail() -> Location:
            location, splitter = trio.from_thread.run(self._tail)
            if splitter["copy_mark"] != copy.start.mark:
                raise LinkError("the copy under way was given up: writes passed unjournalled meanwhile")
            return location

        try:
            iterator = copying.frames(
                self._directory, self._volumes, fds, copy.location, copy.start.mark, resume, tail
            )

            async def on_durable(point: ResumePoint) -> None:
                if len(point.cursor) == 2:
                    volume, block = point.cursor
                    await self._splitter.request("copied", mark=copy.start.mark, volume=volume, block=block)

            await send(session, iterator, self.standing, on_durable=on_durable)
        except (CorruptionError, PositionMismatchError) as error:
            # Only what we see for ourselves makes all be copied again: damage here, or a replica that resumes
            # before what it had acknowledged. A peer's word needs no copy to get on: the next session's resume
            # point says where it stands.
            if error is session.failure:
                raise
            await self._abandon(str(error))
        finally:
            for fd in fds:
                os.close(fd)
        await self._splitter.request("copied", mark=copy.start.mark, volume=len(self._volumes), block=0)
        self.standing.getting_through()
        self.standing.arrived(session.welcome, copy.location)
        self.standing.settle(copy.start.mark)
        log.info("%s committed, mark %d", copy.what, copy.start.mark)

    async def _abandon(self, cause: str) -> None:
        """What the journal or the replica had of this copy can't be used: begins it anew. Raises LinkError."""
        reply = (await self._tail())[1]
        if reply["copy_mark"] is not None or not reply["passing"]:
            log.error("%s: a complete copy follows", cause)
            await self._splitter.request("rescan", cause=cause)
        raise LinkError(f"{cause}: connecting anew for a complete copy")

    async def _ship_interval(self, session: SenderSession, interval: Interval) -> None:
        """The interval's snapshot diff; its difference journal waits then."""
        sizes = [volume.block_size for volume in self._volumes]
        source = BlockSource(self._directory, interval, sizes)
        wants_journal = self._config.replication.mode != "snapshot"
        try:
            # The replica mustn't have what a power loss takes from here: its marks couldn't be led on from.
            last = interval.end.segment
            await trio.to_thread.run_sync(make_durable, self._directory, self._durable_segment, last)
            self._durable_segment = last
            prepared = await trio.to_thread.run_sync(
                shipment.prepare, interval, self._volumes, source, wants_journal
            )
            decision = self._budget.decide(prepared, interval.mark in self._early)
            cause = decision.reason if decision.granularity_ns is None else "its difference journal follows"
            resume = await session.begin(shipment.diff_manifest(prepared, cause))
            self.standing.begun()
            payload_bytes = payload_bytes_for(self._budget.rate)
            iterator = shipment.diff_frames(prepared, source, self._volumes, resume, payload_bytes)
            await send(session, iterator, self.standing)
        except CorruptionError as error:
            source.close()
            # On the next connection the replica wants this one again: then it's passed over for the copy.
            self._damaged = interval.mark, str(error)
            await self._rescan(str(error))
            raise LinkError(f"{error}: connecting anew for a complete copy") from error
        except BaseException:
            source.close()
            raise
        self.standing.last_decision = decision
        self._backfill.add(prepared, source)
        await self._give_back(interval.end.segment)
        self.standing.getting_through()
        self.standing.arrived(session.welcome, interval.end)
        if decision.granularity_ns is None or prepared.journal is None:
            self.standing.settle(interval.mark)
        self._early = {mark for mark in self._early if mark > interval.mark}
        log.debug("interval committed, mark %d, %d writes", interval.mark, len(interval.times))

    async def _ship_layers(self, session: SenderSession) -> None:
        """What goes next of the journals that wait; puts it off where a diff is due."""
        step = next_step(
            diff_due=self._wake.is_set(), waiting=self._backfill.waiting, room_bytes=self._budget.room_bytes()
        )
        if step.kind in (schedule.Kind.DIFF, schedule.Kind.WAIT):
            return
        log.debug("next: %s", step)
        try:
            await self._backfill.build(step.mark, (await self._tail())[0])
            if step.kind is schedule.Kind.LAYERS:
                await self._backfill.ship(session, step, self._budget.rate, lambda: self._wake.is_set())
                self.standing.settle(step.mark)
        except CorruptionError as error:
            if error is session.failure:
                raise
            await self._backfill.give_up(session, step.mark, error)
            self.standing.settle(step.mark)
        await self._give_back(self._needed_segment)

    async def _give_back(self, segment: int) -> None:
        """Segments before that one aren't needed for shipping any more; some are wanted for backfill."""
        self._needed_segment = max(self._needed_segment, segment)
        wanted = self._backfill.wanted_segment(self._needed_segment)
        await self._splitter.request("release", segment=self._needed_segment, wanted=wanted)

    # -- for people --------------------------------------------------------------------------------------

    async def status(self, now_ns: int) -> dict[str, Any]:
        """The keys of INTERFACE: status --json, and more."""
        standing, (tail, splitter) = self.standing, await self._tail()
        committed, location = standing.committed, standing.committed_location
        protected = committed.protected_through_ns if committed and committed.mark else None
        lag_bytes = splitter["used_bytes"]
        if location is not None:
            lag_bytes = self._bytes_between(location, tail)
        decision, rate = standing.last_decision, self._config.replication.rate_bytes_per_s
        return {
            "role": "production",
            "group": self._hello.group,
            "protected_through": format_instant(protected) if protected else None,
            "lag_bytes": lag_bytes,
            "lag_seconds": round(max(0, now_ns - protected) / 1e9, 3) if protected else None,
            "backfill_intervals": len(self._backfill.waiting),
            "lag_intervals": splitter["mark"] - (committed.mark if committed else 0),
            "journal_bytes": splitter["used_bytes"],
            "journal_capacity_bytes": splitter["capacity_bytes"],
            "rate_bytes_per_s": rate if rate is not None else self.standing.measured_rate,
            "last_decision": decision
            and {"granularity_ns": decision.granularity_ns, "reason": decision.reason},
            "holders": [],
            "seq": splitter["seq"],
            "link": standing.link,
            "passing": splitter["passing"] or None,
            "writes_waiting": splitter["waiting"] or None,
            "changed_bytes": splitter["changed_bytes"],
            "copying": splitter["copy_mark"] is not None,
            "copying_bytes": splitter["copying_bytes"],
        }
