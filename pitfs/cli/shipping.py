"""Joins production and link: what the local journal holds goes to the replica, mark by mark."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import trio

from pitfs.cli.standing import Standing
from pitfs.config import Config
from pitfs.errors import CorruptionError, LinkError, PitfsError, PositionMismatchError
from pitfs.link.stream import address_text
from pitfs.link.tls import LinkContext
from pitfs.link.transport import SenderSession, connect
from pitfs.model.granularity import Decision, decide
from pitfs.model.position import format_instant
from pitfs.model.transfer import (
    Checkpoint,
    Data,
    End,
    Hello,
    TransferFrame,
    VolumeInfo,
    Welcome,
)
from pitfs.production import copying, shipment
from pitfs.production.control import Connection
from pitfs.production.journal import Location, journal_path, segment_bytes_for
from pitfs.production.reader import BlockSource, Copy, Interval, JournalReader
from pitfs.production.start import journal_directory
from pitfs.storage.files import fsync_directory, storage_error
from pitfs.storage.segment import DATA_OFFSET, list_segments

log = logging.getLogger(__name__)

POLL_S: Final = 0.5  # how often the journal is followed between marks, to spread the work of reading it
BATCH_BYTES: Final = 4 << 20  # frames made for each hop to a thread
MEASURABLE_BYTES: Final = 4 << 20  # smaller transfers measure delay, not rate


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
        self.standing = Standing(address_text(config.replication.host, config.replication.port))

    # -- marks -------------------------------------------------------------------------------------------

    async def mark(self, bookmark: str | None = None) -> dict[str, Any]:
        """Closes the interval now. Raises CapacityError while writes pass unjournalled."""
        reply = await self._splitter.request("mark", bookmark=bookmark)
        self._wake.set()
        return reply

    async def tick(self) -> None:
        """Closes an interval each `interval`, for ever."""
        while True:
            await trio.sleep(self._config.replication.interval_ns / 1e9)
            try:
                await self.mark()
            except PitfsError as error:
                log.debug("no mark: %s", error)

    # -- the link ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ships for ever; reconnects with backoff."""
        while True:
            try:
                await self._connect()
            except PitfsError as error:
                self.standing.link_down(error)
            await self.standing.back_off()

    async def _connect(self) -> None:
        replication = self._config.replication
        async with connect(
            replication.host,
            replication.port,
            tls=self._tls,
            hello=self._hello,
            rate_bytes_per_s=replication.rate_bytes_per_s,
        ) as session:
            log.debug("connected to %s, which has mark %d", session.peer, session.welcome.mark)
            self.standing.connected = True
            session.on_progress = self.standing.getting_through
            self.standing.arrived(session.welcome, None)
            await self._locate(session.welcome)
            while True:
                item = await self._next_item()
                if isinstance(item, Copy):
                    await self._ship_copy(session, item)
                else:
                    await self._ship_interval(session, item)

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
                numbers = await trio.to_thread.run_sync(list_segments, self._directory)
                self._reader.seek(Location(numbers[0], DATA_OFFSET), (0, 0))
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
        elif self.standing.committed_location is None:
            self.standing.committed_location = self._reader.location

    async def _seek(self, mark: int, tail: Location) -> bool:
        """As `JournalReader.seek_mark`, while the splitter may give segments back. Raises CorruptionError."""
        while True:
            numbers = await trio.to_thread.run_sync(list_segments, self._directory)
            try:
                return await trio.to_thread.run_sync(self._reader.seek_mark, mark, tail)
            except (CorruptionError, FileNotFoundError):
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
        await self._splitter.request("release", segment=splitter["segment"])
        self._reader.seek(Location(splitter["segment"], splitter["offset"]), (0, 0))
        return True

    async def _rescan(self, cause: str) -> None:
        """Has a complete copy begun, with a gap before it, unless one is under way."""
        _, reply = await self._tail()
        if reply["copy_mark"] is None:
            if await self._wait_for_copy(reply):
                return
            reply = await self._splitter.request("rescan", cause=cause)
            log.error("%s: a complete copy follows", cause)
        self._reader.seek(Location(reply["copy_segment"], reply["copy_offset"]), (0, 0))

    async def _next_item(self) -> Interval | Copy:
        """Follows the journal until the next mark or copy."""
        given_up = False
        while True:
            wake = self._wake = trio.Event()
            tail, splitter = await self._tail()
            try:
                item = await trio.to_thread.run_sync(self._reader.next, tail)
            except CorruptionError as error:
                await self._rescan(str(error))
                continue
            if isinstance(item, Copy):
                given_up = splitter["copy_mark"] != item.start.mark  # when writes passed unjournalled
            if given_up and item is not None:
                # What rests on it can't be applied either: only its room is wanted, for the copy that follows.
                if isinstance(item, Interval):
                    if item.bookmark is not None:
                        log.error("bookmark %r lies in the gap: the replica won't have it", item.bookmark)
                    await self._splitter.request("release", segment=item.end.segment)
                continue
            if item is not None:
                return item
            self.standing.getting_through()
            with trio.move_on_after(POLL_S):
                await wake.wait()

    # -- transfers ---------------------------------------------------------------------------------------

    async def _ship_copy(self, session: SenderSession, copy: Copy) -> None:
        before = session.welcome.mark
        manifest = shipment.copy_manifest(copy, self._hello.history, session.welcome)
        resume = await session.begin(manifest)
        self.standing.begun()
        log.info(
            "complete copy begins, mark %d%s",
            copy.start.mark,
            f" behind {resume.lengths[1]} bytes" if resume.cursor else "",
        )
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
            await self._send(session, iterator, copy)
        except (CorruptionError, PositionMismatchError) as error:
            await self._abandon(str(error))
        finally:
            for fd in fds:
                os.close(fd)
        await self._splitter.request("copied", mark=copy.start.mark, volume=len(self._volumes), block=0)
        self.standing.getting_through()
        self.standing.lost = (before, copy.start.mark, copy.start.cause)
        self.standing.arrived(session.welcome, copy.location)
        log.info("complete copy committed, mark %d", copy.start.mark)

    async def _abandon(self, cause: str) -> None:
        """What the journal or the replica had of this transfer can't be used: begin anew."""
        reply = (await self._tail())[1]
        if reply["copy_mark"] is not None or not reply["passing"]:
            log.error("%s: a complete copy follows", cause)
            await self._splitter.request("rescan", cause=cause)
        raise LinkError(f"{cause}: connecting anew for a complete copy")

    async def _ship_interval(self, session: SenderSession, interval: Interval) -> None:
        sizes = [volume.block_size for volume in self._volumes]
        source = BlockSource(self._directory, interval, sizes)
        mode = self._config.replication.mode
        try:
            await trio.to_thread.run_sync(self._make_durable, interval.end.segment)
            prepared = await trio.to_thread.run_sync(
                shipment.prepare, interval, self._volumes, source, self._decider(interval), mode != "snapshot"
            )
            self.standing.last_decision = prepared.decision
            resume = await session.begin(prepared.manifest)
            self.standing.begun()
            iterator = shipment.frames(prepared, source, self._volumes, resume)
            await self._send(session, iterator, None)
        except CorruptionError as error:
            await self._abandon(str(error))
        finally:
            source.close()
        await self._splitter.request("release", segment=interval.end.segment)
        self.standing.getting_through()
        self.standing.arrived(session.welcome, interval.end)
        log.debug("interval committed, mark %d, %d writes", interval.mark, len(interval.times))

    def _make_durable(self, last_segment: int) -> None:
        """The replica mustn't have what a power loss takes from this host: its marks couldn't be led on from.

        Raises:
            PitfsError: the journal's disk refuses.
        """
        try:
            for number in list_segments(self._directory):
                if self._durable_segment <= number <= last_segment:
                    fd = os.open(journal_path(self._directory, number), os.O_RDWR | os.O_CLOEXEC)
                    try:
                        os.fdatasync(fd)
                    finally:
                        os.close(fd)
            fsync_directory(self._directory)
        except OSError as error:
            raise storage_error(error, self._directory, "making the journal durable") from error
        self._durable_segment = last_segment

    def _decider(self, interval: Interval) -> Callable[[int, int], Decision]:
        """Figure 7 with the configured rate, in bytes on the wire, or the measured one, in bytes of payload."""
        replication, standing = self._config.replication, self.standing
        configured = replication.rate_bytes_per_s
        ratio = standing.wire_ratio if configured is not None else 1.0
        # An interval that became longer, since nothing was shipped for a while, had as much more time.
        before = standing.committed.protected_through_ns if standing.committed else interval.mark_time_ns
        return lambda diff_bytes, journal_bytes: decide(
            mode=replication.mode,
            diff_bytes=int(diff_bytes * ratio),
            journal_bytes=int(journal_bytes * ratio),
            interval_ns=max(replication.interval_ns, interval.mark_time_ns - before),
            rate_bytes_per_s=configured if configured is not None else standing.measured_rate,
        )

    async def _send(
        self, session: SenderSession, iterator: Iterator[TransferFrame], copy: Copy | None
    ) -> None:
        """Sends a transfer's frames to its end, and measures. Of a copy, the splitter hears what is durable."""
        begun, wire, payload = trio.current_time(), session.wire_bytes, session.payload_bytes
        durable = session.durable
        complete = False
        while not complete:
            for frame in await trio.to_thread.run_sync(_pull, iterator):
                if isinstance(frame, End):
                    await session.finish(frame)
                    complete = True
                elif isinstance(frame, Data | Checkpoint):
                    await session.send(frame)
            if copy is not None and session.durable is not durable and not complete:
                durable = session.durable
                if len(durable.cursor) == 2:
                    volume, block = durable.cursor
                    await self._splitter.request("copied", mark=copy.start.mark, volume=volume, block=block)
        elapsed, sent = trio.current_time() - begun, session.payload_bytes - payload
        if sent >= MEASURABLE_BYTES:
            self.standing.rates.append(sent / max(elapsed, 1e-3))
            self.standing.wire_ratio = (session.wire_bytes - wire) / sent

    # -- for people --------------------------------------------------------------------------------------

    async def status(self, now_ns: int) -> dict[str, Any]:
        """The keys of INTERFACE: status --json, and more."""
        standing, (tail, splitter) = self.standing, await self._tail()
        committed, location = standing.committed, standing.committed_location
        protected = committed.protected_through_ns if committed and committed.mark else None
        lag_bytes = splitter["used_bytes"]
        if location is not None:
            segment_bytes = segment_bytes_for(self._config.journal.capacity_bytes)
            lag_bytes = (tail.segment - location.segment) * segment_bytes + tail.offset - location.offset
        decision, rate = standing.last_decision, self._config.replication.rate_bytes_per_s
        return {
            "role": "production",
            "group": self._hello.group,
            "protected_through": format_instant(protected) if protected else None,
            "lag_bytes": lag_bytes,
            "lag_seconds": round(max(0, now_ns - protected) / 1e9, 3) if protected else None,
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
            "copying": splitter["copy_mark"] is not None,
        }


def _pull(iterator: Iterator[TransferFrame]) -> list[TransferFrame]:
    """Some frames, made in a thread; the last list of a transfer ends with End."""
    frames: list[TransferFrame] = []
    size = 0
    for frame in iterator:
        frames.append(frame)
        size += len(frame.payload) if isinstance(frame, Data) else 0
        if size >= BATCH_BYTES or isinstance(frame, End):
            break
    return frames
