"""Both ends of a link for tests: sample values, an ingest that only remembers, certificates."""

from __future__ import annotations

import datetime
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
import trustme

from pitfs.errors import PitfsError
from pitfs.link.protocol.frames import (
    VERSIONS,
    Accept,
    Buffer,
    Committed,
    Encoding,
    Fault,
    Frame,
    Greeting,
    Parked,
    Ping,
    Pong,
    Progress,
    Resume,
    WireData,
)
from pitfs.link.protocol.protocol import LinkProtocol, Role
from pitfs.link.sessions.connect import Limits, serve
from pitfs.link.sessions.receiver import OpenHealer, ReadGrants
from pitfs.link.transport.tls import LinkContext
from pitfs.model.transfer import (
    Begin,
    Bookmark,
    Checkpoint,
    Data,
    Durable,
    End,
    Flush,
    Gap,
    Given,
    Hello,
    Manifest,
    Park,
    ResumePoint,
    Section,
    StreamMark,
    TransferKind,
    VolumeInfo,
    Want,
    Wanted,
    Welcome,
    Writes,
)

HELLO = Hello("db1", "00ff" * 8, (VolumeInfo("root", 1 << 30, 4096), VolumeInfo("data", 1 << 20, 512)))
MANIFEST = Manifest(
    mark=1,
    kind=TransferKind.INTERVAL,
    from_seq=0,
    from_time_ns=5,
    to_seq=9,
    to_time_ns=50,
    first_time_ns=7,
    protected_through_ns=60,
    granularity_ns=None,
    cause="within budget",
    diff_count=2,
    journal_count=0,
    position_count=0,
    identity="c0ffee",
    bookmarks=(Bookmark("before-upgrade", 9, 50),),
    gaps=(Gap(1, 8, 3, 9, "journal full"),),
)
WELCOME = Welcome(3, 12, 70, 80)
NOTHING = Welcome(0, 0, 0, 0)
NOWHERE = ResumePoint()
POINT = ResumePoint((64, 8, 0, 0, 0), (1, 2, 3))


def conversation(version: int = VERSIONS[0]) -> list[tuple[Role, Frame]]:
    """One short valid session with every frame of a version but REFUSE, in the order in which it is sent."""
    sender, receiver = Role.SENDER, Role.RECEIVER
    healing: list[tuple[Role, Frame]] = [
        (receiver, Want((Wanted(1, 7, 1 << 63, 3, 9), Wanted(0, 1 << 40, 0, 0, 1 << 62)))),
        (sender, Given(b"c" * 512)),
        (sender, Given(None)),
    ]
    return [
        (sender, Greeting(VERSIONS[-version:], HELLO)),
        (receiver, Ping(1)),
        (receiver, Accept(version, WELCOME)),
        (sender, Pong(1)),
        (sender, Begin(MANIFEST)),
        (receiver, Resume(ResumePoint())),
        (sender, WireData(Section.DIFF, 0, 64, Encoding.RAW, b"d" * 64)),
        (sender, WireData(Section.DIFF_BLOCKS, 0, 8, Encoding.STREAM, b"zz")),
        (sender, Checkpoint((1, 2, 3))),
        (receiver, Progress(POINT)),
        (sender, Ping(2)),
        (receiver, Pong(2)),
        (sender, End((64, 8, 0, 0, 0))),
        (receiver, Committed(Welcome(5, 13, 71, 81))),
        (sender, Begin(MANIFEST)),
        (receiver, Resume(ResumePoint())),
        (sender, Park()),
        (receiver, Parked(ResumePoint())),
        (sender, WireData(Section.WRITES, 14, 24, Encoding.RAW, b"w" * 24)),
        (sender, WireData(Section.WRITE_BLOCKS, 0, 512, Encoding.RAW, b"b" * 512)),
        (sender, Flush(14, 1 << 63, 72)),
        (sender, StreamMark(5, 14, 71, 82, "noon")),
        (receiver, Durable(14, 71, 4, 72)),
        (receiver, Durable(14, 71, 5, 82)),
        *(healing if version > 1 else []),
        (sender, Begin(MANIFEST)),
        (receiver, Fault("capacity", "the disk is full", True)),
    ]


def wire_of(frames: list[tuple[Role, Frame]]) -> dict[Role, bytes]:
    """What each side sends in a conversation, the protocol objects of both in step."""
    peers = {role: LinkProtocol(role) for role in Role}
    sent = dict.fromkeys(Role, b"")
    for role, frame in frames:
        data = b"".join(peers[role].send(frame))
        sent[role] += data
        other = Role.RECEIVER if role is Role.SENDER else Role.SENDER
        assert list(peers[other].receive(data)) == [frame]
    return sent


@dataclass
class FakeIngest:
    """Keeps what comes in memory; `fail_at` maps the name of a method to the error that it raises."""

    hello: Hello
    start: Welcome = NOTHING
    fail_at: dict[str, Exception] = field(default_factory=dict)
    sections: list[bytearray] = field(default_factory=lambda: [bytearray() for _ in range(5)])
    calls: list[str] = field(default_factory=list)
    durable: ResumePoint = NOWHERE
    batches: list[Writes] = field(default_factory=list)
    marks: list[StreamMark] = field(default_factory=list)
    closed: bool = False
    ended: bool = False  # the transfer; what begins next begins anew
    block: threading.Event | None = None  # `data` waits for it
    hold_flush: threading.Event | None = None  # `flush` does
    _busy: threading.Lock = field(default_factory=threading.Lock)

    def _enter(self, name: str) -> None:
        assert self._busy.acquire(blocking=False), "two calls at once"
        try:
            self.calls.append(name)
            if name in self.fail_at:
                raise self.fail_at[name]
        finally:
            self._busy.release()

    def welcome(self) -> Welcome:
        self._enter("welcome")
        return self.start

    def begin(self, manifest: Manifest) -> ResumePoint:
        self._enter("begin")
        if self.ended:
            self.ended, self.durable = False, NOWHERE
            self.sections = [bytearray() for _ in range(5)]
        return self.durable

    def data(self, frame: Data) -> None:
        if self.block is not None:
            self.block.wait(10)
        self._enter("data")
        section = self.sections[frame.section - 1]
        if frame.offset > len(section):
            raise PitfsError("a gap")
        section[frame.offset : frame.offset + len(frame.payload)] = frame.payload

    def checkpoint(self, cursor: tuple[int, ...]) -> ResumePoint:
        self._enter("checkpoint")
        self.durable = ResumePoint(self._lengths(), cursor)
        return self.durable

    def park(self, cursor: tuple[int, ...]) -> ResumePoint:
        self._enter("park")
        self.durable = ResumePoint(self._lengths(), cursor)
        return self.durable

    def end(self, end: End) -> Welcome:
        self._enter("end")
        if end.lengths != self._lengths():
            raise PitfsError(f"lengths {end.lengths} aren't {self._lengths()}")
        self.ended = True
        self.start = Welcome(self.start.mark + 1, 9, 50, 60)
        return self.start

    def write(self, writes: Writes) -> None:
        self._enter("write")
        assert self.batches == [] or writes.first_seq == self.batches[-1].first_seq + len(self.batches[-1].rows)
        self.batches.append(writes)

    def flush(self, protected_through_ns: int) -> Durable:
        if self.hold_flush is not None:
            self.hold_flush.wait(10)
        self._enter("flush")
        last = self.batches[-1].first_seq + len(self.batches[-1].rows) - 1 if self.batches else 0
        return Durable(last, 0, self.start.mark, protected_through_ns)

    def mark(self, mark: StreamMark) -> Durable:
        self._enter("mark")
        self.marks.append(mark)
        return Durable(mark.seq, mark.time_ns, mark.mark, mark.protected_through_ns)

    def publish(self) -> None:
        self._enter("publish")

    def close(self) -> None:
        self._enter("close")
        self.closed = True

    def _lengths(self) -> tuple[int, int, int, int, int]:
        a, b, c, d, e = (len(section) for section in self.sections)
        return (a, b, c, d, e)


@asynccontextmanager
async def replica(
    open_ingest: Callable[[Hello], FakeIngest],
    tls: LinkContext | None = None,
    limits: Limits | None = None,
    read_grants: ReadGrants | None = None,
    open_healer: OpenHealer | None = None,
) -> AsyncIterator[int]:
    """A receiver on a free port of 127.0.0.1 for as long as the context."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await serve(
                listeners, open_ingest, tls=tls, limits=limits or Limits(), read_grants=read_grants,
                open_healer=open_healer,
            )  # fmt: skip

        nursery.start_soon(run)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@dataclass(frozen=True)
class Files:
    certificate: str
    key: str
    authority: str

    def as_arguments(self) -> tuple[str, str, str]:
        return self.certificate, self.key, self.authority


def issue(
    directory: Path,
    name: str,
    authority: trustme.CA,
    *identities: str,
    trust: trustme.CA | None = None,
    not_after: datetime.datetime | None = None,
) -> Files:
    """Certificate and key of `name`, signed by `authority`, and the authority that it trusts, as files."""
    certificate = authority.issue_cert(*identities, not_after=not_after)
    paths = [directory / f"{name}.{kind}.pem" for kind in ("certificate", "key", "authority")]
    paths[0].write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(paths[1]))
    (trust or authority).cert_pem.write_to_path(str(paths[2]))
    return Files(*map(str, paths))


def joined(buffers: list[Buffer]) -> bytes:
    return b"".join(buffers)
