"""The protocol's state machine and frames, without I/O."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress

import msgspec
import pytest
import xxhash

from pitfs.errors import LocalProtocolError, RemoteProtocolError
from pitfs.link.protocol.frames import (
    HEADER,
    MAX_GROWTH_BYTES,
    PREFACE,
    VERSIONS,
    Accept,
    Committed,
    Encoding,
    Fault,
    Frame,
    FrameType,
    Greeting,
    Ping,
    Progress,
    Refuse,
    Resume,
    WireData,
)
from pitfs.link.protocol.protocol import LinkProtocol, LinkState, Role
from pitfs.model.transfer import (
    MAX_CONTENT_BYTES,
    MAX_NUMBER,
    MAX_PAYLOAD_BYTES,
    MAX_WANTED,
    Begin,
    Bookmark,
    Checkpoint,
    CoarseInterval,
    Durable,
    End,
    Flush,
    Gap,
    Given,
    Hello,
    Manifest,
    ResumePoint,
    Section,
    VolumeInfo,
    Want,
    Wanted,
    Welcome,
)
from tests.helpers.links import HELLO, MANIFEST, WELCOME, conversation, joined, wire_of

OTHER = {Role.SENDER: Role.RECEIVER, Role.RECEIVER: Role.SENDER}
SESSION = conversation()


def walked(role: Role, count: int) -> LinkProtocol:
    """A protocol object of this role after both prefaces and the first `count` frames of the conversation."""
    peers = {each: LinkProtocol(each) for each in Role}
    for each in Role:
        list(peers[OTHER[each]].receive(joined(peers[each].start())))
    for who, frame in SESSION[:count]:
        list(peers[OTHER[who]].receive(joined(peers[who].send(frame))))
    return peers[role]


def framed(
    frame_type: int, body: bytes, flags: int = 0, reserved: int = 0, length: int | None = None
) -> bytes:
    start = struct.pack("<IBBH", len(body) if length is None else length, frame_type, flags, reserved)
    return start + xxhash.xxh3_64_intdigest(start + body).to_bytes(8, "little") + body


def packed(frame_type: FrameType, value: object) -> bytes:
    return framed(frame_type, msgspec.msgpack.encode(value))


def refused(protocol: LinkProtocol, data: bytes) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        list(protocol.receive(data))
    return str(caught.value)


@pytest.mark.parametrize("index", range(len(SESSION)), ids=lambda i: type(SESSION[i][1]).__name__ + str(i))
def test_each_frame_arrives_whole_byte_by_byte_and_with_trailing_data(index: int) -> None:
    who, frame = SESSION[index]
    data = joined(walked(who, index).send(frame))
    assert list(walked(OTHER[who], index).receive(data)) == [frame]
    peer = walked(OTHER[who], index)
    assert [got for i in range(len(data)) for got in peer.receive(data[i : i + 1])] == [frame]
    peer = walked(OTHER[who], index)
    assert list(peer.receive(data + b"\x05")) == [frame]
    if peer.state is not LinkState.CLOSED:
        with pytest.raises(RemoteProtocolError, match="middle of a frame"):
            peer.receive_eof()


def test_two_peers_joined_in_memory_hold_a_whole_session_and_agree_on_its_end() -> None:
    peers = {role: LinkProtocol(role) for role in Role}
    for who, frame in SESSION:
        got = list(peers[OTHER[who]].receive(joined(peers[who].send(frame))))
        assert got == [frame]
        assert peers[who].state is peers[OTHER[who]].state
    assert peers[Role.SENDER].state is LinkState.CLOSED


@pytest.mark.parametrize("role", list(Role))
def test_a_session_cut_at_any_byte_gives_the_frames_before_the_cut_and_tells_a_torn_one(role: Role) -> None:
    wire = wire_of(SESSION)[OTHER[role]]
    theirs = [frame for who, frame in SESSION if who is not role]
    whole_at = []
    for cut in range(len(wire) + 1):
        peer = LinkProtocol(role)
        script = iter(SESSION)
        _say_until_theirs(peer, role, script)
        got: list[Frame] = []
        for frame in peer.receive(wire[:cut]):
            got.append(frame)
            _say_until_theirs(peer, role, script)
        assert got == theirs[: len(got)]
        try:
            peer.receive_eof()
        except RemoteProtocolError:
            continue
        whole_at.append((cut, len(got)))
    assert [count for _, count in whole_at] == [0, 0, *range(1, len(theirs) + 1)]  # nothing, preface, frames
    assert [cut for cut, _ in whole_at][1] == len(PREFACE) and whole_at[-1][0] == len(wire)


def _say_until_theirs(peer: LinkProtocol, role: Role, script: Iterator[tuple[Role, Frame]]) -> None:
    """Sends what this role says in the conversation up to the next frame of the other."""
    for who, frame in script:
        if who is not role:
            return
        peer.send(frame)


def test_the_payload_is_passed_on_without_a_copy() -> None:
    payload = bytearray(b"x" * 5000)
    buffers = walked(Role.SENDER, 6).send(WireData(Section.DIFF, 0, 5000, Encoding.RAW, payload))
    assert buffers[-1] is payload


def test_frames_before_a_bad_one_are_given_before_the_error() -> None:
    data = joined(walked(Role.SENDER, 6).send(Checkpoint((1,))))
    receiver = walked(Role.RECEIVER, 6)
    frames = receiver.receive(data + framed(99, b""))
    assert next(frames) == Checkpoint((1,))
    with pytest.raises(RemoteProtocolError, match="unknown frame type 99"):
        next(frames)
    with pytest.raises(RemoteProtocolError):
        list(receiver.receive(data))


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\x16\x03\x01\x02\x00\x01", "speaks TLS"),
        (b"\x15\x03\x01\x00\x02\x02", "speaks TLS"),
        (b"GET / HTTP/1.1\r\n", "web client"),
        (b"HTTP/1.1 400 Bad Request", "web server"),
        (b"SSH-2.0-OpenSSH_9.2", "SSH"),
        (b"\x89pitfs\n\n", "isn't pitfs"),
        (b"\x00", "isn't pitfs"),
    ],
)
def test_a_stranger_is_known_by_its_first_bytes_however_they_come(start: bytes, words: str) -> None:
    assert words in refused(LinkProtocol(Role.RECEIVER), start)
    protocol = LinkProtocol(Role.SENDER)
    with pytest.raises(RemoteProtocolError, match=words):
        _ = [list(protocol.receive(start[i : i + 1])) for i in range(len(start))]


@pytest.mark.parametrize("frame_type", list(FrameType))
def test_a_frame_that_is_too_long_is_refused_by_its_header_alone(frame_type: FrameType) -> None:
    for role in Role:
        for count in range(len(SESSION)):
            protocol = walked(role, count)
            header = HEADER.pack(frame_type.max_body_bytes + 1, frame_type, 0, 0, 0)
            assert "limit" in refused(protocol, header)
            assert not protocol._frame  # nothing is kept


@pytest.mark.parametrize("length", [1 << 31, (1 << 32) - 1])
def test_huge_lengths_are_refused(length: int) -> None:
    assert "limit" in refused(walked(Role.RECEIVER, 6), HEADER.pack(length, FrameType.DATA, 0, 0, 0))


def test_no_more_than_what_came_of_a_frame_is_held() -> None:
    receiver = walked(Role.RECEIVER, 6)
    list(receiver.receive(HEADER.pack(MAX_PAYLOAD_BYTES, FrameType.DATA, 0, 0, 0) + b"x" * 100))
    assert len(receiver._frame) == HEADER.size + 100


def test_every_frame_out_of_its_state_or_from_the_wrong_side_is_refused_on_both_ends() -> None:
    """All frames in all states: what the conversation's next step allows passes, the rest is an error."""
    for count in range(len(SESSION)):
        for _, frame in [*SESSION, (Role.RECEIVER, Refuse("version", "upgrade", False))]:
            for who in Role:
                sender = walked(who, count)
                before = sender.state
                try:
                    data = joined(sender.send(frame))
                except LocalProtocolError:
                    assert sender.state is before
                    body = _body_of(frame)
                    assert refused(walked(OTHER[who], count), body)
                else:
                    assert list(walked(OTHER[who], count).receive(data)) == [frame]


def _body_of(frame: Frame) -> bytes:
    """The frame's bytes, whoever may send it: made in the state where the conversation has it."""
    if isinstance(frame, Refuse):
        return joined(walked(Role.RECEIVER, 1).send(frame)).removeprefix(PREFACE)
    index, who = next((i, who) for i, (who, said) in enumerate(SESSION) if said == frame)
    return joined(walked(who, index).send(frame)).removeprefix(PREFACE)


def test_there_is_no_frame_that_deletes_or_rewrites() -> None:
    names = {frame_type.name for frame_type in FrameType}
    assert names == {
        *("HELLO", "WELCOME", "REFUSE", "BEGIN", "RESUME", "DATA", "CHECKPOINT"),
        *("PROGRESS", "END", "COMMITTED", "PING", "PONG", "FAULT", "PARK", "PARKED", "FLUSH", "MARK", "DURABLE"),
        *("WANT", "GIVEN"),
    }


@pytest.mark.parametrize("index", [4, 6, 7, 8, 12])
def test_any_flipped_bit_of_a_frame_is_noticed(index: int) -> None:
    who, frame = SESSION[index]
    data = bytearray(joined(walked(who, index).send(frame)))
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        peer = walked(OTHER[who], index)
        with suppress(RemoteProtocolError):
            assert list(peer.receive(bytes(data))) == []  # a longer length: waits for the rest
        data[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    "greeting",
    [
        {"versions": [1], "hello": msgspec.to_builtins(HELLO) | {"group": "../x"}},
        {"versions": [1], "hello": msgspec.to_builtins(HELLO) | {"group": ".."}},
        {"versions": [1], "hello": msgspec.to_builtins(HELLO) | {"group": "a\0b"}},
        {"versions": [1], "hello": msgspec.to_builtins(HELLO) | {"group": "x" * 10_000}},
        {"versions": [1], "hello": msgspec.to_builtins(HELLO) | {"group": ""}},
        {"versions": [1], "hello": msgspec.to_builtins(HELLO) | {"group": 7}},
        {"versions": [1], "hello": msgspec.to_builtins(HELLO) | {"history": "not hex"}},
        {"versions": [1], "hello": msgspec.to_builtins(HELLO) | {"volumes": []}},
        {"versions": [1], "hello": {"group": "db1"}},
        {"versions": [], "hello": msgspec.to_builtins(HELLO)},
        {"versions": list(range(65)), "hello": msgspec.to_builtins(HELLO)},
        {"versions": "1", "hello": msgspec.to_builtins(HELLO)},
        {"hello": msgspec.to_builtins(HELLO)},
        [],
        None,
    ],
)
def test_a_hello_with_values_out_of_bounds_is_refused(greeting: object) -> None:
    assert refused(walked(Role.RECEIVER, 0), packed(FrameType.HELLO, greeting))


@pytest.mark.parametrize(
    "volume",
    [
        VolumeInfo("../x", 4096, 4096),
        VolumeInfo("v", 0, 4096),
        VolumeInfo("v", -1, 4096),
        VolumeInfo("v", 1 << 63, 4096),
        VolumeInfo("v", 4096, 0),
        VolumeInfo("v", 4096, 3000),
        VolumeInfo("v", 4096, 1 << 20),
    ],
)
def test_a_volume_out_of_bounds_is_refused_and_not_sent(volume: VolumeInfo) -> None:
    greeting = Greeting((1,), Hello("db1", "00", (volume,)))
    assert refused(walked(Role.RECEIVER, 0), packed(FrameType.HELLO, greeting))
    with pytest.raises(LocalProtocolError):
        LinkProtocol(Role.SENDER).send(greeting)


@pytest.mark.parametrize(
    "change",
    [
        {"mark": 0},
        {"to_seq": -1},
        {"to_seq": 1 << 63},
        {"from_seq": 10},
        {"protected_through_ns": (1 << 64) - 1},
        {"granularity_ns": -1},
        {"journal_count": -5},
        {"cause": "x" * 5000},
        {"kind": 9},
        {"bookmarks": [{"name": "a/b", "seq": 1, "time_ns": 1}]},
        {"bookmarks": [{"name": "..", "seq": 1, "time_ns": 1}]},
        {"bookmarks": [{"name": "a\nb", "seq": 1, "time_ns": 1}]},
        {"bookmarks": [{"name": "é" * 200, "seq": 1, "time_ns": 1}]},
        {"bookmarks": [{"name": "b", "seq": 1, "time_ns": 1}] * 5000},
        {"gaps": [msgspec.to_builtins(Gap(1, 2, 3, 4, "c"))] * 600},
        {"identity": None},
    ],
)
def test_a_manifest_with_values_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    builtins = msgspec.to_builtins(MANIFEST) | change
    body = msgspec.msgpack.encode({"manifest": builtins})
    assert refused(walked(Role.RECEIVER, 4), framed(FrameType.BEGIN, body))


def test_the_largest_manifest_that_is_allowed_fits_into_its_frame() -> None:
    manifest: Manifest = msgspec.structs.replace(
        MANIFEST,
        bookmarks=tuple(Bookmark(f"{i:064}", 1 << 62, 1 << 62) for i in range(4096)),
        gaps=(Gap(1 << 62, 1 << 62, 1 << 62, 1 << 62, "𝄞" * 1000),) * 512,
    )
    data = walked(Role.SENDER, 4).send(Begin(manifest))
    assert list(walked(Role.RECEIVER, 4).receive(joined(data))) == [Begin(manifest)]


def test_the_largest_hello_that_is_allowed_fits_into_its_frame() -> None:
    volumes = tuple(VolumeInfo(f"{i:064}", 1 << 45, 65536) for i in range(256))
    greeting = Greeting(tuple(range(1, 65)), Hello("g" * 64, "f" * 32, volumes))
    assert list(LinkProtocol(Role.RECEIVER).receive(joined(LinkProtocol(Role.SENDER).send(greeting)))) == [
        greeting
    ]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xdd\xff\xff\xff\xff",
        b"\x81\xa6cursor\xdd\xff\xff\xff\xff",
        b"\x81\xa1x" + b"\x91" * 4000,
        b"\x81\xa6cursor\x91\xcb" + b"\0" * 8,
        b"\x81\xa6cursor\x91\xc3",
        b"\x81\xa6cursor\x91\xff",
        b"\x81\xa6cursor\xdc\x00\x41" + b"\0" * 65,
        b"\x81\xa6cursor\x90\x00",
        b"\xc1",
    ],
)
def test_msgpack_that_lies_nests_or_overflows_is_refused(body: bytes) -> None:
    assert refused(walked(Role.RECEIVER, 6), framed(FrameType.CHECKPOINT, body))


@pytest.mark.parametrize(
    ("section", "zeros", "raw_length", "offset", "flags", "payload"),
    [
        (0, b"\0\0\0", 1, 0, 0, b"x"),
        (8, b"\0\0\0", 1, 0, 0, b"x"),
        (1, b"\0\1\0", 1, 0, 0, b"x"),
        (1, b"\0\0\0", 2, 0, 0, b"x"),
        (1, b"\0\0\0", 0, 0, 0, b"x"),
        (1, b"\0\0\0", 1, 0, 1, bytes(MAX_GROWTH_BYTES + 2)),
        (1, b"\0\0\0", MAX_PAYLOAD_BYTES + 1, 0, 1, b"x"),
        (1, b"\0\0\0", (1 << 32) - 1, 0, 1, b"x"),
        (1, b"\0\0\0", 1, (1 << 64) - 1, 0, b"x"),
        (1, b"\0\0\0", 1, (1 << 63) - 1, 0, b"x"),
        (2, b"\0\0\0", 1, 0, 2, b"x"),
        (1, b"\0\0\0", 1, 0, 3, b"x"),
    ],
)
def test_data_with_values_out_of_bounds_is_refused(
    section: int, zeros: bytes, raw_length: int, offset: int, flags: int, payload: bytes
) -> None:
    body = struct.pack("<B3sIQ", section, zeros, raw_length, offset) + payload
    assert refused(walked(Role.RECEIVER, 6), framed(FrameType.DATA, body, flags))


def test_data_too_short_for_its_numbers_and_reserved_bits_are_refused() -> None:
    assert "too short" in refused(walked(Role.RECEIVER, 6), framed(FrameType.DATA, b"x" * 15))
    assert "flags" in refused(walked(Role.RECEIVER, 6), framed(FrameType.END, b"", flags=1))
    assert "flags" in refused(walked(Role.RECEIVER, 6), framed(FrameType.END, b"", reserved=1))


def test_progress_needs_a_checkpoint_and_stays_between_what_was_durable_and_what_was_sent() -> None:
    sender = walked(Role.SENDER, 8)
    assert "without a CHECKPOINT" in refused(sender, packed(FrameType.PROGRESS, Progress(ResumePoint())))
    for lengths in ((65, 8, 0, 0, 0), (64, 9, 0, 0, 0), (64, 8, 1, 0, 0)):
        assert "PROGRESS to" in refused(
            walked(Role.SENDER, 9), packed(FrameType.PROGRESS, Progress(ResumePoint(lengths)))
        )
    sender = walked(Role.SENDER, 10)
    sender.send(Checkpoint(()))
    assert "before" in refused(sender, packed(FrameType.PROGRESS, Progress(ResumePoint((63, 8, 0, 0, 0)))))


def test_committed_may_not_come_before_all_progress() -> None:
    sender = walked(Role.SENDER, 10)
    sender.send(Checkpoint(()))
    sender.send(End((64, 8, 0, 0, 0)))
    assert "unanswered" in refused(sender, packed(FrameType.COMMITTED, Committed(WELCOME)))


def test_a_welcome_of_a_version_that_was_not_offered_is_refused() -> None:
    assert "version 3" in refused(walked(Role.SENDER, 1), packed(FrameType.WELCOME, Accept(3, WELCOME)))
    sender = LinkProtocol(Role.SENDER)
    sender.send(Greeting((1,), HELLO))
    assert "version 2" in refused(sender, PREFACE + packed(FrameType.WELCOME, Accept(2, WELCOME)))


@pytest.mark.parametrize("granularity_ns", [0, 1, 999_999_999, 20 * 10**9])
def test_a_welcome_with_a_granularity_that_cannot_become_finer_is_refused(granularity_ns: int) -> None:
    """Else whoever decides what goes next would fail on it, on each new connection."""
    coarse = CoarseInterval(1, 10, 2, 20, granularity_ns, 0)
    accept = Accept(1, msgspec.structs.replace(WELCOME, coarse=(coarse,)))
    words = refused(walked(Role.SENDER, 1), packed(FrameType.WELCOME, accept))
    assert f"granularity {granularity_ns} ns" in words and "\n" not in words


@pytest.mark.parametrize("window_bytes", [0, -1, 1 << 19, 3 << 20, 1 << 28, 1 << 62])
def test_a_window_that_can_not_be_is_refused_either_way(window_bytes: int) -> None:
    hello = packed(FrameType.HELLO, Greeting((1,), HELLO, window_bytes))
    assert "window" in refused(LinkProtocol(Role.RECEIVER), PREFACE + hello)
    welcome = packed(FrameType.WELCOME, Accept(1, WELCOME, window_bytes))
    assert "window" in refused(walked(Role.SENDER, 1), welcome)


def test_a_welcome_may_want_the_window_of_hello_or_a_smaller_one() -> None:
    for window_bytes in (1 << 20, 1 << 24):
        sender = LinkProtocol(Role.SENDER)
        sender.send(Greeting((1,), HELLO, 1 << 24))
        accept = Accept(1, WELCOME, window_bytes)
        assert list(sender.receive(PREFACE + packed(FrameType.WELCOME, accept))) == [accept]
    sender = LinkProtocol(Role.SENDER)
    sender.send(Greeting((1,), HELLO, 1 << 24))
    accept = Accept(1, WELCOME, 1 << 25)
    words = refused(sender, PREFACE + packed(FrameType.WELCOME, accept))
    assert words == "WELCOME with a window of 33554432 bytes, HELLO offers 16777216"


def test_a_hello_of_other_versions_is_understood_as_far_as_that() -> None:
    body = msgspec.msgpack.encode({"versions": [7, 8], "hello": {"of": ["another", "shape"]}})
    receiver = LinkProtocol(Role.RECEIVER)
    assert list(receiver.receive(PREFACE + framed(FrameType.HELLO, body))) == [Greeting((7, 8), None)]


def test_keys_that_a_later_version_adds_are_ignored() -> None:
    body = msgspec.msgpack.encode({"token": 5, "later": [1, {"a": None}]})
    assert list(walked(Role.RECEIVER, 3).receive(framed(FrameType.PING, body))) == [Ping(5)]


def test_nothing_is_sent_or_read_after_a_fault() -> None:
    receiver = walked(Role.RECEIVER, 6)
    receiver.send(Fault("shutdown", "stopping", True))
    assert list(receiver.receive(b"whatever is still on its way")) == []
    with pytest.raises(LocalProtocolError):
        receiver.send(Resume(ResumePoint()))


def test_numbers_that_we_may_not_send_are_a_mistake_of_ours() -> None:
    with pytest.raises(LocalProtocolError):
        walked(Role.SENDER, 6).send(Checkpoint((-1,)))
    with pytest.raises(LocalProtocolError):
        walked(Role.SENDER, 6).send(Checkpoint(tuple(range(65))))
    with pytest.raises(LocalProtocolError):
        walked(Role.RECEIVER, 1).send(Accept(1, Welcome(-1, 0, 0, 0)))
    payload = memoryview(bytes(80)).cast("Q")
    with pytest.raises(LocalProtocolError):
        walked(Role.SENDER, 6).send(WireData(Section.DIFF, 0, 10, Encoding.RAW, payload))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_bytes_of_a_session_are_those_of_the_golden_file(version: int, request: pytest.FixtureRequest) -> None:
    """Pins a version of the format: if this fails, peers that speak it can't be spoken to any more."""
    golden = (request.config.rootpath / f"tests/golden/link-v{version}.hex").read_text().split()
    wire = wire_of(conversation(version))
    assert [wire[Role.SENDER].hex(), wire[Role.RECEIVER].hex()] == golden


@pytest.mark.parametrize("seq", [13, 15])
def test_a_peer_that_acknowledges_what_was_not_streamed_or_takes_it_back_is_refused(seq: int) -> None:
    at = next(i for i, (_, frame) in enumerate(SESSION) if isinstance(frame, Durable)) + 1
    assert "DURABLE to seq" in refused(walked(Role.SENDER, at), packed(FrameType.DURABLE, Durable(seq, 71, 4, 82)))


def test_a_stream_is_answered_once_for_each_flush() -> None:
    at = next(i for i, (_, frame) in enumerate(SESSION) if isinstance(frame, Flush))
    body = packed(FrameType.DURABLE, Durable(0, 71, 4, 82))
    assert "without a FLUSH" in refused(walked(Role.SENDER, at), body)


def test_contents_of_a_transfer_come_within_one_only() -> None:
    wire = joined(walked(Role.SENDER, 7).send(WireData(Section.DIFF, 0, 64, Encoding.RAW, b"d" * 64)))
    ready = next(i for i, (_, frame) in enumerate(SESSION) if isinstance(frame, Begin))
    assert "DATA of DIFF may not come in state READY" in refused(walked(Role.RECEIVER, ready), wire)


WANTED = Wanted(1, 7, 1 << 63, 3, 9)


def ready(version: int, role: Role) -> LinkProtocol:
    """One of two peers that have agreed on a version."""
    peers = {each: LinkProtocol(each) for each in Role}
    hello = Greeting(VERSIONS[-version:], HELLO)
    list(peers[Role.RECEIVER].receive(joined(peers[Role.SENDER].send(hello))))
    list(peers[Role.SENDER].receive(joined(peers[Role.RECEIVER].send(Accept(version, WELCOME)))))
    return peers[role]


def test_what_a_version_does_not_have_is_neither_sent_nor_taken() -> None:
    want, given = Want((WANTED,)), Given(None)
    for role, own, theirs in ((Role.SENDER, given, want), (Role.RECEIVER, want, given)):
        with pytest.raises(LocalProtocolError):
            ready(1, role).send(own)
        frame_type = FrameType.WANT if theirs is want else FrameType.GIVEN
        header = HEADER.pack(100, frame_type, 0, 0, 0)
        assert "may not come in version 1" in refused(ready(1, role), header)


def test_each_content_that_is_wanted_has_one_answer_before_more_is_asked_for() -> None:
    want, given = packed(FrameType.WANT, Want((WANTED, WANTED))), packed(FrameType.GIVEN, Given(None))
    sender = ready(2, Role.SENDER)
    list(sender.receive(want))
    sender.send(Given(b"x"))
    assert "1 contents of the last one are unanswered" in refused(sender, want)
    receiver = ready(2, Role.RECEIVER)
    assert "without a WANT" in refused(receiver, given)
    receiver = ready(2, Role.RECEIVER)
    receiver.send(Want((WANTED,)))
    assert "without a WANT" in refused(receiver, given * 2)
    with pytest.raises(LocalProtocolError, match="without a WANT"):
        ready(2, Role.SENDER).send(Given(None))


@pytest.mark.parametrize(
    "change",
    [{"volume": -1}, {"block": 1 << 63}, {"checksum": -1}, {"after_seq": None}, {"through_seq": 1 << 63}],
)
def test_what_is_wanted_with_values_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    body = {"contents": [msgspec.to_builtins(WANTED) | change]}
    assert refused(ready(2, Role.SENDER), packed(FrameType.WANT, body))


def test_as_much_is_wanted_and_given_as_the_limits_allow_and_no_more() -> None:
    largest = Wanted(MAX_NUMBER, MAX_NUMBER, (1 << 64) - 1, MAX_NUMBER, MAX_NUMBER)
    want, given = Want((largest,) * MAX_WANTED), Given(bytes(MAX_CONTENT_BYTES))
    sender, receiver = ready(2, Role.SENDER), ready(2, Role.RECEIVER)
    assert list(sender.receive(joined(receiver.send(want)))) == [want]
    assert list(receiver.receive(joined(sender.send(given)))) == [given]
    for none_or_more in ((), (WANTED,) * (MAX_WANTED + 1)):
        assert refused(ready(2, Role.SENDER), packed(FrameType.WANT, Want(none_or_more)))
    too_long = packed(FrameType.GIVEN, Given(bytes(MAX_CONTENT_BYTES + 1)))
    assert refused(receiver, too_long)
