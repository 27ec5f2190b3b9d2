"""What stands at the replica's address is missing, is something else, or may not be trusted.

Writes go on and are journalled, `pitfs snapshot` fails in bounded time with the cause, the log says each cause
once, and as soon as the right replica is there it gets everything.
"""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import trustme

from pitfs.link.protocol.frames import PREFACE, Refuse, encode
from tests.helpers.hosts import Production, Replica, digest, free_port, xxhsum
from tests.helpers.links import Files, issue
from tests.helpers.peers import peer_that_says
from tests.helpers.processes import pitfs_command, run, wait_until
from tests.helpers.refusals import refused, status_of, together

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]
MIB = 1 << 20


def write(production: Production, number: int) -> None:
    """Writes one block and makes it durable, whatever the link does."""
    fd = os.open(production.volume(), os.O_RDWR)
    try:
        begun = time.monotonic()
        assert os.pwrite(fd, os.urandom(4096), number * 4096) == 4096
        os.fsync(fd)
        assert time.monotonic() - begun < 5
    finally:
        os.close(fd)


def snapshot_fails(production: Production, *words: str, within_s: float) -> None:
    begun = time.monotonic()
    refused([*pitfs_command(), "snapshot", production.config], 1, "g: the snapshot ", "not on the replica yet",
            f"{production.host}:{production.port}: ", *words)  # fmt: skip
    assert time.monotonic() - begun < within_s


def wait_for_cause(production: Production, cause: str) -> None:
    """Until status says that; somebody who waits for a snapshot makes the shipper try at once."""
    with subprocess.Popen(
        [*pitfs_command(), "snapshot", production.config], stderr=subprocess.DEVNULL
    ) as waiting:
        try:
            wait_until(lambda: cause in status_of(production)["link"], cause, 25, 0.2)
        finally:
            waiting.kill()


def log_says_each_cause_once(production: Production, *causes: str) -> None:
    said = [line for line in production.logged().splitlines() if "not replicating" in line]
    for cause in causes:
        assert sum(cause in line for line in said) == 1, (cause, production.logged())
    assert "Traceback" not in production.logged()
    assert not [line for line in production.complaints() if "not replicating" not in line]


def everything_arrives(production: Production, replica: Replica) -> None:
    last = production.snapshot(20)
    assert digest(replica.store(production.group), last) == xxhsum(production.volume())
    listing = replica.listing(production.group)
    assert listing["gaps"] == [] and listing["snapshots"][-1]["instant"] == last
    assert all(interval["granularity_ns"] == 0 for interval in listing["intervals"])
    assert status_of(production)["link"] == "connected"


def test_a_replica_that_is_not_there_or_says_nothing_stops_snapshots_only(tmp_path: Path) -> None:
    """Three groups at once, since each cause takes a snapshot its time of grace."""
    (tmp_path / "silent").mkdir()
    (tmp_path / "unknown").mkdir()
    ours = trustme.CA()
    files = issue(tmp_path, "production", ours, "production.example")
    silent_port = free_port()
    with (
        peer_that_says(None, silent_port),
        Production(tmp_path, {"root": MIB}, port=free_port(), interval="60s") as refusing,
        Production(tmp_path / "silent", {"root": MIB}, port=silent_port, interval="60s") as silent,
        Production(tmp_path / "unknown", {"root": MIB}, port=7420, interval="60s", host="replica.invalid",
                   tls=in_config(files)) as unknown,
    ):  # fmt: skip
        for production in (refusing, silent, unknown):
            production.wait_for_shipper()
            write(production, 1)
        together(
            lambda: snapshot_fails(
                refusing, "connection refused: is `pitfs receive` running there?", within_s=15
            ),
            lambda: snapshot_fails(silent, "no answer yet", within_s=15),
            lambda: snapshot_fails(unknown, "the name can't be resolved", within_s=15),
        )
        for production, word in ((refusing, "connection refused"), (unknown, "can't be resolved")):
            write(production, 2)
            assert word in status_of(production)["link"]
            log_says_each_cause_once(production, word)
            assert len(production.logged().splitlines()) < 6
        silent.terminate()
        unknown.terminate()
        with Replica(tmp_path, refusing.port) as replica:
            write(refusing, 3)
            everything_arrives(refusing, replica)


def in_config(files: Files) -> list[str]:
    return [f'{key} = "{getattr(files, key)}"' for key in ("certificate", "key", "authority")]


def in_options(files: Files) -> list[str]:
    return [word for key in ("certificate", "key", "authority") for word in (f"--{key}", getattr(files, key))]


@pytest.fixture
def pki(tmp_path: Path) -> dict[str, Files]:
    ours, other = trustme.CA(), trustme.CA()
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    return {
        "replica": issue(tmp_path, "replica", ours, "127.0.0.1", "localhost"),
        "production": issue(tmp_path, "production", ours, "production.example"),
        "elsewhere": issue(tmp_path, "elsewhere", ours, "elsewhere.example"),
        "expired": issue(tmp_path, "expired", ours, "127.0.0.1", "localhost", not_after=past),
        "foreign": issue(tmp_path, "foreign", other, "127.0.0.1", "localhost", trust=ours),
        "distrusting": issue(tmp_path, "distrusting", ours, "127.0.0.1", "localhost", trust=other),
    }


def test_replicas_that_may_not_be_trusted_get_nothing_and_the_right_one_everything(
    tmp_path: Path, pki: dict[str, Files]
) -> None:
    port = free_port()
    with Production(
        tmp_path, {"root": MIB}, port=port, interval="60s", host="localhost", tls=in_config(pki["production"])
    ) as production:
        production.wait_for_shipper()
        causes = []
        for number, (who, cause, seen_there) in enumerate((
            ("elsewhere", "its certificate is for another host", ""),
            ("expired", "its certificate has expired", ""),
            ("foreign", "its certificate isn't signed by the authority", ""),
            ("distrusting", "it doesn't know the authority that signed our certificate", "refused"),
            (None, "it doesn't speak TLS", "refused"),
        )):  # fmt: skip
            directory = tmp_path / f"replica-{number}"
            directory.mkdir()
            tls = in_options(pki[who]) if who else ["--insecure"]
            with Replica(directory, port, tls=tls) as replica:
                write(production, number)
                snapshot_fails(production, cause, within_s=15)
                assert list(replica.root.iterdir()) == []
                assert seen_there in replica.logged() and "Traceback" not in replica.logged()
            causes.append(cause)
        with Replica(tmp_path, port, tls=in_options(pki["replica"])) as replica:
            everything_arrives(production, replica)
        log_says_each_cause_once(production, *causes)


def test_peers_that_are_not_this_pitfs_get_nothing_and_the_right_one_everything(
    tmp_path: Path, pki: dict[str, Files]
) -> None:
    port = free_port()
    newer = PREFACE + b"".join(
        encode(Refuse("version", "this replica speaks versions 2 of the protocol", False))
    )

    def tls_replica() -> AbstractContextManager[object]:
        (tmp_path / "tls").mkdir()
        return Replica(tmp_path / "tls", port, tls=in_options(pki["replica"]))

    peers: tuple[tuple[str, Callable[[], AbstractContextManager[object]]], ...] = (
        ("speaks versions 2 of the protocol", lambda: peer_that_says(newer, port)),
        ("the peer isn't pitfs", lambda: peer_that_says(b"HTTP/1.1 400 Bad Request\r\n\r\n", port)),
        ("closed the connection without an answer; does it want TLS?", lambda: peer_that_says(b"", port)),
        ("TLS", tls_replica),
    )
    with Production(tmp_path, {"root": MIB}, port=port, interval="60s") as production:
        production.wait_for_shipper()
        for number, (cause, peer) in enumerate(peers):
            with peer():
                write(production, number)
                wait_for_cause(production, cause)
        with Replica(tmp_path, port) as replica:
            everything_arrives(production, replica)
        log_says_each_cause_once(production, *(cause for cause, _ in peers[:3]))


def test_senders_that_are_not_this_pitfs_are_refused_and_others_go_on(tmp_path: Path) -> None:
    with Replica(tmp_path) as replica, Production(tmp_path, {"root": MIB}, port=replica.port) as production:
        production.snapshot()
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0" * 64):
            with socket.create_connection(("127.0.0.1", replica.port), timeout=10) as sender:
                sender.sendall(words)
                while sender.recv(1 << 16):
                    pass
        wait_until(lambda: replica.logged().count("refused 127.0.0.1") == 3, "three lines in the log", 10)
        write(production, 1)
        everything_arrives(production, replica)
        assert "Traceback" not in replica.logged() and len(replica.complaints()) == 3


@pytest.mark.slow  # each side of the handshake is tested without daemons too
def test_senders_with_a_wrong_or_no_certificate_are_refused_and_others_go_on(
    tmp_path: Path, pki: dict[str, Files]
) -> None:
    with Replica(tmp_path, tls=in_options(pki["replica"])) as replica:
        for name, cause in (
            ("plain", "TLS"),
            ("foreign", "doesn't know the authority that signed our certificate"),
        ):
            directory = tmp_path / name
            directory.mkdir()
            tls = in_config(pki[name]) if name in pki else ["insecure = true"]
            with Production(directory, {"root": MIB}, port=replica.port, group=name, tls=tls) as production:
                production.wait_for_shipper()
                write(production, 1)
                wait_for_cause(production, cause)
        with Production(
            tmp_path, {"root": MIB}, port=replica.port, tls=in_config(pki["production"])
        ) as production:
            write(production, 1)
            everything_arrives(production, replica)
        assert [path.name for path in replica.root.iterdir()] == ["g"]
        assert "Traceback" not in replica.logged()


def test_of_two_hosts_with_copies_of_one_state_the_one_started_last_goes_on(tmp_path: Path) -> None:
    """A virtual machine that was cloned, or put back, while the other one still runs."""
    other = tmp_path / "clone"
    with (
        Replica(tmp_path) as replica,
        Production(tmp_path, {"root": MIB}, port=replica.port, interval="1h") as first,
    ):
        first.snapshot()
        first.terminate()
        other.mkdir()
        run(["cp", "-a", first.backings["root"], other / "backing"])
        run(["cp", "-a", first.state, other / "state"])
        first.restart()
        first.wait_for_shipper()
        with Production(
            other, {"root": other / "backing"}, port=replica.port, interval="1h", state=other / "state"
        ) as second:
            second.volume().write_bytes(b"2" * MIB)
            last = second.snapshot()
            first.volume().write_bytes(b"1" * MIB)
            words = ("not on the replica yet", "another production host", "stop the one that shouldn't")
            refused([*pitfs_command(), "snapshot", first.config], 1, *words)
            assert digest(replica.store(), "latest") == digest(replica.store(), last)
            assert second.snapshot() >= last
            assert "Traceback" not in first.logged() + second.logged() + replica.logged()
