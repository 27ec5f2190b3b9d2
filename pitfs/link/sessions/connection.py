"""What both ends of a session do alike: read frames, write those that wait, and show that they live."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import trio

from pitfs.errors import LinkError
from pitfs.link.protocol.frames import Buffer, Frame, Ping, Pong, WireData
from pitfs.link.protocol.protocol import LinkProtocol
from pitfs.link.sessions.frame_queue import FrameQueue
from pitfs.link.transport.rate import TokenBucket
from pitfs.link.transport.streams import PlainStream, Timeouts, joined


class Connection:
    """A stream, its protocol object, and the frames that wait to be sent on it.

    Attributes:
        protocol: the conversation, and its state.
        outgoing: frames that wait; `write_all` sends them.
        wire_bytes: sent so far (frames; without the overhead of TLS, TCP and IP).
        payload_bytes: of the DATA sent so far, before compression.
        is_mid_frame: a frame may have been sent in part, so that nothing can follow.
    """

    def __init__(
        self,
        stream: PlainStream,
        protocol: LinkProtocol,
        timeouts: Timeouts,
        *,
        queue_bytes: int,
        bucket: TokenBucket | None = None,
    ) -> None:
        self.stream = stream
        self.outgoing: FrameQueue[Frame] = FrameQueue(queue_bytes)
        self.wire_bytes = self.payload_bytes = 0
        self.is_mid_frame = False
        self.protocol, self._timeouts, self._bucket = protocol, timeouts, bucket

    async def receive(self) -> Iterator[Frame] | None:
        """Waits for bytes, and gives the frames that they complete, to be iterated over to the end.

        A PING is answered and left out, as is a PONG.

        Returns:
            the frames; None if the peer has ended the connection.

        Raises:
            RemoteProtocolError: while iterating: the peer broke the protocol.
            LinkError: nothing came for `dead_s`.
            LINK_ERRORS: the connection broke, or we closed it.
        """
        with trio.move_on_after(self._timeouts.dead_s) as scope:
            data = await self.stream.receive_some()
        if scope.cancelled_caught:
            raise LinkError(f"nothing heard from it for {self._timeouts.dead_s:g} s")
        return self._without_heartbeats(data) if data else None

    def _without_heartbeats(self, data: Buffer) -> Iterator[Frame]:
        for frame in self.protocol.receive(data):
            if isinstance(frame, Ping):
                self.outgoing.put_control(Pong(frame.token))
            elif not isinstance(frame, Pong):
                yield frame

    async def write_all(self) -> None:
        """Sends what waits until the queue is closed and empty.

        Raises:
            LocalProtocolError: a frame that may not be sent now.
            LINK_ERRORS: the connection broke, or we closed it.
        """
        while batch := await self.outgoing.take():
            await self.send(batch)

    async def send(self, frames: Iterable[Frame]) -> None:
        """Sends frames past the queue, and the preface before the first ones (or before none), held to the rate.

        Raises as `write_all`.
        """
        buffers = self.protocol.start()
        for frame in frames:
            buffers += self.protocol.send(frame)
            if isinstance(frame, WireData):
                self.payload_bytes += frame.raw_length
        self.is_mid_frame = True
        for buffer in joined(buffers):
            # Half of a burst at once: the other half of the bucket fills while it sleeps.
            step = len(buffer) if self._bucket is None else self._bucket.burst_bytes // 2
            view = memoryview(buffer)
            while len(view):
                part, view = view[:step], view[step:]
                if self._bucket is not None:
                    while delay_s := self._bucket.take(len(part), trio.current_time()):
                        await trio.sleep(delay_s)
                await self.stream.send_all(part)
                self.wire_bytes += len(part)
        self.is_mid_frame = False

    async def send_heartbeats(self) -> None:
        """Sends a PING each `ping_s`, so that the peer hears from this side while there is nothing to say."""
        token = 0
        while True:
            await trio.sleep(self._timeouts.ping_s)
            token += 1
            self.outgoing.put_control(Ping(token))
