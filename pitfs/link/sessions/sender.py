"""The sender's end of the link: greets, and carries transfers and the stream.

    caller --send--> _pending --encode (thread if much)--> outgoing --write (rate)--> socket
                                                                read <-- socket --> replies, PROGRESS

Every failure is stored once and raised to whoever waits or comes next: the tasks behind a session never raise.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from pitfs.errors import LinkError, LocalProtocolError, PitfsError
from pitfs.link.codec.adaptive import AdaptiveCompression
from pitfs.link.codec.payloads import PayloadEncoder
from pitfs.link.protocol import frames
from pitfs.link.protocol.batches import BatchCutter
from pitfs.link.protocol.frames import VERSIONS
from pitfs.link.protocol.protocol import LinkProtocol, LinkState, Role
from pitfs.link.sessions import failures
from pitfs.link.sessions.connection import Connection
from pitfs.link.sessions.frame_queue import FrameQueue
from pitfs.link.transport import streams
from pitfs.link.transport.rate import TokenBucket
from pitfs.link.transport.streams import LINK_ERRORS, PlainStream, Timeouts, busy_s, delivery_bytes_per_s
from pitfs.link.transport.tls import LinkContext
from pitfs.model import transfer
from pitfs.model.window import DEFAULT_WINDOW_BYTES

# Sent without PROGRESS: two checkpoints, so that one is on its way while the other becomes durable.
WINDOW_BYTES: Final = 32 << 20
QUEUE_BYTES: Final = 4 << 20  # before and after encoding: enough to batch, little to hold
THREAD_BYTES: Final = 64 << 10  # compressing less costs less than the hop to a thread (150 to 300 µs)
FRAME_COST_BYTES: Final = 64  # what an empty frame counts for in a queue
# What the replica wants goes while nothing else does, so that at most this much delays what comes behind it; on a link
# that is never idle it goes at that rate.
GIVEN_AHEAD_BYTES: Final = 64 << 10
LEAST_GIVEN_BYTES_PER_S: Final = 4 << 10
IDLE_POLL_S: Final = 0.002
FAULT_WAIT_S: Final = 2.0  # after a failed write: time to read the FAULT that says why the peer closed


class SenderSession:
    """A session with a replica; made by `connect`, used by one task at a time.

    After an error, or after begin, send or finish was cancelled, the caller can only leave the context.
    Every method raises what ended the session: LinkError, LinkRefusedError, PositionMismatchError or CapacityError;
    and LocalProtocolError where a transfer is under way and shouldn't be, or the other way round.

    Attributes:
        peer: HOST:PORT, for messages.
        welcome: the replica's state at the start of the session, then after the last `finish`.
        durable: how far the last transfer begun is durable on the replica.
        on_progress: called (in the event loop) with each PROGRESS; must not block or raise.
        on_durable: the same with each DURABLE.
        connection: what it sends on.
        compression: whether payloads are compressed now.
        window_bytes: of the codec: what was offered, then what was agreed on.
        failure: why the session is over, None while it lives.
    """

    def __init__(
        self,
        stream: PlainStream,
        peer: str,
        tls: LinkContext | None,
        bucket: TokenBucket | None,
        timeouts: Timeouts,
        queue_bytes: int = QUEUE_BYTES,
        window_bytes: int = DEFAULT_WINDOW_BYTES,
    ) -> None:
        self.peer = peer
        self.welcome = transfer.Welcome(0, 0, 0, 0)
        self.durable = transfer.ResumePoint()
        self.on_progress: Callable[[transfer.ResumePoint], None] | None = None
        self.on_durable: Callable[[transfer.Durable], None] | None = None
        self._protocol = LinkProtocol(Role.SENDER)
        self.connection = Connection(stream, self._protocol, timeouts, queue_bytes=queue_bytes, bucket=bucket)
        self.compression = AdaptiveCompression(None if bucket is None else bucket.rate_bytes_per_s)
        self.window_bytes = window_bytes
        self.failure: Exception | None = None
        self._tls = tls
        self._encoder = PayloadEncoder(window_bytes)  # until WELCOME says of which window
        self._pending: FrameQueue[frames.Frame | transfer.Data] = FrameQueue(queue_bytes)
        self._changed = trio.lowlevel.ParkingLot()  # an answer, PROGRESS, DURABLE or failure came
        self._answered = False  # what `_ask` asked
        self._given_bytes = 0  # payload that the caller gave
        self._progressed_bytes = 0  # of these, made durable
        self._checkpoints: deque[int] = deque()  # _given_bytes at each CHECKPOINT without PROGRESS
        self._cutter = BatchCutter()
        self._unflushed: deque[int] = deque()  # bytes of each batch without DURABLE
        self._find: transfer.FindContents | None = None
        self._wanted: tuple[transfer.Wanted, ...] = ()

    @property
    def wire_bytes(self) -> int:
        """Sent on the connection so far (frames; without the overhead of TLS, TCP and IP)."""
        return self.connection.wire_bytes

    @property
    def payload_bytes(self) -> int:
        """Of Data sent so far, before compression."""
        return self.connection.payload_bytes

    @property
    def busy_s(self) -> float:
        """For how long so far the link had something to carry; not while the replica only writes it to its disk."""
        return busy_s(self.connection.stream.inner)

    async def start(self, nursery: trio.Nursery, hello: transfer.Hello) -> None:
        """Starts the tasks in the nursery and greets; for `connect`."""
        for task in (self._encode_all, self._write_all, self._read_all, self._give_all):
            nursery.start_soon(self._guard, task)
        await self._ask(frames.Greeting(VERSIONS, hello, self.window_bytes))
        nursery.start_soon(self._guard, self.connection.send_heartbeats)

    async def begin(self, manifest: transfer.Manifest) -> transfer.ResumePoint:
        """Begins a transfer; returns from where the replica wants it."""
        self._check(transferring=False)
        await self._ask(transfer.Begin(manifest))
        return self.durable

    async def send(self, frame: transfer.Data | transfer.Checkpoint) -> None:
        """Hands over one frame; waits for room in the window and at the rate.

        The payload must not change afterwards: it isn't copied.

        Raises:
            LocalProtocolError: no transfer, or a window without a Checkpoint.
        """
        self._check(transferring=True)
        if isinstance(frame, transfer.Checkpoint):
            self._checkpoints.append(self._given_bytes)
            await self._put(frame)
            return
        length = len(frame.payload)
        last_checkpoint = self._checkpoints[-1] if self._checkpoints else self._progressed_bytes
        if self._given_bytes + length - last_checkpoint > WINDOW_BYTES:
            raise LocalProtocolError(f"{WINDOW_BYTES} bytes without a Checkpoint")
        while self._given_bytes + length - self._progressed_bytes > WINDOW_BYTES:
            await self._wait()
        self._given_bytes += length
        await self._put(frame)

    async def finish(self, end: transfer.End) -> transfer.Welcome:
        """Ends the transfer; returns the replica's state once it is committed there."""
        await self._leave_transfer(end)
        return self.welcome

    async def park(self) -> transfer.ResumePoint:
        """Puts the transfer off, to be begun again later; returns what is durable of it."""
        await self._leave_transfer(transfer.Park())
        return self.durable

    async def stream(
        self, writes: transfer.Writes | None, flush: transfer.Flush, window_bytes: int = WINDOW_BYTES
    ) -> None:
        """Hands over a batch of streamed writes, within a transfer or not; the answer comes by `on_durable`.

        Waits until with it at most `window_bytes` are without an answer, or it is alone. Its contents must not change
        afterwards.
        """
        size = len(writes.contents) + writes.rows.nbytes if writes is not None else 0
        while size and self._unflushed and sum(self._unflushed) + size > window_bytes:
            await self._wait()
        self._raise_failure()
        self._unflushed.append(size)
        if writes is not None:
            for data in self._cutter.cut(writes):
                await self._put(data)
        await self._put(flush)

    async def stream_mark(self, mark: transfer.StreamMark) -> None:
        """Ends the open interval behind what was streamed; the answer comes by `on_durable`."""
        self._raise_failure()
        self._unflushed.append(0)
        await self._put(mark)

    async def wait_durable(self) -> None:
        """Returns when all that was streamed has been answered."""
        while self._unflushed:
            await self._wait()
        self._raise_failure()

    def answer_wants(self, find: transfer.FindContents) -> None:
        """From here on what `find` gives goes to the replica for what it wants, beside all that the caller sends."""
        self._find = find
        self._changed.unpark_all()

    def _check(self, *, transferring: bool) -> None:
        self._raise_failure()
        if (self._protocol.state is LinkState.TRANSFER) is not transferring:
            raise LocalProtocolError("no transfer is under way" if transferring else "a transfer is under way")

    async def _leave_transfer(self, frame: transfer.End | transfer.Park) -> None:
        self._check(transferring=True)
        await self._ask(frame)
        self._checkpoints.clear()
        self._progressed_bytes = self._given_bytes

    async def _ask(self, frame: frames.Greeting | transfer.Begin | transfer.End | transfer.Park) -> None:
        """Sends a frame and waits until `_take` has stored its answer; the protocol lets no other one through."""
        self._answered = False
        await self._put(frame)
        while not self._answered:
            await self._wait()

    async def _put(self, frame: frames.Frame | transfer.Data) -> None:
        size_bytes = len(frame.payload) if isinstance(frame, transfer.Data) else 0
        try:
            await self._pending.put(frame, size_bytes + FRAME_COST_BYTES)
        except trio.ClosedResourceError:
            self._raise_failure()
            raise

    async def _wait(self) -> None:
        self._raise_failure()
        await self._changed.park()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _fail(self, error: Exception) -> None:
        """Ends the session: whoever waits in it gets this error, the first one; it names the peer."""
        if self.failure is None:
            match error:
                case ssl.SSLError():
                    error = failures.tls_error(self.peer, error, self._tls)
                case OSError() | trio.BrokenResourceError() | trio.ClosedResourceError():
                    error = LinkError(f"{self.peer}: {failures.describe_os_error(error)}")
                case PitfsError():
                    error = type(error)(f"{self.peer}: {error}")
            self.failure = error
        self._pending.close(discard=True)
        self.connection.outgoing.close(discard=True)
        self._changed.unpark_all()

    # The tasks behind a session.

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        """Runs a task; what it raises, also a mistake of ours, ends the session and is raised to the caller."""
        try:
            await task()
        except Exception as error:
            self._fail(error)

    async def _encode_all(self) -> None:
        """Compresses what pays, many frames for each hop to a thread."""
        begun_s = trio.current_time()
        while batch := await self._pending.take():
            taken_s = trio.current_time()
            choices = [
                isinstance(frame, transfer.Data) and self.compression.compresses and self._encoder.wants(frame)
                for frame in batch
            ]
            lengths = [len(frame.payload) if isinstance(frame, transfer.Data) else 0 for frame in batch]
            if sum(length for length, wanted in zip(lengths, choices, strict=True) if wanted) >= THREAD_BYTES:
                encoded = await trio.to_thread.run_sync(self._encode, batch, choices)
            else:
                encoded = self._encode(batch, choices)
            encoded_s = trio.current_time()
            for frame in encoded:
                size_bytes = len(frame.payload) if isinstance(frame, frames.WireData) else 0
                await self.connection.outgoing.put(frame, size_bytes + FRAME_COST_BYTES)
            now_s = trio.current_time()
            self.compression.observe(
                sum(lengths),
                idle_s=taken_s - begun_s,
                encode_s=encoded_s - taken_s,
                room_s=now_s - encoded_s,
                link_bytes_per_s=delivery_bytes_per_s(self.connection.stream.inner),
            )
            begun_s = now_s

    def _encode(self, batch: list[frames.Frame | transfer.Data], choices: list[bool]) -> list[frames.Frame]:
        return [
            self._encoder.encode(frame, choice) if isinstance(frame, transfer.Data) else frame
            for frame, choice in zip(batch, choices, strict=True)
        ]

    async def _write_all(self) -> None:
        try:
            await self.connection.write_all()
        except LINK_ERRORS:
            # The peer may have closed after it sent a FAULT: let the reader find that.
            with trio.move_on_after(FAULT_WAIT_S):
                while self.failure is None:
                    await self._changed.park()
            raise

    async def _read_all(self) -> None:
        try:
            while self.failure is None:
                received = await self.connection.receive()
                if received is None:
                    self._protocol.receive_eof()
                    hint = ""
                    if self._protocol.state in (LinkState.GREETING, LinkState.ASKED):
                        hint = " without an answer" + ("" if self._tls else "; does it want TLS?")
                    raise LinkError(f"it closed the connection{hint}")
                for frame in received:
                    self._take(frame)
                    self._changed.unpark_all()
        except Exception as error:
            self._fail(error)
        await self.connection.stream.aclose()  # so that the peer needn't wait for the caller to notice

    async def _give_all(self) -> None:
        while True:
            while self._find is None or not self._wanted:
                await self._wait()
            wanted, self._wanted = self._wanted, ()
            for content in await self._find(wanted):
                with trio.move_on_after(len(content or b"") / LEAST_GIVEN_BYTES_PER_S):
                    while self._is_busy():
                        await trio.sleep(IDLE_POLL_S)
                await self._put(transfer.Given(content))

    def _is_busy(self) -> bool:
        sending, inner = self.connection, self.connection.stream.inner
        waiting = len(self._pending) or len(sending.outgoing) or sending.is_mid_frame
        return bool(waiting) or streams.unsent_bytes(inner) >= GIVEN_AHEAD_BYTES

    def _take(self, frame: frames.Frame) -> None:
        """Stores what a frame of the replica says. Raises the error that it reports."""
        match frame:
            case frames.Accept():
                self.welcome, self.window_bytes = frame.welcome, frame.window_bytes
                self._encoder = PayloadEncoder(frame.window_bytes)
                self._answered = True
            case frames.Resume() | frames.Parked():
                self.durable, self._answered = frame.point, True
            case frames.Committed():
                self.welcome, self._answered = frame.welcome, True
            case frames.Progress():
                self.durable = frame.point
                self._progressed_bytes = self._checkpoints.popleft()
                if self.on_progress is not None:
                    self.on_progress(frame.point)
            case transfer.Durable():
                self._unflushed.popleft()
                if self.on_durable is not None:
                    self.on_durable(frame)
            case transfer.Want():
                self._wanted = frame.contents
            case frames.Refuse() | frames.Fault():
                raise failures.error_from(frame)
