"""Loads in processes of their own, with what was acknowledged, and when, kept outside of the volume.

    python -m tests.helpers.load stamped VOLUME LOG --seed 1 …      stamped writes, straight to a volume
    python -m tests.helpers.load sqlite DIRECTORY LOG --journal WAL numbered rows, each its own commit
    python -m tests.helpers.load postgresql LOG                     the same, by psql; PGHOST and so on say where
    python -m tests.helpers.load tree DIRECTORY --source DIR        copies real files and changes them

LOG gets one ACKNOWLEDGED row after each acknowledged write, fsync or commit, unbuffered, so it is complete
whatever is killed. SIGTERM ends a load after what is under way. An I/O error ends it with exit code 3.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.helpers.processes import ROOT, HostError
from tests.helpers.stamps import MAX_SECTORS, SECTOR_BYTES, Plan

WRITE, FSYNC = 0, 1
EXIT_IO_ERROR: Final = 3
ACKNOWLEDGED: Final = np.dtype([("n", "<i8"), ("kind", "<i8"), ("begun_ns", "<i8"), ("done_ns", "<i8")])
POSTGRESQL_PAYLOAD: Final = "repeat(md5(({n})::text), ({n} % 40)::int)"  # SQL
_ending = threading.Event()  # set by SIGTERM


def read_log(path: Path) -> NDArray[np.void]:
    """All acknowledged rows, in order of acknowledgement."""
    return np.frombuffer(path.read_bytes() if path.exists() else b"", ACKNOWLEDGED)


@contextlib.contextmanager
def running(*arguments: str | Path, environment: Mapping[str, str] = {}) -> Iterator[subprocess.Popen[bytes]]:
    """A load in its own process; on exit it is asked to end, and must have had no error of its own.

    Raises:
        HostError: it ended with anything but 0, or EXIT_IO_ERROR where the test waited for that itself.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.load", *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE,
        env=os.environ | environment,
    )  # fmt: skip
    try:
        yield process
        waited_for = process.returncode is not None
        if process.poll() is None:
            process.terminate()
        _, said = process.communicate(timeout=60)
        if process.returncode != 0 and not (waited_for and process.returncode == EXIT_IO_ERROR):
            raise HostError(f"load {arguments[0]} ended with {process.returncode}: {said.decode()[-2000:]}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)


def stamped(volume: str, log: str, seed: int, first: int, count: int, rate: float, fsync_every: int,
            direct: bool) -> None:  # fmt: skip
    """Writes first, first + 1, … of the plan, `rate` per second (0: as fast as it goes)."""
    descriptor = os.open(volume, os.O_RDWR | (os.O_DIRECT if direct else 0))
    plan = Plan(seed, os.fstat(descriptor).st_size)
    buffer = mmap.mmap(-1, MAX_SECTORS * SECTOR_BYTES)  # aligned, as O_DIRECT wants
    start = time.monotonic()
    with open(log, "ab", buffering=0) as acknowledged:
        for index, n in enumerate(range(first, first + count)):
            if _ending.is_set():
                return
            content, offset = plan.content(n), plan.sectors(n)[0] * SECTOR_BYTES
            buffer[: len(content)] = content
            if rate and (early := start + index / rate - time.monotonic()) > 0:
                time.sleep(early)
            begun = time.time_ns()
            written = os.pwritev(descriptor, [memoryview(buffer)[: len(content)]], offset)
            if written != len(content):
                raise OSError(f"{written} of {len(content)} bytes written")
            acknowledged.write(np.array([(n, WRITE, begun, time.time_ns())], ACKNOWLEDGED).tobytes())
            if fsync_every and n % fsync_every == 0:
                begun = time.time_ns()
                os.fsync(descriptor)
                acknowledged.write(np.array([(n, FSYNC, begun, time.time_ns())], ACKNOWLEDGED).tobytes())


def row_payload(n: int) -> bytes:
    """What row n holds: 100 to 1,500 bytes that only n decides."""
    return random.Random(n).randbytes(100 + n * 7919 % 1400)


def sqlite(directory: str, log: str, journal: str, rate: float) -> None:
    """Commits rows 1, 2, 3 … to DIRECTORY/JOURNAL.db, and changes an earlier one in the same transaction.

    synchronous = EXTRA: FULL doesn't sync the directory after a rollback journal's removal, which is the
    commit, so that a commit acknowledged by FULL may be rolled back after a crash.
    """
    connection = sqlite3.connect(f"{directory}/{journal}.db", isolation_level=None)
    connection.execute(f"PRAGMA journal_mode = {journal}")
    connection.execute("PRAGMA synchronous = EXTRA")
    connection.execute("PRAGMA wal_autocheckpoint = 100")
    connection.execute("CREATE TABLE rows (n INTEGER PRIMARY KEY, payload BLOB, checksum INTEGER)")
    connection.execute("CREATE TABLE counters (slot INTEGER PRIMARY KEY, n INTEGER)")
    start = time.monotonic()
    with open(log, "ab", buffering=0) as acknowledged:
        n = 0
        while not _ending.is_set():
            n += 1
            payload = row_payload(n)
            begun = time.time_ns()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO rows VALUES (?, ?, ?)", (n, payload, zlib.crc32(payload)))
            connection.execute("INSERT OR REPLACE INTO counters VALUES (?, ?)", (n % 50, n))
            connection.execute("COMMIT")
            acknowledged.write(np.array([(n, WRITE, begun, time.time_ns())], ACKNOWLEDGED).tobytes())
            if rate and (early := start + n / rate - time.monotonic()) > 0:
                time.sleep(early)
    connection.close()


def postgresql(log: str, rate: float) -> None:
    """Commits rows 1, 2, 3 … of a new table `numbered`; a row's payload is that which its number makes."""
    command = ["psql", "--no-psqlrc", "--set=ON_ERROR_STOP=1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as psql:
        assert psql.stdin is not None and psql.stdout is not None

        def answered(statement: str, wanted: str) -> None:
            psql.stdin.write(statement + ";\n")
            if (said := psql.stdout.readline().strip()) != wanted:
                raise OSError(f"{statement}: psql says {said!r}")

        answered("CREATE TABLE numbered (n bigint PRIMARY KEY, payload text)", "CREATE TABLE")
        start = time.monotonic()
        with open(log, "ab", buffering=0) as acknowledged:
            n = 0
            while not _ending.is_set():
                n += 1
                begun = time.time_ns()
                answered(f"INSERT INTO numbered VALUES ({n}, {POSTGRESQL_PAYLOAD.format(n=n)})", "INSERT 0 1")
                acknowledged.write(np.array([(n, WRITE, begun, time.time_ns())], ACKNOWLEDGED).tobytes())
                if (early := start + n / rate - time.monotonic()) > 0:
                    time.sleep(early)


def tree(directory: str, source: str, seed: int, pause: float) -> None:
    """Copies the source in, then overwrites, appends, renames, links, removes and copies anew, for ever."""
    random_ = random.Random(seed)
    top = Path(directory)
    turn = 0
    while not _ending.is_set():
        turn += 1
        place = top / f"copy-{turn % 3}"
        shutil.rmtree(place, ignore_errors=True)
        for path in sorted(Path(source).rglob("*")):
            if _ending.is_set():
                return
            target = place / path.relative_to(source)
            if path.is_file() and not path.is_symlink():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
                if random_.random() < 0.3:
                    change(target, random_)
                time.sleep(pause)


def change(path: Path, random_: random.Random) -> None:
    """One of the things that happen to files."""
    what = random_.randrange(5)
    if what == 0:
        with path.open("r+b") as file:
            file.seek(random_.randrange(max(1, path.stat().st_size)))
            file.write(random_.randbytes(random_.randrange(1, 9000)))
    elif what == 1:
        with path.open("ab") as file:
            file.write(random_.randbytes(random_.randrange(1, 9000)))
    elif what == 2:
        path.rename(path.with_suffix(f".{random_.randrange(1000)}"))
    elif what == 3:
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()


def _end(number: int, frame: object) -> None:
    _ending.set()


def main() -> int:
    parser = argparse.ArgumentParser()
    kinds = parser.add_subparsers(dest="kind", required=True)
    stamped_ = kinds.add_parser("stamped")
    stamped_.add_argument("volume")
    stamped_.add_argument("log")
    stamped_.add_argument("--seed", type=int, default=1)
    stamped_.add_argument("--first", type=int, default=1)
    stamped_.add_argument("--count", type=int, default=1 << 40)
    stamped_.add_argument("--rate", type=float, default=0)
    stamped_.add_argument("--fsync-every", type=int, default=0)
    stamped_.add_argument("--direct", action="store_true")
    sqlite_ = kinds.add_parser("sqlite")
    sqlite_.add_argument("directory")
    sqlite_.add_argument("log")
    sqlite_.add_argument("--journal", choices=("WAL", "DELETE"), default="WAL")
    sqlite_.add_argument("--rate", type=float, default=0)
    postgresql_ = kinds.add_parser("postgresql")
    postgresql_.add_argument("log")
    postgresql_.add_argument("--rate", type=float, default=100)
    tree_ = kinds.add_parser("tree")
    tree_.add_argument("directory")
    tree_.add_argument("--source", required=True)
    tree_.add_argument("--seed", type=int, default=1)
    tree_.add_argument("--pause", type=float, default=0.002)
    options = vars(parser.parse_args())
    signal.signal(signal.SIGTERM, _end)
    try:
        run: dict[str, Callable[..., None]] = {
            "stamped": stamped, "sqlite": sqlite, "postgresql": postgresql, "tree": tree
        }  # fmt: skip
        run[options.pop("kind")](**options)
    except (OSError, sqlite3.OperationalError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_IO_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
