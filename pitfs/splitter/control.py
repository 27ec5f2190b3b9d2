"""The control sockets of the production host: one JSON document per line, request and reply.

A request is `{"op": NAME, …}`; a reply is `{"ok": {…}}` or `{"error": MESSAGE, "exit_code": N, "retryable": B}`.
The processes that serve a socket say which requests they know (messages.py has the splitter's).
A request is cancelled if its client closes the connection before the reply has left.
The splitter serves `splitter.sock`, the shipper `control.sock`, both in the group's state directory.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import msgspec
import trio

from pitfs.errors import EXIT_FAILED, PitfsError
from pitfs.storage.files import open_fd

log = logging.getLogger(__name__)

SPLITTER_SOCKET: Final = "splitter.sock"
SHIPPER_SOCKET: Final = "control.sock"
MAX_LINE_BYTES: Final = 1 << 16
ACCEPT_AGAIN_S: Final = 1.0
_NO_ROOM_TO_ACCEPT: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
MAX_CONNECTIONS: Final = 32  # more wait in the kernel's backlog

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Handler = Callable[[Request], Awaitable[Any]]
_Answer = Callable[[bytes], Awaitable[Any]]  # decodes a line and handles it; returns what is encoded as the reply


class _Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """`ok` unless there is an error, which the others are of."""

    ok: msgspec.Raw = msgspec.Raw()
    error: str | None = None
    exit_code: int = EXIT_FAILED
    retryable: bool = False


class ControlError(PitfsError):
    """The other side answered a request with an error."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED, retryable: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.retryable = retryable


@contextlib.contextmanager
def _short_path(directory: str, name: str) -> Any:
    """A path to the socket within the 108 bytes that the kernel allows, however deep the directory is."""
    with open_fd(directory, os.O_PATH | os.O_DIRECTORY) as fd:
        yield f"/proc/self/fd/{fd}/{name}"


class Connection:
    """One side of a control connection; requests go one after the other."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._lock = trio.Lock()
        self._owed = 0  # replies to come; more than one where a caller was cancelled

    @classmethod
    async def open(cls, directory: str, name: str) -> Connection:
        """Connects to a socket in `directory`. Raises OSError where nobody listens."""
        with _short_path(directory, name) as path:
            return cls(await trio.open_unix_socket(path))

    async def request(self, request: msgspec.Struct, reply_type: type[Reply]) -> Reply:
        """Sends a request and returns its reply. Where the caller is cancelled, the request may be done or not.

        Raises:
            ControlError: the other side says so.
            trio.BrokenResourceError: the other side is gone.
        """
        async with self._lock:
            with trio.CancelScope(shield=True):  # a request that is cut short would spoil the next one
                await self._stream.send_all(msgspec.json.encode(request) + b"\n")
            self._owed += 1
            while True:  # replies come in order: ours is the last
                line = await self._read_line()
                if line is None:
                    raise trio.BrokenResourceError("closed by the other side")
                self._owed -= 1
                if not self._owed:
                    break
        try:
            reply = msgspec.json.decode(line, type=_Reply)
            if reply.error is not None:
                raise ControlError(reply.error, reply.exit_code, reply.retryable)
            return msgspec.json.decode(reply.ok, type=reply_type)
        except msgspec.DecodeError as error:
            raise ControlError(
                f"the running 'pitfs protect' answers otherwise than this version does ({error}): restart it"
            ) from error

    async def _read_line(self) -> bytes | None:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise trio.BrokenResourceError("a line beyond the limit")
            data = await self._stream.receive_some()
            if not data:
                return None
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    async def serve(self, answer: _Answer) -> None:
        """Answers requests until the other side closes, which cancels the request under way."""
        while (line := await self._read_line()) is not None:
            reply = b""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, nursery.cancel_scope)
                reply = await _reply_line(line, answer)
                nursery.cancel_scope.cancel()
            if not reply:
                return
            await self._stream.send_all(reply)

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Cancels when the other side closes. Keeps requests that come early, up to the limit of a line."""
        while len(self._buffer) <= MAX_LINE_BYTES:
            try:
                data = await self._stream.receive_some()
            except trio.BrokenResourceError:
                data = b""
            if not data:
                scope.cancel()
                return
            self._buffer += data

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _reply_line(line: bytes, answer: _Answer) -> bytes:
    """The line that answers a request. Never raises: a mistake in one request mustn't end the process."""
    try:
        reply = _Reply(msgspec.Raw(msgspec.json.encode(await answer(line))))
    except PitfsError as error:
        reply = _Reply(error=str(error), exit_code=error.exit_code, retryable=error.retryable)
    except msgspec.DecodeError as error:
        reply = _Reply(error=f"not a request: {error}")
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        reply = _Reply(error="the splitter ended before it answered: see the log of 'pitfs protect'")
    except Exception as error:
        log.exception("a bug in pitfs: request %.200r: please report it", line)
        problem = f"a bug in pitfs: {type(error).__name__}: {error}: see the log of 'pitfs protect'"
        reply = _Reply(error=problem)
    return msgspec.json.encode(reply) + b"\n"


async def serve(
    directory: str, name: str, decode: Callable[[bytes], Request], handler: Handler[Request], *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:  # fmt: skip
    """Serves a control socket in `directory` until cancelled; only root and the owner may connect.

    Args:
        decode: a line to a request; raises msgspec.DecodeError for what is none.
        handler: answers a request; what it returns is encoded as JSON.
    """

    async def answer(line: bytes) -> Any:
        return await handler(decode(line))

    limit = trio.Semaphore(MAX_CONNECTIONS)
    with contextlib.suppress(FileNotFoundError):  # of an earlier run, which is over: the state is locked
        os.unlink(os.path.join(directory, name))
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with sock, _short_path(directory, name) as path:
        mask = os.umask(0o177)
        try:
            await sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(MAX_CONNECTIONS)
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await limit.acquire()
                connection = Connection(trio.SocketStream(await _accept(sock)))
                nursery.start_soon(_serve_one, connection, answer, limit)


async def _accept(sock: trio.socket.SocketType) -> trio.socket.SocketType:
    """The next client. Without descriptors or memory for it the client waits, and the process goes on."""
    while True:
        try:
            client, _ = await sock.accept()
            return client
        except OSError as error:
            if error.errno not in _NO_ROOM_TO_ACCEPT:
                raise
            log.error("a client of the control socket waits: %s", os.strerror(error.errno))
        await trio.sleep(ACCEPT_AGAIN_S)


async def _serve_one(connection: Connection, answer: _Answer, limit: trio.Semaphore) -> None:
    try:
        await connection.serve(answer)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        log.debug("control connection ended: %s", error)
    finally:
        limit.release()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await connection.aclose()
