"""The protocol under any cutting of its bytes, and under bytes that nobody should send."""

from __future__ import annotations

import itertools
import random
from contextlib import suppress

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pitfs.errors import LocalProtocolError, RemoteProtocolError
from pitfs.link.protocol.frames import PREFACE, Frame
from pitfs.link.protocol.protocol import LinkProtocol, Role
from tests.helpers.links import conversation, wire_of

SESSION = conversation()
WIRE = wire_of(SESSION)
OTHER = {Role.SENDER: Role.RECEIVER, Role.RECEIVER: Role.SENDER}
FUZZ_ROUNDS = 3000


def feed(role: Role, chunks: list[bytes]) -> list[Frame]:
    """Gives chunks to a peer that says its part of the conversation at its time."""
    peer, got, script = LinkProtocol(role), [], iter(SESSION)

    def say() -> None:
        for who, frame in script:
            if who is not role:
                return
            with suppress(LocalProtocolError):  # the script isn't the answer to what a fuzzed peer said
                peer.send(frame)

    say()
    for chunk in chunks:
        for frame in peer.receive(chunk):
            got.append(frame)
            say()
    peer.receive_eof()
    return got


def _theirs(role: Role) -> list[Frame]:
    return [frame for who, frame in SESSION if who is not role]


@given(role=st.sampled_from(list(Role)), cuts=st.lists(st.integers(0, 700), max_size=60))
def test_frames_are_the_same_however_the_bytes_are_cut(role: Role, cuts: list[int]) -> None:
    wire = WIRE[OTHER[role]]
    places = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    chunks = [wire[start:end] for start, end in itertools.pairwise(places)]
    assert feed(role, chunks) == _theirs(role)


@given(role=st.sampled_from(list(Role)), data=st.binary(max_size=300), prefaced=st.booleans())
def test_random_bytes_raise_nothing_but_remote_protocol_error(
    role: Role, data: bytes, prefaced: bool
) -> None:
    peer = LinkProtocol(role)
    try:
        got = list(peer.receive((PREFACE if prefaced else b"") + data))
        peer.receive_eof()
    except RemoteProtocolError:
        return
    assert got == []


def test_mutated_conversations_raise_nothing_but_remote_protocol_error() -> None:
    """Bytes changed, cut out, doubled and inserted; and checksums made right again, to get past them."""
    draw = random.Random(20261122)
    outcomes = {"refused": 0, "accepted": 0}
    for _ in range(FUZZ_ROUNDS):
        role = draw.choice(list(Role))
        wire = bytearray(WIRE[OTHER[role]])
        for _ in range(draw.randint(1, 3)):
            _mutate(wire, draw)
        if draw.random() < 0.8:
            wire = _with_right_checksums(wire)
        size = draw.choice([1, 7, 1000])
        try:
            feed(role, [bytes(wire[start : start + size]) for start in range(0, len(wire), size)])
        except RemoteProtocolError:
            outcomes["refused"] += 1
        else:
            outcomes["accepted"] += 1
    assert outcomes["refused"] > FUZZ_ROUNDS // 2 and outcomes["accepted"] > 0


def _mutate(wire: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(PREFACE), len(wire))
    match draw.randrange(5):
        case 0:
            wire[start] = draw.randrange(256)
        case 1:
            wire[start] ^= 1 << draw.randrange(8)
        case 2:
            del wire[start : start + draw.randint(1, 40)]
            wire += b"\0" * 16
        case 3:
            wire[start:start] = wire[start : start + draw.randint(1, 100)]
        case 4:
            wire[start:start] = draw.randbytes(draw.randint(1, 20))


def _with_right_checksums(wire: bytearray) -> bytearray:
    """Walks the frames as their lengths say and gives each the checksum of what it now is."""
    place = len(PREFACE)
    while place + 16 <= len(wire):
        length = int.from_bytes(wire[place : place + 4], "little")
        body = bytes(wire[place + 16 : place + 16 + length])
        checksum = xxhash.xxh3_64_intdigest(bytes(wire[place : place + 8]) + body)
        wire[place + 8 : place + 16] = checksum.to_bytes(8, "little")
        place += 16 + length
    return wire
