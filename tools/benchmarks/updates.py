"""A load for the traces: small updates of a SQLite database in WAL mode, each its own durable commit.

    python updates.py DIRECTORY ROWS UPDATES_PER_S

Says `ready` when the table is made, and updates until SIGTERM. Nine of ten go to the first tenth of the rows.
"""

from __future__ import annotations

import random
import signal
import sqlite3
import sys
import threading
import time

WORDS = (
    "account", "amount", "paid", "open", "closed", "late", "due", "invoice", "order", "customer", "street",
    "city", "north", "south", "first", "last",
)  # fmt: skip
_ending = threading.Event()


def text(random_: random.Random) -> str:
    """Some 120 characters as people write them, with a number that only this row has."""
    words = " ".join(random_.choice(WORDS) for _ in range(16))
    return f"{words} {random_.getrandbits(64):016x}"


def main(directory: str, rows: int, per_s: float) -> None:
    random_ = random.Random(1)
    connection = sqlite3.connect(f"{directory}/updates.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER, note TEXT)")
    connection.execute("BEGIN")
    made = ((row, random_.randrange(10**9), text(random_)) for row in range(rows))
    connection.executemany("INSERT INTO accounts VALUES (?, ?, ?)", made)
    connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    print("ready", flush=True)
    start, done = time.monotonic(), 0
    while not _ending.is_set():
        row = random_.randrange(rows // 10 if random_.random() < 0.9 else rows)
        amount, note = random_.randrange(-500, 500), text(random_)
        connection.execute(
            "UPDATE accounts SET balance = balance + ?, note = ? WHERE id = ?", (amount, note, row)
        )
        done += 1
        _ending.wait(max(0.0, start + done / per_s - time.monotonic()))
    connection.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: _ending.set())
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
