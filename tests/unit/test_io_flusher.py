"""That the kernel refuses PR_SET_IO_FLUSHER is said."""

from __future__ import annotations

import ctypes
import errno
from types import SimpleNamespace

import pytest

from pitfs.fuse.kernel.io_flusher import set_io_flusher


@pytest.mark.parametrize(("answer", "said"), [(0, ""), (-1, "PR_SET_IO_FLUSHER: Operation not permitted")])
def test_a_refusal_is_said(monkeypatch: pytest.MonkeyPatch, answer: int, said: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(prctl=lambda *_: answer))
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EPERM)
    assert set_io_flusher().split(": going on")[0] == said
