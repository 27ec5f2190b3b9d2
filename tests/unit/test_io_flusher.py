"""What a kernel refuses is in the log, as the manual says."""

from __future__ import annotations

import ctypes
import errno
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from pitfs.fuse.kernel.io_flusher import set_io_flusher


def test_a_refused_io_flusher_is_in_the_log_of_a_service(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(prctl=refuse))
    caplog.set_level(logging.INFO)  # as `set_up_daemon_logging` sets it without -v
    set_io_flusher()
    (record,) = caplog.records
    assert "PR_SET_IO_FLUSHER: Operation not permitted" in record.message and "slow writes down" in record.message
