"""The replica's end of the link: one session for each connection, many groups at once.

    socket --read--> _incoming (bounded) --batches--> thread: decode, ingest --> outgoing --write--> socket

Reading goes on while a thread writes. A hop to a thread costs 150 to 300 µs, so each takes all frames that wait.
"""

from __future__ import annotations

import logging
import math
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import trio

from pitfs.errors import LinkError, PitfsError, RemoteProtocolError
from pitfs.link.protocol import frames
from pitfs.link.protocol.protocol import LinkProtocol, LinkState, Role
from pitfs.link.sessions import failures
from pitfs.link.sessions.applier import Applier, HealerProtocol, IngestProtocol
from pitfs.link.sessions.connection import Connection
from pitfs.link.sessions.failures import PeerError
from pitfs.link.sessions.frame_queue import FrameQueue
from pitfs.link.transport.streams import LINK_ERRORS, PlainStream, Timeouts, TlsStream, peer_name
from pitfs.link.transport.tls import LinkContext, is_granted, names_of
from pitfs.model.transfer import MAX_WANTED, Durable, Flush, Given, Hello, Want, Welcome
from pitfs.model.window import DEFAULT_WINDOW_BYTES, MIN_WINDOW_BYTES, check_window

log = logging.getLogger(__name__)

FRAME_COST_BYTES: Final = 256  # what an empty frame counts for in a queue
LOOK_S: Final = 1.0  # how often it looks whether the store wants contents healed
RETRY_S: Final = 30.0  # the same after an error of the store
IDLE_S: Final = 0.5  # if nothing comes for longer, the link is slow: what was streamed last is made readable
SPARE_BYTES: Final = 64 << 20  # for the windows beside one of full size
SHARE: Final = 4  # a connection's window gets this part of what is left: others will come
REPLIES_BYTES: Final = 256 << 10  # replies that may wait: 1,000, far more than a window has checkpoints

T = TypeVar("T")
CheckSender = Callable[[Hello], None]
ReadGrants = Callable[[], Mapping[str, frozenset[str]]]
OpenHealer = Callable[[Hello], HealerProtocol]


@dataclass(frozen=True, slots=True)
class Limits:
    """What peers may take of this host.

    Attributes:
        handshaking: connections that haven't sent HELLO yet. The oldest gives way, so that idle ones can't shut
            out a sender. Each holds some 300 KiB: 20 MiB.
        sessions: connections that have; more are refused for now. Each holds a thread and twice the queue.
        queue_bytes: between socket and ingest: enough to overlap them, and for batches.
        window_bytes: the largest window of the codec; see `WindowPool` for what all may have together.
        timeouts: as those of the sender; `connect_s`: from the connection to its HELLO.
        goodbye_s: to send a peer the reason why its session ends.
    """

    handshaking: int = 64
    sessions: int = 64
    queue_bytes: int = 4 << 20
    window_bytes: int = DEFAULT_WINDOW_BYTES
    timeouts: Timeouts = field(default_factory=Timeouts)
    goodbye_s: float = 2.0


class WindowPool:
    """Shares out `limit_bytes` + SPARE_BYTES among the windows of one replica's connections.

    A decoder holds as much memory as its window is large, so ten groups can't all have the largest window. As long
    as the windows fit into `limit_bytes`, a connection gets what its sender offers. After that it gets at most a
    fourth of what is left, rounded down to a power of two, and at least the smallest window. With a limit of 32 MiB
    and senders that offer as much, the windows are 32, 16, 8, 8, 8, 4 … MiB. A window never changes while its
    connection lives, since the decoder can't forget what the encoder may still refer to.
    """

    def __init__(self, limit_bytes: int) -> None:
        check_window(limit_bytes)
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0

    def take(self, offered_bytes: int) -> int:
        """Gives the window for one more connection, whose sender offers `offered_bytes`; to be given back."""
        wanted = min(offered_bytes, self.limit_bytes)
        if self.taken_bytes + wanted > self.limit_bytes:
            share = max(self.limit_bytes + SPARE_BYTES - self.taken_bytes, 0) // SHARE
            power = 1 << share.bit_length() >> 1
            wanted = min(wanted, max(power, MIN_WINDOW_BYTES))
        self.taken_bytes += wanted
        return wanted

    def give_back(self, window_bytes: int) -> None:
        self.taken_bytes -= window_bytes


async def serve(
    listeners: list[trio.SocketListener],
    open_ingest: Callable[[Hello], IngestProtocol],
    *,
    tls: LinkContext | None = None,
    limits: Limits = Limits(),
    read_grants: ReadGrants | None = None,
    check_sender: CheckSender = lambda _: None,
    open_healer: OpenHealer | None = None,
) -> None:
    """Serves sessions until cancelled. Then each finishes the call under way and sends its peer a FAULT.

    Args:
        open_ingest: opens (or makes) the group's store; called in a thread, may raise any PitfsError.
        tls: of `server_context`; None for loopback only.
        read_grants: gives, by group, whose certificates (`identities_of`) may write it. Called in a thread for each
            session, so that a change takes effect. None: the certificates themselves say it (`is_granted`).
        check_sender: raises PitfsError for a sender that the store wouldn't take. Called in a thread before an older
            session of the group is ended for this one.
        open_healer: makes what heals the group's store, where the sender can give contents; must not block.
    """
    receiver = _Receiver(open_ingest, tls, limits, read_grants, check_sender, open_healer)
    async with trio.open_nursery() as nursery:
        await trio.serve_listeners(receiver.handle, listeners, handler_nursery=nursery)


@dataclass(eq=False)
class _Receiver:
    """All connections of one `serve`, and its arguments."""

    open_ingest: Callable[[Hello], IngestProtocol]
    tls: LinkContext | None
    limits: Limits
    read_grants: ReadGrants | None
    check_sender: CheckSender
    open_healer: OpenHealer | None

    def __post_init__(self) -> None:
        self.threads = trio.CapacityLimiter(self.limits.sessions)
        self.windows = WindowPool(self.limits.window_bytes)
        self._handshaking: dict[trio.CancelScope, None] = {}  # oldest first
        self._sessions = 0
        self._live: dict[str, _Session] = {}  # by group

    async def handle(self, inner: trio.SocketStream) -> None:
        """One connection, from TLS handshake to close; raises nothing but Cancelled."""
        peer = peer_name(inner)
        try:
            if (greeted := await self._greet(inner, peer)) is not None:
                connection, greeting, peer = greeted
                self._sessions += 1
                try:
                    await _Session(self, connection, peer).run(greeting)
                finally:
                    self._sessions -= 1
        except Exception:
            log.exception("%s: session ended by a mistake in pitfs", peer)
        finally:
            await trio.aclose_forcefully(inner)

    async def _greet(self, inner: trio.SocketStream, peer: str) -> tuple[Connection, frames.Greeting, str] | None:
        """TLS, preface and HELLO, within time and number; None if there is no session."""
        with trio.move_on_after(self.limits.timeouts.connect_s) as scope:
            self._handshaking[scope] = None
            if len(self._handshaking) > self.limits.handshaking:
                next(iter(self._handshaking)).cancel()
            try:
                stream = TlsStream(inner, self.tls) if self.tls else PlainStream(inner)
                return await self._read_greeting(stream, peer)
            except ssl.SSLError as error:
                log.warning("refused %s", failures.tls_error(peer, error, self.tls))
                await stream.linger()
            except LinkError as error:
                log.warning("refused %s: %s", peer, error)
                await stream.linger()
            except (EOFError, *LINK_ERRORS):
                log.info("%s: it left before it said HELLO", peer)
            finally:
                del self._handshaking[scope]
        if scope.cancelled_caught:
            log.warning("%s: it said no HELLO within %g s, or others came", peer, self.limits.timeouts.connect_s)
        return None

    async def _read_greeting(self, stream: PlainStream, peer: str) -> tuple[Connection, frames.Greeting, str]:
        if isinstance(stream, TlsStream):
            await stream.do_handshake()
            if name := names_of(stream.peer_certificate()):
                peer = f"{peer} ({name})"
        protocol = LinkProtocol(Role.RECEIVER)
        connection = Connection(stream, protocol, self.limits.timeouts, queue_bytes=REPLIES_BYTES)
        # The preface first, so that a peer that expects TLS or something else sees what this side speaks.
        await connection.send([])
        while (received := await connection.receive()) is not None:
            if greetings := [frame for frame in received if isinstance(frame, frames.Greeting)]:
                return connection, greetings[0], peer
        raise EOFError

    async def check(self, greeting: frames.Greeting, stream: PlainStream) -> Hello:
        """Whether this peer may have a session.

        Raises:
            PeerError: no common version, a certificate for other groups, or too many sessions.
        """
        if greeting.hello is None:
            theirs = ", ".join(map(str, greeting.versions))
            ours = ", ".join(map(str, frames.VERSIONS))
            words = f"this replica speaks versions {ours} of the protocol and the sender {theirs}: upgrade one"
            raise PeerError(failures.VERSION, words, retryable=False)
        group = greeting.hello.group
        if isinstance(stream, TlsStream) and not is_granted(stream.peer_certificate(), group):
            raise PeerError(failures.NOT_GRANTED, f"the certificate doesn't grant group {group}", retryable=False)
        if self.read_grants is not None:
            await self._check_grants(self.read_grants, group, stream)
        if self._sessions > self.limits.sessions:
            raise PeerError(failures.BUSY, f"it has {self.limits.sessions} sessions already", retryable=True)
        return greeting.hello

    async def _check_grants(self, read_grants: ReadGrants, group: str, stream: PlainStream) -> None:
        identities = stream.peer_identities() if isinstance(stream, TlsStream) else frozenset()
        try:
            granted = (await trio.to_thread.run_sync(read_grants, limiter=self.threads)).get(group, frozenset())
        except PitfsError as error:
            log.error("no sender is admitted: %s", error)
            words = "the replica can't read who may write which group: see its log"
            raise PeerError(failures.NOT_GRANTED, words, retryable=True) from error
        if not identities & granted:
            words = f"the replica's grants don't let this certificate write group {group}"
            raise PeerError(failures.NOT_GRANTED, words, retryable=False)

    async def take_over(self, group: str, epoch: int, session: _Session) -> None:
        """Makes this the group's session, and ends an older one first.

        The older one's peer most likely is the same sender, whose connection broke without our knowing.

        Raises:
            PeerError: the sender there began later than this one.
        """
        session.epoch = epoch
        while (older := self._live.get(group)) is not None:
            if older.epoch > epoch:
                words = (
                    f"another production host, {older.peer}, sends group {group} with a copy of this one's state "
                    "and was started later: stop the one that shouldn't"
                )
                raise PeerError(failures.SUPERSEDED, words, retryable=True)
            words = f"a connection from {session.peer} took over"
            older.stop(PeerError(failures.SUPERSEDED, words, retryable=True))
            await older.released.wait()
        self._live[group] = session  # no await since the check: two sessions can't both find it free

    def release(self, session: _Session) -> None:
        """Frees the session's group for the next one."""
        self._live = {group: live for group, live in self._live.items() if live is not session}


class _Session:
    """One greeted connection."""

    def __init__(self, receiver: _Receiver, connection: Connection, peer: str) -> None:
        self.peer = peer
        self.released = trio.Event()  # set once the ingest is closed
        self.epoch = 0  # of its sender
        self._receiver, self._connection = receiver, connection
        self._incoming: FrameQueue[frames.Frame] = FrameQueue(receiver.limits.queue_bytes)
        self._window_bytes = 0  # taken from the receiver's pool
        self._applier: Applier | None = None  # until the store is open
        self._healer: HealerProtocol | None = None
        self._give, self._given = trio.open_memory_channel[bytes | None](MAX_WANTED)
        self._scope = trio.CancelScope()
        self._reason: Exception | None = None  # why it ends; None: the peer left in order
        self._stopping = False
        self._began = False

    async def run(self, greeting: frames.Greeting) -> None:
        """Serves the session to its end."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guard, self._read_all)
                    nursery.start_soon(self._guard, self._write_all)
                    nursery.start_soon(self._guard, self._connection.send_heartbeats)
                    await self._guard(lambda: self._work(greeting, nursery))
                    self._scope.cancel()
        except BaseException:  # cancelled from outside: the receiver stops
            words = "the receiver stops; the transfer can be resumed"
            self.stop(PeerError(failures.SHUTDOWN, words, retryable=True))
            raise
        finally:
            with trio.CancelScope(shield=True):
                await self._close_store()
                self._applier = None  # the window goes with it
                self._receiver.windows.give_back(self._window_bytes)
                self._receiver.release(self)
                self.released.set()
                await self._say_goodbye()

    def stop(self, reason: Exception | None) -> None:
        """Ends the session; the first reason counts."""
        if not self._stopping:
            self._stopping, self._reason = True, reason
        self._scope.cancel()

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except Exception as error:
            if not isinstance(error, PitfsError | OSError):
                log.exception("%s: a mistake in pitfs", self.peer)
            self.stop(error)

    async def _work(self, greeting: frames.Greeting, nursery: trio.Nursery) -> None:
        """Opens the store, then ingests what comes, until the peer has left and all is ingested."""
        hello = await self._receiver.check(greeting, self._connection.stream)
        await self._in_thread(lambda: self._receiver.check_sender(hello))
        await self._receiver.take_over(hello.group, hello.epoch, self)
        self._window_bytes = self._receiver.windows.take(greeting.window_bytes)
        applier, welcome = await self._in_thread(lambda: self._open(hello))
        self._applier = applier
        self._began = True
        words = "%s: session began, group %s at mark %d, window %d MiB"
        log.info(words, self.peer, hello.group, welcome.mark, self._window_bytes >> 20)
        version = frames.common_version(greeting.versions) or frames.VERSIONS[0]
        self._reply(frames.Accept(version, welcome, self._window_bytes))
        if self._receiver.open_healer is not None and version >= frames.SINCE[frames.FrameType.WANT]:
            self._healer = self._receiver.open_healer(hello)
            nursery.start_soon(self._guard, partial(self._heal, self._healer))
        streams = False
        while True:
            with trio.move_on_after(IDLE_S if streams else math.inf) as scope:
                batch = await self._incoming.take(lambda frame: not isinstance(frame, frames.WireData | Flush))
            if scope.cancelled_caught:
                streams = False
                await self._in_thread(applier.ingest.publish)
                continue
            if not batch:
                return
            for reply in await self._in_thread(partial(applier.apply, batch)):
                if isinstance(reply, frames.Committed):
                    state = reply.welcome
                    log.debug("%s: group %s: mark %d committed, seq %d", self.peer, hello.group, state.mark, state.seq)
                streams = streams or isinstance(reply, Durable)
                self._reply(reply)

    async def _heal(self, healer: HealerProtocol) -> None:
        """Asks for contents while the store wants some. Its errors are logged, since replication goes on."""
        while True:
            pause_s = LOOK_S
            try:
                while wanted := await self._in_thread(healer.wanted):
                    self._reply(Want(wanted))
                    contents = [await self._given.receive() for _ in wanted]
                    await self._in_thread(partial(healer.take, contents))
            except (PitfsError, OSError) as error:
                log.error("%s: damage isn't healed: %s", self.peer, error)
                pause_s = RETRY_S
            await trio.sleep(pause_s)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(call, limiter=self._receiver.threads)

    def _open(self, hello: Hello) -> tuple[Applier, Welcome]:
        ingest = self._receiver.open_ingest(hello)
        try:
            return Applier(ingest, self._window_bytes), ingest.welcome()
        except BaseException:
            ingest.close()
            raise

    def _reply(self, frame: frames.Frame) -> None:
        """Queues a reply; the limit is for a peer that sends and never reads."""
        if not self._connection.outgoing.put_nowait(frame, FRAME_COST_BYTES):
            raise LinkError("it doesn't read the answers to what it sends")

    async def _read_all(self) -> None:
        """Reads until the peer leaves; what came before is still ingested then."""
        try:
            while (received := await self._connection.receive()) is not None:
                for frame in received:
                    if isinstance(frame, Given):
                        self._give.send_nowait(frame.content)  # no more than were asked for
                        continue
                    size_bytes = frame.raw_length if isinstance(frame, frames.WireData) else 0
                    await self._incoming.put(frame, size_bytes + FRAME_COST_BYTES)
            if self._connection.protocol.state not in (LinkState.ASKED, LinkState.READY):
                self._reason = LinkError("the connection ended within a transfer, which can be resumed")
        except LINK_ERRORS as error:
            self._reason = LinkError(failures.describe_os_error(error))
        self._incoming.close()

    async def _write_all(self) -> None:
        try:
            await self._connection.write_all()
        except LINK_ERRORS:
            # The reader will learn why; what came is still ingested, and its answers are dropped.
            self._connection.outgoing.close(discard=True)

    async def _close_store(self) -> None:
        for opened in (self._healer, self._applier.ingest if self._applier is not None else None):
            try:
                if opened is not None:
                    await self._in_thread(opened.close)
            except Exception as error:
                log.error("%s: closing the store: %s", self.peer, error)

    async def _say_goodbye(self) -> None:
        """Sends the peer the reason why the session ends, if it still reads, and writes the line in the log."""
        reason, connection = self._reason, self._connection
        state = connection.protocol.state
        level = logging.INFO if reason is None else logging.WARNING
        what = "session ended" if self._began else "refused"
        log.log(level, "%s: %s: %s", self.peer, what, reason or "done")
        with trio.move_on_after(self._receiver.limits.goodbye_s):
            with suppress(*LINK_ERRORS):
                if reason is not None and not connection.is_mid_frame and state is not LinkState.CLOSED:
                    code, message, retryable = failures.describe(reason)
                    answer: frames.Refuse | frames.Fault = frames.Fault(code, message, retryable)
                    if state is LinkState.ASKED:
                        # After a RemoteProtocolError the same HELLO would be as wrong the next time.
                        again = retryable and not isinstance(reason, RemoteProtocolError)
                        answer = frames.Refuse(code, message, again)
                    await connection.send([answer])
            await connection.stream.linger()
