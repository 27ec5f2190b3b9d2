"""Where services listen: addresses and unix sockets."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from typing import Final

import trio

from pitfs.errors import PitfsError, UsageError
from pitfs.model.endpoint import parse_endpoint
from pitfs.storage.files import open_fd

MAX_UNIX_BYTES: Final = 107  # of the path of a unix socket
BACKLOG: Final = 128


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `--listen`; an empty host means all addresses, port 0 a free one.

    Raises:
        UsageError: it isn't HOST:PORT.
    """
    try:
        return parse_endpoint(text, listening=True)
    except ValueError as error:
        raise UsageError(f"--listen {error}") from None


async def listen(host: str, port: int, program: str) -> list[trio.SocketListener]:
    """Listens at all addresses of a host; the error names `program` as what may already listen there.

    Raises:
        UsageError: the host has no address.
        PitfsError: the system refuses.
    """
    where = f"{host or 'all addresses'}, port {port}"
    # trio makes :: IPv6 only; Linux, and so the user, means both by it.
    bind_host = None if host in ("", "::") else host
    try:
        return await trio.open_tcp_listeners(port, host=bind_host)
    except socket.gaierror as error:
        raise UsageError(f"{where}: the name can't be resolved ({error.strerror})") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PitfsError(f"{where}: the address is in use: is another `{program}` running?") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise PitfsError(f"{where}: isn't an address of this host") from None
        raise PitfsError(f"{where}: can't listen: {error.strerror}") from None


@contextlib.contextmanager
def listen_unix(path: str) -> Iterator[trio.SocketListener]:
    """Listens at a unix socket, for this user alone; removes its file at the end. Replaces one of a dead process.

    Raises:
        PitfsError: a process listens there, or a file of another type has that name.
    """
    if len(os.fsencode(path)) > MAX_UNIX_BYTES:
        raise UsageError(f"{path}: the path of a unix socket has at most {MAX_UNIX_BYTES} bytes")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        try:
            with open_fd(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY) as directory:
                fcntl.flock(directory, fcntl.LOCK_EX)  # two processes that find the same old socket take turns
                _remove_stale(path)
                listener.bind(path)
                os.chmod(path, 0o600)  # nobody can connect yet
                listener.listen(BACKLOG)
        except OSError as error:
            raise PitfsError(f"{path}: can't listen there: {error.strerror}") from None
        made = os.lstat(path)
        try:
            yield trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(path), made):  # not another's, made after ours was removed
                    os.unlink(path)


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path}: exists and isn't a socket: give another name, or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)  # a full queue (EAGAIN) means a living process, too
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
    raise PitfsError(f"{path}: another process listens there: end it, or give another path")
