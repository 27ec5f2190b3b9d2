"""`pitfs receive` with the real store: as a process, and transfers through link, ingest and back out."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
import trustme

from pitfs.errors import LinkError, LinkRefusedError, PositionMismatchError
from pitfs.link.sessions.connect import SenderSession, connect
from pitfs.link.transport.tls import LinkContext, client_context
from pitfs.model.transfer import Begin, End, Welcome
from pitfs.store.store import Store
from tests.helpers.links import issue
from tests.helpers.processes import ROOT, pitfs_command
from tests.helpers.stores import read_image
from tests.helpers.transfers import History, Transfer, random_history, random_transfers


class Receiver:
    """A receiver process that said `ready`; `port` is the one that it took."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Ends it; returns exit code and the rest of its log."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=20)
        return self.process.returncode, log


@contextmanager
def receiver(root: Path, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Receiver]:
    process = subprocess.Popen(
        [*pitfs_command(), "receive", "--root", str(root), *(arguments or ("--insecure",)), *listen_at(0)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | (environment or {}),
    )
    try:
        assert process.stderr is not None and process.stdout is not None
        first = process.stderr.readline()
        found = re.search(r"listening at 127\.0\.0\.1:(\d+), stores in ", first)
        assert found, first
        assert process.stdout.readline() == "ready\n"
        yield Receiver(process, int(found[1]))
    finally:
        process.kill()
        process.communicate()


def listen_at(port: int) -> list[str]:
    return ["--listen", f"127.0.0.1:{port}"]


def refused(*arguments: str) -> tuple[int, str]:
    """Exit code and the one line of a receiver that doesn't start."""
    done = subprocess.run(
        [*pitfs_command(), "receive", *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


async def ship(
    session: SenderSession, transfer: Transfer, seed: int, stop_after: int | None = None
) -> Welcome | None:
    """One transfer from where the replica wants it, and its layers; with `stop_after` only so many frames of it."""
    point = await session.begin(transfer.manifest)
    for count, frame in enumerate(transfer.frames(np.random.default_rng(seed), point.lengths)):
        if count == stop_after:
            return None
        if isinstance(frame, End):
            welcome = await session.finish(frame)
            for layers in transfer.layers:
                await ship(session, layers, seed)
            return welcome
        if not isinstance(frame, Begin):
            await session.send(frame)
    raise AssertionError("no End")


def link(port: int, history: History, tls: LinkContext | None = None):  # type: ignore[no-untyped-def]
    return connect("127.0.0.1", port, tls=tls, hello=history.hello, rate_bytes_per_s=None)


def check_images(store_path: Path, history: History) -> None:
    """Every reachable state of every volume is what it was."""
    store = Store.open(str(store_path))
    try:
        for seq in sorted(history.reachable):
            resolution = store.at_seq(seq)
            for volume in range(len(history.volumes)):
                assert read_image(store, resolution, volume) == history.states[seq][volume]
    finally:
        store.close()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_shipped_can_be_read_back_at_every_instant(tmp_path: Path, seed: int) -> None:
    history = random_history(seed)

    async def run(port: int) -> None:
        async with link(port, history) as session:
            for mark, transfer in enumerate(random_transfers(history, 6), 1):
                welcome = await ship(session, transfer, seed)
                assert welcome is not None and welcome.mark == mark

    with receiver(tmp_path / "new" / "stores") as replica:
        trio.run(run, replica.port)
        code, log = replica.stop()
    assert code == 0 and "Traceback" not in log
    assert "session began, group db1 at mark 0" in log and "session ended: done" in log
    check_images(tmp_path / "new" / "stores" / "db1", history)


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_transfer_under_way_when_the_receiver_ends_is_resumed_by_the_next(
    tmp_path: Path, ended_by: signal.Signals
) -> None:
    history = random_history(5)
    transfers = list(random_transfers(history, 3))
    longest = max(range(3), key=lambda i: len(transfers[i].sections[2]))

    async def first(replica: Receiver) -> None:
        async with link(replica.port, history) as session:
            for transfer in transfers[:longest]:
                await ship(session, transfer, 1)
            await ship(session, transfers[longest], 1, stop_after=8)
            while not session.durable.cursor:
                await trio.sleep(0.01)
            replica.process.send_signal(ended_by)
            with trio.fail_after(20):
                while session.failure is None:
                    await trio.sleep(0.01)
            with pytest.raises(LinkError, match=f"127.0.0.1:{replica.port}: "):
                await session.finish(transfers[longest].end)

    async def second(port: int) -> None:
        async with link(port, history) as session:
            assert session.welcome.mark == longest
            point = await session.begin(transfers[longest].manifest)
            assert sum(point.lengths) > 0
        async with link(port, history) as session:
            for transfer in transfers[longest:]:
                await ship(session, transfer, 2)

    with receiver(tmp_path) as replica:
        trio.run(first, replica)
        replica.process.wait(20)
        assert replica.process.returncode == (-signal.SIGKILL if ended_by is signal.SIGKILL else 0)
    with receiver(tmp_path) as replica:
        trio.run(second, replica.port)
    check_images(tmp_path / "db1", history)


def test_a_group_of_another_history_is_refused_and_the_receiver_goes_on(tmp_path: Path) -> None:
    ours, other = random_history(1), random_history(2)

    async def run(port: int) -> None:
        transfer = next(random_transfers(ours, 1))
        async with link(port, ours) as session:
            await ship(session, transfer, 1)
        with pytest.raises(PositionMismatchError, match=f"127.0.0.1:{port}: "):
            async with link(port, other):
                pass
        async with link(port, ours) as session:
            assert session.welcome.mark == 1
            with pytest.raises(PositionMismatchError):
                await session.begin(transfer.manifest)

    with receiver(tmp_path) as replica:
        trio.run(run, replica.port)


def test_a_sender_that_is_refused_does_not_end_the_session_of_the_one_that_is_there(tmp_path: Path) -> None:
    ours, other = random_history(1), random_history(2)

    async def run(port: int) -> None:
        transfers = random_transfers(ours, 2)
        async with link(port, ours) as session:
            await ship(session, next(transfers), 1)
            for _ in range(3):
                with pytest.raises(PositionMismatchError, match="history"):
                    async with link(port, other):
                        pass
            welcome = await ship(session, next(transfers), 1)
            assert welcome is not None and welcome.mark == 2 and session.failure is None

    with receiver(tmp_path) as replica:
        trio.run(run, replica.port)


def test_certificates_of_both_sides_are_asked_for(tmp_path: Path) -> None:
    authority = trustme.CA()
    here = issue(tmp_path, "replica", authority, "127.0.0.1")
    there = issue(tmp_path, "production", authority, "production.example")
    foreign = issue(tmp_path, "foreign", trustme.CA(), "production.example", trust=authority)
    history = random_history(1)
    options = ("--certificate", here.certificate, "--key", here.key, "--authority", here.authority)

    async def run(port: int) -> None:
        async with link(port, history, client_context(*there.as_arguments())) as session:
            await ship(session, next(random_transfers(history, 1)), 1)
        with pytest.raises(LinkRefusedError):
            async with link(port, history, client_context(*foreign.as_arguments())):
                pass

    with receiver(tmp_path / "stores", *options) as replica:
        trio.run(run, replica.port)
        code, log = replica.stop()
    assert code == 0 and "isn't signed by the authority" in log


def test_the_service_manager_is_told_when_it_is_ready(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        with receiver(tmp_path / "s", environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as replica:
            assert manager.recv(100) == b"READY=1"
            assert replica.stop(signal.SIGINT)[0] == 0
            assert manager.recv(100) == b"STOPPING=1"


def test_an_address_in_use_is_said_in_one_line(tmp_path: Path) -> None:
    with receiver(tmp_path) as replica:
        code, line = refused("--root", str(tmp_path), *listen_at(replica.port), "--insecure")
    assert code == 1 and f"127.0.0.1, port {replica.port}: the address is in use" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--listen", "127.0.0.1:0"], "--certificate, --key, --authority missing"),
        (["--listen", "127.0.0.1:0", "--key", "k"], "--certificate, --authority missing"),
        (["--listen", "127.0.0.1:0", "--insecure", "--key", "k"], "--insecure and --key exclude"),
        (["--listen", "0.0.0.0:0", "--insecure"], "insecure is for loopback only"),
        (["--listen", ":0", "--insecure"], "insecure is for loopback only"),
        (["--listen", "127.0.0.1", "--insecure"], "isn't HOST:PORT"),
        (["--listen", "127.0.0.1:x", "--insecure"], "isn't HOST:PORT"),
        (["--listen", "127.0.0.1:65536", "--insecure"], "with a port from 0 to 65535"),
        (["--listen", "::1:7420", "--insecure"], "write an IPv6 address in brackets"),
        (["--listen", "nobody.invalid:0", "--insecure"], "can't be resolved"),
        (["--insecure"], "--listen"),
    ],
)
def test_wrong_use_is_said_in_one_line(tmp_path: Path, options: list[str], words: str) -> None:
    code, line = refused("--root", str(tmp_path), *options)
    assert code == 2 and words in line


def test_a_root_that_cannot_be_is_said_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    code, line = refused("--root", str(file), *listen_at(0), "--insecure")
    assert code == 2 and f"{file}: isn't a directory" in line
    code, line = refused("--root", f"{file}/below", *listen_at(0), "--insecure")
    assert code == 1 and f"{file}/below: can't be made: Not a directory" in line


def test_ipv6_loopback_is_listened_at(tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this host has no IPv6 loopback")
    process = subprocess.Popen(
        [*pitfs_command(), "receive", "--root", str(tmp_path), "--listen", "[::1]:0", "--insecure"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0 and re.search(r"listening at \[::1\]:\d+", log)
    finally:
        process.kill()
        process.communicate()
