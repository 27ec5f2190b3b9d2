"""The control sockets of the production host: one JSON document per line, request and reply.

A request is `{"op": NAME, …}`; a reply `{"ok": {…}}` or `{"error": MESSAGE, "exit_code": N, "retryable": B}`.
A client that closes its sending direction before the reply has left: its request is given up.
The splitter serves `splitter.sock`, the shipper `control.sock`, both in the group's state directory.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import trio

from pitfs.errors import EXIT_FAILED, PitfsError

log = logging.getLogger(__name__)

SPLITTER_SOCKET: Final = "splitter.sock"
SHIPPER_SOCKET: Final = "control.sock"
MAX_LINE_BYTES: Final = 1 << 16
ACCEPT_AGAIN_S: Final = 1.0
_NO_ROOM_TO_ACCEPT: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
MAX_CONNECTIONS: Final = 32  # tools asking at once; more wait in the kernel's backlog

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlError(PitfsError):
    """The other side answered a request with an error."""

    def __init__(self, message: str, exit_code: int, retryable: bool) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.retryable = retryable


@contextlib.contextmanager
def _short_path(directory: str, name: str) -> Any:
    """A path to the socket that fits into the 108 bytes the kernel allows, however deep the directory is."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


class Connection:
    """One side of a control connection; requests go one after the other."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._lock = trio.Lock()
        self._owed = 0  # replies to come; more than one where who asked was cancelled

    @classmethod
    async def open(cls, directory: str, name: str) -> Connection:
        """Connects to a socket in `directory`. Raises OSError where nobody listens."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _short_path(directory, name) as path:
                await sock.connect(path)
        except BaseException:
            sock.close()
            raise
        return cls(trio.SocketStream(sock))

    async def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and returns the reply's values. Cancelled, it may be done or not.

        Raises:
            ControlError: the other side says so.
            trio.BrokenResourceError: the other side is gone.
        """
        async with self._lock:
            with trio.CancelScope(shield=True):  # a request that was cut short would spoil the next one
                await self._stream.send_all(msgspec.json.encode({"op": op, **arguments}) + b"\n")
            self._owed += 1
            while True:  # replies come in order: ours is the last
                line = await self._read_line()
                if line is None:
                    raise trio.BrokenResourceError("closed by the other side")
                self._owed -= 1
                if not self._owed:
                    break
        reply = msgspec.json.decode(line)
        if "ok" not in reply:
            raise ControlError(
                reply["error"], reply.get("exit_code", EXIT_FAILED), reply.get("retryable", False)
            )
        values: dict[str, Any] = reply["ok"]
        return values

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

    async def serve(self, handler: Handler) -> None:
        """Answers requests until the other side closes; the one that is being worked on is cancelled then."""
        while (line := await self._read_line()) is not None:
            reply = b""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, nursery.cancel_scope)
                reply = await _answer(line, handler)
                nursery.cancel_scope.cancel()
            if not reply:
                return
            await self._stream.send_all(reply)

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Cancels when the other side closes. Requests that come early are kept, up to the limit of a line."""
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


async def _answer(line: bytes, handler: Handler) -> bytes:
    """The line that answers a request. Never raises: a mistake in one request mustn't end the process."""
    try:
        request = msgspec.json.decode(line)
        if not isinstance(request, dict) or not isinstance(request.get("op"), str):
            raise PitfsError("a request is an object with 'op'")
        reply: dict[str, Any] = {"ok": await handler(request)}
    except PitfsError as error:
        reply = {"error": str(error), "exit_code": error.exit_code, "retryable": error.retryable}
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        reply = {"error": f"not a request: {error!r}"}
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        reply = {"error": "the splitter ended before it answered: see the log of 'pitfs protect'"}
    except Exception as error:
        log.exception("a bug in pitfs: request %.200r: please report it", line)
        reply = {"error": f"a bug in pitfs: {type(error).__name__}: {error}: see the log of 'pitfs protect'"}
    return msgspec.json.encode(reply) + b"\n"


async def serve(
    directory: str,
    name: str,
    handler: Handler,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves a control socket in `directory` until cancelled; only root and the owner may connect."""
    limit = trio.CapacityLimiter(MAX_CONNECTIONS)
    with contextlib.suppress(FileNotFoundError):  # of an earlier run; the state's lock says that it is over
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
                await limit.acquire_on_behalf_of(token := object())
                client = await _accept(sock)
                nursery.start_soon(_serve_one, Connection(trio.SocketStream(client)), handler, limit, token)


async def _accept(sock: trio.socket.SocketType) -> trio.socket.SocketType:
    """The next client. For want of descriptors or memory a client waits: it's no reason to end the process."""
    while True:
        try:
            client, _ = await sock.accept()
            return client
        except OSError as error:
            if error.errno not in _NO_ROOM_TO_ACCEPT:
                raise
            log.error("a client of the control socket waits: %s", os.strerror(error.errno))
        await trio.sleep(ACCEPT_AGAIN_S)


async def _serve_one(
    connection: Connection, handler: Handler, limit: trio.CapacityLimiter, token: object
) -> None:
    try:
        await connection.serve(handler)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        log.debug("control connection ended: %s", error)
    finally:
        limit.release_on_behalf_of(token)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await connection.aclose()
