"""Sender and receiver over loopback without TLS, with an ingest that only remembers."""

from __future__ import annotations

import logging
import random
import socket
import threading

import msgspec
import pytest
import trio
from backports import zstd

from pitfs.errors import (
    CapacityError,
    CorruptionError,
    LinkError,
    LinkRefusedError,
    LocalProtocolError,
    PitfsError,
    PositionMismatchError,
    RemoteProtocolError,
    StoreError,
    UsageError,
)
from pitfs.link.protocol.frames import PREFACE, Accept, Encoding, Greeting, Resume, WireData
from pitfs.link.protocol.protocol import LinkProtocol, Role
from pitfs.link.sessions.connect import Limits, SenderSession, Timeouts, connect, serve
from pitfs.link.sessions.sender import WINDOW_BYTES
from pitfs.model.transfer import Begin, Checkpoint, Data, End, Hello, ResumePoint, Section, Welcome
from tests.helpers.links import HELLO, MANIFEST, NOTHING, FakeIngest, joined, replica

NOISE = random.Random(3).randbytes(1 << 20)
QUICK = Timeouts(connect_s=5, ping_s=0.05, dead_s=0.3)
MIB = 1 << 20


def link(port: int, hello: Hello = HELLO, rate: int | None = None, timeouts: Timeouts | None = None):  # type: ignore[no-untyped-def]
    return connect(
        "127.0.0.1", port, tls=None, hello=hello, rate_bytes_per_s=rate, timeouts=timeouts or Timeouts()
    )


async def ship(session: SenderSession, count: int, payload: bytes = NOISE, start: int = 0) -> Welcome:
    """One transfer of `count` payloads with a checkpoint after every eighth."""
    await session.begin(MANIFEST)
    for index in range(start, count):
        await session.send(Data(Section.DIFF_BLOCKS, index * len(payload), payload))
        if index % 8 == 7:
            await session.send(Checkpoint((index,)))
    return await session.finish(End((0, count * len(payload), 0, 0, 0)))


class Opener:
    """Makes fake ingests and keeps them; `state` is what they say on WELCOME."""

    def __init__(self, state: Welcome = NOTHING, fail_at: dict[str, Exception] | None = None) -> None:
        self.state, self.fail_at, self.made = state, fail_at or {}, list[FakeIngest]()
        self.error: Exception | None = None
        self.block: threading.Event | None = None

    def __call__(self, hello: Hello) -> FakeIngest:
        if self.error is not None:
            raise self.error
        self.made.append(FakeIngest(hello, self.state, dict(self.fail_at), block=self.block))
        return self.made[-1]


@pytest.mark.parametrize("payload", [NOISE, b"a row that is like the others" * 30_000, b"small" * 100, b"x"])
async def test_transfers_arrive_byte_for_byte_and_are_committed(payload: bytes) -> None:
    opener = Opener(Welcome(6, 1, 2, 3))
    progress: list[ResumePoint] = []
    async with replica(opener) as port, link(port) as session:
        assert session.welcome == Welcome(6, 1, 2, 3)
        session.on_progress = progress.append
        for mark in (7, 8):
            welcome = await ship(session, 20, payload)
            assert welcome.mark == mark and session.welcome == welcome
        assert session.payload_bytes == 40 * len(payload)
        shrinks = len(payload) >= 500  # each but the first is in the stream already
        assert (session.wire_bytes < session.payload_bytes) is shrinks
        expected = [ResumePoint((0, n * len(payload), 0, 0, 0), (n - 1,)) for n in (8, 16)]
        assert progress[:2] == expected and session.durable == progress[-1]
    (ingest,) = opener.made
    assert bytes(ingest.sections[1]) == payload * 20
    assert ingest.hello == HELLO and ingest.closed
    assert [call for call in ingest.calls if call != "data"] == [
        *("welcome", *("begin", "checkpoint", "checkpoint", "end") * 2, "close")
    ]


async def test_begin_says_from_where_the_replica_wants_the_transfer() -> None:
    opener = Opener()
    async with replica(opener) as port:
        async with link(port) as session:
            await session.begin(MANIFEST)
            await session.send(Data(Section.DIFF, 0, b"d" * 64))
            await session.send(Checkpoint((5,)))
            while not session.durable.cursor:
                await trio.sleep(0.001)
        point = ResumePoint((64, 0, 0, 0, 0), (5,))
        assert session.durable == point
        with trio.fail_after(10):
            while not opener.made[0].closed:
                await trio.sleep(0.001)
        resumed = opener.made[0]
        resumed.closed = False
    async with replica(lambda hello: resumed) as port, link(port) as session:
        assert await session.begin(MANIFEST) == point
        await session.finish(End((64, 0, 0, 0, 0)))


async def test_what_came_before_the_connection_ended_is_still_ingested() -> None:
    opener = Opener()
    async with replica(opener) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        protocol = LinkProtocol(Role.SENDER)
        await stream.send_all(joined(protocol.send(Greeting((1,), HELLO))))
        await _read_until(stream, protocol, Accept)
        await stream.send_all(joined(protocol.send(Begin(MANIFEST))))
        await _read_until(stream, protocol, Resume)
        for index in range(4):
            data = WireData(Section.DIFF, index * MIB, MIB, Encoding.RAW, NOISE)
            await stream.send_all(joined(protocol.send(data)))
        await stream.send_all(joined(protocol.send(Checkpoint((4,)))))
        await stream.aclose()
        with trio.fail_after(10):
            while not opener.made[0].closed:
                await trio.sleep(0.001)
    assert opener.made[0].durable.cursor == (4,)


async def _read_until(stream: trio.SocketStream, protocol: LinkProtocol, kind: type) -> None:
    with trio.fail_after(5):
        while True:
            for frame in protocol.receive(await stream.receive_some()):
                if isinstance(frame, kind):
                    return


async def test_the_sender_waits_at_the_window_until_progress_comes() -> None:
    opener = Opener()
    opener.block = threading.Event()
    async with replica(opener) as port, link(port) as session:
        await session.begin(MANIFEST)
        sent = 0

        async def send_all() -> None:
            nonlocal sent
            for index in range(48):
                await session.send(Data(Section.DIFF, index * MIB, NOISE))
                sent += 1
                if index % 8 == 7:
                    await session.send(Checkpoint((index,)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            await trio.sleep(0.3)
            assert sent <= WINDOW_BYTES // MIB
            opener.block.set()
        assert sent == 48
        await session.finish(End((48 * MIB, 0, 0, 0, 0)))


async def test_a_window_without_checkpoint_is_a_mistake_of_ours_and_does_not_hang() -> None:
    async with replica(Opener()) as port, link(port) as session:
        await session.begin(MANIFEST)
        for index in range(WINDOW_BYTES // MIB):
            await session.send(Data(Section.DIFF, index * MIB, NOISE))
        with pytest.raises(LocalProtocolError, match="without a Checkpoint"):
            await session.send(Data(Section.DIFF, WINDOW_BYTES, NOISE))


async def test_sending_outside_of_a_transfer_is_a_mistake_of_ours() -> None:
    async with replica(Opener()) as port, link(port) as session:
        with pytest.raises(LocalProtocolError):
            await session.send(Checkpoint(()))
        with pytest.raises(LocalProtocolError):
            await session.finish(End((0, 0, 0, 0, 0)))
        await session.begin(MANIFEST)
        with pytest.raises(LocalProtocolError):
            await session.begin(MANIFEST)


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (CapacityError("the disk is full"), CapacityError, "the disk is full"),
        (OSError(28, "No space left on device", "/srv/x"), CapacityError, "/srv/x: No space left"),
        (PositionMismatchError("the replica is at mark 7"), PositionMismatchError, "at mark 7"),
        (CorruptionError("journal-1", 512, "checksum"), LinkRefusedError, "damaged at byte 512"),
        (OSError(5, "Input/output error", "/srv/x"), LinkError, "Input/output error"),
        (PitfsError("an \x1b[31mescape\nand a line"), LinkRefusedError, r"an \?\[31mescape\?and a line"),
        (ZeroDivisionError("secret"), LinkError, "a mistake in pitfs there"),
    ],
)
@pytest.mark.parametrize("method", ["welcome", "begin", "data", "checkpoint", "end"])
async def test_what_the_ingest_raises_reaches_the_caller(
    method: str, raised: Exception, expected: type[PitfsError], words: str
) -> None:
    async with replica(Opener(fail_at={method: raised})) as port:
        with pytest.raises(expected, match=f"127.0.0.1:{port}: .*{words}") as caught:
            async with link(port) as session:
                await ship(session, 40)
        assert type(caught.value) is expected
        assert caught.value.retryable is (expected in (CapacityError, LinkError))


async def test_a_store_that_does_not_open_refuses_the_session() -> None:
    opener = Opener()
    opener.error = StoreError("/srv/db1: isn't a store")
    async with replica(opener) as port:
        with pytest.raises(LinkRefusedError, match="isn't a store"):
            async with link(port):
                pass


async def test_an_error_of_the_callers_block_comes_out_as_it_is() -> None:
    async with replica(Opener()) as port:
        with pytest.raises(ZeroDivisionError):
            async with link(port):
                raise ZeroDivisionError


async def test_cancelling_leaves_nothing_behind_and_the_receiver_goes_on() -> None:
    opener = Opener()
    opener.block = threading.Event()
    async with replica(opener) as port:
        with trio.move_on_after(0.1) as scope:
            async with link(port) as session:
                await ship(session, 1000)
        assert scope.cancelled_caught
        opener.block.set()
        async with link(port) as session:
            await ship(session, 8)


async def test_what_came_before_a_connection_ended_within_a_frame_is_ingested() -> None:
    opener = Opener()
    opener.block = threading.Event()
    async with replica(opener) as port:
        async with link(port) as session:
            await session.begin(MANIFEST)
            for index in range(2):
                await session.send(Data(Section.DIFF_BLOCKS, index * len(NOISE), NOISE))
                while session.payload_bytes < (index + 1) * len(NOISE):
                    await trio.sleep(0.001)
            while session.connection.is_mid_frame:  # what is counted may still be on its way to the socket
                await trio.sleep(0.001)
            await session.connection.stream.send_all(b"\x05")
        with trio.fail_after(5):
            opener.block.set()
            while not opener.made[0].closed:
                await trio.sleep(0.001)
    assert opener.made[0].sections[1] == NOISE * 2


async def test_a_second_session_of_a_group_ends_the_first() -> None:
    opener = Opener()
    async with replica(opener) as port, link(port) as first:
        await first.begin(MANIFEST)
        async with link(port) as second:
            assert opener.made[0].closed
            with pytest.raises(LinkError, match="took over"), trio.fail_after(10):
                await first.finish(End((0, 0, 0, 0, 0)))
            await ship(second, 8)


async def test_a_sender_that_was_started_earlier_does_not_end_the_session_of_a_later_one() -> None:
    earlier, later = (msgspec.structs.replace(HELLO, epoch=epoch) for epoch in (5, 6))
    async with replica(Opener()) as port, link(port, later) as session:
        await session.begin(MANIFEST)
        with pytest.raises(LinkError, match="was started later: stop the one"):
            async with link(port, earlier):
                pass
        await session.send(Data(Section.DIFF, 0, bytes(24)))
        await session.finish(End((24, 0, 0, 0, 0)))


async def test_groups_are_served_side_by_side() -> None:
    opener = Opener()

    async def one(port: int, group: str) -> None:
        async with link(port, msgspec.structs.replace(HELLO, group=group)) as session:
            await ship(session, 16)

    async with replica(opener) as port, trio.open_nursery() as nursery:
        for index in range(5):
            nursery.start_soon(one, port, f"group{index}")
    assert sorted(ingest.hello.group for ingest in opener.made) == [f"group{index}" for index in range(5)]


async def test_a_receiver_that_stops_tells_its_senders_and_closes_their_stores() -> None:
    opener = Opener()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    running = trio.CancelScope()

    async def run() -> None:
        with running:
            await serve(listeners, opener)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        async with link(listeners[0].socket.getsockname()[1]) as session:
            await session.begin(MANIFEST)
            running.cancel()
            with pytest.raises(LinkError, match="the receiver stops") as caught, trio.fail_after(5):
                await session.finish(End((1, 0, 0, 0, 0)))
        assert caught.value.retryable
    assert opener.made[0].closed


async def test_too_many_sessions_are_told_to_come_again() -> None:
    async with replica(Opener(), limits=Limits(sessions=1)) as port, link(port):
        with pytest.raises(LinkError, match="1 sessions already") as caught:
            async with link(port, msgspec.structs.replace(HELLO, group="other")):
                pass
        assert caught.value.retryable


async def test_idle_connections_do_not_shut_out_a_sender() -> None:
    idle = []
    try:
        async with replica(Opener(), limits=Limits(handshaking=8)) as port:
            for _ in range(100):
                idle.append(await trio.open_tcp_stream("127.0.0.1", port))
            with trio.fail_after(5):
                async with link(port) as session:
                    await ship(session, 1)
    finally:
        for stream in idle:
            await trio.aclose_forcefully(stream)


async def test_a_peer_that_never_greets_is_ended() -> None:
    async with replica(Opener(), limits=Limits(timeouts=Timeouts(connect_s=0.1))) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        with trio.fail_after(5):
            assert await stream.receive_some() == PREFACE
            assert await stream.receive_some() == b""
        await stream.aclose()


async def test_a_receiver_that_falls_silent_is_noticed_while_the_caller_waits() -> None:
    async def silent(stream: trio.SocketStream) -> None:
        protocol = LinkProtocol(Role.RECEIVER)
        await stream.send_all(joined(protocol.start()))
        while True:
            for frame in protocol.receive(await stream.receive_some()):
                if isinstance(frame, Greeting):
                    await stream.send_all(joined(protocol.send(Accept(1, NOTHING))))

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, silent, [listener])
        with pytest.raises(LinkError, match=r"nothing heard from it for 0.3 s"), trio.fail_after(5):
            async with link(port, timeouts=QUICK) as session:
                await session.begin(MANIFEST)
        nursery.cancel_scope.cancel()


async def test_pings_keep_an_idle_and_a_busy_session_alive() -> None:
    opener = Opener()
    opener.block = threading.Event()
    timeouts = Timeouts(ping_s=0.1, dead_s=1)
    async with replica(opener, limits=Limits(timeouts=timeouts)) as port, link(port, timeouts=timeouts) as session:
        await trio.sleep(1.2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ship, session, 30)
            await trio.sleep(1.2)  # the ingest doesn't move, so the receiver reads no more
            opener.block.set()


async def test_a_sender_that_falls_silent_is_ended_by_the_receiver(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pitfs")
    opener = Opener()
    async with replica(opener, limits=Limits(timeouts=Timeouts(ping_s=0.05, dead_s=0.2))) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(joined(LinkProtocol(Role.SENDER).send(Greeting((1,), HELLO))))
        with trio.fail_after(5):
            while await stream.receive_some():
                pass
        await stream.aclose()
    assert opener.made[0].closed
    assert "session began, group db1 at mark 0" in caplog.text
    assert "nothing heard from it for 0.2 s" in caplog.text


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (b"", LinkError, "closed the connection without an answer; does it want TLS"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", RemoteProtocolError, "isn't pitfs: it is a web server"),
        (b"\x15\x03\x03\x00\x02\x02\x46", RemoteProtocolError, "it speaks TLS"),
        (PREFACE + b"\xff" * 16, RemoteProtocolError, "unknown frame type 255"),
    ],
)
async def test_a_peer_that_is_no_receiver_is_told_apart(
    answer: bytes, error: type[LinkError], words: str
) -> None:
    async def say(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, say, [listener])
        with pytest.raises(error, match=f"127.0.0.1:{port}: .*{words}") as caught:
            async with link(port):
                pass
        assert type(caught.value) is error
        nursery.cancel_scope.cancel()


async def test_a_peer_of_another_version_is_refused_with_both_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with replica(Opener()) as port:
        monkeypatch.setattr("pitfs.link.sessions.sender.VERSIONS", (3, 4))
        with pytest.raises(LinkRefusedError, match="speaks versions 2, 1 of the protocol and the sender 3, 4"):
            async with link(port):
                pass


async def test_a_stranger_on_the_receivers_port_is_ended_and_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with replica(Opener()) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with trio.fail_after(5):
            while await stream.receive_some():
                pass
        await stream.aclose()
        async with link(port) as session:
            await ship(session, 1)
    assert "the peer isn't pitfs: it is a web client" in caplog.text


async def test_a_peer_that_breaks_the_protocol_after_its_hello_is_told_so() -> None:
    opener = Opener()
    async with replica(opener) as port, link(port) as session:
        await session.connection.stream.send_all(b"\xff" * 16)
        with pytest.raises(LinkError, match="unknown frame type 255"), trio.fail_after(5):
            await session.begin(MANIFEST)
    assert opener.made[0].closed


async def test_a_zstd_bomb_ends_the_session_and_nothing_else() -> None:
    async with replica(Opener()) as port:
        async with link(port) as session:
            await session.begin(MANIFEST)
            bomb = WireData(Section.DIFF, 0, MIB, Encoding.STREAM, zstd.compress(bytes(1 << 28)))
            await session.connection.outgoing.put(bomb, 1)
            with pytest.raises(LinkError, match="DATA at byte 0 of DIFF"):
                await session.finish(End((MIB, 0, 0, 0, 0)))
        async with link(port) as session:
            await ship(session, 1)


async def test_nobody_listening_is_said_with_host_and_port() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(LinkError, match=f"127.0.0.1:{port}: connection refused") as caught:
            async with link(port):
                pass
    assert caught.value.retryable


async def test_a_name_that_does_not_resolve_is_said() -> None:
    with pytest.raises(LinkError, match=r"nobody\.invalid:7420: the name can't be resolved"):
        async with connect("nobody.invalid", 7420, tls=None, hello=HELLO, rate_bytes_per_s=None):
            pass


async def test_a_peer_that_does_not_answer_at_all_is_given_up() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")  # nobody accepts
    with pytest.raises(LinkError, match="nothing heard from it"), trio.fail_after(5):
        async with link(listener.socket.getsockname()[1], timeouts=QUICK):
            pass
    await listener.aclose()


async def test_without_tls_only_loopback_is_talked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitfs.link.sessions.connect.is_loopback", lambda address: address != "127.0.0.1")
    async with replica(Opener()) as port:
        with pytest.raises(UsageError, match="insecure is for loopback only"):
            async with link(port):
                pass


async def test_the_rate_is_held() -> None:
    """Only the bound that can't depend on the machine: it mustn't be faster."""
    rate, count = 4 * MIB, 3
    async with replica(Opener()) as port, link(port, rate=rate) as session:
        start_s = trio.current_time()
        await session.begin(MANIFEST)
        for index in range(count):  # other noise each time, else it would shrink
            payload = random.Random(index).randbytes(MIB)
            await session.send(Data(Section.DIFF_BLOCKS, index * MIB, payload))
        await session.finish(End((0, count * MIB, 0, 0, 0)))
        burst_bytes = rate // 20
        assert trio.current_time() - start_s >= (count * MIB - burst_bytes) / rate * 0.99
