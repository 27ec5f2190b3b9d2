"""The server's side of NBD, without a socket: what each client's bytes lead to, however they are cut."""

from __future__ import annotations

import struct

import pytest

from pitfs.errors import LocalProtocolError, RemoteProtocolError
from pitfs.nbd.negotiation import Close, ExportInfo, ListExports, LookUpExport, NbdState, Send, StartTls
from pitfs.nbd.protocol import Event, NbdProtocol, Request
from tests.helpers import nbd

NAME = "latest/root"
EXPORT = ExportInfo("2026-11-22T23-54-00.000000000Z/root", "volume root", 1 << 20, 4096)
HELLO = struct.pack(">I", 3)


class Server:
    """A protocol object with one export; answers what is asked and keeps what it would send."""

    def __init__(self, *, tls: bool = False) -> None:
        self.protocol = NbdProtocol(offers_tls=tls)
        self.sent = self.protocol.greeting()
        self.events: list[Event] = []

    def feed(self, data: bytes) -> list[Event]:
        """The events of these bytes, those of options answered."""
        came: list[Event] = []
        for event in self.protocol.receive(data):
            came.append(event)
            match event:
                case Send(answer) | Close(answer):
                    self.sent += answer
                case ListExports():
                    self.sent += self.protocol.answer_list([(NAME, "newest")])
                case LookUpExport(name):
                    export = EXPORT if name == NAME else None
                    self.sent += self.protocol.answer_export(export, "no such export")
                case StartTls(answer):
                    self.sent += answer
                    self.protocol.tls_started()
        self.events += came
        return came

    def opened(self, *, structured: bool = True) -> Server:
        if structured:
            self.feed(HELLO + nbd.option(nbd.STRUCTURED) + nbd.meta(NAME, nbd.CONTEXT) + nbd.go(NAME))
        else:
            self.feed(HELLO + nbd.go(NAME))
        assert self.protocol.state is NbdState.TRANSMISSION
        self.sent, self.events = b"", []
        return self

    def replies(self) -> list[tuple[int, int, bytes]]:
        """(option, type, data) of the option replies so far, behind the greeting."""
        found, rest = [], self.sent[18:]
        while rest:
            magic, option, kind, length = struct.unpack_from(">QIII", rest)
            assert magic == 0x3E889045565A9
            found.append((option, kind, rest[20 : 20 + length]))
            rest = rest[20 + length :]
        return found


def test_the_bytes_of_a_handshake() -> None:
    server = Server()
    server.feed(HELLO + nbd.option(nbd.STRUCTURED) + nbd.meta(NAME, nbd.CONTEXT) + nbd.go(NAME))
    ack = "0003e889045565a9 {:08x} 00000001 00000000"
    told = EXPORT.name.encode()
    assert server.sent == bytes.fromhex(
        "4e42444d41474943 49484156454f5054 0003"
        + ack.format(8)
        + "0003e889045565a9 0000000a 00000004 00000013 00000001 626173653a616c6c6f636174696f6e"
        + ack.format(10)
        + "0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 0583"
        + "0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00001000 02000000"
        + f"0003e889045565a9 00000007 00000003 {2 + len(told):08x} 0001" + told.hex()
        + "0003e889045565a9 00000007 00000003 0000000d 0002" + b"volume root".hex()
        + ack.format(7)
    )  # fmt: skip


def test_the_bytes_of_replies() -> None:
    server = Server().opened()
    (read, df, status) = server.feed(
        nbd.request(nbd.READ, 4096, 8192, 0x1122)
        + nbd.request(nbd.READ, 0, 100, 1, nbd.DF)
        + nbd.request(nbd.BLOCK_STATUS, 0, 1 << 20, 2, nbd.REQ_ONE)
    )
    protocol = server.protocol
    assert isinstance(read, Request) and isinstance(df, Request) and isinstance(status, Request)
    assert protocol.is_divisible(read) and not protocol.is_divisible(df)
    cookie, offset = "0000000000001122", "{:016x}"
    assert protocol.data_header(read, 4096, 4096) == bytes.fromhex(
        f"668e33ef 0000 0001 {cookie} 00001008" + offset.format(4096)
    )
    assert protocol.data_header(read, 8192, 4096) == bytes.fromhex(
        f"668e33ef 0001 0001 {cookie} 00001008" + offset.format(8192)
    )
    assert protocol.failed(read.cookie, 5, "no", 8192) == bytes.fromhex(
        f"668e33ef 0000 8002 {cookie} 00000010 00000005 0002 6e6f" + offset.format(8192)
    )
    assert protocol.finished(read) == bytes.fromhex(f"668e33ef 0001 0000 {cookie} 00000000")
    assert protocol.extents(status, [(4096, 0), (8192, 3)]) == bytes.fromhex(
        "668e33ef 0001 0005 0000000000000002 00000014 00000001 00001000 00000000 00002000 00000003"
    )
    simple = Server().opened(structured=False)
    (read,) = simple.feed(nbd.request(nbd.READ, 4096, 8192, 0x1122))
    assert isinstance(read, Request) and not simple.protocol.is_divisible(read)
    assert simple.protocol.data_header(read, 4096, 8192) == bytes.fromhex(f"67446698 00000000 {cookie}")
    assert simple.protocol.failed(read.cookie, 5, "no") == bytes.fromhex(f"67446698 00000005 {cookie}")


WHOLE = nbd.session(
    NAME,
    nbd.request(nbd.READ, 0, 4096),
    nbd.request(nbd.WRITE, 0, 5, 9) + b"never",
    nbd.request(nbd.BLOCK_STATUS, 0, 1 << 20),
    nbd.request(nbd.READ, 1 << 20, 1),
    nbd.request(nbd.CACHE, 0, 1 << 20),
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 28, 1000])
def test_a_session_is_the_same_however_its_bytes_are_cut(size: int) -> None:
    whole, cut = Server(), Server()
    whole.feed(WHOLE)
    for start in range(0, len(WHOLE), size):
        cut.feed(WHOLE[start : start + size])
    assert (cut.events, cut.sent) == (whole.events, whole.sent)
    assert [event.command for event in whole.events if isinstance(event, Request)] == [
        nbd.READ, nbd.BLOCK_STATUS, nbd.CACHE,
    ]  # fmt: skip
    assert whole.protocol.state is NbdState.CLOSED


def test_what_comes_behind_the_goodbye_is_not_looked_at() -> None:
    for goodbye in (WHOLE, HELLO + nbd.option(nbd.ABORT)):
        server = Server()
        server.feed(goodbye + b"\xff" * 100)
        assert isinstance(server.events[-1], Close)
        assert server.feed(b"more") == []
        server.protocol.receive_eof()


def test_an_end_in_the_middle_is_said() -> None:
    for size in range(len(WHOLE)):
        server = Server()
        server.feed(WHOLE[:size])
        try:
            server.protocol.receive_eof()
        except RemoteProtocolError:
            continue
        # Between two units is a clean end.
        rest = WHOLE[size:]
        assert size == 0 or rest.startswith((b"IHAVEOPT", bytes.fromhex("25609513"))), size


def test_options_are_answered() -> None:
    server = Server()
    server.feed(
        HELLO
        + nbd.option(nbd.LIST)
        + nbd.option(11)  # extended headers
        + nbd.go("other/root", nbd.INFO)
        + nbd.meta(NAME, nbd.CONTEXT)  # before structured replies
        + nbd.option(nbd.STARTTLS)
        + nbd.option(nbd.LIST, b"x")
        + nbd.option(nbd.GO, b"\xff" * 10)
        + nbd.go("\udc80".encode("utf-8", "surrogatepass").decode("latin-1"), nbd.INFO)
        + nbd.option(nbd.STRUCTURED)
        + nbd.meta(NAME, number=nbd.LIST_META)
        + nbd.meta(NAME, "base:", "other:x", number=nbd.LIST_META)
        + nbd.meta(NAME, "base:")
        + nbd.meta("other/root", nbd.CONTEXT)
        + nbd.go(NAME, nbd.INFO)
    )
    kinds = [(option, kind) for option, kind, _ in server.replies()]
    assert kinds == [
        (nbd.LIST, nbd.SERVER), (nbd.LIST, nbd.ACK), (11, nbd.ERR_UNSUP), (nbd.INFO, nbd.ERR_UNKNOWN),
        (nbd.SET_META, nbd.ERR_INVALID), (nbd.STARTTLS, nbd.ERR_POLICY), (nbd.LIST, nbd.ERR_INVALID),
        (nbd.GO, nbd.ERR_INVALID), (nbd.INFO, nbd.ERR_UNKNOWN), (nbd.STRUCTURED, nbd.ACK),
        (nbd.LIST_META, nbd.META), (nbd.LIST_META, nbd.ACK), (nbd.LIST_META, nbd.META), (nbd.LIST_META, nbd.ACK),
        (nbd.SET_META, nbd.ACK), (nbd.SET_META, nbd.ERR_UNKNOWN),
        *[(nbd.INFO, nbd.REP_INFO)] * 4, (nbd.INFO, nbd.ACK),
    ]  # fmt: skip
    assert server.replies()[0][2] == b"\0\0\0\x0blatest/rootnewest"
    assert server.protocol.state is NbdState.OPTIONS


def test_old_clients_open_exports_by_name_alone() -> None:
    for flags, zeroes in ((3, 0), (1, 124), (0, 124)):
        server = Server()
        server.feed(struct.pack(">I", flags) + nbd.option(nbd.EXPORT_NAME, NAME.encode()))
        assert server.sent[18:] == struct.pack(">QH", 1 << 20, 0x503) + bytes(zeroes)
        assert server.protocol.state is NbdState.TRANSMISSION
    server = Server()
    server.feed(HELLO + nbd.option(nbd.EXPORT_NAME, b"other/root"))
    assert server.sent == nbd.GREETING and server.protocol.state is NbdState.CLOSED


def test_block_status_is_only_for_the_export_that_it_was_selected_for() -> None:
    server = Server()
    server.feed(HELLO + nbd.option(nbd.STRUCTURED) + nbd.go(NAME))
    assert not any(isinstance(event, Request) for event in server.feed(nbd.request(nbd.BLOCK_STATUS, 0, 512)))
    server = Server()
    server.feed(HELLO + nbd.option(nbd.STRUCTURED) + nbd.meta(NAME, nbd.CONTEXT) + nbd.meta(NAME) + nbd.go(NAME))
    assert not any(isinstance(event, Request) for event in server.feed(nbd.request(nbd.BLOCK_STATUS, 0, 512)))


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (nbd.request(nbd.READ, (1 << 20) - 1, 2), nbd.EINVAL),
        (nbd.request(nbd.READ, 1 << 63, 1), nbd.EINVAL),
        (nbd.request(nbd.READ, 0, 0), nbd.EINVAL),
        (nbd.request(nbd.READ, 0, 512, flags=1), nbd.EINVAL),
        (nbd.request(nbd.READ, 0, (32 << 20) + 1), nbd.EINVAL),
        (nbd.request(nbd.BLOCK_STATUS, 0, 2 << 20), nbd.EINVAL),
        (nbd.request(nbd.CACHE, 0, 512, flags=nbd.DF), nbd.EINVAL),
        (nbd.request(nbd.FLUSH), nbd.EINVAL),
        (nbd.request(99, 0, 1), nbd.EINVAL),
        (nbd.request(nbd.TRIM, 0, 512), nbd.EPERM),
        (nbd.request(nbd.WRITE_ZEROES, 0, 512), nbd.EPERM),
        (nbd.request(nbd.WRITE, 0, 0), nbd.EPERM),
        (nbd.request(nbd.WRITE, 1 << 40, 512) + b"w" * 512, nbd.EPERM),
    ],
)
def test_what_can_not_be_done_is_an_error_and_the_next_request_is_served(
    asked: bytes, error: int, structured: bool
) -> None:
    server = Server().opened(structured=structured)
    refused, served = server.feed(asked + nbd.request(nbd.READ, 0, 512))
    assert isinstance(refused, Send) and isinstance(served, Request)
    if structured:
        magic, flags, kind, cookie, _, found = struct.unpack_from(">IHHQII", refused.data)
        assert (magic, flags, kind, cookie, found) == (0x668E33EF, 1, 0x8001, 7, error)
    else:
        assert refused.data == struct.pack(">IIQ", 0x67446698, error, 7)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 4),
        b"GET / HTTP/1.1\r\n\r\n",
        HELLO + b"IHAVEOPS" + bytes(8),
        HELLO + b"IHAVEOPT" + struct.pack(">II", nbd.GO, (32 << 10) + 1),
        HELLO + nbd.option(nbd.EXPORT_NAME, b"\xff"),
        HELLO + nbd.option(nbd.EXPORT_NAME, b"x" * 4097),
    ],
)
def test_nonsense_ends_the_negotiation(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Server().feed(data)


@pytest.mark.parametrize("data", [bytes(28), nbd.request(nbd.WRITE, 0, (32 << 20) + 1)])
def test_nonsense_ends_the_transmission(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Server().opened().feed(data)


def test_nothing_is_told_before_tls_where_it_is_offered() -> None:
    server = Server(tls=True)
    asked = nbd.option(nbd.LIST) + nbd.go(NAME) + nbd.option(nbd.STRUCTURED) + nbd.meta(NAME) + nbd.option(77)
    server.feed(HELLO + asked)
    assert [kind for _, kind, _ in server.replies()] == [nbd.ERR_TLS_REQD] * 5
    assert not any(isinstance(event, LookUpExport | ListExports) for event in server.events)
    with pytest.raises(RemoteProtocolError, match="before TLS"):
        server.feed(nbd.option(nbd.EXPORT_NAME, NAME.encode()))
    server = Server(tls=True)
    server.feed(HELLO + nbd.option(nbd.STARTTLS))
    server.feed(nbd.option(nbd.STARTTLS) + nbd.go(NAME))
    assert [kind for _, kind, _ in server.replies()][:2] == [nbd.ACK, nbd.ERR_INVALID]
    assert server.protocol.state is NbdState.TRANSMISSION and not server.protocol.structured


def test_plain_text_behind_starttls_is_not_taken_for_something_said_within_tls() -> None:
    server = Server(tls=True)
    with pytest.raises(RemoteProtocolError, match="STARTTLS"):
        server.feed(HELLO + nbd.option(nbd.STARTTLS) + nbd.option(nbd.LIST))
    assert server.events == []


def test_an_answer_that_is_late_or_was_not_asked_for_is_our_mistake() -> None:
    protocol = NbdProtocol(offers_tls=False)
    with pytest.raises(LocalProtocolError):
        protocol.answer_list([])
    asked = protocol.receive(HELLO + nbd.option(nbd.LIST) + nbd.option(nbd.LIST))
    assert next(asked) == ListExports()
    with pytest.raises(LocalProtocolError):
        next(asked)
    for answer in (lambda: protocol.answer_export(EXPORT), protocol.tls_started):
        with pytest.raises(LocalProtocolError):
            answer()
    assert protocol.state is NbdState.LISTING
