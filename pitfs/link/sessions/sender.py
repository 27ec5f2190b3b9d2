"""The sender's end of the link: connects, greets, and carries transfers.

    caller --send--> _pending --encode (thread if much)--> _outgoing --write (rate)--> socket
                                                                  read <-- socket --> replies, PROGRESS

Every failure is stored once and raised to whoever waits or comes next: the tasks behind it never
raise.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar, cast

import trio

from pitfs.errors import LinkError, LocalProtocolError, PitfsError, RemoteProtocolError
from pitfs.link.codec.adaptive import AdaptiveCompression
from pitfs.link.codec.payloads import PayloadEncoder
from pitfs.link.protocol.batches import BatchCutter
from pitfs.link.protocol.frames import (
    VERSIONS,
    Accept,
    Committed,
    Fault,
    Frame,
    Greeting,
    Parked,
    Ping,
    Pong,
    Progress,
    Refuse,
    Resume,
    WireData,
)
from pitfs.link.protocol.protocol import LinkProtocol, Role
from pitfs.link.sessions import failures
from pitfs.link.transport.rate import TokenBucket
from pitfs.link.transport.streams import FrameQueue, PlainStream, Timeouts, delivery_bytes_per_s, send_buffers
from pitfs.link.transport.tls import LinkContext
from pitfs.model.transfer import (
    Begin,
    Checkpoint,
    Data,
    Durable,
    End,
    Flush,
    Hello,
    Manifest,
    Park,
    ResumePoint,
    StreamMark,
    TransferFrame,
    Welcome,
    Writes,
)
from pitfs.model.window import DEFAULT_WINDOW_BYTES

# Sent without PROGRESS: two checkpoints, so that one is on its way while the other becomes durable.
WINDOW_BYTES: Final = 32 << 20
QUEUE_BYTES: Final = 4 << 20  # before and after encoding: enough to batch, little to hold
THREAD_BYTES: Final = 64 << 10  # compressing less costs less than the hop to a thread (150 to 300 µs)
FRAME_COST_BYTES: Final = 64  # what an empty frame counts for in a queue
VERDICT_S: Final = 2.0  # after a failed write: time to read why the peer closed

ReplyType = TypeVar("ReplyType", Accept, Resume, Committed, Parked)


class SenderSession:
    """A session with a replica; made by `connect`, used by one task at a time.

    After an error, or after cancelling begin, send or finish, only leaving the context is left to do.

    Attributes:
        peer: HOST:PORT, for messages.
        welcome: where the replica stood at the start of the session, then after the last `finish`.
        durable: how far the present transfer is durable on the replica.
        on_progress: called (in the event loop) with each PROGRESS; must not block or raise.
        on_durable: the same with each DURABLE.
        wire_bytes: sent on the connection so far (frames; without the overhead of TLS, TCP and IP).
        payload_bytes: of Data sent so far, before compression.
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
        self.welcome = Welcome(0, 0, 0, 0)
        self.durable = ResumePoint()
        self.on_progress: Callable[[ResumePoint], None] | None = None
        self.on_durable: Callable[[Durable], None] | None = None
        self.wire_bytes = 0
        self.payload_bytes = 0
        self.failure: Exception | None = None
        self._stream, self._tls, self._bucket, self._timeouts = stream, tls, bucket, timeouts
        self._protocol = LinkProtocol(Role.SENDER)
        self.window_bytes = window_bytes
        self._encoder = PayloadEncoder(window_bytes)  # until WELCOME says of which window
        self.compression = AdaptiveCompression(None if bucket is None else bucket.rate_bytes_per_s)
        self._pending: FrameQueue[Frame | Data] = FrameQueue(queue_bytes)
        self._outgoing: FrameQueue[Frame] = FrameQueue(queue_bytes)
        self._changed = trio.lowlevel.ParkingLot()  # a reply, PROGRESS or failure came
        self._reply: Accept | Resume | Committed | Parked | None = None
        self._accepted = False
        self._transferring = False
        self._given_bytes = 0  # payload that the caller gave
        self._progressed_bytes = 0  # of these, made durable
        self._marks: deque[int] = deque()  # _given_bytes at each CHECKPOINT without PROGRESS
        self._cutter = BatchCutter()
        self._unflushed: deque[int] = deque()  # bytes of each batch without DURABLE

    async def begin(self, manifest: Manifest) -> ResumePoint:
        """Begins a transfer; returns from where the replica wants it.

        Raises:
            PitfsError: LinkError, LinkRefusedError, PositionMismatchError or CapacityError.
        """
        self._raise_failure()
        if self._transferring:
            raise LocalProtocolError("begin within a transfer")
        reply = await self._ask(Begin(manifest), Resume)
        self._transferring = True
        return reply.point

    async def send(self, frame: Data | Checkpoint) -> None:
        """Hands over one frame; waits for room in the window and at the rate.

        The payload must not change afterwards: it isn't copied.

        Raises:
            PitfsError: as `begin`.
            LocalProtocolError: no transfer, or a window without a Checkpoint.
        """
        self._raise_failure()
        if not self._transferring:
            raise LocalProtocolError("send without a transfer")
        if isinstance(frame, Checkpoint):
            self._marks.append(self._given_bytes)
            await self._put(frame, FRAME_COST_BYTES)
            return
        length = len(frame.payload)
        last_mark = self._marks[-1] if self._marks else self._progressed_bytes
        if self._given_bytes + length - last_mark > WINDOW_BYTES:
            raise LocalProtocolError(f"{WINDOW_BYTES} bytes without a Checkpoint")
        while self._given_bytes + length - self._progressed_bytes > WINDOW_BYTES:
            await self._wait()
        self._given_bytes += length
        await self._put(frame, length + FRAME_COST_BYTES)

    async def finish(self, end: End) -> Welcome:
        """Ends the transfer; returns where the replica stands once it is committed there.

        Raises:
            PitfsError: as `begin`.
        """
        self._raise_failure()
        if not self._transferring:
            raise LocalProtocolError("finish without a transfer")
        reply = await self._ask(end, Committed)
        self._over()
        self.welcome = reply.welcome
        return reply.welcome

    async def park(self) -> ResumePoint:
        """Puts the transfer off, to be begun again later; returns what is durable of it.

        Raises:
            PitfsError: as `begin`.
        """
        self._raise_failure()
        if not self._transferring:
            raise LocalProtocolError("park without a transfer")
        reply = await self._ask(Park(), Parked)
        self._over()
        return reply.point

    async def stream(self, writes: Writes | None, flush: Flush, window_bytes: int = WINDOW_BYTES) -> None:
        """Hands over a batch of streamed writes, within a transfer or not; the answer comes by `on_durable`.

        Waits until with it at most `window_bytes` are without an answer, or it is alone. Its contents must not change
        afterwards.

        Raises:
            PitfsError: as `begin`.
        """
        size = len(writes.contents) + writes.rows.nbytes if writes is not None else 0
        while size and self._unflushed and sum(self._unflushed) + size > window_bytes:
            await self._wait()
        self._raise_failure()
        self._unflushed.append(size)
        if writes is not None:
            for data in self._cutter.cut(writes):
                await self._put(data, len(data.payload) + FRAME_COST_BYTES)
        await self._put(flush, FRAME_COST_BYTES)

    async def stream_mark(self, mark: StreamMark) -> None:
        """Ends the open interval behind what was streamed; the answer comes by `on_durable`. Raises as `begin`."""
        self._raise_failure()
        self._unflushed.append(0)
        await self._put(mark, FRAME_COST_BYTES)

    async def wait_durable(self) -> None:
        """Returns when all that was streamed has been answered. Raises as `begin`."""
        while self._unflushed:
            await self._wait()
        self._raise_failure()

    def _over(self) -> None:
        self._transferring = False
        self._marks.clear()
        self._progressed_bytes = self._given_bytes

    async def _ask(self, frame: Greeting | TransferFrame, reply_type: type[ReplyType]) -> ReplyType:
        self._reply = None
        await self._put(frame, FRAME_COST_BYTES)
        while self._reply is None:
            await self._wait()
        reply = self._reply
        if not isinstance(reply, reply_type):
            raise AssertionError(f"the protocol let {reply} answer {frame}")
        return reply

    async def _put(self, frame: Frame | Data, size_bytes: int) -> None:
        try:
            await self._pending.put(frame, size_bytes)
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
        """Ends the session: whoever waits in it gets this error, the first one."""
        if self.failure is None:
            self.failure = error
        self._pending.close(discard=True)
        self._outgoing.close(discard=True)
        self._changed.unpark_all()

    # The four tasks behind a session.

    async def _encode_all(self) -> None:
        """Compresses what pays, many frames for each hop to a thread."""
        begun_s = trio.current_time()
        while batch := await self._pending.take():
            taken_s = trio.current_time()
            compresses = self.compression.compresses
            pairs = [
                (frame, compresses and isinstance(frame, Data) and self._encoder.wants(frame)) for frame in batch
            ]
            work_bytes = sum(len(cast(Data, frame).payload) for frame, wants in pairs if wants)
            if work_bytes >= THREAD_BYTES:
                frames = await trio.to_thread.run_sync(self._encode, pairs)
            else:
                frames = self._encode(pairs)
            encoded_s = trio.current_time()
            for encoded in frames:
                size_bytes = len(encoded.payload) if isinstance(encoded, WireData) else 0
                try:
                    await self._outgoing.put(encoded, size_bytes + FRAME_COST_BYTES)
                except trio.ClosedResourceError:
                    return
            now_s = trio.current_time()
            self.compression.observe(
                sum(len(frame.payload) for frame in batch if isinstance(frame, Data)),
                idle_s=taken_s - begun_s,
                encode_s=encoded_s - taken_s,
                room_s=now_s - encoded_s,
                link_bytes_per_s=delivery_bytes_per_s(self._stream.inner),
            )
            begun_s = now_s

    def _encode(self, pairs: list[tuple[Frame | Data, bool]]) -> list[Frame]:
        return [
            self._encoder.encode(frame, wants) if isinstance(frame, Data) else frame for frame, wants in pairs
        ]

    async def _write_all(self) -> None:
        try:
            while batch := await self._outgoing.take():
                buffers = []
                for frame in batch:
                    buffers += self._protocol.send(frame)
                    if isinstance(frame, WireData):
                        self.payload_bytes += frame.raw_length
                await send_buffers(self._stream, buffers, self._bucket, self._count)
        except LocalProtocolError as error:
            self._fail(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, OSError) as error:
            # The peer may have closed because of something that it told us: let the reader find it.
            with trio.move_on_after(VERDICT_S):
                while self.failure is None:
                    await self._changed.park()
            self._fail(LinkError(f"{self.peer}: {failures.describe_os_error(error)}"))

    def _count(self, sent_bytes: int) -> None:
        self.wire_bytes += sent_bytes

    async def _read_all(self) -> None:
        try:
            while self.failure is None:
                with trio.move_on_after(self._timeouts.dead_s) as scope:
                    data = await self._stream.receive_some()
                if scope.cancelled_caught:
                    raise LinkError(f"{self.peer}: nothing heard from it for {self._timeouts.dead_s:g} s")
                if not data:
                    self._protocol.receive_eof()
                    raise LinkError(f"{self.peer}: it closed the connection{self._closed_hint()}")
                for frame in self._protocol.receive(data):
                    self._follow(frame)
        except RemoteProtocolError as error:
            self._fail(RemoteProtocolError(f"{self.peer}: {error}"))
        except ssl.SSLError as error:
            self._fail(failures.tls_error(self.peer, error, self._tls))
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            self._fail(LinkError(f"{self.peer}: {failures.describe_os_error(error)}"))
        except PitfsError as error:
            self._fail(error)
        await self._stream.aclose()  # so that the peer needn't wait for the caller to notice

    def _closed_hint(self) -> str:
        if self._accepted:
            return ""
        return " without an answer" + ("" if self._tls else "; does it want TLS?")

    def _follow(self, frame: Frame) -> None:
        match frame:
            case Accept() | Resume() | Committed() | Parked():
                if isinstance(frame, Accept):
                    self.welcome, self._accepted = frame.welcome, True
                    self.window_bytes = frame.window_bytes
                    self._encoder = PayloadEncoder(frame.window_bytes)
                if isinstance(frame, Resume):
                    self.durable = frame.point
                self._reply = frame
            case Progress(point=point):
                self.durable = point
                self._progressed_bytes = self._marks.popleft()
                if self.on_progress is not None:
                    self.on_progress(point)
            case Durable():
                self._unflushed.popleft()
                if self.on_durable is not None:
                    self.on_durable(frame)
            case Ping(token=token):
                self._outgoing.put_control(Pong(token))
            case Refuse() | Fault():
                raise failures.error_from(self.peer, frame)
        self._changed.unpark_all()

    async def _beat(self) -> None:
        token = 0
        while self.failure is None:
            await trio.sleep(self._timeouts.ping_s)
            if self._accepted:
                token += 1
                self._outgoing.put_control(Ping(token))

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        """Runs a task; a mistake of ours in it ends the session with that error, for the caller to raise."""
        try:
            await task()
        except Exception as error:
            self._fail(error)

    async def start(self, nursery: trio.Nursery, hello: Hello) -> None:
        """Starts the tasks in the nursery and greets; for `connect`."""
        for task in (self._encode_all, self._write_all, self._read_all, self._beat):
            nursery.start_soon(self._guard, task)
        await self._ask(Greeting(VERSIONS, hello, self.window_bytes), Accept)
