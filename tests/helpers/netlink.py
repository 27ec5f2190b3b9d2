"""A link that can be made slow, long, deaf or dead.

`Wire`: two network namespaces joined by a veth pair whose rate tbf holds: what crosses it is real TCP/IP over a real
queue, and the kernel counts its bytes. Not netem, which many kernels don't have: delays are the proxy's.

`Proxy`: a TCP proxy in this process that delays, throttles, goes silent, and cuts connections at a given byte.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import trio

from tests.helpers.processes import HostError, run

PREFIX: Final = "pitfs-test-"  # of namespaces, with the process's number: what a killed run left can be told
PRODUCTION_ADDRESS, REPLICA_ADDRESS = "10.99.74.1", "10.99.74.2"  # only inside of the namespaces
BURST_BYTES: Final = 32 << 10  # what tbf lets through at once: a few packets, however the kernel joins them
QUEUE_S: Final = 0.1  # what waits in tbf's queue: as in a modest router
RECEIVE_BYTES: Final = 64 << 10
PIECE_BYTES: Final = 4096  # sent at once where a rate is held
HELD_COUNT: Final = 64  # pieces that wait for their delay; then the sender feels it


@functools.cache
def probe_wire() -> str | None:
    """Why there can't be a Wire here, None if there can."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        with Wire(8_000_000):
            return None
    except (HostError, OSError) as error:
        return f"needs network namespaces, veth and tbf: {' '.join(str(error).split())}"


class Wire:
    """Two namespaces, `production` and `replica`, and between them a link of this rate in each direction.

    `within_production` and `within_replica` go before a command to run it there. Only the network is another: files,
    mounts and Unix sockets are the machine's.
    """

    def __init__(self, rate_bytes_per_s: float) -> None:
        self.rate_bytes_per_s = rate_bytes_per_s
        mark = f"{PREFIX}{os.getpid()}"
        self._sides = {f"{mark}-p": PRODUCTION_ADDRESS, f"{mark}-r": REPLICA_ADDRESS}
        self._production, self._replica = self._sides

    @property
    def within_production(self) -> list[str]:
        return self._within(self._production)

    @property
    def within_replica(self) -> list[str]:
        return self._within(self._replica)

    @staticmethod
    def _within(name: str) -> list[str]:
        # Not `ip netns exec`, whose mount namespace of its own would hide the mounts made in it.
        return ["nsenter", f"--net=/run/netns/{name}", "--"]

    def __enter__(self) -> Self:
        try:
            for name in self._sides:
                run(["ip", "netns", "add", name])
            run(["ip", "-n", self._production, "link", "add", "link0", "type", "veth", "peer", "name", "link0",
                 "netns", self._replica])  # fmt: skip
            for name, address in self._sides.items():
                run(["ip", "-n", name, "address", "add", f"{address}/30", "dev", "link0"])
                for device in ("lo", "link0"):
                    run(["ip", "-n", name, "link", "set", device, "up"])
            self.set_rate(self.rate_bytes_per_s)
        except BaseException:
            self.clean_up()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.clean_up()

    def set_rate(self, rate_bytes_per_s: float) -> None:
        """Changes what the link carries, packets with their headers, in each direction."""
        self.rate_bytes_per_s = rate_bytes_per_s
        queue_bytes = BURST_BYTES + int(rate_bytes_per_s * QUEUE_S)
        for name in self._sides:
            shape = ["rate", f"{int(rate_bytes_per_s * 8)}bit", "burst", str(BURST_BYTES), "limit", str(queue_bytes)]
            run(["tc", "-n", name, "qdisc", "replace", "dev", "link0", "root", "tbf", *shape])

    def set_up(self, up: bool) -> None:
        """Plugs the cable in or out: nobody is told."""
        run(["ip", "-n", self._replica, "link", "set", "link0", "up" if up else "down"])

    def clean_up(self) -> None:
        """Never raises for what is gone; the pair goes with either namespace."""
        for name in self._sides:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def left_namespaces() -> Iterator[str]:
    """Those that this process made and that are still there."""
    directory = Path("/run/netns")
    for path in sorted(directory.glob(f"{PREFIX}{os.getpid()}-*")) if directory.is_dir() else []:
        yield f"network namespace {path.name}"


def wire_bytes(pid: int) -> int:
    """What went out over the wire from the namespace that this process is in: packets with their headers."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, colon, counters = line.partition(":")
        if colon and name.strip() == "link0":
            return int(counters.split()[8])
    raise HostError(f"process {pid} isn't at an end of the wire")


class Proxy:
    """Forwards connections to a port of 127.0.0.1, from its own `port`, and does to them what it is told.

    Its attributes may be changed at any time, from any thread.

    Attributes:
        out_delay_s, back_delay_s: what each byte waits, to the server and back.
        rate_bytes_per_s: of each direction of each connection; None for none.
        silent: nothing is forwarded any more, and nobody is told: the bytes are lost.
        mute: the same, of what the server says only.
        refusing: new connections are ended at once.
        next_cut: asked for each new connection after how many bytes, of both directions, it is cut; None: never.
        connections, cuts: how many there were.
        out_bytes, back_bytes: forwarded.
    """

    def __init__(self, to_port: int, next_cut: Callable[[], int | None] = lambda: None) -> None:
        self.to_port, self.next_cut = to_port, next_cut
        self.out_delay_s = self.back_delay_s = 0.0
        self.rate_bytes_per_s: float | None = None
        self.silent = self.mute = self.refusing = False
        self.connections = self.cuts = 0
        self.out_bytes = self.back_bytes = 0
        self.port = 0
        self._live: set[_Connection] = set()
        self._ready = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(10):
            raise HostError("the proxy isn't ready after 10 s")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(10)

    def cut(self) -> None:
        """Ends all connections that there are now, both ways."""
        self._for_each(lambda connection: connection.end(reset=True))

    def silence(self) -> None:
        """The connections that there are now stay half open for ever: nothing comes through, nobody is told."""
        self._for_each(lambda connection: connection.silence())

    def _for_each(self, act: Callable[[_Connection], None]) -> None:
        assert self._token is not None
        self._token.run_sync_soon(lambda: [act(each) for each in list(self._live)])

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        self._ready.set()
        with self._scope:
            await trio.serve_listeners(self._handle, listeners)

    async def _handle(self, client: trio.SocketStream) -> None:
        try:
            if self.refusing:
                return
            self.connections += 1
            server = await trio.open_tcp_stream("127.0.0.1", self.to_port)
            connection = _Connection(self, client, server, self.next_cut(), reset=self.connections % 2 == 0)
            self._live.add(connection)
            try:
                await connection.run()
            finally:
                self._live.discard(connection)
        except OSError:  # nobody listens there: the client hears of it by the end of its connection
            pass
        finally:
            await trio.aclose_forcefully(client)


class _Connection:
    """One of them: two directions, and the byte at which both end."""

    def __init__(self, proxy: Proxy, client: trio.SocketStream, server: trio.SocketStream, cut: int | None,
                 reset: bool) -> None:  # fmt: skip
        self._proxy, self._client, self._server = proxy, client, server
        self._left, self._reset = cut, reset
        self._silent = False
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._forward, self._client, self._server, True)
                    nursery.start_soon(self._forward, self._server, self._client, False)
        finally:
            for stream in (self._client, self._server):
                stream.socket.close()  # without a checkpoint, at which a cancelled proxy would leave the second open

    def end(self, reset: bool) -> None:
        """Reset: what is on its way is lost, and both sides hear of an error; else of an end."""
        if self._scope.cancel_called:
            return
        if reset:
            for stream in (self._client, self._server):
                with contextlib.suppress(OSError):
                    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._proxy.cuts += 1
        self._scope.cancel()

    def silence(self) -> None:
        self._silent = True

    async def _forward(self, source: trio.SocketStream, target: trio.SocketStream, out: bool) -> None:
        give, take = trio.open_memory_channel[tuple[float, bytes]](HELD_COUNT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver, take, target, out)
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async with give:
                    while data := await source.receive_some(RECEIVE_BYTES):
                        delay_s = self._proxy.out_delay_s if out else self._proxy.back_delay_s
                        await give.send((trio.current_time() + delay_s, bytes(data)))

    async def _deliver(
        self, take: trio.MemoryReceiveChannel[tuple[float, bytes]], target: trio.SocketStream, out: bool
    ) -> None:
        proxy = self._proxy
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for due, data in take:
                await trio.sleep_until(due)
                if self._silent or proxy.silent or (proxy.mute and not out):
                    continue
                for piece in self._up_to_the_cut(data):
                    if proxy.rate_bytes_per_s is not None:
                        await trio.sleep(len(piece) / proxy.rate_bytes_per_s)
                    await target.send_all(piece)
                    if out:
                        proxy.out_bytes += len(piece)
                    else:
                        proxy.back_bytes += len(piece)
                if self._left == 0:
                    self.end(self._reset)
                    return
            with contextlib.suppress(OSError):
                target.socket.shutdown(socket.SHUT_WR)

    def _up_to_the_cut(self, data: bytes) -> Iterator[bytes]:
        """In pieces where it is throttled, so that both directions get on."""
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        step = RECEIVE_BYTES if self._proxy.rate_bytes_per_s is None else PIECE_BYTES
        for start in range(0, len(data), step):
            yield data[start : start + step]
