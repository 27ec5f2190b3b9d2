"""mount.pitfs whose every read takes a thread and a while, as one from a disk does.

    python -m tests.helpers.slow_mount WAIT_S ARGUMENTS OF mount.pitfs …
"""

from __future__ import annotations

import sys
import time

from pitfs.cli.mount import main


def slow_down(wait_s: float) -> None:
    from pitfs.fuse.replica import Replica
    from pitfs.view.view import PointInTimeView, ReadBuffer

    quick = PointInTimeView.read

    def read(view: PointInTimeView, offset: int, size: int, buffer: ReadBuffer) -> memoryview:
        time.sleep(wait_s)
        return quick(view, offset, size, buffer)

    PointInTimeView.read = read  # type: ignore[method-assign]
    PointInTimeView.try_read_cached = lambda *_: None  # type: ignore[method-assign]
    assert Replica


if __name__ == "__main__":
    slow_down(float(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
