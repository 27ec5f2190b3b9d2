"""mount.pitfs whose every read takes a thread and a while, as one from a disk does.

    python -m tests.helpers.slow_mount WAIT_S BEGUN ARGUMENTS OF mount.pitfs …

The file BEGUN gets a byte when a read begins.
"""

from __future__ import annotations

import os
import sys
import time

from pitfs.cli.mount import main


def slow_down(wait_s: float, begun: int) -> None:
    from pitfs.view.view import PointInTimeView, ReadBuffer

    quick = PointInTimeView.read

    def read(view: PointInTimeView, offset: int, size: int, buffer: ReadBuffer) -> memoryview:
        os.write(begun, b".")
        time.sleep(wait_s)
        return quick(view, offset, size, buffer)

    PointInTimeView.read = read  # type: ignore[method-assign]
    PointInTimeView.try_read_cached = lambda *_: None  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down(float(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    sys.exit(main(sys.argv[3:]))
