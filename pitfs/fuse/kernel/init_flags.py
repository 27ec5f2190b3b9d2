"""Adds a flag to FUSE's first exchange (INIT) that libfuse doesn't know: no getxattr before each write.

Before each write the kernel asks whether the file has capabilities (getxattr "security.capability"), since a
write must take these away: one more request for every write, which halves their rate. It stops asking once a
filesystem has said with FUSE_HANDLE_KILLPRIV_V2 that it takes them away itself. Images never have any, so
pitfs can say that; but libfuse up to 3.16 doesn't know the flag.

So a socket stands in the place of the device during INIT. This module reads the kernel's request from the
device, gives it to libfuse through the socket, takes libfuse's reply from there, sets the flag, and writes
the reply to the device. Afterwards libfuse reads from the device itself.

    kernel --request--> device -> this -> socket -> libfuse
    kernel <-reply with the flag- device <- this <- socket <- libfuse

Layout, linux/fuse.h, in the machine's byte order:

    request  40 bytes fuse_in_header (len u32, opcode u32, …), then major, minor, max_readahead, flags: u32 each
    reply    16 bytes fuse_out_header (len u32, error s32, unique u64), then the same four
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

INIT: Final = 26
HANDLE_KILLPRIV_V2: Final = 1 << 28
MAX_REQUEST_BYTES: Final = 8192  # the kernel refuses reads with a smaller buffer
_REQUEST: Final = struct.Struct("=II32x3II")  # len, opcode; major, minor, max_readahead, flags
_REPLY: Final = struct.Struct("=Ii8x3II")  # len, error; the same
assert (_REQUEST.size, _REPLY.size) == (40 + 16, 16 + 16)


@contextlib.contextmanager
def killpriv_flag_added(descriptor: int) -> Iterator[None]:
    """The block must answer INIT, and no other request, by reading and writing `descriptor`, a FUSE device.

    Raises:
        OSError: the kernel doesn't take the reply.
    """
    device = os.dup(descriptor)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with ours, theirs:
            request = os.read(device, MAX_REQUEST_BYTES)
            os.dup2(theirs.fileno(), descriptor, inheritable=False)
            ours.send(request)
            yield
            os.write(device, with_flag(request, ours.recv(MAX_REQUEST_BYTES, socket.MSG_DONTWAIT)))
    finally:
        os.dup2(device, descriptor, inheritable=False)
        os.close(device)


def with_flag(request: bytes, reply: bytes) -> bytes:
    """The reply with the flag, if the kernel has offered it and the reply is a success that has flags."""
    if len(request) < _REQUEST.size or len(reply) < _REPLY.size:
        return reply
    _, opcode, *_, offered = _REQUEST.unpack_from(request)
    _, error, *_, flags = _REPLY.unpack_from(reply)
    if opcode != INIT or error or not offered & HANDLE_KILLPRIV_V2:
        return reply
    flags_at = _REPLY.size - 4
    return reply[:flags_at] + struct.pack("=I", flags | HANDLE_KILLPRIV_V2) + reply[_REPLY.size :]
