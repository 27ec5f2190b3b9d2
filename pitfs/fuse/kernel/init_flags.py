"""A flag of FUSE's first exchange (INIT) that libfuse doesn't pass on: the mount has no privileges to take away.

Before each write the kernel asks whether the file has capabilities (getxattr "security.capability") that the write
must take away: a request for every write, which halves their rate. It asks no more once a filesystem has said with
FUSE_HANDLE_KILLPRIV_V2 that it does so itself. Images never have any, so there is nothing to do for that; but
libfuse up to 3.16 doesn't know the flag. So its INIT goes through here: for that one exchange a socket stands in the
place of the device.

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
MAX_REQUEST_BYTES: Final = 8192  # the least that the kernel lets read
_U32: Final = struct.Struct("=I")
_OPCODE_OFFSET: Final = 4
_REQUEST_FLAGS_OFFSET: Final = 40 + 12
_ERROR_OFFSET: Final = 4
_REPLY_FLAGS_OFFSET: Final = 16 + 12


@contextlib.contextmanager
def without_privileges(descriptor: int) -> Iterator[None]:
    """INIT, and no other request, is answered inside, by whoever reads and writes `descriptor`, a device of FUSE.

    Raises:
        OSError: the kernel doesn't take it.
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
    """The reply with the flag, if the kernel has offered it and the reply is one that takes flags."""
    if len(request) < _REQUEST_FLAGS_OFFSET + 4 or len(reply) < _REPLY_FLAGS_OFFSET + 4:
        return reply
    is_init = _U32.unpack_from(request, _OPCODE_OFFSET)[0] == INIT
    offered = _U32.unpack_from(request, _REQUEST_FLAGS_OFFSET)[0] & HANDLE_KILLPRIV_V2
    if not is_init or not offered or _U32.unpack_from(reply, _ERROR_OFFSET)[0]:
        return reply
    changed = bytearray(reply)
    flags = _U32.unpack_from(reply, _REPLY_FLAGS_OFFSET)[0] | HANDLE_KILLPRIV_V2
    _U32.pack_into(changed, _REPLY_FLAGS_OFFSET, flags)
    return bytes(changed)
