"""The control sockets: who leaves, who is too early, and what a mistake in one request does to the others."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from pitfs.cli import snapshot
from pitfs.cli.main import main
from pitfs.errors import EXIT_FAILED, LinkError, PitfsError, UsageError
from pitfs.model.position import format_instant
from pitfs.replication.control.requests import REQUESTS as SHIPPER_REQUESTS
from pitfs.replication.control.requests import (
    SNAPSHOT_GRACE_S,
    ReadStatus,
    SetBookmark,
    ShipperRequest,
    SnapshotTaken,
    TakeSnapshot,
)
from pitfs.replication.control.server import BOOKMARKS_FILE, ShipperControl
from pitfs.replication.phases import Phase
from pitfs.splitter.control import MAX_CONNECTIONS, SHIPPER_SOCKET, Connection, ControlError, Handler, serve
from pitfs.splitter.messages import REQUESTS, RunningCopy, SplitterClient, SplitterStatus
from tests.helpers.refusals import write_config
from tests.helpers.shipper import Parts

NAME = "s.sock"
MARGIN_S = 30.0


class Ask(msgspec.Struct):
    """A request."""

    op: str
    value: str = ""


class Slow:
    """Answers `slow` when `go` is set, everything else at once with its own name."""

    def __init__(self) -> None:
        self.go = trio.Event()
        self.begun = self.cancelled = 0

    async def handle(self, request: Ask) -> dict[str, Any]:
        op = request.op
        if op == "slow":
            self.begun += 1
            try:
                await self.go.wait()
            except trio.Cancelled:
                self.cancelled += 1
                raise
        return {"op": op}


@asynccontextmanager
async def served(directory: Path, handler: Handler[Ask]) -> AsyncIterator[None]:
    with trio.fail_after(MARGIN_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, str(directory), NAME, msgspec.json.Decoder(Ask).decode, handler)
            yield
            nursery.cancel_scope.cancel()


async def connected(directory: Path) -> Connection:
    return await Connection.open(str(directory), NAME)


async def ask(connection: Connection, op: str) -> str:
    return (await connection.request(Ask(op), dict[str, str]))["op"]


async def test_a_request_whose_client_leaves_is_cancelled_and_makes_room(tmp_path: Path) -> None:
    slow = Slow()
    async with served(tmp_path, slow.handle):
        clients = [await connected(tmp_path) for _ in range(MAX_CONNECTIONS)]
        for client in clients:
            await client._stream.send_all(b'{"op": "slow"}\n')
        await wait_all_tasks_blocked()
        assert slow.begun == MAX_CONNECTIONS
        for client in clients:
            await client.aclose()
        one_more = await connected(tmp_path)
        assert await ask(one_more, "status") == "status"
        assert slow.cancelled == MAX_CONNECTIONS
        await one_more.aclose()


async def test_a_request_that_comes_early_is_answered_in_its_turn(tmp_path: Path) -> None:
    slow = Slow()
    async with served(tmp_path, slow.handle):
        client = await connected(tmp_path)
        answers = []

        async def ask_slow() -> None:
            answers.append(await ask(client, "slow"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_slow)
            await wait_all_tasks_blocked()
            await client._stream.send_all(b'{"op": "early"}\n{"op": "ear')
            await wait_all_tasks_blocked()
            await client._stream.send_all(b'lier"}\n')
            await wait_all_tasks_blocked()
            slow.go.set()
        assert answers == ["slow"]
        for op in (b"early", b"earlier"):
            assert await client._read_line() == b'{"ok":{"op":"%s"}}' % op
        await client.aclose()


async def test_more_early_requests_than_are_kept_break_that_connection_only(tmp_path: Path) -> None:
    slow = Slow()
    async with served(tmp_path, slow.handle):
        client, other = await connected(tmp_path), await connected(tmp_path)
        sent = []

        async def send_much() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await client._stream.send_all(b'{"op": "slow"}\n' + b"x" * (4 << 20))
                sent.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_much)
            await wait_all_tasks_blocked()
            assert not sent, "what isn't kept waits in the sender"
            assert not slow.cancelled and await ask(other, "status") == "status"
            slow.go.set()
        assert await client._read_line() == b'{"ok":{"op":"slow"}}'
        await client.aclose()
        await other.aclose()


async def test_a_request_that_was_cancelled_leaves_the_next_its_own_reply(tmp_path: Path) -> None:
    slow = Slow()
    async with served(tmp_path, slow.handle):
        client = await connected(tmp_path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, client, "slow")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert slow.begun == 1 and not slow.cancelled, "the connection stays"
        slow.go.set()
        assert await ask(client, "next") == "next"
        await client.aclose()


async def test_a_mistake_of_ours_is_logged_and_answered_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle(request: Ask) -> dict[str, Any]:
        return {"value": int(request.value)}

    async with served(tmp_path, handle):
        client = await connected(tmp_path)
        with pytest.raises(
            ControlError, match=r"^a bug in pitfs: ValueError: invalid literal.*log"
        ) as caught:
            await client.request(Ask("copied", "x"), dict[str, int])
        assert caught.value.exit_code == EXIT_FAILED and "\n" not in str(caught.value)
        assert await client.request(Ask("copied", "7"), dict[str, int]) == {"value": 7}, "the same connection"
        await client.aclose()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "a bug in pitfs" in record.message and record.exc_info is not None


class Unknown(msgspec.Struct, tag=True, tag_field="op"):
    """A request that no process serves."""


class Rescan(msgspec.Struct, tag=True, tag_field="op"):
    """Without its cause."""


async def test_what_is_no_request_of_the_splitter_is_refused_and_the_next_is_answered(parts: Parts) -> None:
    directory, state = Path(parts.pipeline.state), parts.pipeline.splitter.state
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, str(directory), NAME, REQUESTS.decode, parts.service.handle)
        connection = await connected(directory)
        for request in (Unknown(), Rescan()):
            with pytest.raises(ControlError, match="not a request: "):
                await connection.request(request, SplitterStatus)
        status = await SplitterClient(connection).mark("noon")
        assert state.copy is not None
        assert status.copy == RunningCopy(state.copy.mark, state.copy_location, None)
        assert (status.mark, status.tail, status.bypass_cause) == (2, parts.pipeline.splitter.journal.tail, "")
        await connection.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (ReadStatus(), b'{"op":"status"}'),
        (TakeSnapshot(), b'{"op":"snapshot"}'),
        (SetBookmark("noon"), b'{"op":"bookmark","name":"noon"}'),
    ],
)
def test_commands_ask_a_protect_of_another_version_as_it_knows_it(request_: msgspec.Struct, line: bytes) -> None:
    assert msgspec.json.encode(request_) == line


@pytest.mark.parametrize(
    ("reply", "words", "exit_code"),
    [
        (b'{"error": "no room", "exit_code": 2, "retryable": true}', "no room", 2),
        (b'{"ok": {"other": 1}}', "restart it", 1),
        (b'{"error": {"message": "no room"}}', "restart it", 1),
    ],
)
async def test_the_reply_of_another_version_is_understood_or_said_to_be_one(
    tmp_path: Path, reply: bytes, words: str, exit_code: int
) -> None:
    path = tmp_path / NAME
    with trio.fail_after(MARGIN_S):
        async with trio.open_nursery() as nursery:

            async def answer(stream: trio.SocketStream) -> None:
                await stream.receive_some()
                await stream.send_all(reply + b"\n")

            sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
            await sock.bind(str(path))
            sock.listen(1)
            nursery.start_soon(trio.serve_listeners, answer, [trio.SocketListener(sock)])
            connection = await connected(tmp_path)
            with pytest.raises(ControlError, match=words) as caught:
                await connection.request(Ask("x"), list[int])
            assert caught.value.exit_code == exit_code
            await connection.aclose()
            nursery.cancel_scope.cancel()


async def test_who_asks_is_told_that_the_splitter_ended(tmp_path: Path) -> None:
    async def handle(request: Ask) -> dict[str, Any]:
        raise trio.BrokenResourceError("closed by the other side")

    async with served(tmp_path, handle):
        client = await connected(tmp_path)
        with pytest.raises(ControlError, match="the splitter ended"):
            await client.request(Ask("status"), dict[str, Any])
        await client.aclose()


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    made = Parts(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda path: path.write_bytes("noon\nn\xf6\xf6n\n".encode("latin-1")),
            "damaged at byte 6: .* mend it",
        ),
        (lambda path: path.mkdir(), "reading the names of bookmarks: Is a directory"),
    ],
)
async def test_a_list_of_bookmarks_that_cannot_be_read_is_named(parts: Parts, spoil: Any, words: str) -> None:
    path = Path(parts.pipeline.state) / BOOKMARKS_FILE
    spoil(path)
    control = ShipperControl(parts.shipper, parts.pipeline.state, "g")
    with pytest.raises(PitfsError, match=f"^{path}: {words}"):
        await control.handle(SetBookmark("late"))
    assert parts.pipeline.splitter.state.mark == 1, "not set without its name being kept"


@pytest.mark.parametrize("name", ["latest", "seq-12", "2026-11-22", "5m-ago", "12-59", "yesterday", "../x", ""])
async def test_a_new_bookmark_has_no_name_that_reads_as_a_time_or_is_none(parts: Parts, name: str) -> None:
    """Here it enters, whoever asks; what older productions have sent stays in their stores."""
    control = ShipperControl(parts.shipper, parts.pipeline.state, "g")
    with pytest.raises(UsageError, match=f"^bookmark '{name}'"):
        await control.handle(SetBookmark(name))
    assert parts.pipeline.splitter.state.mark == 1
    assert not os.path.exists(os.path.join(parts.pipeline.state, BOOKMARKS_FILE))


async def test_a_snapshot_without_a_link_fails_after_its_grace_and_says_since_when_and_what_to_do(
    parts: Parts, autojump_clock: MockClock
) -> None:
    control, status = ShipperControl(parts.shipper, parts.pipeline.state, "g"), parts.shipper.status
    assert (await control.status(10**18))["link_down_since"] is None
    status.enter(Phase.CONNECTING)
    status.link_failed(LinkError("here:1: connection refused"))
    await trio.sleep(7)
    assert (await control.status(10**18))["link_down_since"] == format_instant(10**18 - 7 * 10**9)
    begun = trio.current_time()
    words = r"not on the replica yet: here:1: connection refused \(down since 20[0-9T-]+Z\); .* mend the link"
    with pytest.raises(PitfsError, match=words) as caught:
        await control.handle(TakeSnapshot())
    assert trio.current_time() - begun == pytest.approx(SNAPSHOT_GRACE_S)
    assert caught.value.exit_code == EXIT_FAILED


def test_the_help_of_snapshot_names_how_long_it_waits_for_a_link() -> None:
    assert f"waits {SNAPSHOT_GRACE_S:g} s" in snapshot.DESCRIPTION


@pytest.mark.parametrize("terminal", [True, False])
async def test_on_a_terminal_a_snapshot_says_at_once_that_the_link_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """The snapshot is answered once that was said, in a pipe at once."""
    said = threading.Event()
    lines: list[str] = []

    def warn(line: str) -> None:
        lines.append(line)
        said.set()

    async def handle(request: ShipperRequest) -> msgspec.Struct | dict[str, Any]:
        if isinstance(request, ReadStatus):
            return {"group": "g", "link": "r:1: no route", "link_down_since": "2026-11-22T23-54-00.123456789Z"}
        if terminal:
            await trio.to_thread.run_sync(said.wait, MARGIN_S)
        return SnapshotTaken("2026-11-22T23-54-07.000000000Z", 1, 1)

    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setattr("pitfs.cli.common.shipper.warn", warn)
    config = write_config(tmp_path, {"root": tmp_path / "backing"})
    (tmp_path / "state").mkdir()
    with trio.fail_after(MARGIN_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, str(tmp_path / "state"), SHIPPER_SOCKET, SHIPPER_REQUESTS.decode, handle)
            assert await trio.to_thread.run_sync(main, ["snapshot", str(config)]) == 0
            nursery.cancel_scope.cancel()
    wanted = "g: the link is down since 2026-11-22T23-54-00Z (r:1: no route): it waits 10 s for it"
    assert lines == ([wanted] if terminal else [])


async def test_a_bookmark_whose_client_leaves_is_set_or_not_named(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = parts.pipeline.splitter.state.mark
    with trio.CancelScope() as scope:
        mark = parts.shipper.mark

        async def leaving(name: str) -> SplitterStatus:
            scope.cancel()
            await trio.lowlevel.checkpoint()
            return await mark(name)

        monkeypatch.setattr(parts.shipper, "mark", leaving)
        await ShipperControl(parts.shipper, parts.pipeline.state, "g").handle(SetBookmark("noon"))
    assert parts.pipeline.splitter.state.mark == before + 1
    assert os.path.exists(os.path.join(parts.pipeline.state, BOOKMARKS_FILE))


async def test_without_descriptors_a_client_waits_and_the_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.socket.socket() as any_socket:
        kind = type(any_socket)  # trio's name for it is abstract
    real, refused = kind.accept, 0

    async def accept(self: trio.socket.SocketType) -> Any:
        nonlocal refused
        if not refused:
            refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return await real(self)

    monkeypatch.setattr(kind, "accept", accept)
    monkeypatch.setattr("pitfs.splitter.control.ACCEPT_AGAIN_S", 0.01)
    async with served(tmp_path, Slow().handle):
        connection = await Connection.open(str(tmp_path), NAME)
        assert await ask(connection, "quick") == "quick"
        await connection.aclose()
    assert refused == 1 and "waits: Too many open files" in caplog.text
